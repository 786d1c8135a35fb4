"""Messages and tools in OpenAI's form -> a checked `Request`, in the form that chat templates take.

What is wrong is a `RequestError` that names the part, such as `messages[2].tool_call_id`, before a template runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kiln.exporter.errors import KilnError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Variables of a template that a request may not set.
OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token", "unk_token")
MAX_DEPTH = 64  # of JSON within a request
MAX_NAME = 128  # characters of a function's name


class RequestError(KilnError):
    """A conversation that cannot be rendered; `part` names what of it is wrong."""

    def __init__(self, part: str, message: str):
        super().__init__(f"{part}: {message}")
        self.part = part


@dataclass(frozen=True)
class Request:
    """A checked conversation. `variables` are the template's own switches, such as enable_thinking.

    generate: the model is to write next. continue_final: it goes on with the text of the last message, the assistant's.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    generate: bool = True
    continue_final: bool = False

    @property
    def pending(self) -> tuple[str, ...]:
        """Ids of the calls at the end that have no result: a model that went on here would write the results itself."""
        calls: dict[str, None] = {}
        for message in self.messages:
            if message["role"] == "tool":
                calls.pop(message["tool_call_id"], None)
            else:
                calls = {call["id"]: None for call in message.get("tool_calls") or ()}
        return tuple(calls)


def read_request(
    messages: Any,
    tools: Any = None,
    variables: Mapping[str, Any] | None = None,
    generate: bool = True,
    continue_final: bool = False,
) -> Request:
    """Raises RequestError for the first thing that is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError("messages", "a list of messages was expected")
    if not messages:
        raise RequestError("messages", "is empty; give at least one message")
    read: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        read.append(_message(f"messages[{i}]", message, read))
    if continue_final and (read[-1]["role"] != "assistant" or read[-1].get("tool_calls")):
        raise RequestError(f"messages[{len(read) - 1}]", "only an assistant's text can be continued")
    for name, value in (variables or {}).items():
        if name in OWN:
            raise RequestError(f"chat_template_kwargs.{name}", "is set by Kiln; leave it out")
        if name == "enable_thinking" and not isinstance(value, bool):
            raise RequestError(f"chat_template_kwargs.{name}", f"true or false was expected, not {json.dumps(value, default=str)[:40]}")
        check_value(f"chat_template_kwargs.{name}", value)
    return Request(tuple(read), _tools(tools), dict(variables or {}), generate and not continue_final, continue_final)


def is_halved(text: str) -> bool:
    """Whether a text has half of a surrogate pair, which no UTF-8 spells."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_value(part: str, value: Any, depth: int = 0) -> None:
    """RequestError where a value is no JSON that can be written as text: half characters, infinite numbers, no end of nesting."""
    if depth > MAX_DEPTH:
        raise RequestError(part, f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        if is_halved(value):
            raise RequestError(part, "is no Unicode text: it has bytes that are not UTF-8, or half of a surrogate pair")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RequestError(part, f"has the key {key!r}, a text was expected")
            check_value(part, key, depth)
            check_value(f"{part}.{key[:40]}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_value(f"{part}[{i}]", item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RequestError(part, "is a number without end")
    elif value is not None and not isinstance(value, bool | int | float):
        raise RequestError(part, f"is a {type(value).__name__}, which JSON does not know")


def _message(part: str, message: Any, before: list[dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(part, "an object with role and content was expected")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{part}.role", f"{str(role)[:40]!r} is none of {', '.join(ROLES)}")
    content = _content(f"{part}.content", message.get("content"), may_lack=role in ("assistant", "tool"))
    if role in ("system", "developer") and isinstance(content, list):
        content = "\n".join(item["text"] for item in content)
    read: dict[str, Any] = {"role": role, "content": "" if content is None else content}
    if message.get("name") is not None:
        read["name"] = _text(f"{part}.name", message["name"])
    if role == "assistant":
        thought = message.get("reasoning") or message.get("reasoning_content")
        if thought:
            read["reasoning"] = read["reasoning_content"] = _text(f"{part}.reasoning_content", thought)
        if message.get("tool_calls"):
            read["tool_calls"] = _calls(f"{part}.tool_calls", message["tool_calls"])
    if role == "tool":
        read["tool_call_id"] = _answered(part, message.get("tool_call_id"), before)
    return read


def _text(part: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(part, f"a text was expected, not {json.dumps(value, default=str)[:40]}")
    check_value(part, value)
    return value


def _content(part: str, content: Any, may_lack: bool) -> str | list[dict[str, str]] | None:
    if content is None and may_lack:
        return None
    if isinstance(content, str):
        return _text(part, content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(part, "a text or a list of parts was expected")
    read = []
    for i, item in enumerate(content):
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind != "text":
            raise RequestError(f"{part}[{i}]", f"a part of type {str(kind)[:40]!r} is not supported; this model reads parts of type 'text'")
        read.append({"type": "text", "text": _text(f"{part}[{i}].text", item.get("text"))})
    return read


def _calls(part: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise RequestError(part, "a list of calls was expected")
    read: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{part}[{i}].function", "an object with name and arguments was expected")
        name, ident = _text(f"{part}[{i}].function.name", function.get("name")), _text(f"{part}[{i}].id", call.get("id"))
        if not name or not ident:
            raise RequestError(f"{part}[{i}]", "its id and its function's name may not be empty")
        if any(other["id"] == ident for other in read):
            raise RequestError(f"{part}[{i}].id", f"{ident[:40]!r} is the id of another call of this message")
        arguments = _arguments(f"{part}[{i}].function.arguments", function.get("arguments"))
        read.append({"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}})
    return read


def _arguments(part: str, arguments: Any) -> Any:
    """A mapping; a text that is no JSON object, which clients return after a call that was cut, stays a text."""
    if isinstance(arguments, str):
        text = _text(part, arguments)
        try:
            arguments = json.loads(text) if text.strip() else {}
        except ValueError:
            return text
        except RecursionError:
            raise RequestError(part, f"is nested more than {MAX_DEPTH} deep") from None
        if arguments is not None and not isinstance(arguments, dict):
            return text
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RequestError(part, "a JSON object as text was expected")
    check_value(part, arguments)
    return dict(arguments)


def _answered(part: str, ident: Any, before: list[dict[str, Any]]) -> str:
    asked = next((m for m in reversed(before) if m["role"] != "tool"), None)
    calls = (asked or {}).get("tool_calls")
    if not calls:
        raise RequestError(part, "a tool's result follows no call; the assistant's message with tool_calls must stand before it")
    if not isinstance(ident, str) or all(call["id"] != ident for call in calls):
        known = ", ".join(call["id"][:40] for call in calls)
        raise RequestError(f"{part}.tool_call_id", f"{str(ident)[:40]!r} is no call of the message before it; its calls are {known}")
    return ident


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError("tools", "a list of tools was expected")
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") not in (None, "function"):
            raise RequestError(f"tools[{i}]", "a tool of type 'function' was expected")
        name = _text(f"tools[{i}].function.name", function.get("name"))
        if not 0 < len(name) <= MAX_NAME or not all(c.isascii() and (c.isalnum() or c in "_-.") for c in name):
            raise RequestError(f"tools[{i}].function.name", f"{name[:40]!r}: 1 to {MAX_NAME} letters, digits, _, - and . were expected")
        if name in names:
            raise RequestError(f"tools[{i}].function.name", f"{name!r} is the name of another tool")
        names.add(name)
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"tools[{i}].function.parameters", "a JSON schema was expected")
        check_value(f"tools[{i}]", tool)
    return tuple(dict(tool) | {"type": "function"} for tool in tools)
