"""The caches of the lowered graphs, from the hyper-parameters and the options alone."""

from __future__ import annotations

import torch

from kiln.exporter.source.config import ModelConfig
from kiln.exporter.source.plan import cache_specs
from kiln.passes.records import KVBuffer, PassOptions


def kv_plan(config: ModelConfig, max_seq_len: int, dtype: torch.dtype, options: PassOptions) -> list[KVBuffer]:
    """Names, shapes and kinds; `dtype` of what is not quantized."""
    plan = []
    for cache in cache_specs(config):
        prefix, layer, heads, size = f"blk.{cache.layer}.cache", cache.layer, cache.heads, cache.head_dim
        if cache.window is not None:
            slots = min(cache.window, max_seq_len)
            plan += [KVBuffer(f"{prefix}.{side}_ring", layer, "ring", dtype, (slots, heads, size)) for side in "kv"]
        elif options.turboquant:
            shape = (options.residual_length, heads, size)
            for side in "kv":
                plan.append(KVBuffer(f"{prefix}.{side}_exact", layer, "ring", dtype, shape))
                plan.append(KVBuffer(f"{prefix}.{side}_codes", layer, "global", torch.int16, (heads, max_seq_len, size // 4)))
                plan.append(KVBuffer(f"{prefix}.{side}_scales", layer, "global", torch.float16, (heads, max_seq_len)))
        else:
            plan += [KVBuffer(f"{prefix}.{side}_cache", layer, "global", dtype, (max_seq_len, heads, size)) for side in "kv"]
    return plan
