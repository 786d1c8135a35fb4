"""`add_norm` of a branch that is the sum of two, each with a norm of its own: a dense network and experts, then the norm of their sum.

The sum's squares are known only after both roots. Every program computes them for itself, from the whole of both branches: some 20 KiB,
which takes less than a kernel of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.step import add_norm as one
from kiln.custom_ops.step.add_norm import PIECE, load_root, root, root_constants
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import GROUP, extent_of, store_fixed

WARPS = 8


@waits("first_weight", "second_weight", "post_weight", "scale", "weight")
@triton.jit
def kiln_add_norm_two(x, first, first_squares, first_weight, second, second_squares, second_weight, post_weight, scale, weight, x_out, out,
                      squares, EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr,
                      COUNT_2: tl.constexpr, PAD_2: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr, TERMS: tl.constexpr,
                      EXTENT: tl.constexpr, PIECE: tl.constexpr, EARLY: tl.constexpr):
    """PIECE elements of one token: as `kiln_add_norm`, its branch first first_weight / RMS(first) + second second_weight / RMS(second)."""
    every = tl.arange(0, BLOCK)
    there = every < D
    first_every = tl.load(first_weight + every, there, other=0.0)
    second_every = tl.load(second_weight + every, there, other=0.0)
    i = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    keep = i < D
    first_here = tl.load(first_weight + i, keep, other=0.0)
    second_here = tl.load(second_weight + i, keep, other=0.0)
    post = tl.load(post_weight + i, keep, other=0.0)
    w = 1.0
    if WEIGHT:
        w = tl.load(weight + i, keep, other=0.0)
    factor = 1.0
    if SCALE:
        factor = tl.load(scale)
    wait_for_earlier_kernels(EARLY)
    first_root = load_root(first_squares, D, EPS, COUNT, PAD)
    second_root = load_root(second_squares, D, EPS, COUNT_2, PAD_2)
    branch = tl.load(first + every, there, other=0.0) * first_root * first_every
    branch += tl.load(second + every, there, other=0.0) * second_root * second_every
    both = tl.rsqrt(tl.sum(branch * branch, 0) / D + EPS)
    here = tl.load(first + i, keep, other=0.0) * first_root * first_here + tl.load(second + i, keep, other=0.0) * second_root * second_here
    value = tl.load(x + i, keep, other=0.0) + here * both * post
    if SCALE:
        value *= factor
    tl.store(x_out + i, value, keep)
    tl.store(squares + tl.program_id(0), tl.sum(value * value, 0))
    if WEIGHT:
        value *= w
    store_fixed(value, out, tl.program_id(0) * (PIECE // 32), D // 32, TERMS, PIECE, EXTENT)


def _constants(d: int, first_squares: torch.Tensor, second_squares: torch.Tensor, scale: bool, weight: bool, terms: int,
               target: GpuTarget | None = None) -> dict[str, int | bool]:
    second = {f"{name}_2": value for name, value in root_constants(second_squares).items()}
    return {"D": d, "BLOCK": triton.next_power_of_2(d), **root_constants(first_squares), **second, "SCALE": scale, "WEIGHT": weight,
            "TERMS": terms, "EXTENT": extent_of(d, PIECE), "PIECE": PIECE, "EARLY": early(target)}  # fmt: skip


@kernel_op("kiln::add_norm_two", mutates_args=())
def add_norm_two(x: torch.Tensor, first: torch.Tensor, first_squares: torch.Tensor, first_weight: torch.Tensor, second: torch.Tensor,
                 second_squares: torch.Tensor, second_weight: torch.Tensor, post_weight: torch.Tensor, scale: torch.Tensor | None,
                 weight: torch.Tensor | None, eps: float, terms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_norm` whose branch is RMSNorm(first) * first_weight + RMSNorm(second) * second_weight, with post_weight.

    first, second float32 [1, D]; their squares float32 [P] and [P2], which add up to first . first and second . second; the other arguments
    and the results as there. Raises ValueError when a shape or dtype does not fit.
    """
    d = x.shape[1:]
    fits = x.dim() == 2 and x.shape[0] == 1 and x.shape[1] % GROUP == 0 and first.shape == second.shape == x.shape
    fits = fits and all(t is None or t.shape == d for t in (first_weight, second_weight, post_weight, weight))
    fits = fits and all(s.dim() == 1 and s.numel() > 0 for s in (first_squares, second_squares)) and (scale is None or scale.shape == (1,))
    given = (x, first, first_squares, first_weight, second, second_squares, second_weight, post_weight, scale, weight)
    if not fits or any(t is not None and t.dtype != torch.float32 for t in given):
        shapes = ", ".join("none" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in given)
        raise ValueError(f"add_norm_two: {shapes}; expected float32 [1, D], twice [1, D], [P], [D], then [D], [1] or none, [D] or none, "
                         "D a multiple of 32")  # fmt: skip
    if not use_triton(x):
        branch = first * root(first_squares, x.shape[1], eps) * first_weight
        branch = branch + second * root(second_squares, x.shape[1], eps) * second_weight
        return one.reference(x, branch, (branch * branch).sum(1), post_weight, scale, weight, eps, terms)
    pieces = triton.cdiv(x.shape[1], PIECE)
    x_out = torch.empty_like(x)
    out = fixed_point.empty(1, x.shape[1], terms, extent_of(x.shape[1], PIECE), x)
    squares = torch.empty(pieces, dtype=torch.float32, device=x.device)
    constants = _constants(x.shape[1], first_squares, second_squares, scale is not None, weight is not None, terms)
    kernel(kiln_add_norm_two)[(pieces,)](
        x, first, first_squares, first_weight, second, second_squares, second_weight, post_weight, x if scale is None else scale,
        x if weight is None else weight, x_out, out, squares, EPS=eps, **constants, num_warps=WARPS)  # fmt: skip
    return x_out, out, squares


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """At the hidden size of Gemma 4 26B-A4B."""
    names = ("x", "first", "first_squares", "first_weight", "second", "second_squares", "second_weight", "post_weight", "scale", "weight",
             "x_out", "squares")  # fmt: skip
    constants = {"EPS": EPS} | _constants(2816, torch.empty(44), torch.empty(44), True, True, 2, target)
    types = dict.fromkeys(names, "*fp32") | {"out": "*i32"}
    return [KernelCase("add_norm_two 2816", kiln_add_norm_two, types, constants, {"num_warps": WARPS})]
