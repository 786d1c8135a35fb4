"""A prompt and what is wished of its answer -> jobs of the engine -> events: the choices of one request as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.parser import REASONING, Delta, Message, Parser
from kiln.exporter.conversation.vocabulary import Vocabulary
from kiln.exporter.serve.metrics import Metrics
from kiln.exporter.serve.problem import Problem
from kiln.exporter.serve.settings import Settings
from kiln.exporter.serve.steps.engine import Engine, Job, Outcome, Sampling
from kiln.exporter.serve.steps.rows import Likely, Rows, likely
from kiln.exporter.serve.steps.steer import Calling, Lexicon, Steer, bars


class Around(Protocol):
    """What an answer needs of the artifact that is served."""

    vocabulary: Vocabulary
    markup: Markup
    lexicon: Lexicon
    control: frozenset[int]
    max_seq_len: int
    engine: Engine
    metrics: Metrics
    settings: Settings


@dataclass(frozen=True)
class Wishes:
    """How an answer is to be made. most: its tokens, None: as many as there is room for. top: log-probabilities, of so many others too.

    stop_ids: end an answer and are no part of it. budget: ids of its thoughts. schema: JSON schema of the content, None: any text;
    schema_field: where the request has it.
    """

    sampling: Sampling
    n: int = 1
    most: int | None = None
    least: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    top: int | None = None
    score: bool = False  # log-probabilities of the prompt, too: the first choice has them
    bias: Mapping[int, float] = field(default_factory=dict)
    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    min_p: float = 0.0
    parallel: bool = True
    calling: Calling | None = None
    budget: int | None = None
    schema: Any = None
    schema_field: str = "response_format"
    salt: str = ""

    @property
    def on_host(self) -> bool:
        """Whether logits have to come to the host for what the fields say."""
        changed = self.frequency or self.presence or self.repetition != 1 or self.min_p > 0 or self.bias or self.least
        return bool(changed) or self.top is not None or self.schema is not None


@dataclass(frozen=True)
class Event:
    """What came of one choice: ids, their deltas and log-probabilities; at its end, why. gap: seconds since the token before, if any."""

    index: int
    deltas: tuple[Delta, ...] = ()
    ids: tuple[int, ...] = ()
    likely: tuple[Likely, ...] = ()
    finish: str | None = None
    gap: float = 0.0


Parts = tuple[Parser, "Steer | None", "Rows | None"]  # of one answer


class Post:
    """What comes of one request's choices: any thread puts, the request's task gets."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Problem] = asyncio.Queue()

    def put(self, event: Event | Problem) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody reads any more
            pass

    async def get(self) -> Event | Problem:
        return await self._events.get()


class Choice:
    """One answer of a request. `take`, `score` and `ended` run in the engine's thread.

    Knows neither its job nor its `Answer`, which know it: an answer goes at its end, and does not wait for the collector of circles.
    """

    def __init__(self, around: Around, wishes: Wishes, prompt: tuple[int, ...], post: Post, index: int, parts: Parts):
        self._around, self._wishes, self._prompt, self._post, self.index = around, wishes, prompt, post, index
        self.parser, self.steer, self.rows = parts
        self.tokens = self.thoughts = 0
        self.stop_id: int | None = None
        self.first = self._last = self.end = 0.0
        self.scored: list[Likely | None] = [None]  # of each id of the prompt, given those before it

    @property
    def message(self) -> Message:
        return self.parser.message

    @property
    def finish(self) -> str | None:
        return self.message.finish

    def take(self, token: int) -> bool | tuple[int, ...]:
        now = time.monotonic()
        gap = now - self._last if self.tokens else 0.0
        self.first, self._last = self.first or now, now
        instead = self.steer.replacement(token) if self.steer else ()
        if instead and self.rows:
            self.rows.replaced(instead)
        deltas: list[Delta] = []
        for i in instead or (token,):
            deltas += self._one(i)
        self._tell(deltas, instead or (token,), gap=gap)
        return False if self.parser.ended else instead or True

    def _one(self, token: int) -> list[Delta]:
        wishes, parser = self._wishes, self.parser
        self.tokens += 1
        self.thoughts += parser.within == REASONING
        if token in wishes.stop_ids:
            self.stop_id = token
            return parser.finish(cut=False)
        if wishes.ignore_eos and token in self._around.vocabulary.ends:
            return []
        deltas = parser.push([token])
        if self.steer:
            self.steer.taken(token)
        return deltas

    def score(self, row: Any, i: int) -> None:
        if i + 1 < len(self._prompt):
            self.scored.append(likely(row, self._prompt[i + 1], self._wishes.top or 0))

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.end = time.monotonic()
        deltas = self.parser.finish(cut=outcome.why != "taken")
        why = self.parser.message.finish if outcome.why in ("taken", "length") else outcome.why
        times = (job.queued, job.started, job.read, self.first, self.end)
        self._around.metrics.ended(str(why), len(job.ids), job.cached, self.tokens, *times)
        if outcome.why in ("taken", "length"):
            self._tell(deltas, (), self.finish)
        else:
            self._post.put(_problem(outcome))

    def _tell(self, deltas: list[Delta], ids: tuple[int, ...], finish: str | None = None, gap: float = 0.0) -> None:
        likely: tuple[Likely, ...] = ()
        if self.rows and self.rows.found:
            likely = tuple(self.rows.found)
            self.rows.found.clear()
        self._post.put(Event(self.index, tuple(deltas), ids, likely, finish, gap))


def _problem(outcome: Outcome) -> Problem:
    if outcome.why == "deadline":
        return Problem(504, "the answer took longer than this server allows", None, "timeout", {"x-should-retry": "false"})
    if outcome.why == "closed":
        return Problem(503, "the server is shutting down", None, "shutting_down", {"retry-after": "5"})
    if outcome.why == "cancelled":
        return Problem(499, "the client is gone", None, "cancelled")
    return Problem(500, f"the model failed: {outcome.error}", None, "model_failed", {"x-should-retry": "false"})


class Answer:
    """The choices of one request and their jobs. Belongs to one task."""

    def __init__(self, served: Around, wishes: Wishes, prompt: tuple[int, ...], stops: tuple[int, ...] = ()):
        self.served, self.wishes, self.prompt, self.stops = served, wishes, prompt, stops
        self.choices: list[Choice] = []
        self.jobs: list[Job] = []
        self._post = Post()

    def add(self, parser: Parser, tools: tuple[str, ...], grammar: Any = None) -> Job:
        """One more choice, and the job that writes it."""
        wishes, served, index = self.wishes, self.served, len(self.choices)
        steer = None
        if wishes.calling or wishes.budget is not None or grammar is not None:
            parts = (parser, served.vocabulary, served.markup, served.lexicon, tools)
            steer = Steer(*parts, wishes.calling, wishes.budget, grammar, self._may_think())
        sampling = Sampling(wishes.sampling.temperature, wishes.sampling.top_k, wishes.sampling.top_p, _seed(wishes.sampling.seed, index))
        rows = None
        if wishes.on_host or (steer and steer.needs_rows):
            rows = Rows(
                sampling, wishes.top, wishes.bias, wishes.frequency, wishes.presence, wishes.repetition, wishes.min_p,
                prompt=self.prompt if wishes.repetition != 1 else (), spared=served.control,
                barred=bars(sorted(served.vocabulary.ends | wishes.stop_ids), wishes.least),
                allowed=steer.allowed if steer else lambda: None,
            )  # fmt: skip
        choice = Choice(served, wishes, self.prompt, self._post, index, (parser, steer, rows))
        most = served.max_seq_len - len(self.prompt)
        job = Job(
            self.prompt, most if wishes.most is None else min(wishes.most, most), sampling, choice.take, choice.ended,
            rows.choose if rows else None, choice.score if wishes.score and not index else None, self.stops, wishes.salt,
            deadline=time.monotonic() + served.settings.timeout if served.settings.timeout else None,
        )  # fmt: skip
        self.choices.append(choice)
        self.jobs.append(job)
        return job

    def _may_think(self) -> bool:
        """Whether the model may begin a thought: it has markers, and the prompt's last turn closed none."""
        thoughts, special = self.served.markup.thoughts, self.served.vocabulary.special
        if thoughts is None:
            return False
        last = next((i for i in reversed(self.prompt) if i == special[thoughts.close] or i in self.served.vocabulary.ends), -1)
        return last != special[thoughts.close]

    async def events(self) -> AsyncIterator[Event]:
        """Until every choice has ended. Raises Problem for the first that fails."""
        left = len(self.choices)
        while left:
            event = await self._post.get()
            if isinstance(event, Problem):
                self.cancel()
                try:
                    raise event
                finally:
                    del event  # the problem refers to this frame
            left -= event.finish is not None
            if event.gap:  # counted here, for the engine's thread has the device waiting
                self.served.metrics.between(event.gap)
            yield event

    async def whole(self) -> list[Event]:
        return [event async for event in self.events()]

    def cancel(self) -> None:
        for job in self.jobs:
            if not job.over:
                self.served.engine.cancel(job)

    def usage(self) -> dict[str, Any]:
        """In OpenAI's form."""
        new = sum(choice.tokens for choice in self.choices)
        cached = max((job.cached for job in self.jobs), default=0)
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": new,
            "total_tokens": len(self.prompt) + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.thoughts for choice in self.choices)},
        }


def _seed(seed: int, index: int) -> int:
    """Of each choice another one, in int64."""
    return (seed + index + (1 << 63)) % (1 << 64) - (1 << 63)
