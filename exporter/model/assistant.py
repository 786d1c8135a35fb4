"""A model that drafts for another one: as a plain module over that one's caches, and as the entry `draft` of its artifact.

It reads the other's caches and has none. A round of drafts begins with a token that is in no cache yet, at position n, and with the model's
hidden row of position n - 1 behind its last norm. Each draft is asked at position n and sees the keys before it; the row that it leaves is
the next draft's in place of the model's. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kiln.custom_ops.attention.row_attention import attend_rows, in_window, ring_positions
from kiln.exporter.errors import KilnError
from kiln.exporter.model.decoder import CACHES, Block, Cache, Decoder, SlidingCache, below
from kiln.exporter.model.parts import Matrix, Norm, constant
from kiln.exporter.model.records import Attention, CacheSpec, DraftConfig, ModelConfig, cache_specs
from kiln.exporter.source.weights import DRAFT, WeightPlan
from kiln.passes.records import PassOptions

DRAFT_INPUTS = ("tokens", "pos", "last", "row")  # int64 [1], before `hidden` and the sampling inputs


class Before:
    """A cache as a token sees it that is not in it: the positions before its own."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def attend(self, q: Tensor, k: None, v: None, pos: Tensor, window: int | None, first: bool, last: bool) -> Tensor:
        """q [T, H, hd] -> [T, H, hd]. Of a window a token's own slot is one, which is empty."""
        if isinstance(self.cache, SlidingCache) and window is not None:
            slots = self.cache.k_ring.shape[0]
            keys = ring_positions(slots, pos)
            slot, seen = keys % slots, in_window(pos, keys, window) & (keys < pos[:, None])
            return attend_rows(q, self.cache.k_ring[slot], self.cache.v_ring[slot], seen)
        keys = torch.arange(self.cache.k_cache.shape[0], device=pos.device)
        shape = (len(pos), *self.cache.k_cache.shape)
        return attend_rows(q, self.cache.k_cache.expand(shape), self.cache.v_cache.expand(shape), keys < pos[:, None])

    def attend_rows(self, q: Tensor, k: None, v: None, last: Tensor, row: Tensor, window: int | None, first: bool) -> Tensor:
        """The same over the caches of several rows. last: the position before the token's, whose attention this is, one key shorter."""
        if isinstance(self.cache, SlidingCache) and window is not None:
            return torch.ops.kiln.sliding_rows(q, self.cache.k_ring, self.cache.v_ring, last, row, window - 1)
        return torch.ops.kiln.global_rows(q, self.cache.k_cache, self.cache.v_cache, last, row)


def _no_cache(cache: CacheSpec) -> Cache:
    raise AssertionError("a drafter's layer has no cache of its own")


def read_layers(config: DraftConfig) -> set[int]:
    """The model's layers whose keys and values the drafter reads."""
    return {mixer.kv_from for mixer in config.attentions.values() if mixer.kv_from is not None}


class Assistant(nn.Module):
    """`config` over `plan`, beside a model: `caches` are that one's by layer, `dtype` that of its activations."""

    def __init__(self, config: DraftConfig, plan: Sequence[WeightPlan], target: ModelConfig, caches: Mapping[int, Cache],
                 dtype: torch.dtype, cache_dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        weights = {p.name: p for p in plan}
        self.config, self.dtype = config, dtype
        self.token_embd = Matrix(weights["token_embd"])
        self.nextn_pre_projection, self.nextn_post_projection = (Matrix(weights[f"nextn_{at}_projection"]) for at in ("pre", "post"))
        self.output_norm = Norm(config.hidden_size, config.rms_norm_eps)
        specs = {cache.layer: cache for cache in cache_specs(target)}
        self.blk = nn.ModuleList()
        for layer in config.layers:
            assert isinstance(layer.mixer, Attention) and layer.mixer.kv_from is not None
            source = layer.mixer.kv_from
            if layer.mixer.window == 1:
                raise KilnError(f"{config.name}: layer {layer.index} reads a window of one token, which is the one that it has not")
            before: Any = SimpleNamespace(at=SimpleNamespace(cache=Before(caches[source])))
            own = below(weights, f"blk.{layer.index}.")
            self.blk.append(Block(config, layer, own, specs[source], _no_cache, cache_dtype or dtype, before))
        for name, rope in config.ropes.items():
            self.register_parameter(name, constant(rope.size // 2, dtype=torch.float32))

    rope_tables = Decoder.rope_tables

    def draft(self, embedding: Tensor, hidden: Tensor, pos: Tensor, row: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """embedding [T, D], the model's of each token, as its first layer gets it; hidden [T, D]; pos [T]
        -> float32 [T, V], hidden [T, D]. row [T]: over the caches of several rows, where pos is `last`, the position before."""
        x = self.nextn_pre_projection.linear(torch.cat((embedding, hidden), -1))
        tables = self.rope_tables(pos if row is None else pos + 1)
        theirs: Any = {layer: (None, None) for layer in read_layers(self.config)}
        for layer in self.blk:
            x = layer(x, pos, tables, theirs, None, row)
        normed = self.output_norm(x, torch.float32)
        return self.token_embd.linear(normed), self.nextn_post_projection.linear(normed)


class DraftStep(nn.Module):
    """The entry `draft`: a token behind those in a row's caches, and one that may come after it."""

    def __init__(self, target: ModelConfig, target_plan: Sequence[WeightPlan], config: DraftConfig, plan: Sequence[WeightPlan],
                 max_seq_len: int, dtype: torch.dtype, cache_dtype: torch.dtype, options: PassOptions):  # fmt: skip
        super().__init__()
        self.config, self.dtype = target, dtype
        self.token_embd = Matrix(next(p for p in target_plan if p.name == "token_embd"))
        self.blk, caches = nn.ModuleDict(), {}
        for cache in cache_specs(target):
            if cache.layer in read_layers(config):
                at = self.blk[str(cache.layer)] = nn.Module()
                at.cache = caches[cache.layer] = CACHES[cache.kind](cache, max_seq_len, cache_dtype, options, (options.rows,))
        self.add_module(DRAFT.removesuffix("."), Assistant(config, plan, target, caches, dtype, cache_dtype))

    embedding = Decoder.embedding

    def forward(
        self, tokens: Tensor, pos: Tensor, last: Tensor, row: Tensor, hidden: Tensor,
        temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [1] at pos [1], of which row [1] holds no key behind last [1]; hidden float32 [1, D], that of last or of the draft before;
        sampling [1] -> token [1] int64, logits [1, V] float32, hidden [1, D] float32."""
        logits, hidden = self.draft.draft(self.embedding(tokens), hidden.to(self.dtype), last, row)
        return torch.ops.kiln.sample(logits, temperature, top_k, top_p, seed, pos), logits, hidden
