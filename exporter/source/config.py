"""The model's records, read from GGUF metadata, and the check that the file holds the tensors they call for.

A family is `configs/NAME.toml` (keys, tensor names, shapes) and `exporter/model/families/NAME.py` (what they mean).
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Container
from importlib import import_module
from importlib.resources import files
from math import prod
from typing import Any

from kiln.custom_ops.dtypes import FLOATS
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.errors import Problems
from kiln.exporter.model.families import Family
from kiln.exporter.model.records import Attention, DeltaNet, Dense, DraftConfig, Experts, Layer, ModelConfig
from kiln.exporter.source.fields import Fields, as_integer, check_keys, shown
from kiln.exporter.source.gguf import GGUFFile
from kiln.exporter.source.identify import other_model

MAX_LAYERS = 1024
MIN_CONTEXT = 16  # tokens


def families() -> dict[str, dict[str, Any]]:
    """Every supported architecture's table, by the name in `general.architecture`; `configs/keys.toml` is part of each."""
    return {name: table for name, table in tables().items() if "drafter" not in table}


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """Those of `families`, and of models that draft for them."""
    texts = {f.name: f.read_text(encoding="utf-8") for f in files("kiln.configs").iterdir() if f.name.endswith(".toml")}
    shared = tomllib.loads(texts.pop("keys.toml"))
    found = {}
    for name, text in texts.items():
        table = tomllib.loads(text)
        if "drafter" in table:
            table["architecture"] = table["drafter"]
        if "architecture" not in table:
            continue
        start = f"{table['architecture']}."
        own = {spec["key"] for spec in table["keys"].values()} | set(table.get("same", {}))
        for part in ("neutral", "unsupported"):
            common = {start + key: value for key, value in shared[part].items() if start + key not in own}
            table[part] = common | table.get(part, {})
        harmless = table.get("harmless", {})
        table["harmless"] = {"prefixes": [start + key for key in shared["harmless"]["prefixes"]] + harmless.get("prefixes", []),
                             "tensors": shared["harmless"]["tensors"] + harmless.get("tensors", [])}  # fmt: skip
        found[table["architecture"]] = {"same": {}, "fused": {}} | table | {"module": name.removesuffix(".toml")}
    return found


def family(architecture: str) -> Family:
    """The code of a supported architecture."""
    return import_module(f"kiln.exporter.model.families.{families()[architecture]['module']}").FAMILY


def read_config(gguf: GGUFFile, problems: list[str]) -> ModelConfig | None:
    """The configuration; None when it added to `problems`: an unknown architecture, an unsupported variant, a missing or senseless key."""
    metadata, before = gguf.metadata, len(problems)
    architecture: Any = metadata.get("general.architecture")
    if what := other_model(metadata):
        problems.append(f"{gguf.path}: this is {what}, not a language model; give the language model's .gguf file")
        return None
    table = families().get(architecture) if isinstance(architecture, str) else None
    if table is None:
        known = ", ".join(sorted(families()))
        found = "general.architecture is missing" if architecture is None else f"architecture {shown(architecture)} is not supported"
        problems.append(f"{gguf.path}: {found}; supported: {known}")
        return None
    fields = Fields(gguf, table, problems)
    check_keys(gguf, table, fields)

    count = fields.integer("num_layers")
    if count > MAX_LAYERS:
        fields.fail(table["keys"]["num_layers"]["key"], f"is {count}, more than any model has")
        return None
    drafts = fields.integer("draft_blocks", zero=True) if "draft_blocks" in table["keys"] else 0
    if drafts >= count:
        fields.fail(table["keys"]["draft_blocks"]["key"], f"is {drafts} of {count} blocks: no layer is left", "give the whole model's file")
        return None
    own = family(architecture).read(fields, count - drafts)
    for key, field in table["same"].items():
        if key in metadata and fields.positive(key, metadata[key], int) != fields.integer(field):
            other = f"{table['keys'][field]['key']} is {fields.integer(field)}"
            fields.fail(key, f"is {shown(metadata[key])}, but {other}", "unequal ones are not supported")
    if len(problems) == before:
        problems += [f"{gguf.path}: {text}" for text in _first_odd_head(own["layers"])]
    vocab = metadata.length("tokenizer.ggml.tokens")
    if vocab is None:
        if "token_embd.weight" not in gguf.tensors:
            problems.append(f"{gguf.path}: tensor token_embd.weight is missing; the file is incomplete, download or convert it again")
            return None
        vocab = gguf.tensors["token_embd.weight"].shape[0]
    given = metadata.get("tokenizer.ggml.suppress_tokens", ())
    suppress = [as_integer(t) for t in (given if isinstance(given, list | tuple) else (given,))]
    if any(t is None or not 0 <= t < vocab for t in suppress):
        fields.fail("tokenizer.ggml.suppress_tokens", f"names a token outside the vocabulary of {vocab}")
    if fields.integer("context_length") < MIN_CONTEXT:
        fields.fail(table["keys"]["context_length"]["key"], f"is less than the {MIN_CONTEXT} tokens that Kiln needs")
    name = metadata.get("general.name")
    config = ModelConfig(
        architecture=architecture,
        name=name if isinstance(name, str) and name.strip() else gguf.path.stem,
        vocab_size=vocab,
        hidden_size=fields.integer("hidden_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        context_length=fields.integer("context_length"),
        tied_head="output.weight" not in gguf.tensors,
        suppress_tokens=tuple(dict.fromkeys(t for t in suppress if t is not None)),
        draft_blocks=drafts,
        **own,
    )
    unique = list(dict.fromkeys(problems[before:]))  # a field that is read twice is told once
    problems[before:] = unique
    return None if unique else config


def _first_odd_head(layers: tuple[Layer, ...]) -> list[str]:
    for layer in layers:
        if isinstance(mixer := layer.mixer, DeltaNet):
            if mixer.value_heads % mixer.key_heads:
                return [f"layer {layer.index} has {mixer.value_heads} value heads, no multiple of its {mixer.key_heads} key heads"]
            continue
        if mixer.heads % mixer.kv_heads:
            return [f"layer {layer.index} has {mixer.heads} heads, no multiple of its {mixer.kv_heads} key/value heads"]
        if mixer.head_dim % 2:
            return [f"layer {layer.index} has the odd head size {mixer.head_dim}; rotary embedding needs pairs"]
        if mixer.rope.size % 2 or mixer.rope.size > mixer.head_dim:
            return [f"layer {layer.index} turns {mixer.rope.size} of a head's {mixer.head_dim} dimensions; expected an even number of them"]
    return []


def from_gguf(gguf: GGUFFile) -> ModelConfig:
    """The configuration alone. Raises KilnError for the first problem."""
    problems: list[str] = []
    config = read_config(gguf, problems)
    if config is None:
        raise Problems(problems, "kiln inspect")
    return config


def _sizes(config: ModelConfig, layer: Layer | None) -> dict[str, int]:
    """The dimensions by which a family's table tells the shapes of tensors."""
    divided = next((rope.size // 2 for rope in config.ropes.values() if rope.divisors), 0)
    sizes = {"target": config.target_hidden, "twice_target": 2 * config.target_hidden} if isinstance(config, DraftConfig) else {}
    sizes |= {"one": 1, "hidden": config.hidden_size, "vocab": config.vocab_size, "rope_pairs": divided}
    if layer and isinstance(mixer := layer.mixer, Attention):
        sizes |= {"head_dim": mixer.head_dim, "q_dim": mixer.q_dim * (2 if mixer.gated else 1), "kv_dim": mixer.kv_dim,
                  "out_dim": mixer.q_dim}  # fmt: skip
    if layer and isinstance(mixer := layer.mixer, DeltaNet):
        sizes |= {"channels": mixer.channels, "value_size": mixer.value_size, "value_heads": mixer.value_heads, "taps": mixer.taps,
                  "value_dim": mixer.value_dim}  # fmt: skip
    if layer and isinstance(layer.ffn, Dense):
        sizes["ffn"] = layer.ffn.size
    if layer and isinstance(layer.ffn, Experts):
        sizes |= {"experts": layer.ffn.count, "expert_ffn": layer.ffn.size, "ffn": layer.ffn.shared.size if layer.ffn.shared else 0}
    if config.per_layer_embedding:
        sizes |= {"per_layer": config.per_layer_embedding.size, "per_layers": config.per_layer_embedding.size * len(config.layers)}
    return sizes


def _conditions(config: ModelConfig, layer: Layer | None) -> dict[str, bool]:
    """What a table's `when` may ask of a model or a layer."""
    found = {
        "untied_head": not config.tied_head,
        "rope_divisors": any(rope.divisors for rope in config.ropes.values()),
        "per_layer_embedding": config.per_layer_embedding is not None,
    }
    if layer:
        mixer, ffn = layer.mixer, layer.ffn
        attention = mixer if isinstance(mixer, Attention) else None
        found |= {
            "attention": attention is not None,
            "delta": isinstance(mixer, DeltaNet),
            "own_kv": attention is not None and attention.kv_from is None,
            "own_v": attention is not None and attention.kv_from is None and attention.value == "own",
            "post_norms": layer.post_norms,
            "scaled": layer.scaled,
            "dense": isinstance(ffn, Dense) or ffn.shared is not None,
            "experts": isinstance(ffn, Experts),
            "shared_gate": isinstance(ffn, Experts) and ffn.shared_gated,
            "branch_norms": isinstance(ffn, Experts) and ffn.branch_norms,
            "expert_input": isinstance(ffn, Experts) and ffn.own_input,
            "expert_scales": isinstance(ffn, Experts) and ffn.scaled,
        }
    return found


def expected_tensors(config: ModelConfig, present: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs and its shape. A fused tensor takes the place of its parts where `present` has it."""
    table = tables()[config.architecture]
    expected: dict[str, tuple[int, ...]] = {}
    for layer in (None, *config.layers):
        prefix = f"blk.{layer.index}." if layer else ""
        sizes, conditions = _sizes(config, layer), _conditions(config, layer)
        found = {
            prefix + name: tuple(sizes[dim] for dim in spec["shape"])
            for name, spec in table["layer_tensors" if layer else "tensors"].items()
            if "when" not in spec or conditions[spec["when"]]
        }
        for fused, parts in table["fused"].items() if layer else ():
            if prefix + fused in present and all(prefix + part in found for part in parts):
                shapes = [found.pop(prefix + part) for part in parts]
                found[prefix + fused] = (*shapes[0][:-2], sum(s[-2] for s in shapes), shapes[0][-1])
        expected |= found
    return expected


def _skipped(config: ModelConfig, expected: Container[str]) -> set[str]:
    """Tensors that a family's table says may stand in the file of a model, or a layer, that does not use them."""
    table = tables()[config.architecture]
    names = {name for name, spec in table["tensors"].items() if spec.get("may_be_unused")}
    layered = [name for name, spec in table["layer_tensors"].items() if spec.get("may_be_unused")]
    drafting = [*table["layer_tensors"], *table.get("draft_tensors", ())]
    blocks = range(len(config.layers), len(config.layers) + config.draft_blocks)
    names |= {f"blk.{layer.index}.{name}" for layer in config.layers for name in layered}
    names |= {f"blk.{i}.{name}" for i in blocks for name in drafting}
    return {name for name in names if name not in expected}


def tensor_spec(config: ModelConfig, name: str) -> dict[str, Any]:
    """What the family's table says of a tensor of a model or a layer; nothing of a fused one."""
    table = tables()[config.architecture]
    _, _, own = name.split(".", 2) if name.startswith("blk.") else ("", "", name)
    return table["layer_tensors" if name.startswith("blk.") else "tensors"].get(own, {})


def tensor_problems(config: ModelConfig, gguf: GGUFFile, problems: list[str]) -> list[str]:
    """Adds a problem for a tensor that is missing, has another shape or an unsupported type, or would change the computation unapplied.

    Returns the names of tensors that the text model does not use, such as those of a vision tower.
    """
    expected = expected_tensors(config, gguf.tensors)
    wrong_types: dict[tuple[str, bool], list[str]] = {}
    missing, misshapen = [], []
    for name, shape in expected.items():
        info, flat = gguf.tensors.get(name), len(shape) == 1 or "flat" in tensor_spec(config, name)
        if info is None:
            missing.append(f"tensor {name} is missing, expected with shape {list(shape)}; the file is incomplete")
        elif info.shape != shape and not (flat and prod(info.shape) == prod(shape) == max(info.shape)):
            misshapen.append(f"tensor {name} has shape {list(info.shape)}, expected {list(shape)} by the metadata")
        elif info.type not in (tuple(FLOATS) if flat else (*LAYOUTS, *FLOATS)):
            wrong_types.setdefault((info.type, flat), []).append(name)
        elif info.type in LAYOUTS and shape[-1] % LAYOUTS[info.type].block:
            layout = LAYOUTS[info.type]
            misshapen.append(f"tensor {name} has rows of {shape[-1]} elements; {layout.together} {info.type} blocks are packed as one, so "
                             f"that {layout.block} must divide them; {_instead(info.type)}")  # fmt: skip
    harmless = tuple(tables()[config.architecture]["harmless"]["tensors"])
    skipped = _skipped(config, expected)
    unused: list[str] = []
    unknown: dict[str, list[str]] = {}
    for name in gguf.tensors:
        if name.startswith(harmless) or name in skipped:
            unused.append(name)
        elif name not in expected:
            unknown.setdefault(re.sub(r"^blk\.\d+\.", "blk.*.", name), []).append(name)
    found = _first_and_count(missing) + _first_and_count(misshapen)
    for (block_type, vector), names in wrong_types.items():
        more = f" and {len(names) - 1} more of this type" if len(names) > 1 else ""
        supported = ", ".join(FLOATS if vector else (*LAYOUTS, *FLOATS))
        found.append(f"tensor {names[0]} has the unsupported type {block_type}{more}; supported here: {supported}; {_instead(block_type)}")
    for names in unknown.values():
        more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
        found.append(f"tensor {names[0]} is not part of a {config.architecture} model that Kiln knows{more}: leaving it out "
                     "might change the computation; convert the model without it")  # fmt: skip
    problems += [f"{gguf.path}: {text}" for text in found]
    return unused


def _first_and_count(texts: list[str]) -> list[str]:
    return [texts[0] + (f" ({len(texts) - 1} more such tensors)" if len(texts) > 1 else "")] if texts else []


_REMOVED = {  # weights rearranged for one processor, or long gone
    f"type {number}": name
    for number, name in {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8"}.items()
}


def _instead(block_type: str) -> str:
    """What to do about a block type that cannot be loaded."""
    if block_type in _REMOVED:
        return f"that is {_REMOVED[block_type]}, which llama.cpp dropped; download a Q4_0 or Q4_K_M file of the same model"
    if block_type.startswith("type "):
        return "the file is newer than Kiln, or damaged; download a Q4_K_M file of the same model"
    better = {"IQ1": "Q2_K", "IQ2": "Q2_K", "TQ": "Q2_K", "IQ3": "Q3_K_M or IQ4_XS", "MXFP": "Q4_K_M or Q8_0", "NVFP": "Q4_K_M or Q8_0",
              "Q8": "Q8_0"}  # fmt: skip
    nearest = next((names for start, names in better.items() if block_type.startswith(start)), "Q4_K_M")
    return f"download a {nearest} file of the same model without {block_type} tensors (a UD mix may have such), or quantize it so"


def check_tensors(config: ModelConfig, gguf: GGUFFile) -> list[str]:
    """`tensor_problems`, raised as a KilnError."""
    problems: list[str] = []
    unused = tensor_problems(config, gguf, problems)
    if problems:
        raise Problems(problems, "kiln inspect")
    return unused
