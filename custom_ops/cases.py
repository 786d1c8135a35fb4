"""The Triton kernels of every op at the shapes of the `MEASURED` models, for tests to compile for each architecture without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from kiln.custom_ops.geometry import MEASURED, QWEN3_8B
from kiln.custom_ops.gpu.target import GpuTarget

MODULES = (
    "weights.gemv",
    "chain.chain",
    "step.add_norm",
    "step.gate",
    "attention.prepare",
    "weights.linear",
    "weights.matmul",
    "weights.embedding",
    "delta.step",
    "delta.decode",
    "delta.chunk",
    "experts.route",
    "experts.router",
    "experts.linear",
    "experts.decode",
    "experts.branches",
    "weights.pack_kernel",
    "step.sample",
    "attention.sliding_attention",
    "attention.sliding_decode",
    "attention.sliding_rows",
    "attention.sliding_together",
    "attention.global_attention",
    "tq4.codec",
    "tq4.attention",
    "tq4.decode",
    "tq4.decode_rows",
)


SECOND_TARGETS = (90, 120)  # for which every test run compiles attention at the shapes of the second model


@dataclass(frozen=True)
class KernelCase:
    """One compilation of one kernel: what the launch in the op's body would compile."""

    name: str  # kernel, block type or dtype, shape
    fn: Any  # the triton.jit function
    signature: dict[str, str]  # run-time arguments: name -> Triton type, as "*bf16" or "i32"
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages, maxnreg
    targets: tuple[int, ...] | None = None  # architectures that every test run compiles it for; None: all
    aligned: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are


def all_cases(target: GpuTarget, every: bool = False) -> list[KernelCase]:
    """The distinct cases of every op for this target; a module's `kernel_cases(target, model)` lists its own.

    Without `every`, which is for `make nightly`: 16 bits alone, rare block types for one architecture, and of the 12B and Qwen3-8B
    attention alone, for two and for one.
    """
    cases: dict[tuple, KernelCase] = {}
    for model in (*MEASURED, QWEN3_8B):
        first = model is MEASURED[0]
        for name in MODULES:
            module = importlib.import_module(f"kiln.custom_ops.{name}")
            if not hasattr(module, "kernel_cases") or not (first or every or name.split(".")[0] in ("attention", "tq4")):
                continue
            for case in module.kernel_cases(target, model):
                targets = case.targets if first else (90,) if model is QWEN3_8B else SECOND_TARGETS
                if not every and "fp32" in case.name.split():
                    continue
                if every or targets is None or target.sm in targets:
                    key = case.fn, *(tuple(sorted(d.items())) for d in (case.signature, case.constexprs, case.options))
                    cases.setdefault(key, case)
    return list(cases.values())
