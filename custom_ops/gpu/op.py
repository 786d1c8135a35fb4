"""How an operator that starts Triton kernels is registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch.library import triton_op


def kernel_op(name: str, *, mutates_args: Iterable[str]) -> Callable[[Callable], Any]:
    """torch.library.triton_op without its search for kernels, as a decorator.

    triton_op reads the source of whatever the function calls, for the key of a cache that an ahead-of-time compilation does not have; with
    Kiln's operators that was 3 of the 9 s that a process of the exporter took to start. It follows `__wrapped__`: a builtin has no source.
    """

    def register(fn: Callable) -> Any:
        vars(fn).update(__signature__=inspect.signature(fn), __wrapped__=len)
        try:
            return triton_op(name, fn, mutates_args=mutates_args)
        finally:
            del vars(fn)["__signature__"], vars(fn)["__wrapped__"]

    return register
