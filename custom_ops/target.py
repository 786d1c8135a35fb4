"""The GPU that kernels are being compiled or launched for: `configs/gpus.toml` as records, and which one is current."""

from __future__ import annotations

import contextlib
import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

import torch

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class GpuTarget:
    """One GPU architecture, represented by one card. Sizes in bytes."""

    sm: int  # compute capability, 90 for 9.0
    name: str
    sm_count: int
    max_threads_per_sm: int
    smem_optin: int  # shared memory per block
    smem_per_sm: int
    l2: int
    memory: int

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.sm, 10)


@functools.cache
def gpu_targets() -> dict[str, GpuTarget]:
    """Every known target by name (`sm_90`)."""
    table = tomllib.loads(files("configs").joinpath("gpus.toml").read_text())
    return {
        name: GpuTarget(
            sm=int(name.removeprefix("sm_")),
            name=row["name"],
            sm_count=row["sm_count"],
            max_threads_per_sm=row["max_threads_per_sm"],
            smem_optin=row["smem_optin_kib"] * KIB,
            smem_per_sm=row["smem_per_sm_kib"] * KIB,
            l2=row["l2_mib"] * MIB,
            memory=row["memory_gib"] * GIB,
        )
        for name, row in table.items()
    }


_override: list[GpuTarget] = []


@contextlib.contextmanager
def compiling_for(target: GpuTarget) -> Iterator[None]:
    """Inside, kernels take their configuration for `target`, present or not."""
    _override.append(target)
    try:
        yield
    finally:
        _override.pop()


@functools.cache
def _present() -> GpuTarget:
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    targets = gpu_targets()
    if name in targets:
        return targets[name]
    return min(targets.values(), key=lambda t: abs(t.sm - (10 * major + minor)))  # the nearest architecture's configurations


def current_target() -> GpuTarget:
    """The target being compiled for, else the GPU of this machine."""
    return _override[-1] if _override else _present()
