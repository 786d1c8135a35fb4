"""The gated delta rule for one token."""

from __future__ import annotations

import torch
from torch.library import triton_op

from kiln.custom_ops.delta import rule


def reference(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
              conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int, eps: float) -> torch.Tensor:
    """The op in plain torch; arguments as `delta_step`."""
    q, k, v, g, b = (x[0] for x in rule.heads(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps))
    state = rule.before(delta_state, pos) * g.exp()[:, None, None]  # [V, dk, dv]: decayed before the key is looked up
    change = b[:, None] * (v - (state * k[:, :, None]).sum(1))
    state = state + k[:, :, None] * change[:, None, :]
    rule.keep(delta_state, pos, state)
    return (state * q[:, :, None]).sum(1).unsqueeze(0)  # read after it was written


@triton_op("kiln::delta_step", mutates_args=("conv_state", "delta_state"))
def delta_step(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
               conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int, eps: float) -> torch.Tensor:
    """The rule for the token at pos [1]; the states after it are written beside those before it.

    u [1, C]: queries, keys [K heads x dk] and values [V heads x dv] before the convolution; alpha, beta [1, V] before softplus and sigmoid;
    conv [C * taps], the oldest tap of a channel first; a, dt_bias [V]; conv_state [2, taps - 1, C] and delta_state [2, V, dk, dv] float32,
    see `rule.py`. Returns float32 [1, V, dv]. Raises ValueError when a shape or dtype does not fit.
    """
    rule.check("delta_step", u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads)
    if u.shape[0] != 1:
        raise ValueError(f"delta_step: u has {u.shape[0]} rows; expected 1")
    return reference(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps)
