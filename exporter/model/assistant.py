"""A model that drafts for another one, as a plain module: a reference, in no artifact yet.

It reads the other's caches and has none. A round of drafts begins with a token that is in no cache yet, at position n, and with the model's
hidden row of position n - 1 behind its last norm. Each draft is asked at position n and sees the keys before it; the row that it leaves is
the next draft's in place of the model's. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from kiln.custom_ops.attention.row_attention import attend_rows, in_window, ring_positions
from kiln.exporter.model.decoder import Block, Cache, Decoder, SlidingCache
from kiln.exporter.model.parts import Matrix, Norm, constant
from kiln.exporter.model.records import DraftConfig, cache_specs
from kiln.exporter.source.weights import WeightPlan


class Before:
    """A cache as a token sees it that is not in it: the positions before its own."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def attend(self, q: Tensor, k: None, v: None, pos: Tensor, window: int | None, first: bool, last: bool) -> Tensor:
        """q [T, H, hd] -> [T, H, hd]. Of a window a token's own slot is one, which is empty."""
        if isinstance(self.cache, SlidingCache):
            assert window is not None
            slots = self.cache.k_ring.shape[0]
            keys = ring_positions(slots, pos)
            slot, seen = keys % slots, in_window(pos, keys, window) & (keys < pos[:, None])
            return attend_rows(q, self.cache.k_ring[slot], self.cache.v_ring[slot], seen)
        keys = torch.arange(self.cache.k_cache.shape[0], device=pos.device)
        shape = (len(pos), *self.cache.k_cache.shape)
        return attend_rows(q, self.cache.k_cache.expand(shape), self.cache.v_cache.expand(shape), keys < pos[:, None])


class Assistant(nn.Module):
    """`config` over `plan`, beside the model that it drafts for."""

    def __init__(self, config: DraftConfig, plan: Sequence[WeightPlan], target: Decoder):
        super().__init__()
        weights = {p.name: p for p in plan}
        self.config, self.dtype = config, target.dtype
        self.token_embd = Matrix(weights["token_embd"])
        self.nextn_pre_projection, self.nextn_post_projection = (Matrix(weights[f"nextn_{at}_projection"]) for at in ("pre", "post"))
        self.output_norm = Norm(config.hidden_size, config.rms_norm_eps)
        caches = {cache.layer: cache for cache in cache_specs(target.config)}
        self.blk = nn.ModuleList()
        for layer in config.layers:
            source = layer.mixer.kv_from  # type: ignore[union-attr]
            prefix = f"blk.{layer.index}."
            own = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
            before = SimpleNamespace(at=SimpleNamespace(cache=Before(target.blk[source].cache)))
            self.blk.append(Block(config, layer, own, caches[source], lambda cache: Cache(cache, 0, self.dtype, None), self.dtype, before))
        for name, rope in config.ropes.items():
            self.register_parameter(name, constant(rope.size // 2, dtype=torch.float32))

    rope_tables = Decoder.rope_tables

    def draft(self, embedding: Tensor, hidden: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """embedding [T, D], the model's of each token, as its first layer gets it; hidden [T, D]; pos [T]
        -> float32 [T, V], hidden [T, D]."""
        x = self.nextn_pre_projection.linear(torch.cat((embedding, hidden), -1))
        tables = self.rope_tables(pos)
        theirs = {mixer.kv_from: (None, None) for mixer in self.config.attentions.values()}
        for layer in self.blk:
            x = layer(x, pos, tables, theirs, None)
        return self.token_embd.linear(self.output_norm(x, torch.float32)), self.nextn_post_projection.linear(self.output_norm(x))
