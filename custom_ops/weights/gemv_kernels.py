"""The GEMV over packed weights (see `layouts`) and fixed-point activations (see `fixed_point`).

A lane works on whole rows, neighbouring ones, so that no lane needs another's data until the end. Quants are multiplied four at a time as
bytes. K is split over the warps of a program and over enough programs to fill the card; a program adds its warps up, and the last program
of a block of rows adds the programs up, both in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import INTERPRETED, after_waiting, wait_for_earlier_kernels, waits
from kiln.custom_ops.step.add_norm import load_root
from kiln.custom_ops.weights.dequantize import float_half, power_of_two, unpack8
from kiln.custom_ops.weights.fixed_point import quads_at, row_words, tail_at
from kiln.custom_ops.weights.gemv_finish import finish


@triton.jit
def dot4(unsigned, signed, acc):
    """acc + the sum over four bytes of unsigned * signed, int32."""
    if INTERPRETED:
        for b in tl.static_range(4):
            acc += ((unsigned >> (8 * b)) & 255) * ((signed << (24 - 8 * b)) >> 24)
        return acc
    return tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [unsigned, signed, acc], dtype=tl.int32, is_pure=True,
                                     pack=1)


@triton.jit
def four(words):
    """Four neighbouring int32 in one load; `words` is a multiple of 16 bytes, and depends on `after_waiting`: the load is pure."""
    if INTERPRETED:
        return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    else:
        return tl.inline_asm_elementwise("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [words],
                                         dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def group_of(x, g, TERMS: tl.constexpr, EXTENT: tl.constexpr):
    """Group g of the activations x: its words of bytes, then the scale and the sums of both halves and of all, as float32."""
    found = ()
    quads = x + quads_at(g, TERMS, EXTENT)
    for i in tl.static_range(2 * TERMS):
        a, b, c, d = four(quads + 4 * i)
        found = found + (a, b, c, d)
    a, b, c, d = four(x + tail_at(g, TERMS, EXTENT))
    return found + (a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True), c.to(tl.float32, bitcast=True),
                    d.to(tl.float32, bitcast=True))


@triton.jit
def loaded(words, halves, stride: tl.constexpr, halves_stride: tl.constexpr, mask, step, BITS: tl.constexpr, BLOCK: tl.constexpr,
            SCALES: tl.constexpr, WORDS: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr):
    """Everything of a row that step `step` needs: per group its quants, then the words of scales and the halves."""
    found = ()
    if BLOCK == 32:
        for i in tl.static_range(GROUPS):
            block = tl.cast(step * GROUPS + i, tl.int64)
            for w in tl.static_range(WORDS):
                found = found + (tl.load(words + (block * WORDS + w) * stride, mask),)
        return found + group_halves(halves, halves_stride, mask, step, SCALES, HALVES, GROUPS)
    else:
        STEPS: tl.constexpr = 8 // GROUPS
        block = tl.cast(step // STEPS, tl.int64)
        first = step % STEPS * GROUPS
        words += block * WORDS * stride
        halves += block * HALVES * halves_stride
        MAIN: tl.constexpr = 4 if BITS >= 4 else 2  # words of a group's nibbles, or of its two-bit quants
        EXTRA: tl.constexpr = BITS - MAIN  # further words of a group
        quants = words + first * (MAIN * stride)
        extras = words + (8 * MAIN + first * EXTRA) * stride
        for i in tl.static_range(GROUPS):
            for j in tl.static_range(MAIN):
                found = found + (tl.load(quants + (i * MAIN + j) * stride, mask),)
            for j in tl.static_range(EXTRA):
                found = found + (tl.load(extras + (i * EXTRA + j) * stride, mask),)
        return found + block_scales(words, halves, stride, halves_stride, mask, first, BITS, SCALES, HALVES, GROUPS)


@triton.jit
def group_halves(halves, halves_stride: tl.constexpr, mask, step, SCALES: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr):
    """The halves of the groups of step `step`, of blocks of 32."""
    found = ()
    for i in tl.static_range(GROUPS):
        block = tl.cast(step * GROUPS + i, tl.int64)
        for h in tl.static_range(HALVES):
            at = block // 2 if SCALES == "e8m0" else block * HALVES + h
            found = found + (tl.load(halves + at * halves_stride, mask),)
    return found


@triton.jit
def block_scales(words, halves, stride: tl.constexpr, halves_stride: tl.constexpr, mask, first, BITS: tl.constexpr, SCALES: tl.constexpr,
                 HALVES: tl.constexpr, GROUPS: tl.constexpr):
    """Of a block of 256, which begins at words and halves: the words of scales (`scale_count`) of the groups `first` .., and the halves."""
    found = ()
    if SCALES == "k":
        for j in tl.static_range(3):
            found = found + (tl.load(words + (8 * BITS + j) * stride, mask),)
    elif SCALES == "split":
        found = found + (tl.load(words + 32 * stride, mask),)
    elif SCALES == "six":
        for j in tl.static_range((GROUPS + 1) // 2):
            found = found + (tl.load(words + (24 + first // 2 % 2 + j) * stride, mask),)
        found = found + (tl.load(words + 26 * stride, mask),)
    else:  # 16 bytes, two a group
        scales = words + (8 * BITS + first // 2) * stride
        for j in tl.static_range((GROUPS + 1) // 2):
            found = found + (tl.load(scales + j * stride, mask),)
    for h in tl.static_range(HALVES):
        found = found + (tl.load(halves + h * halves_stride, mask),)
    return found


@triton.constexpr_function
def scale_count(scales: str, block: int, groups: int) -> int:
    """Words of scales that a step of `groups` groups needs."""
    pairs = (groups + 1) // 2  # a word has the scales of two groups, 16 elements each
    return 0 if block == 32 else {"int8": pairs, "four": pairs, "six": pairs + 1, "k": 3, "split": 1}[scales]


@triton.jit
def _dot8(low, high, values, j: tl.constexpr, term: tl.constexpr, TERMS: tl.constexpr, acc):
    """acc + the products of octet j of a group with one byte of its activations."""
    return dot4(high, values[2 * (j * TERMS + term) + 1], dot4(low, values[2 * (j * TERMS + term)], acc))


@triton.jit
def octet_of(found, at: tl.constexpr, j: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Elements 8j .. 8j + 7 of the group whose words begin at `at`, see `unpack8`."""
    if BITS == 8:
        return unpack8(found[at + 2 * j], found[at + 2 * j + 1], found[at], j, BITS, LEVELS)
    MAIN: tl.constexpr = j if BITS >= 4 else j // 2
    EXTRA: tl.constexpr = 4 if BITS == 5 else (4 + j // 2 if BITS == 6 else (2 if BITS == 3 else 0))
    return unpack8(found[at + MAIN], found[at + MAIN], found[at + EXTRA], j, BITS, LEVELS)


@triton.jit
def scale_words(found, first, AT: tl.constexpr, SCALES: tl.constexpr, GROUPS: tl.constexpr):
    """What `scales_of` needs for the groups `first` .. of a block of 256: words of scales and, where there are such, of minima."""
    if SCALES == "split":
        scale = found[AT]
        minimum = found[AT + 2].to(tl.int32)  # the second half
    elif SCALES == "six":
        upper = found[AT + (GROUPS + 1) // 2] >> (2 * (first // 2))
        low = 4 * (first // 4)
        scale = ((found[AT] >> low) & 0x0F0F0F0F) | ((upper & 0x03030303) << 4)
        minimum = scale
        if GROUPS > 2:
            minimum = ((found[AT + 1] >> low) & 0x0F0F0F0F) | (((upper >> 2) & 0x03030303) << 4)
    elif SCALES == "four":
        scale = found[AT]
        minimum = found[AT + 1] if GROUPS > 2 else scale
    elif SCALES == "int8":
        scale = found[AT] ^ -0x7F7F7F80  # signed bytes + 128
        minimum = scale
        if GROUPS > 2:
            minimum = found[AT + 1] ^ -0x7F7F7F80
    else:
        s = found[AT]
        m = found[AT + 1]
        upper = found[AT + 2]
        scale = tl.where(first < 4, s & 0x3F3F3F3F, (upper & 0x0F0F0F0F) | ((s >> 2) & 0x30303030))
        minimum = tl.where(first < 4, m & 0x3F3F3F3F, ((upper >> 4) & 0x0F0F0F0F) | ((m >> 2) & 0x30303030))
    return scale, minimum


@triton.jit
def _byte(word, b):
    """Byte b of the word, unsigned, as float32."""
    if INTERPRETED:
        return ((word >> (8 * b)) & 255).to(tl.float32)
    # bytes b, 0, 0, 0x4B are 2^23 + byte b
    bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,r", [word, b + 0x7540], dtype=tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def scales_of(scale, minimum, g, i: tl.constexpr, part: tl.constexpr, SCALES: tl.constexpr, GROUPS: tl.constexpr):
    """(scale, minimum) of group g, the i-th of a step of GROUPS; of its first or second half where a scale is of 16 elements."""
    if SCALES == "split":
        signed = (((scale >> (4 * g)) & 15 | ((minimum >> (2 * g)) & 3) << 4) - 32).to(tl.float32)
        return signed, signed
    elif SCALES == "k":
        b = i if GROUPS == 4 else g % 4
        return _byte(scale, b), _byte(minimum, b)
    else:
        b = 2 * (i % 2) + part if GROUPS > 1 else 2 * (g % 2) + part
        if SCALES == "four":
            both = minimum if i >= 2 else scale
            return _byte(both & 0x0F0F0F0F, b), _byte((both >> 4) & 0x0F0F0F0F, b)
        signed = _byte(minimum if i >= 2 else scale, b) - (32.0 if SCALES == "six" else 128.0)
        return signed, signed


@triton.jit
def warp_share(lanes, ROWS: tl.constexpr):
    """The share of K that a lane works on: lanes / ROWS. A scalar that differs from warp to warp, for no lane of a warp has another's."""
    if INTERPRETED:
        return lanes // ROWS
    return tl.inline_asm_elementwise("{ .reg .b32 thread; mov.u32 thread, %tid.x; shr.b32 $0, thread, 5; }", "=r,r", [ROWS], dtype=tl.int32,
                                     is_pure=True, pack=1)


@triton.jit
def sum_splits(source, stride, splits, mask, ROWS: tl.constexpr, TOGETHER: tl.constexpr):
    """The sum of source[s * stride] over splits, in a fixed order, TOGETHER loads in flight."""
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, splits, TOGETHER):
        s = first + tl.arange(0, TOGETHER)
        keep = (s < splits)[:, None]
        if mask is not None:
            keep = keep & mask[None, :]
        total += tl.sum(tl.load(source[None, :] + s.to(tl.int64)[:, None] * stride, keep, other=0.0, cache_modifier=".cg"), 0)
    return total


@waits("words", "halves")
@triton.jit
def kiln_gemv(x, words, halves, partials, counters, out, squares, squares_out, n, k, splits, stride: tl.constexpr,
              halves_stride: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, WORDS: tl.constexpr,
              HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr,
              EXTENT: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
              SHARES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, REGISTERS: tl.constexpr, COUNT: tl.constexpr,
              PAD: tl.constexpr, EPS: tl.constexpr, SQUARES: tl.constexpr):
    """The matmul of x[t] and every row. Grid (row blocks, splits, T).

    x: T rows in fixed point, of extent EXTENT; words [k / BLOCK, WORDS, n], `stride` from word to word. GROUPS: groups of 32 elements taken
    at a time; it divides k / 32 and is 1, 2 or 4. SHARES: the warps of a program, each with its own share of the program's part of K; with
    more than one a lane has ROWS / 32 rows, up to 4. REGISTERS: of a thread, see `launch.kernel`.
    What becomes of the partial sums, float32 [splits, T, n], is END: "split": they are the result, and counters and out are not touched;
    "sum": out[t, n] is their sum; "glu": the first half of the rows are gates, the second values, and out is gelu(gate) * value, rows of
    n / 2 of extent OUT; "silu": the same with silu(gate). counters: int32 zeros, T * row blocks of them, and zeros again at the end. For
    one token: COUNT > 0 multiplies by `load_root` of `squares`; SQUARES, with "sum", leaves each row block's sum of squares in squares_out.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    tokens = tl.num_programs(2)
    LANES: tl.constexpr = ROWS * SHARES
    lanes = tl.arange(0, LANES)
    rows = block * ROWS + lanes % ROWS
    mask = None if EVEN else rows < n
    x += token * row_words(k, TERMS, EXTENT)
    acc = tl.zeros((LANES,), tl.float32)
    PARTS: tl.constexpr = 2 if SCALES == "int8" or SCALES == "six" or SCALES == "four" else 1
    STEPS: tl.constexpr = BLOCK // 32 // GROUPS  # per block
    steps = k // (32 * GROUPS)
    words += rows
    halves += rows
    each = tl.cdiv(steps, splits * SHARES)
    begin = split * (SHARES * each)
    if SHARES > 1:
        begin += warp_share(lanes, ROWS) * each
    end = tl.minimum(begin + each, steps)
    now = loaded(words, halves, stride, halves_stride, mask, tl.minimum(begin, end - 1), BITS, BLOCK, SCALES, WORDS, HALVES, GROUPS)
    wait_for_earlier_kernels(EARLY)
    x += after_waiting(0, EARLY)
    if COUNT > 0:
        root = load_root(squares, k, EPS, COUNT, PAD)
    EACH: tl.constexpr = WORDS if BLOCK == 32 else BITS  # words of a group
    SCALE_WORDS: tl.constexpr = scale_count(SCALES, BLOCK, GROUPS)
    HALF: tl.constexpr = GROUPS * EACH + SCALE_WORDS  # where the halves begin
    for i in tl.range(0, each):
        step = tl.minimum(begin + i, end - 1)
        following = tl.minimum(step + 1, end - 1)  # the loads of the next step are under way while this one is computed
        coming = loaded(words, halves, stride, halves_stride, mask, following, BITS, BLOCK, SCALES, WORDS, HALVES, GROUPS)
        before = acc
        if BLOCK == 256:
            first = step % STEPS * GROUPS if STEPS > 1 else 0
            scale_bytes, minimum_bytes = scale_words(now, first, GROUPS * EACH, SCALES, GROUPS)
            scaled = tl.zeros((LANES,), tl.float32)  # the scale of the block is applied once
            minima = tl.zeros((LANES,), tl.float32)
        for g in tl.static_range(GROUPS):
            values = group_of(x, step * GROUPS + g, TERMS, EXTENT)
            for part in tl.static_range(PARTS):
                c0 = tl.zeros((LANES,), tl.int32)
                c1 = tl.zeros((LANES,), tl.int32)
                c2 = tl.zeros((LANES,), tl.int32)
                for o in tl.static_range(4 // PARTS):
                    low, high = octet_of(now, g * EACH, part * (4 // PARTS) + o, BITS, LEVELS)
                    c0 = _dot8(low, high, values, part * (4 // PARTS) + o, 0, TERMS, c0)
                    if TERMS > 1:
                        c1 = _dot8(low, high, values, part * (4 // PARTS) + o, 1, TERMS, c1)
                    if TERMS > 2:
                        c2 = _dot8(low, high, values, part * (4 // PARTS) + o, 2, TERMS, c2)
                if TERMS == 1:
                    dot = c0.to(tl.float32)
                elif TERMS == 2:
                    dot = (c0 * 256 + c1).to(tl.float32)
                else:
                    dot = (c0 * 256 + c1).to(tl.float32) * 256 + c2.to(tl.float32)
                dot *= values[8 * TERMS]
                total = values[8 * TERMS + (3 if PARTS == 1 else 1 + part)]
                if not MINIMUM:  # a quant stands for itself less half its range
                    dot -= total * ZERO
                if BLOCK == 256:
                    scale, minimum = scales_of(scale_bytes, minimum_bytes, first + g, g, part, SCALES, GROUPS)
                    scaled += scale * dot
                    if MINIMUM:
                        minima += minimum * total
                else:
                    half = now[HALF + g * HALVES]
                    acc += (power_of_two(half, step * GROUPS + g) if SCALES == "e8m0" else half.to(tl.float32)) * dot
                    if MINIMUM:
                        acc += now[HALF + g * HALVES + 1].to(tl.float32) * total
        if BLOCK == 256:
            acc += float_half(now[HALF], SCALES) * scaled
            if MINIMUM:
                acc -= now[HALF + 1].to(tl.float32) * minima
        acc = tl.where(begin + i < end, acc, before)  # the last shares may have less to do
        now = coming

    if SHARES > 1:
        acc = tl.sum(tl.reshape(acc, [SHARES, ROWS]), 0)
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = None if EVEN else rows < n
    if COUNT > 0:
        acc *= root
    tl.store(partials + (split * tokens + token) * n + rows, acc, mask, cache_modifier=".cg")
    if END != "split":
        finish(partials, counters, out, squares, squares_out, n, k, splits, block, token, tokens, TERMS, END, ROWS, SHARES, 0, EPS,
               SQUARES, 1, OUT)
