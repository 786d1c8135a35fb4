"""How an op's body decides between its reference and its Triton kernels, and how it launches them."""

from __future__ import annotations

import torch
import triton
from torch.library import wrap_triton
from triton.runtime.interpreter import InterpretedFunction


def use_triton(x: torch.Tensor) -> bool:
    """Kernels run on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (the tests)."""
    return x.is_cuda or triton.knobs.runtime.interpret


def kernel(fn):
    """`kernel(fn)[grid](...)`: traceable by Inductor on CUDA, direct under the interpreter."""
    return fn if isinstance(fn, InterpretedFunction) else wrap_triton(fn)
