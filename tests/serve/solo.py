"""What a session that has the model for itself writes: what every answer of a server must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import kiln


def write(
    model: kiln.Model,
    ids: Sequence[int],
    most: int,
    chunk: int,
    sampling: tuple[float, int, float, int] = (0.0, 0, 1.0, 0),
    eog: bool = True,
) -> list[int]:
    """Tokens, an end token included."""
    session = kiln.Session(model, prefill_chunk=chunk)
    session.set_sampling(*sampling)
    session.prefill(list(ids))
    tokens, why = session.generate(most, None, eog)
    if why == "eog":
        with_end = session.generate(1, None, False)[0]
        return [*tokens, *with_end]
    return tokens


def rows(model: kiln.Model, ids: Sequence[int]) -> list[Any]:
    """The logits behind every id, float32 [V]."""
    session, found = kiln.Session(model), []
    for token in ids:
        session.prefill([token])
        found.append(session.logits())
    return found


def penalized(model: kiln.Model, ids: Sequence[int], most: int, frequency: float, presence: float, repetition: float) -> list[int]:
    """Greedy, token by token, in plain Python. No control token comes."""
    session = kiln.Session(model)
    session.prefill(list(ids))
    found: list[int] = []
    while len(found) < most:
        row = session.logits().astype(np.float32)
        for token in {*found, *ids} if repetition != 1 else ():
            if token >= 8:
                row[token] = row[token] / np.float32(repetition) if row[token] > 0 else row[token] * np.float32(repetition)
        for token in set(found):
            row[token] -= np.float32(found.count(token)) * np.float32(frequency) + np.float32(presence)
        found.append(int(row.argmax()))
        session.decode(found[-1])
    return found
