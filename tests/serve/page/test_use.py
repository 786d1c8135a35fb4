"""The page as it is used: questions, versions, tools, settings, errors; for every eye and hand."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kiln.exporter.conversation.request import read_request
from tests.serve.fake_server import Answer, FakeServer
from tests.serve.page.conftest import SKY, Script, answered, ask, done, last, need_browser, until, words

need_browser()
pytestmark = pytest.mark.browser


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}


def test_a_question_is_answered(opened: Any, server: FakeServer, script: Script) -> None:
    thoughts = [{"reasoning_content": word} for word in ["The user ", *["asks ", "and "] * 8, "asks about ", "light."]]
    script.answers = [Answer([*thoughts, *words(SKY)], first=0.15, gap=0.02, prompt_tokens=1262, cached=1210)]
    page = opened()
    page.click("#think")
    ask(page, "Why is the sky blue?", wait=False)
    page.wait_for_selector(".thought.running")
    assert page.locator(".thought").get_attribute("open") is None and not page.locator("#stop").is_hidden()
    done(page)
    request = server.requests[0]
    assert request == {
        "model": "fake-model", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True,
        "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip
    answer = last(page)
    assert answer.locator(".prose strong").inner_text() == "Blue" and answer.locator("pre code").inner_text() == "print('blue')"
    assert answer.locator(".prose").last.locator("p").all_inner_texts() == ["Blue light is scattered more.", "So the sky is blue."]
    answer.locator("summary").click()
    until(page, "document.querySelector('.thought p')")
    assert answer.locator(".thought p").inner_text() == "".join(t["reasoning_content"] for t in thoughts)
    told = answer.locator(".info").inner_text()
    count = len(script.answers[0].parts)
    tokens, speed, first = re.fullmatch(r"(\d+) tokens · ([\d.]+) tok/s · first after ([\d.]+) s", told).groups()
    assert int(tokens) == count and 35 < float(speed) < 60 and 0.1 <= float(first) < 0.5, told  # 50 a second, on a busy machine
    assert "1,262 tokens; 1,210 of them" in answer.locator(".info").get_attribute("title")
    assert page.locator("#context-text").inner_text() == f"{1262 + count:,} of 4,096 tokens"
    assert page.title() == "Why is the sky blue? · Kiln"
    assert page.locator("#announce").inner_text().startswith("Answered: **Blue**")


def test_text_is_shown_while_it_comes(opened: Any, script: Script) -> None:
    script.answers = [Answer(["one ", "two ", "three ", "four"], gap=0.4)]
    page = opened()
    ask(page, "Count", wait=False)
    until(page, "document.querySelector('article.answer > .prose')?.textContent.trim() === 'one two'")
    assert page.locator("article.answer").get_attribute("aria-busy") == "true"
    done(page)
    assert answered(page) == "one two three four"


def test_stop(opened: Any, server: FakeServer, script: Script) -> None:
    """The server sees it; what came is kept and is part of what comes next."""
    script.answers = [Answer(["word "] * 500, gap=0.02), Answer(["Next."])]
    page = opened()
    ask(page, "Go on for ever", wait=False)
    until(page, "document.querySelector('article.answer').textContent.includes('word word')")
    page.keyboard.press("Escape")
    done(page)
    page.wait_for_timeout(100)
    assert server.cancelled == 1 and last(page).locator(".note").inner_text() == "Stopped."
    ask(page, "And now?")
    roles = [m["role"] for m in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and server.requests[1]["messages"][1]["content"].startswith("word word")


def test_edit_and_regenerate_make_versions(opened: Any, server: FakeServer, script: Script) -> None:
    script.answers = [Answer(["First."]), Answer(["Second."]), Answer(["Edited."])]
    page = opened()
    ask(page, "Question one")
    last(page).get_by_label("Another answer").click()
    done(page)
    assert answered(page) == "Second." and last(page).locator(".versions").inner_text() == "2/2"
    last(page).get_by_label("The version before").click()
    assert answered(page) == "First." and last(page).locator(".versions").inner_text() == "1/2"
    page.locator("article.user").get_by_label("Edit this message and ask again").click()
    page.get_by_label("Your message").first.fill("Question two")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.bubble')?.textContent === 'Question two'")
    done(page)
    assert server.requests[2]["messages"] == [{"role": "user", "content": "Question two"}]
    page.reload()
    page.locator(".enter").first.click()
    assert answered(page) == "Edited."
    page.locator("article.user").get_by_label("The version before").click()
    assert page.locator(".bubble").inner_text() == "Question one" and answered(page) == "Second."


def test_calls_are_shown_and_their_results_sent(opened: Any, server: FakeServer, script: Script) -> None:
    def part(index: int, **more: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, **more}]}

    calls = [
        part(0, id="call_a", type="function", function={"name": "weather", "arguments": ""}),
        part(0, function={"arguments": '{"city": '}),
        part(0, function={"arguments": '"Lisbon"}'}),
        part(1, id="call_b", type="function", function={"name": "weather", "arguments": "{}"}),
    ]
    script.answers = [Answer([{"reasoning_content": "A tool."}, *calls], finish="tool_calls"), Answer(["Sunny."])]
    page = opened()
    page.click("#open-settings")
    page.fill("[name=tools]", '{"not": "a list"}')
    page.locator("#settings .primary").click()
    assert "was expected" in page.locator("#tools-error").inner_text() and page.locator("#settings").is_visible()
    page.fill("[name=tools]", json.dumps([WEATHER]))
    page.locator("#settings .primary").click()
    ask(page, "Weather?")
    assert last(page).locator(".call strong").all_inner_texts() == ["weather", "weather"]
    assert json.loads(last(page).locator(".call pre").first.inner_text()) == {"city": "Lisbon"}
    for i, text in enumerate(("sun", "rain")):
        last(page).locator(".call textarea").nth(i).fill(text)
    last(page).get_by_role("button", name="Send the results").click()
    until(page, "document.querySelectorAll('article.answer').length === 2")
    done(page)
    assert server.requests[0]["tools"] == [WEATHER]
    sent = server.requests[1]["messages"]
    read_request(sent, [WEATHER])  # as Kiln checks it
    assert sent[1]["reasoning_content"] == "A tool." and [c["id"] for c in sent[1]["tool_calls"]] == ["call_a", "call_b"]
    assert sent[2:] == [{"role": "tool", "tool_call_id": i, "content": c} for i, c in (("call_a", "sun"), ("call_b", "rain"))]
    assert answered(page) == "Sunny." and page.locator("article.tool").count() == 2
    assert not page.locator(".call textarea").count()


def test_settings_are_sent(opened: Any, server: FakeServer) -> None:
    page = opened()
    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0")
    page.fill("[name=top_k]", "40")
    page.fill("[name=max_tokens]", "100")
    page.fill("[name=stop]", "END\n###")
    page.keyboard.press("Escape")
    ask(page, "Hello")
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["temperature"], request["top_k"], request["max_tokens"], request["stop"]) == (0, 40, 100, ["END", "###"])
    assert not {"top_p", "min_p", "seed", "tools"} & set(request)
    page.click("#new")
    ask(page, "Another")  # how to sample stays, what to talk about does not
    assert server.requests[1]["messages"][0]["role"] == "user" and server.requests[1]["top_k"] == 40


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(status=429, error="The queue is full", headers={"Retry-After": "3"}), "The queue is full It may be asked again in 3 s."),
        (Answer(status=400, error="the prompt has 5,000 tokens, of 4,096"), "the prompt has 5,000 tokens, of 4,096"),
        (Answer(["half of "], late_error="the server is going down"), "the server is going down"),
        (Answer(["half of "], cut=True), "The connection broke before the answer was complete"),
        (Answer(raw=b"data: {not json\n\n"), "The server sent what is no JSON: {not json"),
        (Answer(raw=b": nothing but a comment\n\n", parts=()), "The connection ended"),
    ],
    ids=["full", "long", "late", "cut", "no-json", "empty"],
)
def test_errors_are_shown(opened: Any, script: Script, answer: Answer, told: str) -> None:
    script.answers = [answer, Answer(["Well."])]
    if answer.raw is not None and answer.raw.startswith(b":"):
        script.answers[0].cut = True
        told = "The connection broke"
    page = opened()
    ask(page, "Hello")
    assert last(page).get_by_role("alert").locator("span").inner_text().startswith(told)
    if answer.parts:
        assert answered(page) == "half of"
    last(page).get_by_role("button", name="Try again").click()
    until(page, "[...document.querySelectorAll('article.answer p')].some((p) => p.textContent === 'Well.')")
    assert last(page).locator(".versions").count() == bool(answer.parts)  # an answer of nothing but an error is no version


def test_no_server(opened: Any, server: FakeServer) -> None:
    page = opened()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello")
    assert "cannot be reached" in last(page).get_by_role("alert").inner_text()


def test_a_key_is_asked_for_and_sent(opened: Any, server: FakeServer) -> None:
    page = opened()
    server.key = "secret"
    ask(page, "Hello")
    assert "a key is needed" in last(page).get_by_role("alert").inner_text()
    page.click("#open-settings")
    page.fill("[name=key]", "secret")
    page.locator("#settings .primary").click()
    last(page).get_by_role("button", name="Try again").click()
    until(page, "document.querySelector('article.answer strong')")
    assert "secret" not in page.evaluate("JSON.stringify({...localStorage})")


def test_a_full_storage_is_told(opened: Any) -> None:
    page = opened()
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }")
    ask(page, "Hello")
    assert last(page).locator("strong").inner_text() == "Blue"
    assert "storage is full" in page.locator("#toasts").inner_text()


# ---- for everybody ----


def test_light_and_dark(opened: Any) -> None:
    page = opened(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150 and sum(map(int, re.findall(r"\d+", light)[:3])) > 650
    page.reload()
    assert page.evaluate(ground) == light and "light" in page.locator("#theme").get_attribute("aria-label")
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate(ground) == dark and "system" in page.locator("#theme").get_attribute("aria-label")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow(opened: Any, script: Script, width: int) -> None:
    script.answers = [Answer([SKY, "\n\n|" + "column|" * 12 + "\n|" + "---|" * 12 + "\n\n" + "long" * 200])]
    page = opened(viewport={"width": width, "height": 700}, has_touch=True)
    ask(page, "Hello " + "there" * 100)
    for wide in ("document.documentElement", "document.getElementById('log')"):
        assert page.evaluate(f"{wide}.scrollWidth") <= width
    if width < 760:
        assert page.locator("#side").evaluate("s => s.inert") and not page.locator("#side").is_visible()
        page.click("#open-side")
        assert page.locator("#side").is_visible() and page.locator("main").evaluate("m => m.inert")
        page.locator(".enter").first.click()
        assert not page.locator("main").evaluate("m => m.inert")
        page.wait_for_selector("#side", state="hidden")


def test_names_and_keys(opened: Any, script: Script) -> None:
    """What can be used has a name, and all of it can be reached and used by keys."""
    script.answers = [Answer([{"reasoning_content": "t"}, SKY])]
    page = opened()
    ask(page, "Hello")
    unnamed = page.evaluate("""[...document.querySelectorAll('button, input, textarea, select, summary, meter, [role=region]')]
      .filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length || e.hidden)).map((e) => e.outerHTML)""")
    assert unnamed == []
    page.locator("body").evaluate("() => { document.activeElement.blur(); }")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("((e) => e.id || e.getAttribute('aria-label') || e.tagName)(document.activeElement)"))
    wanted = ["new", "search", "Rename Hello", "Delete Hello", "export", "theme", "open-settings", "log", "SUMMARY", "Copy this answer"]
    wanted += ["Another answer", "Edit this message and ask again", "Code, python", "question", "think", "send"]
    assert set(wanted) <= set(seen), set(wanted) - set(seen)
    page.focus("#question")
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    assert page.input_value("#question") == "two\nlines"
    enter = "(composing) => question.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: composing, bubbles: true}))"
    page.evaluate(enter, True)
    assert page.locator("article.user").count() == 1  # an input method's Enter is not ours
    page.evaluate(enter, False)
    assert page.locator("article.user").count() == 2


def test_contrast(opened: Any) -> None:
    """WCAG AA, 4.5 to 1, for the text colours on their grounds, light and dark."""

    def luminance(colour: str) -> float:
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [["text", "ground"], ["text", "bubble"], ["accent", "ground"], ["accent-text", "accent"], ["error", "error-ground"]]
    pairs += [["soft", ground] for ground in ("ground", "side", "raised", "sunken")]
    pairs += [[colour, "sunken"] for colour in ("text", "comment", "string", "number", "word")]
    code = """(pairs) => pairs.map((pair) => pair.map((name) => { const e = document.createElement('i'); e.style.color = `var(--${name})`;
      document.body.append(e); const found = getComputedStyle(e).color; e.remove(); return found; }))"""
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        for pair, colours in zip(pairs, page.evaluate(code, pairs), strict=True):
            light, dark = sorted(map(luminance, colours), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, pair, colours)


def test_reading_back_is_not_interrupted(opened: Any, script: Script) -> None:
    script.answers = [Answer(["line\n\n"] * 150, gap=0.01)]
    page = opened()
    ask(page, "Go", wait=False)
    until(page, "document.getElementById('log').scrollTop > 300")
    page.evaluate("document.getElementById('log').scrollTop = 0")
    page.wait_for_selector("#latest:not([hidden])")
    done(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == 0
    page.click("#latest")
    assert page.evaluate("(l => l.scrollHeight - l.scrollTop - l.clientHeight)(document.getElementById('log'))") < 2


def test_copy(opened: Any) -> None:
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Why?")
    page.get_by_label("Copy this code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('blue')"
    last(page).get_by_label("Copy this answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == SKY
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as over plain http in a home network
    page.get_by_label("Copy this code").click()
    assert page.locator(".code-head span").last.inner_text() == "Copied"
