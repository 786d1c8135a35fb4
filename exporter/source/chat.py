"""The chat template of a model -> what it writes around one user turn."""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln.exporter.errors import KilnError, one_line
from kiln.exporter.source.tokenizer import Tokenizer

RENDERER = Path(__file__).with_name("render.py")
WALL_SECONDS = 60
MAX_TEMPLATE = 4 << 20  # bytes
_ELSE = "give another with --chat-template"
_AROUND = " \t\n\u00a0\u3000"  # white space of which a template may take some off


@dataclass(frozen=True)
class Chat:
    """One user turn, thinking off, generation prompt included: `prefix` + text + `suffix`.

    trim: the template takes white space off the ends of the text. date: the day that the template wrote into them, None if it wrote none.
    """

    template: str
    prefix: str
    suffix: str
    trim: bool
    date: str | None

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"prefix": self.prefix, "suffix": self.suffix, "trim": self.trim} | ({"date": self.date} if self.date else {})


def template_text(metadata: Mapping[str, Any], override: Path | None = None) -> str | None:
    """The text of the file `override` when given, else the model file's own chat template, else None. Line ends become "\\n"."""
    if override is not None:
        try:
            with open(override, "rb") as f:
                raw = f.read(MAX_TEMPLATE + 1)
            if len(raw) > MAX_TEMPLATE:
                raise KilnError(f"the chat template {override} is larger than {MAX_TEMPLATE >> 20} MiB; give a Jinja text")
            return raw.decode("utf-8-sig").replace("\r\n", "\n")
        except OSError as e:
            raise KilnError(f"cannot read the chat template {override}: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise KilnError(f"the chat template {override} is not UTF-8 text ({e.reason} at byte {e.start}); give a Jinja text") from e
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise KilnError(f"tokenizer.chat_template is {str(template)[:40]!r}, a text was expected; {_ELSE}")
    return template or None


def read_chat(template: str, tokenizer: Tokenizer | None) -> Chat:
    """Raises KilnError when the template fails, or does not write the user's text as it is and exactly once."""
    ids = {"bos": tokenizer.bos, "unk": tokenizer.unknown} if tokenizer else {}
    if tokenizer:
        ids["eos"] = next((i for i in tokenizer.ends if i in tokenizer.declared), None)
    return render_chat(template, {f"{name}_token": tokenizer.text(i) for name, i in ids.items()} if tokenizer else {"bos_token": ""})


def render_chat(template: str, tokens: Mapping[str, str]) -> Chat:
    """`read_chat` with the special tokens' texts by the names that templates use.

    Some templates of models that see pictures take a message as a list of parts only.
    """
    try:
        return _render(template, tokens, parts=False)
    except KilnError:
        with contextlib.suppress(KilnError):
            return _render(template, tokens, parts=True)
        raise


def _render(template: str, tokens: Mapping[str, str], parts: bool) -> Chat:
    unique = uuid.uuid4().hex
    # Two texts of unlike length and content, the second with all that a template might escape: what is around them must be the same.
    texts = [f"A{unique}Z", f"Ä{unique}.<&>\"'\\ {{{{x}}}} \n\n/{unique}é"]
    job = {"template": template, "texts": [*texts, _AROUND + texts[0] + _AROUND], "tokens": dict(tokens), "parts": parts}
    answer = _run(job)
    if "error" in answer:
        raise KilnError(f"the chat template cannot render a single user turn: {one_line(answer['error'])}; {_ELSE}")
    plain, odd, spaced = answer["rendered"]
    if plain.count(texts[0]) != 1:
        raise KilnError(f"the chat template writes the user's text {plain.count(texts[0])} times, not once; {_ELSE}")
    prefix, suffix = plain.split(texts[0])
    if odd != prefix + texts[1] + suffix:
        raise KilnError(f"the chat template changes the user's text, or what it writes around it depends on the text; {_ELSE}")
    trim = spaced == plain
    if not trim and spaced != prefix + _AROUND + texts[0] + _AROUND + suffix:
        raise KilnError(f"the chat template takes only some of the white space off the user's text, which the runner cannot do; {_ELSE}")
    return Chat(template, prefix, suffix, trim, datetime.date.today().isoformat() if answer["dated"] else None)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-X", "utf8", str(RENDERER)]
    try:
        done = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"it takes more than {WALL_SECONDS} s"}
    if done.returncode < 0:
        return {"error": "it takes too much time or memory"}
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"error": done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or "it ended without a word"}
