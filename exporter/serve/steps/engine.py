"""Jobs -> tokens, in one thread: who waits, who is admitted, how a job ends. `turns.py` and `together.py` are how steps are taken.

Knows neither HTTP nor conversations. What `Engine` promises is all that a server may use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from kiln.exporter.serve.steps.timelines import Timeline, chosen

log = logging.getLogger("kiln.serve")
AWAITED = 256  # ids of a prompt that another one is reading: so many are worth to wait for


class Busy(Exception):
    """The queue is full."""


class TooMany(Exception):
    """More jobs at once than there can ever be room for; its argument is how many there can be."""


class Closed(Exception):
    """The engine takes no more jobs."""


class JobError(Exception):
    """Why a job cannot go on; its client is told."""


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
    ended: Callable[[Job, Outcome], None]
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
        """All of them, or none: raises Busy, TooMany or Closed."""

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
class Row:
    """A job and the timeline that it has. at: ids of the prompt that were read, -1: it has not begun; new: tokens that were taken."""

    job: Job
    timeline: Timeline
    at: int = -1
    new: int = 0
    sampled: int = -1  # by the device, for `choose`
    begins: dict[Job, int] = field(default_factory=dict)  # of jobs that wait: with how many ids of this one's prompt, up to a stop of it

    @property
    def reading(self) -> bool:
        return self.at < len(self.job.ids)


R = TypeVar("R", bound=Row)


class Steps(Generic[R]):
    """An `Engine` but for its steps. queue: jobs that may wait; most: slots of a cache.

    An engine of its own says how a row begins (`_begin`), what a round of steps is (`_round`), and what becomes of a timeline that was left
    (`_left`) or failed (`_emptied`, which raises kiln.Error where it is lost).
    """

    def __init__(self, timelines: Sequence[Timeline], queue: int, most: int, row: Callable[[Job, Timeline], R]):
        self._idle, self._count, self._queue, self._most = list(timelines), len(timelines), queue, most
        self._row = row
        self._waiting: deque[Job] = deque()
        self._rows: list[R] = []
        self._changed = threading.Condition()
        self._closing = False
        self.broken = ""
        self._thread = threading.Thread(target=self._run, name="kiln-steps", daemon=True)
        self._thread.start()

    def _begin(self, row: R) -> None:
        raise NotImplementedError

    def _round(self, rows: Sequence[R]) -> None:
        """Some steps of rows that have begun, of which some may be over."""
        raise NotImplementedError

    def _left(self, row: R) -> None:
        """The row's job ends now."""

    def _emptied(self, row: R) -> None:
        raise NotImplementedError

    def submit(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            if self._closing or self.broken:
                raise Closed(self.broken)
            room = self._queue + self._count
            if len(jobs) > room:
                raise TooMany(room)
            if len(self._waiting) + len(self._rows) + len(jobs) > room:
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
        except Exception as e:  # a device that failed, or a mistake of this room: nobody may wait for ever
            import kiln

            log.exception("the engine stopped")
            with self._changed:
                self.broken = str(e) if isinstance(e, kiln.Error) else f"the engine stopped: {type(e).__name__}"
                left = [*(row.job for row in self._rows), *self._waiting]
                self._rows.clear()
                self._waiting.clear()
            for job in left:
                self._tell(job, Outcome("error", self.broken))

    def _rounds(self) -> None:
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
            self._round(rows)

    def _sweep(self) -> list[tuple[Job, str]]:
        """Jobs that end while they wait."""
        if not self._waiting:
            return []
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
        """Those that came first, but for those that wait for what is being read."""
        for job in list(self._waiting):
            if not self._idle:
                return
            if self._awaits(job):
                continue
            timeline = chosen(self._idle, job.ids, job.salt)
            self._idle.remove(timeline)
            self._waiting.remove(job)
            job.started = time.monotonic()
            self._rows.append(self._row(job, timeline))

    def _awaits(self, job: Job) -> bool:
        """A row is reading what the prompt begins with, and will keep a snapshot there: to go on from that takes less time."""
        if not job.reuse or job.score or job.salt:
            return False
        there = max((self._common(row, job) for row in self._rows if row.timeline.store and row.reading), default=0)
        return there >= AWAITED and there - max(timeline.shared(job.ids, job.salt) for timeline in self._idle) >= AWAITED

    def _common(self, row: R, job: Job) -> int:
        """Ids of the job's prompt that the row will have read, and keep, at its last stop in them; 0: it has none, or is past it."""
        other = row.job
        if other.salt or not other.reuse or other.score:
            return 0
        if job not in row.begins:
            ends = (end for end in reversed(other.stops) if end < len(job.ids) and other.ids[:end] == job.ids[:end])
            row.begins[job] = next(ends, 0)
        return row.begins[job] if row.at < row.begins[job] else 0

    def _guarded(self, row: R, step: Callable[[R], None]) -> None:
        """What fails in a job is that job's alone."""
        import kiln

        if row.job.over:
            return
        try:
            step(row)
        except (kiln.Error, JobError) as e:
            self._fail(row, str(e))
        except Exception:
            log.exception("a job failed")
            self._fail(row, "internal error")

    def _fail(self, row: R, error: str) -> None:
        import kiln

        try:
            self._left(row)
            row.timeline.known.clear()
            self._emptied(row)
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
        self._free(row)
        self._tell(row.job, Outcome("error", error))

    def _end(self, row: R, outcome: Outcome) -> None:
        self._left(row)
        self._free(row)
        self._tell(row.job, outcome)

    def _free(self, row: R) -> None:
        row.timeline.last_used = time.monotonic()
        with self._changed:
            self._rows.remove(row)
            self._idle.append(row.timeline)

    def _tell(self, job: Job, outcome: Outcome) -> None:
        job.over = True
        try:
            job.ended(job, outcome)
        except Exception:
            log.exception("nobody took the end of a job")

    def _look(self, row: R) -> None:
        """Begins a row; ends one that nobody waits for."""
        job = row.job
        if job.cancelled or (job.deadline is not None and time.monotonic() > job.deadline):
            return self._end(row, Outcome("cancelled" if job.cancelled else "deadline"))
        if row.at < 0:
            row.at = job.cached = row.timeline.begin(job.ids, job.salt, job.reuse and not job.score)
            self._begin(row)
