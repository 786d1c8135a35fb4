"""Programmatic dependent launch: a kernel may start while the one before it drains, and waits before it touches what others wrote.

Before `wait_for_earlier_kernels` a kernel may read weights, the step's position and what earlier steps wrote, and nothing else: no kernel
of its own step can be taken as finished. Both calls do nothing in a kernel that was launched the usual way. `EARLY` is a constant of the
kernels: architectures before sm_90 lack the instructions. `@waits` declares a kernel that keeps to this; `custom_ops/gpu/contract.py`
checks the declaration in machine code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import triton
import triton.language as tl

from kiln.custom_ops.gpu.target import GpuTarget, current_target

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # cannot run assembly
F = TypeVar("F", bound=Any)


@dataclass(frozen=True)
class Waiting:
    """What is promised of a kernel that waits."""

    arguments: tuple[str, ...]  # those that are not constants; pointers first
    reads: tuple[str, ...]  # the pointers that it may load from before it waits
    idle: bool  # a thread block with nothing to do may end without waiting, and one of every launch has something to do


_declared: dict[str, Waiting] = {}


def waits(*reads: str, idle: bool = False) -> Callable[[F], F]:
    """Decorates a kernel whose threads wait before they load from another pointer than `reads`, and before they write; see `Waiting`."""

    def declare(fn: F) -> F:
        parameters = inspect.signature(fn.fn).parameters.values()
        arguments = tuple(p.name for p in parameters if "constexpr" not in str(p.annotation))
        if unknown := set(reads) - set(arguments):
            raise ValueError(f"kernel {fn.fn.__name__} has no argument {', '.join(unknown)}")
        _declared[fn.fn.__name__] = Waiting(arguments, reads, idle)
        return fn

    return declare


def waiting_kernels() -> dict[str, Waiting]:
    """Every kernel that waits, by name. A launch's name may end in an underscore and a number."""
    importlib.import_module("kiln.custom_ops.ops")
    return dict(_declared)


def early(target: GpuTarget | None = None) -> bool:
    """The value of EARLY for a target, without one for the current."""
    return not triton.knobs.runtime.interpret and (target or current_target()).sm >= 90


@triton.jit
def wait_for_earlier_kernels(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    if EARLY and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def after_waiting(x, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The integer x, known to the compiler only after `wait_for_earlier_kernels`: pure assembly that needs it cannot move above."""
    if EARLY and not INTERPRETED:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    return x
