"""A file of a model that drafts for another one, read against that one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from kiln.exporter.errors import KilnError, Problems
from kiln.exporter.model.records import DraftConfig
from kiln.exporter.source.config import MAX_LAYERS, tables, tensor_problems
from kiln.exporter.source.fields import Fields, check_keys, shown
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import ModelPlan
from kiln.exporter.source.weights import derived_constants, plan_weights

OWN = "give the drafter of this model"


def read_drafter(path: str | Path, target: ModelPlan) -> ModelPlan:
    """Its plan, of a `DraftConfig`. Raises KilnError where it is no drafter, or one of another model."""
    gguf, model = open_gguf(path), target.config
    architecture = gguf.metadata.get("general.architecture")
    table = tables().get(architecture) if isinstance(architecture, str) else None
    if table is None or "drafter" not in table:
        known = ", ".join(sorted(name for name, t in tables().items() if "drafter" in t))
        raise KilnError(f"{gguf.path}: architecture {shown(architecture)} is no drafter that Kiln knows; supported: {known}")
    if table["target"] != model.architecture:
        raise KilnError(f"{gguf.path}: drafts for {table['target']}, and {model.name} is {model.architecture}; {OWN}")
    problems: list[str] = []
    fields = Fields(gguf, table, problems)
    check_keys(gguf, table, fields)
    count, hidden = fields.integer("num_layers"), fields.integer("target_hidden")
    if count > MAX_LAYERS:
        fields.fail(fields.key("num_layers"), f"is {count}, more than any model has")
        count = 1
    if hidden != model.hidden_size:
        fields.fail(fields.key("target_hidden"), f"is {hidden}, and {model.name} has rows of {model.hidden_size}", OWN)
    for key, value in table["same"].items():
        if key in gguf.metadata and fields.positive(key, gguf.metadata[key], int) != fields.integer(value):
            other = f"{fields.key(value)} is {fields.integer(value)}"
            fields.fail(key, f"is {shown(gguf.metadata[key])}, but {other}", "unequal ones are not supported")
    tokens = "tokenizer.ggml.tokens"
    if tokens in gguf.metadata and gguf.metadata[tokens] != target.gguf.metadata.get(tokens):
        fields.fail(tokens, f"has other tokens than {model.name}", OWN)
    layers = import_module(f"kiln.exporter.model.families.{table['module']}").read_layers(fields, count, model)
    config = DraftConfig(
        architecture=table["drafter"],
        name=str(gguf.metadata.get("general.name", gguf.path.stem)),
        vocab_size=model.vocab_size,
        hidden_size=fields.integer("hidden_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        context_length=fields.integer("context_length"),
        layers=layers,
        tied_head=True,
        target_hidden=hidden,
    )
    unused = tensor_problems(config, gguf, problems) if not problems else []
    if problems:
        raise Problems(list(dict.fromkeys(problems)), f"kiln inspect {gguf.path}")
    derived = derived_constants(config, gguf)
    return ModelPlan(gguf, config, tuple(plan_weights(config, gguf)), derived, (0.0, ""), None, None, tuple(unused))
