"""The plain Gemma 4 decoder: the reference that every pass and kernel is measured against.

Shapes: T tokens of one chunk, D hidden size, H query heads, KV key/value heads, hd head size, S cache slots, R ring slots, V vocabulary.
Norms, rotary embedding and GELU are called by name (`custom_ops/markers.py`, plain torch), so that passes can find them.
Sources: `docs/DESIGN.md` for the caches and the packed weights; the GGUF file for every hyper-parameter.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiln.custom_ops import ops  # noqa: F401  registers torch.ops.kiln
from kiln.custom_ops.dtypes import FLOATS
from kiln.custom_ops.weights.layouts import LAYOUTS
from kiln.exporter.errors import KilnError
from kiln.exporter.source.config import LayerConfig, ModelConfig
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


class SlidingCache(nn.Module):
    """A ring of R slots; slot = position mod R. Attend first, then write."""

    def __init__(self, layer: LayerConfig, window: int, max_seq_len: int, dtype: torch.dtype):
        super().__init__()
        self.window = window
        self.slots = min(window, max_seq_len)
        shape = (self.slots, layer.num_kv_heads, layer.head_dim)
        self.register_buffer("k_ring", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v_ring", torch.zeros(shape, dtype=dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        out = torch.ops.kiln.sliding_attention(q, k, v, self.k_ring, self.v_ring, pos, self.window)
        if q.shape[0] > 1:
            # of the tokens that share a slot only the last survives: all of them write its value, so the order does not matter
            last = torch.arange(q.shape[0], device=pos.device) + (pos[-1] - pos) // self.slots * self.slots
            k, v = k[last], v[last]
        slot = pos % self.slots
        self.k_ring[slot] = k
        self.v_ring[slot] = v
        return out


class GlobalCache(nn.Module):
    """One slot per position. Write first, then attend."""

    def __init__(self, layer: LayerConfig, max_seq_len: int, dtype: torch.dtype):
        super().__init__()
        shape = (max_seq_len, layer.num_kv_heads, layer.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        self.k_cache[pos] = k
        self.v_cache[pos] = v
        return torch.ops.kiln.global_attention(q, self.k_cache, self.v_cache, pos, None)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig, weights: dict[str, WeightPlan], max_seq_len: int, cache_dtype: torch.dtype):
        super().__init__()
        self.layer, self.eps, self.cache_dtype = layer, config.rms_norm_eps, cache_dtype
        for name, plan in weights.items():
            if plan.K:  # norms and scales are vectors
                setattr(self, name, Matrix(plan))
        d, eps = config.hidden_size, config.rms_norm_eps
        self.attn_norm, self.post_attention_norm = Norm(d, eps), Norm(d, eps)
        self.ffn_norm, self.post_ffw_norm = Norm(d, eps), Norm(d, eps)
        self.attn_q_norm, self.attn_k_norm = Norm(layer.head_dim, eps), Norm(layer.head_dim, eps)
        if config.has_layer_scale:
            self.layer_output_scale = nn.Module()
            self.layer_output_scale.weight = _constant(1, dtype=torch.float32)
        if layer.sliding:
            self.cache: nn.Module = SlidingCache(layer, config.sliding_window, max_seq_len, cache_dtype)
        else:
            self.cache = GlobalCache(layer, max_seq_len, cache_dtype)

    def qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, H, hd], raw k and v [T, KV, hd]; V is the raw K where the file has no attn_v."""
        c = self.layer
        q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if hasattr(self, "attn_qkv"):
            q, k, v = self.attn_qkv.linear(h).split((q_dim, kv_dim, kv_dim), dim=-1)
        else:
            if hasattr(self, "attn_qk"):
                q, k = self.attn_qk.linear(h).split((q_dim, kv_dim), dim=-1)
            else:
                q, k = self.attn_q.linear(h), self.attn_k.linear(h)
            v = self.attn_v.linear(h) if c.has_v else k
        return q.unflatten(-1, (-1, c.head_dim)), k.unflatten(-1, (-1, c.head_dim)), v.unflatten(-1, (-1, c.head_dim))

    def attention(self, h: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(h)
        q = torch.ops.kiln.rope(self.attn_q_norm(q, self.cache_dtype), cos, sin)
        k = torch.ops.kiln.rope(self.attn_k_norm(k, self.cache_dtype), cos, sin)
        v = torch.ops.kiln.rms_norm(v, None, self.eps, self.cache_dtype)
        out = self.cache.attend(q, k, v, pos).flatten(1)
        return self.attn_output.linear(out if out.dtype == h.dtype else out.to(h.dtype))

    def mlp(self, h: Tensor) -> Tensor:
        if hasattr(self, "ffn_gate_up"):
            gate, up = self.ffn_gate_up.linear(h).chunk(2, dim=-1)
        else:
            gate, up = self.ffn_gate.linear(h), self.ffn_up.linear(h)
        return self.ffn_down.linear(torch.ops.kiln.gelu_mul(gate, up))

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, D] -> [T, D]
        x = x + self.post_attention_norm(self.attention(self.attn_norm(x), pos, cos, sin))
        x = x + self.post_ffw_norm(self.mlp(self.ffn_norm(x)))
        if hasattr(self, "layer_output_scale"):
            x = (x.float() * self.layer_output_scale.weight).to(x.dtype)  # scales the whole residual stream
        return x


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
        if not config.layers:
            raise KilnError("the model has no layers")
        self.config, self.dtype = config, dtype
        weights = {p.name: p for p in plan}
        self.token_embd = Matrix(weights["token_embd"])
        self.output = None if config.tied_head else Matrix(weights["output"])
        self.output_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.blk = nn.ModuleList(
            Layer(config, layer, _below(weights, f"blk.{layer.index}."), max_seq_len, cache_dtype or dtype) for layer in config.layers
        )
        for sliding in (True, False):
            head_dim = next((layer.head_dim for layer in config.layers if layer.sliding == sliding), None)
            if head_dim:
                self.register_parameter(self._rope_name(sliding), _constant(head_dim // 2, dtype=torch.float32))
        if config.suppress_tokens:
            self.suppress_tokens = _constant(len(config.suppress_tokens), dtype=torch.int64)

    @staticmethod
    def _rope_name(sliding: bool) -> str:
        return "rope_inv_freq_sliding" if sliding else "rope_inv_freq_full"

    def rope_tables(self, pos: Tensor) -> dict[bool, tuple[Tensor, Tensor]]:
        tables = {}
        for sliding in (True, False):
            inv_freq = getattr(self, self._rope_name(sliding), None)
            if inv_freq is not None:
                angle = pos.float()[:, None] * inv_freq  # [T, hd / 2]; float32, or long positions collapse
                tables[sliding] = angle.cos(), angle.sin()
        return tables

    def hidden(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """tokens, pos [T] int64 -> [T, D] after the last layer."""
        x = (self.token_embd.rows(tokens) * math.sqrt(self.config.hidden_size)).to(self.dtype)
        tables = self.rope_tables(pos)
        for layer in self.blk:
            x = layer(x, pos, *tables[layer.layer.sliding])
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
