"""Llama, dense: every layer global, no norms of heads, SiLU, a plain residual stream; rotary pairs are neighbours."""

from __future__ import annotations

from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.records import Attention, Dense, Layer, ModelConfig, Rope
from kiln.exporter.source.fields import Fields

THETA = 1e4
DIVISORS = "rope_freqs.weight"


def _layer(i: int, rope: Rope, heads: int, kv_heads: int, ffn: int) -> Layer:
    """The converter puts the rows of Q and K so that a pair's dimensions are neighbours."""
    return Layer(i, Attention(heads, kv_heads, rope.size, rope, scale=rope.size**-0.5 * rope.scores), Dense(ffn, "silu"))


def read(fields: Fields, count: int) -> dict[str, Any]:
    heads = fields.per_layer("num_heads", count)
    size, hidden = fields.integer("head_dim", zero=True), fields.integer("hidden_size")
    if not size and hidden % heads[0]:
        fields.fail("llama.attention.head_count", f"is {heads[0]}, which does not divide the hidden size {hidden}")
    size = size or max(hidden // heads[0], 1)
    for field in ("rotary_dim", "value_dim"):
        if (found := fields.integer(field, zero=True) or size) != size:
            fields.fail(fields.keys[field]["key"], f"is {found}, but a head has {size} dimensions", "unequal ones are not supported")
    divisors = DIVISORS if fields.has(DIVISORS) else None
    rope = Rope("", fields.number("rope_theta"), size, divisors=divisors, neighbours=True, **fields.rope_scaling())
    kv_heads = fields.per_layer("num_kv_heads", count, zero=True)
    ffn = fields.per_layer("intermediate_size", count)
    return {"layers": tuple(_layer(i, rope, heads[i], kv_heads[i] or heads[i], ffn[i]) for i in range(count))}


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    rope, heads = Rope("", THETA, model.full.dim, neighbours=True), model.full
    return {"layers": tuple(_layer(i, rope, heads.queries, heads.kv, model.ffn) for i in range(count))}


def write(config: ModelConfig) -> dict[str, Any]:
    mixer = config.attentions[0]
    return {
        "intermediate_size": config.layers[0].ffn.width,
        "num_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "rope_theta": mixer.rope.base,
        "rotary_dim": mixer.head_dim,
    }


FAMILY = Family(read, synthetic, write)
