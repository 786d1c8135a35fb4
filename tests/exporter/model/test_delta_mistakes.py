"""Mistakes in gated delta rules and gated attention that still give fluent text: each, made on purpose, misses the reference by far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kiln.custom_ops.delta import chunk, rule, step
from kiln.exporter.model import decoder
from kiln.exporter.model.records import Attention, ModelConfig
from kiln.exporter.source import weights as planned
from tests.exporter.model.test_expert_mistakes import each, ffn, renamed
from tests.exporter.model.test_families import MODELS, Model, model_file
from tests.exporter.model.test_mistakes import RIGHT, WRONG, miss
from tests.timeline import feed, graph_spec, weights, worst

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE, MOE = (next(m for m in MODELS if m.name == name) for name in ("qwen35-tiny-mtp", "qwen35moe-tiny-mtp"))
SMALL = 2e-3  # of what is hardly more than rounding
HEADS, SIZE, TURNED = 2, 32, 8  # of the attention of both
State = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def projections_apart():
    """Each by its own name: the packer joins none of a delta rule's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "_FUSIONS", tuple(f for f in planned._FUSIONS if not f[0].startswith("ssm_")))
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[Path, State]]:
    files = tmp_path_factory.mktemp("mistakes")
    found = {model.name: model_file(model, files) for model in (DENSE, MOE)}
    return {name: (path, weights(path, files)) for name, path in found.items()}


def attention(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    def mixer(m):
        return replace(m, **{k: v(m) if callable(v) else v for k, v in changes.items()}) if isinstance(m, Attention) else m

    return lambda config: replace(config, layers=tuple(replace(layer, mixer=mixer(layer.mixer)) for layer in config.layers))


def rope(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return attention(rope=lambda m: replace(m.rope, **changes))


RECORDS: dict[str, tuple[Model, Callable[[ModelConfig], ModelConfig]]] = {
    "all of a head turns": (DENSE, rope(size=SIZE)),
    "the exponent is over the head": (DENSE, rope(base=1e7 ** (TURNED / SIZE))),
    "pairs are neighbours": (DENSE, rope(neighbours=True)),
    "theta of 10,000": (DENSE, rope(base=1e4)),
    "scores not scaled": (DENSE, attention(scale=1.0)),
    "queries not normed": (DENSE, attention(q_norm=None)),
    "the shared network ungated": (MOE, ffn(shared_gated=False)),
    "no shared network": (MOE, ffn(shared=None, shared_gated=False)),
    "the chosen not renormalized": (MOE, ffn(renormalized=False)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, loaded) -> None:
    model, records = RECORDS[name]
    error = miss(model, loaded, records)
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


def all_norms(state: State, *stems: str) -> None:
    for stem in stems:
        each(state, stem, lambda w, _: w + 1)


def regrouped(state: State) -> None:
    """Value head v with key head v // 2 in place of v mod 2: the same as value heads in another order, wherever they stand."""
    order = torch.tensor([0, 2, 1, 3])
    each(state, "ssm_in", lambda w, _: torch.cat((w[:64], w[64:].view(4, 16, -1)[order].flatten(0, 1))))
    each(state, "ssm_conv1d", lambda w, _: torch.cat((w[:256], w[256:].view(4, 64)[order].flatten())))
    each(state, "ssm_gate", lambda w, _: w.view(4, 16, -1)[order].flatten(0, 1))
    for stem in ("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt_bias"):
        each(state, stem, lambda w, _: w[order])
    each(state, "ssm_out", lambda w, _: w.view(-1, 4, 16)[:, order].flatten(1))


def queries(state: State, change: Callable[[Tensor], Tensor]) -> None:
    """Of [heads, 2 (query, gate), size, D]."""
    for stem in ("attn_q", "attn_qkv", "attn_qk"):
        each(state, stem, lambda w, _: torch.cat((change(w[: 2 * HEADS * SIZE].view(HEADS, 2, SIZE, -1)).reshape(2 * HEADS * SIZE, -1),
                                                  w[2 * HEADS * SIZE :])))  # fmt: skip


def ungated(state: State) -> None:
    """The sigmoid of 0 is a half."""
    queries(state, lambda q: torch.stack((q[:, 0], torch.zeros_like(q[:, 1])), 1))
    each(state, "attn_output", lambda w, _: 2 * w)


def last_dimensions_turn(state: State) -> None:
    queries(state, lambda q: torch.stack((q[:, 0].roll(TURNED, 1), q[:, 1]), 1))
    each(state, "attn_qkv", lambda w, _: torch.cat((w[:128], w[128:160].roll(TURNED, 0), w[160:])))
    for stem in ("attn_q_norm", "attn_k_norm"):
        each(state, stem, lambda w, _: w.roll(TURNED, 0))


WEIGHTS: dict[str, Callable[[State], None]] = {
    "value heads as HF has them": regrouped,
    "one more 1 in the norms before mixers": lambda s: all_norms(s, "attn_norm"),
    "one more 1 in the norms before ffns": lambda s: all_norms(s, "ffn_norm"),
    "one more 1 in the norms of heads": lambda s: all_norms(s, "attn_q_norm", "attn_k_norm"),
    "one more 1 in the norm behind the rule": lambda s: all_norms(s, "ssm_norm"),
    "-exp of A once more": lambda s: each(s, "ssm_a", lambda w, _: -w.exp()),
    "no bias of the decay": lambda s: each(s, "ssm_dt_bias", lambda w, _: 0 * w),
    "alpha and beta swapped": lambda s: renamed(s, "ssm_alpha", "ssm_beta"),
    "the newest tap first": lambda s: each(s, "ssm_conv1d", lambda w, _: w.view(-1, 4).flip(1).flatten()),
    "queries and gates as two halves": lambda s: queries(s, lambda q: q.reshape(2, HEADS, SIZE, -1).transpose(0, 1)),
    "queries and gates swapped": lambda s: queries(s, lambda q: q.flip(1)),
    "no gate of attention": ungated,
    "the last dimensions of a head turn": last_dimensions_turn,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, loaded) -> None:
    error = miss(DENSE, loaded, change=WEIGHTS[name])
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


def test_attention_is_fused_as_the_changes_suppose(loaded) -> None:
    assert loaded[DENSE.name][1]["blk.3.attn_qkv.weight"].shape[0] == 2 * HEADS * SIZE + 2 * SIZE


def by_token(mistake: str) -> Callable[..., Tensor]:
    """The rule written once more, token by token, with one mistake or with none."""

    def reference(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps) -> Tensor:
        _, heads, dk, dv = delta_state.shape
        w, past, state, found = conv.view(-1, 4), torch.zeros(3, u.shape[1]), torch.zeros(heads, dk, dv), []
        for t in range(len(u)):
            past = torch.cat((past, u[t : t + 1]))
            c = (past * w.T).sum(0)
            c = c if mistake == "no SiLU behind the convolution" else F.silu(c)
            past = past[1:] if mistake != "the convolution's outputs kept" else torch.cat((past[1:3], c[None]))
            q, k, v = c.split((key_heads * dk, key_heads * dk, heads * dv))
            if mistake == "queries and keys swapped":
                q, k = k, q
            q, k = (x.view(key_heads, dk) for x in (q, k))
            if mistake != "keys of any length":
                q, k = (x / (x.square().sum(1, keepdim=True) + eps).sqrt() for x in (q, k))
            q, k = (x.repeat(heads // key_heads, 1) for x in (q, k))
            q = q if mistake == "queries not scaled" else q * dk**-0.5
            v, b = v.view(heads, dv), torch.ones(heads) if mistake == "no beta" else beta[t].sigmoid()
            decay = torch.ones(heads) if mistake == "no decay" else (a * F.softplus(alpha[t] + dt_bias)).exp()
            before, state = state, state * decay[:, None, None]
            seen = before if mistake == "the change before the decay" else state
            known = torch.zeros(heads, dv) if mistake == "no delta" else torch.einsum("vkd,vk->vd", seen, k)
            written = state + torch.einsum("vk,vd->vkd", k, b[:, None] * (v - known))
            found.append(torch.einsum("vkd,vk->vd", state if mistake == "read before the write" else written, q))
            state = written.bfloat16().float() if mistake == "a state in bfloat16" else written
        return torch.stack(found)

    return reference


@pytest.mark.parametrize("mistake", ["", "no SiLU behind the convolution", "the convolution's outputs kept", "queries and keys swapped",
                                     "keys of any length", "queries not scaled", "no beta", "no decay", "the change before the decay",
                                     "no delta", "read before the write", "a state in bfloat16"])  # fmt: skip
def test_rules(mistake: str, loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "reference", by_token(mistake))
    error = miss(DENSE, loaded)
    print(f"{mistake or 'right'}: max |dlogit| {error:.2e}")
    assert error > (SMALL if mistake == "a state in bfloat16" else WRONG) if mistake else error < RIGHT



@pytest.mark.parametrize("mistake", ["the gate before the norm", "a sigmoid behind the norm", "SiLU of attention's gate",
                                     "norms behind rotation"])  # fmt: skip
def test_order(mistake: str, loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    if mistake == "SiLU of attention's gate":
        monkeypatch.setattr(Tensor, "sigmoid", lambda x: F.silu(x))  # of the dense model there is no other
    elif mistake == "norms behind rotation":
        rotated = decoder.AttentionMixer._rotated

        def late(self, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
            name = "attn_q_norm" if x.shape[1] == self.mixer.heads else "attn_k_norm"
            return torch.ops.kiln.rms_norm(rotated(self, x, cos, sin, 1.0), getattr(self.at, name).weight, self.eps, x.dtype) * scale

        monkeypatch.setattr(decoder.AttentionMixer, "_rotated", late)
        monkeypatch.setattr(decoder.AttentionMixer, "_normed", lambda self, x, kind, name: x)
    else:
        def call(self, h: Tensor, pos: Tensor) -> Tensor:
            at, cache = self.at, self.at.cache
            o = torch.ops.kiln.delta_chunk(at.ssm_in.linear(h), at.ssm_alpha.linear(h), at.ssm_beta.linear(h), at.ssm_conv1d.weight,
                                           at.ssm_a.weight, at.ssm_dt_bias.weight, cache.conv_state, cache.delta_state, pos,
                                           self.mixer.key_heads, self.eps)  # fmt: skip
            z = at.ssm_gate.linear(h).view_as(o)
            y = at.ssm_norm(o * F.silu(z)) if mistake == "the gate before the norm" else at.ssm_norm(o) * torch.sigmoid(z)
            return at.ssm_out.linear(y.flatten(1))

        monkeypatch.setattr(decoder.DeltaMixer, "__call__", call)
    error = miss(DENSE, loaded)
    print(f"{mistake}: max |dlogit| {error:.2e}")
    assert error > (SMALL if mistake == "norms behind rotation" else WRONG)


@pytest.mark.parametrize("part", ["conv", "delta"])
@pytest.mark.parametrize("size", [7, 1])
def test_a_state_that_is_not_kept(part: str, size: int, loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks' borders show it."""
    path, state = loaded[DENSE.name]
    keep = rule.keep

    def forgetful(kept: Tensor, pos: Tensor, value: Tensor) -> None:
        keep(kept, pos, value if value.dim() != {"conv": 2, "delta": 3}[part] else 0 * value)

    monkeypatch.setattr(rule, "keep", forgetful)
    plain = graph_spec(path).model()
    plain.load_state_dict(state, strict=False)
    tokens, reference = DENSE.reference(path)
    with torch.inference_mode():
        assert worst(feed(plain, plain, tokens[: 3 * size], size), reference) > WRONG


def test_right_passes(loaded) -> None:
    assert max(miss(model, loaded) for model in (DENSE, MOE)) < RIGHT
    assert step.reference is not chunk.reference
