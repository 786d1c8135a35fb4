"""How an op's body decides between its reference and its Triton kernels, and how it launches them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch.library import wrap_triton
from triton.runtime.interpreter import InterpretedFunction


def use_triton(x: torch.Tensor) -> bool:
    """Kernels run on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (the tests)."""
    return x.is_cuda or triton.knobs.runtime.interpret


def vector_warps(elements: int, most: int) -> int:
    """Warps of a program over one vector: no lane without an element of its own, half a vector's where it is made of two.

    With more lanes Triton 3.6 leaves elements out of a sum over what went through joins and reshapes.
    """
    return max(1, min(most, elements // 32))


class _Limited:
    def __init__(self, fn: Any, registers: int):
        self.fn, self.registers = fn, registers

    def __getitem__(self, grid: tuple) -> Any:
        return functools.partial(self.fn[grid], maxnreg=self.registers)


def kernel(fn: Any, registers: int | None = None, x: torch.Tensor | None = None) -> Any:
    """`kernel(fn)[grid](...)`: traceable by Inductor on CUDA, direct under the interpreter.

    registers: of a thread, at most; x is then any tensor of the launch. A direct launch tells Triton; a traced one has no means to, and the
    compiler of artifacts reads the kernel's constant REGISTERS.
    """
    if isinstance(fn, InterpretedFunction):
        return fn
    return _Limited(fn, registers) if registers and type(x) is torch.Tensor else wrap_triton(fn)
