"""/v1/chat/completions."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from kiln.exporter.conversation.parser import CONTENT, REASONING, Delta, Message
from kiln.exporter.conversation.request import Request
from kiln.exporter.serve.answer import Answer, Choice, Event, Wishes
from kiln.exporter.serve.api import asks
from kiln.exporter.serve.fields import Fields
from kiln.exporter.serve.problem import unsupported, wrong
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.steps.rows import Likely
from kiln.exporter.serve.web import Json, openai_stream, present, read_body, sse


async def chat(served: Served, http: Http) -> Response:
    fields = await read_body(http, served.settings)
    model = served.model(fields.text("model"))
    stream = fields.flag("stream")
    options = fields.object("stream_options") or Fields({})
    shape = _Shape(fields, served, model, options.flag("include_usage"), options.flag("continuous_usage_stats"))
    shape.answer = answer = await served.converse(*_asked(fields, served))  # the last thing that may be refused
    if stream:
        return openai_stream(served, [answer], shape.stream())
    await present(http, [answer], shape.collect())
    return Json(shape.whole())


def _asked(fields: Fields, served: Served) -> tuple[Request, Wishes]:
    for name, why in (("functions", "give tools"), ("function_call", "give tool_choice"), ("audio", "this model writes text")):
        fields.refuse(name, why)
    fields.refuse("modalities", "this model writes text", ["text"])
    fields.refuse("prediction", "nothing is predicted here")
    fields.refuse("web_search_options", "there is no search here")
    tools = fields.items("tools", served.settings.tools)
    generate = fields.body.get("add_generation_prompt")
    going_on = fields.flag("continue_final_message")
    if going_on and fields.flag("add_generation_prompt"):
        raise wrong("continue_final_message", "and add_generation_prompt exclude each other")
    if generate is False and not going_on:
        raise unsupported("add_generation_prompt", "an answer needs it; false goes with continue_final_message")
    variables = asks.variables(fields, served, asks.effort(fields, "reasoning_effort", served), "reasoning_effort")
    fields.items("messages", served.settings.messages)
    request = asks.conversation(served, fields.body.get("messages"), tools, variables, True, going_on)
    names = [tool["function"]["name"] for tool in request.tools]
    calling, shown = asks.calling(fields.body.get("tool_choice"), names)
    if not shown:
        request = dataclasses.replace(request, tools=())
    most = [n for n in (fields.whole(name, 1, asks.MOST) for name in ("max_completion_tokens", "max_tokens")) if n is not None]
    top = fields.whole("top_logprobs", 0, asks.LOGPROBS)
    logprobs = fields.flag("logprobs")
    if top and not logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    schema = asks.schema(fields.object("response_format"), bool(request.tools))
    wishes = asks.wishes(
        fields,
        served,
        most=min(most) if most else None,
        top=(top or 0) if logprobs else None,
        parallel=fields.flag("parallel_tool_calls", True),
        calling=calling if request.tools else None,
        budget=fields.whole("thinking_token_budget", 0, asks.MOST),
        schema=schema,
    )
    return request, wishes


def logprob(served: Served, likely: Likely) -> dict[str, Any]:
    """One token in the form of chat completions."""

    def entry(token: int, value: float) -> dict[str, Any]:
        piece = served.tokenizer.piece(token, False)
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(value, -9999.0), "bytes": list(piece)}

    return entry(likely.token, likely.logprob) | {"top_logprobs": [entry(*other) for other in likely.top]}


def call_record(delta: Delta) -> dict[str, Any]:
    assert delta.call
    return {"id": delta.call.id, "type": "function", "function": {"name": delta.call.name, "arguments": delta.call.arguments}}


class _Shape:
    """An answer as OpenAI's objects."""

    answer: Answer

    def __init__(self, fields: Fields, served: Served, model: str, usage: bool, every: bool):
        self.served, self.usage, self.every = served, usage, every
        self.thoughts = fields.flag("include_reasoning", True)
        self.with_ids = fields.flag("return_token_ids")
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": served.fingerprint,
        }
        self.events: dict[int, list[Event]] = {}

    def _deltas(self, delta: Delta) -> list[dict[str, Any]]:
        """A call is two: its name, then its arguments, which come whole."""
        if delta.kind == CONTENT:
            return [{"content": delta.text}]
        if delta.kind == REASONING:
            return [{self.served.settings.reasoning_field: delta.text}] if self.thoughts else []
        record = call_record(delta)
        at, arguments = delta.call.index if delta.call else 0, record["function"].pop("arguments")
        record["function"]["arguments"] = ""
        return [{"tool_calls": [{"index": at, **record}]}, {"tool_calls": [{"index": at, "function": {"arguments": arguments}}]}]

    def _chunk(self, choices: list[dict[str, Any]], usage: bool = False) -> bytes:
        chunk: dict[str, Any] = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        if usage or self.every:
            chunk["usage"] = self.answer.usage()
        elif self.usage:
            chunk["usage"] = None
        return sse(chunk)

    def _choice(self, index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, **more}

    async def stream(self) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        async for event in self.answer.events():
            pieces = b""
            if event.index not in begun:
                begun.add(event.index)
                ids: dict[str, Any] = {"prompt_token_ids": list(self.answer.prompt)} if self.with_ids else {}
                pieces += self._chunk([self._choice(event.index, {"role": "assistant", "content": ""}, **ids)])
            deltas = [shown for delta in event.deltas for shown in self._deltas(delta)]
            ids = {"token_ids": list(event.ids)} if self.with_ids and event.ids else {}
            logprobs = {"content": [logprob(self.served, x) for x in event.likely], "refusal": None} if event.likely else None
            if (ids or logprobs) and not deltas:
                deltas = [{}]
            for at, delta in enumerate(deltas):
                first = {"logprobs": logprobs, **ids} if at == 0 else {}
                pieces += self._chunk([self._choice(event.index, delta) | first])
            if event.finish:
                choice = self.answer.choices[event.index]
                pieces += self._chunk([self._choice(event.index, {}, event.finish, stop_reason=stop_reason(choice))])
            if pieces:
                yield pieces
        if self.usage:
            yield self._chunk([], usage=True)
        yield sse("[DONE]")

    async def collect(self) -> None:
        async for event in self.answer.events():
            self.events.setdefault(event.index, []).append(event)

    def whole(self) -> dict[str, Any]:
        choices = []
        for choice in self.answer.choices:
            events = self.events.get(choice.index, [])
            record: dict[str, Any] = {
                "index": choice.index,
                "message": self._message(choice.message),
                "logprobs": None,
                "finish_reason": choice.finish,
                "stop_reason": stop_reason(choice),
            }
            if self.answer.wishes.top is not None:
                record["logprobs"] = {"content": [logprob(self.served, x) for e in events for x in e.likely], "refusal": None}
            if self.with_ids:
                record["token_ids"] = [i for event in events for i in event.ids]
            choices.append(record)
        ids = {"prompt_token_ids": list(self.answer.prompt)} if self.with_ids else {}
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.answer.usage(), **ids}

    def _message(self, message: Message) -> dict[str, Any]:
        record = message.record() | {"refusal": None}
        thought = record.pop("reasoning_content", None)
        if thought and self.thoughts:
            record[self.served.settings.reasoning_field] = thought
        if message.partial:
            record.setdefault("tool_calls", []).append(call_record(Delta("", call=message.partial)))
        return record


def stop_reason(choice: Choice) -> str | int | None:
    return choice.message.stop_text if choice.message.stop_text is not None else choice.stop_id
