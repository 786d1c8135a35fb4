"""Renders chat templates in a process of its own: a template is a program of a stranger, which may run for ever or fill the memory.

Run as a file (`python render.py`), so that nothing of this package is imported. A job is a line of JSON on stdin, its answer one on stdout:
{template, messages: [...], turns: [the variables of one rendering, its messages by their numbers, ...], longest: characters of one
rendering, seconds: of CPU time for the job}
-> {turns: [{text, same: characters of the turn before, to go before it} or {error: one line}, ...], dated: the template asked for the date}
or {error: one line}.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from datetime import datetime
from typing import Any

MEMORY = 2 << 30  # of address space, Python's own included


def environment(asked: list[str]) -> Any:
    """The Jinja environment that `transformers` gives chat templates, sandboxed. `asked` gets the form of every date asked for."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the model wrote, for training: it changes no text."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        asked.append(form)
        return datetime.now().strftime(form)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env


def _attempt(action: Any) -> dict[str, Any]:
    """{text: what `action` returns} or {error: why it did not}."""
    try:
        return {"text": action()}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as e:  # whatever a stranger's program does
        return {"error": " ".join(str(e).split())[:300] or type(e).__name__}


class TooLong(Exception):
    """A rendering without end."""


def _rendering(template: Any, variables: dict[str, Any], longest: int) -> str:
    parts, length = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        length += len(part)
        if length > longest:
            raise TooLong(f"it writes more than {longest} characters for one turn")
    return "".join(parts)


def _same(a: str, b: str) -> int:
    """Characters that two texts have in common at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def render(job: dict[str, Any], compiled: dict[str, Any]) -> dict[str, Any]:
    """The answer to one job. `compiled` keeps the template of the last one: text -> (template, dates it asked for)."""
    text = job["template"]
    if text not in compiled:
        asked: list[str] = []
        made = _attempt(lambda: environment(asked).from_string(text))
        if "error" in made:
            return made
        compiled.clear()
        compiled[text] = (made["text"], asked)
    template, asked = compiled[text]
    asked.clear()
    turns, before = [], ""
    for variables in job["turns"]:
        if "messages" in variables:  # which a template cannot change: the sandbox is an immutable one
            variables["messages"] = [job["messages"][i] for i in variables["messages"]]
        turn = _attempt(lambda v=variables: _rendering(template, v, job["longest"]))
        if "text" in turn:
            text, same = turn["text"], _same(before, turn["text"])
            turn, before = {"text": text[same:], "same": same}, text
        turns.append(turn)
    return {"turns": turns, "dated": bool(asked)}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this process, who ends it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    kept: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        job = json.loads(line)
        until = int(time.process_time()) + job["seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        sys.stdout.buffer.write(json.dumps(render(job, kept)).encode() + b"\n")
        sys.stdout.buffer.flush()
