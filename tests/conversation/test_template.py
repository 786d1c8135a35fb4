"""A request's text is never a control token, whatever the template does with it; what a template does is found out, not assumed."""

from __future__ import annotations

import copy
import json
import os
import signal
from typing import Any

import pytest

from kiln.exporter.conversation.markup import Markup, without_thoughts
from kiln.exporter.conversation.prompt import Prompt, render_prompt
from kiln.exporter.conversation.request import RequestError, read_request
from kiln.exporter.conversation.template import Template
from kiln.exporter.conversation.vocabulary import Vocabulary
from kiln.exporter.source.renderer import Renderer, TemplateError
from tests.conversation.conftest import TOKENS

CALL = {
    "id": "c",
    "type": "function",
    "function": {"name": "look", "arguments": '{"key": "value", "list": ["value"], "inner": {"key": "value"}}'},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "value",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "value", "enum": ["value"]}, "list": {"type": "array"}},
            "required": ["key"],
        },
    },
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "value"},
    {"role": "user", "content": [{"type": "text", "text": "value"}, {"type": "text", "text": "value"}]},
    {"role": "assistant", "content": "see value"},
    {"role": "user", "content": "value"},
    {"role": "assistant", "content": "see value", "reasoning_content": "value", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "value"},
]
IDENTITY = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def replaced(value: Any, text: str) -> Any:
    """With `text` in the place of every "value", in JSON within JSON too."""
    if isinstance(value, dict):
        return {key: replaced(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, text) for item in value]
    if isinstance(value, str) and value.startswith("{"):
        return json.dumps(replaced(json.loads(value), text))
    return value.replace("value", text) if value in ("value", "see value") else value


def prompt(template: Template, text: str, **variables: Any) -> Prompt:
    thoughts = Markup.of(template.text, template.vocabulary.special).thoughts
    return render_prompt(template, read_request(replaced(MESSAGES, text), [replaced(copy.deepcopy(TOOL), text)], variables), thoughts)


def control(words: Vocabulary, ids: tuple[int, ...]) -> list[int]:
    return [i for i in ids if i in set(words.special.values())]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("i", [0, 1])
def test_hostile_text_everywhere(i: int, thinking: bool, templates: list[Template], words: Vocabulary) -> None:
    """Every special token's text, whole and in halves that a template may join, in every text of a request."""
    template = templates[i]
    harmless = prompt(template, "word", enable_thinking=thinking)
    assert len(control(words, harmless.ids)) > 30
    hostile = list(words.special) + [
        "".join(words.special),
        "<|chan<channel|>nel>",
        "\ue000<eos>\uf8ff",
        "<|turn",
        "turn>",
        "<",
        "<|",
        '|">',
    ]
    for text in hostile:
        made = prompt(template, text, enable_thinking=thinking)
        assert control(words, made.ids) == control(words, harmless.ids), text
        kept = "" if text in ("<|channel>",) else text  # in an assistant's text it begins a thought, which is taken out
        assert made.text.count(text) >= harmless.text.count("word") - 2 if kept else True
        assert words.pieces.decode(list(made.ids), skip_special=False) == made.text


@pytest.mark.parametrize("half", ["eos>", "<eos>", ">", "|turn>user", "turn|>"])
def test_a_token_begun_by_the_template(half: str, words: Vocabulary) -> None:
    """Text of the request that would finish a token which the template's own text begins, and the other way round."""
    template = Template("{{ bos_token }}A<{{ messages[0].content }}B", TOKENS, words)
    other = Template("{{ bos_token }}A{{ messages[0].content }}os>B", TOKENS, words)
    try:
        for made, text in ((template, half), (other, "<e")):
            ids = render_prompt(made, read_request([{"role": "user", "content": text}])).ids
            assert control(words, ids) == [2]
        assert words.split("A<eos>B") == ["A", 1, "B"]  # what the template writes itself is one
    finally:
        template.close(), other.close()


def test_marks_that_a_template_escapes(words: Vocabulary) -> None:
    template = Template("{{ bos_token }}{{ messages[0].content | tojson(ensure_ascii=true) }}{{ messages[0].content }}", TOKENS, words)
    try:
        assert render_prompt(template, read_request([{"role": "user", "content": "plain"}])).text == '<bos>"plain"plain'
        with pytest.raises(RequestError, match="as escapes"):
            render_prompt(template, read_request([{"role": "user", "content": "a < b"}]))
    finally:
        template.close()


def test_what_templates_do(templates: list[Template], words: Vocabulary) -> None:
    for template in templates:
        m = template.manner
        assert (m.takes_text, m.takes_parts, m.closing, m.opening) == (True, True, "<turn|>\n", "<|turn>model\n")
        assert m.trims_assistant and m.switch == "enable_thinking"
    parts = Template("{{ bos_token }}{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", TOKENS, words)
    text = Template(IDENTITY, TOKENS, words)
    lists = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    try:
        assert (parts.manner.takes_text, parts.manner.takes_parts) == (False, True)
        assert (text.manner.takes_text, text.manner.takes_parts, text.manner.switch) == (True, False, None)
        assert render_prompt(parts, read_request([{"role": "user", "content": "ab"}])).text == "<bos>ab"
        assert render_prompt(parts, read_request(lists)).text == "<bos>ab"
        assert render_prompt(text, read_request(lists)).text == "<bos>a\nb"
    finally:
        parts.close(), text.close()


@pytest.mark.parametrize(
    ("template", "messages", "tools", "match"),
    [
        ("{{ bos_token }}{{ messages[-1].content }}", [("system", "be brief"), ("user", "hi")], None,
         r"messages\[0\].content.*role system"),
        (IDENTITY, [("user", "hi")], [TOOL], r"tools\[0\]: the chat template of this model does not write tools"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + IDENTITY, [("system", "a"), ("user", "b")],
         None, "refuses them: no system"),
        ("{{ messages[0].content }}{% if messages|length > 1 %}{{ 1 / 0 }}{% endif %}", [("user", "a"), ("user", "b")], None, "division"),
    ],
)  # fmt: skip
def test_what_a_template_loses_is_refused(template: str, messages: list, tools: Any, match: str, words: Vocabulary) -> None:
    made = Template(template, TOKENS, words)
    try:
        with pytest.raises(RequestError, match=match):
            render_prompt(made, read_request([{"role": role, "content": text} for role, text in messages], tools))
    finally:
        made.close()


def test_one_bos(words: Vocabulary) -> None:
    """Written by the template or not; cut positions count it."""
    plain = Template("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}", TOKENS, words)
    try:
        made = render_prompt(plain, read_request([{"role": "user", "content": "hi"}]))
        assert made.ids == (2, *words.ids("user:hi\n")) and made.text == "user:hi\n"
        assert max(made.cuts) == len(made.ids) and min(made.cuts) > 1
    finally:
        plain.close()


def test_thoughts_in_histories() -> None:
    gemma, think = (
        Markup.of("<|channel><channel|>", {"<|channel>": 1, "<channel|>": 2}).thoughts,
        Markup.of("<think></think>", {"<think>": 1, "</think>": 2}),
    )
    assert without_thoughts(gemma, "a<|channel>thought\nb<channel|>c") == ("", "ac")
    assert without_thoughts(gemma, "a<|channel>b") == ("", "a") and without_thoughts(None, "<think>") == ("", "<think>")
    assert without_thoughts(think.thoughts, "<think>\nb\n</think>\n\nc") == ("b", "c")
    assert without_thoughts(think.thoughts, "<think>b") == ("", "<think>b")
    assert Markup.of("<think>", {"<think>": 1, "</think>": 2}) == Markup() and Markup.of("<think></think>", {}) == Markup()


def test_calls_by_the_template() -> None:
    special = {"<tool_call>": 1, "</tool_call>": 2}
    syntax = [
        calls.syntax
        for text in ("<tool_call></tool_call>", "<tool_call><function=x></tool_call>")
        if (calls := Markup.of(text, special).calls)
    ]
    assert syntax == ["json", "tags"]


def test_a_renderer_goes_on_after_what_killed_it() -> None:
    with Renderer(
        "{{ bos_token }}{% if loop %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}x"
    ) as r:
        assert r.render([{"bos_token": "a"}]) == (["ax"], False)
        process = r._process
        assert process
        os.kill(process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches it too
        assert r.render([{"bos_token": "b"}, {"bos_token": "c"}]) == (["bx", "cx"], False) and r._process is process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert r.render([{"bos_token": "d"}])[0] == ["dx"]


@pytest.mark.nightly
def test_cpu_time_is_of_one_job() -> None:
    """More jobs than one may take in all, each below the limit; then one above it."""
    work = "{% for i in range(n) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    with Renderer(work, seconds=2) as r:
        for _ in range(6):
            r.render([{"n": 10_000}])
        with pytest.raises(TemplateError, match="too much time"):
            r.render([{"n": 90_000}] * 4)
