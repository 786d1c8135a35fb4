"""Qwen3.5 and 3.6, dense: gated delta rules, and every few layers attention with a gate and a part of each head turned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.records import Attention, DeltaNet, Dense, Experts, Layer, ModelConfig, Rope
from kiln.exporter.source.fields import Fields, as_integer, shown

THETA = 1e7

Ffn = Callable[[int], Dense | Experts]  # of a layer by its number


def attention(rope: Rope, heads: int, kv_heads: int, size: int) -> Attention:
    return Attention(heads, kv_heads, size, rope, scale=size**-0.5, q_norm="weighted", k_norm="weighted", gated=True)


def read_layers(fields: Fields, count: int, ffn: Ffn) -> tuple[Layer, ...]:
    """The converter adds the 1 of a norm's weight, takes -exp of A_log, and puts the value heads so that head v goes with key head v mod
    key heads."""
    every, blocks = fields.integer("attention_every", zero=True), fields.raw("recurrent_layers")[1]
    if blocks:
        recurrent = fields.pattern("recurrent_layers", fields.integer("num_layers"))[:count]
    else:
        recurrent = [every > 0 and (i + 1) % every != 0 for i in range(count)]
        if not every:
            keys = f"and {fields.key('attention_every')} are missing: one says which layers are attention"
            fields.fail(fields.key("recurrent_layers"), keys, "convert the model again with a current converter")
    value_heads, size = fields.integer("value_heads"), fields.integer("value_size")
    if size % value_heads:
        fields.fail(fields.key("value_size"), f"is {size}, no multiple of {value_heads} value heads")
    rule = DeltaNet(fields.integer("key_heads"), value_heads, fields.integer("state_size"), size // value_heads, fields.integer("taps"))
    if rule.taps < 2:
        fields.fail(fields.key("taps"), "is 1; a convolution of 2 taps or more was expected")
    rope = Rope("", fields.number("rope_theta"), fields.integer("rotary_dim"))
    sections = fields.raw("rope_sections")[1]
    pairs = rope.size // 2
    if not isinstance(sections, list) or any(as_integer(n) is None for n in sections) or (sections and sum(sections) != pairs):
        fields.fail(fields.key("rope_sections"), f"is {shown(sections)}: {pairs} pairs turn, and it must name them all")
    mixer = attention(rope, fields.integer("num_heads"), fields.integer("num_kv_heads"), fields.integer("head_dim"))
    return tuple(Layer(i, rule if recurrent[i] else mixer, ffn(i)) for i in range(count))


def synthetic_layers(model: Geometry, count: int, ffn: Ffn) -> tuple[Layer, ...]:
    rule = DeltaNet(*model.delta)
    mixer = attention(Rope("", THETA, model.rotary), model.full.queries, model.full.kv, model.full.dim)
    return tuple(Layer(i, mixer if model.is_full(i) else rule, ffn(i)) for i in range(count))


def write_mixers(config: ModelConfig) -> dict[str, Any]:
    rule = next(layer.mixer for layer in config.layers if isinstance(layer.mixer, DeltaNet))
    mixer = next(iter(config.attentions.values()))
    turned = mixer.rope.size // 2
    return {
        "num_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "rope_theta": mixer.rope.base,
        "rotary_dim": mixer.rope.size,
        "rope_sections": [turned - 2 * (turned // 3), turned // 3, turned // 3, 0],
        "attention_every": next(iter(config.attentions)) + 1,
        "recurrent_layers": [isinstance(layer.mixer, DeltaNet) for layer in config.layers],
        "taps": rule.taps,
        "state_size": rule.key_dim,
        "key_heads": rule.key_heads,
        "value_heads": rule.value_heads,
        "value_size": rule.value_size,
    }


def read(fields: Fields, count: int) -> dict[str, Any]:
    sizes = fields.per_layer("intermediate_size", count)
    return {"layers": read_layers(fields, count, lambda i: Dense(sizes[i], "silu"))}


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    return {"layers": synthetic_layers(model, count, lambda i: Dense(model.ffn, "silu"))}


def write(config: ModelConfig) -> dict[str, Any]:
    return write_mixers(config) | {"intermediate_size": config.layers[0].ffn.width}


FAMILY = Family(read, synthetic, write)
