"""The drafter of Gemma 4: layers of Gemma's kind without keys and values, which they take from the model's last layer of the same kind.

Where that one reads an earlier layer's, they do, too. All of a round's drafts are asked at the position behind the model's last.
"""

from __future__ import annotations

from dataclasses import replace

from kiln.exporter.model.records import Dense, Layer, ModelConfig
from kiln.exporter.source.fields import Fields


def read_layers(fields: Fields, count: int, target: ModelConfig) -> tuple[Layer, ...]:
    """Over a model whose layers are known. What of the file disagrees with it is added to the problems."""
    sliding = fields.pattern("sliding_pattern", count)
    heads, kv_heads = fields.per_layer("num_heads", count), fields.per_layer("num_kv_heads", count)
    ffn, window = fields.per_layer("intermediate_size", count), fields.integer("sliding_window")
    if (shared := fields.integer("shared_kv_layers", zero=True)) != count:
        fields.fail(fields.key("shared_kv_layers"), f"is {shared} of {count} layers: a drafter has no keys and values of its own")
    scaled = any(fields.has(f"blk.{i}.layer_output_scale.weight") for i in range(count))
    layers = []
    for i in range(count):
        last = max((j for j, m in target.attentions.items() if (m.window is not None) == sliding[i]), default=None)
        if last is None:
            fields.fail(fields.key("sliding_pattern"), f"has a layer of a kind that {target.name} has none of", _OTHER)
            return ()
        theirs, kind = target.attentions[last], "sliding" if sliding[i] else "full"
        said = {
            fields.key("num_kv_heads"): (kv_heads[i], theirs.kv_heads),
            fields.key(f"head_dim_{kind}"): (fields.integer(f"head_dim_{kind}"), theirs.head_dim),
            fields.key(f"rope_theta_{kind}"): (fields.number(f"rope_theta_{kind}"), theirs.rope.base),
        } | ({fields.key("sliding_window"): (window, theirs.window)} if sliding[i] else {})
        for key, (ours, model) in said.items():
            if ours != model:
                fields.fail(key, f"is {ours} for layer {i}, and {model} in {target.name}", _OTHER)
        source = last if theirs.kv_from is None else theirs.kv_from
        mixer = replace(theirs, heads=heads[i], kv_from=source, k_norm=None, v_norm=None, value="own")
        layers.append(Layer(i, mixer, Dense(ffn[i], "gelu_tanh"), post_norms=True, scaled=scaled))
    return tuple(layers)


_OTHER = "it drafts for another model"
