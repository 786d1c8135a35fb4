"""Mistakes that still give fluent text: each, made on purpose, misses the reference by far more than a right forward pass does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kiln.exporter.measure.players import AllPositionsSpec
from kiln.exporter.model import decoder
from kiln.exporter.model.decoder import SAMPLING_INPUTS
from kiln.exporter.model.records import ModelConfig
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.weights import derived_constants
from kiln.passes.records import PassOptions
from tests.exporter.model.test_families import MODELS, Model, model_file
from tests.timeline import graph_spec, weights

RIGHT, WRONG = 5e-4, 1e-2  # max |dlogit| of a right pass, and of a mistake at least
QWEN, GEMMA, LLAMA = MODELS[0], MODELS[3], MODELS[4]


def mixers(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    """Every layer's mixer with other fields; a function gives a field's value from the mixer."""

    def change(config: ModelConfig) -> ModelConfig:
        def mixer(m):
            return replace(m, **{k: v(m) if callable(v) else v for k, v in changes.items()})

        return replace(config, layers=tuple(replace(layer, mixer=mixer(layer.mixer)) for layer in config.layers))

    return change


def rope(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return mixers(rope=lambda m: replace(m.rope, **changes))


def layers(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    def change(config: ModelConfig) -> ModelConfig:
        return replace(config, layers=tuple(replace(layer, **{k: v(layer) for k, v in changes.items()}) for layer in config.layers))

    return change


def swapped_activation(layer):
    return replace(layer.ffn, activation={"silu": "gelu_tanh", "gelu_tanh": "silu"}[layer.ffn.activation])


RECORDS: dict[str, tuple[Model, Callable[[ModelConfig], ModelConfig]]] = {
    "scores not scaled": (QWEN, mixers(scale=1.0)),
    "scores scaled by the hidden size over the heads": (QWEN, mixers(scale=(96 / 6) ** -0.5)),
    "queries not normed": (QWEN, mixers(q_norm=None)),
    "keys not normed": (QWEN, mixers(k_norm=None)),
    "norms of heads without weights": (QWEN, mixers(q_norm="plain", k_norm="plain")),
    "values normed": (QWEN, mixers(v_norm="plain")),
    "pairs are neighbours": (QWEN, rope(neighbours=True)),
    "theta of 10,000": (QWEN, rope(base=1e4)),
    "angles scaled": (QWEN, rope(factor=4.0)),
    "GELU for SiLU": (QWEN, layers(ffn=swapped_activation)),
    "the embedding as the head": (QWEN, lambda config: replace(config, tied_head=True)),
    "the embedding scaled": (QWEN, lambda config: replace(config, embedding_scale=96**0.5)),
    "logits capped": (QWEN, lambda config: replace(config, final_logit_softcapping=30.0)),
    "a window": (QWEN, mixers(window=16)),
    "Gemma 3: the embedding not scaled": (GEMMA, lambda config: replace(config, embedding_scale=1.0)),
    "Gemma 3: a window of one more": (GEMMA, mixers(window=lambda m: m.window and m.window + 1)),
    "Gemma 3: all layers full": (GEMMA, mixers(window=None)),
    "Gemma 3: one theta": (GEMMA, rope(base=1e6)),
    "Gemma 3: scores not scaled": (GEMMA, mixers(scale=1.0)),
    "Gemma 3: values normed": (GEMMA, mixers(v_norm="plain")),
    "Gemma 3: no norms after the branches": (GEMMA, layers(post_norms=lambda layer: False)),
    "Gemma 3: SiLU for GELU": (GEMMA, layers(ffn=swapped_activation)),
    "Llama: pairs are halves": (LLAMA, rope(neighbours=False)),
    "Llama: theta ignored": (LLAMA, rope(base=5e5)),
}


def norms_plus_one(state: dict[str, Tensor]) -> None:
    for name in state:
        if name.endswith("norm.weight"):
            state[name] = state[name] + 1


def gate_and_up_swapped(state: dict[str, Tensor]) -> None:
    for name in state:
        if "ffn_gate_up" in name:
            state[name] = state[name].roll(len(state[name]) // 2, 0)


def query_heads_to_kv_heads_in_turn(state: dict[str, Tensor]) -> None:
    """Query head j reads KV head j mod 2 in place of j // 3: the same as heads in another order, rows of Q and columns of the output."""
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    for i in range(sum("attn_output" in name for name in state)):
        qkv, out = state[f"blk.{i}.attn_qkv.weight"].clone(), state[f"blk.{i}.attn_output.weight"]
        qkv[:192] = qkv[:192].unflatten(0, (6, 32))[order].flatten(0, 1)
        state[f"blk.{i}.attn_qkv.weight"] = qkv
        state[f"blk.{i}.attn_output.weight"] = out.unflatten(1, (6, 32))[:, order].flatten(1)


WEIGHTS = {"norms plus one": norms_plus_one, "gate and up swapped": gate_and_up_swapped,
           "query heads in turn": query_heads_to_kv_heads_in_turn}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mistakes")


@pytest.fixture(scope="module")
def loaded(files: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    found = {model.name: model_file(model, files) for model in (QWEN, GEMMA, LLAMA)}
    return {name: (path, weights(path, files)) for name, path in found.items()}


def miss(model: Model, loaded, records=None, change=None) -> float:
    """The largest error of a logit of 80 tokens in one batch, and the model changed so."""
    path, state = loaded[model.name]
    spec, state = graph_spec(path), dict(state)
    config = records(spec.config) if records else spec.config
    state |= {name: torch.from_numpy(values) for name, values in derived_constants(config, open_gguf(path)).items()}
    if change:
        change(state)
    plain = AllPositionsSpec(config, spec.plan, 96, 96, "float32", PassOptions()).model()
    plain.load_state_dict(state, strict=False)
    tokens, reference = model.reference(path)
    sampling = [torch.zeros(1, dtype=dtype) for _, dtype in SAMPLING_INPUTS]
    with torch.inference_mode():
        return float((plain(tokens, torch.arange(len(tokens)), *sampling) - reference).abs().max())


@pytest.mark.parametrize("model", [QWEN, GEMMA, LLAMA], ids=lambda model: model.name)
def test_a_right_pass(model: Model, loaded) -> None:
    assert miss(model, loaded) < RIGHT


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, loaded) -> None:
    model, records = RECORDS[name]
    error = miss(model, loaded, records)
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, loaded) -> None:
    error = miss(QWEN, loaded, change=WEIGHTS[name])
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


def test_norm_after_rotation(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lengths are right: only the weights meet other dimensions."""

    def late(self, h: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, kv: dict, row: None) -> Tensor:
        c = self.mixer
        q, k, v = self.qkv(h)
        q = self._normed(self._rotated(q, cos, sin, 1.0), c.q_norm, "attn_q_norm") * c.scale
        k = self._normed(self._rotated(k, cos, sin, 1.0), c.k_norm, "attn_k_norm")
        return self.at.attn_output.linear(self.at.cache.attend(q, k, v, pos, c.window).flatten(1))

    monkeypatch.setattr(decoder.AttentionMixer, "__call__", late)
    assert miss(QWEN, loaded) > WRONG
