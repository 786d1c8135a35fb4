"""The tokenizer of a GGUF file: its metadata, checked once, and the tokenizer.json made of it.

The output is the `tokenizers` BPE format, so that the runner and the `tokenizers` library read the same file. What that format cannot
hold, a text that several ids have, is in `model.duplicates`, which the library passes over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kiln.exporter.errors import KilnError
from kiln.exporter.files import write_text

PREFIX = "tokenizer.ggml."
EOG_TEXTS = ("<eos>", "<turn|>", "<|tool_response>")  # Gemma's, whatever type the file gives them
# Texts that end a turn in other families' chat formats, which fine-tunes adopt: only as control or user-defined tokens. `</s>` is an
# ordinary token of Gemma.
END_TEXTS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<|return|>",
             "<|call|>", "<EOT>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>")  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF token types
SPACE = "\u2581"
_NO_TOKEN = (-1, 0xFFFFFFFF)  # how converters say that there is none
_ENDS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eot_token_ids", "eom_token_id", "eom_token_ids")
# Keys below tokenizer.ggml. that are applied here, or concern nothing that is computed.
_APPLIED = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "unknown_token_id", "suppress_tokens", *_ENDS)
_HARMLESS = ("scores", "token_type_count", "add_bos_token")  # BOS is written whatever add_bos_token says: the model was trained so
# Keys that change the ids, and the value with which they change nothing.
_NEUTRAL = {"add_space_prefix": False, "add_eos_token": False, "add_sep_token": False, "remove_extra_whitespaces": False,
            "escape_whitespaces": True, "treat_whitespace_as_suffix": False, "normalizer.lowercase": False,
            "add_mask_token": False, "add_padding_token": False, "add_unknown_token": False}  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """Texts and GGUF types by id, merges (left, right) in order of rank, and the ids with a meaning. `ends` stop a generation."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    bos: int | None
    unknown: int | None
    ends: tuple[int, ...]
    declared: frozenset[int]  # named by a key: control tokens whatever their type says, but for bytes, which text needs

    def text(self, token: int | None) -> str:
        return "" if token is None else self.tokens[token]

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"bos": self.bos, "eog": list(self.ends)}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Text -> the id that encoding gives: the lowest that has it, of an ordinary token where there is one."""
        found: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            if not self.is_special(i):
                found.setdefault(text, i)
        for i, text in enumerate(self.tokens):
            found.setdefault(text, i)
        return found

    def is_control(self, token: int) -> bool:
        return self.types[token] == CONTROL or token in self.declared

    def is_special(self, token: int) -> bool:
        """Never made from the text of a user."""
        return bool(self.tokens[token]) and (self.is_control(token) or self.types[token] == USER_DEFINED)

    def document(self) -> dict[str, Any]:
        """tokenizer.json."""
        first: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            if self.is_special(i):
                first.setdefault(text, i)
        added = [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": self.is_control(i)}
            for text, i in first.items()
        ]  # fmt: skip
        held = set(self.vocabulary.values()) | set(first.values())
        duplicates = [{"id": i, "content": text, "special": self.is_control(i)} for i, text in enumerate(self.tokens) if i not in held]
        return {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            # No merge mixes newlines with other characters, so this split changes no id: it only shortens the runs.
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated", "invert": False},
            "post_processor": _bos_processor(self.tokens[self.bos], self.bos) if self.bos is not None else None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                                                         {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": self.tokens[self.unknown] if self.unknown is not None else None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                      "byte_fallback": True, "ignore_merges": False, "vocab": self.vocabulary, "merges": self.merges}
            | ({"duplicates": duplicates} if duplicates else {}),
        }  # fmt: skip

    def write(self, path: str | Path) -> None:
        """Writes tokenizer.json. Raises KilnError when it cannot be written."""
        write_text(Path(path), json.dumps(self.document(), ensure_ascii=False, separators=(",", ":")), "the tokenizer")


def read_tokenizer(metadata: Mapping[str, Any], vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer of GGUF metadata, None where there is none. `vocab_size`: of the model.

    Raises KilnError when the tokenizer is of another kind, contradicts itself, or asks for what is not applied.
    """
    model, pre = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}pre")
    if model is None or model in ("none", "no_vocab"):
        return None
    # Ollama's blobs say "llama" for every tokenizer that spells spaces with U+2581, and tell which one it is by `pre`.
    if not (model == "gemma4" and pre in (None, "", "default", "gemma4")) and not (model == "llama" and pre == "gemma4"):
        other = f" with {PREFIX}pre {pre!r}" if pre is not None else ""
        raise KilnError(f"{PREFIX}model is {model!r}{other}; supported: 'gemma4', or 'llama' with pre 'gemma4'")
    _check_keys(metadata)
    tokens = _texts(metadata, "tokens")
    merges = tuple(_split_merge(m) for m in _texts(metadata, "merges"))
    types = [int(t) if isinstance(t, int | float) and t == t else -1 for t in _required(metadata, "token_type")]
    if len(types) != len(tokens):
        raise KilnError(f"{PREFIX}token_type has {len(types)} entries, {PREFIX}tokens has {len(tokens)}")
    if bad := [t for t in set(types) if not NORMAL <= t <= BYTE]:
        raise KilnError(f"{PREFIX}token_type has the unknown type {bad[0]}; the types are 1 to 6")
    if vocab_size is not None and vocab_size != len(tokens):
        raise KilnError(f"{PREFIX}tokens has {len(tokens)} entries, the model has a vocabulary of {vocab_size}")
    known = set(tokens)
    for left, right in merges:
        if left not in known or right not in known or left + right not in known:
            raise KilnError(f"{PREFIX}merges: {left!r} + {right!r} names a token that is not in the vocabulary")
    bytewise = {text for text, t in zip(tokens, types, strict=True) if _is_byte(text) and t not in (CONTROL, USER_DEFINED)}
    lacking = [b for b in range(256) if f"<0x{b:02X}>" not in bytewise]
    if lacking:
        raise KilnError(f"{PREFIX}tokens has no token for byte {lacking[0]} (<0x{lacking[0]:02X}>); text outside the vocabulary needs it")

    bos, unknown = (_one(metadata, key, len(tokens)) for key in ("bos_token_id", "unknown_token_id"))
    index: dict[str, int] = {}
    for i, text in enumerate(tokens):
        index.setdefault(text, i)
    if bos is None and types[index.get("<bos>", 0)] == CONTROL:
        bos = index.get("<bos>")
    named = [i for key in _ENDS for i in _ids(metadata, key, len(tokens))]
    ends = [index[text] for text in EOG_TEXTS if text in index]
    ends += [i for i, text in enumerate(tokens) if text in EOG_TEXTS and types[i] in (CONTROL, USER_DEFINED)]
    ends += [i for i, text in enumerate(tokens) if text in END_TEXTS and types[i] in (CONTROL, USER_DEFINED)] + named
    # Files from April 2026 type <eos> as an ordinary token; what names the stream's ends is a control token all the same.
    declared = frozenset(i for i in (bos, unknown, *named) if i is not None and not _is_byte(tokens[i]))
    return Tokenizer(tuple(tokens), tuple(types), merges, bos, unknown, tuple(dict.fromkeys(ends)), declared)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _check_keys(metadata: Mapping[str, Any]) -> None:
    """KilnError for a key that changes the ids and is not applied."""
    for key in metadata:
        name = key.removeprefix(PREFIX)
        if name == key or name in _APPLIED or name in _HARMLESS or name.endswith("_token_id"):
            continue
        value = metadata[key]
        if name not in _NEUTRAL and not (name == "precompiled_charsmap" and not value):
            raise KilnError(f"metadata key {key} is not known to Kiln and may change the token ids; convert the model without it")
        if name in _NEUTRAL and bool(value) != _NEUTRAL[name]:
            raise KilnError(f"metadata key {key} is {value!r}: it changes the token ids and is not applied; convert the model without it")


def _required(metadata: Mapping[str, Any], name: str) -> list:
    value = metadata.get(PREFIX + name)
    if value is None:
        raise KilnError(f"the GGUF file has a tokenizer but no {PREFIX}{name}; convert the model again with a current converter")
    if isinstance(value, str | bytes | int | float):
        raise KilnError(f"{PREFIX}{name} is {str(value)[:40]!r}, a list was expected; convert the model again")
    return list(value)


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = _required(metadata, name)
    if any(not isinstance(v, str) for v in values):
        raise KilnError(f"{PREFIX}{name} is no list of texts; convert the model again")
    return values


def _ids(metadata: Mapping[str, Any], name: str, size: int) -> list[int]:
    """The token ids of a key that holds one or several, of any number type; none where it is absent or says so."""
    value = metadata.get(PREFIX + name)
    found = []
    for item in value if isinstance(value, list | tuple) else [] if value is None else [value]:
        whole = isinstance(item, int | float) and not isinstance(item, bool) and item == item and abs(item) < 1 << 40 and item == int(item)
        if whole and int(item) in _NO_TOKEN:
            continue
        if not whole or not 0 <= item < size:
            raise KilnError(f"{PREFIX}{name} is {str(item)[:40]}, the vocabulary has {size} tokens")
        found.append(int(item))
    return found


def _one(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    ids = _ids(metadata, name, size)
    if len(set(ids)) > 1:
        raise KilnError(f"{PREFIX}{name} names {len(ids)} tokens, one was expected")
    return ids[0] if ids else None


def _split_merge(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)  # from 1: the left part may itself be a space
    if at < 0:
        raise KilnError(f"{PREFIX}merges: {merge[:80]!r} is not 'left right'")
    return merge[:at], merge[at + 1 :]


def _bos_processor(text: str, bos: int) -> dict[str, Any]:
    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": type_id}}

    return {"type": "TemplateProcessing", "single": [special(0), sequence("A", 0)],
            "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}}}  # fmt: skip
