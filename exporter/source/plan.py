"""A model file read once: everything an export, an evaluation or `kiln inspect` needs of it, and everything that is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kiln.exporter.errors import KilnError, Problems, printable
from kiln.exporter.model.records import ModelConfig
from kiln.exporter.source.chat import Chat, read_chat, template_text
from kiln.exporter.source.config import read_config, tensor_problems
from kiln.exporter.source.finite import scan
from kiln.exporter.source.gguf import GGUFFile, open_gguf
from kiln.exporter.source.tokenizer import Tokenizer, read_tokenizer
from kiln.exporter.source.weights import WeightPlan, derived_constants, plan_weights, vector


@dataclass(frozen=True)
class ReadOptions:
    """chat_template: a Jinja file in place of the model file's. scan: read every block scale and float, and refuse what is not finite."""

    chat_template: Path | None = None
    scan: bool = False


@dataclass(frozen=True)
class ModelPlan:
    """A model that can be exported. `gguf` serves the tensors' bytes; whatever else the file says is here.

    derived: constants that are computed, by name. key_bound: an upper bound of |q| and |k| after their norms, and the norm it comes from;
    0 where no norm bounds them.
    unused: tensors that are left out.
    """

    gguf: GGUFFile
    config: ModelConfig
    weights: tuple[WeightPlan, ...]
    derived: Mapping[str, np.ndarray]
    key_bound: tuple[float, str]
    tokenizer: Tokenizer | None
    chat: Chat | None
    unused: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What a user should know of a model that is otherwise in order, a line each."""
        found = []
        if self.unused:
            shown = ", ".join(self.unused[:8]) + (f" and {len(self.unused) - 8} more" if len(self.unused) > 8 else "")
            found.append(f"warning: {self.gguf.path}: skipping {len(self.unused)} tensors the model does not use: {shown}")
        if self.chat and self.chat.date:
            found.append(f"warning: the chat template writes today's date ({self.chat.date}) into every prompt: the artifact keeps it; "
                         "export again for another, or give a template without a date with --chat-template")  # fmt: skip
        return found


@dataclass(frozen=True)
class Survey:
    """What can be said of a file, sound or not: the parts that could be read, and a line for each problem."""

    gguf: GGUFFile
    config: ModelConfig | None
    tokenizer: Tokenizer | None
    chat: Chat | None
    unused: tuple[str, ...]
    problems: tuple[str, ...]
    plan: ModelPlan | None  # where there is no problem


def _key_bound(config: ModelConfig, gguf: GGUFFile) -> tuple[float, str]:
    """What bounds queries and keys that are normalized is the head size and the norms' weights. Rotation keeps lengths."""
    bounds = {"": 0.0}
    for i, mixer in config.attentions.items():
        names = [name for name, norm in (("attn_q_norm", mixer.q_norm), ("attn_k_norm", mixer.k_norm)) if norm == "weighted"]
        for name in (f"blk.{i}.{stem}.weight" for stem in names):
            scale = mixer.scale if "attn_q_norm" in name else 1.0
            bounds[name] = float(np.abs(vector(gguf, name)).max(initial=0)) * math.sqrt(mixer.head_dim) * scale
    largest = max(bounds, key=lambda name: bounds[name])
    return bounds[largest], largest


def survey(path: str | Path, options: ReadOptions | None = None) -> Survey:
    """Reads everything that can be read. Raises KilnError only where the file cannot be opened as GGUF at all."""
    options = options or ReadOptions()
    gguf = open_gguf(path)
    problems: list[str] = []
    tokenizer: Tokenizer | None = None
    chat: Chat | None = None
    unused: list[str] = []
    config = read_config(gguf, problems)
    if config:
        unused = tensor_problems(config, gguf, problems)
    sound = not problems
    try:
        tokenizer = read_tokenizer(gguf.metadata, config.vocab_size if config else None)
    except KilnError as e:
        problems.append(_located(gguf, e))
    try:
        template = template_text(gguf.metadata, options.chat_template)
        chat = read_chat(template, tokenizer) if template else None
    except KilnError as e:
        problems.append(_located(gguf, e))
    plan = None
    if config and sound:
        try:
            derived = derived_constants(config, gguf)
            if options.scan:
                weights = plan_weights(config, gguf)
                problems += scan(gguf, [source for p in weights for source in p.sources])
            if not problems:
                plan = ModelPlan(gguf, config, tuple(plan_weights(config, gguf)), derived, _key_bound(config, gguf),
                                 tokenizer, chat, tuple(unused))  # fmt: skip
        except KilnError as e:
            problems.append(_located(gguf, e))
    return Survey(gguf, config, tokenizer, chat, tuple(unused), tuple(dict.fromkeys(map(printable, problems))), plan)


def _located(gguf: GGUFFile, error: KilnError) -> str:
    text = str(error)
    return text if str(gguf.path) in text or "--chat-template" in text or "the chat template" in text else f"{gguf.path}: {text}"


def read_plan(path: str | Path, options: ReadOptions | None = None) -> ModelPlan:
    """The plan of a model file. Raises KilnError with the first problem of `survey` and their number."""
    found = survey(path, options)
    if found.plan is None:
        raise Problems(found.problems, f"kiln inspect {found.gguf.path}")
    return found.plan
