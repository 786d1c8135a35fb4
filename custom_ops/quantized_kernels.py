"""Triton kernels over packed weights (see `layouts`): GEMV, the sum of its partial results, dequantization and row gathering.

A program works on ROWS neighbouring rows of the matrix [N, K], a lane on whole rows: loads are coalesced and no lane needs another's data.
A block format is three constants: BITS of a quant, BLOCK elements (32 or 256), and MINIMUM, whether the format stores minima.
A quant is read as q in 0 .. 2^BITS - 1; the weight is scale * q + offset, where offset = -2^(BITS - 1) * scale if there are no minima.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _octet(words, stride, rows, mask, g, j: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements 8j .. 8j + 7 of group g as two words of four quants, one per byte. `words` is the block's first word.

    BITS = 4: both words are the nibble word as loaded, the quants in its low and in its high nibbles, the other nibbles not cleared.
    """
    if BITS == 8:  # signed bytes + 128
        low = tl.load(words + (8 * g + 2 * j) * stride + rows, mask) ^ -0x7F7F7F80
        high = tl.load(words + (8 * g + 2 * j + 1) * stride + rows, mask) ^ -0x7F7F7F80
    else:
        low = tl.load(words + (4 * g + j) * stride + rows, mask)
        high = low
    if BITS == 5:
        fifth = tl.load(words + (BLOCK // 8 + g) * stride + rows, mask)
        low = (low & 0x0F0F0F0F) | (((fifth >> (2 * j)) & 0x01010101) << 4)
        high = ((high >> 4) & 0x0F0F0F0F) | (((fifth >> (2 * j + 1)) & 0x01010101) << 4)
    if BITS == 6:
        upper = tl.load(words + (BLOCK // 8 + 2 * g + j // 2) * stride + rows, mask) >> (4 * (j % 2))
        low = (low & 0x0F0F0F0F) | ((upper & 0x03030303) << 4)
        high = ((high >> 4) & 0x0F0F0F0F) | (((upper >> 2) & 0x03030303) << 4)
    return low, high


@triton.jit
def _scale(words, halves, stride, halves_stride, rows, mask, g, half: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
           MINIMUM: tl.constexpr):
    """(scale, offset) of group g, float32 [ROWS]; BITS = 6: of its first (half = 0) or last 16 elements."""
    scale = tl.load(halves + rows, mask).to(tl.float32)
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
    if not MINIMUM:
        offset = scale * -(1 << (BITS - 1))
    return scale, offset


@triton.jit
def _load4(x):
    """x[0 .. 3] as float32 scalars."""
    if x.dtype.element_ty == tl.bfloat16:  # one load of 64 bits; a bfloat16 is the upper half of a float32
        pair = tl.load(x.to(tl.pointer_type(tl.int64)))
        low = pair.to(tl.int32)
        high = (pair >> 32).to(tl.int32)
        x0 = (low << 16).to(tl.float32, bitcast=True)
        x1 = (low & -65536).to(tl.float32, bitcast=True)
        x2 = (high << 16).to(tl.float32, bitcast=True)
        x3 = (high & -65536).to(tl.float32, bitcast=True)
    else:
        x0 = tl.load(x)
        x1 = tl.load(x + 1)
        x2 = tl.load(x + 2)
        x3 = tl.load(x + 3)
    return x0, x1, x2, x3


@triton.jit
def _dot4(acc, word, x, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """acc + 2^-69 sum of q[b] x[b], q[b] at bits 8b + SHIFT of the word.

    A quant left where it is in bits 0 .. 23 is the float32 q * 2^(position - 149), a subnormal or just above: no conversion needed.
    x is scaled to make up for the position, within float32's range for |x| below 2^47.
    """
    x0, x1, x2, x3 = _load4(x)
    acc += (word & (MASK << SHIFT)).to(tl.float32, bitcast=True) * (x0 * 2.0 ** (80 - SHIFT))
    acc += (word & (MASK << (SHIFT + 8))).to(tl.float32, bitcast=True) * (x1 * 2.0 ** (72 - SHIFT))
    acc += (word & (MASK << (SHIFT + 16))).to(tl.float32, bitcast=True) * (x2 * 2.0 ** (64 - SHIFT))
    acc += ((word >> 8) & (MASK << (SHIFT + 16))).to(tl.float32, bitcast=True) * (x3 * 2.0 ** (64 - SHIFT))
    return acc


@triton.jit
def gemv(x, words, halves, partials, n, k, splits, stride, halves_stride, BITS: tl.constexpr, BLOCK: tl.constexpr,
         MINIMUM: tl.constexpr, WORDS: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
         ROWS: tl.constexpr, EVEN: tl.constexpr):
    """partials[s, t, n] = the product of x[t] and row n over the split's share of K. Grid (row blocks, splits, T).

    x [T, k], contiguous; words [k / BLOCK, WORDS, n], `stride` from word to word; partials float32 [splits, T, n].
    GROUPS: groups of 32 elements taken at a time; it divides k / 32 and, unless BLOCK is 32, BLOCK / 32.
    """
    split = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = None if EVEN else rows < n
    x += token * k
    acc = tl.zeros((ROWS,), tl.float32)
    PARTS: tl.constexpr = 2 if BITS == 6 else 1
    STEPS: tl.constexpr = BLOCK // 32 // GROUPS  # per block
    steps = k // (32 * GROUPS)
    for step in tl.range(split * steps // splits, (split + 1) * steps // splits, num_stages=STAGES):
        step_x = x + step * (32 * GROUPS)
        for i in tl.static_range(GROUPS):
            if BLOCK == 32:
                block = tl.cast(step * GROUPS + i, tl.int64)
                g = 0
            else:
                block = tl.cast(step // STEPS, tl.int64)
                g = step % STEPS * GROUPS + i
            block_words = words + block * WORDS * stride
            block_halves = halves + block * HALVES * halves_stride
            for part in tl.static_range(PARTS):
                part_x = step_x + 32 * i + 16 * part
                dot = tl.zeros((ROWS,), tl.float32)
                for j in tl.static_range(4 // PARTS):
                    low, high = _octet(block_words, stride, rows, mask, g, part * 2 + j, BITS, BLOCK)
                    dot = _dot4(dot, low, part_x + 8 * j, 0, 15 if BITS == 4 else 255)
                    dot = _dot4(dot, high, part_x + 8 * j + 4, 4 if BITS == 4 else 0, 15 if BITS == 4 else 255)
                scale, offset = _scale(block_words, block_halves, stride, halves_stride, rows, mask, g, part, BITS, BLOCK, MINIMUM)
                total = tl.sum(tl.load(part_x + tl.arange(0, 32 // PARTS)).to(tl.float32))
                acc += (scale * 2.0**69) * dot + offset * total
    tokens = tl.num_programs(2)
    tl.store(partials + (split * tokens + token) * n + rows, acc, mask)


@triton.jit
def sum_partials(partials, out, n, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """out[i] = the sum over s of partials[s, i], float32 [splits, n], in a fixed order; SPLITS is the next power of two."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.arange(0, SPLITS)
    tile = tl.load(partials + s[:, None] * n + rows[None, :], (s[:, None] < splits) & (rows[None, :] < n), other=0.0)
    tl.store(out + rows, tl.sum(tile, 0).to(out.dtype.element_ty), rows < n)


@triton.jit
def dequantize_rows(words, halves, ids, out, n, k, stride, halves_stride, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr,
                    WORDS: tl.constexpr, HALVES: tl.constexpr, GATHER: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                    EVEN: tl.constexpr):
    """The matrix transposed, out [k, n]; with GATHER its rows ids[0 .. n], out [n, k]. Grid (row blocks, groups of K / GROUPS)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = None if EVEN else rows < n
    first = tl.program_id(1) * GROUPS
    block = first // (BLOCK // 32)
    words += block.to(tl.int64) * WORDS * stride
    halves += block.to(tl.int64) * HALVES * halves_stride
    source = tl.load(ids + rows, mask) if GATHER else rows
    if GATHER:
        out += rows.to(tl.int64) * k + first * 32
    else:
        out += first.to(tl.int64) * 32 * n + rows
    step = 1 if GATHER else n
    MASK: tl.constexpr = (1 << BITS) - 1
    for i in tl.static_range(GROUPS):
        g = first % (BLOCK // 32) + i
        # All loads before the first store: none can be moved over one.
        low0, high0 = _octet(words, stride, source, mask, g, 0, BITS, BLOCK)
        low1, high1 = _octet(words, stride, source, mask, g, 1, BITS, BLOCK)
        low2, high2 = _octet(words, stride, source, mask, g, 2, BITS, BLOCK)
        low3, high3 = _octet(words, stride, source, mask, g, 3, BITS, BLOCK)
        scale0, offset0 = _scale(words, halves, stride, halves_stride, source, mask, g, 0, BITS, BLOCK, MINIMUM)
        scale1, offset1 = scale0, offset0
        if BITS == 6:
            scale1, offset1 = _scale(words, halves, stride, halves_stride, source, mask, g, 1, BITS, BLOCK, MINIMUM)
        for e in tl.static_range(32):
            low = low0 if e < 8 else (low1 if e < 16 else (low2 if e < 24 else low3))
            high = high0 if e < 8 else (high1 if e < 16 else (high2 if e < 24 else high3))
            if e % 8 < 4:
                q = (low >> (8 * (e % 4))) & MASK
            else:
                q = (high >> (8 * (e % 4) + (4 if BITS == 4 else 0))) & MASK
            if MINIMUM:
                value = q.to(tl.float32) * scale0 + offset0
            else:  # rounded once, as the reference does
                value = (q - (1 << (BITS - 1))).to(tl.float32) * (scale0 if e < 16 else scale1)
            tl.store(out + (32 * i + e) * step, value.to(out.dtype.element_ty), mask)
