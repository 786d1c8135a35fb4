"""`kiln bench-serve` against a server of known delays: the figures come out as the delays say, and every request is as it was asked for."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kiln.exporter.cli import main
from kiln.exporter.errors import KilnError
from kiln.exporter.measure.serve_bench import Load, measure, notes, percentile, table
from kiln.exporter.measure.serve_client import base
from tests.serve.fake_server import Answer, FakeServer

FIRST, GAP, TOKENS = 0.08, 0.01, 20
pytestmark = pytest.mark.flaky(reruns=2)  # times, on a machine that does other things
ANSWER = Answer(["word "] * TOKENS, first=FIRST, gap=GAP)
LOAD = Load(prompt_tokens=100, output_tokens=TOKENS, conversations=8)
BUSY = 25  # ms that a crowded machine may add to one step; nothing can be faster than the server


def run(answer: Answer | Callable[[dict], Answer], load: Load, seen: list[FakeServer] | None = None, **options: Any) -> dict[str, Any]:
    with FakeServer(answer if callable(answer) else lambda _: answer) as server:
        if seen is not None:
            seen.append(server)
        return asyncio.run(measure(server.url, load, **options))


def test_closed_loop() -> None:
    """4 users, two conversations each: twice the time of an answer, 80 + 19 x 10 ms."""
    seen: list[FakeServer] = []
    record = run(ANSWER, LOAD, seen, users=[4])
    level = record["levels"][0]
    whole = FIRST + (TOKENS - 1) * GAP
    assert seen[0].most_at_once == 4 and len(seen[0].requests) == 2 + 8  # two tell how many tokens a word has
    assert (level["requests"], level["completed"], level["errors"], level["users"]) == (8, 8, {}, 4)
    assert FIRST * 1e3 <= level["ttft_ms"]["p50"] <= FIRST * 1e3 + BUSY and level["ttft_ms"]["p50"] <= level["ttft_ms"]["p99"]
    assert GAP * 1e3 - 1 <= level["gap_ms"]["p50"] <= GAP * 1e3 + BUSY / 5
    assert level["token_ms"]["p50"] == pytest.approx(GAP * 1e3, abs=BUSY / (TOKENS - 1) + 0.1)
    assert whole * 1e3 <= level["answer_ms"]["p50"] <= whole * 1e3 + 2 * BUSY
    assert 2 * whole <= level["seconds"] <= 2 * whole + 0.3
    assert level["output_tok_s"] == pytest.approx(8 * TOKENS / level["seconds"], rel=1e-3)
    assert level["output_tokens"] == 8 * TOKENS and level["good_share"] == 1 and level["goodput_s"] == level["requests_s"]
    assert record["model"] == "fake-model" and level["lag_ms"]["p50"] >= 0
    level["lag_ms"]["p99"] = 5.0
    assert notes(record) == []
    level["lag_ms"]["p99"] = 15.0
    assert notes(record) == ["4 users: answers were read up to 15 ms late (p99): this process has too little of its machine for this load"]
    assert "4 users" in table(record) and "8/8" in table(record)


def test_open_loop_does_not_wait() -> None:
    """Arrivals follow their own clock: the last ones come while the first are still answered, by gaps as a Poisson process has them."""
    seen: list[FakeServer] = []
    slow = replace(ANSWER, first=0.5, gap=0)
    rate = 60.0
    record = run(lambda r: slow if r["max_tokens"] == TOKENS else ANSWER, replace(LOAD, conversations=40), seen, rates=[rate])
    times = seen[0].times[2:]
    gaps = np.diff(times)
    assert len(times) == 40 and seen[0].most_at_once > 20
    assert np.mean(gaps) == pytest.approx(1 / rate, rel=0.2) and 0.5 < np.std(gaps) / np.mean(gaps) < 1.6  # even ones would have 0
    level = record["levels"][0]
    assert level["rate"] == rate and level["completed"] == 40 and 500 <= level["ttft_ms"]["p50"] <= 500 + 2 * BUSY
    assert 0 <= level["late_ms"]["p50"] < 20
    level["late_ms"]["p99"] = 80.0
    assert "requests left up to 80 ms late" in notes(record)[0]


def test_prompts_are_of_the_size_asked_and_no_two_alike() -> None:
    """The server counts a token for four characters; so many are sent that it counts what was asked."""
    seen: list[FakeServer] = []
    quick = Answer(["x"] * TOKENS)
    record = run(quick, replace(LOAD, prompt_tokens=300, shared_prefix=500), seen, users=[2, 4])
    requests = seen[0].requests[2:]
    first, second = requests[:8], requests[8:]
    for level in (first, second):
        system = {r["messages"][0]["content"] for r in level}
        assert len(system) == 1 and {r["messages"][0]["role"] for r in level} == {"system"}
        assert len(system.pop()) / 4 == pytest.approx(500, rel=0.15)
    assert first[0]["messages"][0] != second[0]["messages"][0]  # an earlier level has not warmed the later one
    texts = [r["messages"][1]["content"] for r in requests]
    assert len(set(texts)) == 16 and np.mean([len(t) for t in texts]) / 4 == pytest.approx(300, rel=0.1)
    assert all(r["max_tokens"] == TOKENS and r["ignore_eos"] and r["stream"] and r["temperature"] == 0 for r in requests)
    assert record["levels"][0]["prompt_tokens"] / 8 == pytest.approx(800, rel=0.1)
    run(quick, replace(LOAD, ignore_eos=False, conversations=1), seen, users=[1])
    assert "ignore_eos" not in seen[1].requests[-1]


def test_turns_carry_what_came_before() -> None:
    seen: list[FakeServer] = []

    def answer(request: dict[str, Any]) -> Answer:
        later = len(request["messages"]) > 1
        return Answer(["a ", "b"], first=0.01 if later else 0.1, cached=10**9 if later else 0)

    record = run(answer, replace(LOAD, turns=3, turn_tokens=40, output_tokens=2, conversations=3), seen, users=[1])
    requests = seen[0].requests[2:]
    assert [len(r["messages"]) for r in requests] == [1, 3, 5] * 3
    assert requests[2]["messages"][:3] == requests[1]["messages"] and requests[1]["messages"][1] == {"role": "assistant", "content": "a b"}
    level = record["levels"][0]
    assert level["requests"] == 9 and [turn["completed"] for turn in level["turns"]] == [3, 3, 3]
    assert level["turns"][0]["ttft_ms"]["p50"] >= 100 and level["turns"][1]["ttft_ms"]["p50"] <= 10 + BUSY
    assert level["turns"][0]["cached_tokens"] == 0 and level["turns"][2]["cached_tokens"] == level["turns"][2]["prompt_tokens"]
    assert table(record).count("turn ") == 3 and "100%" in table(record)


@pytest.mark.parametrize(("name", "bound"), [("max_ttft", 0.15), ("max_token_time", 0.02), ("max_gap", 0.1)])
def test_goodput(name: str, bound: float) -> None:
    """Every other answer begins late, goes on slowly and has a long gap."""
    count = iter(range(100))
    load = replace(LOAD, conversations=4, **{name: bound})
    bad = Answer(["a"] * 2, first=0.25, gap=0.15)
    record = run(lambda _: bad if next(count) % 2 else replace(ANSWER, parts=["a"] * 5), load, users=[1])
    level = record["levels"][0]
    assert level["good_share"] == 0.5 and level["goodput_s"] == pytest.approx(2 / level["seconds"], rel=1e-3)
    assert record["load"][name] == bound
    json.dumps(record, allow_nan=False)


def test_parts_of_several_tokens() -> None:
    """A gap is between parts; the time of a token is what the server counts."""
    level = run(Answer(["two words "] * 5, gap=0.04, tokens=10), replace(LOAD, conversations=2, output_tokens=10), users=[1])["levels"][0]
    assert level["gap_ms"]["p50"] == pytest.approx(40, abs=BUSY / 2) and level["token_ms"]["p50"] == pytest.approx(160 / 9, abs=BUSY / 4)


def test_thoughts_and_calls_are_parts() -> None:
    call = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}
    answer = Answer([{"reasoning_content": "a"}, {"reasoning": "b"}, call], first=0.05)
    level = run(answer, replace(LOAD, conversations=1, output_tokens=3), users=[1])["levels"][0]
    assert level["completed"] == 1 and level["output_tokens"] == 3 and level["ttft_ms"]["p50"] >= 50


# ---- what goes wrong ----


def test_failures_are_counted_and_named() -> None:
    """Each ends its conversation and is none of the figures."""
    kinds = [ANSWER, Answer(status=429, error="the queue is full"), replace(ANSWER, cut=True), Answer(late_error="going down"), Answer()]
    count = iter(range(100))

    def answer(request: dict[str, Any]) -> Answer:
        return kinds[next(count)] if request["max_tokens"] == TOKENS else ANSWER

    record = run(answer, replace(LOAD, conversations=5), users=[1])
    level = record["levels"][0]
    assert level["completed"] == 1 and level["requests"] == 5 and level["output_tokens"] == TOKENS and level["good_share"] == 0.2
    assert sorted(level["errors"].values()) == [1] * 4
    told = " | ".join(notes(record))
    assert "429: the queue is full" in told and "going down" in told and "without text" in told and "ended before the answer" in told


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(status=401, error="a key is needed"), "401: a key is needed"),
        (replace(ANSWER, usage=False), "does not say how many tokens it read"),
        (replace(ANSWER, prompt_tokens=7), "its usage cannot be right"),
    ],
)
def test_a_server_that_cannot_be_measured(answer: Answer, told: str) -> None:
    with pytest.raises(KilnError, match=told):
        run(answer, LOAD, users=[1])


def test_where_nothing_is_answered() -> None:
    with pytest.raises(KilnError, match=r"no request of users 2 was answered: 500: broken"):
        run(lambda r: Answer(status=500, error="broken") if r["max_tokens"] == TOKENS else ANSWER, LOAD, users=[2])


def test_a_time_limit() -> None:
    count = iter(range(100))
    level = run(lambda _: replace(ANSWER, first=5) if next(count) == 3 else ANSWER, replace(LOAD, conversations=2), users=[1], timeout=0.5)
    assert level["levels"][0]["errors"] == {"no end within 0.5 s": 1} and level["levels"][0]["completed"] == 1


def test_seconds_end_a_level() -> None:
    assert run(ANSWER, replace(LOAD, conversations=1000, seconds=0.5), users=[1])["levels"][0]["requests"] == 2
    assert run(ANSWER, replace(LOAD, conversations=1000, seconds=0.2), rates=[20])["levels"][0]["requests"] < 15


def test_percentiles() -> None:
    values = list(np.random.default_rng(0).exponential(size=101))
    for share in (0, 0.5, 0.9, 0.99, 1):
        assert percentile(values, share) == pytest.approx(np.quantile(values, share), rel=1e-12)
    assert math.isnan(percentile([], 0.5)) and percentile([3.0], 0.99) == 3


@pytest.mark.parametrize(
    ("url", "expected"),
    [("localhost:8000", "http://localhost:8000/v1"), ("https://x.example/api/", "https://x.example/api/v1"), ("http://h/v1/", "http://h/v1")],
)
def test_addresses(url: str, expected: str) -> None:
    assert base(url) == expected


def test_the_command(tmp_path: Path) -> None:
    out, picture, key = tmp_path / "record.json", tmp_path / "load.png", tmp_path / "key"
    key.write_text("secret\n")
    with FakeServer(lambda _: replace(ANSWER, parts=["a"] * 5), key="secret") as server:
        options = ["--users", "1,2", "--rate", "20", "--conversations", "2", "--prompt-tokens", "50", "--output-tokens", "20"]
        options += ["--key-file", str(key), "--max-ttft-ms", "500", "--out", str(out), "--plot", str(picture)]
        done = CliRunner().invoke(main, ["bench-serve", server.url, *options])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert [level.get("users", level.get("rate")) for level in record["levels"]] == [1, 2, 20]
    assert record["load"]["max_ttft"] == 0.5 and picture.read_bytes().startswith(b"\x89PNG")
    assert "2 users" in done.output and "answers had 10 of 40 tokens asked for" in done.output


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--users", "1,x"], 2, "list of whole numbers above 0"),
        (["--rate", "0"], 2, "list of numbers above 0"),
        (["--out", "/no/such/folder/x.json"], 1, "there is no folder"),
        ([], 1, "cannot be reached"),
        (["--key-file", "/no/such/key"], 1, "No such file"),
    ],
)
def test_what_the_command_refuses(options: list[str], code: int, told: str) -> None:
    done = CliRunner().invoke(main, ["bench-serve", "http://127.0.0.1:1", *options])
    assert done.exit_code == code and told in done.output and "Traceback" not in done.output


def test_no_address() -> None:
    done = CliRunner().invoke(main, ["bench-serve", "ftp://x"])
    assert done.exit_code == 1 and "is no address of a server" in done.output
