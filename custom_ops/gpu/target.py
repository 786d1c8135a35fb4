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
    table = tomllib.loads(files("kiln.configs").joinpath("gpus.toml").read_text())
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
    properties = torch.cuda.get_device_properties()
    known = gpu_targets().get(f"sm_{properties.major}{properties.minor}")
    return known or GpuTarget(
        sm=10 * properties.major + properties.minor,
        name=properties.name,
        sm_count=properties.multi_processor_count,
        max_threads_per_sm=properties.max_threads_per_multi_processor,
        smem_optin=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # it has
        smem_per_sm=properties.shared_memory_per_multiprocessor,
        l2=properties.L2_cache_size,
        memory=properties.total_memory,
    )


def current_target() -> GpuTarget:
    """The target being compiled for, else the GPU of this machine."""
    return _override[-1] if _override else _present()
