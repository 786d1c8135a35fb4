"""What is done with logits on the host: log-probabilities, penalties, a bias, min_p, tokens that may not come.

The rule of choice is the sampling operator's (`custom_ops/step/sample.py`), in numpy: temperature, top-k, top-p over what that left, and
the same noise of (seed, position, token id). So what a request does not change is chosen as the device would have. A step costs a copy of
the logits to the host and a few passes over the vocabulary, and the next one cannot begin before; requests without these fields pay
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kiln.exporter.serve.steps.engine import Sampling

Row = Any  # numpy float32 [V]
_MASS_ONE = float(1 << 40)
_FURTHEST = 28.0  # nats below the best, of a token that may still be chosen
_LEAST_PENALTY = 1e-30  # what it divides stays a number


@dataclass(frozen=True)
class Likely:
    """A token that counts, its log-probability, and the most probable ones there, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def likely(row: Row, token: int, top: int) -> Likely:
    """Of the softmax at temperature 1, before anything else. Ties go to the lowest id."""
    best = float(row.max())
    shift = best + float(np.log(np.exp(row.astype(np.float64) - best).sum()))
    ids = np.argpartition(-row, min(top, len(row) - 1))[: top + 1] if top else np.empty(0, int)
    order = sorted(ids.tolist(), key=lambda i: (-float(row[i]), i))[:top]
    return Likely(token, float(row[token]) - shift, tuple((i, float(row[i]) - shift) for i in order))


def _hash(x: Row) -> Row:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
    return x ^ (x >> np.uint32(15))


def _noise(seed: int, position: int, ids: Row) -> Row:
    """32 random bits for each of the token ids, of the same values as `noise_bits` of the operator."""
    with np.errstate(over="ignore"):
        key = _hash(np.array([(seed & 0xFFFFFFFF) ^ 0x1E3779B9], np.uint32))
        key = _hash(key ^ np.uint32(seed >> 32 & 0xFFFFFFFF))
        key = _hash(key ^ np.uint32(position & 0xFFFFFFFF))
        return _hash(_hash(ids.astype(np.uint32) ^ key) ^ key)


def sample(row: Row, sampling: Sampling, position: int, min_p: float = 0.0) -> int:
    """The token of float32 [V] logits; -inf forbids one. Where none is left, ValueError."""
    best = row.max()
    if not np.isfinite(best):
        raise ValueError("no token may come here")
    if sampling.temperature <= 0:
        return int(row.argmax())
    rate = np.float32(1.0) / np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(row):
        ids = np.flatnonzero(row >= np.partition(row, -sampling.top_k)[-sampling.top_k])
    else:  # what is further away has no mass, and no noise makes it win
        ids = np.flatnonzero((row - best) * rate > np.float32(-_FURTHEST))
    row = row[ids]
    scaled = (row - best) * rate
    ordered = np.sort(row)[::-1]
    mass = (np.exp((ordered - best) * rate) * np.float32(_MASS_ONE)).astype(np.int64)
    if sampling.top_p < 1:
        target = max(int(mass.sum() * np.float64(np.float32(sampling.top_p))), 1)
        ordered = ordered[np.cumsum(mass) - mass < target]
    allowed = row >= ordered[-1]
    if min_p > 0:
        allowed &= scaled >= np.log(np.float32(min_p))
    uniform = ((_noise(sampling.seed, position, ids) >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    score = scaled - np.log(-np.log(uniform))
    return int(ids[np.where(allowed & np.isfinite(row), score, -np.inf).argmax()])


@dataclass
class Rows:
    """`choose` of one answer. `sampling` is the device's too. top: most probable tokens that are kept of each place, None: nothing is.

    allowed(): of the next token, bool [V] or ids; None: all. barred(count): ids that may not be the token number `count`.
    """

    sampling: Sampling
    top: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    min_p: float = 0.0
    prompt: Sequence[int] = ()  # counts for `repetition`
    spared: frozenset[int] = frozenset()  # control tokens, which no penalty touches
    barred: Callable[[int], Sequence[int]] = lambda count: ()
    allowed: Callable[[], Any] = lambda: None
    found: list[Likely] = field(default_factory=list)  # one for each token that counts
    _written: Counter[int] = field(default_factory=Counter)
    _count: int = 0
    _last: int = -1

    def __post_init__(self) -> None:
        ids, values = np.array(list(self.bias), np.int64), np.array(list(self.bias.values()), np.float32)
        self._biased = ids, values, ids[values <= -100]

    def choose(self, row: Row, position: int, token: int) -> int:
        changed = self._changed(row)
        if changed is not row or self.min_p > 0:
            token = sample(changed, self.sampling, position, self.min_p)
        if self.top is not None:
            self.found.append(likely(row, token, self.top))
        self._written[token] += 1
        self._count, self._last = self._count + 1, token
        return token

    def replaced(self, ids: Sequence[int]) -> None:
        """The token chosen last gave way to these, which were not chosen and have no probability."""
        if self.found:
            self.found.pop()
        self._written -= Counter((self._last,))  # which keeps no zero: a penalty would touch what was never written
        self._count += len(ids) - 1
        self._written.update(ids)

    def _changed(self, row: Row) -> Row:
        """The row as it is chosen from; the same object where nothing changes it."""
        out = row
        penalties = self.frequency or self.presence or self.repetition != 1
        if penalties and (self._written or self.prompt):
            out = out.copy()
            ids = np.array([i for i in self._written if i not in self.spared], np.int64)
            counts = np.array([self._written[i] for i in ids.tolist()], np.float32)
            if self.repetition != 1:
                seen = np.array(sorted({*ids.tolist(), *self.prompt} - self.spared), np.int64)
                by = np.float32(max(self.repetition, _LEAST_PENALTY))
                out[seen] = np.where(out[seen] > 0, out[seen] / by, out[seen] * by)
            out[ids] -= counts * np.float32(self.frequency) + np.float32(self.presence)
        if self.bias:
            out = out.copy()
            out[self._biased[0]] += self._biased[1]
        allowed = self.allowed()
        if allowed is not None:
            mask = np.zeros(len(row), bool)
            mask[allowed if isinstance(allowed, np.ndarray) else np.array(sorted(allowed), np.int64)] = True
            out = np.where(mask, out, np.float32(-np.inf))
        for never in (self._biased[2], np.array(self.barred(self._count), np.int64)):
            if len(never):
                less = out.copy()
                less[never] = -np.inf
                out = less if np.isfinite(less.max()) else out  # it comes all the same where nothing else may
        return out
