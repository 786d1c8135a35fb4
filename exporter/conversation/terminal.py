"""`kiln chat`: a conversation in a terminal, or through a pipe. And what `kiln run` says more than kiln-run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kiln.exporter.conversation.chat import Chat, Options, read_conversation
from kiln.exporter.conversation.parser import REASONING, Delta, Message
from kiln.exporter.conversation.player import Dialect, Player
from kiln.exporter.errors import KilnError, printable

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newlines and tabs
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def shown(text: str) -> str:
    """A model's text for a terminal: what would steer it is escaped."""
    return _STEERING.sub(lambda m: m.group().encode("unicode_escape").decode(), text)


class Printer:
    """Deltas as they come: thoughts dim on a terminal, between marks elsewhere."""

    def __init__(self, tty: bool):
        self.tty, self._kind, self._end = tty, "", "\n"

    def __call__(self, delta: Delta) -> None:
        if delta.kind != self._kind:
            self._over(delta.kind)
        if delta.call:
            self._write(f"[{delta.kind}] {delta.call.name}({delta.call.arguments})\n")
        else:
            self._write(delta.text)

    def _write(self, text: str) -> None:
        self._end = text[-1:] or self._end
        sys.stdout.write(shown(text) if self.tty else text)
        sys.stdout.flush()

    def _over(self, kind: str) -> None:
        """From one kind of text to another."""
        if self._kind == REASONING:
            sys.stdout.write(_PLAIN if self.tty else "")
            self._write(("" if self._end == "\n" else "\n") + ("" if self.tty else "[answer]\n"))
        elif self._kind and self._end != "\n":
            self._write("\n")
        if kind == REASONING:
            self._write("" if self.tty else "[thought]\n")
            sys.stdout.write(_DIM if self.tty else "")
        self._kind = kind

    def finish(self) -> None:
        if self._kind == REASONING and self.tty:
            sys.stdout.write(_PLAIN)
        if self._kind and self._end != "\n":
            self._write("\n")
        self._kind, self._end = "", "\n"


def note(text: str) -> None:
    """A line about the conversation, not of it."""
    tty = sys.stderr.isatty()
    print(f"{_DIM}{text}{_PLAIN}" if tty else text, file=sys.stderr, flush=True)


def error(text: object) -> None:
    print(f"kiln: error: {printable(str(text))}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C is a KeyboardInterrupt: it stops an answer and not the program."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def open_chat(
    artifact: Path, device: str, threads: int | None, options: Options, budgets: tuple[float, float] = (0, 0),
    session_dir: Path | None = None, weights: Path | None = None,
) -> Chat:  # fmt: skip
    """Loads an artifact. budgets: of snapshots on the device and on the host, in GiB; weights: the GGUF file, where the artifact holds code
    only and the file is not beside it. Raises KilnError."""
    from kiln.exporter.artifact.manifest import read_manifest

    manifest = read_manifest(artifact)
    if not manifest.get("chat"):
        raise KilnError(f"{artifact}: the artifact has no chat template, so it cannot talk; export it with --chat-template FILE")
    try:
        import kiln
    except ImportError as e:
        raise KilnError(f"the Python module kiln is not built ({e}); run `make build`") from e
    try:
        count = threads or len(os.sched_getaffinity(0))
        model = kiln.Model(str(artifact), device=device, threads=count, weights=str(weights) if weights else None)
        kiln.set_threads(count)
        dialect = Dialect(artifact, manifest, model.tokenizer)
        store = kiln.SnapshotStore(*(int(gib * (1 << 30)) for gib in budgets)) if any(budgets) else None
        return Chat(dialect, Player(kiln.Session(model), model.max_seq_len, store), options, session_dir=session_dir)
    except kiln.Error as e:
        raise KilnError(str(e)) from e


def reader(tty: bool) -> Callable[[str], str]:
    """Reads a line; EOFError at the end."""
    if not tty:
        return _piped
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines with it)
        return input
    return PromptSession().prompt


def _piped(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def read_text(read: Callable[[str], str]) -> str:
    """One line, or several of which all but the last end in a backslash."""
    lines = [read("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read(". "))
        except EOFError:
            break
    return "\n".join(lines)


def talk(chat: Chat) -> None:
    """Until /quit or the end of input."""
    tty = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is no UTF-8 is refused with the message
    read = reader(tty)
    printer = Printer(sys.stdout.isatty())
    if tty:
        note("/help lists what can be asked besides questions; Ctrl-D leaves")
    with interruptible():
        while True:
            try:
                text = read_text(read)
                if text.strip() == "/quit":
                    return
                if not text.strip():
                    continue
                _one(chat, text, printer)
            except EOFError:
                return
            except KeyboardInterrupt:
                printer.finish()
                note("(Ctrl-D or /quit leaves)")
            except KilnError as e:
                printer.finish()
                error(e)


def _one(chat: Chat, text: str, printer: Printer) -> None:
    before = chat.last
    if text.startswith("/") and not text.startswith("//"):
        said = chat.command(text, printer)
        if said is not None:
            print(shown(said) if printer.tty else said, flush=True)
    else:
        chat.say(text[1:] if text.startswith("//") else text, printer)
    printer.finish()
    if chat.last is not None and chat.last is not before:
        ended = {"max_seq_len": "the artifact's longest context is full", "length": "cut at --max-new-tokens", "interrupted": "stopped"}
        if why := ended.get(chat.last.stopped):
            note(f"({why})")


def random_seed() -> int:
    return secrets.randbelow(1 << 31)


def run_once(chat: Chat, text: str | None, as_json: bool) -> None:
    """`kiln run` with --system, --messages, --think or --stop: one answer, and its figures on stderr."""
    printer = Printer(sys.stdout.isatty())
    show: Callable[[Delta], None] = (lambda delta: None) if as_json else printer
    with interruptible():
        message = chat.say(text, show) if text is not None else chat.answer(show)
    printer.finish()
    assert chat.last
    if as_json:
        print(json.dumps(record(message, chat), ensure_ascii=False, indent=1))
    else:
        print(f"{chat.last.text()}; stop: {chat.last.stopped if message.stop_text is None else 'text'}", file=sys.stderr)
    if chat.last.stopped == "interrupted":
        sys.exit(128 + signal.SIGINT)


def record(message: Message, chat: Chat) -> dict[str, Any]:
    turn = chat.last
    assert turn
    figures: dict[str, Any] = {"prompt_tokens": turn.prompt, "completion_tokens": turn.new}
    figures |= {"prefill_s": turn.reading, "decode_s": turn.writing, **({"drafts": turn.drafts} if turn.drafts else {})}
    return {"message": message.record(), "finish_reason": message.finish, "stop_text": message.stop_text, **figures}


def begin(chat: Chat, messages: Path | None, system: str | None, think: bool, asks: bool) -> None:
    """The conversation of --messages, --system and --think. asks: its last message is to be answered. Raises KilnError."""
    if messages is not None:
        chat.take(read_conversation(messages), str(messages))
        if asks and (not chat.messages or chat.messages[-1]["role"] == "assistant"):
            raise KilnError(f"{messages}: there is no user's or tool's message at its end to answer; add one, or give --prompt as well")
    if system is not None:
        chat.system = system or None
    if think:
        if not chat.dialect.template.manner.switch:
            raise KilnError("--think: this model's chat template has no switch for thinking; leave it out")
        chat.think = True


def prompt_text(path: Path) -> str:
    """Of --prompt-file. Raises KilnError."""
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode()
    except OSError as e:
        raise KilnError(f"{path}: cannot read the prompt: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise KilnError(f"{path}: the prompt is not UTF-8 text ({e.reason} at byte {e.start})") from e
