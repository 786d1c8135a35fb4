"""The page's files, without a browser: nothing from elsewhere, nothing inline, no way from text to HTML, every part there."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

PAGE = Path(__file__).parents[3] / "exporter/serve/page"
FILES = {path.name: path.read_text() for path in PAGE.iterdir()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
# What makes HTML or code of a text.
SINKS = re.compile(r"(?:inner|outer|set|insertAdjacent)HTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|ContextualFragment")


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


TAGS = Tags(FILES["index.html"]).found


def test_no_text_becomes_html() -> None:
    assert len(SCRIPTS) >= 4
    assert {name: SINKS.findall(text) for name, text in SCRIPTS.items()} == {name: [] for name in SCRIPTS}
    assert SINKS.findall("x.innerHTML = y")


def test_nothing_inline() -> None:
    """What a policy without 'unsafe-inline' would refuse."""
    for tag, given in TAGS:
        assert tag != "style" and "style" not in given and not [name for name in given if name.startswith("on")], (tag, given)
        assert tag != "script" or given.get("src"), "a script in the page"


def test_nothing_from_elsewhere() -> None:
    """Every file that is named is there; no address but the SVG name space, which is fetched by nobody."""
    named = [given[key] for tag, given in TAGS if tag in ("link", "script", "img") for key in ("href", "src") if key in given]
    named += [name.removeprefix("./") for text in SCRIPTS.values() for name in re.findall(r'^import .* from "(.+)";', text, re.MULTILINE)]
    assert len(named) >= 8 and set(named) <= set(FILES), set(named) - set(FILES)
    for name, text in FILES.items():
        assert not re.findall(r"url\(|@import|@font-face", text), name
        assert set(re.findall(r"https?://[\w.]+[\w/]*", text)) <= {"http://www.w3.org/2000/svg"}, name
    assert set(FILES) == {"index.html", "page.css", "icon.svg", *SCRIPTS}


def test_the_policy_of_the_page() -> None:
    policy = next(given["content"] for tag, given in TAGS if given.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().partition(" ")[::2] for rule in str(policy).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'" and "unsafe" not in str(policy)
    assert rules["require-trusted-types-for"] == "'script'"


def test_parts_that_are_asked_for_are_there() -> None:
    ids = [str(given["id"]) for _, given in TAGS if "id" in given]
    assert len(ids) == len(set(ids))
    for name, text in SCRIPTS.items():
        missing = {found for found in re.findall(r'\$\("([\w-]+)"\)', text) if found not in ids}
        icons = set(re.findall(r'icon\("(\w+)"\)', text)) | set(re.findall(r'button\("(\w+)"', text))
        missing |= {found for found in icons if f"i-{found}" not in ids}
        assert not missing, f"{name}: {missing}"
    for tag, given in TAGS:
        if tag == "use":
            assert str(given["href"])[1:] in ids
        for key in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
            assert key not in given or given[key] in ids, given
