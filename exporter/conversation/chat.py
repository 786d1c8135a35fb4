"""The state of a conversation in a terminal: messages, switches and the player that answers; and its commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kiln.exporter.conversation.parser import Delta, Message
from kiln.exporter.conversation.player import Dialect, Player, Turn
from kiln.exporter.conversation.prompt import Prompt
from kiln.exporter.conversation.request import Request, RequestError, read_request
from kiln.exporter.errors import KilnError
from kiln.exporter.files import replacing, short

FORMAT = 1  # of saved conversations
MAX_FILE = 64 << 20  # bytes of one

HELP = """\
/system [TEXT|off]  show, set or remove the system prompt
/think [on|off]     think before answering
/regenerate         answer the last message again, with another seed
/new                begin a new conversation, with the same system prompt
/save FILE          write the conversation as JSON
/load FILE          go on with one that was saved, or with a JSON list of messages
/tokens             tokens of the conversation, and what the model takes
/speed              of the last answer: what was reused, what was evaluated, tok/s
/help               print this
/quit               leave (or Ctrl-D)
A line that ends in \\ goes on in the next. //TEXT sends a text that begins with /. Ctrl-C stops an answer."""


@dataclass
class Options:
    """How answers are sampled; temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    seed: int = 0
    max_new_tokens: int | None = None
    draft: str = "off"  # or ngram, mtp
    draft_length: int = 0  # most drafts of a step; 0: as many as fit
    stop: tuple[str, ...] = ()


def read_conversation(path: Path) -> dict[str, Any]:
    """{messages, system?, think?} of a saved conversation, a JSON list of messages or an object that has one. Raises KilnError."""
    try:
        with path.open("rb") as f:
            raw = f.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise KilnError(f"{path}: is larger than {MAX_FILE >> 20} MiB; give a JSON list of messages")
        read = json.loads(raw)
    except OSError as e:
        raise KilnError(f"{path}: cannot read the conversation: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise KilnError(f"{path} is not valid JSON: {e}; give a list of messages") from e
    record = {"messages": read} if isinstance(read, list) else read
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise KilnError(f"{path} is no conversation: a JSON list of messages was expected, or an object with messages")
    if record.get("kiln_chat", FORMAT) != FORMAT:
        raise KilnError(f"{path} is a conversation of format {record['kiln_chat']!r}, this Kiln reads {FORMAT}")
    if not isinstance(record.get("think", False), bool):
        raise KilnError(f"{path}: think is {record['think']!r}, true or false was expected")
    return record


@dataclass
class Chat:
    """One conversation. `messages` are checked, without the system prompt."""

    dialect: Dialect
    player: Player
    options: Options
    system: str | None = None
    think: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: Turn | None = None
    session_dir: Path | None = None  # where /save and /load keep what was computed

    def request(self, messages: list[dict[str, Any]], tools: Any = None) -> Request:
        whole = ([{"role": "system", "content": self.system}] if self.system else []) + messages
        switch = self.dialect.template.manner.switch
        return read_request(whole, tools, {switch: self.think} if switch else None)

    def say(self, text: str, show: Callable[[Delta], None]) -> Message:
        """Sends the user's text. Where no answer comes the conversation stays as it was."""
        return self._answer([*self.messages, {"role": "user", "content": text}], show)

    def answer(self, show: Callable[[Delta], None]) -> Message:
        """To a conversation that ends in a user's message or a tool's result."""
        return self._answer(self.messages, show)

    def regenerate(self, show: Callable[[Delta], None]) -> Message:
        """Another answer to the last message."""
        history = self.messages[:]
        while history and history[-1]["role"] == "assistant":
            history.pop()
        if not history:
            raise KilnError("there is no answer yet")
        self.options.seed += 1
        return self._answer(history, show)

    def _answer(self, messages: list[dict[str, Any]], show: Callable[[Delta], None]) -> Message:
        options, session = self.options, self.player.session
        request = self.request(messages)
        prompt = self.dialect.prompt(request, cuts=self.player.store is not None)
        parser = self.dialect.parser(prompt, request, options.stop)
        session.set_sampling(options.temperature, options.top_k, options.top_p, options.seed)
        self.last = self.player.answer(prompt, parser, options.max_new_tokens or self.player.max_seq_len, show,
                                       {"draft": options.draft, "draft_length": options.draft_length})  # fmt: skip
        message = parser.message
        if message.content or message.reasoning or message.calls or self.last.stopped != "interrupted":
            self.messages = [*messages, message.record()]
        return message

    def save(self, path: Path) -> str:
        """-> what to add to the news."""
        record = {"kiln_chat": FORMAT, "system": self.system, "think": self.think, "messages": self.messages}
        with replacing(path, "the conversation") as f:
            f.write((json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
        if not self.session_dir or not self.messages:
            return ""
        kept = self._session_file(path)
        try:
            self.session_dir.mkdir(parents=True, exist_ok=True)
            tokens = self.player.go_back(self._next_prompt().ids)
            self.player.session.save(kept)
        except OSError as e:
            raise KilnError(f"{kept}: cannot save the session: {e.strerror}") from e
        except self._kiln_error() as e:
            raise KilnError(str(e)) from e
        return f"; {tokens} tokens need not be evaluated again"

    def load(self, path: Path) -> str:
        """-> what to add to the news. Raises KilnError, and changes nothing, where the file holds no conversation that this model takes."""
        self.take(read_conversation(path), str(path))
        self.player.begin()
        if not self.session_dir or not (kept := self._session_file(path)).exists():
            return ""
        try:
            return f"; {self.player.resume(kept)} tokens need not be evaluated again"
        except self._kiln_error() as e:
            return f"; it will be evaluated anew: {e}"

    def _session_file(self, path: Path) -> Path:
        assert self.session_dir
        return self.session_dir / f"{short(path.name)}.session"

    @staticmethod
    def _kiln_error() -> type[Exception]:
        import kiln

        return kiln.Error

    def _next_prompt(self) -> Prompt:
        """As the conversation will go on, for all that is known of it."""
        return self.dialect.prompt(self.request([*self.messages, {"role": "user", "content": "?"}]))

    def take(self, record: dict[str, Any], name: str) -> None:
        try:
            messages = list(read_request(record["messages"]).messages) if record["messages"] else []
            system = record.get("system")
            if messages and messages[0]["role"] in ("system", "developer"):
                system = messages.pop(0)["content"]
            if system is not None and not isinstance(system, str):
                raise RequestError("system", "a text was expected")
        except RequestError as e:
            raise KilnError(f"{name}: {e}") from e
        self.messages, self.system, self.think = messages, system or None, record.get("think", self.think)

    def tokens(self) -> str:
        """Of the conversation as the next prompt would begin."""
        most = self.player.max_seq_len
        if not self.messages and not self.system:
            return f"no tokens yet, of {most}"
        prompt = self._next_prompt()
        cuts = ", ".join(f"{at} ({'/'.join(why)})" for at, why in prompt.cuts.items())
        return (
            f"{len(prompt.ids)} tokens with the next message still to come, of {most}; the caches hold {len(self.player.held)}\n"
            f"later prompts may part after {cuts}"
        )

    def command(self, line: str, show: Callable[[Delta], None]) -> str | None:
        """Does a line that begins with / -> what to print; None after an answer. Raises KilnError; /quit is the caller's."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "help":
            return HELP
        if name == "system":
            if rest:
                self.system = None if rest == "off" else rest
            return f"system prompt: {self.system}" if self.system else "no system prompt"
        if name == "think":
            if rest not in ("", "on", "off"):
                raise KilnError("/think takes on or off")
            wanted = not self.think if not rest else rest == "on"
            if wanted and not self.dialect.template.manner.switch:
                raise KilnError("this model's chat template has no switch for thinking")
            self.think = wanted
            return f"thinking is {'on' if self.think else 'off'}"
        if name == "regenerate":
            self.regenerate(show)
            return None
        if name == "new":
            self.messages = []
            self.player.begin()
            return "a new conversation"
        if name in ("save", "load"):
            if not rest:
                raise KilnError(f"/{name} needs the name of a file")
            path = Path(rest).expanduser()
            said = self.save(path) if name == "save" else self.load(path)
            return f"{'saved to' if name == 'save' else 'loaded'} {path}: {len(self.messages)} messages{said}"
        if name == "tokens":
            return self.tokens()
        if name == "speed":
            return self.last.text() if self.last else "there is no answer yet"
        raise KilnError(f"/{name[:40]} is no command; /help lists them")
