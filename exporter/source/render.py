"""Renders a chat template in a process of its own: a template is a program of a stranger, which may run for ever or fill the memory.

Run as a file (`python render.py`), so that nothing of this package is imported.
stdin: JSON {template, conversations: [[{role, content}, ...], ...], tokens, parts: a message's content is a list of parts, not a text,
open: the answer's beginning is written, too}.
stdout: JSON {rendered: [text, ...], dated: the template asked for the date} or {error: one line}.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

CPU_SECONDS = 4  # a large template takes a hundredth of one
MEMORY = 2 << 30  # of address space, Python's own included
LONGEST = 1 << 20  # characters of one rendered turn


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


def render(job: dict[str, Any]) -> dict[str, Any]:
    asked: list[str] = []
    try:
        template = environment(asked).from_string(job["template"])
        rendered = []
        for messages in job["conversations"]:
            if job["parts"]:
                messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
            parts, length = [], 0
            for part in template.generate(
                messages=messages, add_generation_prompt=job["open"], enable_thinking=False, tools=None, documents=None, **job["tokens"],
            ):  # fmt: skip
                parts.append(part)
                length += len(part)
                if length > LONGEST:
                    return {"error": f"it writes more than {LONGEST} characters"}
            rendered.append("".join(parts))
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as e:  # whatever a stranger's program does
        return {"error": " ".join(str(e).split())[:300] or type(e).__name__}
    return {"rendered": rendered, "dated": bool(asked)}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout.buffer.write(json.dumps(render(json.loads(sys.stdin.buffer.read()))).encode())
