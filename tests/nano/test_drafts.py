"""Drafts on text that means something: gemma4-nano's answers and continuations, greedy and sampled, are what they are without drafts, by
what occurred before and by its drafter."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest

import kiln
from tests.conftest import kiln as command
from tests.conftest import shared

HERE = Path(__file__).parent
WORDS = "lamp river honey stone crow apple candle garden window letter bridge silver".split()
TOKENS = 64  # of a text


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> kiln.Model:
    """KILN_TEST_NANO names an artifact that is there."""

    def make(path: Path) -> None:
        command("export", "--gguf", HERE / "gemma4-nano-Q4_K_M.gguf", "--out", path, "--target", "cpu", "--max-seq-len", 256,
                "--turboquant", "--residual-length", 64, "--decode-rows", "1,2,4,8",
                "--draft-gguf", HERE / "gemma4-nano-assistant-Q4_0.gguf")  # fmt: skip

    kept = os.environ.get("KILN_TEST_NANO")
    return kiln.Model(str(kept or shared(tmp_path_factory, "nano-with-steps", make)))


def prompts(model: kiln.Model, count: int) -> list[list[int]]:
    """Questions, of which some ask for what was said, and beginnings of passages of up to 120 tokens."""
    rng, passages = Random(0), [p for p in (HERE / "held_out.txt").read_text().split("\n\n") if len(p) > 200]
    found = []
    for i in range(count):
        a, b = rng.randrange(1, 40), rng.randrange(1, 20)
        words = " ".join(rng.sample(WORDS, 5))
        ask = (f"Count from {a} to {a + b}.", f"What is {a} + {b}?", f"Repeat this: {words}", f"Tell me about {rng.choice(WORDS)}.")
        if i % 2:
            found.append(model.tokenizer.encode(rng.choice(passages))[: rng.randrange(20, 120)])
        else:
            found.append(model.encode_prompt(ask[i // 2 % 4]))
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("draft", ["ngram", "mtp"])
@pytest.mark.parametrize("count", [pytest.param(200, marks=pytest.mark.nightly)])
def test_texts(model, count, draft) -> None:
    """Three drafts a step, whatever they gain: on a CPU, where a token of a step costs nearly a step, the runner would soon try none."""
    plain, drafted = kiln.Session(model), kiln.Session(model)
    sums: dict[str, dict[str, float]] = {}
    kiln.set_threads(1)
    try:
        for i, prompt in enumerate(prompts(model, count)):
            for kind, sampling in (("greedy", {}), ("sampled", {"temperature": 0.8, "top_k": 40, "seed": i})):
                found = sums.setdefault(kind, dict.fromkeys(("steps", "tokens", "tried", "right", "plain_s", "drafted_s"), 0))
                texts = []
                for session, how in ((plain, {}), (drafted, {"draft": draft, "draft_length": 3, "draft_fixed": True})):
                    session.reset()
                    session.set_sampling(**sampling)
                    session.prefill(prompt)
                    began = time.process_time()
                    texts.append(session.generate(TOKENS, **how))
                    found["drafted_s" if how else "plain_s"] += time.process_time() - began
                assert texts[0] == texts[1], (i, sampling)
                assert plain.tokens == drafted.tokens
                counts = drafted.draft_counts
                for name in ("steps", "tokens", "tried", "right"):
                    found[name] += counts[name] if isinstance(counts[name], int) else sum(counts[name])
    finally:
        kiln.set_threads(0)
    for kind, found in sums.items():
        print(f"{draft}, {kind}: {found['tokens'] / found['steps']:.2f} tokens a step, {found['right'] / found['tried']:.2f} of the drafts "
              f"right, {found['plain_s'] / found['drafted_s']:.2f} of the speed without, one thread's processor time; {found}")  # fmt: skip
        assert found["right"] > count / 2
