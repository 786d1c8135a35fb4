"""What goes into a pass and what comes out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch.export import ExportedProgram

from custom_ops.geometry import RESIDUAL


@dataclass(frozen=True)
class PassOptions:
    """What the passes may be told. Sizes in bytes."""

    turboquant: bool = False
    residual_length: int = RESIDUAL  # with TurboQuant: the newest keys and values of a global layer that are read exactly, not in code
    kv_len: bool = True
    materialized_head_budget: int = 256 << 20  # largest dequantized piece of the head, on targets that materialize it
    materializes_head: bool = True  # the CPU target; CUDA kernels read the packed head in place
    decode_bytes: int = 0  # of an activation of a decode product, in fixed point; 0: as they are, nothing fused (the CPU target)
    matmul: str = "blas"  # of a prefill's products on a GPU: "kiln" (our kernels), "blas", or "auto", which was measured to be better


@dataclass(frozen=True)
class KVBuffer:
    """One cache the runner makes at load."""

    name: str
    layer: int
    kind: str  # "ring" | "global"
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class PassReport:
    """What one pass did to one graph."""

    name: str
    status: str  # "applied" | "off" | "not needed"
    matches: int = 0
    note: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Lowered:
    """A graph after the pipeline."""

    program: ExportedProgram
    reports: list[PassReport] = field(default_factory=list)
    kv: list[KVBuffer] = field(default_factory=list)
