"""A step that is queued before the tokens of the one before are looked at: every text is what it is without, whatever becomes of others."""

from __future__ import annotations

import random
from typing import Any

import pytest

import kiln
from tests.runtime.batches import FORMS, ROWS, load, spoil
from tests.tools.many_steps import alone

pytestmark = pytest.mark.usefixtures("one_runner_thread")


@pytest.fixture(scope="module")
def model(several, device) -> kiln.Model:
    return load(several, device)


def told(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests; some end by themselves or with the cache full, some draft, some keep logits."""
    rng, found = random.Random(seed), []
    for i in range(count):
        prompt = [rng.randrange(8, 512) for _ in range(rng.choice((1, 2, 5, 17, 33)))]
        more = rng.choice(({}, {}, {}, {"draft": "ngram"}, {"keep_logits": True}))
        sampling = {"temperature": rng.choice((0.0, 0.9)), "seed": i}
        found.append({"prompt": prompt, "max_new_tokens": rng.choice((1, 3, 12, 30, 0)), **sampling, **more})
    return found


def test_texts(model) -> None:
    """Timelines join, leave in the middle, have ids put in a token's place; the others never see it."""
    rng, waiting, texts, requests, endless, unread, gone, changed = random.Random(4), told(24, 8), {}, {}, set(), set(), 0, 0
    expected = [alone(model, request) for request in waiting]
    todo = list(zip(waiting, expected, strict=True))
    batch = kiln.Batch(model, run_ahead=True)
    while todo or batch.active:
        while todo and batch.active < ROWS and rng.random() < 0.5:
            request, whole = todo.pop()
            handle = batch.join(**request)
            texts[handle], requests[handle] = [], whole
            endless |= {handle} if not request["max_new_tokens"] else set()
        for handle, token, stop, error in batch.step():
            assert error is None
            texts[handle] += [] if token is None else [token]
            unread.discard(handle)
            assert texts[handle] == requests[handle][0][: len(texts[handle])]
            if stop:
                assert (texts.pop(handle), stop) == requests[handle]
        if texts and rng.random() < 0.1:
            handle = rng.choice(list(texts))
            if handle in unread:  # the step that was queued is the others'
                continue
            if texts[handle] and handle in endless:  # the token sampled last is given again: the queued step was for it, too
                batch.extend(handle, [texts[handle][-1]], True)
                unread.add(handle)
                changed += 1
            else:
                batch.leave(handle)
                del texts[handle]
                gone += 1
    assert gone > 2 and changed > 2 and not texts


def test_rows_are_gone_on_from_and_kept(model, device) -> None:
    """Between two steps: a snapshot of a row that writes, another row that takes it, one that goes on where a timeline left."""
    prompt, tail = list(range(20, 37)), [50, 51, 52]
    whole = alone(model, {"prompt": prompt, "max_new_tokens": 20, "stop_at_eog": False})[0]
    batch = kiln.Batch(model, run_ahead=True)
    handle = batch.join(prompt, stop_at_eog=False)
    text: list[int] = []
    while len(text) < 6:
        text += [token for _, token, *_ in batch.step()]
    assert text == whole[:6]
    snapshot = batch.row(0).snapshot()
    assert snapshot.position == len(prompt) + 5
    while len(text) < 12:
        text += [token for _, token, *_ in batch.step()]
    batch.row(1).restore(snapshot)
    other = batch.join([*prompt, *whole[:6]], row=1, stop_at_eog=False)
    mine, theirs = list(text), whole[:6]
    while len(theirs) < 12:
        for who, token, *_ in batch.step():
            (mine if who == handle else theirs).append(token)
    batch.leave(handle)
    batch.leave(other)
    assert mine == whole[: len(mine)] and theirs == whole[: len(theirs)] and len(mine) < 20
    held = batch.row(0).tokens
    assert held == [*prompt, *whole][: len(held)]
    again = batch.join([*held, *tail], row=0, max_new_tokens=5, stop_at_eog=False)
    found: list[int] = []
    while batch.active:
        found += [token for who, token, *_ in batch.step() if who == again]
    session = kiln.Session(model)
    session.prefill(prompt)
    for token in held[len(prompt) :]:
        session.decode(token)
    session.prefill(tail)
    assert found == session.generate(5, stop_at_eog=False)[0]


def test_one_that_fails(model, device) -> None:
    """Logits that are not finite end a timeline alone, at the position at which they would without."""
    said = []
    for run_ahead in (False, True):
        batch = kiln.Batch(model, run_ahead=run_ahead)
        handles = [batch.join([9, 8, 7], stop_at_eog=False), batch.join([30, 31], stop_at_eog=False)]
        for _ in range(3):
            batch.step()
        for name, (address, size) in batch.cache_memory().items():
            if "center" not in name:
                spoil(address, size // batch.rows, device)  # the first row's
        events = [event for _ in range(3) for event in batch.step()]
        (error,) = (event for event in events if event[3])
        assert error[0] == handles[0]
        assert sum(event[0] == handles[1] and event[1] is not None for event in events) == 3
        said.append(int(error[3].removeprefix("the logits after position ").split()[0]))
    assert said[1] == said[0] + 1  # of the step that was queued when they were spoilt


def test_what_probe_finds(model, device) -> None:
    most = FORMS[device][0][-1]
    batch, quiet = kiln.Batch(model, run_ahead=True), kiln.Batch(model)
    handle = batch.join([9, 8, 7], stop_at_eog=False)
    for _ in range(4):
        batch.step()
    batch.leave(handle)
    given = ([5 + i for i in range(most)], list(range(most)), [0] * most)
    assert batch.probe(*given)[0] == quiet.probe(*given)[0]
