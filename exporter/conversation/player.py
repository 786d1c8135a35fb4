"""A conversation's prompts and answers over one `kiln.Session`: what its caches hold is used again where the next prompt begins with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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

    def prompt(self, request: Request, cuts: bool = True) -> Prompt:
        """Raises RequestError."""
        return render_prompt(self.template, request, self.markup.thoughts, cuts)

    def parser(self, prompt: Prompt, request: Request, stop: Sequence[str] = (), parallel: bool = True) -> Parser:
        if request.pending:
            raise RequestError("messages", f"the call {request.pending[0][:40]!r} has no result yet; add a message of role 'tool'")
        return Parser(self.vocabulary, self.markup, prompt.ids, request.tools, stop, parallel)

    def close(self) -> None:
        self.template.close()


@dataclass
class Turn:
    """One answer's figures. reused: ids of the prompt that the caches held. parted: where their ids left the prompt's, None: nowhere."""

    prompt: int
    reused: int
    held: int
    parted: int | None
    new: int = 0
    reading: float = 0.0  # seconds
    writing: float = 0.0
    stopped: str = ""  # eog, length, max_seq_len, callback, interrupted

    def text(self) -> str:
        read = self.prompt - self.reused
        lines = f"prompt {self.prompt} tokens: {self.reused} reused, {read} evaluated in {self.reading:.2f} s"
        lines += f" ({read / self.reading:.1f} tok/s)" if self.reading > 0 else ""
        if self.parted is not None:
            lines += f"\nthe caches held {self.held} tokens and part from this prompt after {self.parted}: all of it was evaluated again"
        lines += f"\nanswer {self.new} tokens in {self.writing:.2f} s"
        return lines + (f" ({(self.new - 1) / self.writing:.1f} tok/s)" if self.new > 1 and self.writing > 0 else "")


class Player:
    """`session`: a `kiln.Session` at position 0 that nobody else uses."""

    def __init__(self, session: Any, max_seq_len: int):
        self.session, self.max_seq_len = session, max_seq_len
        self._known: list[int] = []  # ids given to the session, of which it holds the first `session.position`

    @property
    def held(self) -> list[int]:
        """The ids whose keys and values the caches hold."""
        return self._known[: self.session.position]

    def answer(self, prompt: Prompt, parser: Parser, most: int, show: Callable[[Delta], None] = lambda delta: None) -> Turn:
        """Reads the prompt and writes an answer of at most `most` tokens, which ends up in `parser.message`.

        Ctrl-C ends it early, `stopped` says so. Raises KilnError where the prompt is too long or the session fails.
        """
        import kiln

        ids = list(prompt.ids)
        if len(ids) > self.max_seq_len:
            raise KilnError(f"the conversation has {len(ids)} tokens, the artifact takes {self.max_seq_len}; shorten it or begin a new one")
        held = self.held
        same = common(held, ids)
        extends = same == len(held) and same < len(ids)
        turn = Turn(len(ids), same if extends else 0, len(held), None if extends else same)
        start = time.monotonic()
        try:
            if not extends:
                self.session.reset()
            self._known = ids[:]
            self.session.prefill(ids[turn.reused :])
            turn.reading = time.monotonic() - start
            start = time.monotonic()
            self._write(turn, parser, most, show)
        except KeyboardInterrupt:
            turn.stopped = "interrupted"
        except kiln.Error as e:
            self.session.reset()
            raise KilnError(str(e)) from e
        if not turn.reading:
            turn.reading, start = time.monotonic() - start, time.monotonic()
        turn.writing = time.monotonic() - start
        for delta in parser.finish(cut=turn.stopped != "eog"):
            show(delta)
        return turn

    def _write(self, turn: Turn, parser: Parser, most: int, show: Callable[[Delta], None]) -> None:
        def took(token: int) -> bool:
            self._known.append(token)
            turn.new += 1
            for delta in parser.push([token]):
                show(delta)
            return not parser.ended

        turn.stopped = self.session.generate(most, took)[1]
