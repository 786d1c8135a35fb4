"""Registering an operator."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from kiln.custom_ops.gpu.op import kernel_op


def test_no_source_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = list[object](), inspect.getsource

    def noted(what: Any) -> str:
        asked.append(what)
        return read(what)

    def double(x: torch.Tensor, times: int = 2) -> torch.Tensor:
        return x * times

    monkeypatch.setattr(inspect, "getsource", noted)
    op = kernel_op("kiln_test::double", mutates_args=())(double)
    assert len in asked and not any(map(inspect.isfunction, asked))
    assert op(torch.ones(2)).tolist() == [2, 2]
    assert str(torch.ops.kiln_test.double.default._schema) == "kiln_test::double(Tensor x, SymInt times=2) -> Tensor"
    assert not hasattr(double, "__wrapped__") and not hasattr(double, "__signature__")
