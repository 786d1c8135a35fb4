"""Chat templates: what they write around a user's text, and strangers' programs that fail, lie, or never end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kiln.exporter.errors import KilnError
from kiln.exporter.source import renderer as module
from kiln.exporter.source.chat import read_chat, render_chat, template_text
from kiln.exporter.source.tokenizer import read_tokenizer
from tests.exporter.source.test_tokenizer import small

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
CONTENT = "messages[0].content"


@pytest.mark.parametrize(
    ("template", "prefix", "suffix", "trim"),
    [
        ("{{ bos_token }}<u>{{ messages[0].content | trim }}</u>\n{{ eos_token }}", "<bos><u>", "</u>\n<eos>", True),
        ("<u>{{ messages[0]['content'] }}</u>", "<u>", "</u>", False),
        ("<u>{{ messages[0].content.strip() }}</u>\r\nA", "<u>", "</u>\nA", True),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% endfor %}!", "", "!", False),
        ("a{% generation %}b{{ messages[0].content }}{% set c = 1 %}{% endgeneration %}{{ c }}d", "ab", "d", False),
        ("{% if tools %}T{% endif %}{% if documents %}D{% endif %}{{ enable_thinking }}{{ messages[0].content }}", "False", "", False),
        ("{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}{% endfor %}!", "", "!", True),
        ("{{ messages[0].content }}{{ {'a': 'é'} | tojson }}", "", '{"a": "é"}', False),
    ],
)
def test_what_is_written_around_the_text(template: str, prefix: str, suffix: str, trim: bool) -> None:
    chat = render_chat(template, TOKENS)
    assert (chat.prefix, chat.suffix, chat.trim, chat.date) == (prefix, suffix, trim, None)
    assert chat.record() == {"prefix": prefix, "suffix": suffix, "trim": trim, "tokens": TOKENS}


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ 1 / 0 }}", "cannot render a single user turn: division by zero"),
        ("{{ 1 % 0 }}", "cannot render"),
        ("{% if %}", "cannot render a single user turn: Expected an expression"),
        ("{{ messages[1].content }}", "no element 1"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "cannot render"),
        ("{% include '/etc/passwd' %}", "cannot render"),
        (f"{{{{ {CONTENT} }}}}{{{{ {CONTENT} }}}}", "writes the user's text 2 times, not once"),
        ("", "writes the user's text 0 times"),
        (f"{{{{ {CONTENT} | upper }}}}", "writes the user's text 0 times"),
        (f"{{{{ {CONTENT} | e }}}}", "changes the user's text"),
        (f"{{{{ {CONTENT} | replace('\\n', ' ') }}}}", "changes the user's text"),
        (f"{{{{ {CONTENT}[:40] }}}}", "changes the user's text"),
        (f"{{{{ {CONTENT} }}}}{{{{ {CONTENT} | length }}}}", "depends on the text"),
        (f"{{{{ {CONTENT} }}}}{{{{ range(100000) | random }}}}", "depends on the text"),
        (f"{{{{ {CONTENT}.lstrip() }}}}", "takes only some of the white space"),
        (f"{{{{ {CONTENT}.strip(' ') }}}}", "takes only some of the white space"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 1048576 characters"),
        ("{{ range(10 ** 9) | list }}", "cannot render"),
        ("{{ messages[0].content.format_map }}{{ '{0.__class__}'.format(1) }}", "cannot render|0 times"),
    ],
)
def test_templates_that_are_refused(template: str, match: str) -> None:
    with pytest.raises(KilnError, match=match) as error:
        render_chat(template, TOKENS)
    assert "\n" not in str(error.value) and "--chat-template" in str(error.value) and len(str(error.value)) < 600


def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(module, "WALL_SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(KilnError, match="takes more than 2 s|too much time"):
        render_chat(loop, TOKENS)
    assert time.monotonic() - start < 30


def test_a_date_is_told(tmp_path: Path) -> None:
    chat = render_chat("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}", TOKENS)
    assert chat.date and chat.date[:4] in chat.prefix and chat.record()["date"] == chat.date


def test_tokens_of_the_tokenizer() -> None:
    chat = read_chat("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}|{{ unk_token }}|{{ pad_token }}", read_tokenizer(small()))
    assert (chat.prefix, chat.suffix) == ("<bos>", "<eos>|<unk>|")
    assert read_chat("{{ bos_token }}{{ messages[0].content }}", None).prefix == ""


def test_files_of_templates(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xef\xbb\xbfA\r\n{{ messages[0].content }}\r\n")
    assert template_text({}, path) == "A\n{{ messages[0].content }}\n"
    for data, match in ((b"\xff\xfe{\0", "not UTF-8 text"), (b" " * ((4 << 20) + 1), "larger than 4 MiB")):
        path.write_bytes(data)
        with pytest.raises(KilnError, match=match):
            template_text({}, path)
    for bad in (tmp_path, tmp_path / "none", Path("/proc/self/mem")):
        with pytest.raises(KilnError, match="cannot read the chat template"):
            template_text({}, bad)
    with pytest.raises(KilnError, match="a text was expected"):
        template_text({"tokenizer.chat_template": ["a"]})
    assert template_text({"tokenizer.chat_template": ""}) is None
