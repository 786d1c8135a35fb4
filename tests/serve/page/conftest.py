"""The page in headless Chromium, against a server that answers by a script (make test-page)."""

from __future__ import annotations

import importlib.util
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.fake_server import Answer, FakeServer

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PAGE = Path(__file__).parents[3] / "exporter/serve/page"
SKY = "**Blue** light is scattered more.\n\n```python\nprint('blue')\n```\n\nSo the sky is *blue*."


def need_browser() -> None:
    """Of a whole module: one line says that it is skipped, and what to install."""
    if not CHROMIUM:
        pytest.skip("the page is not tested: no Chromium is installed (apt-get install chromium; make test-page)", allow_module_level=True)
    if not importlib.util.find_spec("playwright"):
        pytest.skip("the page is not tested: no Playwright is installed (make test-page)", allow_module_level=True)


def words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Script:
    """The answers that are given, in their order; the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [Answer(words(SKY))]

    def __call__(self, request: dict[str, Any]) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def server(script: Script) -> Iterator[FakeServer]:
    with FakeServer(script, PAGE) as found:
        yield found


@pytest.fixture
def opened(browser: Any, server: FakeServer) -> Iterator[Callable[..., Any]]:
    """`opened(**options of a context)` -> the page. Whatever a test does, the console stays empty and nothing is asked of anybody else."""
    complaints: list[str] = []
    contexts = []

    def open_page(context: Any = None, **options: Any) -> Any:
        context = context or browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        # The browser itself notes each status above 399 and each broken connection.
        page.on("console", lambda message: "status of" in message.text or "ERR_" in message.text or complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith((server.url, "blob:")) or complaints.append(f"asked for {request.url}"))
        page.goto(server.url)
        until(page, "document.getElementById('model').textContent === 'fake-model'")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def until(page: Any, expression: str, seconds: float = 10) -> None:
    """Playwright's own wait runs text as code within the page, which its policy refuses."""
    end = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def ask(page: Any, text: str, wait: bool = True) -> None:
    before = page.locator("article.user").count()
    page.fill("#question", text)
    page.click("#send")
    until(page, f"document.querySelectorAll('article.user').length > {before}")
    if wait:
        done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#send:not([hidden])", state="attached")


def last(page: Any) -> Any:
    return page.locator("article.answer").last


def answered(page: Any) -> str:
    """The first paragraph of the last answer."""
    return last(page).locator("> .prose p").first.inner_text()


def from_script(page: Any, name: str, code: str, *arguments: Any) -> Any:
    """What `code` gives: a function of the module `name` and the arguments."""
    page.evaluate(f"import('./{name}').then((found) => {{ window.found = found; }})")
    return page.evaluate(f"(given) => ({code})(window.found, ...given)", list(arguments))
