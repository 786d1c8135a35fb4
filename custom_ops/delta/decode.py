"""The gated delta rule of one token between two matmuls: from the parts of its projections to what the matmul after it multiplies.

A program has some columns of a head's state, and the state does not depend on the projections: it is read, with the convolution's past,
before the program waits for them. The last program of a head to finish has the whole head before it: norm, gate and fixed point are its.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.delta import rule, step
from kiln.custom_ops.delta.kernels import SLOTS, softplus
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.markers import rms_norm, silu_mul
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import GROUP, extent_of, store_fixed
from kiln.custom_ops.weights.gemv_kernels import sum_splits

COLUMNS = 32  # of a head's state that a program has
WARPS = 4
TOGETHER = 16  # parts in flight


@triton.jit
def _past(conv_ptr, past_ptr, channel, first, C: tl.constexpr, TAPS: tl.constexpr):
    """What earlier tokens add to the convolution of some channels, and the weight of the token's own input."""
    total = tl.zeros(channel.shape, tl.float32)
    for j in tl.static_range(TAPS - 1):
        total += tl.load(past_ptr + j * C + channel, mask=(channel >= 0) & (first == 0), other=0.0) * tl.load(conv_ptr + channel * TAPS + j)
    return total, tl.load(conv_ptr + channel * TAPS + TAPS - 1)


@triton.jit
def _shift(own, past_ptr, next_ptr, channel, keep, first, C: tl.constexpr, TAPS: tl.constexpr):
    """The inputs that the next token's convolution needs, of the channels that are this program's to write."""
    held = (channel >= 0) & keep
    for j in tl.static_range(TAPS - 2):
        tl.store(next_ptr + j * C + channel, tl.load(past_ptr + (j + 1) * C + channel, mask=held & (first == 0), other=0.0), held)
    tl.store(next_ptr + (TAPS - 2) * C + channel, own, held)


@triton.jit
def _sum_one(source, stride, splits, TOGETHER: tl.constexpr):
    """The sum of source[s * stride] over splits, a scalar, in a fixed order."""
    total = 0.0
    for first in tl.range(0, splits, TOGETHER):
        s = first + tl.arange(0, TOGETHER)
        total += tl.sum(tl.load(source + s.to(tl.int64) * stride, s < splits, other=0.0, cache_modifier=".cg"), 0)
    return total


@waits("conv_ptr", "a_ptr", "bias_ptr", "norm_ptr", "conv_state_ptr", "delta_state_ptr", "pos_ptr")
@triton.jit
def kiln_delta_decode(u_ptr, alpha_ptr, beta_ptr, z_ptr, conv_ptr, a_ptr, bias_ptr, norm_ptr, conv_state_ptr, delta_state_ptr, pos_ptr,
                      read_ptr, counters, out_ptr, u_splits, u_stride, alpha_splits, alpha_stride, beta_splits, beta_stride, z_splits,
                      z_stride, EPS: tl.constexpr, KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                      TAPS: tl.constexpr, BV: tl.constexpr, TERMS: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr):
    """Grid (VALUE_HEADS, DV / BV). read_ptr [VALUE_HEADS, DV] float32: what is read of the states; counters: int32 zeros, one for each
    head, and zeros again at the end.

    Each projection is the sum of its `splits` parts, `stride` elements apart. All that is read before the wait was written by an earlier
    step: a step writes the slot that it does not read.
    """
    head, column = tl.program_id(0), tl.program_id(1) * BV + tl.arange(0, BV)
    C: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    pos = tl.load(pos_ptr)
    first = (pos == 0).to(tl.int32)
    past = conv_state_ptr + (pos % SLOTS) * ((TAPS - 1) * C)
    following = conv_state_ptr + ((pos + 1) % SLOTS) * ((TAPS - 1) * C)
    row = tl.arange(0, DK)
    size: tl.constexpr = VALUE_HEADS * DK * DV
    cell = head * (DK * DV) + row[:, None] * DV + column[None, :]
    held = (row[:, None] >= 0) & (column[None, :] >= 0) & (first == 0)
    state = tl.load(delta_state_ptr + (pos % SLOTS) * size + cell, mask=held, other=0.0)
    q_channel = (head % KEY_HEADS) * DK + row
    k_channel = q_channel + KEY_HEADS * DK
    v_channel = 2 * KEY_HEADS * DK + head * DV + column
    q, q_own = _past(conv_ptr, past, q_channel, first, C, TAPS)
    k, k_own = _past(conv_ptr, past, k_channel, first, C, TAPS)
    v, v_own = _past(conv_ptr, past, v_channel, first, C, TAPS)
    a = tl.load(a_ptr + head)
    bias = tl.load(bias_ptr + head)
    wait_for_earlier_kernels(EARLY)
    u = sum_splits(u_ptr + q_channel, u_stride, u_splits, None, DK, TOGETHER)
    mine = (tl.program_id(1) == 0) & (head < KEY_HEADS)  # of the programs that share a key head one keeps its inputs
    _shift(u, past, following, q_channel, mine, first, C, TAPS)
    q += u * q_own
    u = sum_splits(u_ptr + k_channel, u_stride, u_splits, None, DK, TOGETHER)
    _shift(u, past, following, k_channel, mine, first, C, TAPS)
    k += u * k_own
    u = sum_splits(u_ptr + v_channel, u_stride, u_splits, None, BV, TOGETHER)
    _shift(u, past, following, v_channel, head >= 0, first, C, TAPS)
    v += u * v_own
    q = q / (1 + tl.exp(-q))
    k = k / (1 + tl.exp(-k))
    v = v / (1 + tl.exp(-v))
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * (DK**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    g = a * softplus(_sum_one(alpha_ptr + head, alpha_stride, alpha_splits, TOGETHER) + bias)
    b = 1 / (1 + tl.exp(-_sum_one(beta_ptr + head, beta_stride, beta_splits, TOGETHER)))
    state *= tl.exp(g)
    change = b * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * change[None, :]
    tl.store(delta_state_ptr + ((pos + 1) % SLOTS) * size + cell, state)
    tl.store(read_ptr + head * DV + column, tl.sum(state * q[:, None], 0), cache_modifier=".cg")
    tl.debug_barrier()
    if tl.atomic_add(counters + head, 1, sem="acq_rel") == DV // BV - 1:
        tl.debug_barrier()
        tl.store(counters + head, 0)
        i = tl.arange(0, DV)
        o = tl.load(read_ptr + head * DV + i, cache_modifier=".cg")
        o *= tl.rsqrt(tl.sum(o * o, 0) / DV + EPS) * tl.load(norm_ptr + i)
        z = sum_splits(z_ptr + head * DV + i, z_stride, z_splits, None, DV, TOGETHER)
        store_fixed(o * (z / (1 + tl.exp(-z))), out_ptr, head * (DV // 32), VALUE_HEADS * (DV // 32), TERMS, DV,
                    extent_of(VALUE_HEADS * DV, DV))


def reference(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, z: torch.Tensor, conv: torch.Tensor, a: torch.Tensor,
              dt_bias: torch.Tensor, norm: torch.Tensor, conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor,
              key_heads: int, eps: float, terms: int) -> torch.Tensor:  # fmt: skip
    """The op in plain torch; arguments as `delta_decode`."""
    u, alpha, beta, z = (x.sum(0, keepdim=True) for x in (u, alpha, beta, z))
    o = step.reference(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps)
    gated = silu_mul(z.unflatten(1, (-1, norm.shape[0])), rms_norm(o, norm, eps, torch.float32))
    return fixed_point.quantize(gated.flatten(1), terms, norm.shape[0])


@kernel_op("kiln::delta_decode", mutates_args=("conv_state", "delta_state", "counters"))
def delta_decode(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, z: torch.Tensor, conv: torch.Tensor, a: torch.Tensor,
                 dt_bias: torch.Tensor, norm: torch.Tensor, conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor,
                 counters: torch.Tensor, key_heads: int, eps: float, terms: int) -> torch.Tensor:  # fmt: skip
    """`delta_step`, then RMSNorm(o) * norm * silu(z) of each value head, in fixed point: a row of V dv.

    u [S, C], alpha, beta [S, V] and z [S, V dv], each float32, to be summed over an S of its own; norm [dv] float32, of all heads;
    counters: int32 zeros, and zeros again afterwards; the others as `delta_step`; eps is that of all norms. Raises ValueError where a shape
    or dtype does not fit.
    """
    rule.check("delta_decode", u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads)
    _, value_heads, key_dim, value_dim = delta_state.shape
    sizes = (u.shape[1], value_heads, value_heads, value_heads * value_dim)
    for name, x, size in zip(("u", "alpha", "beta", "z"), (u, alpha, beta, z), sizes, strict=True):
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != size or (size > 1 and x.stride(1) != 1):
            raise ValueError(f"delta_decode: {name} is {x.dtype} {tuple(x.shape)}; expected float32 [S, {size}]")
    if norm.shape != (value_dim,) or norm.dtype != torch.float32 or value_dim % GROUP or pos.shape != (1,):
        given = f"norm is {norm.dtype} {tuple(norm.shape)}, pos {tuple(pos.shape)}"
        raise ValueError(f"delta_decode: {given}; expected float32 [{value_dim}], a multiple of {GROUP}, and (1,)")
    if counters.dtype != torch.int32 or counters.numel() < value_heads:
        raise ValueError(f"delta_decode: counters are {counters.dtype} {tuple(counters.shape)}; expected int32, {value_heads} or more")
    if not use_triton(u):
        return reference(u, alpha, beta, z, conv, a, dt_bias, norm, conv_state, delta_state, pos, key_heads, eps, terms)
    rule.check_kernel_shapes(key_dim, value_dim)
    read = torch.empty((value_heads, value_dim), dtype=torch.float32, device=u.device)
    out = fixed_point.empty(1, value_heads * value_dim, terms, extent_of(value_heads * value_dim, value_dim), u)
    parts = [number for x in (u, alpha, beta, z) for number in (x.shape[0], x.stride(0))]
    columns = min(COLUMNS, value_dim)
    kernel(kiln_delta_decode)[(value_heads, value_dim // columns)](
        u, alpha, beta, z, conv, a, dt_bias, norm, conv_state, delta_state, pos, read, counters, out, *parts, EPS=eps,
        **rule.constants(conv_state, delta_state, key_heads), BV=columns, TERMS=terms, TOGETHER=TOGETHER, EARLY=early(), num_warps=WARPS
    )  # fmt: skip
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """At the heads of the hybrids, two bytes an activation."""
    floats = ("u_ptr", "alpha_ptr", "beta_ptr", "z_ptr", "conv_ptr", "a_ptr", "bias_ptr", "norm_ptr", "conv_state_ptr", "delta_state_ptr",
              "read_ptr")  # fmt: skip
    types = dict.fromkeys(floats, "*fp32") | {"pos_ptr": "*i64", "counters": "*i32", "out_ptr": "*i32"}
    types |= {f"{name}_{number}": "i32" for name in ("u", "alpha", "beta", "z") for number in ("splits", "stride")}
    shared = {"EPS": EPS, "BV": COLUMNS, "TERMS": 2, "TOGETHER": TOGETHER, "EARLY": early(target)}
    return [KernelCase(f"delta_decode {model.name}", kiln_delta_decode, types, shared | rule.shape_constants(*model.delta),
                       {"num_warps": WARPS}, None if model is rule.HYBRIDS[0] else ()) for model in rule.HYBRIDS]  # fmt: skip
