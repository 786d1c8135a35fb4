"""/v1/completions: plain text or ids go on; no template. And /tokenize and /detokenize."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from kiln.exporter.serve.answer import Answer, Event
from kiln.exporter.serve.api import asks
from kiln.exporter.serve.fields import Fields
from kiln.exporter.serve.problem import unsupported, wrong
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.steps.rows import Likely
from kiln.exporter.serve.web import Json, openai_stream, present, read_body, sse

PROMPTS = 64  # of one request
MOST = 16  # tokens of an answer where a request does not say


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
    if stream and wishes.score:
        raise unsupported("echo", "with logprobs it does not go with stream")
    options = fields.object("stream_options") or Fields({})
    usage, with_ids = options.flag("include_usage"), fields.flag("return_token_ids")
    if wishes.score:  # the first choice reads the logits behind every id of the prompt; the others need not
        answers = await served.write(prompts, wishes)
        for answer in answers:
            for job in answer.jobs[1:]:
                job.score = None
    else:
        answers = await served.write(prompts, wishes)
    shape = _Shape(served, model, answers, echo, usage, with_ids)
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


class _Shape:
    """Answers as OpenAI's objects; choice i of prompt p is number p * n + i."""

    def __init__(self, served: Served, model: str, answers: Sequence[Answer], echo: bool, usage: bool, with_ids: bool):
        self.served, self.answers, self.echo, self.usage, self.with_ids = served, answers, echo, usage, with_ids
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

    def _total(self) -> dict[str, Any]:
        found = [answer.usage() for answer in self.answers]
        total = {name: sum(usage[name] for usage in found) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return total | {"prompt_tokens_details": {"cached_tokens": sum(u["prompt_tokens_details"]["cached_tokens"] for u in found)}}

    async def stream(self) -> AsyncIterator[bytes]:
        """One prompt after the other: their answers are written meanwhile."""
        for p, answer in enumerate(self.answers):
            begun: set[int] = set()
            async for event in answer.events():
                text = "".join(delta.text for delta in event.deltas)
                if event.index not in begun:
                    begun.add(event.index)
                    text = self._prompt(answer) + text
                if text or event.finish or event.likely or (self.with_ids and event.ids):
                    logprobs = _logprobs(self.served, list(event.likely), 0) if event.likely else None
                    choice = {"index": p * self.n + event.index, "text": text, "logprobs": logprobs, "finish_reason": event.finish}
                    ids = {"token_ids": list(event.ids)} if self.with_ids else {}
                    yield sse({**self.head, "choices": [choice | ids], **({"usage": None} if self.usage else {})})
        if self.usage:
            yield sse({**self.head, "choices": [], "usage": self._total()})
        yield sse("[DONE]")

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
                    found: list[Likely | None] = [x for event in events for x in event.likely]
                    if self.echo:
                        found = list(answer.choices[0].scored[: len(answer.prompt)]) + found
                    logprobs = _logprobs(self.served, found, 0, answer.prompt if self.echo else ())
                record: dict[str, Any] = {
                    "index": index,
                    "text": self._prompt(answer) + choice.message.content,
                    "logprobs": logprobs,
                    "finish_reason": choice.finish,
                    "stop_reason": choice.message.stop_text if choice.message.stop_text is not None else choice.stop_id,
                }
                if self.with_ids:
                    record |= {"token_ids": [i for event in events for i in event.ids], "prompt_token_ids": list(answer.prompt)}
                choices.append(record)
        return {**self.head, "choices": choices, "usage": self._total()}


def _logprobs(served: Served, found: Sequence[Likely | None], start: int, prompt: Sequence[int] = ()) -> dict[str, Any]:
    """In the form of completions. None: the first id of a prompt, which nothing precedes."""
    tokens, values, tops, offsets, at = [], [], [], [], start
    for i, x in enumerate(found):
        text = _text(served, x.token if x else prompt[i])
        tokens.append(text)
        values.append(None if x is None else max(x.logprob, -9999.0))
        tops.append(None if x is None else {_text(served, token): max(value, -9999.0) for token, value in x.top})
        offsets.append(at)
        at += len(text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _text(served: Served, token: int) -> str:
    """A token's text; where it is a part of a character, its bytes, as OpenAI writes them."""
    piece = served.tokenizer.piece(token, False)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)


async def tokenize(served: Served, http: Http) -> Response:
    """In vLLM's form (prompt or messages) and llama.cpp's (content)."""
    fields = await read_body(http, served.settings)
    served.model(fields.text("model"))
    content = fields.text("content")
    if content is not None:
        found = await served.aside(served.ids, content, fields.flag("parse_special", True), fields.flag("add_special"))
    elif fields.has("messages"):
        variables = asks.variables(fields, served, None, "")
        tools, generate = fields.items("tools", served.settings.tools), fields.flag("add_generation_prompt", True)
        request = asks.conversation(served, fields.body["messages"], tools, variables, generate)
        found = (await served.aside(served.rendered, request)).ids
    else:
        prompt = fields.text("prompt")
        if prompt is None:
            raise wrong("prompt", "is missing; give prompt, messages or content")
        found = await served.aside(served.ids, prompt, fields.flag("parse_special"), fields.flag("add_special_tokens", True))
    tokens: list[Any] = list(found)
    if fields.flag("with_pieces"):
        tokens = [{"id": i, "piece": _text(served, i)} for i in found]
    return Json({"count": len(found), "max_model_len": served.max_seq_len, "tokens": tokens})


async def detokenize(served: Served, http: Http) -> Response:
    fields = await read_body(http, served.settings)
    served.model(fields.text("model"))
    if not isinstance(fields.body.get("tokens"), list):
        raise wrong("tokens", "a list of ids was expected")
    found = asks.ids(fields, "tokens", served, 1 << 20)
    text = await served.aside(served.tokenizer.decode, list(found), False)
    return Json({"prompt": text, "content": text})
