"""The reference tokenizer: what runtime_cpp/src/text does with a tokenizer.json, in plain Python.

Three kinds (docs/ARTIFACT.md): merges over text that spells a space U+2581, merges over bytes in GPT-2's alphabet, and joins by score.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from operator import add
from pathlib import Path
from typing import Any

from kiln.exporter.text.pattern import compiled, isolated

SPACE = "\u2581"
SCORED = "ScoredBPE"  # model.type; not one of the `tokenizers` library, which would pass over the ranks
_POSITION = (1 << 32) - 1
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as Python's "surrogateescape" holds them


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: its own where that is printable in Latin-1, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(other)) for b in range(256)]


ALPHABET = byte_alphabet()
_TO_ALPHABET = {b: c for b, c in enumerate(ALPHABET)}
_FROM_ALPHABET = {c: b for b, c in enumerate(ALPHABET)}


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte that is not UTF-8; a surrogate's three bytes are taken as they are."""
    assert isinstance(error, UnicodeDecodeError)
    three = error.object[error.start : error.start + 3]
    if len(three) == 3 and three[0] == 0xED and 0xA0 <= three[1] <= 0xBF and 0x80 <= three[2] <= 0xBF:
        return three.decode("utf-8", "surrogatepass"), error.start + 3
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("kiln.replaced", _replaced)


def byte_of(text: str) -> int | None:
    """The byte of a token "<0xHH>", None for any other text."""
    return int(text[3:5], 16) if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else None


def announced(byte: int) -> int:
    """The length of a character of UTF-8 that begins with this byte; 1 for a byte that cannot begin one."""
    return 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


class Encoder:
    """A tokenizer.json, read. ValueError or KeyError where it is none that the exporter writes."""

    def __init__(self, document: dict[str, Any]):
        model = document["model"]
        self.scored = model["type"] == SCORED
        self.bytewise = not self.scored and not model["byte_fallback"]
        added = document["added_tokens"]
        special = {t["id"] for t in added}
        ordinary = {text: i for text, i in model["vocab"].items() if i not in special}
        every = {i: text for text, i in ordinary.items()} | {t["id"]: t["content"] for t in [*added, *model.get("duplicates", [])]}
        self._control = {t["id"] for t in [*added, *model.get("duplicates", [])] if t["special"]}
        self._ordinary = ordinary
        self._pieces = {i: text.encode("utf-8", "surrogatepass") if i in special else self._bytes(text) for i, text in every.items()}
        self._whole: dict[str, int] = ordinary if model.get("ignore_merges") else {}
        # Text alone never becomes a special token, nor a byte's.
        if self.scored:
            self._ranks: dict[Any, int] = {text: model["ranks"][i] for text, i in ordinary.items() if byte_of(text) is None}
        else:
            self._ranks = {}
            for rank, (left, right) in enumerate(model["merges"]):
                if left + right in ordinary:
                    self._ranks.setdefault((left, right), rank)
        self._key: Any = add if self.scored else lambda left, right: (left, right)
        self._fallback = {b: ordinary[f"<0x{b:02X}>"] for b in range(0 if self.bytewise else 256)}
        self._splits = [compiled(p["pattern"]["Regex"]) for p in _steps(document["pre_tokenizer"], "pretokenizers") if p["type"] == "Split"]
        self._prefix = any(step["type"] == "Prepend" for step in _steps(document["normalizer"], "normalizers"))
        self._special: dict[str, tuple[int, bool]] = {}  # text -> id, whether any text has it cut out
        for t in added:
            self._special.setdefault(t["content"], (t["id"], self.scored and not t["special"]))
        self._lengths: dict[str, list[int]] = {}  # first character -> lengths, longest first
        for text in self._special:
            self._lengths.setdefault(text[0], []).append(len(text))
        self._lengths = {c: sorted(set(found), reverse=True) for c, found in self._lengths.items()}
        self._anywhere = {text[0] for text, (_, always) in self._special.items() if always}
        self.bos, self.eos = _ends(document)
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def load(cls, path: str | Path) -> Encoder:
        return cls(json.loads(Path(path).read_bytes()))

    def __len__(self) -> int:
        return len(self._pieces)

    # ---- text -> ids ----

    def encode(self, text: str | bytes, parse_special: bool = False, add_bos: bool = True, add_eos: bool = False) -> list[int]:
        """With `add_bos` and `add_eos` exactly one of each where the tokenizer has it. A text to be continued has no EOS."""
        ids = self.encode_segments([(text, parse_special)], add_bos)
        return ids + [self.eos] if add_eos and self.eos is not None and ids[-1:] != [self.eos] else ids

    def encode_chat(self, prefix: str, user: str | bytes, suffix: str, trimmed: bool = True) -> list[int]:
        """One user turn: control tokens are parsed in what the template wrote, never in what the user did."""
        text = self._decoded(user)
        return self._encoded([(prefix, True), (text.strip() if trimmed else text, False), (suffix, True)], True)

    def encode_segments(self, segments: Iterable[tuple[str | bytes, bool]], add_bos: bool = True) -> list[int]:
        """Ids of texts one after the other, each with whether special tokens are parsed in it. Ordinary text may run on across them."""
        return self._encoded([(self._decoded(text), parse) for text, parse in segments], add_bos)

    def _encoded(self, parts: Sequence[tuple[str, bool]], add_bos: bool) -> list[int]:
        text = "".join(part for part, _ in parts)
        ids: list[int] = []
        at = 0
        for start, end, token in self._cuts(text, parts):
            if at < start:
                ids += self._plain(text[at:start])
            ids.append(token)
            at = end
        if at < len(text):
            ids += self._plain(text[at:])
        return [self.bos, *ids] if add_bos and self.bos is not None and ids[:1] != [self.bos] else ids

    def _decoded(self, text: str | bytes) -> str:
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return raw.decode("utf-8", "kiln.replaced" if self.bytewise else "surrogateescape")

    def _cuts(self, text: str, parts: Sequence[tuple[str, bool]]) -> Iterable[tuple[int, int, int]]:
        """(start, end, id) of special tokens, leftmost and longest first. Those not cut out of any text lie within one parsed part."""
        if not self._anywhere and not any(parse for _, parse in parts):
            return
        at = begin = 0
        for part, parse in parts:
            limit = begin + len(part)
            firsts = self._lengths.keys() if parse else self._anywhere
            look = re.compile("[" + "".join(map(re.escape, firsts)) + "]") if firsts else None
            at = max(at, begin)
            while look and (found := look.search(text, at, limit)):
                at = found.start()
                for length in self._lengths[text[at]]:
                    known = self._special.get(text[at : at + length])
                    if known and (known[1] or (parse and at + length <= limit)):
                        yield at, at + length, known[0]
                        at += length
                        break
                else:
                    at += 1
            begin = limit

    def _plain(self, text: str) -> list[int]:
        """Ids of a text without special tokens, which begins the whole or follows one."""
        if not self.bytewise:
            text = (SPACE if self._prefix else "") + text.replace(" ", SPACE)
        ids: list[int] = []
        for piece in isolated(self._splits, text):
            if len(piece) > 64:
                ids += self._merged(piece)
                continue
            found = self._cache.get(piece)
            if found is None:
                found = self._cache[piece] = self._merged(piece)
            ids += found
        return ids

    def _merged(self, piece: str) -> list[int]:
        if self.bytewise:
            piece = piece.encode("utf-8", "surrogatepass").decode("latin-1").translate(_TO_ALPHABET)
            if piece in self._whole:
                return [self._whole[piece]]
        ids: list[int] = []
        for symbol in self._joined(self._symbols(piece)):
            token = self._ordinary.get(symbol)
            if token is not None:
                ids.append(token)
            elif not self.bytewise:  # a byte that the vocabulary of the other kind lacks has no token at all
                ids += (self._fallback[b] for b in symbol.replace(SPACE, " ").encode("utf-8", "surrogateescape"))
        return ids

    def _symbols(self, piece: str) -> list[str]:
        """Characters. With joins by score one that is not UTF-8 has as many bytes as its first byte announces, as in SentencePiece."""
        if not self.scored or not _ESCAPED.search(piece):
            return list(piece)
        raw, at, symbols = piece.replace(SPACE, " ").encode("utf-8", "surrogateescape"), 0, []
        while at < len(raw):
            end = at + announced(raw[at])
            symbols.append(raw[at:end].decode("utf-8", "surrogateescape"))
            at = end
        return [SPACE if s == " " else s for s in symbols]

    def _joined(self, symbols: list[str]) -> list[str]:
        """Neighbours are joined, the lowest rank first, leftmost first, until none can be. Candidates wait in a heap: O(n log n)."""
        rank, key, n = self._ranks.get, self._key, len(symbols)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        found = map(rank, map(key, symbols, symbols[1:]))
        heap = [r << 32 | i for i, r in enumerate(found) if r is not None]
        heapify(heap)
        while heap:
            top = heappop(heap)
            i = top & _POSITION
            left, j = symbols[i], after[i]
            if not left or j == n or rank(key(left, symbols[j])) != top >> 32:
                continue  # one of the two has changed since
            left += symbols[j]
            symbols[i], symbols[j] = left, ""
            k = after[i] = after[j]
            if k < n:
                before[k] = i
                if (r := rank(key(left, symbols[k]))) is not None:
                    heappush(heap, r << 32 | i)
            k = before[i]
            if k >= 0 and (r := rank(key(symbols[k], left))) is not None:
                heappush(heap, r << 32 | k)
        return [s for s in symbols if s]

    # ---- ids -> text ----

    def piece(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes of one token, none of a control token with `skip_special`. KeyError outside of the vocabulary."""
        return b"" if skip_special and token in self._control else self._pieces[token]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Bytes that are not UTF-8 become U+FFFD. The space that encoding puts in front is taken off."""
        raw = b"".join(self.piece(i, skip_special) for i in ids)
        return (raw[1:] if self._prefix and raw[:1] == b" " else raw).decode("utf-8", "replace")

    def _bytes(self, text: str) -> bytes:
        if self.bytewise:
            found = [_FROM_ALPHABET.get(c) for c in text]
            return text.encode("utf-8", "surrogatepass") if None in found else bytes(b for b in found if b is not None)
        byte = byte_of(text)
        return text.replace(SPACE, " ").encode("utf-8", "surrogatepass") if byte is None else bytes([byte])


class Stream:
    """Text from a stream of tokens: the bytes of a character that is not complete yet are held back."""

    def __init__(self, encoder: Encoder, skip_special: bool = True):
        self._encoder, self._skip = encoder, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._encoder.piece(token, self._skip))

    def finish(self) -> str:
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


def _steps(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """A step of the document, or those of a sequence."""
    return [] if step is None else step[members] if step["type"] == "Sequence" else [step]


def _ends(document: dict[str, Any]) -> tuple[int | None, int | None]:
    """The ids that go in front of a text and behind it."""
    processor = document["post_processor"]
    if processor is None:
        return None, None
    bos = eos = None
    before = True
    for item in processor["single"]:
        if special := item.get("SpecialToken"):
            token = processor["special_tokens"][special["id"]]["ids"][0]
            bos, eos = (token, eos) if before else (bos, token)
        else:
            before = False
    return bos, eos
