"""Triton kernels of matmuls with the chosen experts alone; the experts are the rows of one matrix [E * N, K], one after another.

A few tokens: the GEMV, whose rows begin where the chosen expert's do. Many: (token, expert) pairs in the order of their experts, and tiles
of rows that are one expert's. Which experts were chosen is read on the device, never on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import after_waiting, wait_for_earlier_kernels, waits
from kiln.custom_ops.weights.fixed_point import row_words
from kiln.custom_ops.weights.gemv_kernels import kiln_gemv
from kiln.custom_ops.weights.matmul_kernels import add_products


@waits()
@triton.jit
def kiln_chosen_gemv(x, words, halves, up_words, up_halves, chosen, partials, counters, out, squares, n, k, splits, stride: tl.constexpr,
                     halves_stride: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, WORDS: tl.constexpr,
                     HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr,
                     EXTENT: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                     SHARES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, REGISTERS: tl.constexpr, SHARED: tl.constexpr,
                     APART: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr, EPS: tl.constexpr):
    """`kiln_gemv` of pair p = program_id(2) with the n rows of expert chosen[p]. SHARED pairs have one row of x.

    Grid (row blocks, splits, P). APART: the first half of the rows is the expert's of `words`, the second its of `up_words`.
    The rows are known only after the kernel that chose them, so nothing is read ahead of it.
    """
    wait_for_earlier_kernels(EARLY)
    x += after_waiting(0, EARLY)
    pair = tl.program_id(2).to(tl.int64)
    expert = tl.load(chosen + pair)
    x += (pair // SHARED - pair) * row_words(k, TERMS, EXTENT)
    if APART:
        first = expert * (n // 2)
        up = tl.program_id(0) >= tl.num_programs(0) // 2
        words = tl.where(up, up_words + (first - n // 2), words + first)
        halves = tl.where(up, up_halves + (first - n // 2), halves + first)
    else:
        words += expert * n
        halves += expert * n
    kiln_gemv(x, words, halves, partials, counters, out, squares, partials, n, k, splits, stride=stride, halves_stride=halves_stride,
              BITS=BITS, BLOCK=BLOCK, MINIMUM=MINIMUM, WORDS=WORDS, HALVES=HALVES, SCALES=SCALES, ZERO=ZERO, LEVELS=LEVELS, TERMS=TERMS,
              EXTENT=EXTENT, OUT=OUT, END=END, GROUPS=GROUPS, ROWS=ROWS, SHARES=SHARES, EVEN=EVEN, EARLY=False, REGISTERS=REGISTERS,
              COUNT=COUNT, PAD=PAD, EPS=EPS, SQUARES=False)


@waits()
@triton.jit
def kiln_chosen_sum(x, words, halves, chosen, weights, beside, partials, counters, out, squares, n, k, splits, stride: tl.constexpr,
                    halves_stride: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, WORDS: tl.constexpr,
                    HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr,
                    EXTENT: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr,
                    EARLY: tl.constexpr, REGISTERS: tl.constexpr, TOGETHER: tl.constexpr, PAIRS: tl.constexpr, SQUARES: tl.constexpr,
                    BESIDE: tl.constexpr):
    """out [n] = the sum over p of weights[p] times x[p] by the rows of expert chosen[p]. Grid (row blocks, splits, PAIRS).

    BESIDE: and weights[PAIRS] times beside [n].

    partials [splits, PAIRS, n]; counters: int32 zeros, one for each row block, and zeros again at the end. The last program of a row block
    adds up, in a fixed order; SQUARES: it leaves the sum of squares of its rows in `squares`.
    """
    kiln_chosen_gemv(x, words, halves, words, halves, chosen, partials, counters, out, out, n, k, splits, stride=stride,
                     halves_stride=halves_stride, BITS=BITS, BLOCK=BLOCK, MINIMUM=MINIMUM, WORDS=WORDS, HALVES=HALVES, SCALES=SCALES,
                     ZERO=ZERO, LEVELS=LEVELS, TERMS=TERMS, EXTENT=EXTENT, OUT=32, END="split", GROUPS=GROUPS, ROWS=ROWS, SHARES=SHARES,
                     EVEN=EVEN, EARLY=EARLY, REGISTERS=REGISTERS, SHARED=1, APART=False, COUNT=0, PAD=1, EPS=0.0)
    block = tl.program_id(0)
    parts = splits * PAIRS
    tl.debug_barrier()
    if tl.atomic_add(counters + block, 1, sem="acq_rel") == parts - 1:
        tl.debug_barrier()
        tl.store(counters + block, 0)
        rows = block * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS,), tl.float32)
        for first in tl.range(0, parts, TOGETHER):
            part = first + tl.arange(0, TOGETHER)
            weight = tl.load(weights + part % PAIRS, part < parts, other=0.0)
            keep = (part < parts)[:, None] & (rows < n)[None, :]
            values = tl.load(partials + part.to(tl.int64)[:, None] * n + rows[None, :], keep, other=0.0, cache_modifier=".cg")
            total += tl.sum(values * weight[:, None], 0)
        if BESIDE:
            total += tl.load(weights + PAIRS) * tl.load(beside + rows, rows < n, other=0.0)
        tl.store(out + rows, total, rows < n)
        if SQUARES:
            tl.store(squares + block, tl.sum(total * total, 0))


@triton.jit
def kiln_pair_order(chosen, order, starts, pairs, BLOCK: tl.constexpr):
    """order [P]: the pairs of expert 0, then those of expert 1, each in turn; starts [E + 1]: where an expert's begin. Grid (E + 1)."""
    expert = tl.program_id(0)
    start = 0
    for first in tl.range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        ids = tl.load(chosen + pair, pair < pairs, other=1 << 30)
        start += tl.sum((ids < expert).to(tl.int32), 0)
    tl.store(starts + expert, start)
    for first in tl.range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        own = (tl.load(chosen + pair, pair < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + start + tl.cumsum(own, 0) - 1, pair, own == 1)
        start += tl.sum(own, 0)


@triton.jit
def kiln_grouped_matmul(x, w, order, starts, out, first, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr,
                        SHARED: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr):
    """out[p] = x[p / SHARED] @ the matrix of p's expert, for the pairs of the EXPERTS experts from `first` on.

    w: those experts' alone, [K, EXPERTS * N] with STEP elements between rows, or [EXPERTS * N, K] if TRANSPOSED. Grid (tiles of pairs,
    tiles of N): at least the tiles that there can be; those beyond the last end at once. A row of out does not depend on how many others
    there are.
    """
    expert = tl.arange(0, PADDED)
    begin = tl.load(starts + first + expert, expert < EXPERTS, other=0)
    end = tl.load(starts + first + expert + 1, expert < EXPERTS, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0)
    own = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (expert < EXPERTS)).to(tl.int32), 0)
    if own < EXPERTS:
        before = tl.sum(tl.where(expert < own, tiles, 0), 0)
        start = tl.sum(tl.where(expert == own, begin, 0), 0) + (tile - before) * BLOCK_M
        stop = tl.sum(tl.where(expert == own, end, 0), 0)
        row = start + tl.arange(0, BLOCK_M)
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        pair = tl.load(order + tl.minimum(row, stop - 1)).to(tl.int64)  # rows beyond the end are read from the last one, and not written
        source = (own * N + (column if N % BLOCK_N == 0 else tl.minimum(column, N - 1))).to(tl.int64)
        left = x + (pair // SHARED)[:, None] * K + inner[None, :]
        right = w + inner[:, None] * STEP + source[None, :] * (K if TRANSPOSED else 1)
        acc = add_products(left, right, 0, K, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), K, STEP, BLOCK_K)
        target = out + pair[:, None] * N + column[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=(row < stop)[:, None] & (column < N)[None, :])
