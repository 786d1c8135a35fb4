"""What goes into a pass and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.export import ExportedProgram

from kiln.custom_ops.geometry import EXACT_WINDOW


@dataclass(frozen=True)
class PassOptions:
    """What the passes may be told. Sizes in bytes."""

    turboquant: bool = False
    residual_length: int = EXACT_WINDOW  # with TurboQuant: the newest keys and values of a global layer that are read exactly, not in code
    key_center: bool = True  # with TurboQuant: keys are coded less the mean of their head's first ones
    kv_len: bool = True
    materialized_head_budget: int = 256 << 20  # largest dequantized piece of the head, on targets that materialize it
    materializes_head: bool = True  # the CPU target; CUDA kernels read the packed head in place
    decode_bytes: int = 0  # of an activation of a decode matmul, in fixed point; 0: as they are, nothing fused (the CPU target)
    decode_kernel: str = "graph"  # of a fused layer's matmuls: "chain" (one persistent kernel) or "graph" (a kernel for each)
    allow_unfused: bool = False  # a pass that misses a place that it should rewrite says so in its report; otherwise it is an error
    matmul: str = "blas"  # of matmuls on a GPU: "kiln" (our kernels) or "blas"
    reads_packed: bool = False  # the CPU target: the runner multiplies by packed weights where they lie
    decode_rows: tuple[int, ...] = (1,)  # M of each decode graph, ascending, the first 1: how many tokens one step takes
    rows: int = 1  # timelines whose caches lie side by side, of which the graphs of several tokens take any

    @property
    def spare_slots(self) -> int:
        """Of a ring, beyond its window w. A step of M tokens writes positions p .. p + M - 1 before its first attends to p - w + 1, which
        takes M - 1. A second may be queued behind it, up to p + 2M - 1, when the host keeps one token alone and goes on at p + 1, which
        attends to p + 2 - w: w + 2M - 2 slots keep that.
        """
        return 2 * (self.decode_rows[-1] - 1)


@dataclass(frozen=True)
class KVBuffer:
    """One cache the runner makes at load."""

    name: str
    layer: int
    kind: str  # a value of KINDS
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# The last word of a buffer's name -> its kind: "ring", a slot for each of the newest positions; "global", one for each position; "state",
# which a step replaces and nothing brings back; "prefix", which rests on the first positions alone and does not change after them.
KINDS = {"ring": "ring", "exact": "ring", "cache": "global", "codes": "global", "scales": "global", "state": "state", "center": "prefix"}


def buffer(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> KVBuffer:
    """The cache `blk.LAYER.cache.NAME`; its name says of which layer it is, and of what kind. KeyError for another."""
    return KVBuffer(name, int(name.split(".")[1]), KINDS[name.rpartition("_")[2]], dtype, shape)


# Of one graph: pass -> the places of the model that it rewrites -> what may keep it from one, as "its weight is F16", or "".
Expected = dict[str, dict[str, str]]


UNFUSED = "--allow-unfused exports the model as it is, slower"  # where a place was missed


def first_of(places: Sequence[str]) -> str:
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")


@dataclass
class PassReport:
    """What one pass did to one graph. A place is a part of the model by its name, as `blk.3.attention`; `expected` ones are the model's."""

    name: str
    status: str  # "applied" | "off" | "not needed"
    places: tuple[str, ...] = ()  # that were rewritten
    note: str = ""
    expected: int = 0
    missed: tuple[str, ...] = ()  # places that were expected and not rewritten, with what may be the reason

    @property
    def matches(self) -> int:
        return len(self.places)

    @property
    def shortfall(self) -> str:
        """One line where a place was missed, else ""."""
        counted = f"pass {self.name} rewrote {self.expected - len(self.missed)} of {self.expected} places"
        return self.missed and f"{counted}; not {first_of(self.missed)}" or ""

    def to_dict(self) -> dict:
        return {"name": self.name, "status": self.status, "expected": self.expected, "matches": self.matches, "missed": list(self.missed),
                "note": self.note}  # fmt: skip


@dataclass
class Lowered:
    """A graph after the pipeline."""

    program: ExportedProgram
    reports: list[PassReport] = field(default_factory=list)
    kv: list[KVBuffer] = field(default_factory=list)
