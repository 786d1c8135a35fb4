"""Matmuls of a few tokens with packed weights: fixed-point activations in, one kernel; each token reads every weight once, at its bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.tables import nearest, pick
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.markers import GATED
from kiln.custom_ops.step.add_norm import PIECE, root, root_constants
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.block_types import LAYOUTS, RARE_TARGETS, USUAL_TYPES, usual_targets
from kiln.custom_ops.weights.fixed_point import GROUP, WIDE, extent_of, store_fixed
from kiln.custom_ops.weights.gemv_fragments import loads_of
from kiln.custom_ops.weights.gemv_kernels import kiln_gemv
from kiln.custom_ops.weights.gemv_rows import kiln_gemv_rows
from kiln.custom_ops.weights.gemv_sums import kiln_gemv_sums
from kiln.custom_ops.weights.gemv_tiles import kiln_gemv_tiles
from kiln.custom_ops.weights.layouts import dequantize
from kiln.custom_ops.weights.packed import check_weight, format_constants, halves_pointer

MAX_SPLITS = 64
MOST_SHARED_ROWS = 128  # 4 to a lane: of more, the compiler's layout would give a warp rows of another's share
REGISTERS_PER_SM, MOST_REGISTERS = 1 << 16, 248
COUNTERS = 1 << 13  # for one token: blocks of rows of the largest matrix


def registers_of(warps: int) -> int:
    """Of a thread, so that as many warps fit a multiprocessor: left alone, the assembler saves registers that the loads ahead need."""
    return min(REGISTERS_PER_SM // (32 * warps) // 8 * 8, MOST_REGISTERS)


@dataclass(frozen=True)
class GemvConfig:
    """How the GEMV is spread over one architecture."""

    rows: int = 64  # of a program
    warps: int = 4  # of a program, at most, each with its own share of K
    warps_per_sm: int = 28  # at most: more than run at once would wait for the first to end
    groups: int = 0  # of 32 elements a lane takes at a time; 0: the block type's

    def __post_init__(self) -> None:
        if self.warps > 1 and self.rows > MOST_SHARED_ROWS:
            raise ValueError(f"GemvConfig: {self.rows} rows and {self.warps} warps; with more than {MOST_SHARED_ROWS} rows one is all")

    @property
    def registers(self) -> int:
        return registers_of(self.warps_per_sm)


GEMV_CONFIGS = {90: GemvConfig()}  # by architecture, see `configs`


@dataclass(frozen=True)
class RowsConfig:
    """How several tokens are multiplied at once. The split of K stays that of one token, so that the sums do."""

    tiles: bool  # on int8 tensor cores, `kiln_gemv_tiles`; else four bytes at a time, `kiln_gemv`
    registers: int  # of a thread, at most


# By (architecture, tokens at most), see `gpu/tables.py`.
ROWS_CONFIGS = {(90, 4): RowsConfig(True, 128), (90, 8): RowsConfig(True, 160)}
MORE_REGISTERS = 24  # where tiles do not fit: four bytes at a time hold more
MOST_TOGETHER = 8  # tokens of a launch


@dataclass(frozen=True)
class SumsConfig:
    """How `kiln_gemv_sums` is spread over one architecture. How K is cut is the same for every number of tokens, so that their sums are."""

    rows: int = 128  # that K is cut for, a multiple of 32; a warp has 32
    warps: int = 4  # of a program of so many rows
    warps_per_sm: int = 12  # at most, as `GemvConfig`
    narrow: int = 32  # rows of a program, but for a GLU of several tokens: the fewer, the more evenly they end
    ahead: int = 8  # groups of 32 whose quants are under way, of four tokens at most
    ahead_apart: int = 6  # the same where K is split into more than FEW_SPLITS
    ahead_many: int = 4  # of more than four tokens, whose sums take more registers

    @property
    def registers(self) -> int:
        return registers_of(self.warps_per_sm)


# By (architecture, loads of a group's quants); measured by tests/measure/tune_sums.py.
SUMS_CONFIGS = {(90, 1): SumsConfig(), (90, 2): SumsConfig(warps_per_sm=8, narrow=128, ahead=6, ahead_many=8)}
FEW_SPLITS = 4
SPLITS_OF_WAVES, LESS_WAVES = 3, 0.85  # 51,200 rows of 5,120: 56.2 us whole, 50.2 of 2 splits, 48.6 of 3
# By architecture: block types of 256 with which `kiln_gemv`, a float for every group, is the faster for one token. It is taken where no
# step of several tokens has to have the same bits.
FLOATS_ALONE = {90: frozenset({"Q6_K"})}
FIXED_WARPS = 4
FIXED_BLOCK = 1024
GLU_ROWS = 64  # gates of a program, at least, or a group where that does not divide them; values never share one with them
GLU_ENDS = {"gelu_tanh": "glu", "silu": "silu"}  # how the kernel ends, by the activation


def launch(block_type: str, tokens: int, n: int, k: int, target: GpuTarget, config: GemvConfig | None = None,
           gated: bool = False) -> tuple[dict, int, int]:
    """(constants of `kiln_gemv` beside the format's, number of splits of K, warps)."""
    config = config or GEMV_CONFIGS[nearest(GEMV_CONFIGS, target)]
    if gated and n // 2 % config.rows:
        config = replace(config, rows=math.gcd(n // 2, GLU_ROWS))
    groups = math.gcd(config.groups or LAYOUTS[block_type].gemv_groups, k // GROUP)
    steps, blocks = k // (GROUP * groups), triton.cdiv(n, config.rows) * tokens
    best = None
    for warps in (1 << i for i in range(config.warps.bit_length())):
        programs = config.warps_per_sm // warps * target.sm_count  # at once
        each = triton.cdiv(steps, min(max(programs // blocks, 1), MAX_SPLITS) * warps)  # steps of a warp
        splits = triton.cdiv(steps, each * warps)
        waves = triton.cdiv(blocks * splits, programs)
        if best is None or (each * waves, waves) <= best[0]:
            best = (each * waves, waves), splits, warps
    _, splits, warps = best
    return {"GROUPS": groups, "ROWS": config.rows, "SHARES": warps, "EVEN": n % config.rows == 0, "EARLY": early(target),
            "REGISTERS": config.registers}, splits, warps


def sums_fit(block_type: str, extent: int, n: int, aligned: bool) -> bool:
    """`kiln_gemv_sums` takes this matrix and activations of this extent; aligned: four rows of it lie in 16 bytes, their halves in 8."""
    return LAYOUTS[block_type].block == WIDE and extent == WIDE and n % 4 == 0 and aligned


def splits_of_sums(n: int, rows: int, steps: int, config: SumsConfig, target: GpuTarget) -> int:
    """Splits of K, of `steps` blocks of 256, of n rows; `rows` of a program before they are narrowed.

    Programs run at once if they can. Where they cannot even of whole K, a few splits are taken if that makes the last wave so much shorter:
    a wave of a few programs takes as long as any.
    """
    shares, blocks, places = 32 * config.warps // rows, triton.cdiv(n, rows), config.warps_per_sm * target.sm_count
    if blocks * config.warps > places:
        waves = {s: triton.cdiv(triton.cdiv(n, 32) * s, places) * triton.cdiv(steps, s) for s in range(1, SPLITS_OF_WAVES + 1)}
        best = min(waves, key=waves.__getitem__)
        return best if waves[best] < LESS_WAVES * waves[1] else 1
    each = triton.cdiv(steps, min(max(config.warps_per_sm // config.warps * target.sm_count // blocks, 1), MAX_SPLITS) * shares)
    return triton.cdiv(steps, each * shares)


def launch_sums(block_type: str, tokens: int, n: int, k: int, target: GpuTarget, gated: bool = False) -> tuple[dict, int, int]:
    """`launch` of `kiln_gemv_sums`; neither the splits of K nor their shares depend on `tokens`."""
    config = pick(SUMS_CONFIGS, target, loads_of(LAYOUTS[block_type].bits))
    rows = math.gcd(n // 2, config.rows) if gated else config.rows
    shares, splits = 32 * config.warps // rows, splits_of_sums(n, rows, k // WIDE, config, target)
    together = tokens if tokens <= MOST_TOGETHER else 1
    if not (gated and together > 1) and triton.cdiv(n, config.narrow) <= COUNTERS:
        rows = min(rows, config.narrow)
    ahead = config.ahead_many if together > 4 else config.ahead if splits <= FEW_SPLITS else config.ahead_apart
    return {"AHEAD": ahead, "ROWS": rows, "SHARES": shares, "EVEN": n % rows == 0, "EARLY": early(target), "REGISTERS": config.registers,
            "M": together}, splits, rows * shares // 32


def rows_config(tokens: int, target: GpuTarget, aligned: bool = True) -> RowsConfig:
    """Of 2 .. MOST_TOGETHER tokens. aligned: four rows of the matrix lie in 16 bytes, without which there are no tiles."""
    config = pick(ROWS_CONFIGS, target, tokens)
    return config if aligned or not config.tiles else RowsConfig(False, config.registers + MORE_REGISTERS)


def launch_rows(block_type: str, tokens: int, n: int, k: int, target: GpuTarget, gated: bool,
                aligned: bool) -> tuple[dict, int, int, Any]:
    """`launch` of one token, as M `tokens` take it together, and the kernel."""
    constants, splits, warps = launch(block_type, 1, n, k, target, gated=gated)
    config = rows_config(tokens, target, aligned and n % 4 == 0 and constants["ROWS"] % 32 == 0)
    fn = kiln_gemv_tiles if config.tiles else kiln_gemv_rows
    return constants | {"M": tokens, "REGISTERS": config.registers}, splits, warps, fn


def launch_any(block_type: str, tokens: int, n: int, k: int, target: GpuTarget, extent: int, gated: bool, aligned: bool,
               alone: bool = False) -> tuple[dict, int, int, Any]:
    """The launch of any number of tokens, and the kernel: but for `alone` it does not depend on how many there are of MOST_TOGETHER."""
    floats = alone and tokens == 1 and block_type in FLOATS_ALONE[nearest(FLOATS_ALONE, target)]
    if not floats and sums_fit(block_type, extent, n, aligned):
        return *launch_sums(block_type, tokens, n, k, target, gated=gated), kiln_gemv_sums
    if 1 < tokens <= MOST_TOGETHER:
        return launch_rows(block_type, tokens, n, k, target, gated, aligned)
    return *launch(block_type, tokens, n, k, target, gated=gated), kiln_gemv


@waits()
@triton.jit
def kiln_fix(x, out, n, TERMS: tl.constexpr, EXTENT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """x [n], rows that are multiples of EXTENT, to fixed point. Grid (n / BLOCK)."""
    wait_for_earlier_kernels(EARLY)
    first = tl.program_id(0) * BLOCK
    i = first + tl.arange(0, BLOCK)
    store_fixed(tl.load(x + i, i < n, other=0.0).to(tl.float32), out, first // 32, n // 32, TERMS, BLOCK, EXTENT)


def fix(x: torch.Tensor, terms: int) -> torch.Tensor:
    """x [T, K], K a multiple of 32 -> rows in fixed point; kernels only."""
    extent = extent_of(x.shape[1])
    out = fixed_point.empty(*x.shape, terms, extent, x)
    kernel(kiln_fix)[(triton.cdiv(x.numel(), FIXED_BLOCK),)](x, out, x.numel(), TERMS=terms, EXTENT=extent, BLOCK=FIXED_BLOCK,
                                                               EARLY=early(), num_warps=FIXED_WARPS)
    return out


def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, squares: torch.Tensor | None,
              eps: float) -> torch.Tensor:
    """The matmul in plain torch, a token at a time, so that none depends on the others; arguments as `fixed_linear`."""
    dense = dequantize(block_type, words, halves)
    y = torch.cat([row @ dense for row in fixed_point.dequantize(x).split(1)])
    return y if squares is None else y * root(squares, fixed_point.elements(x), eps)


def multiply(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, counters: torch.Tensor, dtype: torch.dtype,
             end: str = "sum", squares: torch.Tensor | None = None, eps: float = 0.0, leave_squares: bool = False,
             alone: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel launch behind the ops; arguments as theirs, `end` as END of the kernel. Returns its result and its sums of squares.

    Up to MOST_TOGETHER tokens take one reading of the weights, more a reading each.
    """
    tokens, n, k, (terms, extent) = x.shape[0], words.shape[2], fixed_point.elements(x), fixed_point.form(x)
    gated, programs = end in GLU_ENDS.values(), 1 if tokens <= MOST_TOGETHER else tokens
    aligned = all(t.stride(1) % 4 == 0 and t.storage_offset() % 4 == 0 for t in (words, halves))
    constants, splits, warps, fn = launch_any(block_type, tokens, n, k, current_target(), extent, gated, aligned, alone)
    whole = splits == 1 and end == "sum" and dtype == torch.float32 and not leave_squares
    if whole:
        end = "split"  # there is nothing to add up
    partials = torch.empty((splits, tokens, n), dtype=torch.float32, device=x.device)
    extent_out = extent_of(n // 2) if gated else GROUP
    if gated:
        out = fixed_point.empty(tokens, n // 2, terms, extent_out, x)
    elif end == "sum":
        out = torch.empty((tokens, n), dtype=dtype, device=x.device)
    else:
        out = partials
    grid = (triton.cdiv(n, constants["ROWS"]), splits, programs)
    left = torch.empty((tokens, grid[0]), dtype=torch.float32, device=x.device) if leave_squares else partials
    if end != "split" and counters.numel() < grid[0] * programs:
        raise ValueError(f"gemv: {counters.numel()} counters; {tokens} tokens and {n} rows take {grid[0] * programs}")
    kernel(fn, constants["REGISTERS"], x)[grid](
        x, words, halves, partials, counters, out, partials if squares is None else squares, left, n, k, splits, words.stride(1),
        halves.stride(1), **format_constants(block_type), TERMS=terms, EXTENT=extent, OUT=extent_out, END=end, **constants,
        **root_constants(squares), EPS=eps, SQUARES=leave_squares, num_warps=warps)  # fmt: skip
    return out[0] if whole else out, left[0] if leave_squares and tokens == 1 else left


def _check(op: str, x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, squares: torch.Tensor | None,
           few: bool = False) -> None:
    check_weight(op, words, halves, block_type)
    k = words.shape[0] * LAYOUTS[block_type].block
    fixed_point.check(op, x, k)
    if (few or squares is not None) and not 1 <= x.shape[0] <= MOST_TOGETHER:
        raise ValueError(f"{op}: x is {tuple(x.shape)}; expected 1 to {MOST_TOGETHER} tokens")
    rows = "" if x.shape[0] == 1 else f"{x.shape[0]}, "
    if squares is not None and (squares.dim() != 1 + bool(rows) or not squares.numel() or squares.dtype != torch.float32
                                or (rows and squares.shape[0] != x.shape[0])):  # fmt: skip
        raise ValueError(f"{op}: squares are {squares.dtype} {tuple(squares.shape)}; expected float32 [{rows}P]")


@kernel_op("kiln::fixed_point", mutates_args=())
def to_fixed(x: torch.Tensor, terms: int) -> torch.Tensor:
    """x [T, K] -> rows in fixed point of `terms` bytes (see `fixed_point`). ValueError when it does not fit."""
    if x.dim() != 2 or x.shape[1] % GROUP or terms not in (1, 2, 3):
        raise ValueError(f"fixed_point: x is {tuple(x.shape)}, {terms} bytes; expected [T, a multiple of {GROUP}], 1 to 3 bytes")
    return fix(x.contiguous(), terms) if use_triton(x) else fixed_point.quantize(x, terms)


@kernel_op("kiln::fixed_linear", mutates_args=("counters",))
def fixed_linear(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, counters: torch.Tensor,
                 squares: torch.Tensor | None = None, eps: float = 0.0, alone: bool = False) -> torch.Tensor:
    """The matmul of x, T rows in fixed point of either extent (see `fixed_point`), with the packed matrix [N, K]: float32 [T, N].

    counters: int32 zeros, at least as many as blocks of rows, T times as many for more than MOST_TOGETHER tokens; zeros again afterwards.
    squares: float32 [P] of one token, [T, P] of T, MOST_TOGETHER at most; the matmul is multiplied by `add_norm.root` of them. Up to
    MOST_TOGETHER tokens are each, bit for bit, what they are alone, here as in the ops below, but for one token with `alone`: there are no
    steps of several beside, and it is multiplied as is fastest. Raises ValueError when a shape does not fit.
    """
    _check("fixed_linear", x, words, halves, block_type, squares)
    if not use_triton(x):
        return reference(x, words, halves, block_type, squares, eps)
    return multiply(x, words, halves, block_type, counters, torch.float32, squares=squares, eps=eps, alone=alone)[0]


@kernel_op("kiln::fixed_linear_squares", mutates_args=("counters",))
def fixed_linear_squares(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, counters: torch.Tensor,
                         squares: torch.Tensor | None = None, eps: float = 0.0,
                         alone: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`fixed_linear` of a few tokens, and float32 partial sums of their squares, [P] or [T, P]; the kernel chooses how many."""
    _check("fixed_linear_squares", x, words, halves, block_type, squares, few=True)
    if not use_triton(x):
        y = reference(x, words, halves, block_type, squares, eps)
        return y, (y * y).sum(1) if y.shape[0] == 1 else (y * y).sum(1, keepdim=True)
    return multiply(x, words, halves, block_type, counters, torch.float32, squares=squares, eps=eps, leave_squares=True,
                    alone=alone)


@kernel_op("kiln::fixed_partials", mutates_args=())
def fixed_partials(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, squares: torch.Tensor | None = None,
                   eps: float = 0.0, alone: bool = False) -> torch.Tensor:
    """`fixed_linear` of a few tokens, in parts: float32 [S, N] of one, [S, T, N] of several, whose sum over S is the result.

    The kernel chooses S, the same for every T but for `alone`.
    """
    _check("fixed_partials", x, words, halves, block_type, squares, few=True)
    if use_triton(x):
        parts, _ = multiply(x, words, halves, block_type, x, torch.float32, "split", squares, eps, alone=alone)
    else:
        parts = reference(x, words, halves, block_type, squares, eps).unsqueeze(0)
    return parts.flatten(0, 1) if x.shape[0] == 1 else parts


@kernel_op("kiln::fixed_glu", mutates_args=("counters",))
def fixed_glu(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, counters: torch.Tensor,
              squares: torch.Tensor | None = None, eps: float = 0.0, activation: str = "gelu_tanh", alone: bool = False) -> torch.Tensor:
    """act(gate) * value, of the matmul [gate, value] of `fixed_linear`, in fixed point: rows of N / 2.

    activation: "gelu_tanh" or "silu". N / 2 is a multiple of 32. Raises ValueError when a shape or the activation does not fit.
    """
    _check("fixed_glu", x, words, halves, block_type, squares)
    if activation not in GLU_ENDS:
        raise ValueError(f"fixed_glu: activation {activation!r}; expected {' or '.join(GLU_ENDS)}")
    if not glu_fits(words.shape[2]):
        raise ValueError(f"fixed_glu: {words.shape[2]} rows; expected twice a multiple of {GROUP}")
    if not use_triton(x):
        gate, value = reference(x, words, halves, block_type, squares, eps).chunk(2, dim=-1)
        return fixed_point.quantize(GATED[activation](gate, value), fixed_point.form(x)[0])
    return multiply(x, words, halves, block_type, counters, torch.float32, GLU_ENDS[activation], squares, eps, alone=alone)[0]


def glu_fits(n: int) -> bool:
    """`fixed_glu` takes a matrix of n rows."""
    return n % (2 * GROUP) == 0


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """Every distinct compilation that decoding of the model needs where all types are one, of any block type, for one token and for several
    of MOST_TOGETHER, and of one byte an activation for the usual ones. Every test run compiles one of a rare type's."""
    cases: dict[tuple, KernelCase] = {}
    integers = dict.fromkeys(("n", "k"), "i32")
    types = {"x": "*i32", "words": "*i32", "counters": "*i32", "splits": "i32", **integers}
    types |= dict.fromkeys(("partials", "squares", "squares_out"), "*fp32")
    for block_type in LAYOUTS:
        usual = block_type in USUAL_TYPES
        of_rows: list[KernelCase] = []
        for m in model.matrices():
            n, k, normed, gated = m.n, m.k, m.normed, m.end == "glu"
            end = GLU_ENDS[model.activation] if gated else "sum" if m.end == "squares" else m.end
            forms: list[tuple] = [(1, 2), (1, 1), (2, 2), (4, 2), (8, 2), (8, 1), (4, 2, "rows apart")] if usual else [(1, 2), (4, 2)]
            if LAYOUTS[block_type].block == WIDE:
                forms += [(1, 2, "by 32"), (4, 2, "by 32")] + [(8, 2, "by 32")] * usual
            if any(block_type in some for some in FLOATS_ALONE.values()):
                forms.append((1, 2, "alone"))
            for tokens, terms, *other in forms:
                extent = GROUP if "by 32" in other else extent_of(k)
                launched, _, warps, fn = launch_any(block_type, tokens, n, k, target, extent, gated, "rows apart" not in other,
                                                         "alone" in other)
                constants = format_constants(block_type) | launched | {"stride": n, "halves_stride": n, "TERMS": terms, "END": end,
                                                                  "EXTENT": extent, "OUT": extent_of(n // 2) if gated else GROUP,
                                                                  "SQUARES": m.end == "squares",
                                                                  "EPS": EPS if normed else 0.0}
                constants |= root_constants(torch.empty(k // PIECE) if normed else None)
                options = {"num_warps": warps, "maxnreg": constants["REGISTERS"]}
                out = {"halves": halves_pointer(block_type), "out": "*i32" if gated else "*fp32"}
                together = (f", {tokens} tokens" if tokens > 1 else "") + "".join(f", {form}" for form in other)
                targets = usual_targets(block_type, first=gated) if terms > 1 or gated else ()
                if tokens > 1 or other:  # the compiler's time: one of each end at the most tokens, of one type, the others at night
                    first = block_type == USUAL_TYPES[0] and terms == 2 and (tokens == MOST_TOGETHER or other) and (fn, end) not in {
                        (c.fn, c.constexprs.get("END")) for c in of_rows}  # fmt: skip
                    targets = RARE_TARGETS if first else ()
                case = KernelCase(f"gemv {block_type} {n}x{k} {terms} bytes, {end}{together}", fn, types | out, constants, options, targets,
                                  tuple(integers))
                of_rows += [case] if targets and (tokens > 1 or other) else []
                cases.setdefault((fn, *sorted((key, str(value)) for key, value in constants.items())), case)
    constants = {"TERMS": 2, "EXTENT": WIDE, "BLOCK": FIXED_BLOCK, "EARLY": early(target)}
    types = {"x": "*bf16", "out": "*i32", "n": "i32"}
    return [*cases.values(), KernelCase("fix bf16", kiln_fix, types, constants, {"num_warps": FIXED_WARPS}, aligned=("n",))]
