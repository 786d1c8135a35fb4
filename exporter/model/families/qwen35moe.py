"""Qwen3.5 and 3.6 with experts in every layer, and beside them a network that all tokens take, by the sigmoid of a gate of its own."""

from __future__ import annotations

from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.families.qwen35 import read_layers, synthetic_layers, write_mixers
from kiln.exporter.model.records import Dense, Experts, ModelConfig
from kiln.exporter.source.fields import Fields


def _ffn(experts: tuple[int, int, int], shared: int) -> Experts:
    return Experts(*experts, "silu", shared=Dense(shared, "silu"), shared_gated=True)


def read(fields: Fields, count: int) -> dict[str, Any]:
    experts, shared = fields.experts("num_experts", "experts_used", "expert_ffn"), fields.integer("shared_ffn")
    if experts is None:
        fields.fail(fields.key("num_experts"), "is 0, a positive integer was expected")
    return {"layers": read_layers(fields, count, lambda i: _ffn(experts or (1, 1, 1), shared))}


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    return {"layers": synthetic_layers(model, count, lambda i: _ffn(model.experts, model.ffn))}


def write(config: ModelConfig) -> dict[str, Any]:
    ffn = config.layers[0].ffn
    return write_mixers(config) | {
        "num_experts": ffn.count,
        "experts_used": ffn.used,
        "expert_ffn": ffn.size,
        "shared_ffn": ffn.shared.size,
    }


FAMILY = Family(read, synthetic, write)
