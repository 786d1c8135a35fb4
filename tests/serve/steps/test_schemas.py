"""200 schemas of the JSON Schema Test Suite: whatever ends by itself is an instance, by another implementation's judgement."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kiln
from kiln.exporter.conversation.vocabulary import vocabulary
from kiln.exporter.serve.problem import Problem
from kiln.exporter.serve.steps.grammar import Grammars

jsonschema = pytest.importorskip("jsonschema", reason="pip install 'kiln-export[dev]'")

SUITE = [json.loads(line) for line in (Path(__file__).parents[1] / "schemas" / "suite.jsonl").read_text().splitlines()]
LONGEST, TRIALS = 120, 4


def grammars_of(folder: Path) -> Grammars:
    """Of a folder with a tokenizer.json and a manifest."""
    tokenizer, record = kiln.Tokenizer(str(folder / "tokenizer.json")), json.loads((folder / "manifest.json").read_text())["tokenizer"]
    return Grammars(folder / "tokenizer.json", vocabulary(tokenizer, folder / "tokenizer.json", record["eog"]), len(tokenizer))


@pytest.fixture(scope="module")
def grammars(talking: Path) -> Grammars:
    return grammars_of(talking)


def written(grammars: Grammars, grammar: str, seed: int, costs: list[float]) -> list[int] | None:
    """Tokens by chance among those allowed, an end rather than others; None: no end within LONGEST. costs: seconds of each mask."""
    matcher, random, ids = grammars.make(grammar), np.random.default_rng(seed), list[int]()
    while len(ids) < LONGEST:
        start = time.perf_counter()
        mask = matcher.allowed()
        costs.append(time.perf_counter() - start)
        token = int(np.where(mask, random.standard_normal(grammars.size) + 2 * grammars.ends, -np.inf).argmax())
        assert mask[token], "nothing may come"
        if grammars.ends[token]:
            return ids
        matcher.take(token)
        ids.append(token)
    return None


def examined(grammars: Grammars, some: list[dict[str, Any]]) -> tuple[int, float]:
    """Each schema's texts -> how many of all ended by themselves, each of which is an instance; the median of the masks' seconds."""
    costs, ended = list[float](), 0
    tokenizer = kiln.Tokenizer(str(grammars.path))
    for number, one in enumerate(some):
        grammar = grammars.check(one["schema"], "x")
        check = (jsonschema.Draft7Validator if one["from"].startswith("draft7") else jsonschema.Draft202012Validator)(one["schema"])
        for seed in range(TRIALS):
            ids = written(grammars, grammar, 1000 * number + seed, costs)
            if ids is not None:
                text = tokenizer.decode(ids, False)
                value = json.loads(text)
                assert check.is_valid(value), (one, text)
                ended += 1
    return ended, statistics.median(costs)


def test_the_whole_suite(grammars: Grammars) -> None:
    ended, _ = examined(grammars, SUITE)
    assert len(SUITE) == 200 and ended >= 700


@pytest.mark.nightly
def test_over_a_real_vocabulary(gemma: Path) -> None:
    """262,144 tokens, of which one may hold several signs of JSON."""
    ended, median = examined(grammars_of(gemma), SUITE[::5])
    assert ended >= 60  # of 160, where 69 do: by chance a string of so many tokens seldom ends
    print(f"masks' median {median * 1e6:.0f} us")


def test_what_is_no_instance_is_seen(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judgement can fail: texts of one schema are no instances of another."""
    monkeypatch.setattr(grammars, "check", lambda schema, param, check=grammars.check: check({"type": "integer", "minimum": 5}, param))
    with pytest.raises(AssertionError):
        examined(grammars, [{"from": "", "schema": {"type": "null"}}])


def test_what_the_suite_has_and_cannot_be_honoured_is_refused(grammars: Grammars) -> None:
    for keyword in ("unevaluatedProperties", "$dynamicRef", "not", "propertyNames", "contains", "uniqueItems", "dependentSchemas", "if"):
        with pytest.raises(Problem, match="cannot be honoured"):
            grammars.check({keyword: {"const": 1} if keyword != "uniqueItems" else True, **({"then": {}} if keyword == "if" else {})}, "x")
