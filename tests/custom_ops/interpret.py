"""Kernels under Triton's interpreter, on CPU tensors: in a process of its own, for the mode is chosen when Triton is imported.

A test module names its kernel tests `interpreted_*` and runs them all by `test_kernels_interpreted = interpreted(__file__)`, those that are
marked nightly by `test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton.language as tl
import triton.runtime.interpreter as interpreter


def interpreted(file: str, marked: str = "not nightly") -> Callable[[], None]:
    """A test that runs the functions `interpreted_*` of a test module that are `marked` so, under the interpreter."""

    def test() -> None:
        options = ("-q", "-x", "-p", "no:cacheprovider", "-o", "python_functions=interpreted_*", "-m", marked)
        command = [sys.executable, "-m", "pytest", *options, file]
        result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

    return test


def at_night(*cases: Any) -> list[Any]:
    """Cases of a parameter that say little beside the others: for `make nightly`. Tuples are of several parameters."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly) for case in cases]


def _accept_one_element_arrays_as_integers() -> None:
    """Triton 3.6 calls int() on arrays of one element, for the bounds of a range; NumPy 2.4 refuses that."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


_accept_one_element_arrays_as_integers()


def _multiply_bfloat16_values() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and its dot of Triton 3.6 multiplies those."""
    original = interpreter.InterpreterBuilder.create_dot

    def widen(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: original(self, widen(a), widen(b), *rest)


_multiply_bfloat16_values()
