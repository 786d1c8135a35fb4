"""Gemma 3, text: sliding and full layers of one head size, queries and keys normed, values as they are, GELU, norms after the branches."""

from __future__ import annotations

from math import sqrt
from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.records import Attention, Dense, Layer, ModelConfig, Rope
from kiln.exporter.source.fields import Fields

THETA_FULL, THETA_SLIDING = 1e6, 1e4
LAYERS_27B = 62  # its scores are scaled by the hidden size over the heads, which no key says


def _layer(i: int, rope: Rope, window: int | None, heads: int, kv_heads: int, ffn: int, scale: float) -> Layer:
    """The converter adds the 1 of a norm's weight."""
    mixer = Attention(heads, kv_heads, rope.size, rope, window, scale, q_norm="weighted", k_norm="weighted")
    return Layer(i, mixer, Dense(ffn, "gelu_tanh"), post_norms=True)


def read(fields: Fields, count: int) -> dict[str, Any]:
    hidden, size, window = fields.integer("hidden_size"), fields.integer("head_dim"), fields.integer("sliding_window", zero=True)
    sliding = fields.pattern("sliding_pattern", count) if window else [False] * count
    heads, kv_heads = fields.per_layer("num_heads", count), fields.per_layer("num_kv_heads", count)
    ffn = fields.per_layer("intermediate_size", count)
    ropes = {True: Rope("sliding", fields.number("rope_theta_sliding"), size),
             False: Rope("full", fields.number("rope_theta_full"), size, fields.rope_factor())}  # fmt: skip
    scale = (hidden / heads[0] if count == LAYERS_27B else size) ** -0.5
    return {
        "layers": tuple(
            _layer(i, ropes[sliding[i]], window if sliding[i] else None, heads[i], kv_heads[i], ffn[i], scale) for i in range(count)
        ),
        "embedding_scale": sqrt(hidden),
        "final_logit_softcapping": fields.number("final_logit_softcapping", zero=True),
    }


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    ropes = {True: Rope("sliding", THETA_SLIDING, model.full.dim), False: Rope("full", THETA_FULL, model.full.dim)}
    layers = []
    for i in range(count):
        full, heads = model.is_full(i), model.full
        window = None if full else model.window
        layers.append(_layer(i, ropes[not full], window, heads.queries, heads.kv, model.ffn, model.full.dim**-0.5))
    return {"layers": tuple(layers), "embedding_scale": sqrt(model.hidden)}


def write(config: ModelConfig) -> dict[str, Any]:
    mixers = list(config.attentions.values())
    return {
        "intermediate_size": config.layers[0].ffn.width,
        "num_heads": mixers[0].heads,
        "num_kv_heads": mixers[0].kv_heads,
        "head_dim": mixers[0].head_dim,
        "sliding_window": next((m.window for m in mixers if m.window is not None), 0),
        "sliding_pattern": [m.window is not None for m in mixers],
        "rope_theta_full": next((m.rope.base for m in mixers if m.window is None), THETA_FULL),
        "rope_theta_sliding": next((m.rope.base for m in mixers if m.window is not None), THETA_SLIDING),
    }


FAMILY = Family(read, synthetic, write)
