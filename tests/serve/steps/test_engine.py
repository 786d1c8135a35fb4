"""Both engines over real caches: what they write is what a session writes alone, whoever else is served; and the choice of a session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

import kiln
from kiln.custom_ops.step.sample import reference
from kiln.exporter.serve.steps import engine as engine_module
from kiln.exporter.serve.steps.engine import Busy, Closed, Job, Outcome, Sampling, Steps
from kiln.exporter.serve.steps.rows import Rows, sample
from kiln.exporter.serve.steps.timelines import Timeline, chosen
from kiln.exporter.serve.steps.together import Together
from kiln.exporter.serve.steps.turns import Turns
from tests.serve import solo

CHUNK = 8


@pytest.fixture(scope="module", params=["turns", "together"])
def kind(request: pytest.FixtureRequest) -> str:
    """Sessions by turns, of the plain artifact; rows of a batch, of one with TQ4, where a piece that ends elsewhere changes bits."""
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, request: pytest.FixtureRequest) -> kiln.Model:
    return kiln.Model(str(request.getfixturevalue("talking" if kind == "turns" else "three_rows")), "cpu")


def made(model: kiln.Model, count: int, queue: int = 8, store: kiln.SnapshotStore | None = None) -> Steps:
    """An engine over `count` timelines."""
    most = model.max_seq_len
    if model.manifest.get("rows", 1) == 1:
        return Turns([Timeline(kiln.Session(model, prefill_chunk=CHUNK), store) for _ in range(count)], queue, CHUNK, most)
    batch = kiln.Batch(model, rows=count, prefill_chunk=CHUNK)
    return Together(batch, [Timeline(batch.row(i), store) for i in range(count)], queue, CHUNK, most)


@pytest.fixture
def engine(model: kiln.Model) -> Iterator[Steps]:
    found = made(model, 2)
    yield found
    found.close()


class Waiting:
    """A job whose tokens are kept. instead: number of a token -> what comes in its place."""

    def __init__(self, ids: Sequence[int], most: int, seed: int = 0, instead: dict[int, tuple[int, ...]] | None = None, **more):
        self.tokens: list[int] = []
        self.offered: list[int] = []
        self.done, self.outcome = threading.Event(), Outcome("")
        self.times: list[float] = []
        self.instead = instead or {}
        self.job = Job(tuple(ids), most, Sampling(1.0, 0, 1.0, seed), self.take, self.ended, **more)

    def take(self, token: int) -> bool | Sequence[int]:
        self.offered.append(token)
        self.times.append(time.monotonic())
        ids = self.instead.pop(len(self.tokens), ())
        self.tokens += ids or [token]
        return ids or True

    def ended(self, job: Job, outcome: Outcome) -> None:
        assert not self.done.is_set()
        self.outcome = outcome
        self.done.set()

    def wait(self) -> list[int]:
        assert self.done.wait(30)
        return self.tokens


def prompt(n: int, start: int = 20) -> list[int]:
    return [2, *((start + 7 * i) % 490 + 10 for i in range(n - 1))]


def test_beside_each_other(engine: Steps, model: kiln.Model) -> None:
    jobs = [Waiting(prompt(n, n), 20, n) for n in (3, 55, 17, 41, 9)]
    engine.submit([w.job for w in jobs])
    for n, waiting in zip((3, 55, 17, 41, 9), jobs, strict=True):
        assert waiting.wait() == solo.write(model, prompt(n, n), 20, CHUNK, (1.0, 0, 1.0, n), eog=False)
        assert waiting.outcome == Outcome("length")
    assert engine.load() == (0, 0, 0.0)


@pytest.mark.parametrize("on_host", [False, True])
def test_ids_in_place_of_a_token(engine: Steps, model: kiln.Model, on_host: bool) -> None:
    """What comes after them is what a session writes after a prompt that has them; nothing of the token they replace is left."""
    rows = Rows(Sampling(1.0, 0, 1.0, 3))
    waiting = Waiting(prompt(11), 12, 3, {0: (50, 51), 5: (60,)}, choose=rows.choose if on_host else None)
    engine.submit([waiting.job])
    tokens = waiting.wait()
    assert tokens[:2] == [50, 51] and tokens[5] == 60 and len(tokens) == 12
    for at, end in ((2, 5), (6, 12)):
        assert tokens[at:end] == solo.write(model, [*prompt(11), *tokens[:at]], end - at, CHUNK, (1.0, 0, 1.0, 3), eog=False)


def test_the_host_chooses_as_the_device(engine: Steps, model: kiln.Model) -> None:
    """Where a bias touches a token that is never chosen, all tokens come from the host and are the device's."""
    for seed in range(4):
        rows = Rows(Sampling(1.0, 0, 1.0, seed), bias={9: -100.0})
        waiting = Waiting(prompt(11), 40, seed, choose=rows.choose)
        engine.submit([waiting.job])
        plain = solo.write(model, prompt(11), 40, CHUNK, (1.0, 0, 1.0, seed), eog=False)
        assert 9 not in plain
        assert waiting.wait() == plain


def by_pieces(model: kiln.Model, pieces: Sequence[Sequence[int] | int], most: int, seed: int) -> list[int]:
    """By a session that reads lists as prompts, and takes ids one by one."""
    session = kiln.Session(model, prefill_chunk=CHUNK)
    session.set_sampling(1.0, 0, 1.0, seed)
    for piece in pieces:
        session.decode(piece) if isinstance(piece, int) else session.prefill(list(piece))
    return session.generate(most, None, False)[0]


def test_what_caches_hold_is_not_read_again(model: kiln.Model) -> None:
    """A prompt that goes on behind an answer, one that parts at a cut, one of another salt: each as a session that reads such pieces."""
    store = kiln.SnapshotStore(0, 1 << 20)
    engine, first, more = made(model, 1, store=store), prompt(19), [40, 41, 42]
    answered = Waiting(first, 20, 5, stops=(11,))
    engine.submit([answered.job])
    text = answered.wait()
    assert text == by_pieces(model, [first[:11], first[11:]], 20, 5)
    steps = [int(i) for i in text[:19]]
    on = Waiting([*first, *text, *more], 5, 6)
    engine.submit([on.job])
    assert on.wait() == by_pieces(model, [first[:11], first[11:], *steps, [text[19], *more]], 5, 6) and on.job.cached == 19 + 19
    parts = Waiting([*first[:11], *more], 9, 7)
    engine.submit([parts.job])
    assert parts.wait() == by_pieces(model, [first[:11], more], 9, 7) and parts.job.cached == 11
    other = Waiting([*first[:11], *more], 9, 7, salt="x")
    engine.submit([other.job])
    assert other.wait() == by_pieces(model, [[*first[:11], *more]], 9, 7) and other.job.cached == 0
    engine.close()


def test_scores_of_a_prompt(engine: Steps, model: kiln.Model) -> None:
    """The logits behind each of its ids, which it reads one by one."""
    seen: list[np.ndarray] = []
    waiting = Waiting(prompt(9), 3, 4, score=lambda row, i: seen.append(row.copy()))
    beside = Waiting(prompt(30, 3), 12, 8)
    engine.submit([waiting.job, beside.job])
    assert waiting.wait() == by_pieces(model, [prompt(9)[:1], *prompt(9)[1:]], 3, 4)
    assert all(np.array_equal(a, b) for a, b in zip(seen, solo.rows(model, prompt(9)), strict=True))
    assert beside.wait() == solo.write(model, prompt(30, 3), 12, CHUNK, (1.0, 0, 1.0, 8), eog=False)


def test_the_host_chooses_by_the_operators_rule() -> None:
    random = np.random.default_rng(7)
    for trial in range(120):
        row = (random.standard_normal(512) * random.choice([0.3, 3, 12])).astype(np.float32)
        row[random.integers(0, 512, 40)] = row[3]  # ties
        row[random.integers(0, 512, 20)] = -np.inf
        temperature, top_p = float(random.choice([0, 0.3, 1, 1.7])), float(random.choice([0.1, 0.8, 0.95, 1]))
        top_k, seed, position = (
            int(random.choice([0, 1, 7, 64, 600])),
            int(random.integers(-(1 << 62), 1 << 62)),
            int(random.integers(0, 1 << 17)),
        )
        given = [torch.tensor([x], dtype=t) for x, t in (
            (temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32), (seed, torch.int64), (position, torch.int64),
        )]  # fmt: skip
        expected = int(reference(torch.from_numpy(row)[None], *given))
        assert sample(row, Sampling(temperature, top_k, top_p, seed), position) == expected, trial
    with pytest.raises(ValueError, match="no token"):
        sample(np.full(8, -np.inf, np.float32), Sampling(), 0)


def test_wishes_that_leave_nothing() -> None:
    """A token comes whatever contradicts whatever: penalties beyond float32, a bias and a least length against what alone may come."""
    row = np.array([-3.0, 5.0, 2.0, 1.0], np.float32)
    for by in (5e-324, 1e-45, 1e-38):
        assert Rows(Sampling(), repetition=by, prompt=(1, 2)).choose(row, 0, 1) == 1
    only = Rows(Sampling(), bias={2: -100.0, 3: 5.0}, barred=lambda count: (3,), allowed=lambda: (2, 3))
    assert [only.choose(row, i, 1) for i in range(2)] == [3, 3]
    assert Rows(Sampling(), allowed=lambda: (2,), barred=lambda count: (2,)).choose(row, 0, 1) == 2
    assert Rows(Sampling(), bias=dict.fromkeys(range(4), -100.0)).choose(row, 0, 1) == 1


def test_a_token_that_gave_way_is_not_penalized() -> None:
    row = np.array([1.0, 5.0, 4.5, 0.0], np.float32)
    rows = Rows(Sampling(), presence=1.0)
    assert rows.choose(row, 0, 1) == 1
    rows.replaced((3, 3))
    assert rows.choose(row, 2, 1) == 1 and rows.choose(row, 3, 1) == 2


def test_the_end_of_the_window(engine: Steps, model: kiln.Model) -> None:
    n = model.max_seq_len - 6
    waiting, host = Waiting(prompt(n), 50), Waiting(prompt(n), 50, choose=Rows(Sampling(1.0, 0, 1.0, 0)).choose)
    engine.submit([waiting.job, host.job])
    assert waiting.wait() == host.wait() and waiting.outcome.why == "length"
    assert len(waiting.tokens) == 7


def test_who_waits_and_who_is_refused(engine: Steps) -> None:
    gate = threading.Event()
    jobs = [Waiting(prompt(5), 4) for _ in range(10)]
    hold, take = jobs[0].job, jobs[0].take
    hold.take = lambda token: gate.wait(30) and take(token)
    engine.submit([w.job for w in jobs])
    with pytest.raises(Busy):
        engine.submit([Waiting(prompt(5), 4).job])
    engine.cancel(jobs[7].job)
    gate.set()
    for i, waiting in enumerate(jobs):
        waiting.wait()
        assert waiting.outcome.why == ("cancelled" if i == 7 else "length")
    late = Waiting(prompt(5), 4, deadline=time.monotonic() - 1)
    engine.submit([late.job])
    assert late.done.wait(10) and late.outcome.why == "deadline" and not late.tokens


def test_a_long_prompt_delays_by_a_chunk(engine: Steps, model: kiln.Model) -> None:
    """While one is read, the other's tokens come: some between every two of its chunks."""
    most = model.max_seq_len - 6
    writer = Waiting(prompt(4), most - 4)
    engine.submit([writer.job])
    while not writer.tokens:
        time.sleep(0.001)
    before = len(writer.tokens)
    reader = Waiting(prompt(most), 1, reuse=False)
    engine.submit([reader.job])
    reader.wait()
    during = sum(reader.job.started <= t <= reader.job.read for t in writer.times)
    assert during >= min(most - 4 - before, most // CHUNK), "tokens while a prompt of many chunks was read"
    writer.wait()


def test_what_fails_is_that_jobs_alone(engine: Steps, model: kiln.Model) -> None:
    """A taker that raises, ids outside of the vocabulary: an error for them, and the sessions serve on."""

    def broken(token: int) -> bool:
        raise RuntimeError("no")

    bad, wrong, good = Waiting(prompt(5), 4), Waiting([2, 9999], 4), Waiting(prompt(6), 6, 1)
    bad.job.take = broken
    engine.submit([bad.job, wrong.job, good.job])
    assert good.wait() == solo.write(model, prompt(6), 6, CHUNK, (1.0, 0, 1.0, 1), eog=False)
    assert bad.done.wait(10) and wrong.done.wait(10)
    assert (bad.outcome.why, wrong.outcome.why) == ("error", "error") and "9999" in wrong.outcome.error
    again = Waiting(prompt(5), 6, 2)
    engine.submit([again.job])
    assert again.wait() == solo.write(model, prompt(5), 6, CHUNK, (1.0, 0, 1.0, 2), eog=False)


def test_a_mistake_of_the_engine_is_told(model: kiln.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(model, 1)
    monkeypatch.setattr("kiln.exporter.serve.steps.engine.chosen", lambda *given: 1 / 0)
    jobs = [Waiting(prompt(5), 4) for _ in range(3)]
    engine.submit([w.job for w in jobs])
    assert all(w.done.wait(10) for w in jobs) and jobs[0].outcome.why == "error" and "ZeroDivisionError" in engine.broken
    with pytest.raises(Closed):
        engine.submit([Waiting(prompt(5), 1).job])
    engine.close()


def test_closing_ends_every_job(model: kiln.Model) -> None:
    engine = made(model, 1)
    jobs = [Waiting(prompt(5), 50) for _ in range(4)]
    engine.submit([w.job for w in jobs])
    while not jobs[0].tokens:
        time.sleep(0.001)
    engine.close()
    assert all(w.done.is_set() for w in jobs) and jobs[-1].outcome.why == "closed"
    with pytest.raises(Closed):
        engine.submit([Waiting(prompt(5), 1).job])


def test_other_threads_run_while_a_step_does(model: kiln.Model) -> None:
    """The runner gives Python's lock away: this thread sees positions within a prompt and an answer that another one is in.

    A busy machine may let this thread run too late for one call, not for all of 50; with the lock kept, none could show such a position.
    """
    session = kiln.Session(model, prefill_chunk=2)
    calls: list[Callable[[], object]] = [lambda: session.prefill(prompt(40)), lambda: session.generate(50, None, False)]

    def seen_within(call: Callable[[], object]) -> set[int]:
        before, seen = session.position, set[int]()
        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            seen.add(session.position)
        thread.join()
        return seen - {before, session.position}

    for _ in range(50):
        session.reset()
        if all(seen_within(call) for call in calls):
            return
    pytest.fail("the lock was kept for the whole call, 50 times")


class Fake:
    """A session of which only the position is asked."""

    def __init__(self, held: Sequence[int], used: float, salt: str = ""):
        self.position, self.earliest = len(held), 0
        self.timeline = Timeline(self)
        self.timeline.known, self.timeline.last_used, self.timeline.salt = [*held, 99], used, salt

    def rewind(self, position: int) -> None:
        self.position = position


def test_which_session_a_prompt_takes() -> None:
    a, b, c, empty = Fake([2, 3, 4], 3.0), Fake([2, 3], 1.0), Fake([2, 3, 4, 5], 2.0), Fake([], 9.0)
    some = [x.timeline for x in (a, b, c, empty)]
    assert chosen(some, [2, 3, 4, 7], "") is a.timeline  # the longest that the prompt begins with
    assert chosen(some, [2, 3, 4, 5, 6], "") is c.timeline
    assert chosen(some, [2, 3, 4, 5], "") is a.timeline  # one id at least is left to read
    assert chosen(some, [7, 8], "") is empty.timeline and chosen(some[:3], [7, 8], "") is b.timeline  # used longest ago
    assert chosen(some, [2, 3, 4, 7], "other") is empty.timeline
    assert a.timeline.begin([2, 3, 4, 7], "") == 3 and a.position == 3
    assert a.timeline.begin([2, 3, 4, 7], "other") == 0 and a.position == 0


def test_what_another_reads_is_awaited(model: kiln.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts with one beginning: it is read once, and what is written is what each writes alone. Another prompt does not wait."""
    monkeypatch.setattr(engine_module, "AWAITED", 16)
    common, ends = prompt(40), [[30 + i, 31, 32, 33, 34] for i in range(3)]
    store = kiln.SnapshotStore(0, 1 << 30)
    engine = made(model, 3, store=store)
    try:
        jobs = [Waiting([*common, *end], 6, i, stops=(40,)) for i, end in enumerate(ends)]
        other = Waiting(prompt(20, 5), 6, 9)
        engine.submit([*(w.job for w in jobs), other.job])
        for i, (waiting, end) in enumerate(zip(jobs, ends, strict=True)):
            assert waiting.wait() == by_pieces(model, [common, end], 6, i)
        assert other.wait() == solo.write(model, prompt(20, 5), 6, CHUNK, (1.0, 0, 1.0, 9), eog=False)
    finally:
        engine.close()
    assert [w.job.cached for w in jobs] == [0, 40, 40]
    assert other.job.started < jobs[1].job.started and store.counts()["hits"] == 2


def test_who_reads_what_is_awaited_may_leave(model: kiln.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one then reads it itself; what has a salt, or wants nothing reused, never waits."""
    monkeypatch.setattr(engine_module, "AWAITED", 16)
    common = prompt(40)
    engine = made(model, 3, store=kiln.SnapshotStore(0, 1 << 30))
    try:
        first = Waiting([*common, 30, 31], 6, 0, stops=(40,))
        first.job.cancelled = True
        rest = [Waiting([*common, 32 + i, 33], 6, i, stops=(40,)) for i in range(2)]
        apart = [Waiting([*common, 50, 51], 6, 3, stops=(40,), salt="s"), Waiting([*common, 50, 51], 6, 3, stops=(40,), reuse=False)]
        engine.submit([w.job for w in (first, *rest)])
        for i, waiting in enumerate(rest):
            assert waiting.wait() == by_pieces(model, [common, [32 + i, 33]], 6, i)
        engine.submit([w.job for w in apart])
        assert [w.wait() for w in apart] == [by_pieces(model, [common, [50, 51]], 6, 3)] * 2
    finally:
        engine.close()
    assert first.outcome.why == "cancelled" and [w.job.cached for w in (*rest, *apart)] == [0, 40, 0, 0]
