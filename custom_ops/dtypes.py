"""Element types, once: torch's name of each, its bytes, and what safetensors and GGUF call it. torch is imported on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    name: str  # torch's, and the manifest's
    size: int  # bytes of an element
    safetensors: str
    ggml: str | None = None  # of a float tensor in a GGUF file

    @property
    def torch(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float32", 4, "F32", "F32"),
        Dtype("float16", 2, "F16", "F16"),
        Dtype("bfloat16", 2, "BF16", "BF16"),
        Dtype("int16", 2, "I16"),
        Dtype("int32", 4, "I32"),
        Dtype("int64", 8, "I64"),
    )
}
FLOATS = {dtype.ggml: dtype for dtype in DTYPES.values() if dtype.ggml}  # by GGML type: F32, F16, BF16


def dtype_name(dtype: torch.dtype) -> str:
    """The name in DTYPES."""
    return str(dtype).removeprefix("torch.")
