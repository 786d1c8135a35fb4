"""The block that drafts, against logits of another implementation: over the prompt, then in a chain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kiln.exporter.artifact.load import load_weights
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.errors import KilnError
from kiln.exporter.model.decoder import Decoder
from kiln.exporter.model.draft import Drafter, draft_config, draft_plan
from kiln.exporter.source.plan import read_plan
from tests.exporter.model.test_families import MODELS, model_file
from tests.gguf_files import rewrite
from tests.timeline import FIXTURES, fixture_logits, fixture_tokens, graph_spec, weights

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("qwen35-tiny-mtp", "qwen35moe-tiny-mtp")
RIGHT, WRONG = 5e-4, 1e-2
POS = torch.arange(80)


def made(name: str, directory: Path) -> tuple[Decoder, Drafter]:
    path = model_file(next(m for m in MODELS if m.name == name), directory)
    plan, model = read_plan(path), graph_spec(path).model()
    model.load_state_dict(weights(path, directory), strict=False)
    constants = draft_plan(plan.config, plan.gguf)
    write_weights(directory / "draft", replace(plan, weights=tuple(constants)))
    drafter = Drafter(draft_config(plan.config), constants, 96, torch.float32)
    state = {k: v for k, v in load_weights(directory / "draft").items() if not k.startswith("__pad")}
    found = drafter.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and found.missing_keys == ["blk.0.cache.k_cache", "blk.0.cache.v_cache"]
    return model, drafter


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory) -> tuple[str, Decoder, Drafter, Tensor, Tensor]:
    """With the prompt and the model's hidden rows behind its last norm."""
    model, drafter = made(request.param, tmp_path_factory.mktemp("draft"))
    tokens = fixture_tokens(request.param)
    with torch.inference_mode():
        return request.param, model, drafter, tokens, model.hidden(tokens, POS)


def before(hidden: Tensor) -> Tensor:
    """Of the position before each; zeros before the first."""
    return torch.cat((torch.zeros(1, hidden.shape[1]), hidden[:-1]))


def floats(name: str, end: str) -> Tensor:
    return torch.from_numpy(np.fromfile(FIXTURES / f"{name}.{end}.f32", np.float32)).view(-1, 512)


@torch.inference_mode()
def test_prompt_and_chain(pair) -> None:
    """In chunks of 7, as a prompt comes; then four drafts, each from the hidden row of the one before it."""
    name, model, drafter, tokens, rows = pair
    hidden = before(model.output_norm(rows))
    found = torch.cat([drafter.draft(tokens[at : at + 7], hidden[at : at + 7], POS[at : at + 7])[0] for at in range(0, 80, 7)])
    assert (found - floats(name, "mtp_logits")).abs().max() < RIGHT
    token, row, right = fixture_logits(name)[-1].argmax().view(1), model.output_norm(rows[-1:]), floats(name, "mtp_draft_logits")
    drafted = []
    for i in range(4):
        logits, row = drafter.draft(token, row, torch.tensor([80 + i]))
        assert (logits[0] - right[i]).abs().max() < RIGHT, i
        token = logits.argmax(-1)
        drafted.append(int(token))
    assert drafted == np.fromfile(FIXTURES / f"{name}.mtp_draft_ids.i32", np.int32).tolist()


@torch.inference_mode()
def test_mistakes(pair) -> None:
    """Each costs acceptance and never a token, so that nothing else would show it."""
    name, model, drafter, tokens, rows = pair
    right, normed = floats(name, "mtp_logits"), model.output_norm(rows)

    def miss(hidden: Tensor, of: Drafter = drafter, pos: Tensor = POS) -> float:
        return float((of.draft(tokens, hidden, pos)[0] - right).abs().max())

    assert miss(before(normed)) < RIGHT
    assert miss(before(rows)) > WRONG  # before the last norm
    assert miss(normed) > WRONG  # of the token itself
    assert miss(before(normed), pos=POS - 1 + (POS == 0)) > WRONG
    mixed, halves = drafter.nextn_eh_proj.weight, drafter.nextn_eh_proj.weight.shape[1] // 2
    drafter.nextn_eh_proj.weight = torch.nn.Parameter(mixed.roll(halves, 1), requires_grad=False)
    try:
        assert miss(before(normed)) > WRONG  # the hidden row first
    finally:
        drafter.nextn_eh_proj.weight = mixed


def test_files_without_a_block(tmp_path: Path) -> None:
    source = model_file(MODELS[0], tmp_path)
    plan = read_plan(source)
    with pytest.raises(KilnError, match="qwen3-tiny has 0 drafting blocks; one was expected"):
        draft_plan(plan.config, plan.gguf)
    whole = model_file(next(m for m in MODELS if m.name == NAMES[0]), tmp_path)
    for lost in ("nextn.enorm", "nextn.shared_head_norm", "attn_q"):
        plan = read_plan(rewrite(tmp_path / "m.gguf", whole, drop=[f"blk.4.{lost}.weight"]))
        with pytest.raises(KilnError, match=f"{lost}.weight of the drafting block is missing"):
            draft_plan(plan.config, plan.gguf)
