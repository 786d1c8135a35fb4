"""Eager products on the CPU as the runner's are: a row does not depend on the rows beside it. MKL adds one row up in another order than
several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    for i in range(a.shape[0]):
        torch.mm(a[i : i + 1], b, out=out[i : i + 1])
    return out


@contextmanager
def by_rows() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", _mm, "CPU")
    try:
        yield
    finally:
        library._destroy()
