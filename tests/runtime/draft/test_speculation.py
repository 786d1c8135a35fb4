"""Drafts of a session: every text, logit and state is what it would be without them, whatever is drafted and however much is wrong."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import pytest

import kiln
from tests.runtime.batches import FORMS, ROWS, load, spoil

VOCAB = 512  # of the smallest model


pytestmark = pytest.mark.usefixtures("one_runner_thread")


@pytest.fixture(scope="module")
def model(several, device) -> kiln.Model:
    return load(several, device)


@pytest.fixture(scope="module")
def slots(device) -> int:
    return FORMS[device][1]


@pytest.fixture(scope="module")
def most(device) -> int:
    """Drafts of the largest step."""
    return FORMS[device][0][-1] - 1


def session(model: kiln.Model, prompt: list[int], **sampling: Any) -> kiln.Session:
    found = kiln.Session(model)
    found.set_sampling(**sampling)
    found.prefill(prompt)
    return found


def cases(count: int, seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts that repeat themselves more or less, from one token to beyond the ring; greedy and sampled."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        unit = [rng.randrange(8, VOCAB) for _ in range(rng.choice((2, 3, 5, 9)))]
        prompt = [t if rng.random() < 0.9 else rng.randrange(8, VOCAB) for t in unit * 20][: rng.choice((1, 2, 3, 17, 32, 33, 40))]
        found.append((prompt, {"temperature": rng.choice((0.0, 0.7, 1.2)), "top_k": rng.choice((0, 3, 40)), "seed": i}))
    return found


def same_state(a: kiln.Session, b: kiln.Session) -> bool:
    return a.position == b.position and a.tokens == b.tokens and np.array_equal(a.logits(), b.logits())


def test_texts(model, slots, most) -> None:
    """By what occurred before: tokens, why they end, and the session behind them, also where a text goes on in a second call."""
    right = 0
    for prompt, sampling in cases(12, 0):
        plain, drafted = session(model, prompt, **sampling), session(model, prompt, **sampling)
        for tokens in (11, slots):
            assert drafted.generate(tokens, stop_at_eog=False, draft="ngram") == plain.generate(tokens, stop_at_eog=False), prompt
            assert same_state(plain, drafted)
        counts = drafted.draft_counts
        assert counts["tokens"] == counts["steps"] + sum(counts["right"]) and len(counts["tried"]) == most
        right += sum(counts["right"])
    assert right > 12


@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_number_of_rejected_drafts(model, slots, most, length) -> None:
    """Behind every number of them, in steps of each size, over the border of the ring and of the exact window: logits too, bit for bit."""
    seen = set()
    for i, (prompt, sampling) in enumerate(cases(8, length)):
        plain, drafted = session(model, prompt, **sampling), session(model, prompt, **sampling)
        rows: dict[kiln.Session, list[np.ndarray]] = {plain: [], drafted: []}
        for each, got in rows.items():
            each.set_logits_sink(lambda row, got=got: got.append(row.copy()))
        text, _ = plain.generate(slots, stop_at_eog=False)
        script = kiln.ScriptedDrafter(text, [0.7, 0.6, 0.6], model.vocab_size, seed=i)
        assert drafted.generate(slots, stop_at_eog=False, draft=script, draft_length=length)[0] == text
        assert len(rows[plain]) == len(rows[drafted]) and all(np.array_equal(a, b) for a, b in zip(*rows.values(), strict=True))
        assert same_state(plain, drafted) and plain.position == slots
        counts = drafted.draft_counts
        tried, right = [*counts["tried"], 0], [*counts["right"], 0]
        seen |= {n for n in range(length) if tried[n] > right[n]} | ({length} if right[length - 1] else set())
        assert all(tried[n + 1] <= right[n] for n in range(most)) and tried[length] == 0
    assert seen == set(range(length + 1))  # of the first wrong one, or all right


def test_stops(model, most, device) -> None:
    """Wherever a text stops in the middle of a step: by length, by the callback, by its own end."""
    prompt = cases(3, 5)[2][0]
    plain = session(model, prompt)
    text, _ = plain.generate(20, stop_at_eog=False)

    def script() -> kiln.ScriptedDrafter:
        return kiln.ScriptedDrafter(text, [1.0] * most, model.vocab_size)

    for n in range(1, 12):
        a, b, c = (session(model, prompt) for _ in range(3))
        assert a.generate(n, stop_at_eog=False) == b.generate(n, stop_at_eog=False, draft=script())
        got: list[int] = []
        stop = c.generate(20, lambda t: got.append(t) or len(got) < n, stop_at_eog=False, draft=script())[1]  # noqa: B023
        assert (got, stop) == (text[:n], "callback") and same_state(a, b) and same_state(a, c)
        assert a.generate(20 - n, stop_at_eog=False)[0] == c.generate(20 - n, stop_at_eog=False)[0] == text[n:]
    eog = next(t for t in range(model.vocab_size) if model.is_eog(t))
    for at in range(1, 8):  # a draft says that the text ends, and is right or wrong
        a, b = session(model, prompt), session(model, prompt)
        drafts = [*text[:at], eog, *text[at + 1 :]]
        assert b.generate(20, draft=kiln.ScriptedDrafter(drafts, [1.0] * most, model.vocab_size)) == a.generate(20)
        assert device != "cpu" or same_state(a, b)  # a GPU's step that was queued behind the end of a text has left no logits
        assert (a.position, a.tokens) == (b.position, b.tokens) and a.decode(8) == b.decode(8) and same_state(a, b)


def test_calls_that_end_early(model) -> None:
    """Sinks and callbacks that throw in the middle of a step: the session stands where it would stand without drafts."""

    class Enough(Exception):
        pass

    prompt = cases(3, 5)[2][0]
    text, _ = session(model, prompt).generate(20, stop_at_eog=False)
    for at in range(1, 9):
        for which in ("sink", "callback"):
            states = []
            for draft in (None, kiln.ScriptedDrafter(text, [1.0, 1.0, 0.5], model.vocab_size)):
                each, left = session(model, prompt), at

                def throws(_: object) -> None:
                    nonlocal left  # noqa: B023
                    left -= 1
                    if left == 0:
                        raise Enough

                if which == "sink":
                    each.set_logits_sink(throws)
                with pytest.raises(Enough):
                    each.generate(20, throws if which == "callback" else None, stop_at_eog=False, draft=draft)
                each.set_logits_sink(None)
                states.append((each.position, each.tokens, each.generate(5, stop_at_eog=False)))
            assert states[0] == states[1], (at, which)


def test_back_and_forth(model, device, slots, most) -> None:
    """Drafts, plain steps, prompts, rewinding and snapshots in any order: a cold session with those tokens has the same logits."""
    rng = random.Random(3)
    warm, rewound = session(model, [9, 8, 7, 9, 8]), 0
    for _ in range(120):
        what = rng.randrange(6)
        if warm.position > slots - 12:
            warm.reset()
            warm.prefill([rng.randrange(8, 40) for _ in range(rng.randrange(2, 20))])
        elif what == 0:
            warm.prefill([rng.randrange(8, 40) for _ in range(rng.randrange(1, 5))])
        elif what == 1:
            warm.decode()
        elif what == 2 and warm.earliest < warm.position:
            warm.rewind(to := rng.randrange(max(warm.earliest, 1), warm.position))
            warm.decode(rng.randrange(8, 40))
            rewound += 1
            assert warm.position == to + 1
        elif what == 3:
            earliest, snapshot = warm.earliest, warm.snapshot(whole=True)
            warm.generate(4, stop_at_eog=False, draft="ngram")
            warm.restore(snapshot)
            assert warm.earliest == earliest
        else:
            drafts = kiln.ScriptedDrafter([rng.randrange(8, 40) for _ in range(12)], [1.0] * most, model.vocab_size)  # hardly one is right
            warm.generate(rng.randrange(1, 7), stop_at_eog=False, draft=drafts if what == 4 else "ngram")
        cold = kiln.Session(model)
        for token in warm.tokens:
            cold.decode(token)
        assert np.abs(warm.logits() - cold.logits()).max() < (2e-2 if device == "cpu" else 2)  # a prompt's pieces move bits of TQ4's codes
    assert rewound > 3


def test_where_the_rings_end_is_kept(model, device, tmp_path) -> None:
    """A snapshot of a session that forgot tokens, and a saved one, know how far its rings had been written."""
    passed = FORMS[device][2]["exact"][0] + 1  # one position is written over
    first = session(model, list(range(8, 8 + passed - 6)))
    first.generate(7, stop_at_eog=False)  # the last of them is no step's yet
    assert first.position == passed
    first.rewind(first.position - 3)
    first.decode(11)
    first.rewind(first.position - 1)
    assert first.earliest > 0
    first.save(tmp_path / "s")
    for take in (first.snapshot(whole=True), tmp_path / "s"):
        other = kiln.Session(model)
        other.restore(take)
        assert (other.position, other.earliest) == (first.position, first.earliest)


def test_timelines_of_a_batch(model, slots, device) -> None:
    """Some of the timelines draft, and come and go: every text, why it ends and its last logits are those of the timeline alone."""
    rng = random.Random(1)
    todo = [(prompt, sampling, rng.choice((1, 2, 7, 30, 0)), rng.choice(("ngram", "ngram", "off"))) for prompt, sampling in cases(14, 9)]
    batch, texts, told, waiting = kiln.Batch(model, keep_logits=True), {}, {}, list(todo)
    several = 0
    while waiting or batch.active:
        while waiting and batch.active < ROWS and rng.random() < 0.6:
            prompt, sampling, most, draft = waiting.pop()
            handle = batch.join(prompt, **sampling, max_new_tokens=most, stop_at_eog=False, draft=draft)
            texts[handle], told[handle] = [], (prompt, sampling, most)
        events = batch.step()
        several += len(events) > len({handle for handle, *_ in events})
        for handle, token, stop, error in events:
            assert error is None and handle in texts
            texts[handle].append(token)
            if stop:
                prompt, sampling, most = told[handle]
                assert (texts.pop(handle), stop) == session(model, prompt, **sampling).generate(most or slots, stop_at_eog=False)
    assert not texts and several > (3 if device == "cpu" else 1)  # the GPU's model repeats itself less
    counts = batch.draft_counts
    assert counts["tokens"] == counts["steps"] + sum(counts["right"]) > sum(counts["right"]) > 0
    with pytest.raises(kiln.Error, match="a step: the artifact's largest step takes"):
        batch.join([9, 8], draft="ngram", draft_length=99)
    with pytest.raises(kiln.Error, match="drafts by 'magic'"):
        batch.join([9, 8], draft="magic")


def test_only_the_rows_that_are_named(model, device) -> None:
    """A step leaves alone, and is not moved by, what other rows' caches hold: a session has the memory of one."""
    batch, clean = kiln.Batch(model), kiln.Batch(model)
    for address, size in batch.cache_memory().values():
        spoil(address + size // ROWS, size - size // ROWS, device)
    step = ([9, 8], [0, 1], [0, 0])
    for a, b in zip(batch.probe(*step)[:2], clean.probe(*step)[:2], strict=True):
        assert np.array_equal(a, b)
    if device == "cpu":
        for address, size in batch.cache_memory().values():
            assert ctypes.string_at(address + size // ROWS, size - size // ROWS) == b"\xff" * (size - size // ROWS)


def test_not_finite(model, device, most) -> None:
    """The error names the position of the token that cannot be sampled, and the session goes on from before it."""
    each = session(model, [9, 8, 7, 6])
    text, _ = each.generate(12, stop_at_eog=False)
    broken = session(model, [9, 8, 7, 6])
    broken.generate(2, stop_at_eog=False)
    for name, (address, size) in broken.cache_memory().items():
        if name.endswith("k_ring"):
            spoil(address, size, device)
    with pytest.raises(kiln.Error, match="the logits after position 5 are not finite"):
        broken.generate(8, stop_at_eog=False, draft=kiln.ScriptedDrafter(text[2:], [1.0] * most, model.vocab_size))
    with pytest.raises(kiln.Error, match="no token to start from"):
        broken.generate(8, draft="ngram")


def test_refused(model, device, most, toy) -> None:
    each = session(model, [9, 8, 7])
    with pytest.raises(kiln.Error, match=f"a step: the artifact's largest step takes {most + 1} tokens, so 1 to {most} drafts"):
        each.generate(4, draft="ngram", draft_length=most + 1)
    with pytest.raises(kiln.Error, match="drafts by 'magic': must be ngram, mtp or off"):
        each.generate(4, draft="magic")
    with pytest.raises(kiln.Error, match="drafts: token .* is outside of the vocabulary"):
        each.generate(4, stop_at_eog=False, draft=kiln.ScriptedDrafter([model.vocab_size] * 9, [1.0], 1 << 20))
    with pytest.raises(kiln.Error, match="a rate of 1.5"):
        kiln.ScriptedDrafter([1], [1.5], VOCAB)
    each.pretend(9)
    with pytest.raises(kiln.Error, match="moved for a measurement"):
        each.generate(4, draft="ngram")
    plain = kiln.Session(kiln.Model(str(toy), device=device))
    plain.prefill([1, 2, 3])
    with pytest.raises(kiln.Error, match="has no steps of several tokens; export it with --decode-rows"):
        plain.generate(4, draft="ngram")
    assert len(plain.generate(4, draft="off", stop_at_eog=False)[0]) == 4
