"""Embedding lookup in a table that stays in its GGUF block format."""

from __future__ import annotations

import torch
import triton

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.weights.block_types import LAYOUTS, usual_targets
from kiln.custom_ops.weights.dequantize import kiln_dequantize
from kiln.custom_ops.weights.layouts import dequantize
from kiln.custom_ops.weights.packed import check_weight, format_constants, halves_pointer

TOKENS = 32  # of a program of one warp; a lane takes one token and one group of 32 elements


def reference(ids: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str) -> torch.Tensor:
    """The op in plain torch; arguments as `quantized_embedding`."""
    ids = ids.clamp(min=0)
    rows = [t[:, :, ids].permute(2, 0, 1).flatten(0, 1).unsqueeze(-1) for t in (words, halves)]  # [T * G, W or H, 1]
    return dequantize(block_type, *rows).view(ids.shape[0], -1)


@kernel_op("kiln::quantized_embedding", mutates_args=())
def quantized_embedding(ids: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str) -> torch.Tensor:
    """Rows `ids` [T] int64, each below N, of the packed matrix [N, K] (words int32 [G, W, N], halves float16 [G, H, N]) -> float32 [T, K].

    A negative id, of a step that is queued behind one that found no token, reads row 0.
    Raises ValueError when a shape or dtype does not fit.
    """
    check_weight("quantized_embedding", words, halves, block_type)
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"quantized_embedding: ids is {ids.dtype} {tuple(ids.shape)}; expected int64 [T]")
    if not use_triton(ids):
        return reference(ids, words, halves, block_type)
    tokens, k = ids.shape[0], words.shape[0] * LAYOUTS[block_type].block
    out = torch.empty((tokens, k), dtype=torch.float32, device=ids.device)
    constants = embedding_launch(tokens)
    kernel(kiln_dequantize)[(triton.cdiv(tokens, constants["ROWS"]), k // 32)](
        words, halves, ids, out, tokens, k, words.stride(1), halves.stride(1), **format_constants(block_type), **constants, num_warps=1
    )
    return out


def embedding_launch(tokens: int | torch.SymInt) -> dict[str, int | bool]:
    """Constants of `kiln_dequantize` beside the format's."""
    one = isinstance(tokens, int) and tokens == 1
    return {"GATHER": True, "GROUPS": 1, "ROWS": 1 if one else TOKENS, "EVEN": one}


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """One token and many, from a table of any block type."""
    integers = {"n": "i32", "k": "i32", "stride": "i32", "halves_stride": "i32"}
    signature = {"words": "*i32", "ids": "*i64", "out": "*fp32", **integers}
    cases = []
    for block_type in LAYOUTS:
        types = signature | {"halves": halves_pointer(block_type)}
        for constants in (embedding_launch(1), embedding_launch(2)):
            name = f"kiln_dequantize {block_type} rows of {model.vocab}x{model.hidden}, {constants['ROWS']} at a time"
            cases.append(KernelCase(name, kiln_dequantize, types, format_constants(block_type) | constants, {"num_warps": 1},
                                    usual_targets(block_type, constants["EVEN"]), ("k", "stride", "halves_stride")))
    return cases
