"""Timelines over one model, by steps of one token and by steps of several: what batch invariance is tested with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

SAMPLING = ((0.0, 0, 1.0, 1), (0.8, 0, 0.9, 7), (1.3, 20, 1.0, 1 << 40))  # of each row


def sampling(rows: list[int]) -> tuple[torch.Tensor, ...]:
    temperature, top_k, top_p, seed = zip(*(SAMPLING[r] for r in rows), strict=True)
    return torch.tensor(temperature), torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p), torch.tensor(seed)


@dataclass
class Step:
    """Tokens [M] of a step; `kept` of each are those that stay, the others are drafts that turn out wrong."""

    tokens: list[int]
    pos: list[int]
    row: list[int]
    kept: list[bool]


@dataclass
class Schedule:
    """Steps over timelines of known tokens: every mix of rows, drafts of which 0 .. M - 1 are rejected, padding, rows in any order."""

    timelines: list[list[int]]
    counts: tuple[int, ...]  # M of the steps
    vocab: int
    seed: int = 0
    rejected: set[tuple[int, int]] = field(default_factory=set)  # (M, of one row) that occurred

    def __iter__(self) -> Iterator[Step]:
        rng = random.Random(self.seed)
        at = [0] * len(self.timelines)
        turn = 0
        while any(a < len(t) for a, t in zip(at, self.timelines, strict=True)):
            rows = [r for r, t in enumerate(self.timelines) if at[r] < len(t)]
            rng.shuffle(rows)
            size = rng.choice(self.counts)
            longest = max(rows, key=lambda r: len(self.timelines[r]) - at[r])
            left = len(self.timelines[longest]) - at[longest]
            open_ = [(m, w) for m in self.counts for w in range(m) if m <= left and (m, w) not in self.rejected]
            forced = None
            if turn % 3 and open_:  # the whole step is of one timeline, and rejects a number that none rejected yet
                rows, (size, forced) = [longest], rng.choice(open_)
            left, items = size, []
            for r in rows:
                if left == 0:
                    break
                n = size if forced is not None else min(rng.randint(1, size), left, len(self.timelines[r]) - at[r])
                wrong = rng.randint(0, n - 1) if forced is None else forced
                self.rejected.add((size, wrong))
                for j in range(n):
                    true = j < n - wrong
                    token = self.timelines[r][at[r] + j] if true else rng.randrange(self.vocab)
                    items.append((token, at[r] + j, r, true))
                at[r] += n - wrong
                left -= n
            items += [rng.choice(items) for _ in range(left)]
            yield Step(*(list(x) for x in zip(*items, strict=True)))
            turn += 1


Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def solo(run: Run, tokens: list[int], row: int) -> tuple[list[int], torch.Tensor]:
    """Sampled tokens and logits [T, V] of a timeline, token by token."""
    sampled, logits = [], []
    for i, token in enumerate(tokens):
        chosen, found = run(torch.tensor([token]), torch.tensor([i]), *sampling([row]))
        sampled.append(int(chosen))
        logits.append(found[0].clone())
    return sampled, torch.stack(logits)


def check(runs: dict[int, Run], schedule: Schedule, expected: list[tuple[list[int], torch.Tensor]]) -> int:
    """Every kept token's logits and sample are those of its timeline alone, bit for bit. How many were compared."""
    compared = 0
    for step in schedule:
        sampled, logits = runs[len(step.tokens)](*map(torch.tensor, (step.tokens, step.pos, step.row)), *sampling(step.row))
        for i, (pos, row) in enumerate(zip(step.pos, step.row, strict=True)):
            if step.kept[i]:
                tokens, rows = expected[row]
                assert torch.equal(logits[i], rows[pos]), f"row {row}, position {pos} in a step of {len(step.tokens)}: {step}"
                assert int(sampled[i]) == tokens[pos]
                compared += 1
    return compared
