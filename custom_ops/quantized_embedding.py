"""Embedding lookup in a table that stays in its GGUF block format."""

from __future__ import annotations

import torch
from torch.library import triton_op

from custom_ops.launch import use_triton
from custom_ops.layouts import dequantize
from custom_ops.quantized_linear import check_weight


def reference(ids: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, kind: str) -> torch.Tensor:
    """The op in plain torch; arguments as `quantized_embedding`."""
    rows = [t[:, :, ids].permute(2, 0, 1).flatten(0, 1).unsqueeze(-1) for t in (words, halves)]  # [T * G, W or H, 1]
    return dequantize(kind, *rows).view(ids.shape[0], -1)


@triton_op("kiln::quantized_embedding", mutates_args=())
def quantized_embedding(ids: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows `ids` [T] int64, each below N, of the packed matrix [N, K] (words int32 [G, W, N], halves float16 [G, H, N]) -> float32 [T, K].

    Raises ValueError when the shapes do not fit.
    """
    check_weight("quantized_embedding", words, halves, kind)
    if not use_triton(ids):
        return reference(ids, words, halves, kind)
    raise NotImplementedError("quantized_embedding has no kernel for this device yet")
