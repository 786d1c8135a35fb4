"""Several timelines in one step: each is what it would be alone, bit for bit, whatever the others do."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

import kiln
from tests import timelines as timelines_
from tests.conftest import kiln as command
from tests.runtime.batches import FORMS, ROWS, load, spoil


@pytest.fixture(scope="module")
def slots(device) -> int:
    return FORMS[device][1]


@pytest.fixture(scope="module")
def model(several, device) -> kiln.Model:
    return load(several, device)


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 1 to 40 tokens, greedy or sampled, of which some end by themselves, some by length, some with the cache full."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [rng.randrange(8, 512) for _ in range(rng.choice((1, 2, 3, 17, 32, 33, 40)))]
        sampling = {"temperature": rng.choice((0.0, 0.7, 1.2)), "top_k": rng.choice((0, 40)), "top_p": rng.choice((1.0, 0.9)), "seed": i}
        found.append({"prompt": prompt, "max_new_tokens": rng.choice((1, 5, 20, 0)), **sampling})
    return found


def solo(model: kiln.Model, request: dict[str, Any], chunk: int = 0, stop_at_eog: bool = True) -> tuple[list[int], str, list[np.ndarray]]:
    """By a session that has the model for itself: tokens, why it ended, logits of every sampled token."""
    session, logits = kiln.Session(model, prefill_chunk=chunk), []
    options = dict(request)
    prompt, most = options.pop("prompt"), options.pop("max_new_tokens")
    session.set_sampling(**options)
    session.prefill(prompt)
    logits.append(session.logits().copy())
    session.set_logits_sink(lambda row: logits.append(row.copy()))
    tokens, stop = session.generate(most or model.max_seq_len + 1, stop_at_eog=stop_at_eog)
    return tokens, stop, logits


def test_rows_of_a_step(model, device, slots):
    """Every M, any mix of timelines, padding, drafts of which 0 to M - 1 are rejected: all bits are those of a session that is fed token by
    token. Rings are passed more than once. On a GPU by direct calls as by replays, with early launch and without."""
    counts, vocab, rng = FORMS[device][0], model.vocab_size, random.Random(3)
    timelines = [[rng.randrange(8, vocab) for _ in range(n)] for n in (slots, slots * 5 // 6, slots // 2)]
    expected = []
    for row, tokens in enumerate(timelines):
        session = kiln.Session(model)

        def one(token, pos, *settings, session=session):
            session.set_sampling(*(x.item() for x in settings))
            sampled = session.decode(token.item())
            return torch.tensor([sampled]), torch.from_numpy(session.logits())[None]

        expected.append(timelines_.solo(one, tokens, row))
        del session
    for options in ({}, {"early_launch": False}, {"graph": False}) if device == "cuda" else ({},):
        batch = kiln.Batch(model, **options)
        assert bool(batch.early_launches) == (device == "cuda" and not options)

        def several(token, pos, row, *settings, batch=batch):
            each = list(zip(*(x.tolist() for x in settings), strict=True))
            sampled, logits, _ = batch.probe(token.tolist(), pos.tolist(), row.tolist(), each)
            return torch.tensor(sampled), torch.from_numpy(logits)

        for address, size in batch.cache_memory().values():
            spoil(address, size, device)
        schedule = timelines_.Schedule(timelines, counts, vocab)
        assert timelines_.check(dict.fromkeys(counts, several), schedule, expected) > sum(map(len, timelines))
        assert {(m, wrong) for m in counts for wrong in range(m)} <= schedule.rejected
        for row, tokens in enumerate(timelines):  # what a step of one token goes on from is the same, whichever steps wrote it
            _, logits, _ = batch.probe(tokens[-1:], [len(tokens) - 1], [row])
            assert np.array_equal(logits[0], expected[row][1][-1].numpy())
    for bad, what in (({"tokens": [1] * 3, "positions": [0] * 3, "rows": [0] * 3}, "no step of as many"),
                      ({"tokens": [1], "positions": [slots], "rows": [0]}, f"position {slots}"),
                      ({"tokens": [1], "positions": [0], "rows": [ROWS]}, f"row {ROWS}")):  # fmt: skip
        with pytest.raises(kiln.Error, match=what):
            batch.probe(**bad)
    batch.join(prompt=[5])
    with pytest.raises(kiln.Error, match="timelines are in the batch"):
        batch.probe([1], [0], [0])


def test_timelines_that_come_and_go(model, device):
    """Some hundred steps; rows come, end, are sent away; every token and every logit is that of the timeline alone."""
    rng = random.Random(4)
    todo = requests(36, 1)
    expected = [solo(model, request) for request in todo]
    stops = {stop for _, stop, _ in expected}
    assert stops >= ({"length", "max_seq_len"} if device == "cpu" else {"length"}) and len(stops) > 1
    batch = kiln.Batch(model, keep_logits=True)
    assert batch.rows == ROWS
    texts: dict[int, list[int]] = {}
    numbers: dict[int, int] = {}  # handle -> request
    sent_away, together, steps, waiting = 0, set(), 0, list(range(len(todo)))
    while waiting or batch.active:
        while waiting and batch.active < ROWS and rng.random() < 0.5:
            number = waiting.pop()
            handle = batch.join(**todo[number])
            numbers[handle], texts[handle] = number, []
        before = batch.active
        events = batch.step()
        steps += 1
        together.add(len(events))
        assert len({handle for handle, *_ in events}) == len(events) <= before
        for handle, token, stop, error in events:
            tokens, ended, logits = expected[numbers[handle]]
            assert error is None
            if token is not None:
                texts[handle].append(token)
                assert texts[handle] == tokens[: len(texts[handle])], (handle, steps)
            if stop:
                assert (texts[handle], stop) == (tokens, ended)
                del texts[handle]
            else:
                assert np.array_equal(batch.logits(handle), logits[len(texts[handle]) - 1]), (handle, steps)
        if texts and rng.random() < 0.05:
            handle = rng.choice(list(texts))
            batch.leave(handle)
            del texts[handle]
            sent_away += 1
    assert together >= {1, 2, 3} and sent_away and steps > 100 and not texts


def test_chunks_of_prompts(model):
    """A prompt that is read in chunks between steps keeps others waiting for one chunk at a time."""
    first, second = {"prompt": [9, 8, 7], "max_new_tokens": 30}, {"prompt": list(range(10, 50)), "max_new_tokens": 3}
    batch = kiln.Batch(model, prefill_chunk=8, read_by_step=1)
    one = batch.join(**first, stop_at_eog=False)
    batch.step()
    two = batch.join(**second, stop_at_eog=False)
    seen = [[handle for handle, *_ in batch.step()] for _ in range(6)]
    assert seen[:4] == [[one]] * 4 and seen[4] == [two, one]  # five chunks of 8, the last with the first token
    assert sorted(seen[5]) == [one, two]
    hasty = kiln.Batch(model, prefill_chunk=8, max_gap_ms=60_000, read_by_step=1)
    hasty.join(**first, stop_at_eog=False)
    hasty.step()
    late = hasty.join(**second, stop_at_eog=False)
    assert late in [handle for handle, *_ in hasty.step()]  # the whole prompt at once: nobody minds the wait
    text, expected = [], solo(model, second, 8, stop_at_eog=False)
    batch = kiln.Batch(model, prefill_chunk=8)
    batch.join(**second, stop_at_eog=False)
    while batch.active:
        text += [token for _, token, *_ in batch.step() if token is not None]
    assert text == expected[0]


@pytest.mark.parametrize("rows", [2, 3])
def test_a_row_that_fails_is_alone(model, device, rows):
    """Its error names the place; the others' texts are what they are, and the row serves again."""
    asked = [{"prompt": [40 + i, 50, 60], "max_new_tokens": 12} for i in range(rows)]
    batch = kiln.Batch(model, rows=rows)
    texts: dict[int, list[int]] = {batch.join(**request, stop_at_eog=False): [] for request in asked}
    _, broken, *_ = texts
    errors = []
    for step in range(rows + 12):
        if step == rows + 2:  # all are written in one step by now
            address, size = batch.cache_memory()["blk.0.cache.k_ring"]
            spoil(address + size // ROWS, size // ROWS, device)  # the second row's
        for handle, token, _, error in batch.step():
            if error:
                errors.append((handle, error))
            elif token is not None:
                texts[handle].append(token)
    ((handle, error),) = errors
    assert handle == broken and "not finite" in error and "blk.0.cache.k_ring" in error
    for (handle, text), request in zip(texts.items(), asked, strict=True):
        expected, *_ = solo(model, request, stop_at_eog=False)
        assert text == (expected[: len(text)] if handle == broken else expected) and text
    again = batch.join(**asked[0], stop_at_eog=False)  # over what the broken row left
    text = [token for _ in range(12) for _, token, *_ in batch.step()]
    assert again not in texts and text == solo(model, asked[0], stop_at_eog=False)[0]


def test_refused(model, slots):
    batch = kiln.Batch(model, rows=2)
    vocab = model.vocab_size
    for bad, what in (({"prompt": []}, "no tokens"), ({"prompt": [vocab]}, f"token {vocab}"),
                      ({"prompt": [1] * (slots + 1)}, f"{slots + 1} tokens"),
                      ({"prompt": [1], "temperature": -1.0}, "temperature"), ({"prompt": [1], "max_new_tokens": -1}, "max_new_tokens")):
        with pytest.raises(kiln.Error, match=what):
            batch.join(**bad)
    assert batch.active == 0
    handles = [batch.join(prompt=[5]), batch.join(prompt=[6])]
    with pytest.raises(kiln.Error, match="all 2 rows"):
        batch.join(prompt=[7])
    batch.leave(handles[0])
    with pytest.raises(kiln.Error, match=f"no timeline {handles[0]}"):
        batch.leave(handles[0])
    assert batch.join(prompt=[7]) not in handles
    with pytest.raises(kiln.Error, match="keep_logits"):
        batch.logits(handles[1])
    for options, what in (({"rows": 4}, "1 to 3"), ({"prefill_chunk": 33}, "2 to 32"), ({"max_gap_ms": -1.0}, "max_gap_ms")):
        with pytest.raises(kiln.Error, match=what):
            kiln.Batch(model, **options)


def test_memory_of_rows(several, model, device):
    """What the manifest says of one row, times the rows; inspect and the runner say the same."""
    manifest = json.loads((several / "manifest.json").read_text())
    each = sum(kv["bytes"] for kv in manifest["kv"])
    entries = ["prefill", "decode", *(f"decode_{m}" for m in FORMS[device][0]), *(["draft"] if device == "cpu" else [])]
    assert manifest["rows"] == ROWS and list(manifest["entry_points"]) == entries
    memory = kiln.Batch(model).memory()
    assert memory["kv_ring"] + memory["kv_global"] == ROWS * each
    rings = {kv["name"].rpartition(".")[2]: (kv["shape"][0], kv["window"]) for kv in manifest["kv"] if kv["kind"] == "ring"}
    assert rings == {f"{side}_{kind}": form for kind, form in FORMS[device][2].items() for side in "kv"}
    assert f"x {ROWS} rows" in command("inspect", several).stdout
