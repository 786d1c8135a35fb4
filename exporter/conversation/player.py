"""Conversations' prompts and answers over one `kiln.Session`: what was computed for a beginning of a prompt is used again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.parser import Delta, Parser
from kiln.exporter.conversation.prompt import Prompt, common, render_prompt
from kiln.exporter.conversation.request import Request, RequestError
from kiln.exporter.conversation.template import Template
from kiln.exporter.conversation.vocabulary import Pieces, vocabulary
from kiln.exporter.errors import KilnError


class Dialect:
    """What an artifact says of conversations: its template, its special tokens, how its model writes thoughts and calls."""

    def __init__(self, directory: Path, manifest: dict[str, Any], pieces: Pieces):
        """Raises KilnError where the artifact has no tokenizer or no chat template."""
        if not manifest.get("tokenizer"):
            raise KilnError(f"{directory}: the artifact has no tokenizer, so it cannot talk; export a GGUF file that has one")
        path = directory / "chat_template.jinja"
        if not manifest.get("chat") or not path.is_file():
            raise KilnError(f"{directory}: the artifact has no chat template, so it cannot talk; export it with --chat-template FILE")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise KilnError(f"{path}: cannot read the chat template: {e}") from e
        self.vocabulary = vocabulary(pieces, directory / manifest["tokenizer"]["file"], manifest["tokenizer"]["eog"])
        bos = manifest["tokenizer"]["bos"]
        named = {"bos_token": next((t for t, i in self.vocabulary.special.items() if i == bos), "")}  # artifacts from before chat.tokens
        self.template = Template(text, manifest["chat"].get("tokens", named), self.vocabulary)
        self.markup = Markup.of(text, self.vocabulary.special)

    def prompt(self, request: Request, cuts: bool | Collection[str] = True) -> Prompt:
        """Raises RequestError."""
        return render_prompt(self.template, request, self.markup.thoughts, cuts)

    def parser(self, prompt: Prompt, request: Request, stop: Sequence[str] = (), parallel: bool = True) -> Parser:
        if request.pending:
            raise RequestError("messages", f"the call {request.pending[0][:40]!r} has no result yet; add a message of role 'tool'")
        return Parser(self.vocabulary, self.markup, prompt.ids, request.tools, stop, parallel)

    def close(self) -> None:
        self.template.close()


KEPT = frozenset(("system", "turn", "call"))  # cuts at which later prompts part as a rule
WORTH = 256  # ids since the stop before for which a snapshot is taken at any other cut
NEAR = 8  # ids since the stop before that are read again by one step: a stop there would cost as much as it saves


@dataclass
class Turn:
    """One answer's figures. reused: ids of the prompt that were not computed again. parted: where the caches left it, or None."""

    prompt: int
    reused: int
    held: int
    parted: int | None
    new: int = 0
    reading: float = 0.0  # seconds
    writing: float = 0.0
    drafts: dict[str, Any] | None = None  # Session.draft_counts, where there were any
    stopped: str = ""  # eog, length, max_seq_len, callback, interrupted

    def text(self) -> str:
        read = self.prompt - self.reused
        lines = f"prompt {self.prompt} tokens: {self.reused} reused, {read} evaluated in {self.reading:.2f} s"
        lines += f" ({read / self.reading:.1f} tok/s)" if self.reading > 0 else ""
        if self.parted is not None:
            lines += f"\nthe caches held {self.held} tokens and parted from this prompt after {self.parted}"
        lines += f"\nanswer {self.new} tokens in {self.writing:.2f} s"
        lines += f" ({(self.new - 1) / self.writing:.1f} tok/s)" if self.new > 1 and self.writing > 0 else ""
        if counts := self.drafts:
            rate = counts["tokens"] / max(counts["steps"], 1)
            lines += f"\n{rate:.2f} tokens a step, {sum(counts['right'])} of {sum(counts['tried'])} drafts right"
        return lines


class Player:
    """`session`: a `kiln.Session` at position 0 that nobody else uses. store: a `kiln.SnapshotStore`, which others may use as well.

    With a store a prompt is read in pieces that end at cuts, where a snapshot is kept. What is used again stood at the end of a piece or
    behind a step, so an answer's bits are those of a session that reads the same pieces from position 0.
    """

    def __init__(self, session: Any, max_seq_len: int, store: Any = None):
        self.session, self.max_seq_len, self.store = session, max_seq_len, store
        self.conversation = "0"  # whose snapshots the next are; the store lets go of whole conversations
        self._ends: list[int] = []  # of the pieces in which the caches were read
        self._stepped = max_seq_len + 1  # from here on each position is the end of a step

    @property
    def held(self) -> list[int]:
        """The ids whose keys and values the caches hold."""
        return self.session.tokens

    def begin(self) -> None:
        """Another conversation."""
        self.conversation = str(int(self.conversation) + 1)

    def resume(self, path: Path) -> int:
        """Goes on from a saved session -> its position. Raises kiln.Error, and changes nothing, where it cannot."""
        self.session.restore(path)
        self._ends, self._stepped = [self.session.position], self.max_seq_len + 1
        if self.store:
            self.store.take(self.session, self.conversation)
        return self.session.position

    def go_back(self, ids: Sequence[int]) -> int:
        """Brings the session to the longest beginning of `ids` that it need not compute again, less than all -> its length."""
        held = self.held
        same = common(held, ids)
        usable = min(same, len(ids) - 1)
        ends = [end for end in self._ends if end <= usable]
        at = usable if usable in (self._stepped, len(held)) or usable > self._stepped else ends[-1] if ends else 0
        self._stepped = self.max_seq_len + 1
        at = at if at >= self.session.earliest else 0
        found = self.store.longest(self.session, list(ids), self.conversation) if self.store else None
        if found is not None and found.position > at:
            self.session.restore(found)
            self._ends = [found.position]
            return found.position
        self.session.rewind(at)
        self._ends = [*(end for end in ends if end < at), at]
        return at

    def answer(
        self, prompt: Prompt, parser: Parser, most: int, show: Callable[[Delta], None] = lambda delta: None,
        drafts: Mapping[str, Any] | None = None,
    ) -> Turn:  # fmt: skip
        """Reads the prompt and writes an answer of at most `most` tokens, which ends up in `parser.message`. drafts: of `Session.generate`.

        Ctrl-C ends it early, `stopped` says so. Raises KilnError where the prompt is too long or the session fails.
        """
        import kiln

        ids = list(prompt.ids)
        if len(ids) > self.max_seq_len:
            raise KilnError(f"the conversation has {len(ids)} tokens, the artifact takes {self.max_seq_len}; shorten it or begin a new one")
        held = self.held
        same = common(held, ids)
        turn = Turn(len(ids), 0, len(held), None if same == len(held) and same < len(ids) else same)
        start = time.monotonic()
        try:
            turn.reused = self.go_back(ids)
            self._read(prompt, ids, turn.reused)
            turn.reading = time.monotonic() - start
            start = time.monotonic()
            self._write(turn, parser, most, show, drafts or {})
        except KeyboardInterrupt:
            turn.stopped = "interrupted"
        except kiln.Error as e:
            self.session.reset()
            self._ends = []
            raise KilnError(str(e)) from e
        if not turn.reading:
            turn.reading, start = time.monotonic() - start, time.monotonic()
        turn.writing = time.monotonic() - start
        for delta in parser.finish(cut=turn.stopped != "eog"):
            show(delta)
        return turn

    def _read(self, prompt: Prompt, ids: list[int], start: int) -> None:
        for end in stops(prompt.cuts, start, len(ids)) if self.store else ():
            self.session.prefill(ids[start:end])
            start = end
            self._ends.append(end)
            self.store.take(self.session, self.conversation)
        self.session.prefill(ids[start:])
        self._stepped = len(ids)

    def _write(self, turn: Turn, parser: Parser, most: int, show: Callable[[Delta], None], drafts: Mapping[str, Any]) -> None:
        def took(token: int) -> bool:
            turn.new += 1
            for delta in parser.push([token]):
                show(delta)
            return not parser.ended

        turn.stopped = self.session.generate(most, took, **drafts)[1]
        if drafts.get("draft", "off") != "off":
            turn.drafts = self.session.draft_counts


def stops(cuts: Mapping[int, Sequence[str]], start: int, end: int) -> list[int]:
    """Where reading ids [start, end) is worth a stop: there a later prompt may part, and one id at least is left to compute."""
    found: list[int] = []
    for cut, why in cuts.items():
        at = min(cut, end - 1)
        last = found[-1] if found else start
        if at - last > NEAR and (not KEPT.isdisjoint(why) or at - last >= WORTH):
            found.append(at)
    return found
