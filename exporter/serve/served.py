"""One artifact that is served: its model, sessions and engine, and how a conversation or plain ids become an `Answer`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.parser import Parser
from kiln.exporter.conversation.player import KEPT, Dialect, stops
from kiln.exporter.conversation.prompt import Prompt
from kiln.exporter.conversation.request import Request, RequestError
from kiln.exporter.conversation.vocabulary import vocabulary
from kiln.exporter.errors import KilnError
from kiln.exporter.serve.answer import Answer, Wishes
from kiln.exporter.serve.metrics import Metrics
from kiln.exporter.serve.problem import Problem, unsupported, wrong
from kiln.exporter.serve.settings import Settings
from kiln.exporter.serve.steps.engine import Busy, Closed, Engine, TooMany
from kiln.exporter.serve.steps.grammar import Grammars
from kiln.exporter.serve.steps.steer import Lexicon
from kiln.exporter.serve.steps.timelines import Timeline
from kiln.exporter.serve.steps.together import Together
from kiln.exporter.serve.steps.turns import Turns

T = TypeVar("T")
# One choice: its prompt's ids, where later prompts may part from them, its parser, the tools' names, what makes its grammar.
Wanted = tuple[Wishes, tuple[int, ...], tuple[int, ...], Parser, tuple[str, ...], Callable[[], Any]]
CONTROL = 3  # a token's type in GGUF


MOST_DEVICE, ENOUGH, MOST_HOST = 16 << 30, 4 << 30, 8 << 30  # bytes of snapshots, where nothing else is said


def snapshot_store(model: Any, settings: Settings) -> Any:
    """A `kiln.SnapshotStore`, or None where nothing is to be kept. Its room is found once the caches have theirs, and is a part of what is
    left: the device's may be needed by what is opened later, and a host serves others, too. The host is taken where the device has not
    enough: each piece that goes there for the first time keeps all steps waiting for half a second a gigabyte."""
    import kiln

    device, host = settings.snapshots
    if device is None:
        device = 0 if model.device == "cpu" else min(MOST_DEVICE, model.free_bytes // 4)
    if host is None:
        host = 0 if device >= ENOUGH else min(MOST_HOST, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    return kiln.SnapshotStore(device, host) if device or host else None


def together(model: Any, settings: Settings) -> tuple[Together, Any]:
    """The engine of an artifact with rows, and its store. Raises kiln.Error."""
    import kiln

    chunk = min(settings.chunk or model.prefill_chunk, model.prefill_chunk)
    ahead = model.device != "cpu" if settings.run_ahead is None else settings.run_ahead
    batch = kiln.Batch(model, rows=settings.sessions, prefill_chunk=chunk, max_gap_ms=settings.max_gap_ms, run_ahead=ahead)
    store = snapshot_store(model, settings)
    return Together(batch, [Timeline(batch.row(i), store) for i in range(batch.rows)], settings.queue, chunk, model.max_seq_len), store


def by_turns(model: Any, settings: Settings) -> tuple[Turns, Any]:
    """As `together` of an artifact whose steps are of one token. Raises kiln.Error, and KilnError where some of the sessions fit."""
    import kiln

    chunk, sessions, count = min(settings.chunk or model.prefill_chunk, model.prefill_chunk), list[Any](), settings.sessions or 1
    try:
        while len(sessions) < count:
            sessions.append(kiln.Session(model, prefill_chunk=chunk))
    except kiln.Error as e:
        fewer = f" for session {len(sessions) + 1} of {count}; give --sessions {len(sessions)}" if sessions else ""
        raise KilnError(f"{e}{fewer}") from e
    store = snapshot_store(model, settings)
    return Turns([Timeline(session, store) for session in sessions], settings.queue, chunk, model.max_seq_len), store


class Served:
    """Raises KilnError where the artifact cannot be served."""

    def __init__(self, directory: Path, manifest: dict[str, Any], tokenizer: Any, max_seq_len: int, engine: Engine, settings: Settings):
        if not manifest.get("tokenizer"):
            raise KilnError(f"{directory}: the artifact has no tokenizer, so it cannot be served; export a GGUF file that has one")
        self.settings, self.engine, self.tokenizer, self.max_seq_len = settings, engine, tokenizer, max_seq_len
        self.dialect = Dialect(directory, manifest, tokenizer) if manifest.get("chat") else None
        record = manifest["tokenizer"]
        self.vocabulary = self.dialect.vocabulary if self.dialect else vocabulary(tokenizer, directory / record["file"], record["eog"])
        self.markup = self.dialect.markup if self.dialect else Markup()
        self.lexicon = Lexicon(self.vocabulary, len(tokenizer))
        self.grammars = Grammars(directory / record["file"], self.vocabulary, self.lexicon.size)
        self.control = frozenset(self.vocabulary.special.values())
        self.samples = any(v["name"] == "temperature" for v in manifest["entry_points"]["decode"]["inputs"])
        weights = manifest["weights"]  # their names, types and shapes, wherever they lie
        self.fingerprint = f"kiln-{(weights['gguf']['directory'] if 'gguf' in weights else weights['header']['sha256'])[:12]}"
        self.created = int(time.time())
        self.metrics = Metrics(settings.metrics_prefix, settings.names[0], engine.load)
        if self.dialect:
            _ = self.dialect.template.manner  # a template that cannot be used is told now, and no request waits for what it is asked
        self.draining = False
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="kiln-prompts")

    @classmethod
    def load(cls, directory: Path, device: str, threads: int | None, settings: Settings, weights: Path | None = None) -> Served:
        """weights: the GGUF file, where the artifact holds code only and the file is not beside it. Raises KilnError."""
        from kiln.exporter.artifact.manifest import read_manifest

        manifest = read_manifest(directory)
        try:
            import kiln
        except ImportError as e:
            raise KilnError(f"the Python module kiln is not built ({e}); run `make build`") from e
        try:
            count = threads or len(os.sched_getaffinity(0))
            model = kiln.Model(str(directory), device=device, threads=count, weights=str(weights) if weights else None)
            kiln.set_threads(count)
            made = together if manifest.get("rows", 1) > 1 else by_turns
            engine, store = made(model, settings)
        except kiln.Error as e:
            raise KilnError(str(e)) from e
        try:
            served = cls(directory, manifest, model.tokenizer, model.max_seq_len, engine, settings)
        except BaseException:
            engine.close()
            raise
        if store:
            served.metrics.snapshots(store.counts)
        return served

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Work of the processor that the event loop does not wait for. Raises what it raises, RequestError and KilnError as a Problem."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, work, *arguments)
        except RequestError as e:
            raise Problem(400, str(e), e.part) from e
        except KilnError as e:
            raise Problem(400, str(e)) from e

    def model(self, name: str | None) -> str:
        """The name under which the model answers. Raises Problem for one that it does not have."""
        if name is None:
            return self.settings.names[0]
        if name not in self.settings.names and not self.settings.any_model:
            said = f"the model {name[:80]!r} is not served here, but {', '.join(self.settings.names)}"
            raise Problem(404, said, "model", "model_not_found")
        return name

    def talks(self) -> Dialect:
        if self.dialect is None:
            raise Problem(400, "this model has no chat template; it takes /v1/completions", None, "unsupported")
        return self.dialect

    async def converse(self, request: Request, wishes: Wishes, field: str = "messages") -> Answer:
        """field: of the request, that holds the conversation. Raises Problem, before anything is written, for what cannot be answered."""
        dialect = self.talks()
        if request.tools and self.markup.calls is None:
            raise unsupported("tools", "this model's template and vocabulary have no markers of calls")
        if wishes.budget is not None and self.markup.thoughts is None:
            raise unsupported("thinking", "this model's template and vocabulary have no markers of thoughts")
        prompt = await self.aside(dialect.prompt, request, KEPT)
        grammar = await self.grammar(wishes)
        tools = tuple(tool["function"]["name"] for tool in request.tools)

        def parsers() -> list[Parser]:
            return [dialect.parser(prompt, request, wishes.stop, wishes.parallel) for _ in range(wishes.n)]

        at = tuple(stops(prompt.cuts, 0, len(prompt.ids)))
        return self.begin([(wishes, prompt.ids, at, parser, tools, grammar) for parser in await self.aside(parsers)], field)[0]

    async def write(self, prompts: Sequence[tuple[int, ...]], wishes: Wishes) -> list[Answer]:
        """Continuations of plain ids, an `Answer` for each prompt."""
        grammar = await self.grammar(wishes)
        found = []
        for ids in prompts:
            found += [(wishes, ids, (), Parser(self.vocabulary, Markup(), (), None, wishes.stop), (), grammar) for _ in range(wishes.n)]
        return self.begin(found, "prompt")

    async def grammar(self, wishes: Wishes) -> Callable[[], Any]:
        """Makes a grammar of each answer's own. Raises Problem for a schema that cannot be honoured."""
        if wishes.schema is None:
            return lambda: None
        text = await self.aside(self.grammars.check, wishes.schema, wishes.schema_field)
        return lambda: self.grammars.make(text)

    def begin(self, wanted: Sequence[Wanted], field: str) -> list[Answer]:
        """Submits choices, neighbours of one prompt to one `Answer`; all or none. Raises Problem, which names the prompts' field."""
        answers: list[Answer] = []
        jobs = []
        for wishes, ids, at, parser, tools, grammar in wanted:
            if self.draining:
                raise Problem(503, "the server is shutting down", None, "shutting_down", {"retry-after": "5"})
            if len(ids) >= self.max_seq_len and wishes.most != 0 or len(ids) > self.max_seq_len:
                said = f"this model's maximum context length is {self.max_seq_len} tokens, the prompt has {len(ids)}"
                raise Problem(400, said, field, "context_length_exceeded")
            if not ids:
                raise wrong("prompt", "has no tokens")
            if not answers or answers[-1].prompt is not ids:
                answers.append(Answer(self, wishes, ids, at))
            jobs.append(answers[-1].add(parser, tools, grammar()))
        try:
            self.engine.submit(jobs)
        except Busy:
            raise Problem(429, "too many requests wait already; try again later", None, "queue_full", {"retry-after": "1"}) from None
        except TooMany as e:
            name = "n" if wanted[0][0].n > 1 else field
            said = f"{name}: {len(jobs)} answers at once; this server takes {e} at most"
            raise Problem(429, said, name, "queue_full", {"x-should-retry": "false"}) from None
        except Closed as e:
            raise Problem(503, f"the model cannot be used any more: {e}" if str(e) else "the server is shutting down") from None
        return answers

    def rendered(self, request: Request) -> Prompt:
        return self.talks().prompt(request, False)

    def ids(self, text: str, special: bool = False, bos: bool = True) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, parse_special=special, add_bos=bos))

    def close(self) -> None:
        self.engine.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self.dialect:
            self.dialect.close()
