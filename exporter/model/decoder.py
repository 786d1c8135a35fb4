"""The plain decoder of every family: the reference that every pass and kernel is measured against.

Shapes: T tokens of one chunk, D hidden size, H query heads, KV key/value heads, hd head size, S cache slots, R ring slots, V vocabulary.
Norms, rotary embedding and gates are called by name (`custom_ops/markers.py`, plain torch), so that passes can find them.
What differs from model to model is in its records (`records.py`). The parts of a layer keep their weights on the layer's own module, for
constants carry the names of the file's tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiln.custom_ops import ops  # noqa: F401  registers torch.ops.kiln
from kiln.custom_ops.dtypes import FLOATS
from kiln.custom_ops.markers import GATED
from kiln.custom_ops.weights.layouts import LAYOUTS
from kiln.exporter.errors import KilnError
from kiln.exporter.model.caches import exact_buffers
from kiln.exporter.model.records import Attention, CacheSpec, Dense, Layer, ModelConfig, cache_specs
from kiln.exporter.source.weights import WeightPlan

SAMPLING_INPUTS = (("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32), ("seed", torch.int64))


def _constant(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Matrix(nn.Module):
    """One weight [N, K] of the plan: packed planes of a block type, or a float tensor."""

    def __init__(self, plan: WeightPlan):
        super().__init__()
        self.block_type = plan.block_type
        if plan.block_type in LAYOUTS:
            layout = LAYOUTS[plan.block_type]
            groups = plan.K // layout.block
            self.words = _constant(groups, layout.words, plan.N, dtype=torch.int32)
            self.halves = _constant(groups, layout.halves, plan.N, dtype=torch.float16)
        else:
            self.weight = _constant(plan.N, plan.K, dtype=FLOATS[plan.block_type].torch)

    def linear(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        if self.block_type in LAYOUTS:
            return torch.ops.kiln.quantized_linear(x, self.words, self.halves, self.block_type)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)  # a float weight is never rounded
        return F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:  # [T] -> [T, K] float32
        if self.block_type in LAYOUTS:
            return torch.ops.kiln.quantized_embedding(ids, self.words, self.halves, self.block_type)
        return F.embedding(ids.clamp(min=0), self.weight).float()  # -1: this step is queued behind one that found no token


class Norm(nn.Module):
    """RMSNorm in float32; the epsilon is inside the root, the weight is stored as it is (no +1)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = _constant(size, dtype=torch.float32)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # [..., size] -> the same, in `dtype`
        return torch.ops.kiln.rms_norm(x, self.weight, self.eps, dtype or x.dtype)


class Cache(nn.Module):
    """The keys and values that a cache declares, zeros at first."""

    def __init__(self, cache: CacheSpec, max_seq_len: int, dtype: torch.dtype):
        super().__init__()
        for buffer in exact_buffers(cache, max_seq_len, dtype):
            self.register_buffer(buffer.name.rpartition(".")[2], torch.zeros(buffer.shape, dtype=buffer.dtype))


class SlidingCache(Cache):
    """A ring of R slots; slot = position mod R. Attend first, then write."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: int) -> Tensor:
        out = torch.ops.kiln.sliding_attention(q, k, v, self.k_ring, self.v_ring, pos, window)
        slots = self.k_ring.shape[0]
        if q.shape[0] > 1:
            # of the tokens that share a slot only the last survives: all of them write its value, so the order does not matter
            last = torch.arange(q.shape[0], device=pos.device) + (pos[-1] - pos) // slots * slots
            k, v = k[last], v[last]
        slot = pos % slots
        self.k_ring[slot] = k
        self.v_ring[slot] = v
        return out


class GlobalCache(Cache):
    """One slot per position. Write first, then attend."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: None) -> Tensor:
        self.k_cache[pos] = k
        self.v_cache[pos] = v
        return torch.ops.kiln.global_attention(q, self.k_cache, self.v_cache, pos, None)


CACHES: dict[str, type[Cache]] = {"ring": SlidingCache, "global": GlobalCache}


class AttentionMixer:
    """Softmax attention over the layer's own cache."""

    def __init__(self, at: nn.Module, mixer: Attention, eps: float, cache: CacheSpec, max_seq_len: int, dtype: torch.dtype):
        self.at, self.mixer, self.eps, self.dtype = at, mixer, eps, dtype
        if mixer.q_norm == "weighted":
            at.attn_q_norm = Norm(mixer.head_dim, eps)
        if mixer.k_norm == "weighted":
            at.attn_k_norm = Norm(mixer.head_dim, eps)
        at.cache = CACHES[cache.kind](cache, max_seq_len, dtype)

    def qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, H, hd], raw k and v [T, KV, hd]; V is the raw K where the model has no V of its own."""
        at, c = self.at, self.mixer
        if hasattr(at, "attn_qkv"):
            q, k, v = at.attn_qkv.linear(h).split((c.q_dim, c.kv_dim, c.kv_dim), dim=-1)
        else:
            if hasattr(at, "attn_qk"):
                q, k = at.attn_qk.linear(h).split((c.q_dim, c.kv_dim), dim=-1)
            else:
                q, k = at.attn_q.linear(h), at.attn_k.linear(h)
            v = at.attn_v.linear(h) if c.value == "own" else k
        return q.unflatten(-1, (-1, c.head_dim)), k.unflatten(-1, (-1, c.head_dim)), v.unflatten(-1, (-1, c.head_dim))

    def _normed(self, x: Tensor, kind: str | None, name: str) -> Tensor:
        """In the cache's dtype."""
        weight = getattr(self.at, name).weight if kind == "weighted" else None
        return torch.ops.kiln.rms_norm(x, weight, self.eps, self.dtype) if kind else x if x.dtype == self.dtype else x.to(self.dtype)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        """A score is the product of a query and a key, so its scale is the query's."""
        form = (scale, self.mixer.rope.neighbours)
        return torch.ops.kiln.rope(x, cos, sin, *(() if form == (1.0, False) else form))

    def __call__(self, h: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.mixer
        q, k, v = self.qkv(h)
        q = self._rotated(self._normed(q, c.q_norm, "attn_q_norm"), cos, sin, c.scale)
        k = self._rotated(self._normed(k, c.k_norm, "attn_k_norm"), cos, sin, 1.0)
        v = self._normed(v, c.v_norm, "attn_v_norm")
        out = self.at.cache.attend(q, k, v, pos, c.window).flatten(1)
        return self.at.attn_output.linear(out if out.dtype == h.dtype else out.to(h.dtype))


class DenseFfn:
    """One gated network."""

    def __init__(self, at: nn.Module, ffn: Dense):
        self.at, self.gated = at, GATED[ffn.activation]

    def __call__(self, h: Tensor) -> Tensor:
        at = self.at
        if hasattr(at, "ffn_gate_up"):
            gate, up = at.ffn_gate_up.linear(h).chunk(2, dim=-1)
        else:
            gate, up = at.ffn_gate.linear(h), at.ffn_up.linear(h)
        return at.ffn_down.linear(self.gated(gate, up))


class Block(nn.Module):
    """A layer: its mixer, then its ffn, each a branch of the residual stream."""

    def __init__(self, config: ModelConfig, layer: Layer, weights: dict[str, WeightPlan], cache: CacheSpec, max_seq_len: int,
                 cache_dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.layer = layer
        for name, plan in weights.items():
            if plan.K:  # norms and scales are vectors
                setattr(self, name, Matrix(plan))
        d, eps = config.hidden_size, config.rms_norm_eps
        for before, after in (("attn_norm", "post_attention_norm"), ("ffn_norm", "post_ffw_norm")):
            for name in (before, after) if layer.post_norms else (before,):
                setattr(self, name, Norm(d, eps))
        self.mix = AttentionMixer(self, layer.mixer, eps, cache, max_seq_len, cache_dtype)
        self.ffn = DenseFfn(self, layer.ffn)
        if layer.scaled:
            self.layer_output_scale = nn.Module()
            self.layer_output_scale.weight = _constant(1, dtype=torch.float32)

    def forward(self, x: Tensor, pos: Tensor, tables: dict[str, tuple[Tensor, Tensor]]) -> Tensor:  # [T, D] -> [T, D]
        branch = self.mix(self.attn_norm(x), pos, *tables[self.layer.mixer.rope.constant])
        x = x + (self.post_attention_norm(branch) if self.layer.post_norms else branch)
        branch = self.ffn(self.ffn_norm(x))
        x = x + (self.post_ffw_norm(branch) if self.layer.post_norms else branch)
        if self.layer.scaled:
            x = (x.float() * self.layer_output_scale.weight).to(x.dtype)  # scales the whole residual stream
        return x


def check_supported(config: ModelConfig) -> None:
    """KilnError for what a record may say and no block computes yet."""
    for layer in config.layers:
        mixer, ffn, missing = layer.mixer, layer.ffn, ""
        if not isinstance(mixer, Attention):
            missing = f"a {type(mixer).__name__} mixer"
        elif mixer.kv_from is not None:
            missing = "attention over another layer's keys and values"
        elif mixer.gated:
            missing = "gated attention"
        elif mixer.rope.size != mixer.head_dim:
            missing = f"rotary embedding of {mixer.rope.size} of {mixer.head_dim} dimensions"
        elif not isinstance(ffn, Dense):
            missing = "experts"
        elif ffn.activation not in GATED:
            missing = f"activation {ffn.activation}"
        if missing:
            raise KilnError(f"{config.name}: layer {layer.index} has {missing}, which the decoder does not compute")
    if config.per_layer_embedding:
        raise KilnError(f"{config.name} has per-layer embeddings, which the decoder does not compute")
    if not config.layers:
        raise KilnError("the model has no layers")


def _below(weights: dict[str, WeightPlan], prefix: str) -> dict[str, WeightPlan]:
    return {name.removeprefix(prefix): plan for name, plan in weights.items() if name.startswith(prefix)}


class Decoder(nn.Module):
    """Tokens of one chunk in, the next token and the last position's logits out.

    Parameters carry the names of `kiln.exporter.source.weights.constants`; buffers are the KV caches and nothing else.
    """

    def __init__(
        self, config: ModelConfig, plan: list[WeightPlan], max_seq_len: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
    ):
        super().__init__()
        check_supported(config)
        self.config, self.dtype = config, dtype
        weights = {p.name: p for p in plan}
        self.token_embd = Matrix(weights["token_embd"])
        self.output = None if config.tied_head else Matrix(weights["output"])
        self.output_norm = Norm(config.hidden_size, config.rms_norm_eps)
        caches = {cache.layer: cache for cache in cache_specs(config)}
        self.blk = nn.ModuleList(
            Block(config, layer, _below(weights, f"blk.{layer.index}."), caches[layer.index], max_seq_len, cache_dtype or dtype)
            for layer in config.layers
        )
        for name, rope in config.ropes.items():
            self.register_parameter(name, _constant(rope.size // 2, dtype=torch.float32))
        if config.suppress_tokens:
            self.suppress_tokens = _constant(len(config.suppress_tokens), dtype=torch.int64)

    def rope_tables(self, pos: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin [T, size / 2] by the names of the frequencies."""
        tables = {}
        for name in self.config.ropes:
            angle = pos.float()[:, None] * getattr(self, name)  # float32, or long positions collapse
            tables[name] = angle.cos(), angle.sin()
        return tables

    def hidden(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """tokens, pos [T] int64 -> [T, D] after the last layer."""
        x = self.token_embd.rows(tokens)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        x = x.to(self.dtype)
        tables = self.rope_tables(pos)
        for layer in self.blk:
            x = layer(x, pos, tables)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """[T, D] -> soft-capped float32 [T, V]."""
        logits = (self.output or self.token_embd).linear(self.output_norm(x, torch.float32))
        cap = self.config.final_logit_softcapping
        if not cap:
            return logits
        return torch.where(torch.isfinite(logits), torch.tanh(logits / cap) * cap, torch.nan)  # tanh would make a number of Inf

    def forward(
        self, tokens: Tensor, pos: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor]:  # tokens, pos [T] int64; sampling [1] -> token [1] int64, logits [1, V] float32
        logits = self.logits(self.hidden(tokens, pos)[-1:])
        allowed = logits
        if self.config.suppress_tokens:
            allowed = logits.index_fill(1, self.suppress_tokens, float("-inf"))
        return torch.ops.kiln.sample(allowed, temperature, top_k, top_p, seed, pos[-1:]), logits
