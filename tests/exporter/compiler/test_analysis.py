"""What a kernel writes is found out once for each form of its arguments."""

from __future__ import annotations

import sympy
import torch
import triton

from kiln.custom_ops.step.add_norm import kiln_add_norm
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
