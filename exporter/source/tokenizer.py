"""The tokenizer of a GGUF file: its metadata, checked once, and the tokenizer.json made of it.

The output is the `tokenizers` BPE format, so that the runner and the `tokenizers` library read the same file. What that format cannot
hold, a text that several ids have, is in `model.duplicates`, which the library passes over; joins by score are a model type of our own,
which the library refuses.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from kiln.exporter.errors import KilnError
from kiln.exporter.files import write_text
from kiln.exporter.source.fields import as_integer
from kiln.exporter.text.encoder import ALPHABET, SCORED, SPACE

PREFIX = "tokenizer.ggml."
EOG_TEXTS = ("<eos>", "<turn|>", "<|tool_response>")  # Gemma's, whatever type the file gives them
# Texts that end a turn in other families' chat formats, which fine-tunes adopt: only as control or user-defined tokens. `</s>` is an
# ordinary token of Gemma.
END_TEXTS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<|return|>",
             "<|call|>", "<EOT>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>")  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF token types
_NO_TOKEN = (-1, 0xFFFFFFFF)  # how converters say that there is none
_ENDS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eot_token_ids", "eom_token_id", "eom_token_ids")


class Kind(Enum):
    """How text becomes tokens (docs/ARTIFACT.md)."""

    SPELLED = "merges over text"  # a space is spelled U+2581, what has no token goes by bytes
    BYTES = "merges over bytes"  # in GPT-2's alphabet, after a cut by patterns
    SCORED = "joins by score"  # the text as with SPELLED, SentencePiece's order


# Keys below tokenizer.ggml. that are applied here, or concern nothing that is computed.
_APPLIED = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "unknown_token_id", "suppress_tokens", *_ENDS)
_HARMLESS = ("scores", "token_type_count", "add_bos_token")
# Keys that one kind applies. Without it BOS is written whatever add_bos_token says: those models were trained so.
_KINDS_OWN: dict[Kind, tuple[str, ...]] = {
    Kind.SPELLED: (),
    Kind.BYTES: ("add_eos_token",),
    Kind.SCORED: ("add_eos_token", "add_space_prefix"),
}
# Keys that change the ids, and the value with which they change nothing.
_NEUTRAL = {"add_space_prefix": False, "add_eos_token": False, "add_sep_token": False, "remove_extra_whitespaces": False,
            "escape_whitespaces": True, "treat_whitespace_as_suffix": False, "normalizer.lowercase": False,
            "add_mask_token": False, "add_padding_token": False, "add_unknown_token": False}  # fmt: skip


@cache
def pre_tokenizers() -> dict[str, dict[str, Any]]:
    """`tokenizer.ggml.pre` -> the table of configs/pre_tokenizers.toml that it names."""
    tables = tomllib.loads(files("kiln.configs").joinpath("pre_tokenizers.toml").read_text())
    return {name: table for table in tables.values() for name in table["names"]}


def harmless_keys() -> list[str]:
    """Patterns of metadata keys of a tokenizer that concern nothing, whatever they say."""
    return [*(f"{PREFIX}{name}" for name in _HARMLESS), f"{PREFIX}*_token_id"]


@dataclass(frozen=True)
class Tokenizer:
    """Texts and GGUF types by id, merges (left, right) in order of rank, and the ids with a meaning. `ends` stop a generation.

    ranks: of SCORED, by id: which text is joined first; equal scores have one rank. split: the patterns by which BYTES cuts text.
    first, last: what goes in front of a text and behind it, None: nothing. space_prefix: a space does, too, behind a special token as well.
    """

    kind: Kind
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    ranks: tuple[int, ...]
    split: tuple[str, ...]
    ignore_merges: bool
    space_prefix: bool
    bos: int | None
    eos: int | None
    unknown: int | None
    first: int | None
    last: int | None
    ends: tuple[int, ...]
    declared: frozenset[int]  # named by a key: control tokens whatever their type says, but for bytes, which text needs

    def text(self, token: int | None) -> str:
        return "" if token is None else self.tokens[token]

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"bos": self.first, "eog": list(self.ends)}

    @property
    def lacking(self) -> list[int]:
        """Bytes that have no token: text loses them."""
        return [b for b, c in enumerate(ALPHABET) if c not in self.vocabulary] if self.kind is Kind.BYTES else []

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
        model: dict[str, Any] = {"vocab": self.vocabulary}
        if self.kind is Kind.SCORED:
            model = {"type": SCORED, "byte_fallback": True, **model, "ranks": self.ranks}
        else:
            spelled = self.kind is Kind.SPELLED
            unknown = self.tokens[self.unknown] if spelled and self.unknown is not None else None
            model = {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                     "fuse_unk": spelled, "byte_fallback": spelled, "ignore_merges": self.ignore_merges, **model,
                     "merges": self.merges}  # fmt: skip
        return {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": added,
            **(_BYTE_STEPS if self.kind is Kind.BYTES else _SPELLED_STEPS),
            "normalizer": _normalizer(self.kind, self.space_prefix),
            "pre_tokenizer": _pre_tokenizer(self.kind, self.split),
            "post_processor": _processor(self.tokens, self.first, self.last),
            "model": model | ({"duplicates": duplicates} if duplicates else {}),
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
    kind = _kind(model, pre)
    _check_keys(metadata, kind)
    tokens = _texts(metadata, "tokens")
    merges = () if kind is Kind.SCORED else tuple(_split_merge(m) for m in _texts(metadata, "merges"))
    types = [-1 if (t := as_integer(given)) is None else t for given in _required(metadata, "token_type")]
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
    lacking = [] if kind is Kind.BYTES else [b for b in range(256) if f"<0x{b:02X}>" not in bytewise]
    if lacking:
        raise KilnError(f"{PREFIX}tokens has no token for byte {lacking[0]} (<0x{lacking[0]:02X}>); text outside the vocabulary needs it")

    bos, unknown = (_one(metadata, key, len(tokens)) for key in ("bos_token_id", "unknown_token_id"))
    eos = next(iter(_ids(metadata, "eos_token_id", len(tokens)) + _ids(metadata, "eos_token_ids", len(tokens))), None)
    index: dict[str, int] = {}
    for i, text in enumerate(tokens):
        index.setdefault(text, i)
    if bos is None and types[index.get("<bos>", 0)] == CONTROL:
        bos = index.get("<bos>")
    named = [i for key in _ENDS for i in _ids(metadata, key, len(tokens))]
    family = EOG_TEXTS if kind is Kind.SPELLED else ()
    ends = [index[text] for text in family if text in index]
    ends += [i for i, text in enumerate(tokens) if text in family and types[i] in (CONTROL, USER_DEFINED)]
    ends += [i for i, text in enumerate(tokens) if text in END_TEXTS and types[i] in (CONTROL, USER_DEFINED)] + named
    # Files from April 2026 type <eos> as an ordinary token; what names the stream's ends is a control token all the same.
    declared = frozenset(i for i in (bos, unknown, *named) if i is not None and not (kind is not Kind.BYTES and _is_byte(tokens[i])))
    table = pre_tokenizers()[str(pre)] if kind is Kind.BYTES else {}
    with_bos = kind is Kind.SPELLED or _flag(metadata, "add_bos_token", table.get("add_bos", kind is Kind.SCORED))
    with_eos = kind is not Kind.SPELLED and _flag(metadata, "add_eos_token", False)
    for key, token in (("bos", bos), ("eos", eos)):
        if kind is not Kind.SPELLED and token is None and _flag(metadata, f"add_{key}_token", False):
            raise KilnError(f"{PREFIX}add_{key}_token is true, but no {PREFIX}{key}_token_id says which token; convert the model again")
    return Tokenizer(
        kind, tuple(tokens), tuple(types), merges, _ranks(metadata, len(tokens)) if kind is Kind.SCORED else (),
        tuple(table.get("split", ())), table.get("ignore_merges", False), kind is Kind.SCORED and _flag(metadata, "add_space_prefix", True),
        bos, eos, unknown, bos if with_bos else None, eos if with_eos else None, tuple(dict.fromkeys(ends)), declared,
    )  # fmt: skip


def _kind(model: Any, pre: Any) -> Kind:
    # Ollama's blobs say "llama" for every tokenizer that spells spaces with U+2581, and tell which one it is by `pre`.
    if (model == "gemma4" and pre in (None, "", "default", "gemma4")) or (model == "llama" and pre == "gemma4"):
        return Kind.SPELLED
    if model == "llama" and pre in (None, "", "default"):
        return Kind.SCORED
    if model == "gpt2" and isinstance(pre, str) and pre in pre_tokenizers():
        return Kind.BYTES
    other = f" with {PREFIX}pre {pre!r}" if pre is not None else ""
    known = ", ".join(map(repr, pre_tokenizers()))
    raise KilnError(f"{PREFIX}model is {str(model)[:80]!r}{other}; supported: 'gemma4', 'llama' (pre 'default' or 'gemma4'), and 'gpt2' "
                    f"with pre {known}; use a file with one of these, or convert the model again")  # fmt: skip


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(PREFIX + name)
    if value is not None and not isinstance(value, bool | int):
        raise KilnError(f"{PREFIX}{name} is {str(value)[:40]!r}, true or false was expected; convert the model again")
    return default if value is None else bool(value)


def _ranks(metadata: Mapping[str, Any], size: int) -> tuple[int, ...]:
    """0 for the highest score; equal scores have one rank."""
    scores = _required(metadata, "scores")
    if len(scores) != size:
        raise KilnError(f"{PREFIX}scores has {len(scores)} entries, {PREFIX}tokens has {size}")
    if any(not isinstance(x, int | float) or not math.isfinite(x) for x in scores):
        raise KilnError(f"{PREFIX}scores holds what is no finite number; convert the model again")
    order = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    return tuple(order[x] for x in scores)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _check_keys(metadata: Mapping[str, Any], kind: Kind) -> None:
    """KilnError for a key that changes the ids and is not applied."""
    for key in metadata:
        name = key.removeprefix(PREFIX)
        if name == key or name in _APPLIED or name in _KINDS_OWN[kind] or name in _HARMLESS or name.endswith("_token_id"):
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


# What the library needs to read the file and give text back; the runner has no use for it.
_BYTE_STEPS = {"decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}
_SPELLED_STEPS = {"decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                                                               {"type": "ByteFallback"}, {"type": "Fuse"}]}}  # fmt: skip


def _normalizer(kind: Kind, space_prefix: bool) -> dict[str, Any] | None:
    if kind is Kind.BYTES:
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]} if space_prefix else replace


def _pre_tokenizer(kind: Kind, split: Sequence[str]) -> dict[str, Any] | None:
    def step(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    if kind is Kind.SCORED:
        return None
    if kind is Kind.SPELLED:  # No merge mixes newlines with other characters, so this split changes no id: it only shortens the runs.
        return step("\n+")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*map(step, split), level]}


def _processor(tokens: Sequence[str], first: int | None, last: int | None) -> dict[str, Any] | None:
    """What puts `first` in front of a text and `last` behind it."""

    def special(token: int | None, type_id: int) -> list[dict[str, Any]]:
        return [] if token is None else [{"SpecialToken": {"id": tokens[token], "type_id": type_id}}]

    def around(name: str, type_id: int) -> list[dict[str, Any]]:
        return [*special(first, type_id), {"Sequence": {"id": name, "type_id": type_id}}, *special(last, type_id)]

    used = {i: tokens[i] for i in (first, last) if i is not None}
    if not used:
        return None
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1),
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for i, text in used.items()}}  # fmt: skip
