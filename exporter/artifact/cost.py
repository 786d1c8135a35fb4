"""What a model's work costs, from its records and the plan of its weights: part of the manifest, so that a benchmark knows no family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from kiln.custom_ops.dtypes import DTYPES
from kiln.exporter.model.records import DeltaNet, Experts, ModelConfig, cache_specs
from kiln.exporter.source.weights import WeightPlan, constants, plan_constants


def cost(config: ModelConfig, plan: Sequence[WeightPlan]) -> dict[str, Any]:
    """weight_bytes: constants that a decode step reads; one row of an embedding that is no head, of experts those that are used.

    token_flops: operations of the matmuls and delta rules of one token, the head's apart, which are head_flops. attention: operations of a
    query for each key that it sees, by the window that bounds them. readers: of a cache, how many layers read it, where it is not one.
    """
    used = {f"blk.{layer.index}.": (layer.ffn.used, layer.ffn.count) for layer in config.layers if isinstance(layer.ffn, Experts)}
    skipped = token_flops = head_flops = 0
    for p in plan:
        size = sum(prod(c.shape) * DTYPES[c.dtype].size for c in plan_constants(p))
        name, share = p.name, (1, 1)
        if p.stack > 1:
            share = used[name[: name.rindex(".") + 1]]
            skipped += size - size * share[0] // share[1]
        if p.gathered or (name == "token_embd" and not config.tied_head):
            skipped += size - size // p.N
        elif name == ("token_embd" if config.tied_head else "output"):
            head_flops = 2 * p.N * p.K
        else:
            token_flops += 2 * p.N * p.K * share[0] // share[1]
    token_flops += sum(layer.mixer.token_flops for layer in config.layers if isinstance(layer.mixer, DeltaNet))
    attention: Counter[int | None] = Counter()
    for mixer in config.attentions.values():
        attention[mixer.window] += 4 * mixer.q_dim
    return {
        "weight_bytes": sum(c.nbytes for c in constants(config, plan)) - skipped,
        "token_flops": token_flops,
        "head_flops": head_flops,
        "attention": [{"window": window, "flops": flops} for window, flops in attention.items()],
        "readers": {f"blk.{c.layer}.cache": len(c.readers) for c in cache_specs(config) if len(c.readers) > 1},
    }
