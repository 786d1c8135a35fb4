"""Timelines that join and leave a batch at random: python -m tests.tools.many_steps ARTIFACT --steps 10000 [--device cuda]

The artifact has rows, of which all are taken most of the time. Timelines are greedy or sampled, some draft, some are sent away in
the middle, some end by themselves; prompts are read between the others' steps. Every token is that of the same request alone in a batch.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from typing import Any

import kiln


def requests(model: kiln.Model, count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of up to half of the slots, answers of up to a quarter."""
    rng, slots = random.Random(seed), model.max_seq_len
    found = []
    for i in range(count):
        prompt = [rng.randrange(8, min(model.vocab_size, 500)) for _ in range(rng.choice((1, 2, 5, rng.randrange(6, slots // 2))))]
        sampled = rng.random() < 0.5
        drafts = {"draft": "ngram"} if rng.random() < 0.25 else {}
        found.append({"prompt": prompt, "max_new_tokens": rng.randrange(1, slots // 4), "temperature": 0.9 * sampled, "seed": i, **drafts})
    return found


def alone(model: kiln.Model, request: dict[str, Any]) -> tuple[list[int], str]:
    """Text and stop of a request of `Batch.join` without others, drafts and logits."""
    batch, text = kiln.Batch(model, rows=1), list[int]()
    batch.join(**{name: value for name, value in request.items() if name not in ("draft", "keep_logits")})
    while True:
        for _, token, stop, error in batch.step():
            assert error is None, error
            text += [] if token is None else [token]
            if stop:
                return text, stop


def run(model: kiln.Model, steps: int, seed: int = 1, count: int = 120, **options: Any) -> Counter[str]:
    """What happened; AssertionError where a text is not that of its request alone. options: of the batch."""
    rng, some = random.Random(seed), requests(model, count, seed)
    expected = [alone(model, request) for request in some]
    batch = kiln.Batch(model, **options)
    found = Counter(rows=batch.rows)
    texts, numbers = dict[int, list[int]](), dict[int, int]()
    while found["steps"] < steps:
        while batch.active < batch.rows and rng.random() < 0.8:
            number = rng.randrange(count)
            handle = batch.join(**some[number])
            texts[handle], numbers[handle] = [], number
            found["joined"] += 1
        found["steps"] += 1
        found["full"] += batch.active == batch.rows
        for handle, token, stop, error in batch.step():
            text, why = expected[numbers[handle]]
            assert error is None, error
            if token is not None:
                texts[handle].append(token)
                found["tokens"] += 1
                told = f"step {found['steps']}, {some[numbers[handle]]}: {texts[handle]}, alone {text}"
                assert texts[handle] == text[: len(texts[handle])], told
            if stop:
                assert (texts.pop(handle), stop) == (text, why)
                found["ended"] += 1
        if texts and rng.random() < 0.03:
            handle = rng.choice(list(texts))
            batch.leave(handle)
            del texts[handle]
            found["left"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--weights", help="the model file, where the artifact has code only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--run-ahead", action="store_true")
    given = parser.parse_args()
    model = kiln.Model(given.artifact, given.device, weights=given.weights)
    began = time.monotonic()
    found = run(model, given.steps, run_ahead=given.run_ahead)
    print(f"{dict(sorted(found.items()))} in {time.monotonic() - began:.0f} s: every token as alone")


if __name__ == "__main__":
    main()
