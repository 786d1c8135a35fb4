"""Messages -> prompt -> ids -> what the next turn can reuse: every case of the fixtures, and texts that hold every special token."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.prompt import Prompt, common, render_prompt
from kiln.exporter.conversation.request import RequestError, read_request
from kiln.exporter.conversation.template import Template
from tests.timeline import FIXTURES

CASES = json.loads((FIXTURES / "chat_cases.json").read_text())["cases"]
RUNS = [pytest.param(case, i, id=f"{case['name']}-{i}") for case in CASES for i in case["template"]]
NEXT = [run for run in RUNS if run.values[0].get("next")]


def prompt(template: Template, case: dict[str, Any], **changed: Any) -> Prompt:
    case = case | changed
    request = read_request(
        case["messages"], case["tools"], case["kwargs"], case.get("add_generation_prompt", True), case.get("continue_final_message", False)
    )
    return render_prompt(template, request, Markup.of(template.text, template.vocabulary.special).thoughts)


@pytest.mark.parametrize(("case", "i"), RUNS)
def test_prompt(case: dict[str, Any], i: int, templates: list[Template]) -> None:
    if error := case.get("error"):
        with pytest.raises(RequestError) as raised:
            prompt(templates[i], case)
        assert raised.value.part == error["param"]
        return
    made = prompt(templates[i], case)
    fix = case.get("expected_suffix_fix", "")
    assert made.text == case["prompt"] + fix
    assert list(made.ids) == case["token_ids"] + ([105, 4368, 107] if fix else [])


def answer_ids(template: Template, text: str) -> list[int]:
    return [i for piece in template.vocabulary.split(text) for i in template.vocabulary.ids(piece)]


@pytest.mark.parametrize(("case", "i"), NEXT)
def test_what_the_next_turn_shares(case: dict[str, Any], i: int, templates: list[Template]) -> None:
    """The common ids are as many as the fixture says, and where they end within the prompt, the prompt said so before."""
    then = case["next"]
    made = prompt(templates[i], case)
    answer = answer_ids(templates[i], then["answer"])
    before = case["messages"][:-1] if case.get("continue_final_message") else case["messages"]  # its text is in what is appended
    later = {"messages": before + then["appended"], "continue_final_message": False}
    following = prompt(templates[i], case, **later, tools=then.get("tools", case["tools"]), kwargs=then.get("kwargs", case["kwargs"]))
    assert following.text == then["prompt"]
    assert (len(made.ids), len(answer), len(following.ids)) == (then["prompt_tokens"], then["answer_tokens"], then["next_tokens"])
    reusable = common([*made.ids, *answer], following.ids)
    assert reusable == then["reusable_tokens"]
    assert reusable in made.cuts or reusable > len(made.ids), f"{reusable} is none of {made.cuts}"
    assert (then["relation"] == "cut") == (reusable < len(made.ids))
