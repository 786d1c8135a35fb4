"""What an artifact will hold and need, before anything is computed: KV bytes, weight bytes, run-time memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exporter.compiler.trace import GraphSpec
from exporter.source.config import ModelConfig
from exporter.source.plan import cache_specs
from exporter.source.weights import weight_bytes
from passes.records import KVBuffer, PassOptions


def kv_plan(config: ModelConfig, max_seq_len: int, dtype: torch.dtype, options: PassOptions) -> list[KVBuffer]:
    """The caches of the lowered graph, from the hyper-parameters alone."""
    plan = []
    for cache in cache_specs(config):
        prefix, layer, heads, size = f"blk.{cache.layer}.cache", cache.layer, cache.heads, cache.head_dim
        if cache.window is not None:
            slots = min(cache.window, max_seq_len)
            plan += [KVBuffer(f"{prefix}.{side}_ring", layer, "ring", dtype, (slots, heads, size)) for side in "kv"]
        elif options.turboquant:
            shape = (options.residual_length, heads, size)
            for side in "kv":
                plan.append(KVBuffer(f"{prefix}.{side}_residual", layer, "ring", dtype, shape))
                plan.append(KVBuffer(f"{prefix}.{side}_codes", layer, "global", torch.int16, (heads, max_seq_len, size // 4)))
                plan.append(KVBuffer(f"{prefix}.{side}_scales", layer, "global", torch.float16, (heads, max_seq_len)))
        else:
            plan += [KVBuffer(f"{prefix}.{side}_cache", layer, "global", dtype, (max_seq_len, heads, size)) for side in "kv"]
    return plan


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device at run time; activations are an estimate, everything else is exact."""

    weights: int
    kv_ring: int
    kv_global: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_ring + self.kv_global + self.activations


def memory_plan(spec: GraphSpec) -> MemoryPlan:
    dtype = spec.model_dtype
    kv = kv_plan(spec.config, spec.max_seq_len, spec.cache_dtype, spec.options)
    weights = weight_bytes(spec.config, spec.plan)
    widest = max(p.N for p in spec.plan if p.K)
    scratch = min(max(p.N * p.K for p in spec.plan if p.K) * dtype.itemsize, spec.options.materialized_head_budget)
    per_token = (
        4 * spec.config.hidden_size + 3 * min(widest, 2 * max(layer.intermediate_size for layer in spec.config.layers))
    ) * dtype.itemsize
    return MemoryPlan(
        weights=weights,
        kv_ring=sum(b.nbytes for b in kv if b.kind == "ring"),
        kv_global=sum(b.nbytes for b in kv if b.kind == "global"),
        activations=spec.prefill_chunk * per_token + scratch + 4 * spec.config.vocab_size,
    )
