"""Sessions of one model, what their caches hold, and which of them a new prompt takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kiln.exporter.conversation.prompt import common


class Timeline:
    """`session`: a `kiln.Session` at position 0 that nobody else uses. salt: prompts of another one may not share what is cached."""

    def __init__(self, session: Any):
        self.session, self.salt, self.last_used = session, "", 0.0
        self.known: list[int] = []  # ids given to the session, of which it holds the first `session.position`

    @property
    def held(self) -> list[int]:
        """The ids whose keys and values the caches hold."""
        return self.known[: self.session.position]

    def shared(self, ids: Sequence[int], salt: str) -> int:
        """Ids of a prompt that need not be evaluated again: all that the caches hold, where the prompt begins with it, else none."""
        held = self.session.position
        return held if self.salt == salt and held < len(ids) and common(self.held, ids) == held else 0

    def begin(self, ids: Sequence[int], salt: str) -> int:
        """-> the position at which the prompt is to be read on."""
        reused = self.shared(ids, salt)
        if not reused:
            self.clear()
        self.known, self.salt = list(ids[:reused]), salt
        return reused

    def clear(self) -> None:
        self.known.clear()
        if self.session.position:
            self.session.reset()


def chosen(idle: Sequence[Timeline], ids: Sequence[int], salt: str) -> Timeline:
    """The timeline that saves most; where none saves anything an empty one, else the one that was used longest ago."""
    best = max(idle, key=lambda timeline: timeline.shared(ids, salt))
    if best.shared(ids, salt):
        return best
    return min(idle, key=lambda timeline: (timeline.session.position > 0, timeline.last_used))
