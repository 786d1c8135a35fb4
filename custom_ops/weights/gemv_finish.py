"""How a GEMV ends: the last program of a block of rows adds the partial sums up, in an order that no layout of threads changes."""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import INTERPRETED
from kiln.custom_ops.weights.fixed_point import extent_words, row_words, store_extents

IN_FLIGHT = tl.constexpr(32)  # values of a thread that are on their way at once


@triton.constexpr_function
def gated(end: str) -> bool:
    """The end makes activations of gates and values."""
    return end in ("glu", "silu")


@triton.jit
def gelu_tanh(x):
    # tanh(u) = 1 - 2 / (exp(2 u) + 1)
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))


@triton.jit
def square(x):
    """x * x, rounded: the compiler may not join it with an addition, which it does or not as the layout of threads suits it."""
    if INTERPRETED:
        return x * x
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def ordered_root(squares, k, EPS: tl.constexpr, COUNT: tl.constexpr):
    """1 / RMS of rows of k elements, whose squares sum to COUNT values each from `squares` on: added one after another."""
    total = tl.load(squares)
    for i in tl.static_range(1, COUNT):
        total += tl.load(squares + i)
    return tl.rsqrt(total / k + EPS)


@triton.jit
def _add_up(source, stride, splits, keep, SHAPE: tl.constexpr, EACH: tl.constexpr):
    """The sum of source[s * stride] over s, in that order; EACH: elements of a thread."""
    TOGETHER: tl.constexpr = 16 if EACH <= IN_FLIGHT // 16 else (8 if EACH <= IN_FLIGHT // 8 else 4)
    total = tl.zeros(SHAPE, tl.float32)
    for begin in tl.range(0, splits, TOGETHER):
        for i in tl.static_range(TOGETHER):
            s = begin + i
            total += tl.load(source + s.to(tl.int64) * stride, keep & (s < splits), other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def finish(partials, counters, out, squares, squares_out, n, k, splits, block, first, tokens, TERMS: tl.constexpr, END: tl.constexpr,
           ROWS: tl.constexpr, WARPS: tl.constexpr, COUNT: tl.constexpr, EPS: tl.constexpr, SQUARES: tl.constexpr, M: tl.constexpr,
           OUT: tl.constexpr):
    """The last program of a block of ROWS rows makes the results of M tokens, `first` .. of `tokens`.

    COUNT > 0: they are multiplied by `ordered_root` of `squares`. Gated, it is the last of the blocks of an extent OUT of gates and of the
    blocks of their values. counters: one for each result.
    """
    GATED: tl.constexpr = gated(END)
    R: tl.constexpr = OUT if GATED and OUT > ROWS else ROWS  # rows of a result
    results = tl.cdiv(n // 2 if GATED else n, R)
    own = block
    share = splits
    if GATED:
        own = block * ROWS % (n // 2) // R
        share = 2 * (R // ROWS) * splits
    counter = counters + first // M * results + own
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == share - 1:
        tl.debug_barrier()
        tl.store(counter, 0)
        if SQUARES:
            _finish_squares(partials, out, squares, squares_out, n, k, splits, own, first, tokens, results, R, WARPS, COUNT, EPS, M)
        else:
            MOST: tl.constexpr = 8 * 32 * WARPS // R if 8 * 32 * WARPS > R else 1  # tokens at a time: 8 elements of a thread
            for begin in tl.static_range(0, M, MOST):
                _finish_some(partials, out, squares, n, k, splits, own, first + begin, tokens, TERMS, END, R, WARPS, COUNT, EPS,
                             M - begin if M - begin < MOST else MOST, OUT)


@triton.jit
def _finish_squares(partials, out, squares, squares_out, n, k, splits, own, first, tokens, results, R: tl.constexpr, WARPS: tl.constexpr,
                    COUNT: tl.constexpr, EPS: tl.constexpr, M: tl.constexpr):
    """The sums of M tokens, and of each its sum of squares: a token's tensors are its own, so that no layout of threads depends on M."""
    EACH: tl.constexpr = R // (32 * WARPS) if R > 32 * WARPS else 1
    TOGETHER: tl.constexpr = 16 if EACH * M <= IN_FLIGHT // 16 else (8 if EACH * M <= IN_FLIGHT // 8 else 4)
    rows = own * R + tl.arange(0, R)
    keep = rows < n
    source = partials + rows
    totals = ()
    for _ in tl.static_range(M):
        totals = totals + (tl.zeros([R], tl.float32),)
    for begin in tl.range(0, splits, TOGETHER):
        for i in tl.static_range(TOGETHER):
            s = begin + i
            sums = ()
            for m in tl.static_range(M):
                at = (s.to(tl.int64) * tokens + first + m) * n
                sums = sums + (totals[m] + tl.load(source + at, keep & (s < splits), other=0.0, cache_modifier=".cg"),)
            totals = sums
    for m in tl.static_range(M):
        total = totals[m]
        if COUNT > 0:
            total *= ordered_root(squares + (first + m) * COUNT, k, EPS, COUNT)
        tl.store(out + (first + m) * n + rows, total.to(out.dtype.element_ty), keep)
        tl.store(squares_out + (first + m) * results + own, tl.sum(square(total), 0))


@triton.jit
def _finish_some(partials, out, squares, n, k, splits, own, first, tokens, TERMS: tl.constexpr, END: tl.constexpr, R: tl.constexpr,
                 WARPS: tl.constexpr, COUNT: tl.constexpr, EPS: tl.constexpr, M: tl.constexpr, OUT: tl.constexpr):
    """`finish` of the tokens first .. first + M - 1."""
    T: tl.constexpr = triton.next_power_of_2(M)
    EACH: tl.constexpr = T * R // (32 * WARPS) if T * R > 32 * WARPS else 1
    token = first + tl.arange(0, T)
    there = tl.arange(0, T) < M
    rows = own * R + tl.arange(0, R)
    limit = n // 2 if gated(END) else n
    keep = there[:, None] & (rows < limit)[None, :]
    source = partials + token.to(tl.int64)[:, None] * n + rows[None, :]
    stride = tokens * n
    total = _add_up(source, stride, splits, keep, [T, R], EACH)
    root = tl.zeros([T], tl.float32)
    if COUNT > 0:
        root = ordered_root(squares + (first + tl.minimum(tl.arange(0, T), M - 1)) * COUNT, k, EPS, COUNT)
        total *= root[:, None]
    if gated(END):
        value = _add_up(source + n // 2, stride, splits, keep, [T, R], EACH)
        if COUNT > 0:
            value *= root[:, None]
        if END == "silu":
            gate = total / (1.0 + tl.exp(-total))
        else:
            gate = gelu_tanh(total)
        EXTENTS: tl.constexpr = R // OUT
        extent = tl.arange(0, T * EXTENTS)
        at = own * EXTENTS + extent % EXTENTS
        to = out + (first + extent // EXTENTS) * row_words(n // 2, TERMS, OUT) + at * extent_words(TERMS, OUT)
        store_extents(tl.reshape(gate * value, [T * R]), to, (extent // EXTENTS < M) & (at < n // 2 // OUT), TERMS, T * R, OUT)
    else:
        tl.store(out + token.to(tl.int64)[:, None] * n + rows[None, :], total.to(out.dtype.element_ty), keep)
