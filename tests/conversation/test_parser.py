"""Generated ids -> message: every case of the fixtures in every split, and any split of any ids."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.parser import CALL, CONTENT, PARTIAL, REASONING, Delta, Message, Parser
from kiln.exporter.conversation.template import Template
from kiln.exporter.conversation.vocabulary import Vocabulary
from tests.timeline import FIXTURES

FIXTURE = json.loads((FIXTURES / "parse_cases.json").read_text())
CASES = FIXTURE["cases"]
PROMPTS = {"model turn": "<|turn>model\n", "open thought": "<|turn>model\n<|channel>thought\n"}


@pytest.fixture(scope="module")
def markup(templates: list[Template]) -> Markup:
    return Markup.of(templates[0].text, templates[0].vocabulary.special)


def parser(words: Vocabulary, markup: Markup, request: dict[str, Any]) -> Parser:
    prompt = [i for piece in words.split(PROMPTS[request["prompt_ends_in"]]) for i in words.ids(piece)]
    tools = FIXTURE["tools"] if request["tools"] and request["tool_choice"] != "none" else None
    return Parser(words, markup, prompt, tools, request["stop"], request["parallel_tool_calls"])


def expected(message: Message) -> dict[str, Any]:
    """In the fixture's form."""
    record = message.record()
    calls = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in message.calls]
    found = {
        "role": "assistant",
        "content": record["content"],
        "reasoning_content": record.get("reasoning_content"),
        "tool_calls": calls,
        "finish_reason": message.finish,
    }
    if message.partial:
        p = message.partial
        found["partial_tool_call"] = {"index": p.index, "name": p.name, "arguments_text": p.arguments}
    return found


def joined(deltas: list[Delta]) -> list[Any]:
    """In the fixture's form: neighbours of one kind are one."""
    found: list[Any] = [["role", "assistant"]]
    names = {CONTENT: "content", REASONING: "reasoning_content"}
    for delta in deltas:
        if delta.kind in names:
            assert delta.text
            if found[-1][0] == names[delta.kind]:
                found[-1][1] += delta.text
            else:
                found.append([names[delta.kind], delta.text])
        else:
            assert delta.kind in (CALL, PARTIAL) and delta.call
            found.append(["tool_call", delta.call.index, delta.call.name, delta.call.arguments])
    return found


def same_arguments(found: list[Any], right: list[Any], message: dict[str, Any]) -> None:
    """Spacing of arguments is free."""
    assert len(found) == len(right)
    cut = message.get("partial_tool_call", {}).get("index")
    for mine, theirs in zip(found, right, strict=True):
        if mine[0] == "tool_call" and mine[1] != cut:
            mine, theirs = [*mine[:3], json.loads(mine[3])], [*theirs[:3], json.loads(theirs[3])]
        assert mine == theirs


def check(case: dict[str, Any], made: Parser, deltas: list[Delta]) -> None:
    deltas = deltas + made.finish(cut=case["end"] == "length")
    assert expected(made.message) == case["message"]
    same_arguments([*joined(deltas), ["finish_reason", made.message.finish]], case["deltas"], case["message"])
    again = Message()
    for delta in deltas:
        again.add(delta)
    assert (again.content, again.reasoning, again.calls) == (made.message.content, made.message.reasoning, made.message.calls)
    assert len({c.id for c in again.calls}) == len(again.calls)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_case(case: dict[str, Any], words: Vocabulary, markup: Markup) -> None:
    """All ids at once, one by one, and the fixture's four splits of their text."""
    made = parser(words, markup, case["request"])
    check(case, made, made.push(case["ids"]))
    made = parser(words, markup, case["request"])
    check(case, made, [delta for i in case["ids"] for delta in made.push([i])])
    for split in case["splits"].values():
        made = parser(words, markup, case["request"])
        deltas: list[Delta] = []
        for piece in split:
            if isinstance(piece, str):
                deltas += made.push_bytes(piece.encode())
            else:
                deltas += made.push([piece["id"]]) if "id" in piece else made.push_bytes(bytes.fromhex(piece["bytes"]))
        check(case, made, deltas)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_any_split_of_a_case(case: dict[str, Any], words: Vocabulary, markup: Markup) -> None:
    """Every split in two, and random ones in many."""
    ids, random = case["ids"], Random(case["name"])
    splits = [[0, k, len(ids)] for k in range(len(ids) + 1)]
    splits += [sorted({0, len(ids), *random.choices(range(len(ids) + 1), k=3)}) for _ in range(20)]
    for cuts in splits:
        made = parser(words, markup, case["request"])
        check(case, made, [d for a, b in zip(cuts, cuts[1:], strict=False) for d in made.push(ids[a:b])])
