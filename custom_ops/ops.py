"""Importing this module registers every `torch.ops.kiln` operator."""

from custom_ops import (  # noqa: F401
    decode_attention,
    gemv,
    global_attention,
    markers,
    norm,
    quantized_embedding,
    quantized_linear,
    sample,
    sliding_attention,
    sliding_decode,
    tq4,
    tq4_attention,
    tq4_decode,
)
