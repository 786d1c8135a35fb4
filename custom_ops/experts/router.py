"""One token's router: its logits from the residual stream, in float32, and the choice of experts, in one kernel.

The root of the stream's norm is applied to a logit, with which it commutes (see `step.add_norm`). Where the experts read the stream by a
norm of their own, further programs of the same kernel put it into fixed point. The gate of a network beside the experts is one more row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.experts import route
from kiln.custom_ops.experts.route import MOST_EXPERTS, choose
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.step.add_norm import PIECE, load_root, root, root_constants
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.block_types import RARE_TARGETS
from kiln.custom_ops.weights.fixed_point import GROUP, extent_of, store_fixed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HELD = 32  # elements of a row that a thread holds of each of three


@waits("router", "scale", "factors", "weight", "beside")
@triton.jit
def kiln_choose_experts(x, squares, router, scale, factors, weight, beside, logits, counters, chosen, weights, out, FACTOR: tl.constexpr,
                        EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr,
                        FACTORS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, USED: tl.constexpr, RENORMALIZED: tl.constexpr,
                        NORMED: tl.constexpr, BESIDE: tl.constexpr, TERMS: tl.constexpr, EXTENT: tl.constexpr, PIECE: tl.constexpr,
                        EARLY: tl.constexpr):
    """Grid (EXPERTS, and with BESIDE one, and with NORMED D / PIECE more).

    A program below EXPERTS computes FACTOR / RMS(x) times the product of x * scale and its row of the router; the last of them to finish
    chooses. With BESIDE the one after them does so by the row `beside` and without FACTOR: its sigmoid is the last of weights [USED + 1].
    The others put x * weight into fixed point. counters: an int32 zero, and zero again at the end.
    """
    if NORMED:
        if tl.program_id(0) < EXPERTS + BESIDE:
            _logit(x, squares, router, scale, factors, beside, logits, counters, chosen, weights, FACTOR, EPS, D, BLOCK, COUNT, PAD,
                   FACTORS, EXPERTS, PADDED, USED, RENORMALIZED, BESIDE, EARLY)
        else:
            piece = tl.program_id(0) - EXPERTS - BESIDE
            i = piece * PIECE + tl.arange(0, PIECE)
            w = tl.load(weight + i, i < D, other=0.0)
            wait_for_earlier_kernels(EARLY)
            store_fixed(tl.load(x + i, i < D, other=0.0) * w, out, piece * (PIECE // 32), D // 32, TERMS, PIECE, EXTENT)
    else:
        _logit(x, squares, router, scale, factors, beside, logits, counters, chosen, weights, FACTOR, EPS, D, BLOCK, COUNT, PAD, FACTORS,
               EXPERTS, PADDED, USED, RENORMALIZED, BESIDE, EARLY)


@triton.jit
def _logit(x, squares, router, scale, factors, beside, logits, counters, chosen, weights, FACTOR: tl.constexpr, EPS: tl.constexpr,
           D: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr, FACTORS: tl.constexpr, EXPERTS: tl.constexpr,
           PADDED: tl.constexpr, USED: tl.constexpr, RENORMALIZED: tl.constexpr, BESIDE: tl.constexpr, EARLY: tl.constexpr):
    expert = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    factor = FACTOR
    if BESIDE:
        chooses = expert < EXPERTS
        row = tl.load(router + expert * D + i, (i < D) & chooses, other=0.0).to(tl.float32)
        row += tl.load(beside + i, (i < D) & (expert == EXPERTS), other=0.0)
        factor = tl.where(chooses, FACTOR, 1.0)
    else:
        row = tl.load(router + expert * D + i, i < D, other=0.0).to(tl.float32)
    by = tl.load(scale + i, i < D, other=0.0)
    each = tl.zeros((PADDED,), tl.float32) + 1.0
    if FACTORS:
        number = tl.arange(0, PADDED)
        each = tl.load(factors + number, number < EXPERTS, other=0.0)
    wait_for_earlier_kernels(EARLY)
    product = tl.sum(tl.load(x + i, i < D, other=0.0) * by * row, 0)
    tl.store(logits + expert, product * (load_root(squares, D, EPS, COUNT, PAD) * factor), cache_modifier=".cg")
    tl.debug_barrier()
    if tl.atomic_add(counters, 1, sem="acq_rel") == EXPERTS + BESIDE - 1:
        tl.debug_barrier()
        tl.store(counters, 0)
        choose(logits, each, chosen, weights, EXPERTS, PADDED, USED, RENORMALIZED)
        if BESIDE:
            tl.store(weights + USED, 1.0 / (1.0 + tl.exp(-tl.load(logits + EXPERTS, cache_modifier=".cg"))))


def reference(x: torch.Tensor, squares: torch.Tensor, eps: float, scale: torch.Tensor, factor: float, router: torch.Tensor, used: int,
              renormalized: bool, factors: torch.Tensor | None,
              beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in plain torch; arguments as `choose_experts`."""
    h = x * root(squares, x.shape[1], eps) * scale
    chosen, weights = route.reference(torch.nn.functional.linear(h * factor, router.float()), used, renormalized)
    weights = weights if factors is None else weights * factors[chosen]
    if beside is not None:
        weights = torch.cat((weights, (h * beside).sum(-1, keepdim=True).sigmoid()), 1)
    return chosen, weights


def _constants(d: int, squares: torch.Tensor, factors: bool, experts: int, used: int, renormalized: bool, normed: bool, terms: int,
               target: GpuTarget | None = None, beside: bool = False) -> tuple[dict[str, int | bool], int]:
    """Constants of the kernel beside FACTOR and EPS, and its warps."""
    block = triton.next_power_of_2(d)
    constants = {"D": d, "BLOCK": block, **root_constants(squares), "FACTORS": factors, **route.constants(experts, used, renormalized),
                 "NORMED": normed, "BESIDE": beside, "TERMS": terms,
                 "EXTENT": extent_of(d, PIECE), "PIECE": PIECE, "EARLY": early(target)}  # fmt: skip
    return constants, min(max(block // (32 * HELD), 4), 16)


def _launch(x: torch.Tensor, squares: torch.Tensor, eps: float, scale: torch.Tensor, factor: float, router: torch.Tensor, used: int,
            renormalized: bool, factors: torch.Tensor | None, counters: torch.Tensor, weight: torch.Tensor | None, terms: int,
            beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (experts, d), more = router.shape, 0 if beside is None else 1
    chosen = torch.empty((1, used), dtype=torch.int64, device=x.device)
    weights = torch.empty((1, used + more), dtype=torch.float32, device=x.device)
    logits = torch.empty(experts + more, dtype=torch.float32, device=x.device)
    out = logits if weight is None else fixed_point.empty(1, d, terms, extent_of(d, PIECE), x)
    constants, warps = _constants(d, squares, factors is not None, experts, used, renormalized, weight is not None, terms,
                                  beside=beside is not None)
    given = [scale if t is None else t for t in (factors, weight, beside)]  # what is not read is any pointer
    kernel(kiln_choose_experts)[(experts + more + (0 if weight is None else triton.cdiv(d, PIECE)),)](
        x, squares, router, scale, *given, logits, counters, chosen, weights, out, FACTOR=factor, EPS=eps, **constants,
        num_warps=warps)  # fmt: skip
    return chosen, weights, out


def _check(op: str, x: torch.Tensor, squares: torch.Tensor, scale: torch.Tensor, router: torch.Tensor, used: int,
           factors: torch.Tensor | None, weight: torch.Tensor | None = None, beside: torch.Tensor | None = None) -> None:
    floats = [t for t in (x, squares, scale, factors, weight, beside) if t is not None]
    fits = router.dim() == 2 and router.dtype in FLOATS and router.is_contiguous() and 1 <= used <= router.shape[0] <= MOST_EXPERTS
    fits = fits and x.shape == (1, router.shape[1]) and router.shape[1] % GROUP == 0 and squares.dim() == 1 and squares.numel() > 0
    fits = fits and all(t is None or t.shape == x.shape[1:] for t in (scale, weight, beside))
    fits = fits and all(t.dtype == torch.float32 for t in floats)
    if not fits or (factors is not None and factors.shape != router.shape[:1]):
        shapes = ["none" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (x, squares, scale, router, factors, weight)]
        given = "x {}, squares {}, scale {}, router {}, factors {}, weight {}".format(*shapes)
        raise ValueError(f"{op}: {given}; expected [1, D], [P], [D], [{used} .. {MOST_EXPERTS}, D], [E] or none, [D]; all but the router "
                         "float32, D a multiple of 32")  # fmt: skip


@kernel_op("kiln::choose_experts", mutates_args=("counters",))
def choose_experts(x: torch.Tensor, squares: torch.Tensor, eps: float, scale: torch.Tensor, factor: float, router: torch.Tensor, used: int,
                   renormalized: bool, factors: torch.Tensor | None, counters: torch.Tensor,
                   beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` of the logits factor * RMSNorm(x) * scale @ router^T, the weights of its experts times their `factors`.

    x float32 [1, D]; squares float32 [P], which add up to x . x; scale float32 [D]; router [E, D] of floats; factors float32 [E] or none;
    counters: int32 zeros, and zeros again afterwards. Returns int64 [1, used] and float32 [1, used]; with beside, float32 [D], one weight
    more, the sigmoid of RMSNorm(x) * scale . beside. Raises ValueError when a shape or dtype does not fit.
    """
    _check("choose_experts", x, squares, scale, router, used, factors, beside=beside)
    if not use_triton(x):
        return reference(x, squares, eps, scale, factor, router, used, renormalized, factors, beside)
    return _launch(x, squares, eps, scale, factor, router, used, renormalized, factors, counters, None, 1, beside)[:2]


@kernel_op("kiln::choose_experts_norm", mutates_args=("counters",))
def choose_experts_norm(
    x: torch.Tensor, squares: torch.Tensor, eps: float, scale: torch.Tensor, factor: float, router: torch.Tensor, used: int,
    renormalized: bool, factors: torch.Tensor | None, counters: torch.Tensor, weight: torch.Tensor,
    terms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`choose_experts`, and x * weight in fixed point of `terms` bytes; weight float32 [D]."""
    _check("choose_experts_norm", x, squares, scale, router, used, factors, weight)
    if not use_triton(x):
        fixed = fixed_point.quantize(x * weight, terms)
        return *reference(x, squares, eps, scale, factor, router, used, renormalized, factors), fixed
    return _launch(x, squares, eps, scale, factor, router, used, renormalized, factors, counters, weight, terms)


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """Of Gemma 4 26B-A4B, of Qwen3-30B-A3B, of Qwen3.5-35B-A3B with its gate beside, and of more experts than are counted."""
    types = dict.fromkeys(("x", "squares", "router", "scale", "factors", "weight", "beside", "logits", "weights"), "*fp32")
    types |= {"counters": "*i32", "chosen": "*i64", "out": "*i32"}
    cases = []
    for d, experts, used, whole in ((2816, 128, 8, True), (2048, 128, 8, False), (2048, 256, 8, False), (2048, 512, 10, False)):
        squares = torch.empty(triton.cdiv(d, PIECE))
        constants, warps = _constants(d, squares, whole, experts, used, True, whole, 2, target, experts == 256)
        constants |= {"FACTOR": d**-0.5 if whole else 1.0, "EPS": EPS}
        cases.append(KernelCase(f"choose_experts {used} of {experts} by {d}", kiln_choose_experts, types, constants, {"num_warps": warps},
                                None if whole else RARE_TARGETS))
    return cases
