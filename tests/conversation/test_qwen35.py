"""A conversation in Qwen3.5's form: its template, thoughts that begin in the prompt, calls in tags, both tokens that end a turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.parser import Parser
from kiln.exporter.conversation.prompt import render_prompt
from kiln.exporter.conversation.request import read_request
from kiln.exporter.conversation.template import Template
from kiln.exporter.conversation.vocabulary import Vocabulary
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.tokenizer import read_tokenizer
from tests.timeline import FIXTURES

TEXTS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
         "</tool_response>")  # fmt: skip
SPECIAL = {text: 256 + i for i, text in enumerate(TEXTS)}
ENDS = frozenset({SPECIAL["<|endoftext|>"], SPECIAL["<|im_end|>"]})
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "ask", "parameters": SCHEMA}}]


class Bytes:
    """A token for each byte, and the special ones."""

    bos = None

    def encode(self, text: str, parse_special: bool = False, add_bos: bool = True) -> list[int]:
        return list(text.encode())

    def piece(self, id: int, skip_special: bool = True) -> bytes:
        return bytes([id]) if id < 256 else b"" if skip_special else TEXTS[id - 256].encode()


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return Vocabulary(Bytes(), SPECIAL, ENDS)


@pytest.fixture(scope="module")
def template(words: Vocabulary):
    found = Template((FIXTURES / "tokenizers" / "qwen35.jinja").read_text(), {"bos_token": "", "eos_token": "<|im_end|>"}, words)
    yield found
    found.close()


def answered(template: Template, words: Vocabulary, messages: list[dict[str, Any]], answer: str, **options: Any) -> tuple[str, dict]:
    """The prompt's text and the message of an answer, pushed id by id."""
    prompt = render_prompt(template, read_request(messages, **options))
    made = Parser(words, Markup.of(template.text, words.special), list(prompt.ids), options.get("tools"))
    for i in (i for piece in words.split(answer) for i in words.ids(piece)):
        made.push([i])
    made.finish()
    return prompt.text, made.message.record() | {"calls": [(c.name, json.loads(c.arguments)) for c in made.message.calls]}


ASKED = [{"role": "user", "content": "Rain?"}]
PARAMETERS = "<parameter=city>\nBasel\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
CALL = f"<tool_call>\n<function=weather>\n{PARAMETERS}</function>\n</tool_call>"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_a_thought_begins_in_the_prompt(end: str, template: Template, words: Vocabulary) -> None:
    prompt, message = answered(template, words, ASKED, f"A cloud.\n</think>\n\nYes.{end}")
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert (message["reasoning_content"], message["content"]) == ("A cloud.", "Yes.")


def test_calls_in_tags(template: Template, words: Vocabulary) -> None:
    """A string stays one, a number is one, by the schema."""
    _, message = answered(template, words, ASKED, f"I ask.\n</think>\n\n{CALL}\n{CALL}<|im_end|>", tools=TOOLS)
    assert message["reasoning_content"] == "I ask."
    assert message["calls"] == [("weather", {"city": "Basel", "days": 3})] * 2


def test_a_round_with_a_tool(template: Template, words: Vocabulary) -> None:
    """What the call's message was comes back as the model wrote it, thought and tags."""
    arguments = json.dumps({"city": "Basel", "days": 3})
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    made = {"role": "assistant", "content": "", "reasoning_content": "I ask.", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "wet"}
    prompt, message = answered(template, words, [*ASKED, made, result], "So.\n</think>\n\nYes.<|im_end|>", tools=TOOLS)
    assert f"<think>\nI ask.\n</think>\n\n{CALL}<|im_end|>\n" in prompt and "<tool_response>\nwet\n</tool_response>" in prompt
    assert (message["reasoning_content"], message["content"]) == ("So.", "Yes.")


def test_ends_of_a_file() -> None:
    """That of a turn, which the file names as its end, and that of a text, which it does not."""
    read = read_tokenizer(open_gguf(FIXTURES / "qwen35-tiny-mtp.gguf").metadata)
    assert read and {read.tokens[i] for i in read.ends} >= {"<|endoftext|>", "<|im_end|>"}
