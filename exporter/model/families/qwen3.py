"""Qwen3, dense: every layer global, queries and keys normed, values as they are, SiLU, a plain residual stream."""

from __future__ import annotations

from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.records import Attention, Dense, Layer, ModelConfig, Rope
from kiln.exporter.source.fields import Fields

THETA = 1e6


def attention(rope: Rope, heads: int, kv_heads: int) -> Attention:
    return Attention(heads, kv_heads, rope.size, rope, scale=rope.size**-0.5 * rope.scores, q_norm="weighted", k_norm="weighted")


def _layer(i: int, rope: Rope, heads: int, kv_heads: int, ffn: int) -> Layer:
    return Layer(i, attention(rope, heads, kv_heads), Dense(ffn, "silu"))


def read(fields: Fields, count: int) -> dict[str, Any]:
    rope = Rope("", fields.number("rope_theta"), fields.integer("head_dim"), **fields.rope_scaling())
    sizes = zip(*(fields.per_layer(name, count) for name in ("num_heads", "num_kv_heads", "intermediate_size")), strict=True)
    return {"layers": tuple(_layer(i, rope, *of_layer) for i, of_layer in enumerate(sizes))}


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    rope, heads = Rope("", THETA, model.full.dim), model.full
    return {"layers": tuple(_layer(i, rope, heads.queries, heads.kv, model.ffn) for i in range(count))}


def write(config: ModelConfig) -> dict[str, Any]:
    mixer = config.attentions[0]
    return {
        "intermediate_size": config.layers[0].ffn.width,
        "num_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "rope_theta": mixer.rope.base,
    }


FAMILY = Family(read, synthetic, write)
