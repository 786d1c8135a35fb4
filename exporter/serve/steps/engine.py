"""Jobs -> tokens: one thread takes all steps of all timelines, in turns. Knows neither HTTP nor conversations.

A round is one chunk of one prompt that is being read, and a few tokens of every answer that is being written: so a long prompt delays the
others by a chunk at most. Prompts wait in order. What `Engine` promises is all that a server may use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kiln.exporter.serve.steps.timelines import Timeline, chosen

log = logging.getLogger("kiln.serve")

ALONE, SHARED = 8, 4  # tokens of an answer in a round: where there is no other, and where there are


class Busy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine takes no more jobs."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """why: taken (`take` returned False), length, cancelled, deadline, closed, error. error: of the runner, for the log and a client."""

    why: str
    error: str = ""


Take = Callable[[int], "bool | Sequence[int]"]


@dataclass(eq=False)
class Job:
    """A prompt and who takes its tokens. The engine calls `take`, `choose`, `score` and `ended` from its own thread.

    take(token): True: more; False: it was the last one; ids: it does not count, these come in its place, and more.
    choose(row, position, token): looks at the logits float32 [V] of which the device sampled `token`, and says which token counts; steps
    then run one by one. score(row, i): the logits behind the prompt's id i, which is then read id by id. ended is called once, last.
    """

    ids: tuple[int, ...]
    most: int
    sampling: Sampling
    take: Take
    ended: Callable[[Outcome], None]
    choose: Callable[[Any, int, int], int] | None = None
    score: Callable[[Any, int], None] | None = None
    stops: tuple[int, ...] = ()  # positions, ascending, where a later prompt may part from this one
    salt: str = ""
    reuse: bool = True
    deadline: float | None = None  # of time.monotonic()
    cancelled: bool = False
    cached: int = 0  # ids of the prompt that the caches held
    queued: float = field(default_factory=time.monotonic)
    started: float = 0.0
    read: float = 0.0  # when its prompt had been read
    over: bool = False


class Engine(Protocol):
    """Any thread may call."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them, or none: raises Busy or Closed."""

    def cancel(self, job: Job) -> None:
        """It ends soon, wherever it stands; nothing happens where it has ended."""

    def close(self) -> None:
        """Ends every job as closed, and the engine."""

    def load(self) -> tuple[int, int, float]:
        """Jobs in work, jobs that wait, the share of all caches' slots that is filled."""

    @property
    def broken(self) -> str:
        """Why no job can be served any more; empty: all is well."""


@dataclass(eq=False)
class _Row:
    job: Job
    timeline: Timeline
    at: int  # ids of the prompt that were read
    new: int = 0
    sampled: int = -1  # by the device, for `choose`

    @property
    def reading(self) -> bool:
        return self.at < len(self.job.ids)


class Steps:
    """An `Engine` over timelines that take turns. queue: jobs that may wait; chunk: ids of a prompt in a round; most: slots of a cache."""

    def __init__(self, timelines: Sequence[Timeline], queue: int, chunk: int, most: int):
        self._idle, self._count, self._queue, self._chunk, self._most = list(timelines), len(timelines), queue, chunk, most
        self._waiting: deque[Job] = deque()
        self._rows: list[_Row] = []
        self._changed = threading.Condition()
        self._closing, self._share = False, ALONE
        self.broken = ""
        self._thread = threading.Thread(target=self._run, name="kiln-steps", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            if self._closing or self.broken:
                raise Closed(self.broken)
            if len(self._waiting) + len(self._rows) + len(jobs) > self._queue + self._count:
                raise Busy
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def load(self) -> tuple[int, int, float]:
        with self._changed:
            used = sum(row.timeline.session.position for row in self._rows)
            return len(self._rows), len(self._waiting), used / (self._count * self._most) if self._count else 0.0

    # ---- the thread ----

    def _run(self) -> None:
        try:
            self._rounds()
        except Exception as e:  # a mistake of this file: nobody may wait for ever
            log.exception("the engine stopped")
            with self._changed:
                self.broken = f"the engine stopped: {type(e).__name__}"
                left = [*(row.job for row in self._rows), *self._waiting]
                self._rows.clear()
                self._waiting.clear()
            for job in left:
                self._tell(job, Outcome("error", self.broken))

    def _rounds(self) -> None:
        turn = 0
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._closing):
                    self._changed.wait()
                over = self._sweep()
                if not self._closing:
                    self._admit()
                rows = list(self._rows)
            for job, why in over:
                self._tell(job, Outcome(why))
            if self._closing:
                for row in rows:
                    self._end(row, Outcome("closed"))
                return
            for row in rows:
                self._guarded(row, self._look)
            reading = [row for row in rows if row.reading and not row.job.over]
            if reading:
                turn += 1
                self._guarded(reading[turn % len(reading)], self._read)
            writing = [row for row in rows if not row.reading and not row.job.over]
            self._share = ALONE if len(rows) == 1 else SHARED
            for row in writing:
                self._guarded(row, self._write)

    def _sweep(self) -> list[tuple[Job, str]]:
        """Jobs that end while they wait."""
        now, kept, over = time.monotonic(), deque[Job](), list[tuple[Job, str]]()
        for job in self._waiting:
            late = job.deadline is not None and now > job.deadline
            why = "closed" if self._closing else "cancelled" if job.cancelled else "deadline" if late else ""
            if why:
                over.append((job, why))
            else:
                kept.append(job)
        self._waiting = kept
        return over

    def _admit(self) -> None:
        while self._waiting and self._idle:
            job = self._waiting[0]
            timeline = chosen(self._idle, job.ids, job.salt)
            self._idle.remove(timeline)
            self._waiting.popleft()
            job.started = time.monotonic()
            self._rows.append(_Row(job, timeline, -1))

    def _guarded(self, row: _Row, step: Callable[[_Row], None]) -> None:
        """What fails in a job is that job's alone."""
        import kiln

        if row.job.over:
            return
        try:
            step(row)
        except kiln.Error as e:
            self._fail(row, str(e))
        except Exception:
            log.exception("a job failed")
            self._fail(row, "internal error")

    def _fail(self, row: _Row, error: str) -> None:
        import kiln

        try:
            row.timeline.known.clear()
            row.timeline.session.reset()
        except kiln.Error as e:  # a device that failed: this timeline is lost
            log.error("a session cannot be used any more: %s", e)
            with self._changed:
                self._rows.remove(row)
                self._count -= 1
                self.broken = str(e) if not self._count else ""
            self._tell(row.job, Outcome("error", error))
            if self.broken:
                with self._changed:
                    over = [(job, self.broken) for job in self._waiting]
                    self._waiting.clear()
                for job, why in over:
                    self._tell(job, Outcome("error", why))
            return
        self._end(row, Outcome("error", error))

    def _end(self, row: _Row, outcome: Outcome) -> None:
        row.timeline.last_used = time.monotonic()
        with self._changed:
            self._rows.remove(row)
            self._idle.append(row.timeline)
        self._tell(row.job, outcome)

    def _tell(self, job: Job, outcome: Outcome) -> None:
        job.over = True
        try:
            job.ended(outcome)
        except Exception:
            log.exception("nobody took the end of a job")

    def _look(self, row: _Row) -> None:
        """Begins a row; ends one that nobody waits for."""
        job = row.job
        if job.cancelled or (job.deadline is not None and time.monotonic() > job.deadline):
            return self._end(row, Outcome("cancelled" if job.cancelled else "deadline"))
        if row.at < 0:
            sampling = job.sampling
            if not job.reuse or job.score:
                row.timeline.clear()
            row.at = job.cached = row.timeline.begin(job.ids, job.salt)
            row.timeline.session.set_sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)

    def _read(self, row: _Row) -> None:
        job, timeline = row.job, row.timeline
        stop = next((at for at in job.stops if at > row.at), len(job.ids))
        piece = job.ids[row.at : min(row.at + self._chunk, stop)]
        last = row.at + len(piece) == len(job.ids)
        if job.score:
            for i, token in enumerate(piece, row.at):
                row.sampled = timeline.read([token], last)
                job.score(timeline.session.logits(), i)
        else:
            row.sampled = timeline.read(piece, last)
        row.at += len(piece)
        if row.at in job.stops:
            timeline.keep()
        if not row.reading:
            job.read = time.monotonic()
            if job.most <= 0:
                self._end(row, Outcome("length"))

    def _write(self, row: _Row) -> None:
        job, timeline = row.job, row.timeline
        said: bool | Sequence[int] = True

        def took(token: int) -> bool:
            nonlocal said
            timeline.known.append(token)
            row.new += 1
            said = job.take(token)
            return said is True and not job.cancelled

        most = min(self._share, job.most - row.new)
        if job.choose:
            why = self._one_by_one(row, most, took)
        else:
            why = timeline.session.generate(most, took, False)[1]
        if said is False:
            self._end(row, Outcome("taken"))
        elif said is not True:
            self._replace(row, tuple(said))
        elif why == "max_seq_len" or row.new >= job.most:
            self._end(row, Outcome("length"))

    def _one_by_one(self, row: _Row, most: int, took: Callable[[int], bool]) -> str:
        """`most` tokens, each chosen with its logits at hand."""
        job, session = row.job, row.timeline.session
        assert job.choose
        for _ in range(most):
            if row.new:  # the last token is not in the caches yet
                if session.position >= self._most:
                    return "max_seq_len"
                row.sampled = session.decode(row.timeline.known[-1])
            token = job.choose(session.logits(), session.position - 1, row.sampled)
            if not took(token):
                return "callback"
        return "length"

    def _replace(self, row: _Row, ids: Sequence[int]) -> None:
        """The token taken last does not count: `ids` come in its place. The one after them is sampled next."""
        job, timeline = row.job, row.timeline
        timeline.known.pop()
        row.new -= 1
        for i, token in enumerate(ids):
            if row.new >= job.most or timeline.session.position >= self._most:
                return self._end(row, Outcome("length"))
            timeline.known.append(token)
            row.new += 1
            if i < len(ids) - 1 or not job.choose:
                row.sampled = timeline.session.decode(token)
        if row.new >= job.most:
            self._end(row, Outcome("length"))
