"""Training sequences: text from the grammar and the Python library's documentation, as tokens, positions and classes.

A sequence may jump in position where a line ends, so that short sequences show distances of up to 131,072 tokens.
Every batch is made from (seed, stream, index) alone.
"""

from __future__ import annotations

import inspect
import math
import re
import sysconfig
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.pool import Pool
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from kiln.exporter.errors import KilnError
from tests.nano import grammar
from tests.nano.vocabulary import BOS, EOS

MAX_POSITION = 131072
IGNORED, TEXT, USER, VALUE = range(4)  # classes of a target token: padding, text, what a user says, what must be recalled
USER_OPEN, MODEL_OPEN = "<|turn>user\n", "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
TURN_CLOSE = "<turn|>\n"
LIBRARY_CHARS = 1600  # of one document from the library
LIBRARY_SHARE = 0.12  # of the plain documents
HELD_OUT = 20  # one library module of so many is never trained on
CHARS_PER_TOKEN = 5.5  # more than any text has: what is generated fills a sequence

Piece = tuple[str, int]  # text, class; pieces meet where no token can cross
Doc = list[Piece]


@dataclass
class Batch:
    """tokens [n, T + 1] uint16; positions [n, T + 1] int32; classes [n, T + 1] uint8, of the token itself."""

    tokens: np.ndarray
    positions: np.ndarray
    classes: np.ndarray


@lru_cache(2)
def library_text(held_out: bool) -> tuple[str, ...]:
    """Docstrings of the Python standard library (PSF licence), one document each; `held_out` ones are of other modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    docs = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if re.match(r"(site-packages|dist-packages|test|idlelib|lib2to3|ensurepip|turtledemo)/|.*/tests?/", name):
            continue
        if (zlib.crc32(name.encode()) % HELD_OUT == 0) != held_out:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        for text in re.findall(r'"""(.+?)"""', source, re.S):
            text = inspect.cleandoc(text)
            if len(text) >= 120 and text.isascii():
                docs.append(text)
    return tuple(docs)


def passages(rng: Random, chars: int) -> list[str]:
    """Lines of prose, at least `chars` characters."""
    lines: list[str] = []
    size = 0
    while size < chars:
        new = grammar.passage(rng)
        lines += new
        size += sum(len(line) for line in new)
    return lines


def document(rng: Random, held_out: bool = False) -> str:
    """One plain document, without special tokens: passages, or a piece of the library's documentation."""
    library = library_text(held_out)
    if library and rng.random() < LIBRARY_SHARE:
        text = rng.choice(library)
        start = rng.randrange(max(1, len(text) - LIBRARY_CHARS))
        start = text.rfind("\n", 0, start) + 1
        return text[start : start + LIBRARY_CHARS].rstrip()
    return "\n\n".join("\n".join(grammar.passage(rng)) for _ in range(rng.randint(1, 5)))


def chat(turns: list[grammar.Turn]) -> Doc:
    doc: Doc = []
    for user, answer in turns:
        doc += [(USER_OPEN + user, USER), (MODEL_OPEN, USER), (answer + TURN_CLOSE, TEXT)]
    return doc


def answered(secret: grammar.Secret) -> Doc:
    """From the end of the user's text to the end of the model's turn."""
    return [(MODEL_OPEN, USER), (secret.lead, TEXT), (secret.value, VALUE), (secret.end + TURN_CLOSE, TEXT)]


def secrets(rng: Random, length: int, kind: str | None = None) -> list[grammar.Secret]:
    kind = kind or rng.choice(("passkey", "passkey", "dictionary"))
    if kind == "passkey":
        return grammar.passkeys(rng, rng.choice((1, 1, 2, 4, 8)))
    return grammar.dictionary(rng, rng.choice((4, 8, 16, 32 if length >= 512 else 16)))


def hide(rng: Random, lines: list[str], hidden: list[grammar.Secret]) -> list[str]:
    """The secrets' lines put among others: each on its own, or all in one block."""
    if rng.random() < 0.3:
        at = rng.randint(0, len(lines))
        return lines[:at] + [s.line for s in hidden] + lines[at:]
    lines = list(lines)
    for secret in hidden:
        lines.insert(rng.randint(0, len(lines)), secret.line)
    return lines


class Maker:
    """Makes sequences with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def batch(self, rng: Random, count: int, length: int, recall: float = 0.4, held_out: bool = False) -> Batch:
        """`count` sequences of length + 1 tokens, a share `recall` of them about remembering."""
        size = length + 1
        tokens = np.zeros((count, size), np.uint16)
        positions = np.zeros((count, size), np.int32)
        classes = np.zeros((count, size), np.uint8)
        for row in range(count):
            remember = rng.random() < recall
            ids, kinds, breaks = self.recall(rng, size) if remember else self.packed(rng, size, held_out)
            n = min(len(ids), size)
            tokens[row, :n], classes[row, :n] = ids[:n], kinds[:n]
            positions[row] = jumps(rng, size, [b for b in breaks if b < n], still=0.25 if remember else 0.5)
        return Batch(tokens, positions, classes)

    def packed(self, rng: Random, size: int, held_out: bool = False) -> tuple[list[int], list[int], list[int]]:
        """Documents and conversations one after another, each from <bos> to <eos>; (ids, classes, where positions may jump)."""
        docs: list[Doc] = []
        chars = 0
        while chars < size * CHARS_PER_TOKEN:
            doc = [(document(rng, held_out), TEXT)] if rng.random() < 0.45 else chat(grammar.conversation(rng))
            docs.append(doc)
            chars += sum(len(text) for text, _ in doc)
        encoded = iter(self.ids([text for doc in docs for text, _ in doc]))
        ids: list[int] = []
        kinds: list[int] = []
        breaks: list[int] = []
        for doc in docs:
            breaks.append(len(ids))
            ids.append(BOS)
            kinds.append(IGNORED)
            for _, kind in doc:
                piece = next(encoded)
                ids += piece
                kinds += [kind] * len(piece)
            ids.append(EOS)
            kinds.append(TEXT)
            if len(ids) >= size:
                break
        return ids, kinds, breaks

    def recall(self, rng: Random, size: int) -> tuple[list[int], list[int], list[int]]:
        """One long user turn that hides secrets among prose, then questions about them until the sequence is full."""
        hidden = secrets(rng, size)
        asked = rng.sample(hidden, min(len(hidden), rng.randint(1, 8)))
        tail = [piece for i, s in enumerate(asked) for piece in [((USER_OPEN if i else "") + s.question, USER), *answered(s)]]
        tail_ids = self.ids([text for text, _ in tail])
        head = self.ids([USER_OPEN])[0]
        room = size - 2 - len(head) - sum(map(len, tail_ids))
        lines = passages(rng, int(max(0, room) * CHARS_PER_TOKEN))
        encoded = self.ids([line + "\n" for line in lines] + [s.line + "\n" for s in hidden])
        room -= sum(map(len, encoded[len(lines) :]))
        kept = []
        for line, e in zip(lines, encoded, strict=False):
            if len(e) > room:
                break
            kept.append(line)
            room -= len(e)
        table = dict(zip([*lines, *(s.line for s in hidden)], encoded, strict=True))
        ids = [BOS, *head]
        kinds = [IGNORED] + [USER] * len(head)
        breaks: list[int] = []
        for line in hide(rng, kept, hidden):
            breaks.append(len(ids))
            ids += table[line]
            kinds += [USER] * len(table[line])
        breaks.append(len(ids))
        for (text, piece_kind), piece in zip(tail, tail_ids, strict=True):
            if text.startswith(USER_OPEN):
                breaks.append(len(ids))
            ids += piece
            kinds += [piece_kind] * len(piece)
        ids.append(EOS)
        kinds.append(TEXT)
        return ids, kinds, breaks

    def haystack(self, rng: Random, length: int, needles: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """A context of `length` tokens (or a few less) that hides `needles` passkeys, and for each (ids up to its value, ids of it)."""
        hidden = grammar.passkeys(rng, needles)
        return self.user_turn(rng, hidden, length), [self.question(s) for s in hidden]

    def question(self, secret: grammar.Secret) -> tuple[list[int], list[int]]:
        """The ids from the question up to the value, and those of the value."""
        lead, value = self.ids([secret.question + MODEL_OPEN + secret.lead, secret.value])
        return lead, value

    def user_turn(self, rng: Random, hidden: list[grammar.Secret], length: int, reserved: int = 0) -> list[int]:
        """The open turn of a user, prose that hides the secrets' lines, of `length` - `reserved` tokens or a few less. Raises KilnError."""
        head = [BOS, *self.ids([USER_OPEN])[0]]
        secret_ids = self.ids([s.line + "\n" for s in hidden])
        room = length - reserved - len(head) - sum(map(len, secret_ids))
        kept: list[list[int]] = []
        for line in self.ids([line + "\n" for line in passages(rng, int(length * CHARS_PER_TOKEN))]):
            if len(line) > room:
                break
            kept.append(line)
            room -= len(line)
        if len(kept) < len(hidden):
            raise KilnError(f"{len(hidden)} keys do not fit into {length} tokens between other lines; give fewer keys or longer contexts")
        # spread evenly over the depth, with some jitter: every part of the context is asked about
        for i, piece in sorted(enumerate(secret_ids), reverse=True):
            kept.insert(int((i + rng.random()) / len(hidden) * len(kept)), piece)
        return head + [t for line in kept for t in line]


def jumps(rng: Random, size: int, breaks: list[int], still: float) -> np.ndarray:
    """Positions int32 [size]: rising by one, but for a few jumps at `breaks`; without any with probability `still`."""
    positions = np.arange(size, dtype=np.int32)
    if not breaks or rng.random() < still:
        return positions
    span = int(math.exp(rng.uniform(math.log(2 * size), math.log(max(2 * size, MAX_POSITION)))))
    chosen = sorted(rng.sample(breaks, min(len(breaks), rng.randint(1, 5))))
    shares = [rng.random() ** 2 for _ in chosen]
    for at, share in zip(chosen, shares, strict=True):
        positions[at:] += int(share / sum(shares) * (span - size))
    return positions


# ---- in other processes ----

_makers: dict[str, Maker] = {}


def make(tokenizer: str, seed: int, stream: str, index: int, count: int, length: int) -> Batch:
    """Batch `index` of `stream`; the same arguments give the same batch."""
    if tokenizer not in _makers:
        _makers[tokenizer] = Maker(Tokenizer.from_file(tokenizer))
    return _makers[tokenizer].batch(Random(f"{seed}/{stream}/{index}"), count, length, held_out=stream.startswith("held-out"))


def feed(pool: Pool | None, ahead: int, tokenizer: str, seed: int, stream: str, count: int, length: int) -> Iterator[Batch]:
    """Batches 0, 1, ... of a stream without end, up to `ahead` of them being made by the pool."""
    index, waiting = 0, deque()
    while True:
        while pool and len(waiting) < ahead:
            waiting.append(pool.apply_async(make, (tokenizer, seed, stream, index, count, length)))
            index += 1
        if pool:
            yield waiting.popleft().get()
        else:
            yield make(tokenizer, seed, stream, index, count, length)
            index += 1


def sample_text(seed: int, chars: int) -> Iterator[str]:
    """Lines to train the tokenizer on: all kinds of text, without special tokens."""
    rng, done = Random(f"{seed}/tokenizer"), 0
    while done < chars:
        if rng.random() < 0.5:
            text = document(rng)
        elif rng.random() < 0.7:
            text = "\n".join(f"{user}\n{answer}" for user, answer in grammar.conversation(rng))
        else:
            text = "\n".join(f"{s.line}\n{s.question}\n{s.answer}" for s in secrets(rng, 1024))
        done += len(text)
        yield from text.split("\n")


def held_out_text(seed: int, chars: int) -> str:
    """Plain text that no training batch holds: documents one after another, an empty line between them."""
    rng, docs, size = Random(f"{seed}/held-out text"), [], 0
    while size < chars:
        docs.append(document(rng, held_out=True))
        size += len(docs[-1])
    return "\n\n".join(docs) + "\n"
