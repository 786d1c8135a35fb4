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
def _two_halves_if(halves, keep):
    """Those of two rows as one word."""
    words = halves.to(tl.pointer_type(tl.int32))
    if INTERPRETED:
        return tl.load(words, keep != 0, other=0)
    return tl.inline_asm_elementwise("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p ld.global.L1::no_allocate.b32 $0, [$1]; }", "=r,l,r",
                                     [words, keep], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _half_if(halves, keep):
    """That of one row in a word."""
    half = halves.to(tl.pointer_type(tl.int16))
    if INTERPRETED:
        return tl.load(half, keep != 0, other=0).to(tl.int32)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; mov.b16 h, 0; @p ld.global.L1::no_allocate.b16 h, [$1]; cvt.u32.u16 $0, h; }",
        "=r,l,r", [half, keep], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def two(words):
    """Two neighbouring int32 in one load where it stands; `words` is a multiple of 8 bytes."""
    if INTERPRETED:
        return tl.load(words), tl.load(words + 1)
    return tl.inline_asm_elementwise("ld.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [words], dtype=(tl.int32, tl.int32), is_pure=False,
                                     pack=1)


@triton.jit
def row_float(words, r: tl.constexpr, place, ROWS: tl.constexpr, OWN: tl.constexpr):
    """Half r of a thread's OWN rows, of the halves of its rows or, ROWS is 4, of all four, float32."""
    if ROWS == OWN:
        bits = words[r // 2] >> 16 if r % 2 else words[r // 2]
    elif OWN == 2:
        bits = tl.where(place == 1, words[1], words[0])
        bits = bits >> 16 if r % 2 else bits
    else:
        bits = tl.where(place // 2 == 1, words[1], words[0]) >> (16 * (place % 2))
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
def product_asm(signed: bool, onto: bool) -> str:
    """m16n8k32; onto: sums from $10 .., else from $10, which is 0."""
    sums = "{$10, $11, $12, $13}" if onto else "{$10, $10, $10, $10}"
    op = f"mma.sync.aligned.m16n8k32.row.col.s32.{'s8' if signed else 'u8'}.s8.s32"
    return f"{op} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {sums};"


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
        product_asm(SIGNED, False), "=r,=r,=r,=r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, a0 * 0],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def tile_product_onto(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, THREADS: tl.constexpr, SIGNED: tl.constexpr):
    """`tile_product` added to c0 .. c3."""
    if INTERPRETED:
        d0, d1, d2, d3 = tile_product(a0, a1, a2, a3, b0, b1, THREADS, SIGNED)
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3
    return tl.inline_asm_elementwise(
        product_asm(SIGNED, True), "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


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


@triton.constexpr_function
def ring_asm(bytes: int) -> str:
    """The address of shared memory of so many bytes, which the function has by itself."""
    return f".shared .align 16 .b8 kiln_ring[{bytes}]; mov.u32 $0, kiln_ring;"


@triton.jit
def quants_ring(thread, RING: tl.constexpr, BITS: tl.constexpr, THREADS: tl.constexpr):
    """Where a thread's ring begins in shared memory: for RING groups its own `loads_of` times 16 bytes each, a warp's side by side."""
    if INTERPRETED:
        return thread
    EACH: tl.constexpr = 16 * loads_of(BITS)
    base = tl.inline_asm_elementwise(ring_asm(RING * EACH * THREADS), "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    return base + thread // 32 * (RING * EACH * 32) + thread % 32 * 16


@triton.jit
def _copy_if(to, words, keep, AT: tl.constexpr):
    """16 bytes on their way from global memory to shared memory, if `keep` is not 0."""
    tl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.cg.shared.global [$1 + {AT}], [$2], 16; mov.b32 $0, $1; }}", "=r,r,l,r",
        [to, words, keep], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch_quants(ring, words, octet, slot, g: tl.constexpr, keep, stride: tl.constexpr, BITS: tl.constexpr):
    """The quants of group g of a block, which begins at words, of four rows and a thread's octet, begin to move to their slot."""
    MAIN: tl.constexpr = 4 if BITS >= 4 else 2  # words of a group
    EACH: tl.constexpr = 512 * loads_of(BITS)
    if not INTERPRETED:
        _copy_if(ring + slot, words + (octet if BITS >= 4 else octet // 2) * stride + g * MAIN * stride, keep, g * EACH)
        if BITS == 6:
            _copy_if(ring + slot, words + octet // 2 * stride + (GROUPS * MAIN + 2 * g) * stride, keep, g * EACH + 512)
        elif BITS == 3 or BITS == 5:
            _copy_if(ring + slot, words + (GROUPS * MAIN + g) * stride, keep, g * EACH + 512)


@triton.jit
def fetches_end_here(thread):
    """What was fetched since the last of these is one turn for `wait_for_fetches`."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("cp.async.commit_group; mov.b32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_fetches(thread, LEFT: tl.constexpr):
    """Until all but the last LEFT turns are there, of the thread's own."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(f"cp.async.wait_group {LEFT}; mov.b32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _four_shared(at, AT: tl.constexpr):
    return tl.inline_asm_elementwise(f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {AT}];", "=r,=r,=r,=r,r", [at],
                                     dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1)


@triton.jit
def fetched_quants(ring, words, octet, slot, g: tl.constexpr, stride: tl.constexpr, BITS: tl.constexpr):
    """What `fetch_quants` brought: `loads_of` fours of words."""
    EACH: tl.constexpr = 512 * loads_of(BITS)
    if INTERPRETED:  # there is no shared memory
        MAIN: tl.constexpr = 4 if BITS >= 4 else 2
        found = four_if(words + (octet if BITS >= 4 else octet // 2) * stride + g * MAIN * stride, octet + 1)
        if BITS == 6:
            found = found + four_if(words + octet // 2 * stride + (GROUPS * MAIN + 2 * g) * stride, octet + 1)
        elif BITS == 3 or BITS == 5:
            found = found + four_if(words + (GROUPS * MAIN + g) * stride, octet + 1)
    else:
        found = _four_shared(ring + slot, g * EACH)
        if loads_of(BITS) == 2:
            found = found + _four_shared(ring + slot, g * EACH + 512)
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
    """The scales of row r as words of signed bytes, see `own_scales`."""
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
def sum_of_pair(first, second, upper, BIT: tl.constexpr, THREADS: tl.constexpr):
    """The sum over two threads whose numbers differ in BIT: of `second` for the one that has the bit and is `upper`, else of `first`."""
    own = tl.where(upper, second, first)
    sent = tl.where(upper, first, second)
    if INTERPRETED:
        both = tl.sum(tl.reshape(sent, [THREADS // (2 * BIT), 2, BIT]), 1)
        both = tl.broadcast_to(both[:, None, :], [THREADS // (2 * BIT), 2, BIT])
        return own + (tl.reshape(both, [THREADS]) - sent)
    return own + tl.inline_asm_elementwise(f"shfl.sync.bfly.b32 $0, $1, {BIT}, 0x1f, 0xffffffff;", "=r,r", [sent], dtype=tl.int32,
                                           is_pure=True, pack=1)


@triton.jit
def _bytes_of_place(a, b, place, PLACES: tl.constexpr):
    """Of two words the bytes that are of a thread's place, as the first ones of a word: every fourth, or every second."""
    if INTERPRETED:
        if PLACES == 4:
            return (a >> (8 * place) & 255) | ((b >> (8 * place) & 255) << 8)
        first = (a >> (8 * place) & 255) | ((a >> (8 * place + 16) & 255) << 8)
        return first | ((b >> (8 * place) & 255) << 16) | (b >> (8 * place + 16) << 24)
    selector = 0x4040 + 0x1111 * place if PLACES == 4 else 0x6420 + 0x1111 * place
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def own_scales(words, place, SCALES: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr):
    """Of a row's words of scales what `unit_scale` needs of a thread's place."""
    if PLACES == 1:
        return words
    elif SCALES == "split":  # a word of even groups, one of odd ones
        mine = tl.where(place % 2 == 1, words[1], words[0])
        return (mine if PLACES == 2 else mine >> (8 * (place // 2)),)
    elif PARTS == 1:
        return (_bytes_of_place(words[0], words[1], place, PLACES),)
    elif PLACES == 2:
        return _bytes_of_place(words[0], words[1], place, PLACES), _bytes_of_place(words[2], words[3], place, PLACES)
    else:
        low = _bytes_of_place(words[0], words[1], place, PLACES)
        return (low & 0xFFFF | (_bytes_of_place(words[2], words[3], place, PLACES) << 16),)


@triton.jit
def unit_scale(own, turn: tl.constexpr, part: tl.constexpr, SCALES: tl.constexpr, PARTS: tl.constexpr, PLACES: tl.constexpr):
    """The scale, int32, of the unit of a thread's sums: a group, or half a one where PARTS is 2.

    It is unit PLACES * turn + place of a block; where PLACES is 1, half `part` of group `turn`. own: of `own_scales`.
    """
    if SCALES == "split" and PLACES == 1:
        return _byte(own[turn % 2], turn // 2)
    elif SCALES == "split":
        return _byte(own[0], turn if PLACES == 2 else 2 * turn)
    elif PLACES == 1:
        return _byte(own[(turn * PARTS + part) // 4], (turn * PARTS + part) % 4)
    else:
        return _byte(own[turn // 4], turn % 4)


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
def block_halves(halves, keep, halves_stride: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr):
    """The halves of a block, of ROWS rows: two words of four rows, else one, HALVES times."""
    found = ()
    for h in tl.static_range(HALVES):
        at = halves + h * halves_stride
        found = found + (_four_halves_if(at, keep) if ROWS == 4 else (_two_halves_if(at, keep) if ROWS == 2 else _half_if(at, keep),))
    return found
