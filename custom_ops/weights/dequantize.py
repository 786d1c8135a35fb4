"""The Triton kernel that dequantizes packed weights (see `layouts`), all rows or some, and what it shares with the GEMV.

A program works on ROWS neighbouring rows of the matrix [N, K], a lane on whole rows: loads are coalesced and no lane needs another's data.
A block format is six constants: BITS of a quant, BLOCK elements (32 or 256), MINIMUM, whether it stores minima, ZERO, SCALES, what a group
is scaled by (see `block_types.SCALES`), and LEVELS, a table.
A quant is read as q in 0 .. 2^BITS - 1; the weight is scale * q + offset, or scale * (q - ZERO) if there are no minima. With LEVELS (see
`format_constants`) the quant is a number of the table, and q is what stands there, a byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import INTERPRETED


@triton.jit
def _four_levels(LEVELS: tl.constexpr, i: tl.constexpr):
    """Word i of the table, int32."""
    return tl.full([], (((LEVELS >> (32 * i)) & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000, tl.int32)


@triton.jit
def _level(number, LEVELS: tl.constexpr):
    """One byte of the table, by plain selections: for the interpreter."""
    first = tl.where(number < 4, _four_levels(LEVELS, 0), _four_levels(LEVELS, 1))
    last = tl.where(number < 12, _four_levels(LEVELS, 2), _four_levels(LEVELS, 3))
    return (tl.where(number < 8, first, last) >> (8 * (number & 3))) & 255


@triton.jit
def levels8(word, LEVELS: tl.constexpr):
    """The bytes of the table that the nibbles of a word are numbers of: those of the low nibbles, those of the high ones."""
    if INTERPRETED:
        low = word & 0
        high = low
        for b in tl.static_range(4):
            low |= _level((word >> (8 * b)) & 15, LEVELS) << (8 * b)
            high |= _level((word >> (8 * b + 4)) & 15, LEVELS) << (8 * b)
        return low, high
    # prmt takes 4 numbers below 8 at a time: once from each half of the table, then by bit 3, first for nibbles 0 .. 3, then for 4 .. 7.
    # zero is 0, unknown to the assembler, which then keeps zero ^ constant in a register; a constant it would fetch again for every lookup.
    return tl.inline_asm_elementwise(
        """{ .reg .b32 number, half, a, b, c, zero, first, last;
        mov.u32 zero, %lanemask_lt;
        shr.u32 zero, zero, 31;
        xor.b32 first, zero, $3;
        xor.b32 last, zero, $5;
        and.b32 number, $2, 0x77777777;
        shr.b32 half, $2, 1;
        and.b32 half, half, 0x44444444;
        or.b32 half, half, 0x32103210;
        prmt.b32 a, first, $4, number;
        prmt.b32 b, last, $6, number;
        prmt.b32 a, a, b, half;
        shr.b32 number, number, 16;
        shr.b32 half, half, 16;
        prmt.b32 b, first, $4, number;
        prmt.b32 c, last, $6, number;
        prmt.b32 b, b, c, half;
        prmt.b32 $0, a, b, 0x6420;
        prmt.b32 $1, a, b, 0x7531; }""",
        "=r,=r,r,r,r,r,r",
        [word, _four_levels(LEVELS, 0), _four_levels(LEVELS, 1), _four_levels(LEVELS, 2), _four_levels(LEVELS, 3)],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def unpack8(first, second, extra, j, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Elements 8j .. 8j + 7 of a group as two words of four quants, one per byte.

    first, second: byte words 2j, 2j + 1 (BITS = 8), else nibble word j twice, or two-bit word j / 2 (BITS < 4); extra: the one-bit word, or
    two-bit word j / 2 above nibbles.
    """
    if BITS == 8:  # signed bytes + 128
        return first ^ -0x7F7F7F80, second ^ -0x7F7F7F80
    if LEVELS:
        return levels8(first, LEVELS)
    if BITS < 4:
        two = first >> (4 * (j % 2))
        low = two & 0x03030303
        high = (two >> 2) & 0x03030303
        if BITS == 3:
            low |= ((extra >> (2 * j)) & 0x01010101) << 2
            high |= ((extra >> (2 * j + 1)) & 0x01010101) << 2
        return low, high
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
def octet(words, stride, rows, mask, g, j: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """`unpack8` of group g of a block; `words` is the block's first word."""
    if BITS == 8:
        first = tl.load(words + (8 * g + 2 * j) * stride + rows, mask)
        return unpack8(first, tl.load(words + (8 * g + 2 * j + 1) * stride + rows, mask), first, j, BITS, LEVELS)
    if BITS < 4:
        word = tl.load(words + (2 * g + j // 2) * stride + rows, mask)
    else:
        word = tl.load(words + (4 * g + j) * stride + rows, mask)
    extra = word
    if BITS == 3:
        extra = tl.load(words + (BLOCK // 16 + g) * stride + rows, mask)
    if BITS == 5:
        extra = tl.load(words + (BLOCK // 8 + g) * stride + rows, mask)
    if BITS == 6:
        extra = tl.load(words + (BLOCK // 8 + 2 * g + j // 2) * stride + rows, mask)
    return unpack8(word, word, extra, j, BITS, LEVELS)


@triton.jit
def float_half(half, SCALES: tl.constexpr):
    """A half that is a float16 value, float32: of halves that are not all such it comes as an integer."""
    if SCALES == "split":
        half = half.to(tl.float16, bitcast=True)
    return half.to(tl.float32)


@triton.jit
def power_of_two(half, g):
    """2^(e - 128), float32, of exponent g % 2 of a half. Those of e < 2 are below the normal numbers."""
    e = (half.to(tl.int32) >> (8 * (g % 2))) & 255
    return tl.where(e < 2, 0x00200000 * (e + 1), (e - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_and_offset(words, halves, stride, halves_stride, rows, mask, g, half: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
                     MINIMUM: tl.constexpr, SCALES: tl.constexpr):
    """(scale, offset) of group g, float32 [ROWS], or of its first (half = 0) or last 16 elements. MINIMUM: there is an offset."""
    stored = tl.load(halves + rows, mask)
    scale = power_of_two(stored, g) if SCALES == "e8m0" else float_half(stored, SCALES)
    offset = scale
    if MINIMUM:
        offset = tl.load(halves + halves_stride + rows, mask).to(tl.float32)
    if BLOCK == 256:
        shift = 8 * (g % 4)
        if SCALES == "four":
            s = tl.load(words + (8 * BITS + g // 2) * stride + rows, mask) >> (16 * (g % 2) + 8 * half)
            scale *= (s & 15).to(tl.float32)
            offset *= -((s >> 4) & 15).to(tl.float32)
        elif MINIMUM:
            first = BLOCK // 8 + (8 if BITS == 5 else 0)
            s = tl.load(words + first * stride + rows, mask)
            m = tl.load(words + (first + 1) * stride + rows, mask)
            upper = tl.load(words + (first + 2) * stride + rows, mask) >> shift
            s = tl.where(g < 4, (s >> shift) & 63, (upper & 15) | (((s >> shift) >> 2) & 48))
            m = tl.where(g < 4, (m >> shift) & 63, ((upper >> 4) & 15) | (((m >> shift) >> 2) & 48))
            scale *= s.to(tl.float32)
            offset *= -m.to(tl.float32)
        elif SCALES == "split":
            s = tl.load(words + 8 * BITS * stride + rows, mask) >> (4 * g)
            upper = tl.load(halves + halves_stride + rows, mask).to(tl.int32) >> (2 * g)
            scale *= (((s & 15) | ((upper & 3) << 4)) - 32).to(tl.float32)
        elif SCALES == "six":
            b = 2 * (g % 2) + half
            s = tl.load(words + (24 + g // 2 % 2) * stride + rows, mask) >> (4 * (g // 4) + 8 * b)
            upper = tl.load(words + 26 * stride + rows, mask) >> (2 * (g // 2) + 8 * b)
            scale *= (((s & 15) | ((upper & 3) << 4)) - 32).to(tl.float32)
        else:  # 16 signed bytes
            s = tl.load(words + (48 + g // 2) * stride + rows, mask)
            scale *= ((s << (24 - 16 * (g % 2) - 8 * half)) >> 24).to(tl.float32)
    return scale, offset


@triton.jit
def kiln_dequantize(words, halves, ids, out, n, k, stride, halves_stride, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr,
                    WORDS: tl.constexpr, HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr,
                    GATHER: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """The matrix transposed, out [k, n]; with GATHER its rows ids[0 .. n], out [n, k]. Grid (row blocks, groups of K / GROUPS)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = None if EVEN else rows < n
    first = tl.program_id(1) * GROUPS
    block = first // (BLOCK // 32)
    words += block.to(tl.int64) * WORDS * stride
    halves += (block // 2 if SCALES == "e8m0" else block).to(tl.int64) * HALVES * halves_stride
    source = tl.maximum(tl.load(ids + rows, mask), 0) if GATHER else rows
    if GATHER:
        out += rows.to(tl.int64) * k + first * 32
    else:
        out += first.to(tl.int64) * 32 * n + rows
    step = 1 if GATHER else n
    MASK: tl.constexpr = 255 if LEVELS else (1 << BITS) - 1
    for i in tl.static_range(GROUPS):
        g = first % (BLOCK // 32) + i
        # All loads before the first store: none can be moved over one.
        low0, high0 = octet(words, stride, source, mask, g, 0, BITS, BLOCK, LEVELS)
        low1, high1 = octet(words, stride, source, mask, g, 1, BITS, BLOCK, LEVELS)
        low2, high2 = octet(words, stride, source, mask, g, 2, BITS, BLOCK, LEVELS)
        low3, high3 = octet(words, stride, source, mask, g, 3, BITS, BLOCK, LEVELS)
        scaled = first + i if SCALES == "e8m0" else g
        scale0, offset0 = scale_and_offset(words, halves, stride, halves_stride, source, mask, scaled, 0, BITS, BLOCK, MINIMUM, SCALES)
        scale1 = scale0
        offset1 = offset0
        if SCALES == "int8" or SCALES == "six" or SCALES == "four":
            scale1, offset1 = scale_and_offset(words, halves, stride, halves_stride, source, mask, g, 1, BITS, BLOCK, MINIMUM, SCALES)
        for e in tl.static_range(32):
            low = low0 if e < 8 else (low1 if e < 16 else (low2 if e < 24 else low3))
            high = high0 if e < 8 else (high1 if e < 16 else (high2 if e < 24 else high3))
            if e % 8 < 4:
                q = (low >> (8 * (e % 4))) & MASK
            else:
                q = (high >> (8 * (e % 4))) & MASK
            if MINIMUM:
                value = q.to(tl.float32) * (scale0 if e < 16 else scale1) + (offset0 if e < 16 else offset1)
            else:  # rounded once, as the reference does
                value = (q - ZERO).to(tl.float32) * (scale0 if e < 16 else scale1)
            tl.store(out + (32 * i + e) * step, value.to(out.dtype.element_ty), mask)
