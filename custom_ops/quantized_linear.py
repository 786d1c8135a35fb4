"""Linear layer whose weight stays in its GGUF block format: `x @ dequantize(words, halves)`."""

from __future__ import annotations

import torch
from torch.library import triton_op

from custom_ops.launch import use_triton
from custom_ops.layouts import LAYOUTS, dequantize


def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, kind: str) -> torch.Tensor:
    """The op in plain torch; arguments as `quantized_linear`."""
    return (x.float() @ dequantize(kind, words, halves)).to(x.dtype)


def check_weight(op: str, words: torch.Tensor, halves: torch.Tensor, kind: str) -> None:
    """ValueError unless words and halves have the shapes of a packed matrix of this block type."""
    if kind not in LAYOUTS:
        raise ValueError(f"{op}: no packed layout for block type {kind}; known: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    blocks, _, rows = words.shape
    if words.shape[1] != layout.words or halves.shape != (blocks, layout.halves, rows):
        expected = f"[G, {layout.words}, N] and [G, {layout.halves}, N]"
        raise ValueError(f"{op}: {kind} words {tuple(words.shape)} and halves {tuple(halves.shape)}; expected {expected}")


@triton_op("kiln::quantized_linear", mutates_args=())
def quantized_linear(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, kind: str) -> torch.Tensor:
    """x [T, K] float32 or bfloat16, words int32 [G, W, N], halves float16 [G, H, N] -> [T, N] in x's dtype, accumulated in float32.

    The weight is the packed matrix [N, K] of block type `kind` (see `layouts`), or a slice of it along N.
    Raises ValueError when the shapes do not fit.
    """
    check_weight("quantized_linear", words, halves, kind)
    if x.shape[1] != words.shape[0] * LAYOUTS[kind].block:
        raise ValueError(f"quantized_linear: x is {tuple(x.shape)}, the {kind} weight has K = {words.shape[0] * LAYOUTS[kind].block}")
    if not use_triton(x):
        return reference(x, words, halves, kind)
    raise NotImplementedError("quantized_linear has no kernel for this device yet")


def bytes_moved(kind: str, tokens: int, n: int, k: int, itemsize: int = 2) -> int:
    """Bytes that must cross memory once: the packed weight, x [tokens, k] and the result [tokens, n], `itemsize` bytes an activation."""
    layout = LAYOUTS[kind]
    return n * (k // layout.block) * layout.block_bytes + tokens * (n + k) * itemsize


def flops(tokens: int, n: int, k: int) -> int:
    """Floating-point operations of the product, an addition and a multiplication for each weight and token."""
    return 2 * tokens * n * k
