"""Queries, a key and a value from the parts that a matmul left, for kernels that need them where they attend: norm and rotary embedding.

Shapes and order are the same wherever a head is prepared, and so are its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import INTERPRETED


@triton.jit
def _settled(x):
    """x, float32, in the layout it was computed in: else the compiler computes it again in every layout that a reader likes."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def raw_parts(source, stride, mask, PARTS: tl.constexpr, PAD: tl.constexpr, N: tl.constexpr):
    """PARTS rows of N elements `stride` apart, float32 [PAD, N], in one load."""
    part = tl.arange(0, PAD)[:, None]
    return tl.load(source + part.to(tl.int64) * stride + tl.arange(0, N)[None, :], (part < PARTS) & mask, other=0.0, cache_modifier=".cg")


@triton.jit
def normed(parts, EPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """Both halves, float32 [ROWS, D / 2], of the sum of parts [PAD, ROWS * D], or its RMSNorm."""
    halves = tl.reshape(tl.sum(parts, 0), [ROWS, 2, D // 2])
    if NORM:
        norm = tl.rsqrt(tl.sum(tl.sum(halves * halves, 2), 1) / D + EPS)
        halves = halves * norm[:, None, None]
    return tl.split(tl.permute(_settled(halves), [0, 2, 1]))


@triton.jit
def rotated(halves, weight0, weight1, cos, sin, DTYPE: tl.constexpr, SCALE: tl.constexpr):
    """The rotary embedding of the weighted halves, each [ROWS, D / 2], times SCALE."""
    a = halves[0] * weight0[None, :]
    b = halves[1] * weight1[None, :]
    if SCALE == 1:
        return _settled(a * cos[None, :] - b * sin[None, :]).to(DTYPE), _settled(b * cos[None, :] + a * sin[None, :]).to(DTYPE)
    else:
        first = (a * cos[None, :] - b * sin[None, :]) * SCALE
        second = (b * cos[None, :] + a * sin[None, :]) * SCALE
        return _settled(first).to(DTYPE), _settled(second).to(DTYPE)


@triton.jit
def query_columns(rows, ROWS: tl.constexpr, PAD: tl.constexpr, H: tl.constexpr):
    """[ROWS, H] repeated to [H, PAD]: a tensor-core tile has more columns than a KV head has queries."""
    return tl.trans(tl.reshape(tl.broadcast_to(rows[None, :, :], [PAD // ROWS, ROWS, H]), [PAD, H]))
