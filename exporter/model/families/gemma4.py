"""Gemma 4, dense: sliding and full layers with head sizes of their own, every head normed, V of a full layer its raw K, GELU."""

from __future__ import annotations

from math import sqrt
from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.records import Attention, Dense, Layer, ModelConfig, Rope
from kiln.exporter.source.fields import Fields

THETA_FULL, THETA_SLIDING = 1e6, 1e4
SOFTCAP = 30.0


def _ropes(full_theta: float, full_dim: int, sliding_theta: float, sliding_dim: int) -> dict[bool, Rope]:
    """By whether the layer slides. The frequencies of a full layer are divided by a tensor that stops most pairs."""
    return {True: Rope("sliding", sliding_theta, sliding_dim), False: Rope("full", full_theta, full_dim, divisors="rope_freqs.weight")}


def _layer(i: int, rope: Rope, window: int | None, heads: int, kv_heads: int, ffn: int, own_v: bool, scaled: bool) -> Layer:
    """Queries and keys are normed, so scores are not scaled. The head of a layer has the rope's size: all of it is in the table."""
    mixer = Attention(heads, kv_heads, rope.size, rope, window, q_norm="weighted", k_norm="weighted", v_norm="plain",
                      value="own" if own_v else "key")  # fmt: skip
    return Layer(i, mixer, Dense(ffn, "gelu_tanh"), post_norms=True, scaled=scaled)


def read(fields: Fields, count: int) -> dict[str, Any]:
    sliding = fields.pattern("sliding_pattern", count)
    heads, kv_heads = fields.per_layer("num_heads", count), fields.per_layer("num_kv_heads", count)
    ffn, window = fields.per_layer("intermediate_size", count), fields.integer("sliding_window")
    ropes = _ropes(fields.number("rope_theta_full"), fields.integer("head_dim_full"),
                   fields.number("rope_theta_sliding"), fields.integer("head_dim_sliding"))  # fmt: skip
    scaled = any(fields.has(f"blk.{i}.layer_output_scale.weight") for i in range(count))
    # Only a full layer may go without V; a sliding one that lacks it is an incomplete file.
    own_v = [sliding[i] or fields.has(f"blk.{i}.attn_v.weight", f"blk.{i}.attn_qkv.weight") for i in range(count)]
    return {
        "layers": tuple(
            _layer(i, ropes[sliding[i]], window if sliding[i] else None, heads[i], kv_heads[i], ffn[i], own_v[i], scaled)
            for i in range(count)
        ),
        "embedding_scale": sqrt(fields.integer("hidden_size")),
        "final_logit_softcapping": fields.number("final_logit_softcapping", zero=True),
    }


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    ropes = _ropes(THETA_FULL, model.full.dim, THETA_SLIDING, model.sliding.dim)
    layers = []
    for i in range(count):
        full = model.is_full(i)
        heads = model.full if full else model.sliding
        window = None if full else model.window
        layers.append(_layer(i, ropes[not full], window, heads.queries, heads.kv, model.ffn, own_v=not full, scaled=True))
    return {"layers": tuple(layers), "embedding_scale": sqrt(model.hidden), "final_logit_softcapping": SOFTCAP}


def write(config: ModelConfig) -> dict[str, Any]:
    mixers = list(config.attentions.values())
    # a model cut short may have layers of one kind only: the other's fields are in no layer, and may say anything
    sliding = next((m for m in mixers if m.window is not None), mixers[0])
    full = next((m for m in mixers if m.window is None), mixers[0])
    return {
        "intermediate_size": config.layers[0].ffn.width,
        "num_heads": mixers[0].heads,
        "num_kv_heads": [m.kv_heads for m in mixers],
        "head_dim_full": full.head_dim,
        "head_dim_sliding": sliding.head_dim,
        "sliding_window": sliding.window or config.context_length,
        "sliding_pattern": [m.window is not None for m in mixers],
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope_theta_full": full.rope.base,
        "rope_theta_sliding": sliding.rope.base,
        "gemma4.attention.shared_kv_layers": 0,
        "gemma4.embedding_length_per_layer_input": 0,
    }


FAMILY = Family(read, synthetic, write)
