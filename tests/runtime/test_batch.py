"""Several timelines in one step: each is what it would be alone, bit for bit, whatever the others do."""

from __future__ import annotations

import ctypes
import json
import math
import random
from typing import Any

import numpy as np
import pytest

import kiln
from tests.conftest import kiln as command

SLOTS, ROWS = 64, 3  # of the artifact


@pytest.fixture(scope="module")
def model(rows_artifact) -> kiln.Model:
    return kiln.Model(str(rows_artifact))


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
    tokens, stop = session.generate(most or SLOTS + 1, stop_at_eog=stop_at_eog)
    return tokens, stop, logits


def test_timelines_that_come_and_go(model):
    """Some hundred steps; rows come, end, are sent away; every token and every logit is that of the timeline alone."""
    rng = random.Random(4)
    todo = requests(36, 1)
    expected = [solo(model, request) for request in todo]
    assert {stop for _, stop, _ in expected} == {"eog", "length", "max_seq_len"} or {"length", "max_seq_len"} <= {s for _, s, _ in expected}
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
    batch = kiln.Batch(model, prefill_chunk=8)
    one = batch.join(**first, stop_at_eog=False)
    batch.step()
    two = batch.join(**second, stop_at_eog=False)
    seen = [[handle for handle, *_ in batch.step()] for _ in range(6)]
    assert seen[:4] == [[one]] * 4 and seen[4] == [two, one]  # five chunks of 8, the last with the first token
    assert sorted(seen[5]) == [one, two]
    hasty = kiln.Batch(model, prefill_chunk=8, max_gap_ms=60_000)
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
def test_a_row_that_fails_is_alone(model, rows):
    """Its error names the place; the others' texts are what they are, and the row serves again."""
    asked = [{"prompt": [40 + i, 50, 60], "max_new_tokens": 12} for i in range(rows)]
    batch = kiln.Batch(model, rows=rows)
    texts: dict[int, list[int]] = {batch.join(**request, stop_at_eog=False): [] for request in asked}
    _, broken, *_ = texts
    errors = []
    for step in range(rows + 12):
        if step == rows + 2:  # all are written in one step by now
            address, size = batch.cache_memory()["blk.0.cache.k_ring"]
            own = (ctypes.c_float * (size // ROWS // 4)).from_address(address + size // ROWS)  # the second row's
            own[:] = [math.nan] * len(own)
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


def test_refused(model):
    batch = kiln.Batch(model, rows=2)
    for bad, what in (({"prompt": []}, "no tokens"), ({"prompt": [512]}, "token 512"), ({"prompt": [1] * 65}, "65 tokens"),
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


def test_memory_of_rows(rows_artifact, model):
    """What the manifest says of one row, times the rows; inspect and the runner say the same."""
    manifest = json.loads((rows_artifact / "manifest.json").read_text())
    each = sum(kv["bytes"] for kv in manifest["kv"])
    assert manifest["rows"] == ROWS and list(manifest["entry_points"]) == ["prefill", "decode", "decode_2", "decode_4"]
    memory = kiln.Batch(model).memory()
    assert memory["kv_ring"] + memory["kv_global"] == ROWS * each
    rings = {kv["name"].rpartition(".")[2]: (kv["shape"][0], kv["window"]) for kv in manifest["kv"] if kv["kind"] == "ring"}
    assert rings == {"k_ring": (22, 16), "v_ring": (22, 16), "k_exact": (38, 32), "v_exact": (38, 32)}
    assert f"x {ROWS} rows" in command("inspect", rows_artifact).stdout


def spelled(model: kiln.Model, *pieces: list[int] | int, chunk: int = 8) -> list[int]:
    """A session that reads lists as prompts and takes ids one by one; the last piece is how many tokens it writes then, with seed 5."""
    session = kiln.Session(model, prefill_chunk=chunk)
    session.set_sampling(1.0, 0, 1.0, 5)
    *fed, most = pieces
    for piece in fed:
        (session.decode if isinstance(piece, int) else session.prefill)(piece)
    return session.generate(most, stop_at_eog=False)[0]


SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "stop_at_eog": False}


def write(batch: kiln.Batch, handle: int, most: int) -> list[int]:
    """The next tokens of a timeline, whatever else the batch does; it stays."""
    found: list[int] = []
    while len(found) < most:
        found += [token for who, token, *_ in batch.step() if who == handle]
    return found


def test_a_row_goes_on(model):
    """What a timeline leaves in its row need not be read again: tokens are those of a session that reads the same pieces."""
    batch = kiln.Batch(model, prefill_chunk=8)
    prompt, more = list(range(20, 33)), [40, 41, 42]
    busy = batch.join([9, 9, 9], **SEEDED)
    handle = batch.join(prompt, max_new_tokens=4, **SEEDED)
    text = write(batch, handle, 4)
    row = batch.row(1)
    assert row.tokens == prompt + text[:3] and (row.number, row.position) == (1, 16)
    again = batch.join([*prompt, *text, *more], row=1, **SEEDED)
    assert batch.position(again) == 16
    assert write(batch, again, 9) == spelled(model, prompt, *text[:3], [text[3], *more], 9)
    for refused in (lambda: row.rewind(0), lambda: batch.join([9, 9, 9, 9], row=1), lambda: batch.join([5], row=0)):
        with pytest.raises(kiln.Error, match="in use by timeline"):
            refused()
    batch.leave(again)
    held = row.position
    assert row.earliest == held - 7  # a window of 16 in 22 slots
    with pytest.raises(kiln.Error, match="have lost"):
        row.rewind(row.earliest - 1)
    row.rewind(held - 2)
    for prompt_, what in (([1, 2, 3], "does not begin"), (row.tokens, "none is left")):
        with pytest.raises(kiln.Error, match=what):
            batch.join(prompt_, row=1)
    assert not batch.active - 1 and row.position == held - 2
    kept = row.tokens
    third = batch.join([*kept, 50, 51], row=1, **SEEDED)
    pieces = spelled(model, prompt, *text[:3], [text[3], *more], *kept[20:], [50, 51], 5)
    assert write(batch, third, 5) == pieces
    for number in (-1, 3):
        with pytest.raises(kiln.Error, match="the batch has 3"):
            batch.row(number)
    batch.leave(busy)


@pytest.mark.parametrize("by_steps", [True, False])
def test_what_comes_in_a_tokens_place(model, by_steps):
    """Ids that are given instead of the token sampled last; others go on beside them."""
    batch, prompt, given = kiln.Batch(model, prefill_chunk=8), [9, 8, 7], list(range(60, 72))
    other = batch.join([30, 31], **SEEDED)
    handle = batch.join(prompt, max_new_tokens=9, **SEEDED)
    before = write(batch, handle, 3)
    batch.extend(handle, given, by_steps)
    with pytest.raises(kiln.Error, match="12 tokens still to be read"):
        batch.extend(handle, [5])
    events = [batch.step() for _ in range(4)]
    assert all(who == other for step in events[: 3 if by_steps else 1] for who, *_ in step)
    after = [token for step in events for who, token, *_ in step if who == handle]
    while batch.active > 1:
        after += [token for who, token, *_ in batch.step() if who == handle]
    assert len(after) == 7  # the one that gave way does not count
    pieces: list[Any] = [*given] if by_steps else [given]
    assert after == spelled(model, prompt, *before[:2], *pieces, 7)
    for bad, what in (([], "no tokens"), ([512], "token 512"), ([5] * 70, "70 tokens after")):
        with pytest.raises(kiln.Error, match=what):
            batch.extend(other, bad)


def test_snapshots_of_rows(model):
    """A row goes back to where it stood, once its ring has forgotten that; another row and a session take what it was, too."""
    batch, store = kiln.Batch(model, prefill_chunk=8), kiln.SnapshotStore(0, 1 << 20)
    prompt, other = list(range(20, 41)), [50, 51, 52]
    handle = batch.join(prompt, **SEEDED)
    write(batch, handle, 1)
    row = batch.row(0)
    assert store.take(row, "a") and store.take(row, "a") and store.counts()["kept"] == 1
    snapshot = row.snapshot()
    assert (snapshot.position, snapshot.tokens) == (21, prompt)
    write(batch, handle, 20)
    with pytest.raises(kiln.Error, match="in use by timeline"):
        row.restore(snapshot)
    batch.leave(handle)
    assert row.earliest > 21
    expected = spelled(model, prompt, other, 9)
    elsewhere, session = batch.row(2), kiln.Session(model, prefill_chunk=8)
    assert not elsewhere.can_restore(snapshot) and row.can_restore(snapshot)
    for taker in (elsewhere, session):
        taker.restore(snapshot)
    session.set_sampling(1.0, 0, 1.0, 5)
    session.prefill(other)
    assert session.generate(9, stop_at_eog=False)[0] == expected
    found = store.longest(row, [*prompt, *other], "b")
    assert found is not None and found.position == 21 and store.longest(row, [*prompt[:-1], *other], "b") is None
    row.restore(found)
    texts: dict[int, list[int]] = {batch.join([*prompt, *other], row=number, **SEEDED): [] for number in (0, 2)}
    while min(map(len, texts.values())) < 9:
        for who, token, *_ in batch.step():
            texts[who].append(token)
    assert all(text[:9] == expected for text in texts.values())


def test_logits_of_one_timeline(model):
    """They come to the host for it alone, and stay until another timeline joins in its row."""
    batch = kiln.Batch(model, rows=2)
    quiet, loud = batch.join([9, 8], **SEEDED), batch.join([7, 6, 5], max_new_tokens=2, keep_logits=True, **SEEDED)
    expected = solo(model, {"prompt": [7, 6, 5], "max_new_tokens": 2, "temperature": 1.0, "seed": 5}, stop_at_eog=False)[2]
    for row in expected:
        write(batch, loud, 1)
        assert np.array_equal(batch.logits(loud), row)
        with pytest.raises(kiln.Error, match="keep_logits"):
            batch.logits(quiet)
    assert batch.active == 1
    again = batch.join([5], **SEEDED)
    with pytest.raises(kiln.Error, match=f"timeline {loud} is in no row"):
        batch.logits(loud)
    assert again != loud


def test_prompts_are_read_by_turns(model):
    """A short prompt does not wait for a long one that came before."""
    batch = kiln.Batch(model, prefill_chunk=4)
    long, short = batch.join(list(range(20, 60)), **SEEDED), batch.join([9, 8, 7], **SEEDED)
    order = [handle for _ in range(12) for handle, *_ in batch.step()]
    assert order.index(short) <= 2 and long in order
