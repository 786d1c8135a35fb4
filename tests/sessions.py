"""Sessions of one model beside each other."""

from __future__ import annotations

from typing import Any


def interleaved_equal_solo(model: Any, prompts: list[list[int]], steps: int) -> bool:
    """Greedy answers of `kiln.Session`s that decode in turns are those of sessions that had the model for themselves."""
    import kiln

    def solo(prompt: list[int]) -> list[int]:
        session = kiln.Session(model)
        session.prefill(prompt)
        return [session.decode() for _ in range(steps)]

    expected = [solo(prompt) for prompt in prompts]
    sessions = [kiln.Session(model) for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    rounds = [[session.decode() for session in sessions] for _ in range(steps)]
    return [list(answer) for answer in zip(*rounds, strict=True)] == expected
