"""Generated ids -> content, reasoning and calls, as they come: one state machine, whether somebody watches or not.

The machine's state at the first id is that of the prompt's end: a prompt may end within a thought. Only ids are markers; a marker's text,
spelled in ordinary tokens, is text. Any split of the same ids gives the same deltas but for where texts are cut.
"""

from __future__ import annotations

import codecs
import secrets
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kiln.exporter.conversation.calls import QUOTE, Unreadable, read_calls
from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.vocabulary import Vocabulary

CONTENT, REASONING, CALL, PARTIAL = "content", "reasoning", "call", "partial call"
_OPEN, _CLOSE, _CALL, _CALLED, _QUOTE = range(5)  # what a marker does


@dataclass(frozen=True)
class Call:
    """arguments: JSON text; of a partial call the beginning of one."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What came next. text: of content and reasoning, never empty. call: whole, or PARTIAL at the end of a cut answer: not to be run."""

    kind: str
    text: str = ""
    call: Call | None = None


@dataclass
class Message:
    """All deltas together. finish: stop, length (the answer was cut) or tool_calls; None before the end."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    partial: Call | None = None
    finish: str | None = None
    stop_text: str | None = None

    def add(self, delta: Delta) -> None:
        if delta.kind == CONTENT:
            self.content += delta.text
        elif delta.kind == REASONING:
            self.reasoning += delta.text
        elif delta.kind == CALL and delta.call:
            self.calls.append(delta.call)
        else:
            self.partial = delta.call

    def record(self) -> dict[str, Any]:
        """The message in OpenAI's form, as it goes into a history."""
        called = bool(self.calls or self.partial)
        record: dict[str, Any] = {"role": "assistant", "content": self.content or (None if called else "")}
        if self.reasoning:
            record["reasoning_content"] = self.reasoning
        if self.calls:
            record["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.calls
            ]
        return record


def call_id() -> str:
    letters = string.ascii_letters + string.digits
    return "call_" + "".join(secrets.choice(letters) for _ in range(24))


def _begun(stop: str, text: str) -> int:
    """Characters at a text's end that a stop text, which it does not hold, may begin with."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-k:])), 0)


class Parser:
    """One answer. `message` is what has come so far; `ended` says that nothing more counts: an end token, a stop text, or `finish`.

    prompt: the ids before the answer. tools: those that may be called; None or empty: markers of calls are text. stop: texts
    that end the content and are not part of it. parallel: more than one call may come.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        markup: Markup,
        prompt: Sequence[int] = (),
        tools: Iterable[dict[str, Any]] | None = None,
        stop: Sequence[str] = (),
        parallel: bool = True,
        new_id: Callable[[], str] = call_id,
    ):
        self.message, self.ended = Message(), False
        self._vocabulary, self._markup, self._new_id, self._parallel = vocabulary, markup, new_id, parallel
        self._schemas = {t["function"]["name"]: t["function"].get("parameters") for t in tools or ()}
        self._stops = tuple(text for text in stop if text)
        special, thoughts, calls = vocabulary.special, markup.thoughts, markup.calls
        self._markers: dict[int, int] = {}
        if thoughts:
            self._markers |= {special[thoughts.open]: _OPEN, special[thoughts.close]: _CLOSE}
        if calls and self._schemas:
            self._markers |= {special[calls.open]: _CALL, special[calls.close]: _CALLED}
            self._markers |= {special[calls.quote]: _QUOTE} if calls.quote else {}
        self._texts = vocabulary.texts
        self._new: list[Delta] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state = CONTENT
        self._held = ""  # of content: what may begin a stop text; of a thought: a newline at its end
        self._space = ""  # white space before the first content
        self._begun = self._after = False  # content has come; a loose thought was closed just now
        self._header: str | None = None  # what of a thought's header has come; None: it is over
        self._segments: list[str | None] = []
        self._prime(prompt)

    @property
    def within(self) -> str:
        """What the next id is part of: content, reasoning or call."""
        return self._state

    def push(self, ids: Iterable[int]) -> list[Delta]:
        """What is new with these ids; those behind the end are passed over."""
        for i in ids:
            if not self.ended:
                self._id(i)
        return self._taken()

    def push_bytes(self, data: bytes) -> list[Delta]:
        """As `push`, of an ordinary token's bytes or a part of them."""
        if not self.ended:
            self._text(self._decoder.decode(data))
        return self._taken()

    def finish(self, cut: bool = True) -> list[Delta]:
        """The answer is over. cut: by its length, not by the model. Nothing happens where an end token or a stop text ended it."""
        if not self.ended:
            self._finish(cut)
        return self._taken()

    def _prime(self, prompt: Sequence[int]) -> None:
        """The state behind the prompt: within a thought or call that nothing closed, what it has of a header included."""
        at = next((k for k in range(len(prompt) - 1, -1, -1) if prompt[k] in self._markers and self._markers[prompt[k]] != _QUOTE), None)
        if at is None or self._markers[prompt[at]] not in (_OPEN, _CALL) or any(i in self._vocabulary.ends for i in prompt[at:]):
            return
        for i in prompt[at:]:
            self._id(i)
        if self._state == REASONING:
            self._held = ""
        self._new.clear()
        self.message = Message()

    def _taken(self) -> list[Delta]:
        """The new deltas, neighbours of one kind joined."""
        new, self._new = self._new, []
        joined: list[Delta] = []
        for delta in new:
            if joined and delta.kind == joined[-1].kind in (CONTENT, REASONING):
                joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
            else:
                joined.append(delta)
        return joined

    def _give(self, delta: Delta) -> None:
        self.message.add(delta)
        self._new.append(delta)

    def _id(self, i: int) -> None:
        if i in self._vocabulary.ends:
            self._finish(cut=False)
        elif i in self._markers:
            self._flush()
            self._marker(self._markers[i])
        else:
            self._text(self._decoder.decode(self._vocabulary.pieces.piece(i, True)))

    def _flush(self) -> None:
        """Bytes of a character that will not be completed."""
        if rest := self._decoder.decode(b"", final=True):
            self._text(rest)
        self._decoder.reset()

    def _text(self, text: str) -> None:
        if not text or self.ended:
            return
        if self._state == CALL:
            self._segments.append(text)
        elif self._state == REASONING:
            self._thought(text)
        else:
            self._content(text)

    def _marker(self, does: int) -> None:
        if self.ended:
            return
        if does == _QUOTE:
            if self._state == CALL:
                self._segments.append(QUOTE)
            else:
                self._text(self._markup.calls.quote or "" if self._markup.calls else "")
            return
        if self._state == CALL:
            if does == _CLOSE:
                return
            self._called(closed=does == _CALLED)
        elif self._state == REASONING:
            self._thought_over()
        else:
            self._release()
        if self.ended:
            return
        self._after = does == _CLOSE and self._state == REASONING and bool(self._markup.thoughts and self._markup.thoughts.loose)
        self._state = {_OPEN: REASONING, _CALL: CALL}.get(does, CONTENT)
        if does == _OPEN:
            self._header = ""

    def _thought(self, text: str) -> None:
        if self._header is not None:
            header = self._markup.thoughts.header if self._markup.thoughts else ""
            self._header += text
            if len(self._header) < len(header) and header.startswith(self._header):
                return
            text, self._header = self._header.removeprefix(header), None
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._reason(text.removesuffix("\n"))

    def _thought_over(self, closed: bool = True) -> None:
        """One newline before the end is not part of it: the template writes it. Where nothing closed the thought, it is."""
        if self._header is not None:
            header = self._markup.thoughts.header if self._markup.thoughts else ""
            if closed and self._header != header.removesuffix("\n"):
                self._reason(self._header.removesuffix("\n"))
            self._header = None
        if not closed:
            self._reason(self._held)
        self._held = ""

    def _reason(self, text: str) -> None:
        if text:
            self._give(Delta(REASONING, text))

    def _content(self, text: str) -> None:
        """Content up to the first stop text that is complete; what may begin one is held back."""
        if self._after:
            text = text.lstrip("\n")
            if not text:
                return
            self._after = False
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.message.stop_text = min(ends)
            self._held = ""
            self._say(text[:at])
            self._end("stop")
            return
        keep = max((_begun(stop, text) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        self._say(text[: len(text) - keep])

    def _release(self) -> None:
        text, self._held = self._held, ""
        self._say(text)

    def _say(self, text: str) -> None:
        """White space alone is no content, until content follows."""
        if not self._begun:
            text, self._space = self._space + text, ""
            if not text.strip():
                self._space = text
                return
            self._begun = True
        if text:
            self._give(Delta(CONTENT, text))

    def _called(self, closed: bool, cut: bool = False) -> None:
        """The call that is over. What is none becomes content, so that nothing is lost, but for one that was cut before it had a name."""
        segments, self._segments = self._segments, []
        assert self._markup.calls
        try:
            written = read_calls(self._markup.calls.syntax, segments, self._schemas, closed)
            if not closed and not cut and not all(w.complete for w in written):
                raise Unreadable("not closed")
        except Unreadable:
            self._state = CONTENT
            if not cut:
                quote = self._markup.calls.quote or ""
                inside = "".join(quote if s is None else s for s in segments)
                self._content(self._markup.calls.open + inside + (self._markup.calls.close if closed else ""))
                if not self.ended:
                    self._release()
            return
        for w in written:
            call = Call(len(self.message.calls), self._new_id(), w.name, w.arguments)
            self._give(Delta(PARTIAL if cut and w is written[-1] else CALL, call=call))
            if not self._parallel and not cut:
                self._end("tool_calls")
                return

    def _finish(self, cut: bool) -> None:
        if self._state == CALL and cut:
            self._decoder.reset()
        self._flush()
        if self.ended:
            return
        if self._state == CALL:
            self._called(closed=False, cut=cut)
        elif self._state == REASONING:
            self._thought_over(closed=False)
        if self.ended:
            return
        if self._state == CONTENT:
            self._release()
        self._end("length" if cut else "tool_calls" if self.message.calls else "stop")

    def _end(self, why: str) -> None:
        if not self.message.calls and not self.message.partial and self._space:
            self._begun = True
            self._give(Delta(CONTENT, self._space))
        self._space = ""
        self.message.finish = why
        self.ended = True
