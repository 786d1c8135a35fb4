"""What is wrong with a conversation is named by its part, before a template runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kiln.exporter.conversation.request import RequestError, read_request

USER = {"role": "user", "content": "a"}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}, {"id": "c2", "function": {"name": "g"}}]
ASKED = [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}]


def deep(n: int) -> Any:
    return [deep(n - 1)] if n else 1


@pytest.mark.parametrize(
    ("messages", "more", "part"),
    [
        ([], {}, "messages"),
        (None, {}, "messages"),
        ("text", {}, "messages"),
        (["text"], {}, "messages[0]"),
        ([{"content": "a"}], {}, "messages[0].role"),
        ([{"role": "wizard", "content": "a"}], {}, "messages[0].role"),
        ([{"role": "user"}], {}, "messages[0].content"),
        ([{"role": "user", "content": 3}], {}, "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], {}, "messages[0].content[0]"),
        ([{"role": "user", "content": "\ud800"}], {}, "messages[0].content"),
        ([USER, {"role": "assistant", "content": "a", "reasoning": 3}], {}, "messages[1].reasoning_content"),
        ([USER, {"role": "tool", "tool_call_id": "c", "content": "a"}], {}, "messages[1]"),
        ([*ASKED, {"role": "tool", "content": "a"}], {}, "messages[2].tool_call_id"),
        ([*ASKED, {"role": "tool", "tool_call_id": "c3", "content": "a"}], {}, "messages[2].tool_call_id"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}], {}, "messages[1].tool_calls[0].function"),
        ([USER, {"role": "assistant", "tool_calls": [CALLS[0], CALLS[0]]}], {}, "messages[1].tool_calls[1].id"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "", "function": {"name": "f"}}]}], {}, "messages[1].tool_calls[0]"),
        ([USER], {"tools": {}}, "tools"),
        ([USER], {"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ([USER], {"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ([USER], {"tools": [{"function": {"name": "a"}}, {"function": {"name": "a"}}]}, "tools[1].function.name"),
        ([USER], {"tools": [{"function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ([USER], {"tools": [{"function": {"name": "a", "parameters": {"x": deep(100)}}}]}, "tools[0].function.parameters.x" + "[0]" * 62),
        ([USER], {"variables": {"messages": []}}, "chat_template_kwargs.messages"),
        ([USER], {"variables": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ([USER], {"variables": {"enable_thinking": "false"}}, "chat_template_kwargs.enable_thinking"),
        ([USER], {"variables": {"x": float("inf")}}, "chat_template_kwargs.x"),
        ([USER], {"continue_final": True}, "messages[0]"),
        (ASKED, {"continue_final": True}, "messages[1]"),
    ],
)
def test_refused(messages: Any, more: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestError) as error:
        read_request(messages, **more)
    assert error.value.part == part and str(error.value).startswith(part) and "\n" not in str(error.value)


def test_arguments() -> None:
    def arguments(given: Any) -> Any:
        call = {"id": "c", "function": {"name": "f", "arguments": given}}
        return read_request([USER, {"role": "assistant", "tool_calls": [call]}]).messages[1]["tool_calls"][0]["function"]["arguments"]

    for given, right in [
        ("", {}),
        (None, {}),
        ("null", {}),
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("[1]", "[1]"),
        ('{"a": [', '{"a": ['),
    ]:
        assert arguments(given) == right
    with pytest.raises(RequestError):
        arguments("[" * 100_000)
    with pytest.raises(RequestError, match="number without end"):
        arguments('{"a": 1e999}')


def test_calls_without_results() -> None:
    result = {"role": "tool", "tool_call_id": "c2", "content": None}
    assert read_request(ASKED).pending == ("c1", "c2")
    assert read_request([*ASKED, result]).pending == ("c1",) and read_request([*ASKED, result]).messages[2]["content"] == ""
    assert read_request([*ASKED, result, {**result, "tool_call_id": "c1"}]).pending == ()
    assert read_request([USER]).pending == ()


def test_the_request_is_not_changed() -> None:
    given = json.dumps([*ASKED, {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}]}])
    messages = json.loads(given)
    read_request(messages, [{"function": {"name": "a"}}])
    assert json.dumps(messages) == given


def test_an_answer_without_content() -> None:
    """A template that writes a content as it is would write "None"."""
    for answer in ({"content": None}, {}, {"content": None, "tool_calls": CALLS}):
        assert read_request([USER, {"role": "assistant", **answer}]).messages[1]["content"] == ""
