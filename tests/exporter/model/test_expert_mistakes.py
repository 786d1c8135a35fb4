"""Mistakes in mixtures of experts that still give fluent text: each, made on purpose, misses the reference by far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kiln.exporter.model import decoder
from kiln.exporter.model.records import ModelConfig
from tests.exporter.model.test_families import MODELS, Model, model_file
from tests.exporter.model.test_mistakes import RIGHT, WRONG, layers, miss, swapped_activation
from tests.timeline import graph_spec, weights

QWEN, GEMMA = (next(m for m in MODELS if m.name == name) for name in ("qwen3moe-tiny", "gemma4-tiny-moe"))
SMALL = 2e-3  # of rounding
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[Path, State]]:
    files = tmp_path_factory.mktemp("mistakes")
    found = {model.name: model_file(model, files) for model in (QWEN, GEMMA)}
    return {name: (path, weights(path, files)) for name, path in found.items()}


def ffn(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return layers(ffn=lambda layer: replace(layer.ffn, **changes))


RECORDS: dict[str, tuple[Model, Callable[[ModelConfig], ModelConfig]]] = {
    "the chosen not renormalized": (QWEN, ffn(renormalized=False)),
    "one expert fewer": (QWEN, ffn(used=3)),
    "one expert more": (QWEN, ffn(used=5)),
    "GELU for SiLU": (QWEN, layers(ffn=swapped_activation)),
    "Gemma 4: one expert fewer": (GEMMA, ffn(used=2)),
    "Gemma 4: SiLU for GELU in the experts": (GEMMA, layers(ffn=swapped_activation)),
    "Gemma 4: no network beside the experts": (GEMMA, ffn(shared=None)),
    "Gemma 4: experts and router read the layer's norm": (GEMMA, ffn(own_input=False)),
    "Gemma 4: outputs of experts not scaled": (GEMMA, ffn(scaled=False)),
    "Gemma 4: branches without norms of their own": (GEMMA, ffn(branch_norms=False)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, loaded) -> None:
    model, records = RECORDS[name]
    error = miss(model, loaded, records)
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


def each(state: State, stem: str, change: Callable[[Tensor, str], Tensor]) -> None:
    """Changes the constants blk.N.STEM.weight; `change` gets the tensor and the layer's prefix."""
    for name in [n for n in state if n.endswith(f".{stem}.weight")]:
        state[name] = change(state[name], name.removesuffix(f"{stem}.weight"))


def renamed(state: State, first: str, second: str) -> None:
    given = {n: state[n.replace(first, second)] for n in state if f".{first}." in n}
    given |= {n: state[n.replace(second, first)] for n in state if f".{second}." in n}
    state |= given


def columns_for_rows(w: Tensor, _: str) -> Tensor:
    return w.view(24, 16, -1).transpose(0, 1).flatten(0, 1)


def halves_swapped(w: Tensor, _: str) -> Tensor:
    return w.view(8, 64, -1).roll(32, 1).flatten(0, 1)


def halves_of_all_rows(w: Tensor, _: str) -> Tensor:
    return w.view(8, 2, 32, -1).transpose(0, 1).reshape(512, -1)


WEIGHTS: dict[str, tuple[Model, Callable[[State], None]]] = {
    "gate and up of the experts swapped": (QWEN, lambda s: renamed(s, "ffn_gate_exps", "ffn_up_exps")),
    "rows of the next expert": (QWEN, lambda s: each(s, "ffn_down_exps", lambda w, _: w.roll(96, 0))),
    "an expert's columns for its rows": (QWEN, lambda s: each(s, "ffn_gate_exps", columns_for_rows)),
    "Gemma 4: halves of gate and up swapped": (GEMMA, lambda s: each(s, "ffn_gate_up_exps", halves_swapped)),
    "Gemma 4: gate and up as halves of all rows": (GEMMA, lambda s: each(s, "ffn_gate_up_exps", halves_of_all_rows)),
    "Gemma 4: the router's scale missing": (GEMMA, lambda s: each(s, "ffn_gate_inp_scale", lambda w, _: torch.ones_like(w))),
    "Gemma 4: the router not divided by the root of the size": (GEMMA, lambda s: each(s, "ffn_gate_inp_scale", lambda w, _: w * 72**0.5)),
    "Gemma 4: the router reads a weighted norm": (
        GEMMA,
        lambda s: each(s, "ffn_gate_inp_scale", lambda w, at: w * s[f"{at}ffn_norm.weight"]),
    ),
    "Gemma 4: the experts read the norm of the network beside them": (
        GEMMA,
        lambda s: each(s, "pre_ffw_norm_2", lambda _, at: s[f"{at}ffn_norm.weight"]),
    ),
    "Gemma 4: norms of the two branches swapped": (GEMMA, lambda s: renamed(s, "post_ffw_norm_1", "post_ffw_norm_2")),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, loaded) -> None:
    model, change = WEIGHTS[name]
    error = miss(model, loaded, change=change)
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


def _sigmoid(logits: Tensor, used: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    values, chosen = logits.sigmoid().topk(used)
    return chosen, values / values.sum(-1, keepdim=True)


def _equal(logits: Tensor, used: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    return logits.topk(used).indices, torch.full((len(logits), used), 1 / used)


def _rounded(logits: Tensor, used: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    values, chosen = logits.bfloat16().softmax(-1).topk(used)
    return chosen, (values / values.sum(-1, keepdim=True)).float()


@pytest.mark.parametrize("mistake", [_sigmoid, _equal, _rounded])
@pytest.mark.parametrize("model", [QWEN, GEMMA], ids=lambda model: model.name)
def test_choices(model: Model, mistake, loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sigmoid for the softmax, equal weights, a router in bfloat16."""

    def route(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = h
        if self.ffn.own_input:
            z = torch.ops.kiln.rms_norm(x, self.at.ffn_gate_inp_scale.weight, self.eps, torch.float32) * x.shape[-1] ** -0.5
        chosen, weight = mistake(self.at.ffn_gate_inp.linear(z), self.ffn.used, True)
        return chosen, weight * self.at.ffn_down_exps_scale.weight[chosen] if self.ffn.scaled else weight

    monkeypatch.setattr(decoder.ExpertsFfn, "route", route)
    error = miss(model, loaded)
    print(f"{model.name}, {mistake.__name__}: max |dlogit| {error:.2e}")
    assert error > SMALL


def test_weights_of_gemma4_are_renormalized_before_they_are_scaled(loaded) -> None:
    """In the logits it does not show: the norm after the experts cancels a factor."""
    path, state = loaded[GEMMA.name]
    plain = graph_spec(path).model()
    plain.load_state_dict(state, strict=False)
    x = torch.randn(5, 72, generator=torch.Generator().manual_seed(0))
    at = "blk.1.ffn_"
    z = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"{at}gate_inp_scale.weight"].double() / 72**0.5
    p, chosen = (z @ state[f"{at}gate_inp.weight"].double().T).softmax(-1).topk(3)
    got, weights_ = plain.blk[1].ffn.route(x, x)
    assert torch.equal(got, chosen)
    wanted = p / p.sum(-1, keepdim=True) * state[f"{at}down_exps_scale.weight"].double()[chosen]
    torch.testing.assert_close(weights_.double(), wanted, rtol=1e-5, atol=0)


def test_a_right_pass(loaded) -> None:
    assert max(miss(model, loaded) for model in (QWEN, GEMMA)) < RIGHT
