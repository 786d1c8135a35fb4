"""Dense matmul of a chunk of tokens with a float matrix: what prefill multiplies dequantized pieces and float weights by.

Compiled into the package, so that it needs no library; `choosing` says whether it or torch.mm (cuBLAS) is used, in one place for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.tables import nearest
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights.matmul_kernels import kiln_matmul, kiln_matmul_tma

CHOICES = ("kiln", "blas")


@dataclass(frozen=True)
class MatmulTile:
    """How the matmul is cut: a tile of the result, the piece of K loaded at a time, and how programs take tiles."""

    rows: int = 128
    columns: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8  # rows of tiles taken together, column by column
    tma: bool = False  # by tensor descriptors, one program for each multiprocessor
    halves: bool = False  # a tile is written in two halves, through half the shared memory
    specialize: bool = False  # one warp group loads, two multiply
    span: int = 0  # without tma, a multiple of `inner`: K is added up in spans of so many and those in turn; 0: all in one
    few: tuple[int, int, int, int] = (0, 0, 0, 0)  # rows, columns, inner and stages of the tiles of no more than `rows` tokens; 0: the same

    def __post_init__(self) -> None:
        if self.specialize and (self.halves or any(self.few)) or (not self.tma and (self.specialize or self.halves or any(self.few))):
            raise ValueError(f"{self}: halves, specialize and few go with tma, and specialize with neither of the others")


# By architecture, see `tables`; bfloat16. Measured on sm_90, elsewhere what fits.
TILES = {
    80: MatmulTile(rows=128, columns=128, inner=32, warps=4, stages=4),
    86: MatmulTile(rows=128, columns=128, inner=32, warps=4, stages=3),
    90: MatmulTile(rows=128, columns=256, inner=64, warps=8, stages=3, tma=True, few=(64, 64, 128, 6)),
    100: MatmulTile(rows=128, columns=256, inner=64, warps=8, stages=3, tma=True),
}
UNALIGNED = MatmulTile(rows=64, columns=64, inner=32, warps=4, stages=3)  # sizes or strides that no descriptor and no wide load takes
FLOAT32 = MatmulTile(rows=64, columns=64, inner=16, warps=8, stages=3, span=512)  # float32 matmuls run on the CUDA cores, out of registers
ALIGNED = 16  # bytes

_choice = ["blas"]


@contextlib.contextmanager
def choosing(choice: str) -> Iterator[None]:
    """Inside, matmuls are by our kernels ("kiln") or by torch.mm ("blas")."""
    if choice not in CHOICES:
        raise ValueError(f"matmul is {choice!r}; expected one of {', '.join(CHOICES)}")
    _choice.append(choice)
    try:
        yield
    finally:
        _choice.pop()


def own(x: torch.Tensor) -> bool:
    """Whether matmuls with x are by our kernels."""
    return use_triton(x) and _choice[-1] == "kiln"


def table_tile(dtype: torch.dtype, target: GpuTarget) -> MatmulTile:
    return FLOAT32 if dtype == torch.float32 else TILES[nearest(TILES, target)]


def fitting_tile(dtype: torch.dtype, n: int, k: int, columns: int, transposed: bool, target: GpuTarget) -> MatmulTile:
    """The table's tile, or UNALIGNED where a row of x, w or out is no multiple of ALIGNED bytes."""
    strides = (k, columns) if transposed else (k, n, columns)
    unaligned = dtype != torch.float32 and any(stride * dtype.itemsize % ALIGNED for stride in strides)
    return UNALIGNED if unaligned else table_tile(dtype, target)


def constants(tile: MatmulTile, n: int, k: int, columns: int, transposed: bool) -> dict[str, int | bool]:
    """Of the kernel that takes this tile."""
    shared = {"N": n, "K": k, "COLUMNS": columns, "TRANSPOSED": transposed, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns,
              "BLOCK_K": tile.inner, "GROUP": tile.group}  # fmt: skip
    if not tile.tma:
        return shared | {"SPAN": tile.span}
    few = dict(zip(("FEW_M", "FEW_N", "FEW_K", "FEW_STAGES"), tile.few, strict=True))
    return shared | few | {"STAGES": tile.stages, "HALVES": tile.halves, "SPECIALIZE": tile.specialize}


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where programs make their tensor descriptors; the current stream is the launch's."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch_warps(tile: MatmulTile) -> int:
    return 4 if tile.specialize else tile.warps  # of which the compiler makes three groups


def multiply_into(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, first: int = 0, transposed: bool = False,
                  tile: MatmulTile | None = None) -> None:
    """out[:, first : first + N] = x [T, K] @ w, all contiguous and of one dtype; w [K, N], or [N, K] if transposed."""
    n, k = w.shape if transposed else (w.shape[1], w.shape[0])
    columns, target = out.shape[1], current_target()
    tile = tile or fitting_tile(x.dtype, n, k, columns, transposed, target)
    options = {"num_warps": launch_warps(tile), "num_stages": tile.stages}
    fixed = constants(tile, n, k, columns, transposed)
    if tile.tma:
        triton.set_allocator(_scratch)  # for a direct launch; a package reserves it itself
        kernel(kiln_matmul_tma)[(target.sm_count,)](x, w, out, x.shape[0], first, **fixed, **options)
    else:
        grid = (triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(n, tile.columns),)
        kernel(kiln_matmul)[grid](x, w, out, x.shape[0], first, **fixed, **options)


@kernel_op("kiln::matmul", mutates_args=())
def matmul(x: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
    """x [T, K] and w [K, N], or [N, K] if transposed, both float32 or both bfloat16 -> [T, N], accumulated in float32.

    Raises ValueError when a shape or dtype does not fit.
    """
    inner = 1 if transposed else 0
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[inner] or x.dtype != w.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        expected = f"float32 or bfloat16 [T, {w.shape[inner]}]" if w.dim() == 2 else "two matrices"
        raise ValueError(f"matmul: x is {x.dtype} {tuple(x.shape)}, w {w.dtype} {tuple(w.shape)}; expected {expected}, both of one dtype")
    n = w.shape[1 - inner]
    if not own(x):
        return torch.mm(x, w.T if transposed else w)
    x, w = x.contiguous(), w.contiguous()
    if isinstance(x.shape[0], int) and x.shape[0] == 1 and transposed:  # reads w once; a tile would be one row of many
        return (x.float() * w.float()).sum(1, dtype=torch.float32).to(x.dtype)[None]
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    multiply_into(x, w, out, 0, transposed)
    return out


def bytes_moved(tokens: int, n: int, k: int, itemsize: int = 2) -> int:
    """Bytes that must cross memory once."""
    return itemsize * (tokens * (n + k) + n * k)


def flops(tokens: int, n: int, k: int) -> int:
    return 2 * tokens * n * k


_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """A piece of the model, a float weight, and sizes that nothing divides; one size stands for all, which are but constants."""
    d = model.hidden
    sizes = [(dtype, *size) for dtype in _TYPES for size in ((d, model.ffn, False), (d, d, True), (300, 100, False))]
    cases = []
    for dtype, n, k, transposed in sizes:
        tile, block_type = fitting_tile(dtype, n, k, n, transposed, target), _TYPES[dtype]
        types = {"x": f"*{block_type}", "w": f"*{block_type}", "out": f"*{block_type}", "tokens": "i32", "first": "i32"}
        fn = kiln_matmul_tma if tile.tma else kiln_matmul
        options = {"num_warps": launch_warps(tile), "num_stages": tile.stages}
        name, fixed = f"matmul {block_type} {n}x{k}{' transposed' * transposed}", constants(tile, n, k, n, transposed)
        cases.append(KernelCase(name, fn, types, fixed, options, aligned=("first",)))
    return cases
