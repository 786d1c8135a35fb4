"""Kernels under Triton's interpreter, on CPU tensors: in a process of its own, for the mode is chosen when Triton is imported.

A test module names its kernel tests `interpreted_*` and runs them all by `test_kernels_interpreted = interpreted(__file__)`, those that are
marked nightly by `test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton
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


# What follows makes the interpreter several times as fast and changes nothing that it computes.


def _patch_the_language_once() -> None:
    """Every call of a function from a kernel patches what its kernel has patched already."""
    original, patched, seen = interpreter._patch_lang, set[str](), dict[int, set[str]]()

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc]
        names: frozenset[str] = frozenset()

        def restore(self) -> None:
            super().restore()
            patched.difference_update(self.names)

    def patch(fn: Any) -> interpreter._LangPatchScope:
        if (module := id(fn.__globals__)) not in seen:
            seen[module] = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)}
        names = seen[module]
        if names and names <= patched:
            return interpreter._LangPatchScope()
        scope = original(fn)
        scope.__class__, scope.names = Scope, frozenset(names - patched)
        patched.update(names)
        return scope

    interpreter._patch_lang = patch


def _name_types_of_tuples_when_asked() -> None:
    """A shape is a tuple of constants; the type of each was put into words whenever a tensor was made."""

    def initialize(self: Any, args: Any, type: Any = None) -> None:
        self.values, self._type = list(args), type

    def type_of(self: Any) -> Any:
        if not isinstance(self._type, tl.core.tuple_type):
            given = self._type
            self._type = tl.core._type_for_tuple_values(self.values) if given is None else tl.core.tuple_type(given)
        return self._type

    tl.core.tuple.__init__ = initialize
    tl.core.tuple.type = property(type_of, lambda self, type: setattr(self, "_type", type))


def _remember_shapes() -> None:
    """What a block's shape alone decides, and the shape of a tensor as constants."""
    initialize, blocks, tensors = tl.block_type.__init__, dict[Any, tuple](), dict[Any, tuple]()

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(s.value if isinstance(s, tl.constexpr) else s for s in shape))
        if key not in blocks:
            initialize(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in tensors:
            tensors[key] = tl.core.tuple([tl.constexpr(s) for s in key]), tl.constexpr(math.prod(key))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    tl.block_type.__init__ = block
    tl.tensor.__init__ = tensor


def _look_dtypes_up() -> None:
    original, found = interpreter._get_np_dtype, dict[str, np.dtype]()

    def dtype_of(type: Any) -> np.dtype:
        if isinstance(type, tl.block_type):
            type = type.element_ty
        if type.name not in found:
            found[type.name] = original(type)
        return found[type.name]

    interpreter._get_np_dtype = dtype_of


def _compute_no_checks_that_nobody_reads() -> None:
    """Whether sums and products of integers fit their type, of which only a debugging run would be told."""
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


if triton.knobs.runtime.interpret:
    _patch_the_language_once()
    _name_types_of_tuples_when_asked()
    _remember_shapes()
    _look_dtypes_up()
    _compute_no_checks_that_nobody_reads()
