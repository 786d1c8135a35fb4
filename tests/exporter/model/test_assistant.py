"""The drafter that reads its model's caches, against another implementation: four drafts behind beginnings of a text, rounds, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from kiln.exporter import build
from kiln.exporter.artifact.load import load_weights
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.compiler.trace import DrafterSpec, GraphSpec, lower, runnable
from kiln.exporter.errors import KilnError
from kiln.exporter.model import assistant
from kiln.exporter.model.assistant import Assistant, read_layers
from kiln.exporter.model.decoder import Decoder
from kiln.exporter.model.records import DraftConfig
from kiln.exporter.source.drafter import read_drafter
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.quantize import quantize, to_float
from tests.gguf_files import rewrite
from tests.timeline import FIXTURES, GREEDY, fixture_tokens, graph_spec, weights

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = {"gemma4-assistant-tiny": "gemma4-tiny-dense", "gemma4-assistant-tiny-edge": "gemma4-tiny-edge"}
RIGHT, WRONG = 3e-4, 0.03
VOCAB, DRAFTS = 512, 4


def made(source: Path, target: str, directory: Path) -> tuple[Decoder, Assistant]:
    path = FIXTURES / f"{target}.gguf"
    plan, model = read_plan(path), graph_spec(path).model()
    model.load_state_dict(weights(path, directory), strict=False)
    own = read_drafter(source, plan)
    write_weights(directory / "draft", own)
    assert isinstance(own.config, DraftConfig)
    drafter = Assistant(own.config, own.weights, plan.config, {i: model.blk[i].cache for i in read_layers(own.config)}, model.dtype)
    found = drafter.load_state_dict({k: v for k, v in load_weights(directory / "draft").items() if not k.startswith("__pad")}, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    return model, drafter


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> SimpleNamespace:
    """Both models, the text, and where the drafts begin with which token."""
    name = request.param
    model, drafter = made(FIXTURES / f"{name}.gguf", PAIRS[name], tmp_path_factory.mktemp("assistant"))
    ints = {end: np.fromfile(FIXTURES / f"{name}.{end}.i32", np.int32).tolist() for end in ("starts", "last", "draft_ids")}
    floats = {end: torch.from_numpy(np.fromfile(FIXTURES / f"{name}.{end}.f32", np.float32)) for end in ("draft_logits", "draft_hidden")}
    cases = list(zip(ints["starts"], ints["last"], strict=True))
    shape = (len(cases), DRAFTS, -1)
    return SimpleNamespace(model=model, drafter=drafter, tokens=fixture_tokens(PAIRS[name]), cases=cases,
                           ids=torch.tensor(ints["draft_ids"]).view(len(cases), DRAFTS), name=name, source=FIXTURES / f"{name}.gguf",
                           logits=floats["draft_logits"].view(shape), hidden=floats["draft_hidden"].view(shape))  # fmt: skip


def read(model: Decoder, tokens: Tensor, start: int = 0) -> Tensor:
    """Into the caches; hidden rows behind the last norm."""
    return model.output_norm(model.hidden(tokens, torch.arange(start, start + len(tokens))))


@torch.inference_mode()
def test_drafts(pair) -> None:
    """Behind 1 to 80 tokens of a window of 16: logits, the rows that are passed on, tokens. Of the model's rows, too."""
    target = torch.from_numpy(np.fromfile(FIXTURES / f"{pair.name}.target_hidden.f32", np.float32)).view(80, -1)
    for i, (start, token) in enumerate(pair.cases):
        row = read(pair.model, pair.tokens[:start])[-1:]
        assert (row - target[start - 1]).abs().max() < RIGHT
        now, pos = torch.tensor([token]), torch.tensor([start])
        for j in range(DRAFTS):
            logits, row = pair.drafter.draft(pair.model.embedding(now), row, pos)
            assert (logits[0] - pair.logits[i, j]).abs().max() < RIGHT, (start, j)
            assert (row[0] - pair.hidden[i, j]).abs().max() < 3 * RIGHT, (start, j)  # each comes of the one before
            now = logits.argmax(-1)
            assert int(now) == pair.ids[i, j]


def spec_of(source: Path, target: str, **options) -> GraphSpec:
    spec = graph_spec(FIXTURES / f"{target}.gguf", **{"decode_rows": (1, 2), "rows": 2, **options})
    own = read_drafter(source, read_plan(FIXTURES / f"{target}.gguf"))
    assert isinstance(own.config, DraftConfig)
    return replace(spec, drafter=DrafterSpec(own.config, own.weights))


def as_row(spec: GraphSpec, model: Decoder, row: int, length: int) -> dict[str, Tensor]:
    """What the entry `draft` has for caches, of which one row holds what the model's hold of `length` tokens; all else is no number."""
    found, theirs = {}, dict(model.named_buffers())
    for buffer in spec.caches("draft"):
        shape = spec.cache_lead("draft") + buffer.shape
        fill = float("nan") if buffer.dtype.is_floating_point else 0
        found[buffer.name] = torch.full(shape, fill, dtype=buffer.dtype)
        own = theirs.get(buffer.name.replace("_exact", "_cache"))  # codes of what the exact window has are not read
        for p in range(max(0, length - len(own)), length) if own is not None else ():
            found[buffer.name][row, p % buffer.shape[0]] = own[p % len(own)]  # rings have spare slots here
    return found


@pytest.mark.parametrize("turboquant", [False, True])
def test_entry(pair, turboquant) -> None:
    """The graph after the passes, over the caches of one of two rows: the same drafts. With TQ4 in an exact window as long as the text."""
    spec = spec_of(pair.source, PAIRS[pair.name], turboquant=turboquant, residual_length=96)
    lowered, own = lower(spec, "draft", "cpu"), pair.drafter
    state = {name: x for name, x in pair.model.state_dict().items() if name.startswith("token_embd.")}
    state |= {f"draft.{name}": x for name, x in own.state_dict().items() if ".cache." not in name}
    assert {b.name for b in lowered.kv} == {b.name for b in spec.caches("draft")}
    for i, (start, token) in enumerate(pair.cases):
        with torch.no_grad():
            hidden = read(pair.model, pair.tokens[:start])[-1:]
            run = runnable(lowered.program, state | as_row(spec, pair.model, 1, start))
            now = torch.tensor([token])
            for j in range(DRAFTS):
                places = (torch.tensor([n]) for n in (start + j, start - 1, 1))
                now, logits, hidden = run(now, *places, hidden, *GREEDY)
                assert (logits[0] - pair.logits[i, j]).abs().max() < RIGHT, (start, j)
                assert (hidden[0] - pair.hidden[i, j]).abs().max() < 3 * RIGHT, (start, j)
                assert int(now) == pair.ids[i, j]


@pytest.mark.parametrize("turboquant", [False, True])
def test_fused_entry(tmp_path, turboquant) -> None:
    """As for a GPU: every place of a quantized drafter is rewritten, and its drafts are those of the plain graph."""
    name, target = "gemma4-assistant-tiny", "gemma4-tiny-dense"
    source = FIXTURES / f"{name}.gguf"
    matrices = {t.name: (t.shape, "Q8_0", quantize("Q8_0", to_float(open_gguf(source), t.name)))
                for t in open_gguf(source).tensors.values() if len(t.shape) == 2}  # fmt: skip
    path = rewrite(tmp_path / "q.gguf", source, set_tensors=matrices)
    model, drafter = made(path, target, tmp_path)
    state = {n: x for n, x in model.state_dict().items() if n.startswith("token_embd.")}
    state |= {f"draft.{n}": x for n, x in drafter.state_dict().items() if ".cache." not in n}
    tokens, start = fixture_tokens(target), 40
    with torch.no_grad():
        hidden = read(model, tokens[:start])[-1:]
    found = {}
    for terms in (0, 3):
        spec = spec_of(path, target, turboquant=turboquant, residual_length=96, decode_bytes=terms, materializes_head=not terms)
        lowered = lower(spec, "draft", "cpu")
        report = next(r for r in lowered.reports if r.name == "fuse_decode")
        assert (report.status, report.missed) == ("applied" if terms else "off", ())
        now, row, out = tokens[start : start + 1], hidden, []
        with torch.no_grad():
            run = runnable(lowered.program, state | as_row(spec, model, 1, start))
            for j in range(DRAFTS):
                now, logits, row = run(now, *(torch.tensor([n]) for n in (start + j, start - 1, 1)), row, *GREEDY)
                out.append((int(now), logits, row))
        found[terms] = out
    for plain, fused in zip(found[0], found[3], strict=True):
        assert plain[0] == fused[0] and max((a - b).abs().max() for a, b in zip(plain[1:], fused[1:], strict=True)) < 3 * RIGHT
    head = open_gguf(source).tensors["token_embd.weight"]
    mixed = rewrite(tmp_path / "m.gguf", path, set_tensors={head.name: (head.shape, "F32", open_gguf(source).data(head.name))})
    with pytest.raises(KilnError, match=r"draft: pass fuse_decode .*draft\.token_embd \(its weight is F32\).*quantized throughout"):
        build.check_places(spec_of(mixed, target, decode_bytes=2))


@torch.no_grad()
def test_hidden_rows(pair) -> None:
    """Every entry of a model with a drafter gives the rows behind its last norm, and the tokens and logits that it gave without."""
    spec, tokens = spec_of(pair.source, PAIRS[pair.name]), pair.tokens[:9]
    plain, given = replace(spec, drafter=None).model("prefill"), spec.model("prefill")
    target = torch.from_numpy(np.fromfile(FIXTURES / f"{pair.name}.target_hidden.f32", np.float32)).view(80, -1)
    for model in (plain, given):
        model.load_state_dict({name: x for name, x in pair.model.state_dict().items() if ".cache." not in name}, strict=False)
    for at in (torch.arange(8), torch.tensor([8])):
        without, (*same, hidden) = plain(tokens[at], at, *GREEDY), given(tokens[at], at, *GREEDY)
        assert len(without) == 2 and all(torch.equal(a, b) for a, b in zip(without, same, strict=True))
        assert (hidden[0] - target[at[-1]]).abs().max() < RIGHT


@torch.inference_mode()
def test_mistakes(pair, monkeypatch) -> None:
    """Each costs acceptance and never a token, so that nothing else would show it."""
    i = len(pair.cases) - 1
    start, token = pair.cases[i]
    model, drafter = pair.model, pair.drafter
    before = model.hidden(pair.tokens[:start], torch.arange(start))
    rows, now = model.output_norm(before), torch.tensor([token])

    def miss(row: Tensor | None = None, embedding: Tensor | None = None, pos: int = start) -> float:
        given = model.embedding(now) if embedding is None else embedding, rows[-1:] if row is None else row
        return float((drafter.draft(*given, torch.tensor([pos]))[0][0] - pair.logits[i, 0]).abs().max())

    assert miss() < RIGHT
    assert miss(row=before[-1:]) > WRONG and miss(row=rows[-2:-1]) > WRONG
    assert miss(embedding=model.token_embd.rows(now)) > WRONG  # not scaled
    assert miss(pos=start - 1) > WRONG and miss(pos=start + 1) > WRONG
    mixed = drafter.nextn_pre_projection.weight
    drafter.nextn_pre_projection.weight = torch.nn.Parameter(mixed.roll(mixed.shape[1] // 2, 1), requires_grad=False)
    assert miss() > WRONG  # the hidden row first
    drafter.nextn_pre_projection.weight = mixed
    read(model, torch.cat((pair.tokens[:start], now)))  # its own key is there
    assert miss() < RIGHT or start % 16 == 0
    monkeypatch.setattr(assistant, "in_window", lambda pos, keys, window: (keys >= 0) & (keys <= pos[:, None]))
    read(model, pair.tokens[:start])
    assert miss() > WRONG  # a key more than the window shows


@torch.inference_mode()
def test_rounds(tmp_path: Path) -> None:
    """Three drafts a round, checked by the model: how many are accepted in each round, and the text, which is the greedy one."""
    model, drafter = made(FIXTURES / "gemma4-assistant-tiny-mtp.gguf", "gemma4-tiny-mtp", tmp_path)
    case = json.loads((FIXTURES / "gemma4-assistant-tiny-mtp.spec.json").read_text())[0]
    prompt, text, most = case["prompt"], case["tokens"], case["n_max"]
    hidden = model.hidden(torch.tensor(prompt), torch.arange(len(prompt)))
    fed, row = list(prompt), model.output_norm(hidden[-1:])
    now, accepted = int(model.logits(hidden[-1:]).argmax()), []
    for _ in case["accepted_per_round"]:
        n, drafts, of, guess = len(fed), [], row, torch.tensor([now])
        for _ in range(most):
            logits, of = drafter.draft(model.embedding(guess), of, torch.tensor([n]))
            guess = logits.argmax(-1)
            drafts.append(int(guess))
        right = 0
        for i in range(most + 1):  # one by one: a rejected key is never written
            hidden = model.hidden(torch.tensor([now]), torch.tensor([n + i]))
            fed.append(now)
            row, now = model.output_norm(hidden), int(model.logits(hidden).argmax())
            if i == most or now != drafts[i]:
                break
            right += 1
        accepted.append(right)
    assert accepted == case["accepted_per_round"] and set(accepted) == {0, 1, 3}
    assert [*fed, now][: len(text)] == text[: len(fed) + 1]


def test_refused(tmp_path: Path) -> None:
    """A file that drafts for another model, or is none, in one line each."""
    plan = read_plan(FIXTURES / "gemma4-tiny-dense.gguf")
    source = FIXTURES / "gemma4-assistant-tiny.gguf"
    with pytest.raises(KilnError, match="architecture 'gemma4' is no drafter that Kiln knows; supported: gemma4-assistant"):
        read_drafter(FIXTURES / "gemma4-tiny-dense.gguf", plan)
    with pytest.raises(KilnError, match="embedding_length_out is 72, and gemma4-tiny-dense has rows of 128"):
        read_drafter(FIXTURES / "gemma4-assistant-tiny-edge.gguf", plan)
    with pytest.raises(KilnError, match="drafts for gemma4, and qwen3-tiny is qwen3"):
        read_drafter(source, read_plan(FIXTURES / "qwen3-tiny.gguf"))
    with pytest.raises(KilnError, match="tensor nextn.pre_projection.weight is missing"):
        read_drafter(rewrite(tmp_path / "a.gguf", source, drop=["nextn.pre_projection.weight"]), plan)
    more = {"masked_embd_centroids.weight": ((32, 64), "F32", np.zeros((32, 64), np.float32))}
    with pytest.raises(KilnError, match="masked_embd_centroids.weight is not part of a gemma4-assistant model that Kiln knows"):
        read_drafter(rewrite(tmp_path / "b.gguf", source, set_tensors=more), plan)
    with pytest.raises(KilnError, match="give --decode-rows 1,2,4,8 with it"):
        build.graph_spec(build.ExportOptions(source, tmp_path, source), plan, ("cpu",), read_drafter(source, plan))
