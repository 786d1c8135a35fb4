"""/v1/responses, OpenAI's, as far as nothing has to be kept from one request to the next."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from kiln.exporter.conversation.parser import CONTENT, REASONING, Delta
from kiln.exporter.serve.answer import Answer, Wishes
from kiln.exporter.serve.api import asks
from kiln.exporter.serve.api.chat import logprob
from kiln.exporter.serve.fields import Fields, shown
from kiln.exporter.serve.problem import Problem, unsupported, wrong
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.steps.rows import Likely
from kiln.exporter.serve.web import Json, Stream, present, read_body, sse

KEPT = "nothing is kept from one request to the next; send the whole conversation as input"
_TEXTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"


async def responses(served: Served, http: Http) -> Response:
    fields = await read_body(http, served.settings)
    model = served.model(fields.text("model"))
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.refuse(name, KEPT)
    fields.refuse("background", KEPT, False)
    fields.refuse("truncation", "nothing of a conversation is left out here", "disabled")
    tools = [_tool(i, tool) for i, tool in enumerate(fields.items("tools", served.settings.tools) or [])]
    reasoning = fields.object("reasoning") or Fields({}, "reasoning")
    variables = asks.variables(fields, served, asks.effort(reasoning, "effort", served), "reasoning.effort")
    history, origin = _history(fields, served)
    with asks.numbered("input", origin, "instructions"):
        request = asks.conversation(served, history, tools, variables)
    calling, seen = asks.calling(fields.body.get("tool_choice"), [tool["function"]["name"] for tool in request.tools])
    if not seen:
        request = dataclasses.replace(request, tools=())
    text = fields.object("text")
    include = fields.items("include", 64) or []
    top = fields.whole("top_logprobs", 0, asks.LOGPROBS)
    wishes = Wishes(
        asks.sampling(fields, served), most=fields.whole("max_output_tokens", 1, asks.MOST),
        top=(top or 0) if top or LOGPROBS in include else None, parallel=fields.flag("parallel_tool_calls", True),
        calling=calling if request.tools else None,
        schema=asks.schema(text.object("format") if text else None, bool(request.tools)), schema_field="text.format",
    )  # fmt: skip
    stream = fields.flag("stream")
    with asks.numbered("input", origin, "instructions"):
        answer = await served.converse(request, wishes, "input")
    shape = _Shape(served, fields, model, answer)
    if stream:
        return Stream(served, [answer], shape.stream(), b": ping\n\n", shape.failed)
    await present(http, [answer], shape.collect())
    return Json(shape.record())


def _tool(i: int, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise unsupported(f"tools[{i}].type", f"{shown(kind)}; only tools of type 'function' are taken")
    given = {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": given}


def _history(fields: Fields, served: Served) -> tuple[list[dict[str, Any]], list[int]]:
    """In the form of chat completions, and of each message the item that it began with; -1: the instructions."""
    history: list[dict[str, Any]] = []
    origin: list[int] = []
    if instructions := fields.text("instructions"):
        history.append({"role": "system", "content": instructions})
        origin.append(-1)
    given = fields.body.get("input")
    if isinstance(given, str):
        return [*history, {"role": "user", "content": given}], [*origin, 0]
    items = fields.items("input", served.settings.messages)
    if not items:
        raise wrong("input", "a text or a list of items was expected")
    open_turn = False  # items of the model's that make one message
    for i, item in enumerate(items):
        part = f"input[{i}]"
        if not isinstance(item, dict):
            raise wrong(part, f"an object was expected, not {shown(item)}")
        kind = item.get("type") or "message"
        own = kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant")
        if own:
            if not open_turn or (kind == "message" and history[-1].get("content")) or (kind == "reasoning" and _spoken(history[-1])):
                history.append({"role": "assistant", "content": None})
            turn = history[-1]
            if kind == "message":
                turn["content"] = _content(f"{part}.content", item.get("content"))
            elif kind == "reasoning":
                parts = Fields(item, part).items("content", served.settings.messages) or []
                thoughts = [Fields(x, f"{part}.content[{j}]").text("text") or "" for j, x in enumerate(parts) if isinstance(x, dict)]
                turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(thoughts)
            else:
                given = Fields(item, part)
                function = {"name": given.needed("name"), "arguments": given.text("arguments")}
                turn.setdefault("tool_calls", []).append({"id": given.needed("call_id"), "function": function})
        elif kind == "function_call_output":
            output, ident = _content(f"{part}.output", item.get("output")), Fields(item, part).needed("call_id")
            history.append({"role": "tool", "tool_call_id": ident, "content": output})
        elif kind == "message":
            history.append({"role": item.get("role"), "content": _content(f"{part}.content", item.get("content"))})
        else:
            raise unsupported(f"{part}.type", shown(kind))
        open_turn = own
        origin += [i] * (len(history) - len(origin))
    return history, origin


def _spoken(turn: dict[str, Any]) -> bool:
    return bool(turn.get("content") or turn.get("tool_calls"))


def _content(part: str, content: Any) -> Any:
    if not isinstance(content, list):
        return content
    found = []
    for j, item in enumerate(content):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in _TEXTS:
            raise unsupported(f"{part}[{j}]", f"a part of type {shown(kind)}; this model reads text")
        found.append({"type": "text", "text": item.get("text")})
    return found


@dataclasses.dataclass
class _Shape:
    """An answer as items. `stream` gives events; `collect` only gathers the items."""

    served: Served
    fields: Fields
    model: str
    answer: Answer
    items: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    id: str = dataclasses.field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _number: int = 0
    _last: bytes = b""
    _likely: list[Likely] = dataclasses.field(default_factory=list)

    def record(self, status: str = "", problem: Problem | None = None) -> dict[str, Any]:
        choice, body = self.answer.choices[0], self.fields.body
        cut = choice.finish == "length"
        status = status or ("incomplete" if cut else "completed")
        usage = self.answer.usage()
        wishes = self.answer.wishes
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": {"code": "server_error", "message": problem.message} if problem else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self.model,
            "output": self.items,
            "parallel_tool_calls": wishes.parallel,
            "previous_response_id": None,
            "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "temperature": wishes.sampling.temperature,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": wishes.sampling.top_p,
            "truncation": "disabled",
            "metadata": body.get("metadata") or {},
            "usage": None
            if status in ("in_progress", "failed")
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **more}, kind)

    def _where(self, index: bool = True) -> dict[str, Any]:
        """Of the last item."""
        at = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return at | ({"content_index": 0} if index else {})

    def _over(self, status: str = "completed") -> bytes:
        """The last item is complete."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return b""
        item, events = self.items[-1], b""
        item["status"] = status
        if item["type"] == "reasoning":
            events = self._event("response.reasoning_text.done", **self._where(), text=item["content"][0]["text"])
            events += self._event("response.content_part.done", **self._where(), part=item["content"][0])
        elif item["type"] == "message":
            part = item["content"][0]
            events = self._event("response.output_text.done", **self._where(), text=part["text"], logprobs=part["logprobs"])
            events += self._event("response.content_part.done", **self._where(), part=part)
        return events + self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _begin(self, item: dict[str, Any], part: dict[str, Any] | None) -> bytes:
        events = self._over()
        shown = {**item, "content": []} if part else item
        self.items.append({**item, "content": [part]} if part else dict(item))
        events += self._event("response.output_item.added", output_index=len(self.items) - 1, item=shown)
        return events + (self._event("response.content_part.added", **self._where(), part=dict(part)) if part else b"")

    def _add(self, delta: Delta, likely: tuple[Likely, ...]) -> bytes:
        """The delta goes into the items; -> its events."""
        if delta.call:
            call = delta.call
            head = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
            events = self._begin({**head, "call_id": call.id, "name": call.name, "arguments": ""}, None)
            self.items[-1]["arguments"] = call.arguments
            events += self._event("response.function_call_arguments.delta", **self._where(False), delta=call.arguments)
            done = {"name": call.name, "arguments": call.arguments}
            events += self._event("response.function_call_arguments.done", **self._where(False), **done)
            return events + self._over("completed" if delta.kind == "call" else "incomplete")
        kind = "message" if delta.kind == CONTENT else "reasoning"
        events = b""
        if not self.items or self.items[-1]["type"] != kind:
            head = {"id": f"{'msg' if kind == 'message' else 'rs'}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress"}
            if kind == "message":
                events = self._begin({**head, "role": "assistant"}, {"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            else:
                events = self._begin({**head, "summary": []}, {"type": "reasoning_text", "text": ""})
        part = self.items[-1]["content"][0]
        part["text"] += delta.text
        self._likely += likely
        mine, self._likely = self._likely, []
        if delta.kind == REASONING:
            return events + self._event("response.reasoning_text.delta", **self._where(), delta=delta.text)
        found = [logprob(self.served, x) for x in mine]
        part["logprobs"] += found
        return events + self._event("response.output_text.delta", **self._where(), delta=delta.text, logprobs=found)

    async def stream(self) -> AsyncIterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.record("in_progress"))
        async for event in self.answer.events():
            if pieces := self._added(event.deltas, event.likely):
                yield pieces
        record = self._finished()
        yield self._last + self._event(f"response.{record['status']}", response=record)

    def _added(self, deltas: tuple[Delta, ...], likely: tuple[Likely, ...]) -> bytes:
        if not deltas:
            self._likely += likely  # their text is held back
        return b"".join(self._add(delta, likely if i == 0 else ()) for i, delta in enumerate(deltas))

    def _finished(self) -> dict[str, Any]:
        self._last = self._over("incomplete" if self.answer.choices[0].finish == "length" else "completed")
        return self.record()

    async def collect(self) -> None:
        async for event in self.answer.events():
            self._added(event.deltas, event.likely)
        self._finished()

    def failed(self, problem: Problem) -> bytes:
        error = {"code": problem.code or "server_error", "message": problem.message, "param": problem.param}
        return self._event("error", **error) + self._event("response.failed", response=self.record("failed", problem))
