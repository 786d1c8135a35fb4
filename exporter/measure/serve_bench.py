"""`kiln bench-serve`: an OpenAI-compatible server under load, closed loop (users) or open loop (arrivals), as its users see it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln.exporter.errors import KilnError
from kiln.exporter.files import write_text
from kiln.exporter.measure.picture import check_plot, panels
from kiln.exporter.measure.serve_client import Answer, Client

# Short words that most vocabularies have whole; a prompt is made of them by chance, so that no two are alike.
WORDS = """the of and to in is that it was for on are with they be at one have this from by hot word but what some we can out other were
all there when up use your how said an each she which do their time if will way about many then them write would like so these her long
make thing see him two has look more day could go come did number sound no most people my over know water than call first who may down side
been now find""".split()
LATE = 0.020  # seconds that a request may leave after its time before the client is called the bottleneck


@dataclass(frozen=True)
class Load:
    """What is sent. Tokens are those of the server's count, about: it is asked once how many words make how many.

    turns: requests of a conversation, each with everything before it. shared_prefix: tokens of a system prompt that all requests of a level
    have in common. bounds: seconds within which the first token, each further token (mean of an answer) and each gap must come.
    """

    prompt_tokens: int = 512
    output_tokens: int = 128
    turns: int = 1
    turn_tokens: int = 64
    shared_prefix: int = 0
    temperature: float = 0.0
    ignore_eos: bool = True
    conversations: int = 32
    seconds: float | None = None
    seed: int = 0
    max_ttft: float = math.inf
    max_token_time: float = math.inf
    max_gap: float = math.inf


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the two nearest ranks, as numpy does; NaN of nothing."""
    if not values:
        return math.nan
    ordered, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (at - low)


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Milliseconds."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    found = {f"p{share}": percentile(values, share / 100) for share in (50, 90, 99)}
    return {name: round(v * 1e3, 3) for name, v in {"mean": sum(values) / len(values), **found, "max": max(values)}.items()}


# ---- what is sent ----


class Prompts:
    """Texts of about so many tokens, each by a chance of its own."""

    def __init__(self, words_per_token: float, overhead: float):
        self.words_per_token, self.overhead = words_per_token, overhead

    def text(self, tokens: float, chance: random.Random) -> str:
        return " ".join(chance.choices(WORDS, k=max(1, round(tokens * self.words_per_token))))


async def _calibrated(client: Client, model: str, load: Load) -> Prompts:
    """Two short requests say how many tokens a word has, and how many a message costs beside its words. They warm the server up, too."""
    counts, chance = [], random.Random(f"{load.seed} calibration")
    for words in (50, 450):
        text = " ".join(chance.choices(WORDS, k=words))
        answer = await client.answer({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8})
        if answer.error and answer.error != "an answer without text":
            raise KilnError(f"{client.base}: {answer.error}")
        if not answer.prompt:
            raise KilnError(f"{client.base} does not say how many tokens it read (usage of a streamed answer), which is what is measured")
        counts.append(answer.prompt)
    each = (counts[1] - counts[0]) / 400
    if each <= 0:
        raise KilnError(f"{client.base} counts {counts[0]} and {counts[1]} tokens of 50 and 450 words; its usage cannot be right")
    return Prompts(1 / each, max(counts[0] - 50 * each, 0))


class Level:
    """One load: its answers by turn, and how late its requests left."""

    def __init__(self, client: Client, model: str, prompts: Prompts, load: Load, name: str):
        self.client, self.model, self.prompts, self.load, self.name = client, model, prompts, load, name
        self.answers: list[list[Answer]] = [[] for _ in range(load.turns)]
        self.late: list[float] = []
        prefix = random.Random(f"{load.seed} {time.time_ns()} {name}")  # of this level alone: an earlier one would have warmed it
        self.system = prompts.text(load.shared_prefix, prefix) if load.shared_prefix else ""
        self.salt = time.time_ns()

    async def conversation(self, number: int) -> None:
        """All turns, each as soon as the one before it has been answered; a failure ends it."""
        load, chance = self.load, random.Random(f"{self.load.seed} {self.salt} {self.name} {number}")
        messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        own = max(load.prompt_tokens - self.prompts.overhead, 1)
        for turn in range(load.turns):
            messages.append({"role": "user", "content": self.prompts.text(load.turn_tokens if turn else own, chance)})
            request = {"model": self.model, "messages": messages, "max_tokens": load.output_tokens, "temperature": load.temperature}
            answer = await self.client.answer(request | ({"ignore_eos": True} if load.ignore_eos else {}))
            self.answers[turn].append(answer)
            if answer.error:
                return
            messages.append({"role": "assistant", "content": answer.text})

    async def closed(self, users: int) -> None:
        """Each user begins a conversation when the last one has ended."""
        end = time.perf_counter() + (self.load.seconds or math.inf)
        left = iter(range(self.load.conversations))

        async def user() -> None:
            for number in left:
                await self.conversation(number)
                if time.perf_counter() > end:
                    return

        await _together([user() for _ in range(users)])

    async def open(self, rate: float) -> None:
        """Conversations begin at times of a Poisson process, whatever has become of those before."""
        chance, begin, at = random.Random(f"{self.load.seed} arrivals {rate}"), time.perf_counter(), 0.0

        async def arrive(number: int, when: float) -> None:
            await asyncio.sleep(max(begin + when - time.perf_counter(), 0))
            self.late.append(time.perf_counter() - begin - when)
            await self.conversation(number)

        times = []
        for _ in range(self.load.conversations):
            times.append(at)
            at += chance.expovariate(rate)
        await _together([arrive(i, when) for i, when in enumerate(times) if when <= (self.load.seconds or math.inf)])

    def record(self) -> dict[str, Any]:
        """What its users saw. Rates are over the time from the first request to the end of the last answer."""
        load, asked = self.load, [answer for turn in self.answers for answer in turn]
        good = [answer for answer in asked if not answer.error]
        seconds = max(a.end for a in asked) - min(a.sent for a in asked)
        within = [a for a in good if self._within(a)]
        found: dict[str, Any] = {
            "requests": len(asked), "completed": len(good), "errors": dict(Counter(a.error for a in asked if a.error)),
            "seconds": round(seconds, 4), "requests_s": len(good) / seconds,
            "output_tok_s": sum(a.tokens for a in good) / seconds, "prompt_tok_s": sum(a.prompt for a in good) / seconds,
            "ttft_ms": _spread([a.first for a in good]), "gap_ms": _spread([gap for a in good for gap in a.gaps]),
            "token_ms": _spread([t for a in good if (t := a.token_time) is not None]),
            "answer_ms": _spread([a.end - a.sent for a in good]), "prompt_tokens": sum(a.prompt for a in good),
            "output_tokens": sum(a.tokens for a in good), "cached_tokens": sum(a.cached for a in good),
            "goodput_s": len(within) / seconds, "good_share": len(within) / len(asked),
        }  # fmt: skip
        if self.late:
            found["late_ms"] = _spread(self.late)
        if load.turns > 1:
            found["turns"] = [
                {"turn": i, "completed": len(done), "ttft_ms": _spread([a.first for a in done]),
                 "prompt_tokens": sum(a.prompt for a in done), "cached_tokens": sum(a.cached for a in done)}
                for i, turn in enumerate(self.answers, 1) for done in [[a for a in turn if not a.error]]
            ]  # fmt: skip
        return found

    def _within(self, answer: Answer) -> bool:
        load = self.load
        slow = (answer.token_time or 0) > load.max_token_time or max(answer.gaps, default=0) > load.max_gap
        return not slow and answer.first <= load.max_ttft


async def _together(work: list[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for one in work:
            group.create_task(one)


# ---- the whole measurement ----


async def measure(
    url: str, load: Load, users: Sequence[int] = (), rates: Sequence[float] = (), model: str | None = None, key: str = "",
    timeout: float = 600,
) -> dict[str, Any]:  # fmt: skip
    """A level for each number of users, then one for each rate. Raises KilnError where the server cannot be asked, or answers nothing."""
    levels = []
    async with Client(url, key, timeout) as client:
        name = model or await client.model()
        prompts = await _calibrated(client, name, load)
        for kind, value in [*(("users", n) for n in users), *(("rate", r) for r in rates)]:
            level = Level(client, name, prompts, load, f"{kind} {value}")
            await (level.closed(int(value)) if kind == "users" else level.open(value))
            record = {kind: value} | level.record()
            if not record["completed"]:
                raise KilnError(f"{client.base}: no request of {kind} {value} was answered: {next(iter(record['errors']))}")
            levels.append(record)
    told = {name: (None if value == math.inf else value) for name, value in vars(load).items()}
    return {"url": client.base, "model": name, "load": told, "words_per_token": round(prompts.words_per_token, 4), "levels": levels}


def notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    found = []
    for level in record["levels"]:
        name = _name(level)
        for error, count in level["errors"].items():
            found.append(f"{name}: {count} of {level['requests']} requests failed: {error}")
        if (late := (level.get("late_ms") or {}).get("p99") or 0) > LATE * 1e3:
            found.append(f"{name}: requests left up to {late:.0f} ms late (p99): the measuring side was too slow for this rate")
        asked = record["load"]["output_tokens"] * level["completed"]
        if level["output_tokens"] < 0.9 * asked:
            found.append(f"{name}: answers had {level['output_tokens']} of {asked} tokens asked for: the server ends them earlier")
    return found


def _name(level: dict[str, Any]) -> str:
    return f"{level['users']} user{'s'[: level['users'] != 1]}" if "users" in level else f"{level['rate']:g} a second"


def table(record: dict[str, Any]) -> str:
    """A line for each level, times in milliseconds; then each turn of a conversation."""
    def cell(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    rows = [["load", "requests", "tok/s", "req/s", "TTFT p50", "p99", "gap p50", "p99", "ms/token", "cached", "good req/s"]]
    for level in record["levels"]:
        cached = level["cached_tokens"] / level["prompt_tokens"] if level["prompt_tokens"] else 0
        times = [cell(level[name][share]) for name in ("ttft_ms", "gap_ms") for share in ("p50", "p99")]
        rows.append([_name(level), f"{level['completed']}/{level['requests']}", cell(level["output_tok_s"]), cell(level["requests_s"], 2),
                     *times, cell(level["token_ms"]["p50"], 2), f"{cached:.0%}", cell(level["goodput_s"], 2)])  # fmt: skip
        for turn in level.get("turns", ()):
            cached = turn["cached_tokens"] / turn["prompt_tokens"] if turn["prompt_tokens"] else 0
            times = [cell(turn["ttft_ms"][share]) for share in ("p50", "p99")]
            rows.append([f"  turn {turn['turn']}", str(turn["completed"]), "", "", *times, "", "", "", f"{cached:.0%}", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [row[0].ljust(widths[0]) + "".join(f"  {text:>{w}}" for text, w in zip(row[1:], widths[1:], strict=True)) for row in rows]
    return "\n".join([f"{record['model']} at {record['url']}", *map(str.rstrip, lines)])


def draw(record: dict[str, Any], path: Path) -> None:
    """Throughput, first token and gaps against the load; users and rates have lines of their own."""
    with panels(path, 3, f"{record['model']}, {record['load']['prompt_tokens']} + {record['load']['output_tokens']} tokens") as axes:
        for kind, word in (("users", "users"), ("rate", "requests a second")):
            levels = [level for level in record["levels"] if kind in level]
            if not levels:
                continue
            x = [level[kind] for level in levels]
            axes[0].plot(x, [level["output_tok_s"] for level in levels], "o-", label=f"all, by {word}")
            for at, name in ((1, "ttft_ms"), (2, "gap_ms")):
                for share, style in (("p50", "o-"), ("p99", "s--")):
                    axes[at].plot(x, [level[name][share] for level in levels], style, label=f"{share}, by {word}")
        for axis, title, unit in zip(axes, ("output", "first token", "gap between parts"), ("tok/s", "ms", "ms"), strict=True):
            axis.set(title=title, ylabel=unit, xlabel="load", ylim=(0, None))
            axis.grid(alpha=0.3)
            axis.legend()


def bench_serve(
    url: str, load: Load, users: Sequence[int], rates: Sequence[float], model: str | None, key_file: Path | None, timeout: float,
    out: Path | None, picture: Path | None,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """The record and its table; written to `out` and drawn into `picture` where they are given. Raises KilnError."""
    if picture is not None:
        check_plot()
    for path in (out, picture):
        if path is not None and not path.parent.is_dir():
            raise KilnError(f"{path}: there is no folder {path.parent}")
    key = key_file.read_text().strip() if key_file else ""
    record = asyncio.run(measure(url, load, users, rates, model, key, timeout))
    if out is not None:
        write_text(out, json.dumps(record, indent=1) + "\n", "the record")
    if picture is not None:
        draw(record, picture)
    return record, table(record)
