"""What an artifact will hold and need, before anything is computed: KV bytes, weight bytes, run-time memory."""

from __future__ import annotations

from dataclasses import dataclass

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.compiler.trace import GraphSpec
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.model.records import DeltaNet
from kiln.exporter.source.weights import plan_constants, weight_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device at run time, caches of all rows; activations are an estimate, everything else is exact. host_weights: in the
    host's memory, not in the total."""

    weights: int
    host_weights: int
    kv_ring: int
    kv_global: int
    kv_state: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_ring + self.kv_global + self.kv_state + self.activations


def memory_plan(spec: GraphSpec, ple: str = "device") -> MemoryPlan:
    """ple: where a table lies of which only rows are read."""
    dtype = spec.model_dtype
    rows = spec.options.rows
    kv = kv_plan(spec.config, spec.max_seq_len, spec.cache_dtype, spec.options)
    weights = weight_bytes(spec.config, spec.plan) + (weight_bytes(spec.drafter.config, spec.drafter.plan) if spec.drafter else 0)
    on_host = sum(c.nbytes for p in spec.plan if p.gathered for c in plan_constants(p)) if ple == "host" else 0
    multiplied = [p for p in spec.plan if p.K and not p.gathered]
    widest = max(p.N for p in multiplied)
    # what is written in the activations' dtype before it is multiplied
    dense = [p for p in multiplied if not spec.options.reads_packed or p.block_type not in LAYOUTS or p.stack > 1]
    scratch = min(max((p.N * p.K for p in dense), default=0) * dtype.itemsize, spec.options.materialized_head_budget)
    inner = max(layer.ffn.width for layer in spec.config.layers)
    per_token = (4 * spec.config.hidden_size + 3 * min(widest, 2 * inner)) * dtype.itemsize
    if table := spec.config.per_layer_embedding:  # rows and their sum with the projection, in float32, and what is kept
        per_token += len(spec.config.layers) * table.size * (4 + 4 + 2 * dtype.itemsize)
    rules = [layer.mixer for layer in spec.config.layers if isinstance(layer.mixer, DeltaNet)]
    per_token += max((m.token_scratch for m in rules), default=0)
    return MemoryPlan(
        weights=weights - on_host,
        host_weights=on_host,
        kv_ring=rows * sum(b.nbytes for b in kv if b.kind == "ring"),
        kv_global=rows * sum(b.nbytes for b in kv if b.kind in ("global", "prefix")),
        kv_state=rows * sum(b.nbytes for b in kv if b.kind == "state"),
        activations=spec.prefill_chunk * per_token + scratch + 4 * spec.config.vocab_size * spec.options.decode_rows[-1],
    )
