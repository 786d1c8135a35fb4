"""Rows between timelines: what one left is gone on from, kept, restored; ids in the place of a sampled one; logits of those that ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kiln


@pytest.fixture(scope="module")
def model(three_rows) -> kiln.Model:
    return kiln.Model(str(three_rows))


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


@pytest.mark.parametrize("by_steps", [False, True])
def test_what_comes_in_a_tokens_place_of_one_that_drafts(model, by_steps):
    """The text repeats itself, so that drafts are tried; it stays what one without drafts writes after the same tokens."""
    batch, prompt, given = kiln.Batch(model, prefill_chunk=8), [9, 8, 7] * 5, [9, 8, 7, 9, 8]
    handle = batch.join(prompt, max_new_tokens=14, stop_at_eog=False, draft="ngram")
    before: list[int] = []
    while len(before) < 4:
        before += [token for _, token, *_ in batch.step()]
    batch.extend(handle, given, by_steps)
    after: list[int] = []
    while batch.active:
        after += [token for _, token, *_ in batch.step()]
    assert sum(batch.draft_counts["tried"]) > 0 and len(before) - 1 + len(after) == 14
    plain = kiln.Batch(model, prefill_chunk=8)
    handle, same = plain.join(prompt, max_new_tokens=14, stop_at_eog=False), []
    while len(same) < len(before):
        same += [token for _, token, *_ in plain.step()]
    assert same == before
    plain.extend(handle, given, by_steps)
    while plain.active:
        same += [token for _, token, *_ in plain.step()]
    assert same == before + after


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
    session = kiln.Session(model)
    session.set_sampling(1.0, 0, 1.0, 5)
    token = session.prefill([7, 6, 5])
    expected = [session.logits().copy(), None]
    session.decode(token)
    expected[1] = session.logits()
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
