"""A chat template and what it does: renderings in which the text of a request cannot be taken for a special token.

In every text of a request, the characters that special tokens begin and end with are replaced by private-use ones before the template runs
(`Marks`). Where the rendering is cut into special tokens and plain text, they are what they were again in the plain text. So a special
token's id stands only where the template wrote the token, however the template cuts and joins texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from kiln.exporter.conversation.request import Request, RequestError
from kiln.exporter.conversation.vocabulary import Vocabulary
from kiln.exporter.errors import KilnError, one_line
from kiln.exporter.source.renderer import Renderer, TemplateError

LONGEST = 1 << 24  # characters of a prompt
CPU_SECONDS = 30  # of a prompt: templates that look back from every message take half a second for two hundred
SWITCHES = ("enable_thinking", "thinking")  # what templates call it
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010fffd]")


class Marks:
    """Private-use characters that neither a request nor the template has: one for each marked character, and three for probes."""

    def __init__(self, marked: str, texts: Sequence[str]):
        used = set(chain.from_iterable(_PRIVATE.findall(text) for text in texts if not text.isascii()))
        free = (c for c in map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))) if c not in used)
        try:
            chosen = [next(free) for _ in range(len(marked) + 3)]
        except StopIteration:
            raise RequestError("messages", "use every private character of Unicode") from None
        self._to = dict(zip(map(ord, marked), chosen, strict=False))
        self._back = {ord(c): chr(original) for original, c in self._to.items()}
        self.end, self.probe, self.other = chosen[len(marked) :]
        self._written = [c.encode("unicode_escape").decode() for c in self._to.values()]

    def put(self, value: Any) -> Any:
        """The value with every text in it marked, names of keys included."""
        if isinstance(value, str):
            return value.translate(self._to)
        if isinstance(value, Mapping):
            return {self.put(key): self.put(item) for key, item in value.items()}
        return [self.put(item) for item in value] if isinstance(value, list | tuple) else value

    def restore(self, text: str) -> str:
        return text.translate(self._back)

    def check(self, rendered: str, texts: Sequence[str]) -> None:
        """RequestError where a template wrote a mark as an escape, which cannot be restored."""
        for escape in self._written:
            if escape in rendered and not any(escape in text for text in texts):
                raise RequestError("messages", "the chat template writes their special characters as escapes, which Kiln cannot follow")


def texts_of(value: Any) -> list[str]:
    """Every text in a JSON value, names of keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in chain(value.keys(), value.values()) for text in texts_of(item)]
    return [text for item in value for text in texts_of(item)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True)
class Manner:
    """What a template does, found by rendering probes.

    closing: what it writes after a user's text where the model is not to go on. opening: what it writes before an assistant's text in a
    history. switch: the variable that turns thinking on, None where there is none.
    """

    takes_text: bool
    takes_parts: bool
    closing: str
    opening: str
    trims_assistant: bool
    switch: str | None


class Template:
    """A chat template over a vocabulary. `tokens`: special tokens' texts by the names that templates use. Any thread may call."""

    def __init__(self, text: str, tokens: Mapping[str, str], vocabulary: Vocabulary):
        self.text, self.tokens, self.vocabulary = text, dict(tokens), vocabulary
        self._renderer = Renderer(text, LONGEST, CPU_SECONDS)

    def close(self) -> None:
        self._renderer.close()

    def marks(self, request: Request) -> tuple[Marks, list[str]]:
        """For a request, and the texts that are known not to hold them."""
        texts = [self.text, *texts_of([request.messages, request.tools, request.variables]), *self.tokens.values()]
        return Marks(self.vocabulary.marked, texts), texts

    def variables(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), more: Mapping[str, Any] | None = None, generate: bool = True
    ) -> dict[str, Any]:
        """What one rendering is made of."""
        given = {"messages": list(messages), "tools": list(tools) or None, "documents": None, "add_generation_prompt": generate}
        return {**(more or {}), **given, **self.tokens}

    def render(self, turns: Sequence[Mapping[str, Any]]) -> list[str | TemplateError]:
        """Raises KilnError where the template as a whole fails."""
        try:
            return self._renderer.render(turns)[0]
        except TemplateError as e:
            raise KilnError(f"the chat template cannot be used: {one_line(e)}; export the model with another --chat-template") from None

    def switched(self, request: Request, on: bool) -> dict[str, Any]:
        """The request's variables with thinking on or off."""
        return dict(request.variables) | ({self.manner.switch: on} if self.manner.switch else {})

    @cached_property
    def manner(self) -> Manner:
        marks = Marks(self.vocabulary.marked, [self.text, *self.tokens.values()])
        p, q = marks.probe, marks.other

        def turn(content: Any, answer: Any = None, generate: bool = True, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
            messages = [{"role": "user", "content": content}] + ([{"role": "assistant", "content": answer}] if answer else [])
            return self.variables(messages, (), more, generate)

        parts = [{"type": "text", "text": p}]
        probes = [turn(p), turn(parts), turn(p, generate=False), turn(p, f" {q} ", generate=False)]
        probes += [turn(p, more={name: on}) for name in SWITCHES for on in (True, False)]
        in_text, in_parts, ended, answered, *switched = self.render(probes)
        takes_text = isinstance(in_text, str) and p in in_text
        takes_parts = isinstance(in_parts, str) and in_parts.count(p) == 1 and (in_parts == in_text or not takes_text)
        if not takes_text and not takes_parts:
            why = one_line(in_text) if isinstance(in_text, TemplateError) else "its text is not in what it writes"
            raise KilnError(f"the chat template cannot render a single user turn: {why}; export with another --chat-template")
        if not takes_text:
            ended, answered, *switched = self.render(
                [turn(parts, generate=False), turn(parts, [{"type": "text", "text": f" {q} "}], False)]
            )
        closing = ended.rpartition(p)[2] if isinstance(ended, str) and p in ended else ""
        opening = ""
        if isinstance(answered, str) and isinstance(ended, str) and answered.count(q) == 1 and answered.startswith(ended):
            opening = answered[len(ended) :].partition(q)[0]
        trims = isinstance(answered, str) and f" {q}" not in answered
        pairs = zip(SWITCHES, switched[::2], switched[1::2], strict=False)
        switch = next((name for name, on, off in pairs if isinstance(on, str) and isinstance(off, str) and on != off), None)
        return Manner(takes_text, takes_parts, closing, opening if trims else opening.removesuffix(" "), trims, switch)

    def shaped(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content in a form that the template takes: parts joined by a newline, or a text as the only part."""
        content = message["content"]
        if isinstance(content, list) and not self.manner.takes_parts:
            content = "\n".join(item["text"] for item in content)
        elif isinstance(content, str) and not self.manner.takes_text:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}
