"""Importing this module registers every `torch.ops.kiln` operator."""

from custom_ops import (  # noqa: F401
    global_attention,
    quantized_embedding,
    quantized_linear,
    sample,
    sliding_attention,
    tq4,
    tq4_attention,
)
