"""/v1/messages and /v1/messages/count_tokens, Anthropic's."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from kiln.exporter.conversation.parser import CONTENT, REASONING, Delta
from kiln.exporter.conversation.request import Request
from kiln.exporter.serve.answer import Answer, Wishes
from kiln.exporter.serve.api import asks
from kiln.exporter.serve.fields import Fields, shown
from kiln.exporter.serve.problem import Problem, unsupported, wrong
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.steps.steer import Calling
from kiln.exporter.serve.web import Json, Stream, present, read_body, sse

LEAST_BUDGET = 1024  # tokens of thoughts that may be asked for
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def messages(served: Served, http: Http) -> Response:
    fields = await read_body(http, served.settings)
    model = served.model(fields.text("model"))
    most = fields.whole("max_tokens", 1, asks.MOST)
    if most is None:
        raise wrong("max_tokens", "is missing")
    request, calling, parallel, origin = _request(fields, served)
    thinking = fields.object("thinking")
    output = fields.object("output_config") or Fields({}, "output_config")
    form = output.object("format") or fields.object("output_format")
    wishes = Wishes(
        asks.sampling(fields, served, 1.0), most=most, stop=asks.stops(fields, "stop_sequences"), parallel=parallel, calling=calling,
        budget=_budget(thinking, most), salt=fields.text("cache_salt") or "",
        schema=asks.schema(form, bool(request.tools)), schema_field=form.part if form else "",
    )  # fmt: skip
    stream = fields.flag("stream")
    with asks.numbered("messages", origin, "system"):
        answer = await served.converse(request, wishes)
    shape = _Shape(model, answer)
    if stream:

        def failed(problem: Problem) -> bytes:
            return sse(problem.anthropic(), "error")

        return Stream(served, [answer], shape.stream(), sse({"type": "ping"}, "ping"), failed)
    await present(http, [answer], shape.collect())
    return Json(shape.whole())


async def count_tokens(served: Served, http: Http) -> Response:
    fields = await read_body(http, served.settings)
    served.model(fields.text("model"))
    request, _, _, origin = _request(fields, served)
    with asks.numbered("messages", origin, "system"):
        prompt = await served.aside(served.rendered, request)
    return Json({"input_tokens": len(prompt.ids)})


def _request(fields: Fields, served: Served) -> tuple[Request, Calling | None, bool, list[int]]:
    """-> the conversation, what may be called, whether more than once, and of each message where it came from, as of `_history`."""
    for name in ("mcp_servers", "container"):
        fields.refuse(name, "this server does not take it", [], {})
    if (management := fields.object("context_management")) is not None:
        for edit in management.items("edits", 16) or []:
            if not isinstance(edit, dict) or edit.get("keep") != "all":
                raise unsupported("context_management.edits", "nothing of a conversation is left out here")
    tools = [_tool(i, tool) for i, tool in enumerate(fields.items("tools", served.settings.tools) or [])]
    thinking = fields.object("thinking")
    kind = thinking.choice("type", ("enabled", "adaptive", "disabled")) if thinking else None
    if thinking and kind is None:
        raise wrong("thinking.type", "is missing")
    variables = asks.variables(fields, served, None if kind is None else kind != "disabled", "thinking")
    choice = fields.object("tool_choice")
    converted, parallel = "auto", True
    if choice is not None:
        said = choice.choice("type", ("auto", "any", "tool", "none"))
        if said is None:
            raise wrong("tool_choice.type", "is missing")
        if said == "any" and not tools:
            raise wrong("tool_choice.type", "'any' needs tools")
        named: Any = {"type": "function", "name": choice.needed("name")} if said == "tool" else None
        converted = named or {"any": "required"}.get(said, said)
        parallel = not choice.flag("disable_parallel_tool_use")
    listed = fields.items("messages", served.settings.messages)
    if not listed:
        raise wrong("messages", "a list of messages was expected, of one at least")
    history, origin = _history(fields, listed)
    last = history[-1] if history else {}
    going_on = last.get("role") == "assistant" and not last.get("tool_calls")
    with asks.numbered("messages", origin, "system"):
        request = asks.conversation(served, history, tools, variables, True, going_on)
    calling, seen = asks.calling(converted, [tool["function"]["name"] for tool in request.tools])
    if not seen:
        request = dataclasses.replace(request, tools=())
    return request, calling if request.tools else None, parallel, origin


def _budget(thinking: Fields | None, most: int) -> int | None:
    if thinking is None or thinking.body.get("type") != "enabled":
        return None
    budget = thinking.whole("budget_tokens", LEAST_BUDGET, asks.MOST)
    if budget is None:
        raise wrong("thinking.budget_tokens", "is missing")
    if budget >= most:
        raise wrong("thinking.budget_tokens", f"{budget} must be below max_tokens, {most}")
    return budget


def _tool(i: int, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong(f"tools[{i}]", f"an object was expected, not {shown(tool)}")
    if tool.get("type", "custom") not in (None, "custom"):
        raise unsupported(f"tools[{i}].type", "only tools of the client's own are taken")
    given = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


def _history(fields: Fields, listed: list[Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """In OpenAI's form, and of each message where it came from; -1: the system prompt."""
    history: list[dict[str, Any]] = []
    origin: list[int] = []
    if fields.has("system"):
        history.append({"role": "system", "content": _texts("system", fields.body["system"])})
        origin.append(-1)
    for i, message in enumerate(listed):
        if not isinstance(message, dict):
            raise wrong(f"messages[{i}]", f"an object was expected, not {shown(message)}")
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise wrong(f"messages[{i}].role", f"{shown(role)} is none of user, assistant, system")
        some = _assistant(i, message) if role == "assistant" else _said(i, role, message.get("content"))
        history += some
        origin += [i] * len(some)
    return history, origin


def _texts(part: str, content: Any) -> Any:
    """A text, or parts of type text."""
    if not isinstance(content, list):
        return content
    return [_text(f"{part}[{j}]", block) for j, block in enumerate(content)]


def _text(part: str, block: Any) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind != "text":
        raise unsupported(part, f"a block of type {shown(kind)}; this model reads text")
    return {"type": "text", "text": block.get("text")}


def _said(i: int, role: str, content: Any) -> list[dict[str, Any]]:
    """A user's message: results of tools become messages of their own."""
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    found: list[dict[str, Any]] = []
    for j, block in enumerate(content):
        part = f"messages[{i}].content[{j}]"
        if isinstance(block, dict) and block.get("type") == "tool_result":
            inner = block.get("content")
            result = _texts(f"{part}.content", "" if inner is None else inner)
            if block.get("is_error") is True:
                result = f"Error: {result}" if isinstance(result, str) else [{"type": "text", "text": "Error: "}, *result]
            found.append({"role": "tool", "tool_call_id": Fields(block, part).needed("tool_use_id"), "content": result})
            continue
        if not found or found[-1]["role"] != role:
            found.append({"role": role, "content": []})
        found[-1]["content"].append(_text(part, block))
    return found or [{"role": role, "content": ""}]


def _assistant(i: int, message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if not isinstance(content, list):
        return [{"role": "assistant", "content": content}]
    record: dict[str, Any] = {"role": "assistant", "content": []}
    for j, block in enumerate(content):
        part, kind = f"messages[{i}].content[{j}]", block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            thought = block.get("thinking")
            if not isinstance(thought, str):
                raise wrong(f"{part}.thinking", f"a text was expected, not {shown(thought)}")
            record["reasoning_content"] = record.get("reasoning_content", "") + thought
        elif kind == "tool_use":
            given = Fields(block, part)
            if given.has("input") and not isinstance(block["input"], str):  # some clients keep the text that was streamed
                given.object("input")
            function = {"name": given.needed("name"), "arguments": block.get("input")}
            record.setdefault("tool_calls", []).append({"id": given.needed("id"), "function": function})
        elif kind != "redacted_thinking":
            record["content"].append(_text(part, block))
    if not record["content"]:
        record["content"] = None if record.get("tool_calls") else ""
    return [record]


@dataclasses.dataclass
class _Shape:
    """An answer as blocks. `stream` gives events; `collect` only gathers the blocks."""

    model: str
    answer: Answer
    blocks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    id: str = dataclasses.field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")

    def _usage(self) -> dict[str, Any]:
        usage = self.answer.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        given = {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
        return given | {"output_tokens": usage["completion_tokens"]}

    def _record(self, stop: str | None, sequence: str | None) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": self.blocks, "stop_reason": stop, "stop_sequence": sequence, "usage": self._usage()}

    def _stopped(self) -> tuple[str | None, str | None]:
        message = self.answer.choices[0].message
        if message.stop_text is not None:
            return "stop_sequence", message.stop_text
        return _REASONS.get(message.finish or ""), None

    def _over(self) -> bytes:
        """The last block is complete."""
        if not self.blocks:
            return b""
        at, events = len(self.blocks) - 1, b""
        if self.blocks[-1]["type"] == "thinking":
            self.blocks[-1]["signature"] = "kiln"
            delta = {"type": "signature_delta", "signature": "kiln"}
            events = sse({"type": "content_block_delta", "index": at, "delta": delta}, "content_block_delta")
        return events + sse({"type": "content_block_stop", "index": at}, "content_block_stop")

    def _add(self, delta: Delta) -> bytes:
        """The delta goes into the blocks; -> its events."""
        kind = {CONTENT: "text", REASONING: "thinking"}.get(delta.kind, "tool_use")
        events = b""
        if kind == "tool_use" or not self.blocks or self.blocks[-1]["type"] != kind:
            events = self._over()
            start: dict[str, Any] = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            if delta.call:
                start = {"type": kind, "id": delta.call.id, "name": delta.call.name, "input": {}}
            events += sse({"type": "content_block_start", "index": len(self.blocks), "content_block": start}, "content_block_start")
            self.blocks.append(dict(start))
        block, at = self.blocks[-1], len(self.blocks) - 1
        if delta.call:
            change = {"type": "input_json_delta", "partial_json": delta.call.arguments}
            block["input"] = _object(delta.call.arguments)
        else:
            change = {"type": f"{kind}_delta", kind: delta.text}
            block[kind] += delta.text
        return events + sse({"type": "content_block_delta", "index": at, "delta": change}, "content_block_delta")

    async def stream(self) -> AsyncIterator[bytes]:
        begun = False
        async for event in self.answer.events():
            pieces = b""
            if not begun:
                begun = True
                pieces = sse({"type": "message_start", "message": self._record(None, None)}, "message_start")
            yield pieces + b"".join(self._add(delta) for delta in event.deltas)
        stop, sequence = self._stopped()
        delta = {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": sequence}, "usage": self._usage()}
        yield self._over() + sse(delta, "message_delta") + sse({"type": "message_stop"}, "message_stop")

    async def collect(self) -> None:
        async for event in self.answer.events():
            for delta in event.deltas:
                self._add(delta)
        self._over()

    def whole(self) -> dict[str, Any]:
        return self._record(*self._stopped())


def _object(arguments: str) -> dict[str, Any]:
    """Of a call that was cut there is no object."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
