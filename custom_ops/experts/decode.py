"""The chosen experts of one token on fixed-point activations: gates and values in one kernel, then the weighted sum in another.

Both are the GEMV with the rows of chosen experts (`kernels.py`): a pair is the token and one of its experts.
"""

from __future__ import annotations

import torch
import triton

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.experts.kernels import kiln_chosen_gemv, kiln_chosen_sum
from kiln.custom_ops.experts.linear import chosen_launch, chosen_rows
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.markers import GATED
from kiln.custom_ops.step.add_norm import PIECE, root, root_constants
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.block_types import LAYOUTS, RARE_TARGETS, usual_targets
from kiln.custom_ops.weights.fixed_point import GROUP, extent_of
from kiln.custom_ops.weights.gemv import GLU_ENDS, glu_fits
from kiln.custom_ops.weights.packed import check_weight, format_constants, halves_pointer


def _check_counters(op: str, counters: torch.Tensor, needed: int) -> None:
    if counters.numel() < needed:
        raise ValueError(f"{op}: {counters.numel()} counters; {needed} are needed")


def _check(op: str, x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor, count: int,
           rows: int) -> None:
    """rows: of x."""
    check_weight(op, words, halves, block_type)
    fixed_point.check(op, x, words.shape[0] * LAYOUTS[block_type].block, rows)
    if chosen.dim() != 2 or chosen.dtype != torch.int64 or chosen.shape[0] != 1:
        raise ValueError(f"{op}: chosen is {chosen.dtype} {tuple(chosen.shape)}; expected int64 [1, U]")
    if count < 1 or words.shape[2] % count:
        raise ValueError(f"{op}: {words.shape[2]} rows are no {count} experts of equal size")


@kernel_op("kiln::expert_glu", mutates_args=("counters",))
def expert_glu(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, up_words: torch.Tensor | None, up_halves: torch.Tensor | None,
               block_type: str, chosen: torch.Tensor, count: int, counters: torch.Tensor, squares: torch.Tensor | None = None,
               eps: float = 0.0, activation: str = "gelu_tanh") -> torch.Tensor:
    """act(gate) * value of each chosen expert, in fixed point: U rows of I, the inner size, a multiple of 32.

    x: a row in fixed point; chosen int64 [1, U]. An expert's rows are its I gates, then its I values, of the packed
    matrix [count * 2 I, K]; with up_words and up_halves gates [count * I, K] and values are matrices of their own, of one type. counters,
    squares, eps and activation as `fixed_glu`. Raises ValueError when a shape or the activation does not fit.
    """
    _check("expert_glu", x, words, halves, block_type, chosen, count, 1)
    apart = up_words is not None and up_halves is not None
    if (up_words is None) != (up_halves is None) or (apart and (up_words.shape != words.shape or up_halves.shape != halves.shape
                                                                or up_words.stride() != words.stride())):  # fmt: skip
        raise ValueError("expert_glu: gates and values are matrices of other shapes; expected two of one shape and type, or one matrix")
    size = words.shape[2] // count // (1 if apart else 2)
    if not glu_fits(words.shape[2] // count * (2 if apart else 1)):
        raise ValueError(f"expert_glu: {words.shape[2]} rows of {count} experts; expected inner sizes that are multiples of {GROUP}")
    if activation not in GLU_ENDS:
        raise ValueError(f"expert_glu: activation {activation!r}; expected {' or '.join(GLU_ENDS)}")
    if squares is not None and (squares.dim() != 1 or not squares.numel() or squares.dtype != torch.float32):
        raise ValueError(f"expert_glu: squares are {squares.dtype} {tuple(squares.shape)}; expected float32 [P]")
    used, k, (terms, extent) = chosen.shape[1], fixed_point.elements(x), fixed_point.form(x)
    if not use_triton(x):
        given = fixed_point.dequantize(x).unsqueeze(1)
        parts = [(words, halves)] + ([(up_words, up_halves)] if apart else [])
        y = torch.cat([chosen_rows(given, *part, block_type, chosen, count) for part in parts], 2)[0]  # type: ignore[arg-type]
        gate, value = (y if squares is None else y * root(squares, k, eps)).chunk(2, dim=-1)
        return fixed_point.quantize(GATED[activation](gate, value), terms)
    constants, splits, warps = chosen_launch(block_type, used, 2 * size, k, current_target(), gated=True)
    grid = (2 * size // constants["ROWS"], splits, used)
    _check_counters("expert_glu", counters, grid[0] * used)
    partials = torch.empty((splits, used, 2 * size), dtype=torch.float32, device=x.device)
    out = fixed_point.empty(used, size, terms, extent_of(size), x)
    kernel(kiln_chosen_gemv, constants["REGISTERS"], x)[grid](
        x, words, halves, up_words if apart else words, up_halves if apart else halves, chosen, partials, counters, out,
        partials if squares is None else squares, 2 * size, k, splits, words.stride(1), halves.stride(1), **format_constants(block_type),
        TERMS=terms, EXTENT=extent, OUT=extent_of(size), END=GLU_ENDS[activation], SHARED=used, APART=apart, **root_constants(squares),
        EPS=eps, **constants, num_warps=warps)  # fmt: skip
    return out


def _sum(op: str, x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor, weights: torch.Tensor,
         count: int, counters: torch.Tensor, leave_squares: bool, beside: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    used = chosen.shape[-1]
    _check(op, x, words, halves, block_type, chosen, count, used)
    expected = (1, used + (0 if beside is None else 1))
    if weights.shape != expected or weights.dtype != torch.float32:
        raise ValueError(f"{op}: weights are {weights.dtype} {tuple(weights.shape)}; expected float32 {expected}")
    n, k, (terms, extent) = words.shape[2] // count, fixed_point.elements(x), fixed_point.form(x)
    if beside is not None and (beside.shape != (1, n) or beside.dtype != torch.float32):
        raise ValueError(f"{op}: beside is {beside.dtype} {tuple(beside.shape)}; expected float32 {(1, n)}")
    if not use_triton(x):
        y = chosen_rows(fixed_point.dequantize(x).unsqueeze(0), words, halves, block_type, chosen, count)
        total = (y * weights[:, :used].unsqueeze(-1)).sum(1)
        total = total if beside is None else total + weights[:, used:] * beside
        return total, (total * total).sum(1)
    constants, splits, warps = chosen_launch(block_type, used, n, k, current_target())
    grid = (triton.cdiv(n, constants["ROWS"]), splits, used)
    _check_counters(op, counters, grid[0])
    partials = torch.empty((splits, used, n), dtype=torch.float32, device=x.device)
    out = torch.empty((1, n), dtype=torch.float32, device=x.device)
    squares = torch.empty(grid[0], dtype=torch.float32, device=x.device) if leave_squares else partials
    kernel(kiln_chosen_sum, constants["REGISTERS"], x)[grid](
        x, words, halves, chosen, weights, partials if beside is None else beside, partials, counters, out, squares, n, k, splits,
        words.stride(1), halves.stride(1), **format_constants(block_type), TERMS=terms, EXTENT=extent, TOGETHER=TOGETHER,
        PAIRS=used, SQUARES=leave_squares, BESIDE=beside is not None, **constants, num_warps=warps)  # fmt: skip
    return out, squares


@kernel_op("kiln::expert_sum", mutates_args=("counters",))
def expert_sum(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor, weights: torch.Tensor,
               count: int, counters: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
    """The sum over u of weights[u] times x[u] by the rows of expert chosen[u]: float32 [1, N].

    x: U rows in fixed point; the packed matrix [count * N, K]; chosen int64 [1, U], weights float32 [1, U]. counters:
    int32 zeros, one for each block of rows, and zeros again afterwards. With beside, float32 [1, N], there is one weight more, which it
    is added by. Raises ValueError when a shape does not fit.
    """
    return _sum("expert_sum", x, words, halves, block_type, chosen, weights, count, counters, False, beside)[0]


@kernel_op("kiln::expert_sum_squares", mutates_args=("counters",))
def expert_sum_squares(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor,
                       weights: torch.Tensor, count: int, counters: torch.Tensor,
                       beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`expert_sum`, and float32 partial sums of its squares; the kernel chooses how many."""
    return _sum("expert_sum_squares", x, words, halves, block_type, chosen, weights, count, counters, True, beside)


# Inner size, hidden size, activation, gates apart from values, a norm after, types of gates and of down: of Gemma 4 26B-A4B, of
# Qwen3-30B-A3B, and of an inner size that takes small programs.
SHAPES = ((704, 2816, "gelu_tanh", False, True, ("Q4_K",), ("Q5_0", "Q8_0")), (768, 2048, "silu", True, False, ("Q4_K",), ("Q4_K", "Q6_K")),
          (96, 256, "gelu_tanh", False, True, ("Q4_K",), ()))  # fmt: skip
EXPERTS, USED = 128, 8
TOGETHER = 16  # partial sums of a row in flight


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """Decode of the models that have experts, two bytes an activation."""
    cases = []
    shared = dict.fromkeys(("partials", "squares"), "*fp32") | {"x": "*i32", "words": "*i32", "counters": "*i32", "chosen": "*i64"}
    shared |= dict.fromkeys(("n", "k", "splits"), "i32")
    for size, hidden, activation, apart, normed, gates, downs in SHAPES:
        for name, types, n, k in (("expert_glu", gates, 2 * size, hidden), ("expert_sum", downs, hidden, size)):
            for block_type in types:
                launched, _, warps = chosen_launch(block_type, USED, n, k, target, gated=n == 2 * size)
                rows = EXPERTS * n // (2 if apart and n == 2 * size else 1)
                constants = format_constants(block_type) | launched | dict.fromkeys(("stride", "halves_stride"), rows)
                constants |= {"TERMS": 2, "EXTENT": extent_of(k)}
                half = halves_pointer(block_type)
                if name == "expert_glu":
                    constants |= {"OUT": extent_of(size), "END": GLU_ENDS[activation], "SHARED": USED, "APART": apart, "EPS": EPS}
                    constants |= root_constants(torch.empty(triton.cdiv(k, PIECE)))
                    fn, own = kiln_chosen_gemv, {"up_words": "*i32", "halves": half, "up_halves": half, "out": "*i32"}
                else:
                    constants |= {"TOGETHER": TOGETHER, "PAIRS": USED, "SQUARES": normed, "BESIDE": not normed}
                    fn, own = kiln_chosen_sum, {"halves": half, "weights": "*fp32", "beside": "*fp32", "out": "*fp32"}
                options = {"num_warps": warps, "maxnreg": launched["REGISTERS"]}
                targets = usual_targets(block_type) if normed and size > 96 else RARE_TARGETS
                cases.append(KernelCase(f"{name} {block_type} {n}x{k}", fn, shared | own, constants, options, targets, ("n", "k")))
    return cases
