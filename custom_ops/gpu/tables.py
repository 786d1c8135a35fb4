"""Kernel configurations by architecture: tables beside their kernels, entries found by `make tune` on a GPU and checked in.

An architecture without an entry takes that of the nearest. A table's keys are (architecture, largest head
dimension or other size), or architectures.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TypeVar

from kiln.custom_ops.gpu.target import GpuTarget, gpu_targets

T = TypeVar("T")

# Module and name of every table whose gaps the nearest architecture fills.
TABLES = (
    ("weights.gemv", "GEMV_CONFIGS"),
    ("weights.gemv", "ROWS_CONFIGS"),
    ("weights.gemv", "SUMS_CONFIGS"),
    ("weights.gemv", "FLOATS_ALONE"),
    ("weights.matmul", "TILES"),
    ("attention.flash", "DECODE_TILES"),
    ("attention.flash", "PREFILL_TILES"),
    ("attention.sliding_cut", "SLIDING_TILES"),
    ("tq4.attention", "DECODE_TILES"),
    ("tq4.prefill", "PIECE_TILES"),
)


def nearest(architectures: Iterable[int], target: GpuTarget) -> int:
    """The architecture whose entry the target takes: its own, else the nearest older one, else the nearest newer one.

    An architecture with more shared memory than the target comes last: its tiles may not fit.
    """

    def order(sm: int) -> tuple[bool, bool, int]:
        return gpu_targets()[f"sm_{sm}"].smem_optin > target.smem_optin, sm > target.sm, abs(sm - target.sm)

    return min(architectures, key=order)


def pick(table: dict[tuple[int, int], T], target: GpuTarget, dim: int) -> T:
    """The table's entry for the smallest head dimension that holds `dim`, of the nearest architecture; ValueError where there is none."""
    size = min((d for _, d in table if d >= dim), default=0)
    if not size:
        raise ValueError(f"no kernel configuration for head dimension {dim}; the largest is {max(d for _, d in table)}")
    return table[nearest((sm for sm, d in table if d == size), target), size]


def _table(module: str, name: str) -> dict:
    return getattr(importlib.import_module(f"kiln.custom_ops.{module}"), name)


def lacking(needed: dict[str, set[int]]) -> list[str]:
    """Tables without an entry for a head dimension of `needed`, table (as `attention.flash.DECODE_TILES`) -> dimensions."""
    found = []
    for path, dims in sorted(needed.items()):
        module, _, name = path.rpartition(".")
        if (module, name) not in TABLES:
            raise ValueError(f"{path} is not among the tables")
        found += [f"{path} [{dim}]" for dim in sorted(dims) if not any(size >= dim for _, size in _table(module, name))]
    return found


def borrowed(target: GpuTarget) -> dict[int, list[str]]:
    """What the target takes from other architectures: architecture -> names of tables, as `attention.flash.DECODE_TILES [256]`."""
    found: dict[int, list[str]] = {}
    for module, name in TABLES:
        by_size: dict[str, list[int]] = {}
        for key in _table(module, name):
            sm, size = (key, "") if isinstance(key, int) else (key[0], f" [{key[1]}]")
            by_size.setdefault(size, []).append(sm)
        for size, architectures in by_size.items():
            if (taken := nearest(architectures, target)) != target.sm:
                found.setdefault(taken, []).append(f"{module}.{name}{size}")
    return found
