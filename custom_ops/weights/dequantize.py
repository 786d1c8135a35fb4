"""The Triton kernel that dequantizes packed weights (see `layouts`), all rows or some, and what it shares with the GEMV.

A program works on ROWS neighbouring rows of the matrix [N, K], a lane on whole rows: loads are coalesced and no lane needs another's data.
A block format is three constants: BITS of a quant, BLOCK elements (32 or 256), and MINIMUM, whether the format stores minima.
A quant is read as q in 0 .. 2^BITS - 1; the weight is scale * q + offset, or scale * (q - 2^(BITS - 1)) if there are no minima.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack8(first, second, extra, j: tl.constexpr, BITS: tl.constexpr):
    """Elements 8j .. 8j + 7 of a group as two words of four quants, one per byte.

    first, second: byte words 2j, 2j + 1 (BITS = 8), else nibble word j twice; extra: the fifth-bit word, or two-bit word j / 2.
    """
    if BITS == 8:  # signed bytes + 128
        return first ^ -0x7F7F7F80, second ^ -0x7F7F7F80
    low = first & 0x0F0F0F0F
    high = (second >> 4) & 0x0F0F0F0F
    if BITS == 5:
        low |= ((extra >> (2 * j)) & 0x01010101) << 4
        high |= ((extra >> (2 * j + 1)) & 0x01010101) << 4
    if BITS == 6:
        upper = extra >> (4 * (j % 2))
        low |= (upper & 0x03030303) << 4
        high |= ((upper >> 2) & 0x03030303) << 4
    return low, high


@triton.jit
def octet(words, stride, rows, mask, g, j: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """`unpack8` of group g of a block; `words` is the block's first word."""
    if BITS == 8:
        first = tl.load(words + (8 * g + 2 * j) * stride + rows, mask)
        return unpack8(first, tl.load(words + (8 * g + 2 * j + 1) * stride + rows, mask), first, j, BITS)
    word = tl.load(words + (4 * g + j) * stride + rows, mask)
    extra = word
    if BITS == 5:
        extra = tl.load(words + (BLOCK // 8 + g) * stride + rows, mask)
    if BITS == 6:
        extra = tl.load(words + (BLOCK // 8 + 2 * g + j // 2) * stride + rows, mask)
    return unpack8(word, word, extra, j, BITS)


@triton.jit
def scale_and_offset(words, halves, stride, halves_stride, rows, mask, g, half: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
           MINIMUM: tl.constexpr):
    """(scale, offset) of group g, float32 [ROWS]; BITS = 6: of its first (half = 0) or last 16 elements. MINIMUM: there is an offset."""
    scale = tl.load(halves + rows, mask).to(tl.float32)
    offset = scale
    if MINIMUM:
        offset = tl.load(halves + halves_stride + rows, mask).to(tl.float32)
    if BLOCK == 256:
        shift = 8 * (g % 4)
        if MINIMUM:
            first = BLOCK // 8 + (8 if BITS == 5 else 0)
            s = tl.load(words + first * stride + rows, mask)
            m = tl.load(words + (first + 1) * stride + rows, mask)
            upper = tl.load(words + (first + 2) * stride + rows, mask) >> shift
            s = tl.where(g < 4, (s >> shift) & 63, (upper & 15) | (((s >> shift) >> 2) & 48))
            m = tl.where(g < 4, (m >> shift) & 63, ((upper >> 4) & 15) | (((m >> shift) >> 2) & 48))
            scale *= s.to(tl.float32)
            offset *= -m.to(tl.float32)
        else:  # 16 signed bytes
            s = tl.load(words + (48 + g // 2) * stride + rows, mask)
            scale *= ((s << (24 - 16 * (g % 2) - 8 * half)) >> 24).to(tl.float32)
    return scale, offset


@triton.jit
def kiln_dequantize(words, halves, ids, out, n, k, stride, halves_stride, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr,
                    WORDS: tl.constexpr, HALVES: tl.constexpr, GATHER: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                    EVEN: tl.constexpr):
    """The matrix transposed, out [k, n]; with GATHER its rows ids[0 .. n], out [n, k]. Grid (row blocks, groups of K / GROUPS)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = None if EVEN else rows < n
    first = tl.program_id(1) * GROUPS
    block = first // (BLOCK // 32)
    words += block.to(tl.int64) * WORDS * stride
    halves += block.to(tl.int64) * HALVES * halves_stride
    source = tl.maximum(tl.load(ids + rows, mask), 0) if GATHER else rows
    if GATHER:
        out += rows.to(tl.int64) * k + first * 32
    else:
        out += first.to(tl.int64) * 32 * n + rows
    step = 1 if GATHER else n
    MASK: tl.constexpr = (1 << BITS) - 1
    for i in tl.static_range(GROUPS):
        g = first % (BLOCK // 32) + i
        # All loads before the first store: none can be moved over one.
        low0, high0 = octet(words, stride, source, mask, g, 0, BITS, BLOCK)
        low1, high1 = octet(words, stride, source, mask, g, 1, BITS, BLOCK)
        low2, high2 = octet(words, stride, source, mask, g, 2, BITS, BLOCK)
        low3, high3 = octet(words, stride, source, mask, g, 3, BITS, BLOCK)
        scale0, offset0 = scale_and_offset(words, halves, stride, halves_stride, source, mask, g, 0, BITS, BLOCK, MINIMUM)
        scale1 = scale0
        if BITS == 6:
            scale1, _ = scale_and_offset(words, halves, stride, halves_stride, source, mask, g, 1, BITS, BLOCK, MINIMUM)
        for e in tl.static_range(32):
            low = low0 if e < 8 else (low1 if e < 16 else (low2 if e < 24 else low3))
            high = high0 if e < 8 else (high1 if e < 16 else (high2 if e < 24 else high3))
            if e % 8 < 4:
                q = (low >> (8 * (e % 4))) & MASK
            else:
                q = (high >> (8 * (e % 4))) & MASK
            if MINIMUM:
                value = q.to(tl.float32) * scale0 + offset0
            else:  # rounded once, as the reference does
                value = (q - (1 << (BITS - 1))).to(tl.float32) * (scale0 if e < 16 else scale1)
            tl.store(out + (32 * i + e) * step, value.to(out.dtype.element_ty), mask)
