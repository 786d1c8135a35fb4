"""Codecs of the global layers' keys and values on a model that was really trained, in float32, so that only the caches differ.

    python -m tests.measure.kv_real MODEL.gguf TEXT... [--tokens 4096] [--every 8] [--codecs NAME;... | --built] [--out F.json]

MODEL is of family gemma3 (`make demo-real` fetches one), TEXT any files, read one after the other. Every codec plays the same tokens, and
each `--every`-th position's distribution is compared with that of float32 caches. Codes are decoded where they are written: this measures
the rounding, no kernel. --built instead plays the graphs that are compiled, as `kiln eval` does, of any family: float32 caches, and TQ4
with and without the center.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

from kiln.custom_ops.tq4 import codec
from kiln.exporter.measure.players import graph_player, piece_tokens
from kiln.exporter.model.records import Attention, ModelConfig
from kiln.exporter.source.plan import ModelPlan, read_plan
from kiln.exporter.text.encoder import Encoder

Tensor = torch.Tensor
Codec = Callable[[Tensor], Tensor]
Rows = tuple[list[int], Tensor]  # positions, and of each form their logits [forms, positions, V]
CHUNK, EXACT = 512, 256
DEPTHS = ((0, 1024), (1024, 4096), (4096, 16384), (16384, 1 << 20))


def exact(x: Tensor) -> Tensor:
    return x


def tq4(x: Tensor) -> Tensor:
    return codec.decode(*codec.encode(x))


def normal_levels(count: int) -> Tensor:
    """The Lloyd-Max levels of N(0, 1), by iteration over quantiles."""
    x, table = (torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in (200_000, count))
    for _ in range(400):
        at = torch.bucketize(x, (table[1:] + table[:-1]) / 2)
        table = torch.zeros(count, dtype=torch.float64).index_add_(0, at, x) / torch.bincount(at, minlength=count)
    return table.float()


def levels(bits: int) -> Codec:
    """TQ4's way with 2^bits levels."""
    table = normal_levels(1 << bits)

    def coded(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        z = codec.rotate(x) * torch.where(norm > 0, x.shape[-1] ** 0.5 / norm, 0.0)
        c = table[torch.bucketize(z, (table[1:] + table[:-1]) / 2)]
        return codec.unrotate(c * (norm / c.norm(dim=-1, keepdim=True)).half().float())

    return coded


def blocks(largest: int) -> Codec:
    """Rotated, in blocks of 32 with a float16 scale each: 127 as Q8_0, 8 as Q4_0."""

    def coded(x: Tensor) -> Tensor:
        b = codec.rotate(x).unflatten(-1, (-1, 32))
        top = b.gather(-1, b.abs().argmax(-1, keepdim=True))
        scale = top / -8 if largest == 8 else top.abs() / largest
        q = torch.where(scale != 0, b / scale, 0.0)
        q = (q + 8.5).floor().clamp(0, 15) - 8 if largest == 8 else q.round()
        return codec.unrotate((q * scale.half().float()).flatten(-2))

    return coded


@dataclass(frozen=True)
class Caches:
    keys: Codec
    values: Codec
    window: int  # newest positions that are read exactly
    mean: int = 0  # of so many first keys, taken off before coding


CODECS = {
    "float32": Caches(exact, exact, 0),
    "int4 blocks": Caches(blocks(8), blocks(8), 0),
    "TQ4": Caches(tq4, tq4, 0),
    "TQ4, 256 exact": Caches(tq4, tq4, EXACT),
    "TQ4, 256 exact, keys alone": Caches(tq4, exact, EXACT),
    "TQ4, 256 exact, values alone": Caches(exact, tq4, EXACT),
    "TQ4, 256 exact, keys less the mean of 256": Caches(tq4, tq4, EXACT, 256),
    "TQ4, 256 exact, keys less the mean of 248": Caches(tq4, tq4, EXACT, 248),
    "TQ4, 256 exact, keys less the mean of 192": Caches(tq4, tq4, EXACT, 192),
    "TQ4, 256 exact, keys less the mean of 128": Caches(tq4, tq4, EXACT, 128),
    "TQ4, 256 exact, keys less the mean of 64": Caches(tq4, tq4, EXACT, 64),
    "keys 5, values 4, 256 exact": Caches(levels(5), tq4, EXACT),
    "keys 6, values 4, 256 exact": Caches(levels(6), tq4, EXACT),
    "keys 6 less their mean, values 4, 256 exact": Caches(levels(6), tq4, EXACT, 256),
    "keys int8 blocks, values TQ4, 256 exact": Caches(blocks(127), tq4, EXACT),
}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, pos: Tensor, base: float, factor: float) -> Tensor:
    """x [..., T, D], the halves turn."""
    half = x.shape[-1] // 2
    angle = (pos.double() / factor)[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Gemma3:
    """The plain forward pass of all codecs at once, a chunk at a time: the streams [codecs, T, D]."""

    def __init__(self, path: Path, config: ModelConfig, codecs: list[Caches], tokens: int):
        if config.architecture != "gemma3":
            raise SystemExit(f"kv_real: {path} is of family {config.architecture}; expected gemma3, or --built")
        self.config, self.codecs = config, codecs
        self.w = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), np.float32)).reshape(*map(int, t.shape[::-1]))
                  for t in gguf.GGUFReader(path).tensors}  # fmt: skip
        shape = {i: (len(codecs), m.kv_heads, tokens, m.head_dim) for i, m in self.config.attentions.items()}
        self.kv = {i: (torch.zeros(s), torch.zeros(s)) for i, s in shape.items()}
        self.coded = {i: (torch.zeros(s), torch.zeros(s)) for i, s in shape.items() if self.config.attentions[i].window is None}

    def attend(self, i: int, m: Attention, q: Tensor, pos: Tensor) -> Tensor:
        first, end = int(pos[0]), int(pos[-1]) + 1
        k, v = (x[:, :, :end] for x in self.kv[i])
        at = torch.arange(end)
        seen = at <= pos[:, None]
        if m.window is not None:
            low = max(0, first - m.window + 1)
            mask = (seen & (pos[:, None] - at < m.window))[:, low:]
            return F.scaled_dot_product_attention(q, k[:, :, low:], v[:, :, low:], attn_mask=mask, scale=1.0, enable_gqa=True)
        out = []
        for n, c in enumerate(self.codecs):
            own_k, own_v, query = k[n], v[n], q[n].unflatten(0, (m.kv_heads, -1))  # [KV, G, T, D]
            kq, vq = (x[n, :, :end] for x in self.coded[i])
            low = max(0, first - c.window + 1)
            fresh = (pos[:, None] - at < c.window)[:, low:] if c.keys is not exact or c.values is not exact else torch.ones(1, 1) > 0
            scores = query @ kq[:, None].mT
            scores[..., low:] = torch.where(fresh, query @ own_k[:, None, low:].mT, scores[..., low:])
            p = scores.masked_fill(~seen, -math.inf).softmax(-1)
            mixed = p @ vq[:, None] + (p[..., low:] * fresh) @ (own_v - vq)[:, None, low:]
            out.append(mixed.flatten(0, 1))
        return torch.stack(out)

    def write(self, i: int, k: Tensor, v: Tensor, first: int) -> None:
        end = first + k.shape[2]
        for cache, x in zip(self.kv[i], (k, v), strict=True):
            cache[:, :, first:end] = x
        for n, c in enumerate(self.codecs if i in self.coded else ()):
            mean = self.kv[i][0][n, :, : c.mean].mean(1, keepdim=True) if c.mean else torch.zeros(1)
            self.coded[i][0][n, :, first:end] = c.keys(k[n] - mean) + mean
            self.coded[i][1][n, :, first:end] = c.values(v[n])

    def logits(self, tokens: Tensor, first: int, wanted: list[int]) -> Tensor:
        """[codecs, wanted, V] of a chunk that begins at position `first`; the first chunk is as long as the mean's keys at least."""
        w, eps = self.w, self.config.rms_norm_eps
        pos = torch.arange(first, first + len(tokens))
        x = (w["token_embd.weight"][tokens] * w["token_embd.weight"].shape[1] ** 0.5).repeat(len(self.codecs), 1, 1)
        for i, m in self.config.attentions.items():
            b = f"blk.{i}."
            h = norm(x, w[b + "attn_norm.weight"], eps)
            q, k, v = ((h @ w[f"{b}attn_{p}.weight"].T).unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for p in "qkv")
            q, k = (rope(norm(y, w[f"{b}attn_{p}_norm.weight"], eps), pos, m.rope.base, m.rope.factor) for y, p in ((q, "q"), (k, "k")))
            self.write(i, k, v, first)
            a = self.attend(i, m, q * m.scale, pos).transpose(1, 2).flatten(2)
            x = x + norm(a @ w[b + "attn_output.weight"].T, w[b + "post_attention_norm.weight"], eps)
            h = norm(x, w[b + "ffn_norm.weight"], eps)
            h = F.gelu(h @ w[b + "ffn_gate.weight"].T, approximate="tanh") * (h @ w[b + "ffn_up.weight"].T)
            x = x + norm(h @ w[b + "ffn_down.weight"].T, w[b + "post_ffw_norm.weight"], eps)
        return norm(x[:, wanted], w["output_norm.weight"], eps) @ w.get("output.weight", w["token_embd.weight"]).T


def codecs_of(model: Gemma3, tokens: Tensor, every: int) -> Iterator[Rows]:
    for first in range(0, len(tokens) - 1, CHUNK):
        scored = [p for p in range(first, min(first + CHUNK, len(tokens) - 1)) if p % every == every - 1]
        yield scored, model.logits(tokens[first : first + CHUNK], first, [p - first for p in scored])
        print(f"{first + CHUNK} tokens", flush=True)


def built(plan: ModelPlan, tokens: Tensor, every: int) -> tuple[list[str], Iterator[Rows]]:
    """Names and logits of the graphs that are compiled, over TQ4 caches in float32 activations, and over exact ones."""
    forms = {"float32": ("f32", True), "TQ4, keys as they are": ("tq4", False), "TQ4, keys less their center": ("tq4", True)}
    players = [graph_player(plan, cache, len(tokens), "cpu", "float32", key_center=center) for cache, center in forms.values()]

    def rows() -> Iterator[Rows]:
        first = 0
        for parts in zip(*(p.score(tokens.tolist(), piece_tokens(p.vocab_size)) for p in players), strict=True):
            end = min(first + len(parts[0]), len(tokens) - 1)
            scored = [p for p in range(first, end) if p % every == every - 1]
            yield scored, torch.stack([part[[p - first for p in scored]].float() for part in parts])
            first += len(parts[0])
            print(f"{first} tokens", flush=True)

    return list(forms), rows()


def study(pieces: Iterable[Rows], tokens: Tensor, names: list[str]) -> dict[str, dict]:
    """Of each form, the first the exact one: KL and perplexity of the scored positions, and KL by depth."""
    found: dict[str, list[tuple[int, float, float, bool]]] = {name: [] for name in names}
    for scored, logits in pieces:
        rows = logits.log_softmax(-1)
        right = tokens[[p + 1 for p in scored]]
        for name, row in zip(names, rows, strict=True):
            kl = (rows[0].exp() * (rows[0] - row)).sum(-1)
            nll = -row.gather(1, right[:, None])[:, 0]
            found[name] += zip(scored, kl.tolist(), nll.tolist(), (row.argmax(-1) == rows[0].argmax(-1)).tolist(), strict=True)
    record = {}
    for name, rows_ in found.items():
        position, kl, nll, kept = (np.array(column) for column in zip(*rows_, strict=True))
        parts = {str(low): float(kl[at].mean()) for low, high in DEPTHS if (at := (low <= position) & (position < high)).any()}
        record[name] = {"kl": float(kl.mean()), "se": float(kl.std() / len(kl) ** 0.5), "kl_from": parts,
                        "perplexity": math.exp(float(nll.mean())), "argmax": float(kept.mean())}  # fmt: skip
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.kv_real", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--codecs", default=";".join(CODECS), help="names, apart by ;")
    parser.add_argument("--built", action="store_true", help="the graphs that are compiled, not the codecs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    plan = read_plan(options.model)
    encoder = Encoder(plan.tokenizer.document())
    ids = torch.tensor(encoder.encode("".join(path.read_text() for path in options.text))[: options.tokens])
    with torch.inference_mode():
        if options.built:
            names, pieces = built(plan, ids, options.every)
        else:
            names = ["float32", *(n for n in options.codecs.split(";") if n != "float32")]
            pieces = codecs_of(Gemma3(options.model, plan.config, [CODECS[n] for n in names], options.tokens), ids, options.every)
        record = study(pieces, ids, names)
    for name, r in record.items():
        depths = ", ".join(f"from {low} {value:.3g}" for low, value in r["kl_from"].items())
        print(f"{name:45} KL {r['kl']:.3g} +- {r['se']:.1g} ({depths}), perplexity {r['perplexity']:.4f}, argmax {r['argmax']:.3f}")
    if options.out:
        options.out.write_text(json.dumps({"tokens": len(ids), "every": options.every, "codecs": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
