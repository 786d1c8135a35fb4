"""What one token and many have in common: their inputs made from projections, and the state, which is kept twice.

A state of n tokens lies in slot n mod 2. A step reads one slot and writes the other, so a step that is discarded has changed nothing: the
next one at the same position reads the same state. At position 0 a state is zero, whatever its memory holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kiln.custom_ops.geometry import GEOMETRIES

STATE_SLOTS = 2
HYBRIDS = tuple(model for model in GEOMETRIES.values() if model.delta and model.delta[2] == 128)  # that kernels are compiled for


def shape_constants(key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int) -> dict[str, int]:
    return {"KEY_HEADS": key_heads, "VALUE_HEADS": value_heads, "DK": key_dim, "DV": value_dim, "TAPS": taps}


def constants(conv_state: torch.Tensor, delta_state: torch.Tensor, key_heads: int) -> dict[str, int]:
    """Of the kernels."""
    return shape_constants(key_heads, *delta_state.shape[1:], conv_state.shape[1] + 1)


def check_kernel_shapes(key_dim: int, value_dim: int) -> None:
    """ValueError for head sizes that the kernels do not take."""
    if any(size & (size - 1) or not 32 <= size <= 256 for size in (key_dim, value_dim)):
        raise ValueError(f"delta rule with heads of {key_dim} and {value_dim}: the kernels take powers of two from 32 to 256")


def before(state: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """state [2, ...], pos [T] -> [...] before the first of the tokens."""
    return torch.where(pos[0] == 0, 0.0, state.index_select(0, pos[:1] % STATE_SLOTS)[0])


def keep(state: torch.Tensor, pos: torch.Tensor, value: torch.Tensor) -> None:
    """Writes the state after the last of the tokens."""
    state.index_copy_(0, (pos[-1:] + 1) % STATE_SLOTS, value.unsqueeze(0))


def heads(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
          conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int, eps: float
          ) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Queries and keys [T, V, dk], values [T, V, dv], log decays and betas [T, V], float32; writes the convolution's state.

    The convolution's inputs are kept as they come, before its SiLU. Queries and keys have length 1, queries times dk^-1/2.
    """
    tokens, (_, value_heads, key_dim, value_dim) = u.shape[0], delta_state.shape
    taps, key_size = conv_state.shape[1] + 1, key_heads * key_dim
    rows = torch.cat((before(conv_state, pos), u.float()))  # [taps - 1 + T, C]
    weight = conv.view(-1, taps)
    keep(conv_state, pos, rows[rows.shape[0] - (taps - 1) :])
    c = rows[:tokens] * weight[:, 0]
    for j in range(1, taps):
        c = c + rows[j : j + tokens] * weight[:, j]
    q, k, v = F.silu(c).split((key_size, key_size, value_heads * value_dim), dim=-1)
    q, k = (_unit(x.unflatten(-1, (key_heads, key_dim)), eps).repeat(1, value_heads // key_heads, 1) for x in (q, k))  # of v its v mod K
    g = a * F.softplus(alpha.float() + dt_bias)
    return q * key_dim**-0.5, k, v.unflatten(-1, (value_heads, value_dim)), g, torch.sigmoid(beta.float())


def _unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def check(op: str, u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
          conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int) -> None:  # fmt: skip
    """ValueError where a shape or dtype does not fit."""
    shapes = f"{tuple(conv_state.shape)} and {tuple(delta_state.shape)}"
    if (conv_state.dim(), delta_state.dim(), conv_state.dtype, delta_state.dtype) != (3, 4, torch.float32, torch.float32):
        dtypes = f"{conv_state.dtype} and {delta_state.dtype}"
        raise ValueError(f"{op}: states are {shapes} of {dtypes}; expected [2, taps - 1, C] and [2, V, dk, dv] of float32")
    slots, value_heads, key_dim, value_dim = delta_state.shape
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    if slots != STATE_SLOTS or value_heads % key_heads or tuple(conv_state.shape)[::2] != (STATE_SLOTS, channels):
        expected = f"[2, taps - 1, {channels}] and value heads that are a multiple of them"
        raise ValueError(f"{op}: states {shapes} do not fit {key_heads} key heads; expected {expected}")
    taps = conv_state.shape[1] + 1
    for name, x, last in (("u", u, channels), ("alpha", alpha, value_heads), ("beta", beta, value_heads)):
        if x.dim() != 2 or x.shape[1] != last:
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}; expected [T, {last}]")
    for name, x, size in (("conv", conv, channels * taps), ("a", a, value_heads), ("dt_bias", dt_bias, value_heads)):
        if tuple(x.shape) != (size,) or x.dtype != torch.float32:
            raise ValueError(f"{op}: {name} is {x.dtype} {tuple(x.shape)}; expected float32 [{size}]")
    if pos.dim() != 1 or pos.dtype != torch.int64:
        raise ValueError(f"{op}: pos is {pos.dtype} {tuple(pos.shape)}; expected int64 [T]")
