"""GGUF tokenizer metadata -> tokenizer.json, and the chat template -> the affixes of one user turn.

The output is the `tokenizers` BPE format, so that the runner and the `tokenizers` library read the same file.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from exporter.errors import KilnError

SUPPORTED_MODELS = ("gemma4",)
EOG_TEXTS = ("<eos>", "<turn|>", "<|tool_response>")
CONTROL, USER_DEFINED = 3, 4  # GGUF token types
SPACE = "\u2581"


class HasMetadata(Protocol):
    """What is needed of a GGUF file: its key-value metadata."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...


def write_tokenizer(gguf: HasMetadata, path: str | Path) -> dict[str, Any] | None:
    """Writes tokenizer.json from the GGUF metadata.

    Returns {"bos": id or None, "eog": [ids that end a generation]}, or None when the file has no tokenizer.
    Raises KilnError when the tokenizer is of another kind or contradicts itself.
    """
    md = gguf.metadata
    model = md.get("tokenizer.ggml.model")
    if model is None or model in ("none", "no_vocab"):
        return None
    if model not in SUPPORTED_MODELS:
        raise KilnError(f"tokenizer.ggml.model is '{model}'; supported: {', '.join(SUPPORTED_MODELS)}")
    tokens = _required(md, "tokenizer.ggml.tokens")
    merges = [_split_merge(m) for m in _required(md, "tokenizer.ggml.merges")]
    types = _required(md, "tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise KilnError(f"tokenizer.ggml.token_type has {len(types)} entries, tokenizer.ggml.tokens has {len(tokens)}")
    vocab = {text: i for i, text in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(text for i, text in enumerate(tokens) if vocab[text] != i)
        raise KilnError(f"tokenizer.ggml.tokens has the token {twice!r} twice; a tokenizer.json holds each text once")
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise KilnError(f"tokenizer.ggml.merges: {left!r} + {right!r} names a token that is not in the vocabulary")

    bos = md.get("tokenizer.ggml.bos_token_id")
    eos = md.get("tokenizer.ggml.eos_token_id")
    unk = md.get("tokenizer.ggml.unknown_token_id")
    for key, value in (("bos", bos), ("eos", eos), ("unknown", unk)):
        if value is not None and not 0 <= int(value) < len(tokens):
            raise KilnError(f"tokenizer.ggml.{key}_token_id is {value}, the vocabulary has {len(tokens)} tokens")
    eog = [vocab[text] for text in EOG_TEXTS if text in vocab]
    if eos is not None and int(eos) not in eog:
        eog.append(int(eos))

    # Files from April 2026 type <eos> as an ordinary token; what names the stream's ends is a control token all the same.
    control = {int(i) for i in (bos, eos, unk) if i is not None}
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": int(t) == CONTROL or i in control}
        for i, t in enumerate(types) if int(t) in (CONTROL, USER_DEFINED) or i in control
    ]
    document = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # No merge mixes newlines with other characters, so this split changes no id: it only shortens the runs.
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated", "invert": False},
        "post_processor": _bos_processor(tokens[int(bos)], int(bos)) if bos is not None else None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": tokens[int(unk)] if unk is not None else None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": merges},
    }
    Path(path).write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    return {"bos": int(bos) if bos is not None else None, "eog": eog}


def bos_text(gguf: HasMetadata) -> str:
    """The text of BOS; empty without a tokenizer."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    return tokens[gguf.metadata.get("tokenizer.ggml.bos_token_id", 2)] if tokens else ""


def chat_template(gguf: HasMetadata, override_path: str | Path | None = None) -> str | None:
    """The text of `override_path` when given, else the file's own chat template, else None."""
    if override_path is not None:
        try:
            return Path(override_path).read_text(encoding="utf-8")
        except OSError as e:
            raise KilnError(f"cannot read the chat template {override_path}: {e.strerror}") from e
    return gguf.metadata.get("tokenizer.chat_template")


def render_chat_affixes(template: str, bos_token: str) -> tuple[str, str]:
    """What the template writes (before, after) the text of one user turn: thinking off, generation prompt included.

    Raises KilnError when the template fails, or does not write the user's text exactly once.
    """
    from jinja2 import TemplateError

    sentinel = f"USER-TEXT-{uuid.uuid4().hex}"
    try:
        text = _environment().from_string(template).render(
            messages=[{"role": "user", "content": sentinel}], bos_token=bos_token, add_generation_prompt=True,
            enable_thinking=False, tools=None)
    except (TemplateError, TypeError, ValueError) as e:
        raise KilnError(f"the chat template cannot render a single user turn: {e}; give another with --chat-template") from e
    parts = text.split(sentinel)
    if len(parts) != 2:
        raise KilnError(f"the chat template writes the user's text {len(parts) - 1} times, not once; give another with --chat-template")
    return parts[0], parts[1]


def _environment() -> Any:
    """The Jinja environment that `transformers` gives chat templates, sandboxed."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _required(md: Mapping[str, Any], key: str) -> list:
    value = md.get(key)
    if value is None:
        raise KilnError(f"the GGUF file has a tokenizer but no {key}")
    return value if isinstance(value, list) else list(value)


def _split_merge(merge: str) -> list[str]:
    at = merge.find(" ", 1)  # from 1: the left part may itself be a space
    if at < 0:
        raise KilnError(f"tokenizer.ggml.merges: {merge!r} is not 'left right'")
    return [merge[:at], merge[at + 1:]]


def _bos_processor(text: str, bos: int) -> dict[str, Any]:
    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": type_id}}

    return {"type": "TemplateProcessing", "single": [special(0), sequence("A", 0)],
            "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}}}
