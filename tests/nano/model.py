"""Gemma 4 as the data sheet has it, in batches and with gradients: for training, and for reading long contexts with a cache of our choice.

`exporter/model/decoder.py` is the decoder of the product: one sequence, caches mutated in place, packed weights. Tests compare the two.
Parameters carry the GGUF file's tensor names. Shapes: B sequences, T tokens, D hidden size, H query heads, KV key/value heads, hd head
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFValueType
from torch import Tensor, nn

from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Heads
from kiln.exporter.model.families import gemma4
from kiln.exporter.model.records import Layer as LayerConfig
from kiln.exporter.model.records import ModelConfig
from kiln.exporter.source.config import check_tensors, expected_tensors, from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.weights import derived_constants
from kiln.exporter.tools import synth
from kiln.exporter.tools.quantize import quantize, to_float

NAME = "gemma4-nano"
FAR = 1 << 30  # the position of a key that is not there: after every query


def nano_config(vocab: int, hidden: int = 512, ffn: int = 512, layers: int = 12, heads: int = 2, window: int = 128) -> ModelConfig:
    """Five sliding layers (head size 256), then a full one (512, V is K): one key/value head, tied head, soft-cap 30."""
    geometry = replace(GEMMA4_31B, hidden=hidden, ffn=ffn, window=window, sliding=Heads(heads, 1, 256, 0), full=Heads(heads, 1, 512, 0))
    return ModelConfig(
        architecture="gemma4",
        name=NAME,
        vocab_size=vocab,
        hidden_size=hidden,
        rms_norm_eps=EPS,
        context_length=131072,
        tied_head=True,
        **gemma4.synthetic(geometry, layers),
    )


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, hd], cos and sin [B, 1, T, hd / 2]; pairs are (d, d + hd / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [..., H, T, hd], k and v [..., KV, S, hd], seen [..., 1, T, S] -> [..., H, T, hd]; scores are not scaled."""
    groups = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    scores = (q @ k.transpose(-1, -2)).float().masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def attend_banded(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, window: int) -> Tensor:
    """Sliding attention of whole sequences in blocks of `window` tokens, each with the block before it: T is a multiple of the window.

    q [B, H, T, hd], k and v [B, KV, T, hd], pos [B, T] rising, so that a key inside the window is at most `window` places away.
    """
    q, k, v = (x.unflatten(2, (-1, window)).transpose(1, 2) for x in (q, k, v))  # [B, blocks, heads, window, hd]
    pos = pos.unflatten(1, (-1, window))
    before = torch.cat((torch.full_like(pos[:, :1], FAR), pos[:, :-1]), 1)
    k, v = (torch.cat((torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1), x), 3) for x in (k, v))
    distance = pos[..., None] - torch.cat((before, pos), 2)[..., None, :]
    seen = (distance >= 0) & (distance < window)
    return attend(q, k, v, seen[:, :, None]).transpose(1, 2).flatten(2, 3)


class Cache:
    """Keys and values of one sequence. `write(layer, k, v)` sees what is stored and may change it (a quantizer, say).

    With an `exact_window` a query of a full layer reads those less than that many positions before it as `newest(layer, k, v)` leaves them.
    """

    def __init__(self, config: ModelConfig, slots: int, dtype: torch.dtype, device: str, write: Callable | None = None,
                 exact_window: int = 0, newest: Callable | None = None):  # fmt: skip
        self.config, self.length, self.write, self.exact_window, self.newest = config, 0, write, exact_window, newest
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.tails: dict[int, list[Tensor]] = {}  # full layer -> the newest keys and values, exact_window - 1 at most
        for layer in config.layers:
            kept = 0 if layer.mixer.window else slots
            for store in (self.k, self.v):
                store.append(torch.zeros(1, layer.mixer.kv_heads, kept, layer.mixer.head_dim, dtype=dtype, device=device))

    def update(self, layer: LayerConfig, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Stores k and v [1, KV, T, hd] of positions start .. start + T - 1 and returns what the chunk attends to, with its positions.

        With an exact window those of a full layer are the start + T stored ones, then the newest again.
        """
        newest = self.newest(layer, k, v) if self.newest else (k, v)
        if self.write:
            k, v = self.write(layer, k, v)
        i, end = layer.index, start + k.shape[2]
        if layer.mixer.window:
            keep = layer.mixer.window - 1
            held = min(start, self.k[i].shape[2])
            k = torch.cat((self.k[i][:, :, self.k[i].shape[2] - held :].to(k.dtype), k), 2)
            v = torch.cat((self.v[i][:, :, self.v[i].shape[2] - held :].to(v.dtype), v), 2)
            self.k[i], self.v[i] = k[:, :, -keep:], v[:, :, -keep:]
            return k, v, torch.arange(start - held, end, device=k.device)
        self.k[i][:, :, start:end] = k.to(self.k[i].dtype)
        self.v[i][:, :, start:end] = v.to(self.v[i].dtype)
        stored, pos = [x[i][:, :, :end].to(k.dtype) for x in (self.k, self.v)], torch.arange(end, device=k.device)
        if not self.exact_window:
            return *stored, pos
        before = self.tails.get(i, [x[:, :, :0] for x in newest])
        newest = [torch.cat(pair, 2) for pair in zip(before, newest, strict=True)]
        self.tails[i] = [x[:, :, -(self.exact_window - 1) :] for x in newest]
        again = torch.arange(end - newest[0].shape[2], end, device=k.device)
        return *(torch.cat(pair, 2) for pair in zip(stored, newest, strict=True)), torch.cat((pos, again))

    def fork(self) -> Cache:
        """A cache that goes on from here; the full layers' slots are shared, so forks are used one after another."""
        other = object.__new__(Cache)
        other.__dict__ = {**self.__dict__, "k": list(self.k), "v": list(self.v), "tails": dict(self.tails)}
        return other


class Weight(nn.Module):
    def __init__(self, *shape: int, fill: float | None = None, std: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, fill) if fill is not None else torch.randn(shape) * std)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        c = layer.mixer
        self.layer, self.eps, self.window = layer, config.rms_norm_eps, c.window
        self.kept: tuple[Tensor, Tensor] | None = None  # what it attends to, of the last call without a cache
        d, hd, ffn, q_dim, kv_dim = config.hidden_size, c.head_dim, layer.ffn.size, c.q_dim, c.kv_dim
        self.attn_norm, self.ffn_norm = Weight(d, fill=1.0), Weight(d, fill=1.0)
        branch = (2 * len(config.layers)) ** -0.5  # of the residual stream at first
        self.post_attention_norm, self.post_ffw_norm = Weight(d, fill=branch), Weight(d, fill=branch)
        self.attn_q_norm, self.attn_k_norm = Weight(hd, fill=hd**-0.25), Weight(hd, fill=hd**-0.25)  # scores of standard deviation 1
        self.attn_q, self.attn_k = Weight(q_dim, d, std=d**-0.5), Weight(kv_dim, d, std=d**-0.5)
        if c.value == "own":
            self.attn_v = Weight(kv_dim, d, std=d**-0.5)
        self.attn_output = Weight(d, q_dim, std=q_dim**-0.5)
        self.ffn_gate, self.ffn_up = Weight(ffn, d, std=d**-0.5), Weight(ffn, d, std=d**-0.5)
        self.ffn_down = Weight(d, ffn, std=ffn**-0.5)
        self.layer_output_scale = Weight(1, fill=1.0)

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        """x [B, T, D] float32, pos [B, T], cos and sin [B, 1, T, hd / 2]. With a cache: one sequence, at positions start, start + 1, ..."""
        c = self.layer.mixer
        h = norm(x, self.attn_norm.weight, self.eps)
        q = F.linear(h, self.attn_q.weight).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        k = F.linear(h, self.attn_k.weight).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        v = F.linear(h, self.attn_v.weight).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) if c.value == "own" else k
        dtype = q.dtype
        q = rotate(norm(q, self.attn_q_norm.weight, self.eps), cos, sin).to(dtype)
        k = rotate(norm(k, self.attn_k_norm.weight, self.eps), cos, sin).to(dtype)
        v = norm(v, None, self.eps).to(dtype)
        key_pos, self.kept = pos, None if cache is not None else (k, v)
        if cache is not None:
            k, v, key_pos = cache.update(self.layer, k, v, start)
            key_pos = key_pos[None]
        if self.window and cache is None and q.shape[2] % self.window == 0:
            out = attend_banded(q, k, v, pos, self.window)
        elif not self.window and cache is None:  # positions rise: the mask is causal
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            out = attend(q, k, v, seen)
        else:
            distance = pos[:, None, :, None] - key_pos[:, None, None, :]
            seen = (distance >= 0) & (distance < self.window) if self.window else distance >= 0
            if cache is not None and cache.exact_window and not self.window:
                stored = torch.arange(k.shape[2], device=k.device) < start + q.shape[2]
                seen &= stored == (distance >= cache.exact_window)
            out = attend(q, k, v, seen)
        x = x + norm(F.linear(out.transpose(1, 2).flatten(2), self.attn_output.weight), self.post_attention_norm.weight, self.eps)
        h = norm(x, self.ffn_norm.weight, self.eps)
        gate = F.gelu(F.linear(h, self.ffn_gate.weight), approximate="tanh")
        f = F.linear(gate * F.linear(h, self.ffn_up.weight), self.ffn_down.weight)
        x = x + norm(f, self.post_ffw_norm.weight, self.eps)
        return x * self.layer_output_scale.weight


class Nano(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.token_embd = Weight(config.vocab_size, config.hidden_size, std=config.hidden_size**-0.5)
        self.output_norm = Weight(config.hidden_size, fill=1.0)
        self.blk = nn.ModuleList(Layer(config, layer) for layer in config.layers)
        for name, rope in config.ropes.items():
            inv_freq = rope.base ** (-np.arange(0, rope.size, 2, dtype=np.float64) / rope.size)
            if rope.divisors:
                inv_freq[rope.size // 8 :] = 0  # the first quarter of the pairs rotates
            self.register_buffer(name, torch.from_numpy(inv_freq).float(), persistent=False)

    def hidden(self, tokens: Tensor, pos: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens, pos [B, T] int64 -> the normed state [B, T, D]. With a cache, positions go on from `cache.length`."""
        x = F.embedding(tokens, self.token_embd.weight).float() * math.sqrt(self.config.hidden_size)
        tables = {}
        for name in self.config.ropes:
            angle = pos.float()[:, None, :, None] * getattr(self, name)
            tables[name] = angle.cos(), angle.sin()
        for layer in self.blk:
            if cache is None:
                x = layer(x, pos, *tables[layer.layer.mixer.rope.constant])
            else:
                x = layer(x, pos, *tables[layer.layer.mixer.rope.constant], cache, cache.length)
        if cache is not None:
            cache.length += tokens.shape[1]
        return norm(x, self.output_norm.weight, self.config.rms_norm_eps)

    def logits(self, h: Tensor) -> Tensor:  # [..., D] -> [..., V] float32
        cap = self.config.final_logit_softcapping
        return torch.tanh(F.linear(h, self.token_embd.weight).float() / cap) * cap

    def forward(self, tokens: Tensor, pos: Tensor, cache: Cache | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, pos, cache))

    @torch.no_grad()
    def read(self, ids: list[int], cache: Cache, chunk: int = 4096) -> Tensor:
        """Feeds `ids` to the cache in chunks; the normed states [len(ids), D] of the last chunk."""
        device = self.token_embd.weight.device
        h = torch.empty(0)
        for at in range(0, len(ids), chunk):
            piece = torch.tensor(ids[at : at + chunk], device=device)[None]
            h = self.hidden(piece, torch.arange(cache.length, cache.length + piece.shape[1], device=device)[None], cache)
        return h[0]


# ---- GGUF ----


_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}


def save_gguf(model: Nano, tokenizer: dict[str, Any], path: str | Path, kind: str = "F32") -> None:
    """Writes the model: matrices as `kind` (F32 or BF16), vectors as F32. tokenizer: the metadata of `vocabulary.train`."""
    config, state = model.config, model.state_dict()
    metadata = [e for e in synth.metadata(config, "f32", None) if not e[0].startswith("tokenizer.")]
    for key, value in tokenizer.items():
        item = value[0] if isinstance(value, list) else value
        array = isinstance(value, list) and isinstance(item, int)
        metadata.append(synth.key_value(key, GGUFValueType.INT32 if array else _TYPES[type(item)], value))
    half = config.layers[-1].mixer.head_dim // 2
    state["rope_freqs.weight"] = torch.where(torch.arange(half) < half // 4, 1.0, 1e30)
    plan = [(name, shape, kind if len(shape) == 2 else "F32") for name, shape in expected_tensors(config).items()]
    header, offsets, size = synth.gguf_header(metadata, plan)
    data = bytearray(size)
    data[: len(header)] = header
    for (name, shape, tensor_kind), offset in zip(plan, offsets, strict=True):
        values = state[name].detach().float().cpu().numpy()
        if values.shape != shape:
            raise ValueError(f"{name} has shape {values.shape}, the file's is {shape}")
        raw = quantize(tensor_kind, values.reshape(-1, shape[-1]))
        data[offset : offset + raw.nbytes] = raw.tobytes()
    Path(path).write_bytes(data)


def load_gguf(path: str | Path, device: str = "cpu") -> Nano:
    """The model of a GGUF file in float32, quantized tensors dequantized."""
    file = open_gguf(path)
    config = from_gguf(file)
    check_tensors(config, file)
    with torch.device("meta"):
        model = Nano(config)
    names = [name for name in expected_tensors(config) if name != "rope_freqs.weight"]
    model.load_state_dict({name: torch.from_numpy(to_float(file, name).copy()) for name in names}, assign=True)
    for name, values in derived_constants(config, file).items():
        setattr(model, name, torch.from_numpy(values.copy()))
    return model.to(device).eval().requires_grad_(False)
