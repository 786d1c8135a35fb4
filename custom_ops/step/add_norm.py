"""One kernel between two matmuls of a few tokens: post-norm, residual stream, layer scale, the next norm's weight, fixed point.

RMSNorm needs the mean square of a whole row, and no program has a whole row. So sums of squares of pieces travel from kernel to kernel: the
matmul before leaves those of its result (`fixed_linear_squares`), this kernel leaves those of the new stream, and the matmul after
multiplies its result by the root, which commutes with it.
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
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import GROUP, extent_of, row_words, store_fixed

WARPS = 1  # a sum over several would wait for all of them
PIECE = 256  # elements of a program


def root(squares: torch.Tensor, k: int, eps: float) -> torch.Tensor:
    """1 / RMS of a row of k elements whose squares sum to the sum of `squares` [P]; of rows, [T, P], one each, [T, 1]."""
    sums = squares.sum() if squares.dim() == 1 else torch.stack([row.sum() for row in squares]).unsqueeze(1)
    return torch.rsqrt(sums / k + eps)


def reference(x: torch.Tensor, branch: torch.Tensor, branch_squares: torch.Tensor | None, post_weight: torch.Tensor | None,
              scale: torch.Tensor | None, weight: torch.Tensor | None, eps: float,
              terms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op in plain torch; arguments as `add_norm`."""
    x = x + (branch if branch_squares is None else branch * root(branch_squares, x.shape[1], eps) * post_weight)
    if scale is not None:
        x = x * scale
    return x, *norm_reference(x, weight, terms)


def norm_reference(x: torch.Tensor, weight: torch.Tensor | None, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in plain torch; arguments as `norm_fixed`."""
    sums = torch.cat([(row * row).sum(1) for row in x.split(1)])  # a token at a time, so that none depends on the others
    return fixed_point.quantize(x if weight is None else x * weight, terms), sums if x.shape[0] == 1 else sums.unsqueeze(1)


@triton.jit
def load_root(squares, k, EPS: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr):
    """1 / RMS of a row of k elements from the COUNT sums of squares of its pieces; PAD: COUNT rounded up to a power of two."""
    i = tl.arange(0, PAD)
    return tl.rsqrt(tl.sum(tl.load(squares + i, i < COUNT, other=0.0), 0) / k + EPS)


@waits("weight", "post_weight", "scale")
@triton.jit
def kiln_add_norm(x, branch, branch_squares, post_weight, scale, weight, x_out, out, squares, EPS: tl.constexpr, D: tl.constexpr,
                    BRANCH: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr,
                    TERMS: tl.constexpr, EXTENT: tl.constexpr, PIECE: tl.constexpr, EARLY: tl.constexpr, MANY: tl.constexpr):
    """PIECE elements of a token: x_out = (x + branch post_weight / RMS(branch)) scale; out = x_out weight in fixed point; the sum of
    squares of x_out. Grid (D / PIECE, tokens). COUNT, PAD: of `branch_squares`, see `load_root`; COUNT 0: the branch is added as it is.
    Without WEIGHT out is x_out. MANY: there are several tokens, each with its row of everything but weights and scale.
    """
    if MANY:
        token = tl.program_id(1)
        x += token * D
        branch += token * D
        branch_squares += token * COUNT
        x_out += token * D
        out += token * row_words(D, TERMS, EXTENT)
        squares += token * tl.num_programs(0)
    i = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    keep = i < D
    w = 1.0
    if WEIGHT:
        w = tl.load(weight + i, keep, other=0.0)
    post = 1.0
    factor = 1.0
    if BRANCH and COUNT > 0:
        post = tl.load(post_weight + i, keep, other=0.0)
    if SCALE:
        factor = tl.load(scale)
    wait_for_earlier_kernels(EARLY)
    value = tl.load(x + i, keep, other=0.0)
    if BRANCH:
        if COUNT > 0:
            value += tl.load(branch + i, keep, other=0.0) * load_root(branch_squares, D, EPS, COUNT, PAD) * post
        else:
            value += tl.load(branch + i, keep, other=0.0)
        if SCALE:
            value *= factor
        tl.store(x_out + i, value, keep)
    tl.store(squares + tl.program_id(0), tl.sum(value * value, 0))
    if WEIGHT:
        value *= w
    store_fixed(value, out, tl.program_id(0) * (PIECE // 32), D // 32, TERMS, PIECE, EXTENT)


def root_constants(squares: torch.Tensor | None) -> dict[str, int]:
    """COUNT and PAD of `load_root`; COUNT 0 without squares."""
    count = 0 if squares is None else squares.shape[-1]
    return {"COUNT": count, "PAD": triton.next_power_of_2(max(count, 1))}


def _constants(d: int, branch: bool, branch_squares: torch.Tensor | None, scale: bool, terms: int,
               target: GpuTarget | None = None, weight: bool = True, tokens: int = 1) -> dict:
    return {"D": d, "BRANCH": branch, **root_constants(branch_squares), "SCALE": scale, "WEIGHT": weight, "TERMS": terms,
            "EXTENT": extent_of(d, PIECE), "PIECE": PIECE,
            "EARLY": early(target), "MANY": tokens > 1}  # fmt: skip


def _launch(x, branch, branch_squares, post_weight, scale, weight, eps: float,
            terms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, d = x.shape
    pieces = triton.cdiv(d, PIECE)
    x_out = torch.empty_like(x) if branch is not None else x
    out = fixed_point.empty(tokens, d, terms, extent_of(d, PIECE), x)
    squares = torch.empty(pieces if tokens == 1 else (tokens, pieces), dtype=torch.float32, device=x.device)
    constants = _constants(d, branch is not None, branch_squares, scale is not None, terms, weight=weight is not None, tokens=tokens)
    given = [(x if weight is None else weight) if t is None else t for t in (branch, branch_squares, post_weight, scale, weight)]
    kernel(kiln_add_norm)[(pieces, tokens)](x, *given, x_out, out, squares, EPS=eps, **constants, num_warps=WARPS)
    return x_out, out, squares


def _check(op: str, x: torch.Tensor, weight: torch.Tensor | None) -> None:
    wrong = weight is not None and weight.shape != x.shape[1:]
    if x.dim() != 2 or x.shape[1] % GROUP or x.dtype != torch.float32 or wrong:
        shapes = f"x is {x.dtype} {tuple(x.shape)}, weight {'none' if weight is None else tuple(weight.shape)}"
        raise ValueError(f"{op}: {shapes}; expected float32 [T, D] and [D], D a multiple of 32")


@kernel_op("kiln::add_norm", mutates_args=())
def add_norm(x: torch.Tensor, branch: torch.Tensor, branch_squares: torch.Tensor | None, post_weight: torch.Tensor | None,
             scale: torch.Tensor | None, weight: torch.Tensor | None, eps: float,
             terms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x' = (x + RMSNorm(branch) * post_weight) * scale, x' * weight in fixed point of `terms` bytes, and sums that add up to x' . x'.

    Without branch_squares and post_weight the branch is added as it is; without weight the second is x'. A matmul with the second times
    `root` of the third is one with RMSNorm(x') * weight. x, branch float32 [T, D], D a multiple of 32; branch_squares float32 [P] of one
    token, [T, P] of several, which add up to branch . branch; weights float32 [D]; scale float32 [1] or None. Returns float32 [T, D],
    T rows in fixed point and float32 [P'] or [T, P'], P' the kernel's choice; no token's bits depend on the others. Raises
    ValueError when a shape or dtype does not fit.
    """
    _check("add_norm", x, weight)
    plain = branch_squares is None and post_weight is None
    fits = branch.shape == x.shape and (
        plain or (branch_squares is not None and branch_squares.shape[:-1] == x.shape[: x.shape[0] > 1] and branch_squares.numel()
                  and post_weight is not None and post_weight.shape == x.shape[1:])
    )  # fmt: skip
    if not fits or (scale is not None and scale.shape != (1,)):
        shapes = ["none" if t is None else tuple(t.shape) for t in (branch, branch_squares, post_weight, scale)]
        rows = "(P,)" if x.shape[0] == 1 else f"({x.shape[0]}, P)"
        given = "branch {}, squares {}, post_weight {}, scale {}".format(*shapes)
        raise ValueError(f"add_norm: {given}; expected {tuple(x.shape)}, {rows}, {tuple(x.shape[1:])}, (1,) or none; "
                         "squares and post_weight both or none")
    if not use_triton(x):
        return reference(x, branch, branch_squares, post_weight, scale, weight, eps, terms)
    return _launch(x, branch, branch_squares, post_weight, scale, weight, eps, terms)


@kernel_op("kiln::norm_fixed", mutates_args=())
def norm_fixed(x: torch.Tensor, weight: torch.Tensor, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x * weight in fixed point and sums of squares of x, as `add_norm` leaves them; x float32 [T, D]. ValueError when it does not fit."""
    _check("norm_fixed", x, weight)
    if not use_triton(x):
        return norm_reference(x, weight, terms)
    return _launch(x, None, None, None, None, weight, 0.0, terms)[1:]


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's hidden size."""
    floats = dict.fromkeys(("x", "branch", "branch_squares", "post_weight", "scale", "weight", "x_out", "squares"), "*fp32")
    cases = []
    squares = torch.empty(84)  # of the matmul before, by blocks of rows
    forms = (("add_norm scaled", True, squares, True, True), ("add_norm", True, squares, False, True),
             ("add_norm plain", True, None, False, True), ("add_norm unweighted", True, squares, False, False),
             ("norm_fixed", False, None, False, True))  # fmt: skip
    for name, branch, given, scale, weighted in forms:
        constants = {"EPS": EPS} | _constants(model.hidden, branch, given, scale, 2, target, weighted)
        if name == "add_norm scaled":
            cases.append(KernelCase(f"{name} {model.hidden}, several tokens", kiln_add_norm, floats | {"out": "*i32"},
                                    constants | {"MANY": True}, {"num_warps": WARPS}))
        cases.append(KernelCase(f"{name} {model.hidden}", kiln_add_norm, floats | {"out": "*i32"}, constants, {"num_warps": WARPS}))
    return cases
