"""The caches of the lowered graphs: what each declares, from the model's records and the options alone."""

from __future__ import annotations

import torch

from kiln.custom_ops.delta.rule import STATE_SLOTS
from kiln.exporter.model.records import CacheSpec, ModelConfig, cache_specs
from kiln.passes.records import KVBuffer, PassOptions, buffer


def state_buffers(cache: CacheSpec) -> list[KVBuffer]:
    """Of a state: each part twice, before and after a step, so that a step that is discarded has changed nothing."""
    return [buffer(f"blk.{cache.layer}.cache.{part}_state", torch.float32, (STATE_SLOTS, *shape)) for part, shape in cache.parts]


def exact_buffers(cache: CacheSpec, max_seq_len: int, dtype: torch.dtype, spare: int = 0) -> list[KVBuffer]:
    """Of a cache that holds keys and values as they are, in `dtype`: slots first, as the decoder makes it. spare: slots of a ring beyond
    its window."""
    slots = max_seq_len if cache.window is None else min(cache.window + spare, max_seq_len)
    end = "cache" if cache.window is None else "ring"
    return [buffer(f"blk.{cache.layer}.cache.{side}_{end}", dtype, (slots, cache.heads, cache.head_dim)) for side in "kv"]


def tq4_buffers(cache: CacheSpec, max_seq_len: int, dtype: torch.dtype, options: PassOptions) -> list[KVBuffer]:
    """Of a global cache in TQ4: codes of every position with their scales, the exact window, and the center of keys."""
    prefix, heads, size = f"blk.{cache.layer}.cache", cache.heads, cache.head_dim
    found = [buffer(f"{prefix}.k_center", torch.float32, (heads, size))] if options.key_center else []
    for side in "kv":
        found += [
            buffer(f"{prefix}.{side}_exact", dtype, (options.residual_length + options.spare_slots, heads, size)),
            buffer(f"{prefix}.{side}_codes", torch.int16, (heads, max_seq_len, size // 4)),
            buffer(f"{prefix}.{side}_scales", torch.float16, (heads, max_seq_len)),
        ]
    return found


def kv_plan(config: ModelConfig, max_seq_len: int, dtype: torch.dtype, options: PassOptions) -> list[KVBuffer]:
    """Names, shapes and kinds, of one timeline; `dtype` of what is not quantized."""
    plan = []
    for cache in cache_specs(config):
        if cache.kind == "state":
            plan += state_buffers(cache)
        elif cache.kind == "global" and options.turboquant:
            plan += tq4_buffers(cache, max_seq_len, dtype, options)
        else:
            plan += exact_buffers(cache, max_seq_len, dtype, options.spare_slots)
    return plan
