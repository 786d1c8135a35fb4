"""The gated delta rule for one token."""

from __future__ import annotations

import torch

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.delta import rule
from kiln.custom_ops.delta.kernels import kiln_delta_step
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget

COLUMNS = 32  # of a head's state that a program has
WARPS = 4


def reference(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
              conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int, eps: float) -> torch.Tensor:
    """The op in plain torch; arguments as `delta_step`."""
    q, k, v, g, b = (x[0] for x in rule.heads(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps))
    state = rule.before(delta_state, pos) * g.exp()[:, None, None]  # [V, dk, dv]: decayed before the key is looked up
    change = b[:, None] * (v - (state * k[:, :, None]).sum(1))
    state = state + k[:, :, None] * change[:, None, :]
    rule.keep(delta_state, pos, state)
    return (state * q[:, :, None]).sum(1).unsqueeze(0)  # read after it was written


@kernel_op("kiln::delta_step", mutates_args=("conv_state", "delta_state"))
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
    if not use_triton(u):
        return reference(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps)
    _, value_heads, key_dim, value_dim = delta_state.shape
    rule.check_kernel_shapes(key_dim, value_dim)
    out = torch.empty((1, value_heads, value_dim), dtype=torch.float32, device=u.device)
    constants = rule.constants(conv_state, delta_state, key_heads)
    columns = min(COLUMNS, value_dim)
    kernel(kiln_delta_step)[(value_heads, value_dim // columns)](
        u.contiguous(), alpha.contiguous(), beta.contiguous(), conv, a, dt_bias, conv_state, delta_state, pos, out, EPS=eps, **constants,
        BV=columns, num_warps=WARPS
    )  # fmt: skip
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """At the heads of the hybrids, activations of both dtypes."""
    pointers = {name: "*fp32" for name in ("conv_ptr", "a_ptr", "bias_ptr", "conv_state_ptr", "delta_state_ptr", "out_ptr")}
    cases = []
    for model in rule.HYBRIDS:
        for dtype in ("*fp32", "*bf16"):
            types = {**pointers, "u_ptr": dtype, "alpha_ptr": dtype, "beta_ptr": dtype, "pos_ptr": "*i64"}
            constants = {"EPS": EPS, **rule.shape_constants(*model.delta), "BV": COLUMNS}
            cases.append(KernelCase(f"delta_step {model.name} {dtype}", kiln_delta_step, types, constants, {"num_warps": WARPS}))
    return cases
