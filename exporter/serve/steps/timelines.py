"""Sessions of one model, or rows of a batch, what their caches hold, and which of them a new prompt takes.

A prompt goes on where the caches hold its beginning, or where a session can go back to, or from a snapshot. Each of these places was the
end of a piece that was read, or is behind a step: bits depend on where pieces ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kiln.exporter.conversation.prompt import common

NEVER = 1 << 62  # a position


class Timeline:
    """`session`: a `kiln.Session` or `kiln.BatchRow` at position 0 that nobody else uses.

    salt: prompts of another one may not share what is cached.
    store: a `kiln.SnapshotStore` of all timelines, or None. What has a salt is kept out of it.
    """

    def __init__(self, session: Any, store: Any = None):
        self.session, self.store, self.salt, self.last_used = session, store, "", 0.0
        self.known: list[int] = []  # ids given to the session, of which it holds the first `session.position`
        self._ends: list[int] = []  # of the pieces in which the caches were read
        self._stepped = NEVER  # from here on each position is behind a step

    def shared(self, ids: Sequence[int], salt: str) -> int:
        """Ids of a prompt, fewer than all, that the caches hold and that need not be evaluated again."""
        held = self.session.position
        if self.salt != salt or not held:
            return 0
        same = common(self.known[:held], ids)
        if same == held < len(ids):
            return held
        at = min(same, len(ids) - 1)
        if at < self._stepped:
            at = max((end for end in self._ends if end <= at), default=0)
        return at if at >= self.session.earliest else 0

    def known_of(self, ids: Sequence[int], salt: str) -> int:
        """Ids of a prompt of which there may be snapshots of this session."""
        return common(self.known, ids) if self.store and self.salt == salt == "" else 0

    def begin(self, ids: Sequence[int], salt: str, reuse: bool = True) -> int:
        """-> the position at which the prompt is to be read on; without reuse 0."""
        if not reuse:
            self.clear()
        at = self.shared(ids, salt)
        kept = self.store.longest(self.session, list(ids), "", True) if self.store and reuse and not salt else None
        if kept is not None and kept.position > at:
            self.session.restore(kept)
            at = kept.position
            self._ends = []
        elif at < self.session.position:
            self.session.rewind(at)
        self.known, self.salt, self._stepped = list(ids[:at]), salt, NEVER
        self._ends = [*(end for end in self._ends if end < at), at]
        return at

    def was_read(self, ids: Sequence[int], chunk: int, last: bool) -> None:
        """A piece of a prompt is in the caches, by `chunk` ids at a time. last: of the prompt; behind any other a snapshot may be kept."""
        self.known += ids
        end = self.session.position
        self._ends += [*range(end - len(ids) + chunk, end, chunk), end]
        if last:
            self._stepped = end

    def keep(self) -> None:
        """A later prompt may part from this one here."""
        if self.store and not self.salt:
            self.store.take(self.session, "")

    def clear(self) -> None:
        self.known.clear()
        self._ends.clear()
        self.session.rewind(0)


def chosen(idle: Sequence[Timeline], ids: Sequence[int], salt: str) -> Timeline:
    """The timeline that saves most; where none saves anything an empty one, else the one that was used longest ago."""
    for saves in (Timeline.shared, Timeline.known_of):
        saved = [saves(timeline, ids, salt) for timeline in idle]
        if max(saved):
            return idle[saved.index(max(saved))]
    return min(idle, key=lambda timeline: (timeline.session.position > 0, timeline.last_used))
