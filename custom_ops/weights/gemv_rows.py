"""The GEMV of several tokens that read the weights once: what it adds to `gemv_kernels`, with each token's sums in that kernel's order."""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import after_waiting, wait_for_earlier_kernels, waits
from kiln.custom_ops.step.add_norm import load_root
from kiln.custom_ops.weights.dequantize import float_half, power_of_two
from kiln.custom_ops.weights.fixed_point import row_words
from kiln.custom_ops.weights.gemv_finish import finish
from kiln.custom_ops.weights.gemv_kernels import (
    dot4,
    group_of,
    loaded,
    octet_of,
    scale_count,
    scale_words,
    scales_of,
    warp_share,
)


@triton.jit
def _dot8(low, high, values, at: tl.constexpr, j: tl.constexpr, term: tl.constexpr, TERMS: tl.constexpr, acc):
    """acc + the products of octet j of a group with one byte of its activations, whose words begin at `at` of values."""
    return dot4(high, values[at + 2 * (j * TERMS + term) + 1], dot4(low, values[at + 2 * (j * TERMS + term)], acc))


@waits("words", "halves")
@triton.jit
def kiln_gemv_rows(x, words, halves, partials, counters, out, squares, squares_out, n, k, splits, stride: tl.constexpr,
              halves_stride: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, WORDS: tl.constexpr,
              HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr,
              EXTENT: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
              SHARES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, REGISTERS: tl.constexpr, COUNT: tl.constexpr,
              PAD: tl.constexpr, EPS: tl.constexpr, SQUARES: tl.constexpr, M: tl.constexpr):
    """`kiln_gemv` of M tokens: a program multiplies what it loads with each. Grid (row blocks, splits).

    As there but for partials [splits, M, n], counters, one for a row block, `squares` [M, COUNT] and squares_out [M, row blocks].
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    LANES: tl.constexpr = ROWS * SHARES
    lanes = tl.arange(0, LANES)
    rows = block * ROWS + lanes % ROWS
    mask = None if EVEN else rows < n
    X: tl.constexpr = 8 * TERMS + 4
    zeros = ()
    for _ in tl.static_range(M):
        zeros = zeros + (tl.zeros((LANES,), tl.float32),)
    acc = zeros
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
    roots = ()
    if COUNT > 0:
        for m in tl.static_range(M):
            roots = roots + (load_root(squares + m * COUNT, k, EPS, COUNT, PAD),)
    EACH: tl.constexpr = WORDS if BLOCK == 32 else BITS  # words of a group
    SCALE_WORDS: tl.constexpr = scale_count(SCALES, BLOCK, GROUPS)
    HALF: tl.constexpr = GROUPS * EACH + SCALE_WORDS  # where the halves begin
    for i in tl.range(0, each):
        step = tl.minimum(begin + i, end - 1)
        following = tl.minimum(step + 1, end - 1)  # the loads of the next step are under way while this one is computed
        coming = loaded(words, halves, stride, halves_stride, mask, following, BITS, BLOCK, SCALES, WORDS, HALVES, GROUPS)
        before = acc
        scaled = zeros  # of blocks of 256: the scale of the block is applied once
        minima = zeros
        if BLOCK == 256:
            first = step % STEPS * GROUPS if STEPS > 1 else 0
            scale_bytes, minimum_bytes = scale_words(now, first, GROUPS * EACH, SCALES, GROUPS)
        for g in tl.static_range(GROUPS):
            values = ()
            for m in tl.static_range(M):
                values = values + group_of(x + m * row_words(k, TERMS, EXTENT), step * GROUPS + g, TERMS, EXTENT)
            for part in tl.static_range(PARTS):
                octets = ()
                for o in tl.static_range(4 // PARTS):
                    octets = octets + octet_of(now, g * EACH, part * (4 // PARTS) + o, BITS, LEVELS)
                if BLOCK == 256:
                    scale, minimum = scales_of(scale_bytes, minimum_bytes, first + g, g, part, SCALES, GROUPS)
                else:
                    half = now[HALF + g * HALVES]
                sums = ()
                offsets = ()
                for m in tl.static_range(M):
                    dot, total = product_of(octets, values, m * X, part, PARTS, TERMS)
                    if not MINIMUM:  # a quant stands for itself less half its range
                        dot -= total * ZERO
                    if BLOCK == 256:
                        sums = sums + (scaled[m] + scale * dot,)
                        offsets = offsets + (minima[m] + minimum * total if MINIMUM else minima[m],)
                    else:
                        add = acc[m] + (power_of_two(half, step * GROUPS + g) if SCALES == "e8m0" else half.to(tl.float32)) * dot
                        if MINIMUM:
                            add += now[HALF + g * HALVES + 1].to(tl.float32) * total
                        sums = sums + (add,)
                if BLOCK == 256:
                    scaled = sums
                    minima = offsets
                else:
                    acc = sums
        kept = ()
        for m in tl.static_range(M):
            add = acc[m]
            if BLOCK == 256:
                add += float_half(now[HALF], SCALES) * scaled[m]
                if MINIMUM:
                    add -= now[HALF + 1].to(tl.float32) * minima[m]
            kept = kept + (tl.where(begin + i < end, add, before[m]),)  # the last shares may have less to do
        acc = kept
        now = coming

    if SHARES > 1:
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = None if EVEN else rows < n
    for m in tl.static_range(M):
        whole = acc[m]
        if SHARES > 1:
            whole = tl.sum(tl.reshape(whole, [SHARES, ROWS]), 0)
        if COUNT > 0:
            whole *= roots[m]
        tl.store(partials + (split * M + m) * n + rows, whole, mask, cache_modifier=".cg")
    if END != "split":
        finish(partials, counters, out, squares, squares_out, n, k, splits, block, 0, M, TERMS, END, ROWS, SHARES, 0, EPS,
               SQUARES, M, OUT)


@triton.jit
def product_of(octets, values, at: tl.constexpr, part: tl.constexpr, PARTS: tl.constexpr, TERMS: tl.constexpr):
    """A group's products with the activations whose words begin at `at` of values, float32, and the sum of the activations."""
    c0 = octets[0] * 0
    c1 = c0
    c2 = c0
    for o in tl.static_range(4 // PARTS):
        c0 = _dot8(octets[2 * o], octets[2 * o + 1], values, at, part * (4 // PARTS) + o, 0, TERMS, c0)
        if TERMS > 1:
            c1 = _dot8(octets[2 * o], octets[2 * o + 1], values, at, part * (4 // PARTS) + o, 1, TERMS, c1)
        if TERMS > 2:
            c2 = _dot8(octets[2 * o], octets[2 * o + 1], values, at, part * (4 // PARTS) + o, 2, TERMS, c2)
    dot = joined(c0, c1, c2, TERMS) * values[at + 8 * TERMS]
    return dot, values[at + 8 * TERMS + (3 if PARTS == 1 else 1 + part)]


@triton.jit
def joined(c0, c1, c2, TERMS: tl.constexpr):
    """Products with the bytes of an activation as one, float32."""
    if TERMS == 1:
        return c0.to(tl.float32)
    elif TERMS == 2:
        return (c0 * 256 + c1).to(tl.float32)
    else:
        return (c0 * 256 + c1).to(tl.float32) * 256 + c2.to(tl.float32)
