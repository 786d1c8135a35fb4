"""The constants of an artifact, or of a weights file, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kiln.custom_ops.dtypes import dtype_name
from kiln.exporter.errors import KilnError


def load_weights(path: str | Path, records: Sequence[dict[str, Any]] | None = None) -> dict[str, torch.Tensor]:
    """The constants of a weights file by name, memory-mapped. With `records`, names, dtypes and shapes must agree."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys() if not name.startswith("__pad.")}  # noqa: SIM118
    for record in records if records is not None else ():
        name, want = record["name"], (record["dtype"], list(record["shape"]))
        if name not in tensors:
            raise KilnError(f"{path}: constant {name} is missing; export the model again")
        got = (dtype_name(tensors[name].dtype), list(tensors[name].shape))
        if got != want:
            raise KilnError(f"{path}: constant {name} is {got[0]} {got[1]}, expected {want[0]} {want[1]}; export the model again")
    if records is not None and (extra := sorted(set(tensors) - {r["name"] for r in records})):
        raise KilnError(f"{path}: constant {extra[0]} is not in the manifest; export the model again")
    return tensors
