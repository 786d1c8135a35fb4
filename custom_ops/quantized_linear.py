"""Linear layer whose weight stays in its GGUF block format: `x @ dequantize(words, halves)`.

A few tokens: GEMV straight from the packed weight, K split over enough programs to fill the card, the partial sums added in a fixed order.
More tokens, or a number only known at run time: dequantize a chunk of rows into scratch, then a dense matmul.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch.library import triton_op

from custom_ops.launch import kernel, use_triton
from custom_ops.layouts import LAYOUTS, dequantize
from custom_ops.quantized_kernels import dequantize_rows, gemv, sum_partials
from custom_ops.registry import KernelCase
from custom_ops.target import MIB, GpuTarget, current_target

MAX_GEMV_TOKENS = 8  # beyond, reading the weight once for all tokens pays for the scratch
MAX_SCRATCH_BYTES = 256 * MIB  # of dequantized weight; a larger matrix is done in chunks along N
MAX_SPLITS = 64


@dataclass(frozen=True)
class GemvConfig:
    """How the GEMV is spread over one architecture."""

    rows: int = 128  # of a program of one warp, four to a lane: one 16-byte load for each word
    wide_rows: int = 256  # of a program where N is at least wide_n: each value of x serves eight rows
    wide_n: int = 8192
    programs_per_sm: int = 40
    stages: int = 1  # above 1: loads run ahead through shared memory


GEMV_CONFIGS: dict[int, GemvConfig] = {}  # by architecture; the others take the default
# Groups of 32 elements a lane takes at a time: enough loads in flight, and registers for them on every architecture.
GEMV_GROUPS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 4, "Q5_1": 4, "Q8_0": 2, "Q4_K": 1, "Q5_K": 1, "Q6_K": 2}
DEQUANTIZE_ROWS = 256  # of a program of one warp: eight to a lane, 16-byte stores in bfloat16
SUM_ROWS = 64
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
MINIMUM = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def format_constants(kind: str) -> dict[str, int | bool]:
    """The constants of a block format that every kernel over packed weights takes."""
    layout = LAYOUTS[kind]
    return {"BITS": BITS[kind], "BLOCK": layout.block, "MINIMUM": kind in MINIMUM, "WORDS": layout.words, "HALVES": layout.halves}


def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, kind: str) -> torch.Tensor:
    """The op in plain torch; arguments as `quantized_linear`."""
    return (x.float() @ dequantize(kind, words, halves)).to(x.dtype)


def check_weight(op: str, words: torch.Tensor, halves: torch.Tensor, kind: str) -> None:
    """ValueError unless words and halves are a packed matrix of this block type, or a slice of one along N."""
    if kind not in LAYOUTS:
        raise ValueError(f"{op}: no packed layout for block type {kind}; known: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    if words.dtype != torch.int32 or halves.dtype != torch.float16 or words.dim() != 3:
        raise ValueError(f"{op}: words is {words.dtype} {tuple(words.shape)}, halves {halves.dtype}; expected int32 [G, W, N] and float16")
    blocks, _, rows = words.shape
    if words.shape[1] != layout.words or halves.shape != (blocks, layout.halves, rows):
        expected = f"[G, {layout.words}, N] and [G, {layout.halves}, N]"
        raise ValueError(f"{op}: {kind} words {tuple(words.shape)} and halves {tuple(halves.shape)}; expected {expected}")
    for name, tensor in (("words", words), ("halves", halves)):
        if tensor.stride(2) != 1 or tensor.stride(0) != tensor.shape[1] * tensor.stride(1):
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; expected a contiguous tensor or a slice of one along N")


def gemv_launch(kind: str, tokens: int, n: int, k: int, target: GpuTarget) -> tuple[dict[str, int], int]:
    """(constants of `gemv` beside the format's, number of splits of K)."""
    config = GEMV_CONFIGS.get(target.sm, GemvConfig())
    rows = config.wide_rows if n >= config.wide_n else config.rows
    groups = math.gcd(GEMV_GROUPS[kind], k // 32)
    steps = k // (32 * groups)
    wanted = config.programs_per_sm * target.sm_count / (triton.cdiv(n, rows) * tokens)
    divisors = [d for d in range(1, min(steps, MAX_SPLITS) + 1) if steps % d == 0]  # equal shares: no program waits for another's last step
    splits = min(divisors, key=lambda d: max(d / wanted, wanted / d))
    return {"GROUPS": groups, "STAGES": config.stages, "ROWS": rows, "EVEN": n % rows == 0}, splits


def gemv_partials(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [splits, T, N] whose sum over splits is the product; x [T, K] contiguous, T small."""
    (tokens, k), n = x.shape, words.shape[2]
    constants, splits = gemv_launch(kind, tokens, n, k, current_target())
    partials = torch.empty((splits, tokens, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, constants["ROWS"]), splits, tokens)
    kernel(gemv)[grid](x, words, halves, partials, n, k, splits, words.stride(1), halves.stride(1), **format_constants(kind), **constants,
                       num_warps=1)
    return partials


def sum_splits(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 [splits, T, N] -> [T, N] in dtype, summed in a fixed order."""
    splits, tokens, n = partials.shape
    out = torch.empty((tokens, n), dtype=dtype, device=partials.device)
    grid = (triton.cdiv(tokens * n, SUM_ROWS),)
    kernel(sum_partials)[grid](partials, out, tokens * n, splits, SPLITS=triton.next_power_of_2(splits), ROWS=SUM_ROWS, num_warps=4)
    return out


def chunk_rows(n: int, k: int, itemsize: int) -> int:
    """Rows of the equal chunks, a multiple of DEQUANTIZE_ROWS, in which a matrix [n, k] goes through MAX_SCRATCH_BYTES of scratch."""
    most = max(MAX_SCRATCH_BYTES // (k * itemsize) // DEQUANTIZE_ROWS, 1) * DEQUANTIZE_ROWS
    chunks = triton.cdiv(n, most)
    return triton.cdiv(triton.cdiv(n, chunks), DEQUANTIZE_ROWS) * DEQUANTIZE_ROWS


def dequantize_launch(kind: str, n: int) -> dict[str, int | bool]:
    """Constants of `dequantize_rows` beside the format's, for a whole matrix of n rows."""
    return {"GATHER": False, "GROUPS": min(LAYOUTS[kind].block // 32, 2), "ROWS": DEQUANTIZE_ROWS, "EVEN": n % DEQUANTIZE_ROWS == 0}


def dequantized(words: torch.Tensor, halves: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The matrix transposed, [K, N] in dtype, as `layouts.dequantize` rounded to dtype."""
    n, k = words.shape[2], words.shape[0] * LAYOUTS[kind].block
    out = torch.empty((k, n), dtype=dtype, device=words.device)
    constants = dequantize_launch(kind, n)
    grid = (triton.cdiv(n, constants["ROWS"]), k // 32 // constants["GROUPS"])
    kernel(dequantize_rows)[grid](words, halves, words, out, n, k, words.stride(1), halves.stride(1), **format_constants(kind), **constants,
                                  num_warps=1)
    return out


@triton_op("kiln::quantized_linear", mutates_args=())
def quantized_linear(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, kind: str) -> torch.Tensor:
    """x [T, K] float32 or bfloat16, words int32 [G, W, N], halves float16 [G, H, N] -> [T, N] in x's dtype, accumulated in float32.

    The weight is the packed matrix [N, K] of block type `kind` (see `layouts`), or a slice of it along N.
    Raises ValueError when a shape or dtype does not fit.
    """
    check_weight("quantized_linear", words, halves, kind)
    k = words.shape[0] * LAYOUTS[kind].block
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"quantized_linear: x is {x.dtype} {tuple(x.shape)}; expected float32 or bfloat16 [T, {k}]")
    if not use_triton(x):
        return reference(x, words, halves, kind)
    x = x.contiguous()
    if isinstance(x.shape[0], int) and x.shape[0] <= MAX_GEMV_TOKENS:
        return sum_splits(gemv_partials(x, words, halves, kind), x.dtype)
    n = words.shape[2]
    step = chunk_rows(n, k, x.element_size())
    # float32: torch.mm is exact float32 unless the process allows TF32, which neither the exporter nor the runner does
    parts = [torch.mm(x, dequantized(words[:, :, i : i + step], halves[:, :, i : i + step], kind, x.dtype)) for i in range(0, n, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def bytes_moved(kind: str, tokens: int, n: int, k: int, itemsize: int = 2) -> int:
    """Bytes that must cross memory once: the packed weight, x [tokens, k] and the result [tokens, n], `itemsize` bytes an activation."""
    layout = LAYOUTS[kind]
    return n * (k // layout.block) * layout.block_bytes + tokens * (n + k) * itemsize


def flops(tokens: int, n: int, k: int) -> int:
    """Floating-point operations of the product: an addition and a multiplication for each weight and token."""
    return 2 * tokens * n * k


USUAL_KINDS = ("Q4_K", "Q6_K")  # cases for every architecture; of the other block types for two, for the compiler's time
USUAL_TARGETS = (90, 120)
# The matrices (N, K) of the 31B: qkv, qk, attention output, gate and up, down, head.
_SHAPES = ((16384, 5376), (18432, 5376), (5376, 8192), (5376, 16384), (43008, 5376), (5376, 21504), (262144, 5376))
_PACKED = {"words": "*i32", "halves": "*fp16"}
_INTEGERS = {"n": "i32", "k": "i32", "stride": "i32", "halves_stride": "i32"}


def kernel_cases(target: GpuTarget) -> list[KernelCase]:
    """Every distinct compilation that bfloat16 decoding and prefill of the 31B need, of any block type."""
    cases: dict[tuple, KernelCase] = {}
    gemv_types = {"x": "*bf16", **_PACKED, "partials": "*fp32", "splits": "i32", **_INTEGERS}
    sum_types = {"partials": "*fp32", "out": "*bf16", "n": "i32", "splits": "i32"}
    dequantize_types = {**_PACKED, "ids": "*i32", "out": "*bf16", **_INTEGERS}
    for kind in LAYOUTS:
        targets = None if kind in USUAL_KINDS else USUAL_TARGETS
        for n, k in _SHAPES:
            launch, splits = gemv_launch(kind, 1, n, k, target)
            constants = format_constants(kind) | launch
            sum_constants = {"SPLITS": triton.next_power_of_2(splits), "ROWS": SUM_ROWS}
            rows = chunk_rows(n, k, 2)
            dense = format_constants(kind) | dequantize_launch(kind, rows)
            for case in (
                KernelCase(f"gemv {kind} {n}x{k}", gemv, gemv_types, constants, {"num_warps": 1}, targets, tuple(_INTEGERS)),
                KernelCase(f"sum_partials {splits} splits", sum_partials, sum_types, sum_constants, {"num_warps": 4}, None, ("n",)),
                KernelCase(f"dequantize_rows {kind} {rows}x{k}", dequantize_rows, dequantize_types, dense, {"num_warps": 1}, targets,
                           tuple(_INTEGERS)),
            ):
                cases.setdefault((case.fn.__name__, *sorted(case.constexprs.items())), case)
    return list(cases.values())
