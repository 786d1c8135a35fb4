"""What Inductor remembers while it compiles: what a kernel writes, by the form of its arguments; sizes, by the buffer of code."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import sympy
import torch
import triton

from kiln.custom_ops.step.add_norm import kiln_add_norm
from kiln.exporter.compiler import torch_private
from kiln.exporter.compiler.torch_private import _once_for_each_form


def test_once_for_each_form() -> None:
    """A tensor's shape, a free size and the wrapper that is made for each call make no new form; dtypes, types, numbers and options do."""
    asked: list[dict] = []

    def analyze(kernel: object, kwargs: dict, descriptors: dict) -> list[str]:
        asked.append(kwargs)
        return ["x", str(len(asked))]

    analyzed = _once_for_each_form(analyze)

    def tuned(**options: int) -> object:  # as tracing wraps a kernel, anew for each call
        return triton.autotune([triton.Config(options, num_warps=4)], key=[])(kiln_add_norm)

    given = {"x": torch.empty(2), "n": sympy.Symbol("s0"), "k": 1}
    first = analyzed(tuned(), given, {})
    first.append("changed")  # is the caller's own
    same = [given, given | {"x": torch.empty(7, 3)}, given | {"n": sympy.Symbol("s1") + 4}]
    assert [analyzed(tuned(), each, {}) for each in same] == [["x", "1"]] * 3 and analyzed(kiln_add_norm, given, {}) == ["x", "1"]
    others: list[dict] = [{"x": torch.empty(2, dtype=torch.bfloat16)}, {"n": 3}, {"k": 2}, {"k": True}, {"k": 1.0}]
    assert [analyzed(tuned(), given | each, {})[1] for each in others] == ["2", "3", "4", "5", "6"]
    assert analyzed(tuned(BLOCK=64), given, {})[1] == "7" and analyzed(tuned(BLOCK=128), given, {})[1] == "8"
    assert len(asked) == 8


def test_sizes_are_declared_in_the_buffer_that_uses_them() -> None:
    """Both are asked for by a method that is gone when the next one is made, often at its address."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.utils import IndentedBuffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CppWrapperCpu, "codegen_int_array_var", CppWrapperCpu.codegen_int_array_var)  # taken back afterwards
        torch_private._sizes_declared_where_they_are_used()
        wrapper = SimpleNamespace(codegen_int_array_var_cache={}, int_array_id=itertools.count(), declared_int_array_vars=set())
        wrapper._codegen_int_array_var_impl = partial(CppWrapperCpu._codegen_int_array_var_impl, wrapper)
        buffers = [IndentedBuffer() for _ in range(50)]
        for buffer in buffers:
            first, again = (CppWrapperCpu.codegen_int_array_var(wrapper, "{3L, 4L}", buffer.writeline) for _ in range(2))
            assert first == again and f"{first}[] = {{3L, 4L}};" in buffer.getvalue()
