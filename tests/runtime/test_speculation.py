"""Drafts of a session: every text, logit and state is what it would be without them, whatever is drafted and however much is wrong."""

from __future__ import annotations

import ctypes
import math
import random
from typing import Any

import numpy as np
import pytest

import kiln

SLOTS, ROWS, MOST = 64, 3, 3  # of the artifact three_rows; drafts of its largest step
VOCAB = 512


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models this small two only wait for each other."""
    kiln.set_threads(1)
    yield
    kiln.set_threads(0)


@pytest.fixture(scope="module")
def model(three_rows) -> kiln.Model:
    return kiln.Model(str(three_rows))


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


def test_texts(model) -> None:
    """By what occurred before: tokens, why they end, and the session behind them, also where a text goes on in a second call."""
    right = 0
    for prompt, sampling in cases(12, 0):
        plain, drafted = session(model, prompt, **sampling), session(model, prompt, **sampling)
        for most in (11, SLOTS):
            assert drafted.generate(most, stop_at_eog=False, draft="ngram") == plain.generate(most, stop_at_eog=False), (prompt, sampling)
            assert same_state(plain, drafted)
        counts = drafted.draft_counts
        assert counts["tokens"] == counts["steps"] + sum(counts["right"]) and len(counts["tried"]) == MOST
        right += sum(counts["right"])
    assert right > 12


@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_number_of_rejected_drafts(model, length) -> None:
    """Behind every number of them, in steps of each size, over the border of the ring and of the exact window: logits too, bit for bit."""
    seen = set()
    for i, (prompt, sampling) in enumerate(cases(8, length)):
        plain, drafted = session(model, prompt, **sampling), session(model, prompt, **sampling)
        rows: dict[kiln.Session, list[np.ndarray]] = {plain: [], drafted: []}
        for each, got in rows.items():
            each.set_logits_sink(lambda row, got=got: got.append(row.copy()))
        text, _ = plain.generate(SLOTS, stop_at_eog=False)
        script = kiln.ScriptedDrafter(text, [0.7, 0.6, 0.6], VOCAB, seed=i)
        assert drafted.generate(SLOTS, stop_at_eog=False, draft=script, draft_length=length)[0] == text
        assert len(rows[plain]) == len(rows[drafted]) and all(np.array_equal(a, b) for a, b in zip(*rows.values(), strict=True))
        assert same_state(plain, drafted) and plain.position == SLOTS
        counts = drafted.draft_counts
        tried, right = [*counts["tried"], 0], [*counts["right"], 0]
        seen |= {n for n in range(length) if tried[n] > right[n]} | ({length} if right[length - 1] else set())
        assert all(tried[n + 1] <= right[n] for n in range(MOST)) and tried[length] == 0
    assert seen == set(range(length + 1))  # of the first wrong one, or all right


def test_stops(model) -> None:
    """Wherever a text stops in the middle of a step: by length, by the callback, by its own end."""
    prompt = cases(3, 5)[2][0]
    plain = session(model, prompt)
    text, _ = plain.generate(20, stop_at_eog=False)

    def script() -> kiln.ScriptedDrafter:
        return kiln.ScriptedDrafter(text, [1.0] * MOST, VOCAB)

    for most in range(1, 12):
        a, b, c = (session(model, prompt) for _ in range(3))
        assert a.generate(most, stop_at_eog=False) == b.generate(most, stop_at_eog=False, draft=script())
        got: list[int] = []
        stop = c.generate(20, lambda t: got.append(t) or len(got) < most, stop_at_eog=False, draft=script())[1]  # noqa: B023
        assert (got, stop) == (text[:most], "callback") and same_state(a, b) and same_state(a, c)
        assert a.generate(20 - most, stop_at_eog=False)[0] == c.generate(20 - most, stop_at_eog=False)[0] == text[most:]
    eog = next(t for t in range(VOCAB) if model.is_eog(t))
    for at in range(1, 8):  # a draft says that the text ends, and is right or wrong
        a, b = session(model, prompt), session(model, prompt)
        drafts = [*text[:at], eog, *text[at + 1 :]]
        assert b.generate(20, draft=kiln.ScriptedDrafter(drafts, [1.0] * MOST, VOCAB)) == a.generate(20)
        assert same_state(a, b)


def test_calls_that_end_early(model) -> None:
    """Sinks and callbacks that throw in the middle of a step: the session stands where it would stand without drafts."""

    class Enough(Exception):
        pass

    prompt = cases(3, 5)[2][0]
    text, _ = session(model, prompt).generate(20, stop_at_eog=False)
    for at in range(1, 9):
        for which in ("sink", "callback"):
            states = []
            for draft in (None, kiln.ScriptedDrafter(text, [1.0, 1.0, 0.5], VOCAB)):
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


def test_back_and_forth(model) -> None:
    """Drafts, plain steps, prompts, rewinding and snapshots in any order: a cold session with those tokens has the same logits."""
    rng = random.Random(3)
    warm, rewound = session(model, [9, 8, 7, 9, 8]), 0
    for _ in range(120):
        what = rng.randrange(6)
        if warm.position > SLOTS - 12:
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
            drafts = kiln.ScriptedDrafter([rng.randrange(8, 40) for _ in range(12)], [1.0] * MOST, VOCAB)  # hardly one is right
            warm.generate(rng.randrange(1, 7), stop_at_eog=False, draft=drafts if what == 4 else "ngram")
        cold = kiln.Session(model)
        for token in warm.tokens:
            cold.decode(token)
        assert np.abs(warm.logits() - cold.logits()).max() < 2e-2  # a prompt's pieces move bits of TQ4's codes
    assert rewound > 3


def test_where_the_rings_end_is_kept(model, tmp_path) -> None:
    """A snapshot of a session that forgot tokens, and a saved one, know how far its rings had been written."""
    first = session(model, list(range(8, 40)))
    first.generate(7, stop_at_eog=False)
    first.rewind(first.position - 3)
    first.decode(11)
    first.rewind(first.position - 1)
    assert first.earliest > 0
    first.save(tmp_path / "s")
    for take in (first.snapshot(whole=True), tmp_path / "s"):
        other = kiln.Session(model)
        other.restore(take)
        assert (other.position, other.earliest) == (first.position, first.earliest)


def test_only_the_rows_that_are_named(three_rows) -> None:
    """A step leaves alone, and is not moved by, what other rows' caches hold: a session has the memory of one."""
    batch = kiln.Batch(kiln.Model(str(three_rows)))
    others = []
    for address, size in batch.cache_memory().values():
        row = size // ROWS
        part = (ctypes.c_ubyte * (2 * row)).from_address(address + row)
        part[:] = [0xFF] * (2 * row)  # NaN as floats
        others.append(part)
    batch.join(prompt=[9, 8, 7], max_new_tokens=1)
    while batch.active:
        batch.step()
    assert all(bytes(part) == b"\xff" * len(part) for part in others)


def test_not_finite(model) -> None:
    """The error names the position of the token that cannot be sampled, and the session goes on from before it."""
    each = session(model, [9, 8, 7, 6])
    text, _ = each.generate(12, stop_at_eog=False)
    broken = session(model, [9, 8, 7, 6])
    broken.generate(2, stop_at_eog=False)
    for name, (address, size) in broken.cache_memory().items():
        if name.endswith("k_ring"):
            (ctypes.c_float * (size // 4)).from_address(address)[:] = [math.nan] * (size // 4)
    with pytest.raises(kiln.Error, match="the logits after position 5 are not finite"):
        broken.generate(8, stop_at_eog=False, draft=kiln.ScriptedDrafter(text[2:], [1.0] * MOST, VOCAB))
    with pytest.raises(kiln.Error, match="no token to start from"):
        broken.generate(8, draft="ngram")


def test_refused(model, toy) -> None:
    each = session(model, [9, 8, 7])
    with pytest.raises(kiln.Error, match="4 a step: the artifact's largest step takes 4 tokens, so 1 to 3 drafts"):
        each.generate(4, draft="ngram", draft_length=4)
    with pytest.raises(kiln.Error, match="drafts by 'magic': must be ngram or off"):
        each.generate(4, draft="magic")
    with pytest.raises(kiln.Error, match="drafts: token 512 is outside of the vocabulary"):
        each.generate(4, stop_at_eog=False, draft=kiln.ScriptedDrafter([512] * 9, [1.0], 1 << 20))
    with pytest.raises(kiln.Error, match="a rate of 1.5"):
        kiln.ScriptedDrafter([1], [1.5], VOCAB)
    each.pretend(9)
    with pytest.raises(kiln.Error, match="moved for a measurement"):
        each.generate(4, draft="ngram")
    plain = kiln.Session(kiln.Model(str(toy)))
    plain.prefill([1, 2, 3])
    with pytest.raises(kiln.Error, match="has no steps of several tokens; export it with --decode-rows"):
        plain.generate(4, draft="ngram")
    assert len(plain.generate(4, draft="off", stop_at_eog=False)[0]) == 4
