"""Cuts the vocabulary of a byte-level tokenizer down to what some texts need, for tests/fixtures/tokenizers.

A merge that a text's encoding never makes cannot change that encoding by its absence: of all pairs the lowest rank is joined, and the
lowest is still there. So the small vocabulary gives those texts the ids of the whole one, which `ids` keeps.

python -m tests.tools.cut_vocabulary GGUF CASES.json OUT.json: the texts are those of the cases and of `random_text`, in every cut.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.tokenizer import CONTROL, PREFIX, USER_DEFINED, pre_tokenizers, read_tokenizer
from kiln.exporter.text.encoder import ALPHABET, Encoder

SEED, STRINGS = 15, 300
KEPT = ("model", "pre", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "add_bos_token", "add_space_prefix")

ALPHABETS = ["abcdefghij ", " \n\t\r\u2581\u00a0\u2003\x1c\x85", "0123456789.,-+\u00bd\u2167\u0663",
             "\u00e4\u00f6\u00fc\u00df\u00e9\u00f1\u017f\u212a'",
             "\u6211\u60f3\u5728\u5de5\u4f5c ", "\u1780\u17b6\u1793\u17cb\u178f\u17c2", "\U0001f680\U0001f636\u200d\U0001f32b\ufe0f\u2705",
             "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 e\u0301", "'\"`!?=<|>_", "'sS'tT'reRE'veVE'llLL'mM'dD ",
             "\u0001\u0002\u007f\ue000\ufffd"]  # fmt: skip
WORDS = ["the ", "Hello", " world", "  ", "\n\n\n", "def f(x):\n    return x\n", "I've", "DON'T", "</s>", "<b>", "\t\t", "     ", "\r\n",
         " 123"]  # fmt: skip


def random_text(rng: random.Random, specials: list[str]) -> str:
    parts = []
    for _ in range(rng.randrange(1, 30)):
        parts.append(
            rng.choice(WORDS + specials) if rng.random() < 0.5 else "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(1, 9)))
        )
    return "".join(parts)


def random_texts(specials: list[str]) -> list[str]:
    rng = random.Random(SEED)
    return [random_text(rng, specials) for _ in range(STRINGS)]


class Recording(Encoder):
    """Keeps the pairs that encoding joins."""

    def __init__(self, document: dict[str, Any]):
        super().__init__(document)
        self.pairs: set[tuple[str, str]] = set()
        self._whole = {}  # a token that is taken whole is made by merges, too

    def _joined(self, symbols: list[str]) -> list[str]:
        while True:
            found = [(self._ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in self._ranks]
            if not found:
                return symbols
            _, i = min(found)
            self.pairs.add((symbols[i], symbols[i + 1]))
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def cut(gguf: Path, texts: list[str | bytes]) -> dict[str, Any]:
    metadata = open_gguf(gguf).metadata
    tokenizer = read_tokenizer(metadata)
    assert tokenizer
    pairs: set[tuple[str, str]] = set()
    for pre in dict.fromkeys(tuple(table["split"]) for table in pre_tokenizers().values()):
        document = tokenizer.document()
        document["pre_tokenizer"]["pretokenizers"] = [{"type": "Split", "pattern": {"Regex": pattern}} for pattern in pre]
        recording = Recording(document)
        for text in texts:
            recording.encode(text)
            recording.encode(text, parse_special=True)
        pairs |= recording.pairs
    needed = set(ALPHABET) | {left + right for left, right in pairs}
    named = {int(metadata[PREFIX + key]) for key in KEPT if key.endswith("_id") and PREFIX + key in metadata}
    padding = [i for i, text in enumerate(tokenizer.tokens) if text.startswith("[PAD")]
    kept = [i for i, text in enumerate(tokenizer.tokens)
            if i not in padding and (text in needed or i in named or tokenizer.types[i] in (CONTROL, USER_DEFINED))]  # fmt: skip
    place = {i: at for at, i in enumerate(kept)}
    keys = {PREFIX + key: metadata[PREFIX + key] for key in KEPT if PREFIX + key in metadata}
    return {
        "ids": kept,
        "metadata": {
            **{key: place[value] if key.endswith("_id") else value for key, value in keys.items()},
            f"{PREFIX}tokens": [tokenizer.tokens[i] for i in kept],
            f"{PREFIX}token_type": [tokenizer.types[i] for i in kept],
            f"{PREFIX}merges": [f"{left} {right}" for left, right in tokenizer.merges if (left, right) in pairs],
            "tokenizer.chat_template": metadata["tokenizer.chat_template"],
        },
    }


def case_text(case: list[Any]) -> str | bytes:
    return bytes.fromhex(case[0]["hex"]) if isinstance(case[0], dict) else case[0]


if __name__ == "__main__":
    source, cases, out = map(Path, sys.argv[1:])
    given = json.loads(cases.read_text())
    asked = [case_text(c) for c in given["cases"]] + [c["text"] for c in given.get("chat", [])]
    record = cut(source, asked + random_texts(["<|im_end|>", "<|im_start|>"]))
    out.write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(len(record["ids"]), "tokens", len(record["metadata"][f"{PREFIX}merges"]), "merges")
