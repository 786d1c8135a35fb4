"""/v1/completions: plain text or ids go on; no template. And /tokenize and /detokenize."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from kiln.exporter.serve.answer import Answer, Event
from kiln.exporter.serve.api import asks
from kiln.exporter.serve.api.chat import stop_reason
from kiln.exporter.serve.fields import Fields
from kiln.exporter.serve.problem import unsupported, wrong
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.steps.rows import Likely
from kiln.exporter.serve.web import Json, dumps, openai_stream, present, read_body, sse

PROMPTS = 64  # of one request
LEAST = -9999.0  # of a log-probability that is told
MOST = 16  # tokens of an answer where a request does not say
AT_ONCE = 1 << 16  # ids of an answer of /tokenize that are written without a pause


async def completions(served: Served, http: Http) -> Response:
    fields = await read_body(http, served.settings)
    model = served.model(fields.text("model"))
    for name in ("suffix", "prompt_embeds"):
        fields.refuse(name, "this server does not take it", "")
    fields.refuse("response_format", "it goes with chat completions")
    prompts = await served.aside(_prompts, fields, served)
    top = fields.whole("logprobs", 0, asks.LOGPROBS)
    echo, stream = fields.flag("echo"), fields.flag("stream")
    wishes = asks.wishes(fields, served, most=fields.whole("max_tokens", 0, asks.MOST, MOST), top=top, score=echo and top is not None)
    best = fields.whole("best_of", 1, asks.CHOICES, wishes.n)
    if best != wishes.n:
        raise unsupported("best_of", "give the same as n, or leave it out")
    if wishes.most == 0 and not echo:
        raise wrong("max_tokens", "0 needs echo: true")
    options = fields.object("stream_options") or Fields({}, "stream_options")
    usage, every = options.flag("include_usage"), options.flag("continuous_usage_stats")
    with_ids = fields.flag("return_token_ids")
    answers = await served.write(prompts, wishes)
    shape = _Shape(served, model, answers, echo, usage, every, with_ids)
    if stream:
        return openai_stream(served, answers, shape.stream())
    await present(http, answers, shape.collect())
    return Json(shape.whole())


def _prompts(fields: Fields, served: Served) -> list[tuple[int, ...]]:
    """A text, several, ids, or several lists of ids. One BOS stands before each where the vocabulary has one."""
    given = fields.body.get("prompt")
    special = fields.flag("parse_special")
    if isinstance(given, str):
        return [served.ids(fields.text("prompt") or "", special)]
    listed = fields.items("prompt", 1 << 20)
    if not listed:
        raise wrong("prompt", "a text, a list of texts, ids or lists of ids was expected")
    if not isinstance(listed[0], str | list):
        return [_with_bos(asks.ids(fields, "prompt", served, 1 << 20), served)]
    if len(listed) > PROMPTS:
        raise wrong("prompt", f"has {len(listed)} entries, {PROMPTS} are taken at most")
    found = []
    for i, item in enumerate(listed):
        name = f"prompt[{i}]"
        one = Fields({name: item})
        if isinstance(item, list):
            found.append(_with_bos(asks.ids(one, name, served, 1 << 20), served))
        else:
            found.append(served.ids(one.text(name) or "", special))
    return found


def _with_bos(ids: Sequence[int], served: Served) -> tuple[int, ...]:
    bos = served.tokenizer.bos
    return tuple(ids) if bos is None or (ids and ids[0] == bos) else (bos, *ids)


class _Logprobs:
    """One choice's, in the form of completions. Offsets are of its text, in which special tokens and a leading space may lack."""

    def __init__(self, served: Served, at: int = 0):
        self._served, self._at = served, at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def record(self, found: Sequence[tuple[int, Likely | None]]) -> dict[str, Any]:
        """Of the next tokens. None: the first id of a prompt, which nothing precedes."""
        tokens, values, tops, offsets = [], [], [], []
        for token, x in found:
            tokens.append(_text(self._served, token))
            values.append(None if x is None else max(x.logprob, LEAST))
            tops.append(None if x is None else self._top(x))
            offsets.append(max(self._at, 0))
            self._at += len(self._decoder.decode(self._served.tokenizer.piece(token, True)))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, x: Likely) -> dict[str, float]:
        """The most probable ones, and the token itself."""
        found = {_text(self._served, token): max(value, LEAST) for token, value in x.top}
        found.setdefault(_text(self._served, x.token), max(x.logprob, LEAST))
        return found


class _Shape:
    """Answers as OpenAI's objects; choice i of prompt p is number p * n + i."""

    def __init__(
        self, served: Served, model: str, answers: Sequence[Answer], echo: bool, usage: bool, every: bool, with_ids: bool
    ):  # fmt: skip
        self.served, self.answers, self.echo, self.usage, self.every, self.with_ids = served, answers, echo, usage, every, with_ids
        self.n = answers[0].wishes.n
        self.events: dict[int, list[Event]] = {}
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": served.fingerprint,
        }

    def _prompt(self, answer: Answer) -> str:
        return self.served.tokenizer.decode(list(answer.prompt)) if self.echo else ""

    def _logprobs(self, answer: Answer) -> tuple[_Logprobs, list[tuple[int, Likely | None]]]:
        """Of one choice, and what it begins with: the prompt, where it is echoed."""
        if not answer.wishes.score:
            return _Logprobs(self.served), []
        spelled = b"".join(self.served.tokenizer.piece(i, True) for i in answer.prompt).decode("utf-8", "replace")
        scored = answer.choices[0].scored[: len(answer.prompt)]
        return _Logprobs(self.served, len(self._prompt(answer)) - len(spelled)), list(zip(answer.prompt, scored, strict=True))

    def _total(self) -> dict[str, Any]:
        found = [answer.usage() for answer in self.answers]
        total = {name: sum(usage[name] for usage in found) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return total | {"prompt_tokens_details": {"cached_tokens": sum(u["prompt_tokens_details"]["cached_tokens"] for u in found)}}

    async def stream(self) -> AsyncIterator[bytes]:
        """One prompt after the other: their answers are written meanwhile."""
        for p, answer in enumerate(self.answers):
            told: dict[int, _Logprobs] = {}
            async for event in self._in_order(answer):
                text = "".join(delta.text for delta in event.deltas)
                likely: list[tuple[int, Likely | None]] = [(x.token, x) for x in event.likely]
                ids: dict[str, Any] = {"token_ids": list(event.ids)} if self.with_ids else {}
                if event.index not in told:
                    told[event.index], before = self._logprobs(answer)
                    text, likely = self._prompt(answer) + text, before + likely if answer.wishes.top is not None else []
                    ids |= {"prompt_token_ids": list(answer.prompt)} if self.with_ids else {}
                if text or event.finish or likely or (self.with_ids and event.ids):
                    logprobs = told[event.index].record(likely) if likely else None
                    choice = {"index": p * self.n + event.index, "text": text, "logprobs": logprobs, "finish_reason": event.finish}
                    choice["stop_reason"] = stop_reason(answer.choices[event.index]) if event.finish else None
                    usage = {"usage": self._total() if self.every else None} if self.usage or self.every else {}
                    yield sse({**self.head, "choices": [choice | ids], **usage})
        if self.usage:
            yield sse({**self.head, "choices": [], "usage": self._total()})
        yield sse("[DONE]")

    async def _in_order(self, answer: Answer) -> AsyncIterator[Event]:
        """The events; where the prompt is scored none of another choice before the first one's, which reads it."""
        held: list[Event] = []
        begun = not answer.wishes.score
        async for event in answer.events():
            begun = begun or event.index == 0
            if not begun:
                held.append(event)
                continue
            yield event
            while held:
                yield held.pop(0)

    async def collect(self) -> None:
        for p, answer in enumerate(self.answers):
            async for event in answer.events():
                self.events.setdefault(p * self.n + event.index, []).append(event)

    def whole(self) -> dict[str, Any]:
        choices = []
        for p, answer in enumerate(self.answers):
            for choice in answer.choices:
                index = p * self.n + choice.index
                events = self.events.get(index, [])
                logprobs = None
                if answer.wishes.top is not None:
                    told, before = self._logprobs(answer)
                    logprobs = told.record([*before, *((x.token, x) for event in events for x in event.likely)])
                record: dict[str, Any] = {
                    "index": index,
                    "text": self._prompt(answer) + choice.message.content,
                    "logprobs": logprobs,
                    "finish_reason": choice.finish,
                    "stop_reason": stop_reason(choice),
                }
                if self.with_ids:
                    record |= {"token_ids": [i for event in events for i in event.ids], "prompt_token_ids": list(answer.prompt)}
                choices.append(record)
        return {**self.head, "choices": choices, "usage": self._total()}


def _text(served: Served, token: int) -> str:
    """A token's text; where it is a part of a character, its bytes, as OpenAI writes them."""
    piece = served.tokenizer.piece(token, False)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)


def _piece(served: Served, token: int) -> str | list[int]:
    """A token's text; where it is a part of a character, its bytes, as llama.cpp writes them."""
    piece = served.tokenizer.piece(token, False)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _told(served: Served, ids: Sequence[int], pieces: bool) -> bytes:
    """The answer of /tokenize, some ids at a time: between them other threads run."""
    some = (ids[at : at + AT_ONCE] for at in range(0, len(ids), AT_ONCE))
    lists = (dumps([{"id": i, "piece": _piece(served, i)} for i in part] if pieces else part)[1:-1] for part in some)
    written = f'{{"count":{len(ids)},"max_model_len":{served.max_seq_len},"tokens":[{",".join(lists)}]}}'
    return written.encode("utf-8", "replace")


async def tokenize(served: Served, http: Http) -> Response:
    """In vLLM's form (prompt or messages) and llama.cpp's (content)."""
    fields = await read_body(http, served.settings)
    served.model(fields.text("model"))
    content = fields.text("content")
    if content is not None:
        found = await served.aside(served.ids, content, fields.flag("parse_special", True), fields.flag("add_special"))
    elif fields.has("messages"):
        variables = asks.variables(fields, served, None, "")
        tools, going_on = fields.items("tools", served.settings.tools), fields.flag("continue_final_message")
        generate = fields.flag("add_generation_prompt", not going_on)
        if going_on and generate:
            raise wrong("continue_final_message", "and add_generation_prompt exclude each other")
        request = asks.conversation(served, fields.body["messages"], tools, variables, generate, going_on)
        found = (await served.aside(served.rendered, request)).ids
    else:
        prompt = fields.text("prompt")
        if prompt is None:
            raise wrong("prompt", "is missing; give prompt, messages or content")
        found = await served.aside(served.ids, prompt, fields.flag("parse_special"), fields.flag("add_special_tokens", True))
    return Response(await served.aside(_told, served, found, fields.flag("with_pieces")), media_type=Json.media_type)


async def detokenize(served: Served, http: Http) -> Response:
    fields = await read_body(http, served.settings)
    served.model(fields.text("model"))
    if not isinstance(fields.body.get("tokens"), list):
        raise wrong("tokens", "a list of ids was expected")
    found = asks.ids(fields, "tokens", served, 1 << 20)
    text = await served.aside(served.tokenizer.decode, list(found), False)
    return Json({"prompt": text, "content": text})
