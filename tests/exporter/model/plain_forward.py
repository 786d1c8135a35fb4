"""Forward passes of small files straight from their tensors, in float64: what families without a fixture are compared with.

Written from the formulas of the formats' documents, and sharing nothing with the exporter but the reader of the container.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.tools.quantize import to_float


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def yarn(dim: int, theta: float, factor: float, context: int, fast: float, slow: float) -> list[float]:
    """The speed of each pair (arXiv:2309.00071, and what implementations round)."""

    def pair_with(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_with(fast)), 0), min(math.ceil(pair_with(slow)), dim - 1)
    kept = [1 - min(max((d - low) / (high - low or 0.001), 0), 1) for d in range(dim // 2)]
    return [(share + (1 - share) / factor) / theta ** (2 * d / dim) for d, share in enumerate(kept)]


def _speeds(m: Mapping, family: str, theta: float, dim: int) -> tuple[Tensor, float]:
    """Radians a position of each pair, and what turning multiplies a vector by. A file that is asked for YaRN names all it takes."""
    s = f"{family}.rope.scaling."
    if m.get(s + "type") != "yarn":
        return theta ** (-torch.arange(0, dim, 2).double() / dim), 1.0
    factor = m[s + "factor"]
    speeds = yarn(dim, theta, factor, m[s + "original_context_length"], m[s + "yarn_beta_fast"], m[s + "yarn_beta_slow"])
    return torch.tensor(speeds).double(), 1 + math.log(factor) / 10


def _turned(x: Tensor, speeds: Tensor, magnitude: float, neighbours: bool) -> Tensor:
    """x [T, heads, D]; pairs are (2d, 2d + 1), or (d, d + D / 2); position t turns pair d by t times its speed."""
    angle = torch.arange(len(x)).double()[:, None] * speeds
    turn = torch.polar(torch.full_like(angle, magnitude), angle)[:, None]
    pairs = x.unflatten(-1, (-1, 2)) if neighbours else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return turned.flatten(-2) if neighbours else turned.transpose(-1, -2).flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """[T, H, D], [T, KV, D] twice; query head j reads head j // (H / KV)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[2] ** 0.5
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    seen = (distance >= 0) & (distance < (window or len(q)))
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def logits(path: Path, tokens: Tensor) -> Tensor:
    """[T, V] of a gemma3 or llama file."""
    file = open_gguf(path)
    m, w = file.metadata, {name: torch.from_numpy(to_float(file, name).copy()).double() for name in file.tensors}
    family = m["general.architecture"]
    gemma = family == "gemma3"
    heads, hidden = m[f"{family}.attention.head_count"], m[f"{family}.embedding_length"]
    eps, dim = m[f"{family}.attention.layer_norm_rms_epsilon"], m[f"{family}.attention.key_length"]
    x = w["token_embd.weight"][tokens] * (hidden**0.5 if gemma else 1)
    for i in range(m[f"{family}.block_count"]):

        def t(name: str, i: int = i) -> Tensor:
            return w[f"blk.{i}.{name}.weight"]

        h = _rms(x, t("attn_norm"), eps)
        q, k, v = ((h @ t(f"attn_{n}").T).unflatten(-1, (-1, dim)) for n in "qkv")
        if gemma:
            q, k = _rms(q, t("attn_q_norm"), eps), _rms(k, t("attn_k_norm"), eps)
        sliding = gemma and (i + 1) % 6 != 0
        theta = m[f"{family}.rope.freq_base" + ("_swa" if sliding else "")]
        turn = (*_speeds(m, family, theta, dim), not gemma)
        out = _attention(_turned(q, *turn), _turned(k, *turn), v, m["gemma3.attention.sliding_window"] if sliding else None)
        assert out.shape[1] == heads
        branch = out.flatten(1) @ t("attn_output").T
        x = x + (_rms(branch, t("post_attention_norm"), eps) if gemma else branch)
        h = _rms(x, t("ffn_norm"), eps)
        gate, up = h @ t("ffn_gate").T, h @ t("ffn_up").T
        gate = torch.nn.functional.gelu(gate, approximate="tanh") if gemma else torch.nn.functional.silu(gate)
        branch = (gate * up) @ t("ffn_down").T
        x = x + (_rms(branch, t("post_ffw_norm"), eps) if gemma else branch)
    head = w.get("output.weight", w["token_embd.weight"])
    return _rms(x, w["output_norm.weight"], eps) @ head.T
