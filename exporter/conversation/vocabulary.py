"""What a conversation needs of an artifact's tokenizer: ids of plain text, bytes of ids, and the special tokens' texts."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from kiln.exporter.errors import KilnError


class Pieces(Protocol):
    """`kiln.Tokenizer`."""

    @property
    def bos(self) -> int | None: ...

    def encode(self, text: str, parse_special: bool = False, add_bos: bool = True) -> list[int]: ...

    def piece(self, id: int, skip_special: bool = True) -> bytes: ...


class Encoded:
    """Ids of long texts that were encoded lately: each turn of a conversation brings all those before it along again. For any thread."""

    LEAST, MOST = 1 << 10, 4 << 20  # characters of a text that is worth it, and of all that are kept

    def __init__(self) -> None:
        self._ids, self._characters, self._lock = OrderedDict[str, list[int]](), 0, threading.Lock()

    def of(self, pieces: Pieces, text: str) -> list[int]:
        """As `Pieces.encode`, control tokens being text."""
        if not self.LEAST <= len(text) <= self.MOST:
            return pieces.encode(text, parse_special=False, add_bos=False)
        with self._lock:
            if text in self._ids:
                self._ids.move_to_end(text)
                return list(self._ids[text])
        found = pieces.encode(text, parse_special=False, add_bos=False)
        with self._lock:
            if text not in self._ids:
                self._ids[text] = list(found)
                self._characters += len(text)
            while self._characters > self.MOST:
                self._characters -= len(self._ids.popitem(last=False)[0])
        return found


@dataclass(frozen=True)
class Vocabulary:
    """special: text -> id of every control and user-defined token. ends: the ids that end a generation."""

    pieces: Pieces
    special: Mapping[str, int]
    ends: frozenset[int]
    _encoded: Encoded = field(default_factory=Encoded, compare=False, repr=False)

    @cached_property
    def texts(self) -> Mapping[int, str]:
        """id -> text of every special token."""
        return {i: text for text, i in self.special.items()}

    @cached_property
    def marked(self) -> str:
        """Characters without which no text is a special token's, and with which none begins or ends: "<>" of Gemma's.

        White space stays as it is, for templates look at it: a token of white space is text wherever it stands.
        """
        found: set[str] = set()
        for text in self.parsed:
            signs = [c for c in text if not c.isalnum() and not c.isspace()]
            found |= {signs[0], signs[-1]} if signs else set()
        return "".join(sorted(found))

    @cached_property
    def parsed(self) -> tuple[str, ...]:
        """The special tokens that a template's text may hold, longest first: a plain word could not be told from a user's."""
        texts = [t for t in self.special if t and (t.isspace() or any(not c.isalnum() and not c.isspace() for c in t))]
        return tuple(sorted(texts, key=lambda t: (-len(t), t)))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.parsed)) or r"(?!)")

    def split(self, text: str) -> list[str | int]:
        """A template's text as plain pieces and ids of special tokens, in order. No piece is empty."""
        found: list[str | int] = []
        at = 0
        for match in self._pattern.finditer(text):
            if match.start() > at:
                found.append(text[at : match.start()])
            found.append(self.special[match.group()])
            at = match.end()
        return [*found, text[at:]] if at < len(text) else found

    def ids(self, piece: str | int) -> list[int]:
        return [piece] if isinstance(piece, int) else self._encoded.of(self.pieces, piece)


def special_tokens(path: Path) -> dict[str, int]:
    """Text -> id of the special tokens of a tokenizer.json. They stand at its head: 13 MB of words are not parsed for them."""
    try:
        text = path.read_text(encoding="utf-8")
        key = text.find('"added_tokens"')
        at = text.find("[", key)
        added: Any = json.JSONDecoder().raw_decode(text, at)[0] if 0 <= key < at else []
        return {token["content"]: token["id"] for token in added}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise KilnError(f"{path} is no tokenizer of an artifact: {e}; export it again") from e


def vocabulary(pieces: Pieces, path: Path, ends: Iterable[int]) -> Vocabulary:
    """Of an artifact: its `kiln.Tokenizer`, its tokenizer.json, and the manifest's ids that end a generation."""
    return Vocabulary(pieces, special_tokens(path), frozenset(ends))
