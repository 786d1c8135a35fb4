"""The plain decoder of every family: the reference that every pass and kernel is measured against.

Shapes: T tokens of one chunk, D hidden size, H query heads, KV key/value heads, hd head size, S cache slots, R ring slots, V vocabulary;
M tokens of a step over B timelines, whose caches lie side by side.
Norms, rotary embedding and gates are called by name (`custom_ops/markers.py`, plain torch), so that passes can find them.
What differs from model to model is in its records (`records.py`). The parts of a layer keep their weights on the layer's own module, for
constants carry the names of the file's tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kiln.custom_ops import ops  # noqa: F401  registers torch.ops.kiln
from kiln.custom_ops.markers import GATED
from kiln.exporter.errors import KilnError
from kiln.exporter.model.caches import exact_buffers
from kiln.exporter.model.delta import DeltaMixer
from kiln.exporter.model.parts import Matrix, Norm, constant, vector
from kiln.exporter.model.records import Attention, CacheSpec, DeltaNet, Dense, Experts, Layer, ModelConfig, cache_specs
from kiln.exporter.source.weights import WeightPlan
from kiln.passes.records import PassOptions

SAMPLING_INPUTS = (("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32), ("seed", torch.int64))


class Cache(nn.Module):
    """The keys and values that a cache declares, zeros at first."""

    def __init__(self, cache: CacheSpec, max_seq_len: int, dtype: torch.dtype, options: PassOptions, lead: tuple[int, ...] = ()):
        super().__init__()
        for buffer in exact_buffers(cache, max_seq_len, dtype, options.spare_slots):
            self.register_buffer(buffer.name.rpartition(".")[2], torch.zeros(lead + buffer.shape, dtype=buffer.dtype))


class SlidingCache(Cache):
    """A ring of R slots; slot = position mod R. Attend first, then write: after the last of its readers.

    A step of M tokens writes first: the spare slots keep what its tokens attend to.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: int, first: bool = True, last: bool = True) -> Tensor:
        out = torch.ops.kiln.sliding_attention(q, k, v, self.k_ring, self.v_ring, pos, window)
        if not last:
            return out
        slots = self.k_ring.shape[0]
        if q.shape[0] > 1:
            # of the tokens that share a slot only the last survives: all of them write its value, so the order does not matter
            last = torch.arange(q.shape[0], device=pos.device) + (pos[-1] - pos) // slots * slots
            k, v = k[last], v[last]
        slot = pos % slots
        self.k_ring[slot] = k
        self.v_ring[slot] = v
        return out

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, row: Tensor, window: int, first: bool = True) -> Tensor:
        if first:
            slot = pos % self.k_ring.shape[1]
            self.k_ring[row, slot] = k
            self.v_ring[row, slot] = v
        return torch.ops.kiln.sliding_rows(q, self.k_ring, self.v_ring, pos, row, window)


class GlobalCache(Cache):
    """One slot per position. Write first, before the first of its readers, then attend."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: None, first: bool = True, last: bool = True) -> Tensor:
        if first:
            self.k_cache[pos] = k
            self.v_cache[pos] = v
        return torch.ops.kiln.global_attention(q, self.k_cache, self.v_cache, pos, None)

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, row: Tensor, window: None, first: bool = True) -> Tensor:
        if first:
            self.k_cache[row, pos] = k
            self.v_cache[row, pos] = v
        return torch.ops.kiln.global_rows(q, self.k_cache, self.v_cache, pos, row)


CACHES: dict[str, type[Cache]] = {"ring": SlidingCache, "global": GlobalCache}


class AttentionMixer:
    """Softmax attention over a cache: the layer's own, which it makes, or that of the earlier layer `source`."""

    def __init__(self, at: nn.Module, index: int, mixer: Attention, eps: float, cache: CacheSpec, make: Callable[[CacheSpec], Cache],
                 dtype: torch.dtype, source: AttentionMixer | None):  # fmt: skip
        self.at, self.index, self.mixer, self.eps, self.dtype = at, index, mixer, eps, dtype
        self.source, self.last = source, index == cache.readers[-1]
        self.q_rows = mixer.q_dim * (2 if mixer.gated else 1)
        if mixer.q_norm == "weighted":
            at.attn_q_norm = Norm(mixer.head_dim, eps)
        if source is None and mixer.k_norm == "weighted":
            at.attn_k_norm = Norm(mixer.head_dim, eps)
        if source is None:
            at.cache = make(cache)

    def qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, H, hd], raw k and v [T, KV, hd]; V is the raw K where the model has no V of its own.

        With a gate q is [T, H, 2 hd]: a head's query, then its gate.
        """
        at, c = self.at, self.mixer
        if hasattr(at, "attn_qkv"):
            q, k, v = at.attn_qkv.linear(h).split((self.q_rows, c.kv_dim, c.kv_dim), dim=-1)
        else:
            if hasattr(at, "attn_qk"):
                q, k = at.attn_qk.linear(h).split((self.q_rows, c.kv_dim), dim=-1)
            else:
                q, k = at.attn_q.linear(h), at.attn_k.linear(h)
            v = at.attn_v.linear(h) if c.value == "own" else k
        return q.unflatten(-1, (c.heads, -1)), k.unflatten(-1, (-1, c.head_dim)), v.unflatten(-1, (-1, c.head_dim))

    def _normed(self, x: Tensor, kind: str | None, name: str) -> Tensor:
        """In the cache's dtype."""
        weight = getattr(self.at, name).weight if kind == "weighted" else None
        return torch.ops.kiln.rms_norm(x, weight, self.eps, self.dtype) if kind else x if x.dtype == self.dtype else x.to(self.dtype)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        """A score is the product of a query and a key, so its scale is the query's."""
        form = (scale, self.mixer.rope.neighbours)
        return torch.ops.kiln.rope(x, cos, sin, *(() if form == (1.0, False) else form))

    def __call__(
        self, h: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, kv: dict[int, tuple[Tensor, Tensor]], row: Tensor | None
    ) -> Tensor:
        """kv: the chunk's keys and values as attention takes them, by the layer that made them. row [M]: each token's timeline; None: the
        one that there is."""
        c, at = self.mixer, self.at
        if c.kv_from is None:
            q, k, v = self.qkv(h)
        else:
            q = at.attn_q.linear(h).unflatten(-1, (c.heads, -1))
        q, gate = q.chunk(2, dim=-1) if c.gated else (q, None)
        q = self._rotated(self._normed(q, c.q_norm, "attn_q_norm"), cos, sin, c.scale)
        if c.kv_from is None:
            k = self._rotated(self._normed(k, c.k_norm, "attn_k_norm"), cos, sin, 1.0)
            v = self._normed(v, c.v_norm, "attn_v_norm")
            kv[self.index] = k, v
        else:
            k, v = kv[c.kv_from]
        cache = (self.source or self).at.cache
        if row is None:
            out = cache.attend(q, k, v, pos, c.window, c.kv_from is None, self.last)
        else:
            out = cache.attend_rows(q, k, v, pos, row, c.window, c.kv_from is None)
        out = out.flatten(1)
        if gate is not None:
            out = out * gate.flatten(1).float().sigmoid()
        return at.attn_output.linear(out if out.dtype == h.dtype else out.to(h.dtype))


class DenseFfn:
    """One gated network."""

    def __init__(self, at: nn.Module, ffn: Dense):
        self.at, self.gated = at, GATED[ffn.activation]

    def __call__(self, h: Tensor, x: Tensor) -> Tensor:  # normed and plain residual stream [T, D] -> [T, D]
        at = self.at
        if hasattr(at, "ffn_gate_up"):
            gate, up = at.ffn_gate_up.linear(h).chunk(2, dim=-1)
        else:
            gate, up = at.ffn_gate.linear(h), at.ffn_up.linear(h)
        return at.ffn_down.linear(self.gated(gate, up))


class ExpertsFfn:
    """Some of many gated networks, chosen for each token in float32, and where the model has one, a network beside them."""

    def __init__(self, at: nn.Module, ffn: Experts, hidden: int, eps: float):
        self.at, self.ffn, self.eps, self.gated = at, ffn, eps, GATED[ffn.activation]
        self.shared = DenseFfn(at, ffn.shared) if ffn.shared else None
        if ffn.shared_gated:
            at.shared_gate = vector(hidden)
        if ffn.own_input:
            at.ffn_gate_inp_scale = vector(hidden)
        if ffn.scaled:
            at.ffn_down_exps_scale = vector(ffn.count)
        names = (*(("pre_ffw_norm_2",) if ffn.own_input else ()), *(("post_ffw_norm_1", "post_ffw_norm_2") if ffn.branch_norms else ()))
        for name in names:
            setattr(at, name, Norm(hidden, eps))

    def route(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers [T, U] int64 and weights [T, U] float32 of each token's experts."""
        at, ffn = self.at, self.ffn
        z = h.float()
        if ffn.own_input:
            z = torch.ops.kiln.rms_norm(x, at.ffn_gate_inp_scale.weight, self.eps, torch.float32) * x.shape[-1] ** -0.5
        chosen, weights = torch.ops.kiln.route(at.ffn_gate_inp.linear(z), ffn.used, ffn.renormalized)
        return chosen, weights * at.ffn_down_exps_scale.weight[chosen] if ffn.scaled else weights

    def __call__(self, h: Tensor, x: Tensor) -> Tensor:
        at, count = self.at, self.ffn.count
        beside = self.shared(h, x) if self.shared else None
        if beside is not None and self.ffn.shared_gated:
            beside = (beside.float() * (h.float() * at.shared_gate.weight).sum(-1, keepdim=True).sigmoid()).to(h.dtype)
        if beside is not None and self.ffn.branch_norms:
            beside = at.post_ffw_norm_1(beside)
        chosen, weights = self.route(h, x)
        given = (at.pre_ffw_norm_2(x) if self.ffn.own_input else h).unsqueeze(1)
        if hasattr(at, "ffn_gate_up_exps"):
            gate, up = at.ffn_gate_up_exps.chosen(given, chosen, count).chunk(2, dim=-1)
        else:
            gate, up = at.ffn_gate_exps.chosen(given, chosen, count), at.ffn_up_exps.chosen(given, chosen, count)
        y = at.ffn_down_exps.chosen(self.gated(gate, up), chosen, count)  # [T, U, D]
        y = (y.float() * weights.unsqueeze(-1)).sum(1).to(h.dtype)
        if self.ffn.branch_norms:
            y = at.post_ffw_norm_2(y)
        return y if beside is None else beside + y


def ffn_of(at: nn.Module, ffn: Dense | Experts, hidden: int, eps: float) -> DenseFfn | ExpertsFfn:
    return ExpertsFfn(at, ffn, hidden, eps) if isinstance(ffn, Experts) else DenseFfn(at, ffn)


class Block(nn.Module):
    """A layer: its mixer, then its ffn, each a branch of the residual stream; the third is that of per-layer embeddings."""

    def __init__(self, config: ModelConfig, layer: Layer, weights: dict[str, WeightPlan], cache: CacheSpec,
                 make: Callable[[CacheSpec], Cache], cache_dtype: torch.dtype, source: AttentionMixer | None):  # fmt: skip
        super().__init__()
        self.layer = layer
        for name, plan in weights.items():
            if plan.K:  # norms and scales are vectors
                setattr(self, name, Matrix(plan))
        d, eps = config.hidden_size, config.rms_norm_eps
        for before, after in (("attn_norm", "post_attention_norm"), ("ffn_norm", "post_ffw_norm")):
            for name in (before, after) if layer.post_norms else (before,):
                setattr(self, name, Norm(d, eps))
        self.mix: AttentionMixer | DeltaMixer
        if isinstance(layer.mixer, DeltaNet):
            self.mix, self.table = DeltaMixer(self, layer.mixer, eps, cache), None
        else:
            self.mix = AttentionMixer(self, layer.index, layer.mixer, eps, cache, make, cache_dtype, source)
            self.table = layer.mixer.rope.constant
        self.ffn = ffn_of(self, layer.ffn, d, eps)
        if config.per_layer_embedding:
            self.gated, self.post_norm = GATED[config.per_layer_embedding.activation], Norm(d, eps)
        if layer.scaled:
            self.layer_output_scale = nn.Module()
            self.layer_output_scale.weight = constant(1, dtype=torch.float32)

    def forward(
        self, x: Tensor, pos: Tensor, tables: dict[str, tuple[Tensor, Tensor]], kv: dict[int, tuple[Tensor, Tensor]], own: Tensor | None,
        row: Tensor | None = None,
    ) -> Tensor:  # [T, D] -> [T, D]; own [T, P]: the layer's values of a per-layer embedding
        branch = self.mix(self.attn_norm(x), pos, *(() if self.table is None else (*tables[self.table], kv, row)))
        x = x + (self.post_attention_norm(branch) if self.layer.post_norms else branch)
        branch = self.ffn(self.ffn_norm(x), x)
        x = x + (self.post_ffw_norm(branch) if self.layer.post_norms else branch)
        if own is not None:
            x = x + self.post_norm(self.proj.linear(self.gated(self.inp_gate.linear(x), own)))
        if self.layer.scaled:
            x = (x.float() * self.layer_output_scale.weight).to(x.dtype)  # scales the whole residual stream
        return x


def check_supported(config: ModelConfig) -> None:
    """KilnError for what a record may say and no block computes yet."""
    for layer in config.layers:
        mixer, ffn, missing = layer.mixer, layer.ffn, ""
        if ffn.activation not in GATED:
            missing = f"activation {ffn.activation}"
        elif isinstance(mixer, DeltaNet):
            continue
        elif mixer.kv_from is not None and not _same_cache(config, layer.index, mixer.kv_from):
            missing = f"attention over the keys and values of layer {mixer.kv_from}, whose heads or window are others"
        if missing:
            raise KilnError(f"{config.name}: layer {layer.index} has {missing}, which the decoder does not compute")
    if config.per_layer_embedding and config.per_layer_embedding.activation not in GATED:
        raise KilnError(f"{config.name} has per-layer embeddings with activation {config.per_layer_embedding.activation}, "
                        "which the decoder does not compute")  # fmt: skip
    if not config.layers:
        raise KilnError("the model has no layers")


def _same_cache(config: ModelConfig, reader: int, source: int) -> bool:
    """The layer `source` comes before, has keys and values of its own, and they are those that `reader` takes."""
    own, other = config.attentions[reader], config.attentions.get(source)
    fields = ("kv_heads", "head_dim", "window", "rope")
    return other is not None and source < reader and other.kv_from is None and all(getattr(own, f) == getattr(other, f) for f in fields)


def below(weights: dict[str, WeightPlan], prefix: str) -> dict[str, WeightPlan]:
    return {name.removeprefix(prefix): plan for name, plan in weights.items() if name.startswith(prefix)}


class Decoder(nn.Module):
    """Tokens of one chunk in, the next token and the last position's logits out.

    Parameters carry the names of `kiln.exporter.source.weights.constants`; buffers are the KV caches and nothing else.
    """

    lead: tuple[int, ...] = ()  # of the caches' shapes, before one timeline's
    gives_hidden = False  # the rows behind the last norm, too, for a drafter

    def __init__(self, config: ModelConfig, plan: list[WeightPlan], max_seq_len: int, dtype: torch.dtype,
                 cache_dtype: torch.dtype | None = None, options: PassOptions | None = None):  # fmt: skip
        super().__init__()
        check_supported(config)
        self.config, self.dtype = config, dtype
        weights = {p.name: p for p in plan}
        self.token_embd = Matrix(weights["token_embd"])
        self.output = None if config.tied_head else Matrix(weights["output"])
        self.output_norm = Norm(config.hidden_size, config.rms_norm_eps)
        caches = {reader: cache for cache in cache_specs(config) for reader in cache.readers}
        self.blk = nn.ModuleList()

        def make(cache: CacheSpec) -> Cache:
            return CACHES[cache.kind](cache, max_seq_len, cache_dtype or dtype, options or PassOptions(), self.lead)

        for layer in config.layers:
            source = config.attentions[layer.index].kv_from if layer.index in config.attentions else None
            source = None if source is None else self.blk[source].mix
            self.blk.append(Block(config, layer, below(weights, f"blk.{layer.index}."), caches[layer.index], make,
                                  cache_dtype or dtype, source))  # fmt: skip
        if config.per_layer_embedding:
            self.per_layer_token_embd = Matrix(weights["per_layer_token_embd"])
            self.per_layer_model_proj = Matrix(weights["per_layer_model_proj"])
            self.per_layer_proj_norm = Norm(config.per_layer_embedding.size, config.rms_norm_eps)
        for name, rope in config.ropes.items():
            self.register_parameter(name, constant(rope.size // 2, dtype=torch.float32))
        if config.suppress_tokens:
            self.suppress_tokens = constant(len(config.suppress_tokens), dtype=torch.int64)

    def rope_tables(self, pos: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin [T, size / 2] by the names of the frequencies."""
        tables = {}
        for name in self.config.ropes:
            angle = pos.float()[:, None] * getattr(self, name)  # float32, or long positions collapse
            tables[name] = angle.cos(), angle.sin()
        return tables

    def embedding(self, tokens: Tensor) -> Tensor:
        """[T] -> [T, D] as the first layer gets it."""
        x = self.token_embd.rows(tokens)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        return x.to(self.dtype)

    def hidden(self, tokens: Tensor, pos: Tensor, row: Tensor | None = None) -> Tensor:
        """tokens, pos, row [T] int64 -> [T, D] after the last layer."""
        x = self.embedding(tokens)
        tables = self.rope_tables(pos)
        own, kv = self.per_layer(tokens, x), {}
        for i, layer in enumerate(self.blk):
            x = layer(x, pos, tables, kv, None if own is None else own.select(1, i), row)
        return x

    def per_layer(self, tokens: Tensor, x: Tensor) -> Tensor | None:
        """x [T, D], the first layer's -> [T, layers, P], a layer's values of the per-layer embedding; the rows of T tokens are read."""
        ple = self.config.per_layer_embedding
        if ple is None:
            return None
        rows = self.per_layer_token_embd.rows(tokens).unflatten(-1, (-1, ple.size)) * ple.scale
        projected = self.per_layer_model_proj.linear(x).unflatten(-1, (-1, ple.size)).float() * ple.projection_scale
        return ((rows + self.per_layer_proj_norm(projected)) * ple.sum_scale).to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """[T, D] -> soft-capped float32 [T, V]."""
        logits = (self.output or self.token_embd).linear(self.output_norm(x, torch.float32))
        cap = self.config.final_logit_softcapping
        if not cap:
            return logits
        return torch.where(torch.isfinite(logits), torch.tanh(logits / cap) * cap, torch.nan)  # tanh would make a number of Inf

    def forward(
        self, tokens: Tensor, pos: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor
    ) -> tuple[Tensor, ...]:  # tokens, pos [T] int64; sampling [1] -> token [1] int64, logits [1, V] float32, maybe hidden [1, D] float32
        return self.sampled(self.hidden(tokens, pos)[-1:], (temperature, top_k, top_p, seed), pos[-1:])

    def sampled(self, x: Tensor, sampling: tuple[Tensor, ...], pos: Tensor) -> tuple[Tensor, ...]:
        """x [T, D] after the last layer, sampling and pos [T] -> token [T], logits [T, V], where it gives them the rows [T, D]."""
        logits = self.logits(x)
        token = torch.ops.kiln.sample(self.allowed(logits), *sampling, pos)
        if not self.gives_hidden:
            return token, logits
        return token, logits, self.output_norm(x, torch.float32)  # behind the head's own, which a pass takes into the head

    def allowed(self, logits: Tensor) -> Tensor:
        """[T, V] with -inf for what is never sampled."""
        return logits.index_fill(1, self.suppress_tokens, float("-inf")) if self.config.suppress_tokens else logits


class RowDecoder(Decoder):
    """A step of M tokens, each of one of B timelines: as M steps of one token, in the order of their positions.

    Tokens of one timeline have consecutive positions. Two tokens of one row and position are the same token: that is padding.
    """

    def __init__(self, config: ModelConfig, plan: list[WeightPlan], max_seq_len: int, dtype: torch.dtype, cache_dtype: torch.dtype | None,
                 options: PassOptions):  # fmt: skip
        self.lead = (options.rows,)
        super().__init__(config, plan, max_seq_len, dtype, cache_dtype, options)

    def forward(  # type: ignore[override]  # with the timelines
        self, tokens: Tensor, pos: Tensor, row: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor
    ) -> tuple[Tensor, ...]:  # tokens, pos, row [M] int64; sampling [M] -> token [M] int64, logits [M, V] float32, maybe hidden [M, D]
        return self.sampled(self.hidden(tokens, pos, row), (temperature, top_k, top_p, seed), pos)
