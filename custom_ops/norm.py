"""RMSNorm of one token for the products that follow: residual, post-norm, layer scale, pre-norm and fixed point in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from custom_ops import fixed_point
from custom_ops.early import early, wait_for_earlier_kernels
from custom_ops.fixed_point import GROUP, group_words, store_fixed
from custom_ops.launch import kernel, use_triton
from custom_ops.markers import rms_norm
from custom_ops.registry import KernelCase
from custom_ops.target import GpuTarget

WARPS = 4
PIECE = 256  # elements that a program writes


def reference(x: torch.Tensor, branch: torch.Tensor, post_weight: torch.Tensor, scale: torch.Tensor | None, weight: torch.Tensor,
              eps: float, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in plain torch; arguments as `add_norm`."""
    x = x + rms_norm(branch, post_weight, eps, torch.float32)
    if scale is not None:
        x = x * scale
    return x, fixed_point.quantize(rms_norm(x, weight, eps, torch.float32), terms)


@triton.jit
def _added(x, branch, i, keep, post, factor, root, BRANCH: tl.constexpr, SCALE: tl.constexpr):
    """Elements i of x_out, float32; `root` is 1 / RMS(branch)."""
    value = tl.load(x + i, keep, other=0.0)
    if BRANCH:
        value += tl.load(branch + i, keep, other=0.0) * root * post
        if SCALE:
            value *= factor
    return value


@triton.jit
def add_norm_kernel(x, branch, post_weight, scale, weight, x_out, out, eps, D: tl.constexpr, BRANCH: tl.constexpr, SCALE: tl.constexpr,
                    TERMS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, EARLY: tl.constexpr):
    """One token: x_out = (x + RMSNorm(branch) post_weight) scale; out = RMSNorm(x_out) weight in fixed point. Grid (D / PIECE).

    Every program sums all of the row, which its neighbours do as well, and writes a piece of it: latency counts, not work.
    """
    i = tl.arange(0, BLOCK)
    keep = i < D
    own = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    own_keep = own < D
    w = tl.load(weight + own, own_keep, other=0.0)
    post = w
    own_post = w
    factor = 1.0
    root = 1.0
    if BRANCH:
        post = tl.load(post_weight + i, keep, other=0.0)
        own_post = tl.load(post_weight + own, own_keep, other=0.0)
    if SCALE:
        factor = tl.load(scale)
    wait_for_earlier_kernels(EARLY)
    if BRANCH:
        b = tl.load(branch + i, keep, other=0.0)
        root = tl.rsqrt(tl.sum(b * b, 0) / D + eps)
    value = _added(x, branch, i, keep, post, factor, root, BRANCH, SCALE)
    own_value = _added(x, branch, own, own_keep, own_post, factor, root, BRANCH, SCALE)
    if BRANCH:
        tl.store(x_out + own, own_value, own_keep)
    y = own_value * tl.rsqrt(tl.sum(value * value, 0) / D + eps) * w
    store_fixed(y, out, tl.program_id(0) * (PIECE // 32), D // 32, TERMS, PIECE)


def _constants(d: int, branch: bool, scale: bool, terms: int, target: GpuTarget | None = None) -> dict[str, int | bool]:
    return {"D": d, "BRANCH": branch, "SCALE": scale, "TERMS": terms, "BLOCK": triton.next_power_of_2(d), "PIECE": PIECE,
            "EARLY": early(target)}  # fmt: skip


def _launch(x, branch, post_weight, scale, weight, eps: float, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    d = x.shape[1]
    x_out = torch.empty_like(x) if branch is not None else x
    out = torch.empty((1, d // GROUP, group_words(terms)), dtype=torch.int32, device=x.device)
    constants = _constants(d, branch is not None, scale is not None, terms)
    given = [weight if t is None else t for t in (branch, post_weight, scale)]
    kernel(add_norm_kernel)[(triton.cdiv(d, PIECE),)](x, *given, weight, x_out, out, eps, **constants, num_warps=WARPS)
    return x_out, out


def _check(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or x.shape[0] != 1 or x.shape[1] % GROUP or x.dtype != torch.float32 or weight.shape != x.shape[1:]:
        shapes = f"x is {x.dtype} {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{op}: {shapes}; expected float32 [1, D] and [D], D a multiple of 32")


@triton_op("kiln::add_norm", mutates_args=())
def add_norm(x: torch.Tensor, branch: torch.Tensor, post_weight: torch.Tensor, scale: torch.Tensor | None, weight: torch.Tensor, eps: float,
             terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x' = (x + RMSNorm(branch) * post_weight) * scale and RMSNorm(x') * weight in fixed point of `terms` bytes.

    x, branch float32 [1, D], D a multiple of 32; weights float32 [D]; scale float32 [1] or None. Returns float32 [1, D] and int32
    [1, D / 32, 8 terms + 4]. Raises ValueError when a shape or dtype does not fit.
    """
    _check("add_norm", x, weight)
    if branch.shape != x.shape or post_weight.shape != weight.shape or (scale is not None and scale.shape != (1,)):
        scaled = "none" if scale is None else tuple(scale.shape)
        given = f"branch {tuple(branch.shape)}, post_weight {tuple(post_weight.shape)}, scale {scaled}"
        raise ValueError(f"add_norm: {given}; expected {tuple(x.shape)}, {tuple(weight.shape)}, (1,) or none")
    if not use_triton(x):
        return reference(x, branch, post_weight, scale, weight, eps, terms)
    return _launch(x, branch, post_weight, scale, weight, eps, terms)


@triton_op("kiln::norm_fixed", mutates_args=())
def norm_fixed(x: torch.Tensor, weight: torch.Tensor, eps: float, terms: int) -> torch.Tensor:
    """RMSNorm(x) * weight in fixed point of `terms` bytes; x float32 [1, D], D a multiple of 32. ValueError when it does not fit."""
    _check("norm_fixed", x, weight)
    if not use_triton(x):
        return fixed_point.quantize(rms_norm(x, weight, eps, torch.float32), terms)
    return _launch(x, None, None, None, weight, eps, terms)[1]


def kernel_cases(target: GpuTarget) -> list[KernelCase]:
    """The kernels at the 31B's hidden size."""
    signature = {"x": "*fp32", "branch": "*fp32", "post_weight": "*fp32", "scale": "*fp32", "weight": "*fp32", "x_out": "*fp32",
                 "out": "*i32", "eps": "fp32"}
    cases = []
    for name, branch, scale in (("add_norm scaled", True, True), ("add_norm", True, False), ("norm_fixed", False, False)):
        constants = _constants(5376, branch, scale, 2, target)
        cases.append(KernelCase(f"{name} 5376", add_norm_kernel, signature, constants, {"num_warps": WARPS}))
    return cases
