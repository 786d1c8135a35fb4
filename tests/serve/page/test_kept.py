"""What the page keeps: in the browser, over a reload, in files, between tabs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kiln.exporter.conversation.chat import read_conversation
from kiln.exporter.conversation.request import read_request
from tests.serve.fake_server import Answer, FakeServer
from tests.serve.page.conftest import Script, answered, ask, done, last, need_browser, until

need_browser()
pytestmark = pytest.mark.browser


def test_conversations_are_kept(opened: Any, server: FakeServer) -> None:
    page = opened()
    ask(page, "The first one")
    page.click("#new")
    ask(page, "The second one")
    page.reload()
    names = page.locator(".enter")
    assert names.all_inner_texts() == ["The second one", "The first one"] and page.locator("article").count() == 0
    page.fill("#search", "first")
    assert names.all_inner_texts() == ["The first one"]
    names.first.click()
    assert page.locator(".bubble").inner_text() == "The first one" and last(page).locator("strong").inner_text() == "Blue"
    page.fill("#search", "")
    page.get_by_label("Rename The first one").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    assert page.locator("#title").inner_text() == "Renamed" and "Renamed" in names.all_inner_texts()
    page.get_by_label("Delete Renamed").click()
    assert names.all_inner_texts() == ["The second one"] and page.locator("#title").inner_text() == "New conversation"
    page.get_by_role("button", name="Undo").click()
    assert sorted(names.all_inner_texts()) == ["Renamed", "The second one"] and page.locator("#title").inner_text() == "Renamed"


def test_a_reload_in_the_middle_loses_nothing(opened: Any, script: Script) -> None:
    script.answers = [Answer(["word "] * 500, gap=0.02)]
    page = opened()
    ask(page, "Go", wait=False)
    until(page, "document.querySelector('article.answer').textContent.includes('word word')")
    page.reload()
    page.locator(".enter").first.click()
    assert answered(page).startswith("word word") and last(page).locator(".note").inner_text() == "Stopped."


def test_an_answer_goes_on_while_another_conversation_is_open(opened: Any, script: Script) -> None:
    script.answers = [Answer(["word "] * 40, gap=0.02), Answer(["Short."])]
    page = opened()
    ask(page, "Long", wait=False)
    page.click("#new")
    ask(page, "Short")
    assert page.locator(".busy").count() == 1 and answered(page) == "Short."
    page.wait_for_selector(".busy", state="detached")
    page.locator(".enter", has_text="Long").click()
    assert answered(page).split() == ["word"] * 40


def test_export_and_import(opened: Any, tmp_path: Path, script: Script) -> None:
    page = opened()
    ask(page, "Why?")
    last(page).get_by_label("Another answer").click()
    done(page)
    with page.expect_download() as saved:
        page.click("#export")
    file = tmp_path / "all.json"
    saved.value.save_as(file)
    other = opened()
    other.set_input_files("#file", file)
    other.wait_for_selector("article.answer")
    assert other.locator(".bubble").inner_text() == "Why?" and last(other).locator(".versions").inner_text() == "2/2"
    other.set_input_files("#file", file)  # again: beside it, not over it
    until(other, "document.querySelectorAll('.enter').length === 2")
    # and to kiln chat and back
    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.locator("#settings .primary").click()
    page.click("#open-settings")
    with page.expect_download() as saved:
        page.click("#export-one")
    page.keyboard.press("Escape")
    saved.value.save_as(tmp_path / "one.json")
    record = read_conversation(tmp_path / "one.json")
    assert record["system"] == "Be brief." and [m["role"] for m in read_request(record["messages"]).messages] == ["user", "assistant"]
    other.set_input_files("#file", tmp_path / "one.json")
    until(other, "document.querySelectorAll('.enter').length === 3")
    assert last(other).locator("strong").inner_text() == "Blue"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not valid JSON"),
        ("{}", "holds no conversations"),
        ('{"kiln_page": 9}', "has format 9"),
        ('{"kiln_page": 1, "conversations": [{"nodes": [{"id": "a", "parent": "b", "role": "user"}]}]}', "conversation 0: message 0"),
        ('[{"role": "robot", "content": ""}]', "message 0: a message with the role"),
    ],
)
def test_a_bad_import_changes_nothing(opened: Any, tmp_path: Path, content: str, told: str) -> None:
    page = opened()
    (tmp_path / "x.json").write_text(content)
    page.set_input_files("#file", tmp_path / "x.json")
    page.wait_for_selector(".toast")
    assert told in page.locator("#toasts").inner_text() and not page.locator(".enter").count()


def test_two_tabs(opened: Any, script: Script) -> None:
    first = opened()
    ask(first, "Hello")
    second = opened(first.context)
    second.locator(".enter").click()
    ask(second, "Once more")
    until(first, "document.querySelectorAll('article.user').length === 2")
