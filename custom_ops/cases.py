"""The Triton kernels of every op at the shapes that matter, so that a test can compile each for each architecture without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from custom_ops.gpu.target import GpuTarget

MODULES = (
    "weights.gemv",
    "step.add_norm",
    "attention.prepare",
    "weights.linear",
    "weights.matmul",
    "weights.embedding",
    "step.sample",
    "attention.sliding_attention",
    "attention.sliding_decode",
    "attention.global_attention",
    "tq4.codec",
    "tq4.attention",
    "tq4.decode",
)


@dataclass(frozen=True)
class KernelCase:
    """One compilation of one kernel: what the launch in the op's body would compile."""

    name: str  # kernel, block type or dtype, shape
    fn: Any  # the triton.jit function
    signature: dict[str, str]  # run-time arguments: name -> Triton type, as "*bf16" or "i32"
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages, maxnreg
    targets: tuple[int, ...] | None = None  # architectures it is for; None: all
    aligned: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are


def all_cases(target: GpuTarget) -> list[KernelCase]:
    """The cases of every op for this target; a module's `kernel_cases(target)` lists its own, at the shapes of the 31B in bfloat16."""
    cases: list[KernelCase] = []
    for name in MODULES:
        module = importlib.import_module(f"custom_ops.{name}")
        if hasattr(module, "kernel_cases"):
            cases += [case for case in module.kernel_cases(target) if case.targets is None or target.sm in case.targets]
    return cases
