"""What a thread of `kiln_gemv_sums` reads of blocks of 256, and what the tensor cores are given of it.

A tensor has one element for each thread. Thread t of a warp has octet t % 4 of a group of 32, of rows 4 (t / 4) .. + 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import INTERPRETED
from kiln.custom_ops.weights.dequantize import unpack8

GROUPS = tl.constexpr(8)  # of a block


@triton.jit
def four_if(words, keep):
    """Four neighbouring int32 in one load where it stands, if `keep` is not 0; they leave no trace in the L1 cache."""
    if INTERPRETED:
        return (tl.load(words, keep != 0, other=0), tl.load(words + 1, keep != 0, other=0), tl.load(words + 2, keep != 0, other=0),
                tl.load(words + 3, keep != 0, other=0))
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }", "=r,=r,=r,=r,l,r",
        [words, keep], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1)


@triton.jit
def _four_halves_if(halves, keep):
    """The halves of four neighbouring rows as two words, as `four_if`."""
    words = halves.to(tl.pointer_type(tl.int32))
    if INTERPRETED:
        return tl.load(words, keep != 0, other=0), tl.load(words + 1, keep != 0, other=0)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p ld.global.L1::no_allocate.v2.b32 {$0, $1}, [$2]; }", "=r,=r,l,r",
        [words, keep], dtype=(tl.int32, tl.int32), is_pure=False, pack=1)


@triton.jit
def two(words):
    """Two neighbouring int32 in one load where it stands; `words` is a multiple of 8 bytes."""
    if INTERPRETED:
        return tl.load(words), tl.load(words + 1)
    return tl.inline_asm_elementwise("ld.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [words], dtype=(tl.int32, tl.int32), is_pure=False,
                                     pack=1)


@triton.jit
def no_load_earlier(thread):
    """The assembler moves no load from below to above: what is loaded ahead would take registers before those of its group are free."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def row_float(words, r: tl.constexpr):
    """Half r of two words of halves, float32."""
    bits = words[r // 2] >> 16 if r % 2 else words[r // 2]
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(word, b: tl.constexpr):
    """Byte b of the word, signed."""
    if INTERPRETED:
        return (word << (24 - 8 * b)) >> 24
    return tl.inline_asm_elementwise(f"prmt.b32 $0, $1, 0, {0x8880 + 0x1111 * b};", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _dot(a, b, SIGNED: tl.constexpr):
    """The sum over four bytes of a, SIGNED or not, times signed b, for the interpreter."""
    total = (a & 0) * b
    for i in tl.static_range(4):
        left = (a << (24 - 8 * i)) >> 24 if SIGNED else (a >> (8 * i)) & 255
        total += left * ((b << (24 - 8 * i)) >> 24)
    return total


@triton.constexpr_function
def product_asm(signed: bool) -> str:
    """m16n8k32, its sums from $10, which is 0."""
    return (f"mma.sync.aligned.m16n8k32.row.col.s32.{'s8' if signed else 'u8'}.s8.s32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $10, $10, $10};")


@triton.jit
def tile_product(a0, a1, a2, a3, b0, b1, THREADS: tl.constexpr, SIGNED: tl.constexpr):
    """m16n8k32 of a and signed b, as the hardware lays them out, thread g * 4 + t of a warp: a0, a2 row g, a1, a3 row g + 8, with
    b0 .. of column g the four bytes t and t + 4 of K; the result columns 2 t and 2 t + 1 of row g, then of row g + 8. int32.
    """
    if INTERPRETED:
        WARPS: tl.constexpr = THREADS // 32
        b0 = tl.reshape(b0, [WARPS, 1, 8, 4])
        b1 = tl.reshape(b1, [WARPS, 1, 8, 4])
        upper = tl.sum(_dot(tl.reshape(a0, [WARPS, 8, 1, 4]), b0, SIGNED) + _dot(tl.reshape(a2, [WARPS, 8, 1, 4]), b1, SIGNED), 3)
        lower = tl.sum(_dot(tl.reshape(a1, [WARPS, 8, 1, 4]), b0, SIGNED) + _dot(tl.reshape(a3, [WARPS, 8, 1, 4]), b1, SIGNED), 3)
        c0, c1 = tl.split(tl.reshape(upper, [THREADS, 2]))
        c2, c3 = tl.split(tl.reshape(lower, [THREADS, 2]))
        return c0, c1, c2, c3
    return tl.inline_asm_elementwise(
        product_asm(SIGNED),
        "=r,=r,=r,=r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, a0 * 0], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def small_product(a0, a1, b0, THREADS: tl.constexpr):
    """`tile_product` of half as much along K, m16n8k16, without a2, a3 and b1; a is unsigned."""
    if INTERPRETED:
        return tile_product(a0, a1, a0 * 0, a1 * 0, b0, b0 * 0, THREADS, False)
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $7, $7, $7};",
        "=r,=r,=r,=r,r,r,r,r", [a0, a1, b0, a0 * 0], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


@triton.constexpr_function
def signed_levels(levels: int, zero: int) -> int:
    """The table of levels + zero, a byte each, as signed levels."""
    return sum(((levels >> (8 * i) & 255) - zero & 255) << (8 * i) for i in range(16)) if levels else 0


@triton.constexpr_function
def loads_of(bits: int) -> int:
    """Loads of a group's quants: of four rows each, the second of further bits."""
    return 2 if bits in (3, 5, 6) else 1


@triton.constexpr_function
def scale_loads(scales: str) -> int:
    """Loads of a block's words of scales; those that have minima in all bytes end with the word of a thread's own minima."""
    return {"k": 3, "int8": 4, "four": 5, "six": 3, "split": 1}[scales]


@triton.jit
def group_quants(words, octet, g: tl.constexpr, keep, stride: tl.constexpr, BITS: tl.constexpr):
    """The quants of group g of a block, which begins at words, of four rows and a thread's octet: `loads_of` fours."""
    MAIN: tl.constexpr = 4 if BITS >= 4 else 2  # words of a group
    found = four_if(words + (octet if BITS >= 4 else octet // 2) * stride + g * MAIN * stride, keep)
    if BITS == 6:
        found = found + four_if(words + octet // 2 * stride + (GROUPS * MAIN + 2 * g) * stride, keep)
    elif BITS == 3 or BITS == 5:
        found = found + four_if(words + (GROUPS * MAIN + g) * stride, keep)
    return found


@triton.jit
def group_operands(first, extra, j, BITS: tl.constexpr, LEVELS: tl.constexpr, MINIMUM: tl.constexpr):
    """Elements 8j .. 8j + 7 of a group as two words, a quant in each byte.

    As it is where there are minima, else signed: a level, or 2^(8 - BITS) times the quant less half its range.
    """
    if MINIMUM or LEVELS:
        return unpack8(first, first, extra, j, BITS, LEVELS)
    if BITS == 6:
        low = ((first << 2) & 0x3C3C3C3C) ^ -0x7F7F7F80
        high = ((first >> 2) & 0x3C3C3C3C) ^ -0x7F7F7F80
        return low ^ ((extra << (6 - 4 * (j % 2))) & -0x3F3F3F40), high ^ ((extra << (4 - 4 * (j % 2))) & -0x3F3F3F40)
    two = first >> (4 * (j % 2))
    low = ((two << 5) & 0x60606060) ^ -0x7F7F7F80
    high = ((two << 3) & 0x60606060) ^ -0x7F7F7F80
    return low ^ ((extra << (7 - 2 * j)) & -0x7F7F7F80), high ^ ((extra << (6 - 2 * j)) & -0x7F7F7F80)


@triton.jit
def _spread(x):
    """Pairs of bits 0, 4, 8 and 12 of x as bits 4 and 5 of bytes 0 .. 3."""
    x = (x & 0x3333) << 4
    x = (x | (x << 8)) & 0x03300330
    return (x | (x << 4)) & 0x30303030


@triton.jit
def _less_32(bytes):
    """Bytes below 64, each less 32, signed."""
    return (bytes + 0x60606060) ^ -0x7F7F7F80


@triton.jit
def row_scales(loaded, halves, r: tl.constexpr, SCALES: tl.constexpr):
    """The scales of row r as words of signed bytes, see `group_scale`."""
    if SCALES == "k":
        s = loaded[r]
        return s & 0x3F3F3F3F, (loaded[8 + r] & 0x0F0F0F0F) | ((s >> 2) & 0x30303030)
    elif SCALES == "int8":
        return loaded[r], loaded[4 + r], loaded[8 + r], loaded[12 + r]
    elif SCALES == "four":
        return loaded[r] & 0x0F0F0F0F, loaded[4 + r] & 0x0F0F0F0F, loaded[8 + r] & 0x0F0F0F0F, loaded[12 + r] & 0x0F0F0F0F
    elif SCALES == "six":
        a = loaded[r]
        b = loaded[4 + r]
        upper = loaded[8 + r]
        return (_less_32((a & 0x0F0F0F0F) | ((upper << 4) & 0x30303030)), _less_32((b & 0x0F0F0F0F) | ((upper << 2) & 0x30303030)),
                _less_32(((a >> 4) & 0x0F0F0F0F) | (upper & 0x30303030)), _less_32(((b >> 4) & 0x0F0F0F0F) | ((upper >> 2) & 0x30303030)))
    else:
        upper = halves[r // 2] >> 16 if r % 2 else halves[r // 2]
        return (_less_32((loaded[r] & 0x0F0F0F0F) | _spread(upper)), _less_32(((loaded[r] >> 4) & 0x0F0F0F0F) | _spread(upper >> 2)))


@triton.jit
def row_minima(loaded, octet, r: tl.constexpr, SCALES: tl.constexpr):
    """Of row r the minima of a thread's part of K in a product with sums: of 16 elements each, from 64 octet on."""
    if SCALES == "four":
        return (loaded[16 + r] >> 4) & 0x0F0F0F0F
    m = loaded[4 + r]
    first = m & 0x3F3F3F3F
    last = ((loaded[8 + r] >> 4) & 0x0F0F0F0F) | ((m >> 2) & 0x30303030)
    if INTERPRETED:
        both = tl.where(octet < 2, first, last) >> (16 * (octet % 2))
        return (both & 255) * 0x0101 | ((both >> 8) & 255) * 0x01010000
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, last, octet * 0x2222 + 0x1100], dtype=tl.int32,
                                     is_pure=True, pack=1)


@triton.jit
def _byte_of_thread(word, b):
    """Byte b of the word, signed; b differs from thread to thread."""
    if INTERPRETED:
        return (word << (24 - 8 * b)) >> 24
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=r,r,r", [word, 0x8880 + 0x1111 * b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def sum_of_pair(x, THREADS: tl.constexpr):
    """The sum of x over the threads 2 i and 2 i + 1, for both."""
    if INTERPRETED:
        both = tl.broadcast_to(tl.sum(tl.reshape(x, [THREADS // 2, 2]), 1)[:, None], [THREADS // 2, 2])
        return tl.reshape(both, [THREADS])
    other = tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return x + other


@triton.jit
def group_scale(words, g: tl.constexpr, part: tl.constexpr, octet, SCALES: tl.constexpr, HALVED: tl.constexpr):
    """The scale of group g, or of its first or second half, int32. HALVED: of the half that a thread's columns are of."""
    if HALVED:
        return _byte_of_thread(words[g // 2], 2 * (g % 2) + octet % 2)
    if SCALES == "k":
        return _byte(words[g // 4], g % 4)
    elif SCALES == "split":
        return _byte(words[g % 2], g // 2)
    else:
        return _byte(words[g // 2], 2 * (g % 2) + part)


@triton.jit
def block_scales(words, octet, keep, stride: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr):
    """The words of scales of a block, which begins at words, of four rows: `scale_loads` fours."""
    found = ()
    for i in tl.static_range(4 if SCALES == "four" else scale_loads(SCALES)):
        found = found + four_if(words + (8 * BITS + i) * stride, keep)
    if SCALES == "four":
        found = found + four_if(words + octet * stride + 8 * BITS * stride, keep)
    return found


@triton.jit
def block_halves(halves, keep, halves_stride: tl.constexpr, HALVES: tl.constexpr):
    found = ()
    for h in tl.static_range(HALVES):
        found = found + _four_halves_if(halves + h * halves_stride, keep)
    return found
