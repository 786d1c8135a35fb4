"""Linear layer whose weight stays in its GGUF block format: `x @ dequantize(words, halves)`.

A few tokens: the GEMV straight from the packed weight (`gemv`). More tokens, or a number only known at run time: dequantize a chunk of
rows into scratch, then a dense matmul.
"""

from __future__ import annotations

import torch
import triton

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import MIB, GpuTarget
from kiln.custom_ops.weights import matmul
from kiln.custom_ops.weights.block_types import LAYOUTS, usual_targets
from kiln.custom_ops.weights.dequantize import kiln_dequantize
from kiln.custom_ops.weights.fixed_point import TERMS
from kiln.custom_ops.weights.gemv import COUNTERS, fix, multiply
from kiln.custom_ops.weights.layouts import dequantize
from kiln.custom_ops.weights.packed import check_weight, format_constants, halves_pointer

MAX_GEMV_TOKENS = 8  # beyond, reading the weight once for all tokens pays for the scratch
MAX_SCRATCH_BYTES = 256 * MIB  # of dequantized weight; a larger matrix is done in chunks along N
DEQUANTIZE_ROWS = 256  # of a program of one warp: eight to a lane, 16-byte stores in bfloat16


def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str) -> torch.Tensor:
    """The op in plain torch; arguments as `quantized_linear`."""
    return (x.float() @ dequantize(block_type, words, halves)).to(x.dtype)


def chunk_rows(n: int, k: int, itemsize: int) -> int:
    """Rows of the equal chunks, a multiple of DEQUANTIZE_ROWS, in which a matrix [n, k] goes through MAX_SCRATCH_BYTES of scratch."""
    most = max(MAX_SCRATCH_BYTES // (k * itemsize) // DEQUANTIZE_ROWS, 1) * DEQUANTIZE_ROWS
    chunks = triton.cdiv(n, most)
    return triton.cdiv(triton.cdiv(n, chunks), DEQUANTIZE_ROWS) * DEQUANTIZE_ROWS


def dequantize_launch(block_type: str, n: int) -> dict[str, int | bool]:
    """Constants of `kiln_dequantize` beside the format's, for a whole matrix of n rows."""
    return {"GATHER": False, "GROUPS": min(LAYOUTS[block_type].block // 32, 2), "ROWS": DEQUANTIZE_ROWS, "EVEN": n % DEQUANTIZE_ROWS == 0}


def dequantized(words: torch.Tensor, halves: torch.Tensor, block_type: str, dtype: torch.dtype, after: torch.Tensor) -> torch.Tensor:
    """The matrix transposed, [K, N] in dtype, as `layouts.dequantize` rounded to dtype.

    `after` is any tensor: the compiler cannot dequantize before it exists, so that not every matrix of a layer is dense at once.
    """
    n, k = words.shape[2], words.shape[0] * LAYOUTS[block_type].block
    out = torch.empty((k, n), dtype=dtype, device=words.device)
    constants = dequantize_launch(block_type, n)
    grid = (triton.cdiv(n, constants["ROWS"]), k // 32 // constants["GROUPS"])
    kernel(kiln_dequantize)[grid](words, halves, after, out, n, k, words.stride(1), halves.stride(1), **format_constants(block_type),
                                  **constants, num_warps=1)
    return out


@kernel_op("kiln::quantized_linear", mutates_args=())
def quantized_linear(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str) -> torch.Tensor:
    """x [T, K] float32 or bfloat16, words int32 [G, W, N], halves float16 [G, H, N] -> [T, N] in x's dtype, accumulated in float32.

    The weight is the packed matrix [N, K] of block type `block_type` (see `layouts`), or a slice of it along N.
    Raises ValueError when a shape or dtype does not fit.
    """
    check_weight("quantized_linear", words, halves, block_type)
    k = words.shape[0] * LAYOUTS[block_type].block
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"quantized_linear: x is {x.dtype} {tuple(x.shape)}; expected float32 or bfloat16 [T, {k}]")
    if not use_triton(x):
        return reference(x, words, halves, block_type)
    x = x.contiguous()
    if isinstance(x.shape[0], int) and x.shape[0] <= MAX_GEMV_TOKENS:
        counters = torch.zeros(COUNTERS * x.shape[0], dtype=torch.int32, device=x.device)
        return multiply(fix(x, TERMS[x.dtype]), words, halves, block_type, counters, x.dtype)[0]
    n = words.shape[2]
    step = chunk_rows(n, k, x.element_size())
    if matmul.own(x):
        out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
        for i in range(0, n, step):
            part = words[:, :, i : i + step], halves[:, :, i : i + step]
            matmul.multiply_into(x, dequantized(*part, block_type, x.dtype, out if i else x), out, i)
        return out
    # float32: torch.mm is exact float32 unless the process allows TF32, which neither the exporter nor the runner does
    parts: list[torch.Tensor] = []
    for i in range(0, n, step):
        dense = dequantized(words[:, :, i : i + step], halves[:, :, i : i + step], block_type, x.dtype, parts[-1] if parts else x)
        parts.append(torch.mm(x, dense))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@torch.library.custom_op("kiln::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str) -> torch.Tensor:
    """`quantized_linear` of float32 on the CPU as one call of the runner's: no dense weight is written to memory.

    x [T, K] float32, words and halves as there -> [T, N] float32. ValueError when a shape or dtype does not fit.
    """
    check_weight("packed_linear", words, halves, block_type)
    k = words.shape[0] * LAYOUTS[block_type].block
    if x.dim() != 2 or x.shape[1] != k or x.dtype != torch.float32:
        raise ValueError(f"packed_linear: x is {x.dtype} {tuple(x.shape)}; expected float32 [T, {k}]")
    return reference(x, words, halves, block_type)


@packed_linear.register_fake
def _(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], words.shape[2]))


def bytes_moved(block_type: str, tokens: int, n: int, k: int, itemsize: int = 2) -> int:
    """Bytes that must cross memory once: the packed weight, x [tokens, k] and the result [tokens, n], `itemsize` bytes an activation."""
    layout = LAYOUTS[block_type]
    return n * (k // layout.block) * layout.block_bytes + tokens * (n + k) * itemsize


def flops(tokens: int, n: int, k: int) -> int:
    """Floating-point operations of the matmul: an addition and a multiplication for each weight and token."""
    return 2 * tokens * n * k


_INTEGERS = {"n": "i32", "k": "i32", "stride": "i32", "halves_stride": "i32"}


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """Every distinct compilation that bfloat16 decoding and prefill of the model need, of any block type; every test run compiles one of a
    rare type's."""
    cases: dict[tuple, KernelCase] = {}
    dequantize_types = {"words": "*i32", "ids": "*bf16", "out": "*bf16", **_INTEGERS}
    for block_type in LAYOUTS:
        types = dequantize_types | {"halves": halves_pointer(block_type)}
        for number, m in enumerate(model.matrices()):
            k, rows = m.k, chunk_rows(m.n, m.k, 2)
            dense = format_constants(block_type) | dequantize_launch(block_type, rows)
            case = KernelCase(f"kiln_dequantize {block_type} {rows}x{k}", kiln_dequantize, types, dense, {"num_warps": 1},
                              usual_targets(block_type, first=not number), tuple(_INTEGERS))
            cases.setdefault((case.fn.__name__, *sorted(case.constexprs.items())), case)
    return list(cases.values())
