"""Gemma 4: sliding and full layers with head sizes of their own, every head normed, GELU.

The large ones have full layers whose V is the raw K. The small ones (E2B, E4B) have per-layer embeddings, and their later layers read the
keys and values of the last layer of their kind that has any of its own.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.families import Family
from kiln.exporter.model.records import Attention, Dense, Layer, ModelConfig, PerLayerEmbedding, Rope
from kiln.exporter.source.fields import Fields

THETA_FULL, THETA_SLIDING = 1e6, 1e4
SOFTCAP = 30.0


def _ropes(full_theta: float, full_dim: int, sliding_theta: float, sliding_dim: int) -> dict[bool, Rope]:
    """By whether the layer slides. The frequencies of a full layer are divided by a tensor that stops most pairs."""
    return {True: Rope("sliding", sliding_theta, sliding_dim), False: Rope("full", full_theta, full_dim, divisors="rope_freqs.weight")}


def _layer(i: int, rope: Rope, window: int | None, heads: int, kv_heads: int, ffn: int, own_v: bool, scaled: bool,
           kv_from: int | None) -> Layer:  # fmt: skip
    """Queries and keys are normed, so scores are not scaled. The head of a layer has the rope's size: all of it is in the table."""
    own = {"k_norm": "weighted", "v_norm": "plain", "value": "own" if own_v else "key"} if kv_from is None else {"kv_from": kv_from}
    mixer = Attention(heads, kv_heads, rope.size, rope, window, q_norm="weighted", **own)
    return Layer(i, mixer, Dense(ffn, "gelu_tanh"), post_norms=True, scaled=scaled)


def _sources(sliding: list[bool], shared: int) -> list[int | None]:
    """Whose keys and values each layer reads: of the `shared` last ones, those of the last layer before them of the same kind."""
    first = len(sliding) - shared
    own = {kind: max((i for i in range(first) if sliding[i] == kind), default=None) for kind in (True, False)}
    return [None] * first + [own[kind] for kind in sliding[first:]]


def _per_layer(size: int, hidden: int) -> PerLayerEmbedding | None:
    return PerLayerEmbedding(size, "gelu_tanh", sqrt(size), hidden**-0.5, 2**-0.5) if size else None


def read(fields: Fields, count: int) -> dict[str, Any]:
    sliding = fields.pattern("sliding_pattern", count)
    heads, kv_heads = fields.per_layer("num_heads", count), fields.per_layer("num_kv_heads", count)
    ffn, window = fields.per_layer("intermediate_size", count), fields.integer("sliding_window")
    ropes = _ropes(fields.number("rope_theta_full"), fields.integer("head_dim_full"),
                   fields.number("rope_theta_sliding"), fields.integer("head_dim_sliding"))  # fmt: skip
    scaled = any(fields.has(f"blk.{i}.layer_output_scale.weight") for i in range(count))
    shared = fields.integer("shared_kv_layers", zero=True)
    first = max(count - shared, 0)
    if not set(sliding[first:]) <= set(sliding[:first]):
        fields.fail(fields.key("shared_kv_layers"), f"is {shared} of {count} layers: no earlier layer has keys and values for each kind")
        shared = 0
    # Only a full layer may go without V; a sliding one that lacks it is an incomplete file.
    own_v = [sliding[i] or i >= first or fields.has(f"blk.{i}.attn_v.weight", f"blk.{i}.attn_qkv.weight") for i in range(count)]
    sources = _sources(sliding, shared)
    wrong = next((i for i, s in enumerate(sources) if s is not None and kv_heads[i] != kv_heads[s]), None)
    if wrong is not None:
        others = f"{kv_heads[wrong]} in layer {wrong} and another number in layer {sources[wrong]}, whose keys it reads"
        fields.fail(fields.key("num_kv_heads"), f"is {others}")
    return {
        "layers": tuple(
            _layer(i, ropes[sliding[i]], window if sliding[i] else None, heads[i], kv_heads[i], ffn[i], own_v[i], scaled, sources[i])
            for i in range(count)
        ),
        "embedding_scale": sqrt(fields.integer("hidden_size")),
        "final_logit_softcapping": fields.number("final_logit_softcapping", zero=True),
        "per_layer_embedding": _per_layer(fields.integer("per_layer_size", zero=True), fields.integer("hidden_size")),
    }


def synthetic(model: Geometry, count: int) -> dict[str, Any]:
    ropes = _ropes(THETA_FULL, model.full.dim, THETA_SLIDING, model.sliding.dim)
    sources = _sources([not model.is_full(i) for i in range(model.layers)], model.shared_kv)
    layers = []
    for i in range(count):
        full = model.is_full(i)
        heads = model.full if full else model.sliding
        window = None if full else model.window
        layers.append(_layer(i, ropes[not full], window, heads.queries, heads.kv, model.ffn_of(i), own_v=not full or model.full_v,
                             scaled=True, kv_from=sources[i]))  # fmt: skip
    return {"layers": tuple(layers), "embedding_scale": sqrt(model.hidden), "final_logit_softcapping": SOFTCAP,
            "per_layer_embedding": _per_layer(model.per_layer, model.hidden)}  # fmt: skip


def write(config: ModelConfig) -> dict[str, Any]:
    mixers = list(config.attentions.values())
    # a model cut short may have layers of one kind only: the other's fields are in no layer, and may say anything
    sliding = next((m for m in mixers if m.window is not None), mixers[0])
    full = next((m for m in mixers if m.window is None), mixers[0])
    widths = [layer.ffn.width for layer in config.layers]
    return {
        "intermediate_size": widths if len(set(widths)) > 1 else widths[0],
        "num_heads": mixers[0].heads,
        "num_kv_heads": [m.kv_heads for m in mixers],
        "head_dim_full": full.head_dim,
        "head_dim_sliding": sliding.head_dim,
        "sliding_window": sliding.window or config.context_length,
        "sliding_pattern": [m.window is not None for m in mixers],
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope_theta_full": full.rope.base,
        "rope_theta_sliding": sliding.rope.base,
        "shared_kv_layers": sum(m.kv_from is not None for m in mixers),
        "per_layer_size": config.per_layer_embedding.size if config.per_layer_embedding else 0,
    }


FAMILY = Family(read, synthetic, write)
