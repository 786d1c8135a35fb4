"""Sessions that take turns: of an artifact whose steps are of one token.

A round is one chunk of one prompt that is being read, and a few tokens of every answer that is being written: so a long prompt delays the
others by a chunk at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kiln.exporter.serve.steps.engine import Outcome, Row, Steps
from kiln.exporter.serve.steps.timelines import Timeline

ALONE, SHARED = 8, 4  # tokens of an answer in a round: where there is no other, and where there are


class Turns(Steps[Row]):
    """An `Engine` over timelines that are sessions. chunk: ids of a prompt in a round; most: slots of a cache."""

    def __init__(self, timelines: Sequence[Timeline], queue: int, chunk: int, most: int):
        self._chunk, self._share, self._turn = chunk, ALONE, 0
        super().__init__(timelines, queue, most, Row)

    def _begin(self, row: Row) -> None:
        sampling = row.job.sampling
        row.timeline.session.set_sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)

    def _emptied(self, row: Row) -> None:
        row.timeline.session.reset()

    def _round(self, rows: Sequence[Row]) -> None:
        reading = [row for row in rows if row.reading and not row.job.over]
        if reading:
            self._turn += 1
            self._guarded(reading[self._turn % len(reading)], self._read)
        writing = [row for row in rows if not row.reading and not row.job.over]
        self._share = ALONE if len(rows) == 1 else SHARED
        for row in writing:
            self._guarded(row, self._write)

    def _read(self, row: Row) -> None:
        job, timeline = row.job, row.timeline
        stop = next((at for at in job.stops if at > row.at), len(job.ids))
        piece = job.ids[row.at : min(row.at + self._chunk, stop)]
        last = row.at + len(piece) == len(job.ids)
        if job.score:
            for i, token in enumerate(piece, row.at):
                row.sampled = timeline.session.prefill([token])
                timeline.was_read([token], 1, last)
                job.score(timeline.session.logits(), i)
        else:
            row.sampled = timeline.session.prefill(list(piece))
            timeline.was_read(piece, self._chunk, last)
        row.at += len(piece)
        if row.at in job.stops:
            timeline.keep()
        if not row.reading:
            job.read = time.monotonic()
            if job.most <= 0:
                self._end(row, Outcome("length"))

    def _write(self, row: Row) -> None:
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

    def _one_by_one(self, row: Row, most: int, took: Callable[[int], bool]) -> str:
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

    def _replace(self, row: Row, ids: Sequence[int]) -> None:
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
