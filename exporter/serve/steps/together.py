"""Timelines that share steps: of an artifact with rows, by `kiln.Batch`.

A step takes one token of every answer that is being written; between two steps chunks of prompts are read, one at least where any waits. So
a long prompt delays the others by what `max_gap_ms` of the batch says, or by a chunk. Logits come to the host for jobs that look at them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kiln.exporter.serve.steps.engine import Outcome, Row, Steps
from kiln.exporter.serve.steps.timelines import Timeline


@dataclass(eq=False)
class Seat(Row):
    """end: of the piece of the prompt that is being read; handle: of the batch, -1: none."""

    end: int = 0
    handle: int = -1


class Together(Steps[Seat]):
    """An `Engine` over a `kiln.Batch` whose rows are the timelines. chunk: the batch's; most: slots of a cache."""

    def __init__(self, batch: Any, timelines: Sequence[Timeline], queue: int, chunk: int, most: int):
        self._batch, self._chunk = batch, chunk
        self._seats: dict[int, Seat] = {}
        super().__init__(timelines, queue, most, Seat)

    def _begin(self, row: Seat) -> None:
        job, sampling = row.job, row.job.sampling
        row.end = self._piece(row)
        row.handle = self._batch.join(
            list(job.ids[: row.end]), sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, stop_at_eog=False,
            row=row.timeline.session.number, keep_logits=bool(job.choose or job.score),
        )  # fmt: skip
        self._seats[row.handle] = row

    def _piece(self, row: Seat) -> int:
        """Where the piece of the prompt ends that is read next: at a stop; one id where each has its score."""
        job = row.job
        return row.at + 1 if job.score else next((at for at in job.stops if at > row.at), len(job.ids))

    def _left(self, row: Seat) -> None:
        if self._seats.pop(row.handle, None):
            self._batch.leave(row.handle)

    def _emptied(self, row: Seat) -> None:
        row.timeline.session.rewind(0)

    def _round(self, rows: Sequence[Seat]) -> None:
        if not self._seats:
            return
        for handle, token, stop, error in self._batch.step():
            row = self._seats[handle]
            if stop or error:  # the batch has let it go
                del self._seats[handle]
            if error:
                self._fail(row, error)
            else:
                self._guarded(row, partial(self._took, token=token, full=bool(stop)))

    def _took(self, row: Seat, token: int, full: bool) -> None:
        """The token that was sampled for the row. full: it has no room for another step."""
        job, timeline = row.job, row.timeline
        if row.reading and not self._read(row):
            return
        sampled = token
        if job.choose:
            token = job.choose(self._batch.logits(row.handle), timeline.session.position - 1, token)
        timeline.known.append(token)
        row.new += 1
        said = job.take(token)
        if said is False:
            self._end(row, Outcome("taken"))
        elif said is not True:
            self._replace(row, list(said))
        elif full or row.new >= job.most:
            self._end(row, Outcome("length"))
        elif token != sampled:
            self._batch.extend(row.handle, [token], True)

    def _read(self, row: Seat) -> bool:
        """A piece of the prompt was read. Whether it was the last one, and an answer is wanted."""
        job, timeline = row.job, row.timeline
        last = row.end == len(job.ids)
        timeline.was_read(job.ids[row.at : row.end], self._chunk, last)
        row.at = row.end
        if job.score:
            job.score(self._batch.logits(row.handle), row.at - 1)
        if row.at in job.stops:
            timeline.keep()
        if not last:
            row.end = self._piece(row)
            self._batch.extend(row.handle, list(job.ids[row.at : row.end]))
            return False
        job.read = time.monotonic()
        if job.most <= 0:
            self._end(row, Outcome("length"))
        return job.most > 0

    def _replace(self, row: Seat, ids: list[int]) -> None:
        """The token taken last does not count: `ids` come in its place. The one after them is sampled next."""
        job, timeline = row.job, row.timeline
        timeline.known.pop()
        row.new -= 1
        fit = ids[: min(job.most - row.new, self._most - timeline.session.position)]
        timeline.known += fit
        row.new += len(fit)
        if row.new >= job.most or len(fit) < len(ids):
            return self._end(row, Outcome("length"))
        self._batch.extend(row.handle, fit, True)
