"""Packed weights as op arguments: what the kernels must know of a block format, and the check of words and halves."""

from __future__ import annotations

import torch

from kiln.custom_ops.weights.block_types import LAYOUTS


def format_constants(block_type: str) -> dict[str, int | bool]:
    """The constants of a block format that every kernel over packed weights takes."""
    layout = LAYOUTS[block_type]
    return {"BITS": layout.bits, "BLOCK": layout.block, "MINIMUM": layout.minimum, "WORDS": layout.words, "HALVES": layout.halves}


def check_weight(op: str, words: torch.Tensor, halves: torch.Tensor, block_type: str) -> None:
    """ValueError unless words and halves are a packed matrix of this block type, or a slice of one along N."""
    if block_type not in LAYOUTS:
        raise ValueError(f"{op}: no packed layout for block type {block_type}; known: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[block_type]
    if words.dtype != torch.int32 or halves.dtype != torch.float16 or words.dim() != 3:
        raise ValueError(f"{op}: words is {words.dtype} {tuple(words.shape)}, halves {halves.dtype}; expected int32 [G, W, N] and float16")
    blocks, _, rows = words.shape
    if words.shape[1] != layout.words or halves.shape != (blocks, layout.halves, rows):
        expected = f"[G, {layout.words}, N] and [G, {layout.halves}, N]"
        raise ValueError(f"{op}: {block_type} words {tuple(words.shape)} and halves {tuple(halves.shape)}; expected {expected}")
    for name, tensor in (("words", words), ("halves", halves)):
        if tensor.stride(2) != 1 or tensor.stride(0) != tensor.shape[1] * tensor.stride(1):
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; expected a contiguous tensor or a slice of one along N")
