"""Generated ids -> message: every case of the fixtures in every split, and any split of any ids."""

from __future__ import annotations

import json
import time
from random import Random
from typing import Any

import pytest

import kiln
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


def random_ids(random: Random, words: Vocabulary) -> list[int]:
    """Markers, pieces of calls, texts and single bytes, without an end."""
    texts = [
        "call:book{n:1,zip:2}",
        "call:ping{}",
        "call:f{a:",
        "thought\n",
        "thou",
        "\n",
        " ",
        "END",
        "EN",
        "Hi.",
        "{",
        "}",
        "é",
        "🫨",
        "<|tool_call>",
    ]
    ids: list[int] = []
    for _ in range(random.randrange(1, 25)):
        if random.random() < 0.45:
            ids.append(random.choice([48, 49, 52, 100, 101, 48, 49, 46, 98]))
        elif random.random() < 0.15:
            ids.append(238 + random.randrange(256))  # a byte
        else:
            ids += words.ids(random.choice(texts))
    return ids


def test_any_split_of_any_ids(words: Vocabulary, markup: Markup) -> None:
    """The same message and deltas however ids arrive; nothing fails; calls are JSON, and content and reasoning are whole characters."""
    random = Random(5)
    kinds = set()
    for _ in range(400):
        ids, cut = random_ids(random, words), random.random() < 0.5
        ids += [] if cut else [random.choice([1, 50, 106])]
        request = {"prompt_ends_in": random.choice(list(PROMPTS)), "tools": random.random() < 0.8, "tool_choice": "auto"}
        request |= {"stop": random.choice([[], ["END"], ["\n", "D H"]]), "parallel_tool_calls": random.random() < 0.8}
        found = []
        for size in (len(ids), 1, random.randrange(1, 4)):
            made = parser(words, markup, request)
            deltas = [d for k in range(0, len(ids), size) for d in made.push(ids[k : k + size])]
            deltas += made.finish()
            assert made.ended and made.push([107]) == [] and made.finish() == []
            assert all(d.text or d.call for d in deltas)
            again = Message()
            for delta in deltas:
                again.add(delta)
            assert (again.content, again.reasoning) == (made.message.content, made.message.reasoning)
            for call in made.message.calls:
                assert isinstance(json.loads(call.arguments), dict)
            found.append((expected(made.message), joined(deltas)))
            kinds |= {d.kind for d in deltas} | {made.message.finish}
        assert found[0] == found[1] == found[2], ids
    assert kinds == {CONTENT, REASONING, CALL, PARTIAL, "stop", "length", "tool_calls"}


def test_characters_as_the_runner_writes_them(words: Vocabulary) -> None:
    """Any bytes as tokens: the text that `kiln.StreamDecoder` gives, and nothing of a character before it is whole."""
    random = Random(6)
    for _ in range(300):
        data = "".join(random.choices(["a", "é", "日", "🫨"], k=6)).encode()
        data = bytes(b for b in data if random.random() < 0.9) + bytes(random.randrange(256) for _ in range(random.randrange(3)))
        ids = [238 + b for b in data]
        assert all(words.pieces.piece(i) == bytes([b]) for i, b in zip(ids, data, strict=True))
        made = Parser(words, Markup())
        new = [d.text for i in ids for d in made.push([i])]
        assert "".join(new) == made.message.content
        made.finish()
        decoder = kiln.StreamDecoder(words.pieces)
        right = "".join(decoder.push(i) for i in ids) + decoder.finish()
        assert made.message.content == right == data.decode(errors="replace")


def test_thoughts_between_other_markers() -> None:
    """<think>: the newlines around are not the thought's, nor the answer's; and where the prompt opened it."""
    special = {"<think>": 256, "</think>": 257, "<tool_call>": 258, "</tool_call>": 259, "<end>": 260}
    made_of = Markup.of("<think></think><tool_call></tool_call>", special)

    class Bytes:
        bos = None

        def encode(self, text: str, parse_special: bool = False, add_bos: bool = True) -> list[int]:
            return list(text.encode())

        def piece(self, id: int, skip_special: bool = True) -> bytes:
            return bytes([id]) if id < 256 else b"" if skip_special else {v: k for k, v in special.items()}[id].encode()

    words = Vocabulary(Bytes(), special, frozenset({260}))
    tools = [{"type": "function", "function": {"name": "f"}}]

    def message(prompt: str, answer: str) -> dict[str, Any]:
        ids, then = ([i for piece in words.split(text) for i in words.ids(piece)] for text in (prompt, answer))
        made = Parser(words, made_of, ids, tools)
        made.push(then)
        return expected(made.message)

    whole = message("", '<think>\nA\n\nB\n</think>\n\nHi\n<tool_call>\n{"name": "f", "arguments": {"a": 1.0}}\n</tool_call><end>')
    assert (whole["reasoning_content"], whole["content"], whole["tool_calls"]) == (
        "A\n\nB",
        "Hi\n",
        [{"name": "f", "arguments": {"a": 1.0}}],
    )
    assert message("<think>\n", "A\n</think>\n\nHi<end>")["reasoning_content"] == "A"
    empty = message("<think>\n\n</think>\n\n", "Hi</think><end>")
    assert (empty["reasoning_content"], empty["content"]) == (None, "Hi")
    assert message("<think>x<end>\n", "Hi<end>")["content"] == "Hi"  # that turn is over
    lost = message("", "<tool_call>\nsorry</tool_call><end>")
    assert (lost["content"], lost["finish_reason"]) == ("<tool_call>\nsorry</tool_call>", "stop")


def test_long_stop_texts(words: Vocabulary) -> None:
    """A token costs what its text is long, not what a stop text is; what may begin one is held back all the same."""
    reader = Parser(words, Markup(), stop=("a" * 200_000, "xyz"))
    start = time.process_time()
    said = "".join(delta.text for text in ["hot kiln "] * 200 + ["aa", "ab x", "y", "q aaa"] for delta in reader.push_bytes(text.encode()))
    assert said == "hot kiln " * 200 + "aaab xyq " and time.process_time() - start < 2
    assert [delta.text for delta in reader.finish()] == ["aaa"]
