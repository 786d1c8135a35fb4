"""Qwen3 with experts in every layer: attention as in Qwen3, no network that all tokens take."""

from __future__ import annotations

from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.families.qwen3 import THETA, attention
from kiln.exporter.model.records import Experts, Layer, ModelConfig, Rope
from kiln.exporter.source.fields import Fields


def _layer(i: int, rope: Rope, heads: int, kv_heads: int, experts: tuple[int, int, int]) -> Layer:
    return Layer(i, attention(rope, heads, kv_heads), Experts(*experts, "silu"))


def read(fields: Fields, count: int) -> dict[str, Any]:
    rope = Rope("", fields.number("rope_theta"), fields.integer("head_dim"), **fields.rope_scaling())
    experts = fields.experts("num_experts", "experts_used", "expert_ffn")
    if experts is None:
        fields.fail(fields.keys["num_experts"]["key"], "is 0, a positive integer was expected")
    sizes = zip(fields.per_layer("num_heads", count), fields.per_layer("num_kv_heads", count), strict=True)
    return {"layers": tuple(_layer(i, rope, *of_layer, experts or (1, 1, 1)) for i, of_layer in enumerate(sizes))}


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    rope, heads = Rope("", THETA, model.full.dim), model.full
    return {"layers": tuple(_layer(i, rope, heads.queries, heads.kv, model.experts) for i in range(count))}


def write(config: ModelConfig) -> dict[str, Any]:
    mixer, ffn = config.attentions[0], config.layers[0].ffn
    return {
        "num_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "rope_theta": mixer.rope.base,
        "num_experts": ffn.count,
        "experts_used": ffn.used,
        "expert_ffn": ffn.size,
    }


FAMILY = Family(read, synthetic, write)
