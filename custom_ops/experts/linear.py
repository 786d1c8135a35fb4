"""Linear layers of chosen experts: of a matrix [E * N, K], whose rows are E experts one after another, each token meets U experts' rows.

A few tokens read only the rows of the chosen experts, packed as they are. More, or a number known only at run time: tiles of one expert's
tokens, whose rows are dequantized as `weights.linear` does it, some experts at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.experts.kernels import kiln_chosen_gemv, kiln_grouped_matmul, kiln_pair_order
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights.block_types import LAYOUTS, usual_targets
from kiln.custom_ops.weights.fixed_point import GROUP, TERMS, extent_of
from kiln.custom_ops.weights.gemv import COUNTERS, fix, launch
from kiln.custom_ops.weights.layouts import dequantize
from kiln.custom_ops.weights.linear import MAX_GEMV_TOKENS, MAX_SCRATCH_BYTES, dequantized
from kiln.custom_ops.weights.packed import check_weight, format_constants, halves_pointer

ORDER_BLOCK, ORDER_WARPS = 1024, 4
FLOATS = (torch.float32, torch.bfloat16)
LAUNCHED = ("GROUPS", "ROWS", "SHARES", "EVEN", "EARLY", "REGISTERS")
PLAIN = {"OUT": GROUP, "APART": False, "COUNT": 0, "PAD": 1, "EPS": 0.0}  # of `kiln_chosen_gemv`: one matrix, no norm before it


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


TILE = Tile(64, 128, 32, 4, 3)  # fits every architecture; none is measured yet
FLOAT32 = Tile(64, 64, 16, 8, 3)  # float32 runs on the CUDA cores, out of registers


def experts_at_once(n: int, k: int, itemsize: int, count: int) -> int:
    """Experts [n, k] in one of the equal pieces that go through MAX_SCRATCH_BYTES of scratch."""
    pieces = triton.cdiv(count, max(MAX_SCRATCH_BYTES // (n * k * itemsize), 1))
    return triton.cdiv(count, pieces)


# ---- plain torch ----


def _few(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [T, U or 1, K] and the chosen experts' rows [K, T * U, N] -> float32 [T, U, N]."""
    tokens, k = x.shape[0], x.shape[2]
    rows = rows.unflatten(1, (tokens, -1))
    return (x.float().permute(2, 0, 1).unsqueeze(-1) * rows.view(k, tokens, -1, rows.shape[3])).sum(0)


def _many(x: torch.Tensor, piece: Callable[[int, int], torch.Tensor], chosen: torch.Tensor, n: int, count: int) -> torch.Tensor:
    """x [T, U or 1, K]; piece(first, last): those experts' matrices, float32 [K, (last - first) * n] -> float32 [T, U, n].

    Every expert meets every token, for no size may depend on what was chosen.
    """
    tokens, k = x.shape[0], x.shape[2]
    x = x.float()
    step = experts_at_once(n, k, 4, count)
    out = None
    for first in range(0, count, step):
        size = min(step, count - first)
        own = chosen - first
        inside = (own >= 0) & (own < size)
        at = own.clamp(0, size - 1).unsqueeze(-1).expand(-1, -1, n)
        matrices = piece(first, first + size)
        if x.shape[1] == 1:
            y = torch.mm(x[:, 0], matrices).view(tokens, size, n)
        else:  # an expert gets what the token has in the slot in which it chose it
            here = own.unsqueeze(-1) == torch.arange(size, device=x.device)  # [T, U, size]
            given = torch.where(here.unsqueeze(-1), x.unsqueeze(2), 0.0).sum(1)  # [T, size, K]
            y = torch.bmm(given.transpose(0, 1), matrices.view(k, size, n).transpose(0, 1)).transpose(0, 1)
        found = y.gather(1, at)
        out = found if out is None else torch.where(inside.unsqueeze(-1), found, out)
    return out


def _is_few(x: torch.Tensor) -> bool:
    return isinstance(x.shape[0], int) and x.shape[0] <= MAX_GEMV_TOKENS


def chosen_rows(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor,
                count: int) -> torch.Tensor:
    """`expert_linear` of a few tokens in plain torch, float32; only the chosen rows are dequantized."""
    n, ids = words.shape[2] // count, chosen.flatten()
    picked = (t.unflatten(2, (count, n)).index_select(2, ids).flatten(2) for t in (words, halves))
    return _few(x, dequantize(block_type, *picked).view(x.shape[2], -1, n))


def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor,
              count: int) -> torch.Tensor:
    """`expert_linear` in plain torch."""
    if _is_few(x):
        return chosen_rows(x, words, halves, block_type, chosen, count).to(x.dtype)
    n = words.shape[2] // count

    def piece(first: int, last: int) -> torch.Tensor:
        rows = slice(first * n, last * n)
        return dequantize(block_type, words[:, :, rows], halves[:, :, rows])

    return _many(x, piece, chosen, n, count).to(x.dtype)


def float_reference(x: torch.Tensor, w: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """`expert_matmul` in plain torch."""
    n = w.shape[0] // count
    if _is_few(x):
        return _few(x, w.unflatten(0, (count, n)).index_select(0, chosen.flatten()).float().permute(2, 0, 1)).to(x.dtype)
    return _many(x, lambda first, last: w[first * n : last * n].float().T, chosen, n, count).to(x.dtype)


# ---- kernels ----


def chosen_launch(block_type: str, pairs: int, n: int, k: int, target: GpuTarget, gated: bool = False) -> tuple[dict, int, int]:
    """`gemv.launch` of the pairs, with the constants that the kernels of chosen rows take."""
    constants, splits, warps = launch(block_type, pairs, n, k, target, gated=gated)
    return {name: constants[name] for name in LAUNCHED}, splits, warps


def grouped_constants(dtype: torch.dtype, n: int, k: int, experts: int, shared: int,
                      transposed: bool) -> tuple[dict[str, int | bool], Tile]:
    """Constants of `kiln_grouped_matmul` for a piece of `experts` experts, and its tile."""
    tile = FLOAT32 if dtype == torch.float32 else TILE
    constants = {"N": n, "K": k, "STEP": 1 if transposed else experts * n, "TRANSPOSED": transposed, "SHARED": shared, "EXPERTS": experts,
                 "PADDED": triton.next_power_of_2(experts)}  # fmt: skip
    return constants | {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.inner}, tile


def _grouped(x: torch.Tensor, piece: Callable[[int, int, torch.Tensor], torch.Tensor], chosen: torch.Tensor, n: int, count: int,
             transposed: bool) -> torch.Tensor:
    """x [T, U or 1, K]; piece(first, last, after): those experts' matrices in x's dtype -> [T, U, n] in it."""
    (tokens, used), k, pairs = chosen.shape, x.shape[2], chosen.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=x.device)
    kernel(kiln_pair_order)[(count + 1,)](chosen, order, starts, pairs, BLOCK=ORDER_BLOCK, num_warps=ORDER_WARPS)
    out = torch.empty((tokens, used, n), dtype=x.dtype, device=x.device)
    step = experts_at_once(n, k, x.element_size(), count)
    for first in range(0, count, step):
        size = min(step, count - first)
        constants, tile = grouped_constants(x.dtype, n, k, size, used // x.shape[1], transposed)
        grid = (triton.cdiv(pairs, tile.rows) + size, triton.cdiv(n, tile.columns))
        kernel(kiln_grouped_matmul)[grid](x, piece(first, first + size, out if first else x), order, starts, out, first, **constants,
                                          num_warps=tile.warps, num_stages=tile.stages)
    return out


def _gemv(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """A few tokens: each pair reads its expert's rows and no other's."""
    (tokens, used), k, n = chosen.shape, x.shape[2], words.shape[2] // count
    pairs, terms = tokens * used, TERMS[x.dtype]
    fixed, extent = fix(x.flatten(0, 1), terms), extent_of(k)
    constants, splits, warps = chosen_launch(block_type, pairs, n, k, current_target())
    grid = (triton.cdiv(n, constants["ROWS"]), splits, pairs)
    alone = splits == 1 and x.dtype == torch.float32
    partials = torch.empty((splits, pairs, n), dtype=torch.float32, device=x.device)
    out = partials if alone else torch.empty((pairs, n), dtype=x.dtype, device=x.device)
    counters = torch.zeros(max(COUNTERS, grid[0] * pairs), dtype=torch.int32, device=x.device)
    kernel(kiln_chosen_gemv, constants["REGISTERS"], x)[grid](
        fixed, words, halves, words, halves, chosen, partials, counters, out, partials, n, k, splits, words.stride(1), halves.stride(1),
        **format_constants(block_type), TERMS=terms, EXTENT=extent, END="split" if alone else "sum", SHARED=used // x.shape[1], **constants,
        **PLAIN, num_warps=warps)  # fmt: skip
    return out.view(tokens, used, n)


def _check(op: str, x: torch.Tensor, chosen: torch.Tensor, rows: int, k: int, count: int) -> None:
    if x.dim() != 3 or x.shape[2] != k or x.dtype not in FLOATS:
        raise ValueError(f"{op}: x is {x.dtype} {tuple(x.shape)}; expected float32 or bfloat16 [T, U or 1, {k}]")
    if chosen.dim() != 2 or chosen.dtype != torch.int64 or x.shape[1] not in (1, chosen.shape[1]):
        raise ValueError(f"{op}: chosen is {chosen.dtype} {tuple(chosen.shape)}, x {tuple(x.shape)}; expected int64 [T, U]")
    if count < 1 or rows % count:
        raise ValueError(f"{op}: {rows} rows are no {count} experts of equal size")


@kernel_op("kiln::expert_linear", mutates_args=())
def expert_linear(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, chosen: torch.Tensor,
                  count: int) -> torch.Tensor:
    """x [T, U, K], or [T, 1, K] for all U, and chosen [T, U] int64, numbers of experts -> [T, U, N] in x's dtype, float32 inside.

    The weight is the packed matrix [count * N, K] of block type `block_type`: words int32 [G, W, count * N], halves float16 or
    int16. Row (t, u) is x's by the rows of expert chosen[t, u]; of a token no expert is there twice. Raises ValueError when a shape or
    dtype does not fit.
    """
    check_weight("expert_linear", words, halves, block_type)
    _check("expert_linear", x, chosen, words.shape[2], words.shape[0] * LAYOUTS[block_type].block, count)
    if not use_triton(x):
        return reference(x, words, halves, block_type, chosen, count)
    x, chosen, n = x.contiguous(), chosen.contiguous(), words.shape[2] // count
    if _is_few(x):
        return _gemv(x, words, halves, block_type, chosen, count)

    def piece(first: int, last: int, after: torch.Tensor) -> torch.Tensor:
        rows = slice(first * n, last * n)
        return dequantized(words[:, :, rows], halves[:, :, rows], block_type, x.dtype, after)

    return _grouped(x, piece, chosen, n, count, False)


@kernel_op("kiln::expert_matmul", mutates_args=())
def expert_matmul(x: torch.Tensor, w: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """`expert_linear` with the float matrix w [count * N, K], which is never rounded."""
    _check("expert_matmul", x, chosen, w.shape[0], w.shape[1], count)
    if not use_triton(x) or _is_few(x):
        return float_reference(x, w, chosen, count)
    dtype, n = torch.promote_types(x.dtype, w.dtype), w.shape[0] // count
    y = _grouped(x.to(dtype).contiguous(), lambda first, last, _: w[first * n : last * n].to(dtype), chosen.contiguous(), n, count, True)
    return y.to(x.dtype)


def bytes_moved(block_type: str, tokens: int, experts: int, n: int, k: int, used: int, itemsize: int = 2) -> int:
    """Bytes that must cross memory once where tokens meet `experts` different experts; see `weights.linear.bytes_moved`."""
    layout = LAYOUTS[block_type]
    return experts * n * (k // layout.block) * layout.block_bytes + tokens * used * (n + k) * itemsize


SIZES = ((1408, 2816, 8, ("Q4_K",)), (2816, 704, 1, ("Q5_0", "Q8_0")))  # rows, K, pairs to an input; types, of Gemma 4 26B-A4B
EXPERTS, USED = 128, 8


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """Decode and prefill of Gemma 4 26B-A4B in bfloat16, and of float32 experts."""
    cases = []
    integers = dict.fromkeys(("n", "k", "splits"), "i32")
    for n, k, shared, types in SIZES:
        for block_type in types:
            launched, _, warps = chosen_launch(block_type, USED, n, k, target)
            constants = format_constants(block_type) | launched | dict.fromkeys(("stride", "halves_stride"), EXPERTS * n)
            constants |= {"TERMS": TERMS[torch.bfloat16], "EXTENT": extent_of(k), "END": "sum", "SHARED": shared} | PLAIN
            packed = dict.fromkeys(("words", "up_words"), "*i32") | dict.fromkeys(("halves", "up_halves"), halves_pointer(block_type))
            results = dict.fromkeys(("partials", "squares"), "*fp32") | {"counters": "*i32", "out": "*bf16"}
            signature = {"x": "*i32", **packed, "chosen": "*i64", **results, **integers}
            cases.append(KernelCase(f"chosen_gemv {block_type} {n}x{k}", kiln_chosen_gemv, signature, constants,
                                    {"num_warps": warps, "maxnreg": launched["REGISTERS"]}, usual_targets(block_type), ("n", "k")))
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            fixed, tile = grouped_constants(dtype, n, k, experts_at_once(n, k, dtype.itemsize, EXPERTS), shared, dtype == torch.float32)
            signature = dict.fromkeys(("x", "w", "out"), f"*{name}") | {"order": "*i32", "starts": "*i32", "first": "i32"}
            cases.append(KernelCase(f"grouped_matmul {name} {n}x{k}", kiln_grouped_matmul, signature, fixed,
                                    {"num_warps": tile.warps, "num_stages": tile.stages}))
    order = {"chosen": "*i64", "order": "*i32", "starts": "*i32", "pairs": "i32"}
    return [*cases, KernelCase("pair_order", kiln_pair_order, order, {"BLOCK": ORDER_BLOCK}, {"num_warps": ORDER_WARPS})]
