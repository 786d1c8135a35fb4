"""The GEMV of several tokens on int8 tensor cores: the sums of `gemv_kernels`, bit for bit, from an m16n8k32 product for a tile of them.

A tile's 16 rows are rows of the matrix, its 32 columns of K a group, its 8 columns 4 tokens with 2 bytes of their activations each. The
kernel is written by threads: every tensor has one element for each, and what a thread has several of is a tuple. Of 32 rows thread t of a
warp loads octet t % 4 of rows 4 (t / 4) .. + 3, in one load of 16 bytes: low nibbles and high ones are the fragments of two tiles as they
are. The products that it gets are of the same four rows and of token t % 4. Scales are unpacked once, of row t, and passed round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import INTERPRETED, after_waiting, wait_for_earlier_kernels, waits
from kiln.custom_ops.step.add_norm import load_root
from kiln.custom_ops.weights.dequantize import float_half, power_of_two, unpack8
from kiln.custom_ops.weights.fixed_point import quads_at, row_words, tail_at
from kiln.custom_ops.weights.gemv_finish import finish
from kiln.custom_ops.weights.gemv_kernels import (
    block_scales,
    dot4,
    four,
    group_halves,
    scale_count,
    scale_words,
    scales_of,
    warp_share,
)
from kiln.custom_ops.weights.gemv_rows import joined


@triton.jit
def tile_product(a0, a1, a2, a3, b0, b1, THREADS: tl.constexpr):
    """m16n8k32 of unsigned a and signed b, as the hardware lays them out, thread g * 4 + t of a warp: a0, a2 row g, a1, a3 row g + 8, with
    b0 .. of column g the four bytes t and t + 4 of K; the result columns 2 t and 2 t + 1 of row g, then of row g + 8. int32.
    """
    if INTERPRETED:
        WARPS: tl.constexpr = THREADS // 32
        b0 = tl.reshape(b0, [WARPS, 1, 8, 4])
        b1 = tl.reshape(b1, [WARPS, 1, 8, 4])
        upper = tl.sum(dot4(tl.reshape(a2, [WARPS, 8, 1, 4]), b1, dot4(tl.reshape(a0, [WARPS, 8, 1, 4]), b0, b0 * 0)), 3)
        lower = tl.sum(dot4(tl.reshape(a3, [WARPS, 8, 1, 4]), b1, dot4(tl.reshape(a1, [WARPS, 8, 1, 4]), b0, b0 * 0)), 3)
        c0, c1 = tl.split(tl.reshape(upper, [THREADS, 2]))
        c2, c3 = tl.split(tl.reshape(lower, [THREADS, 2]))
        return c0, c1, c2, c3
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $10, $10, $10};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, a0 * 0], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def _from_neighbour(x, i: tl.constexpr, THREADS: tl.constexpr):
    """x, of 32 bits, of the i-th of the four threads 4 q .. 4 q + 3 to which a thread belongs."""
    if INTERPRETED:
        taken = tl.where(tl.arange(0, 4)[None, :] == i, tl.reshape(x, [THREADS // 4, 4]).to(tl.int32, bitcast=True), 0)
        taken = tl.broadcast_to(tl.sum(taken, 1)[:, None], [THREADS // 4, 4])
        return tl.reshape(taken, [THREADS]).to(x.dtype, bitcast=True)
    return tl.inline_asm_elementwise(f"shfl.sync.idx.b32 $0, $1, {i}, 0x1c1f, 0xffffffff;", "=r,r", [x], dtype=x.dtype, is_pure=True,
                                     pack=1)


@triton.jit
def _passed_on(first, second, BOTH: tl.constexpr):
    """What `_received` takes: one float32, or BOTH of two that float16 holds, in 32 bits."""
    if INTERPRETED or not BOTH:
        return first, second
    else:
        both = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1)
        return both, both


@triton.jit
def _received(passed, i: tl.constexpr, BOTH: tl.constexpr, THREADS: tl.constexpr):
    """(first, second) of `_passed_on` of the i-th of four threads; without BOTH the first twice."""
    first = _from_neighbour(passed[0], i, THREADS)
    if not BOTH:
        return first, first
    if INTERPRETED:
        return first, _from_neighbour(passed[1], i, THREADS)
    return tl.inline_asm_elementwise("{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
                                     "=f,=f,r", [first], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def _four_ahead(words):
    """`four` where it stands: what is loaded ahead is not to sink to where it is used."""
    if INTERPRETED:
        return four(words)
    return tl.inline_asm_elementwise("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [words],
                                     dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1)


@triton.jit
def _loaded(words, row, octet, stride: tl.constexpr, step, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
            GROUPS: tl.constexpr):
    """The quants of four rows, from `row` on, that step `step` needs, of a thread's octet of each group: EACH words of each row."""
    if BLOCK == 32:
        block = tl.cast(step * GROUPS, tl.int64)
        MAIN: tl.constexpr = WORDS  # from a group's words to the next group's
        first = 0
        extras = words + row + (block * WORDS + 4) * stride
        FURTHER: tl.constexpr = WORDS
    else:
        STEPS: tl.constexpr = 8 // GROUPS
        block = tl.cast(step // STEPS, tl.int64)
        first = step % STEPS * GROUPS
        MAIN: tl.constexpr = 4 if BITS >= 4 else 2
        FURTHER: tl.constexpr = BITS - MAIN
        extras = words + row + (block * WORDS + 8 * MAIN + first * FURTHER) * stride
    at = 2 * octet if BITS == 8 else (octet if BITS >= 4 else octet // 2)
    quants = words + row + (block * WORDS + first * MAIN + at) * stride
    if BITS == 6:
        extras += octet // 2 * stride
    found = ()
    for g in tl.static_range(GROUPS):
        a, b, c, d = _four_ahead(quants + g * MAIN * stride)
        found = found + (a, b, c, d)
        if BITS == 8:
            a, b, c, d = _four_ahead(quants + (g * MAIN + 1) * stride)
            found = found + (a, b, c, d)
        elif BITS == 3 or BITS == 5 or BITS == 6:
            a, b, c, d = _four_ahead(extras + g * FURTHER * stride)
            found = found + (a, b, c, d)
    return found


@triton.jit
def _loaded_scales(words, halves, stride: tl.constexpr, halves_stride: tl.constexpr, step, BITS: tl.constexpr, BLOCK: tl.constexpr,
                   SCALES: tl.constexpr, WORDS: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr):
    """The words of scales and the halves of a thread's row that step `step` needs; of blocks of 32 the halves of each group."""
    if BLOCK == 32:
        return group_halves(halves, halves_stride, None, step, SCALES, HALVES, GROUPS)
    else:
        STEPS: tl.constexpr = 8 // GROUPS
        block = tl.cast(step // STEPS, tl.int64)
        return block_scales(words + block * WORDS * stride, halves + block * HALVES * halves_stride, stride, halves_stride, None,
                            step % STEPS * GROUPS, BITS, SCALES, HALVES, GROUPS)


@triton.jit
def _activations(x, octet, k, step, TERMS: tl.constexpr, EXTENT: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr,
                 M: tl.constexpr):
    """For each group and four tokens: two words of a thread's column, two of the third byte, then scale and sums of its token."""
    column = tl.arange(0, octet.shape[0]) % 32 // 4
    even = column % 2 == 0
    X = row_words(k, TERMS, EXTENT)
    found = ()
    for g in tl.static_range(GROUPS):
        for c in tl.static_range(TOKENS):
            at = x + tl.minimum(column // 2 + 4 * c, M - 1) * X + quads_at(step * GROUPS + g, TERMS, EXTENT) + octet * (2 * TERMS)
            if TERMS == 1:  # the second byte of each token is 0
                b0 = tl.load(at, even, other=0)
                b1 = tl.load(at + 1, even, other=0)
            else:
                b0 = tl.load(at + column % 2 * 2)
                b1 = tl.load(at + column % 2 * 2 + 1)
            found = found + (b0, b1)
            if TERMS == 3:
                found = found + (tl.load(at + 4, even, other=0), tl.load(at + 5, even, other=0))
            scale, first, second, total = four(x + tl.minimum(octet + 4 * c, M - 1) * X + tail_at(step * GROUPS + g, TERMS, EXTENT))
            found = found + (scale.to(tl.float32, bitcast=True), first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True),
                             total.to(tl.float32, bitcast=True))
    return found


@triton.jit
def _products(low0, low1, high0, high1, values, at: tl.constexpr, part: tl.constexpr, PARTS: tl.constexpr, TERMS: tl.constexpr,
              THREADS: tl.constexpr):
    """Of two rows and a thread's token: `gemv_rows.product_of` of a group, or of its first or second half."""
    b0 = values[at]
    b1 = values[at + 1]
    b2 = values[at + 2]
    b3 = values[at + 3]
    SCALE: tl.constexpr = 4 if TERMS == 3 else 2
    if PARTS == 2:  # the octets of the other half are multiplied by 0
        own = tl.arange(0, THREADS) % 4 // 2 == part
        b0 = tl.where(own, b0, 0)
        b1 = tl.where(own, b1, 0)
        if TERMS == 3:
            b2 = tl.where(own, b2, 0)
            b3 = tl.where(own, b3, 0)
    c0, c1, d0, d1 = tile_product(low0, low1, high0, high1, b0, b1, THREADS)
    c2 = c0
    d2 = d0
    if TERMS == 3:
        c2, _c, d2, _d = tile_product(low0, low1, high0, high1, b2, b3, THREADS)
    scale = values[at + SCALE]
    return (joined(c0, c1, c2, TERMS) * scale, joined(d0, d1, d2, TERMS) * scale,
            values[at + SCALE + (3 if PARTS == 1 else 1 + part)])


@triton.jit
def _rows_of_a_group(now, octet, factors, values, sums, minima, at: tl.constexpr, value: tl.constexpr, to: tl.constexpr,
                     pair: tl.constexpr, EACH: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
                     MINIMUM: tl.constexpr, ZERO: tl.constexpr, PARTS: tl.constexpr, TERMS: tl.constexpr, THREADS: tl.constexpr):
    """One tile: the sums and the minima of two rows, 2 pair and 2 pair + 1, and four tokens, from entry `to` of each tuple on."""
    FURTHER: tl.constexpr = at + 4 if EACH == 8 else at
    SECOND: tl.constexpr = at + 4 if BITS == 8 else at
    low0, high0 = unpack8(now[at], now[SECOND], now[FURTHER], octet, BITS, LEVELS)
    low1, high1 = unpack8(now[at + 1], now[SECOND + 1], now[FURTHER + 1], octet, BITS, LEVELS)
    sum0 = sums[to]
    sum1 = sums[to + 1]
    offset0 = minima[to]
    offset1 = minima[to + 1]
    BOTH: tl.constexpr = MINIMUM or PARTS == 2
    for part in tl.static_range(PARTS):
        dot0, dot1, total = _products(low0, low1, high0, high1, values, value, part, PARTS, TERMS, THREADS)
        if not MINIMUM:
            dot0 -= total * ZERO
            dot1 -= total * ZERO
        scale0, other0 = _received(factors[part if MINIMUM else 0], 2 * pair, BOTH, THREADS)
        scale1, other1 = _received(factors[part if MINIMUM else 0], 2 * pair + 1, BOTH, THREADS)
        if part == 1 and not MINIMUM:
            scale0 = other0
            scale1 = other1
        sum0 += scale0 * dot0
        sum1 += scale1 * dot1
        if MINIMUM and BLOCK == 256:
            offset0 += other0 * total
            offset1 += other1 * total
        elif MINIMUM:
            sum0 += other0 * total
            sum1 += other1 * total
    return sum0, sum1, offset0, offset1


@waits("words", "halves")
@triton.jit
def kiln_gemv_tiles(x, words, halves, partials, counters, out, squares, squares_out, n, k, splits, stride: tl.constexpr,
                    halves_stride: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, WORDS: tl.constexpr,
                    HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr,
                    EXTENT: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                    SHARES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, REGISTERS: tl.constexpr, COUNT: tl.constexpr,
                    PAD: tl.constexpr, EPS: tl.constexpr, SQUARES: tl.constexpr, M: tl.constexpr):
    """`kiln_gemv` of M tokens, 8 at most. Grid (row blocks, splits). ROWS is a multiple of 32; n, and where a row of words lies, of 4."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    THREADS: tl.constexpr = 32 * SHARES
    TILES: tl.constexpr = ROWS // 32  # of 32 rows, each two of the hardware's
    TOKENS: tl.constexpr = (M + 3) // 4  # columns of a tile are of four
    PARTS: tl.constexpr = 2 if SCALES == "int8" or SCALES == "six" or SCALES == "four" else 1
    STEPS: tl.constexpr = BLOCK // 32 // GROUPS
    thread = tl.arange(0, THREADS)
    octet = thread % 4
    row = block * ROWS + thread % 32 // 4 * 4
    steps = k // (32 * GROUPS)
    each = tl.cdiv(steps, splits * SHARES)
    begin = split * (SHARES * each)
    if SHARES > 1:
        begin += warp_share(thread, 32) * each
    end = tl.minimum(begin + each, steps)
    now = ()
    scales_now = ()
    for h in tl.static_range(TILES):
        at = row + 32 * h if EVEN else tl.minimum(row + 32 * h, n - 4)  # of rows past the end others are computed, and not stored
        now = now + _loaded(words, at, octet, stride, tl.minimum(begin, end - 1), BITS, BLOCK, WORDS, GROUPS)
        scales_now = scales_now + _loaded_scales(words + at + octet, halves + at + octet, stride, halves_stride,
                                                 tl.minimum(begin, end - 1), BITS, BLOCK, SCALES, WORDS, HALVES, GROUPS)
    wait_for_earlier_kernels(EARLY)
    x += after_waiting(0, EARLY)
    roots = ()
    if COUNT > 0:
        for m in tl.static_range(M):
            roots = roots + (load_root(squares + m * COUNT, k, EPS, COUNT, PAD),)
    zeros = ()
    for _ in tl.static_range(4 * TOKENS):
        zeros = zeros + (tl.zeros((THREADS,), tl.float32),)
    acc = ()
    for _ in tl.static_range(TILES):
        acc = acc + zeros
    EACH: tl.constexpr = 8 if BITS == 8 or BITS == 3 or BITS == 5 or BITS == 6 else 4  # words of a group
    COUNTED: tl.constexpr = scale_count(SCALES, BLOCK, GROUPS)
    OWN: tl.constexpr = COUNTED + (HALVES * GROUPS if BLOCK == 32 else HALVES)  # what `loaded_scales` gives of a row
    V: tl.constexpr = 8 if TERMS == 3 else 6
    for i in tl.range(0, each):
        step = tl.minimum(begin + i, end - 1)
        following = tl.minimum(step + 1, end - 1)
        coming = ()
        scales_coming = ()
        for h in tl.static_range(TILES):
            there = row + 32 * h if EVEN else tl.minimum(row + 32 * h, n - 4)
            coming = coming + _loaded(words, there, octet, stride, following, BITS, BLOCK, WORDS, GROUPS)
            scales_coming = scales_coming + _loaded_scales(words + there + octet, halves + there + octet, stride, halves_stride, following,
                                                           BITS, BLOCK, SCALES, WORDS, HALVES, GROUPS)
        values = _activations(x, octet, k, step, TERMS, EXTENT, GROUPS, TOKENS, M)
        first = step % STEPS * GROUPS if STEPS > 1 else 0
        kept = ()
        for h in tl.static_range(TILES):
            sums = zeros
            minima = zeros
            if BLOCK == 256:
                scale_bytes, minimum_bytes = scale_words(scales_now, first, h * OWN, SCALES, GROUPS)
            else:
                sums = ()
                for each_sum in tl.static_range(4 * TOKENS):
                    sums = sums + (acc[h * 4 * TOKENS + each_sum],)
            for g in tl.static_range(GROUPS):
                factors = ()  # of a thread's own row: the scale and minimum of each part, or the scales of both
                for part in tl.static_range(PARTS if MINIMUM else 1):
                    if BLOCK == 256:
                        scale, other = scales_of(scale_bytes, minimum_bytes, first + g, g, part, SCALES, GROUPS)
                        if PARTS == 2 and not MINIMUM:
                            other, _other = scales_of(scale_bytes, minimum_bytes, first + g, g, 1, SCALES, GROUPS)
                    else:
                        half = scales_now[h * OWN + g * HALVES]
                        scale = power_of_two(half, step * GROUPS + g) if SCALES == "e8m0" else half.to(tl.float32)
                        other = scales_now[h * OWN + g * HALVES + 1].to(tl.float32) if MINIMUM else scale
                    factors = factors + (_passed_on(scale, other, MINIMUM or PARTS == 2),)
                added = ()
                offsets = ()
                for pair in tl.static_range(2):
                    for c in tl.static_range(TOKENS):
                        new = _rows_of_a_group(now, octet, factors, values, sums, minima, (h * GROUPS + g) * EACH + 2 * pair,
                                               (g * TOKENS + c) * V, (pair * TOKENS + c) * 2, pair, EACH, BITS, BLOCK, LEVELS, MINIMUM,
                                               ZERO, PARTS, TERMS, THREADS)
                        added = added + (new[0], new[1])
                        offsets = offsets + (new[2], new[3])
                sums = added
                minima = offsets
            if BLOCK == 256:
                scale = float_half(scales_now[h * OWN + COUNTED], SCALES)
                passed = _passed_on(scale, scales_now[h * OWN + COUNTED + 1].to(tl.float32) if MINIMUM else scale, MINIMUM)
            for r in tl.static_range(4 * TOKENS):
                add = sums[r]
                if BLOCK == 256:
                    scale, other = _received(passed, r // (2 * TOKENS) * 2 + r % 2, MINIMUM, THREADS)
                    add = acc[h * 4 * TOKENS + r] + scale * sums[r]
                    if MINIMUM:
                        add -= other * minima[r]
                kept = kept + (tl.where(begin + i < end, add, acc[h * 4 * TOKENS + r]),)
        acc = kept
        now = coming
        scales_now = scales_coming

    lane = tl.arange(0, 32)
    for h in tl.static_range(TILES):
        for c in tl.static_range(TOKENS):
            first_rows = tl.join(acc[h * 4 * TOKENS + 2 * c], acc[h * 4 * TOKENS + 2 * c + 2 * TOKENS])
            last_rows = tl.join(acc[h * 4 * TOKENS + 2 * c + 1], acc[h * 4 * TOKENS + 2 * c + 1 + 2 * TOKENS])
            whole = tl.sum(tl.reshape(tl.join(first_rows, last_rows), [SHARES, 32, 4]), 0)
            token = lane % 4 + 4 * c
            if COUNT > 0:
                root = tl.zeros((32,), tl.float32)
                for m in tl.static_range(4 * c, M if M < 4 * c + 4 else 4 * c + 4):
                    root = tl.where(token == m, roots[m], root)
                whole *= root[:, None]
            rows = (block * ROWS + 32 * h + lane // 4 * 4)[:, None] + tl.arange(0, 4)[None, :]
            stored = (token < M)[:, None] & (rows < n)
            tl.store(partials + (split * M + token)[:, None] * n + rows, whole, stored, cache_modifier=".cg")
    if END != "split":
        finish(partials, counters, out, squares, squares_out, n, k, splits, block, 0, M, TERMS, END, ROWS, SHARES, 0, EPS,
               SQUARES, M, OUT)
