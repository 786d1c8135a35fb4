"""The model's hyper-parameters, read from GGUF metadata, and the check that the file holds the tensors they call for.

What belongs to a model family (keys, tensor names, shapes) is in `configs/<family>.toml`.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Container
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from kiln.custom_ops.dtypes import FLOATS
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.errors import Problems
from kiln.exporter.source.gguf import GGUFFile
from kiln.exporter.source.identify import other_model

MAX_LAYERS = 1024
MIN_CONTEXT = 16  # tokens


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer. has_v: false where the file has no attn_v and V is the raw K."""

    index: int
    sliding: bool
    head_dim: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rope_theta: float
    has_v: bool


@dataclass(frozen=True)
class ModelConfig:
    """A model. tied_head: the output projection is the embedding. has_layer_scale: each layer ends with a scalar factor."""

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    final_logit_softcapping: float
    sliding_window: int
    context_length: int
    layers: tuple[LayerConfig, ...]
    tied_head: bool
    has_layer_scale: bool
    suppress_tokens: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)


@functools.cache
def families() -> dict[str, dict[str, Any]]:
    """Every supported architecture's table, by the name in `general.architecture`."""
    tables = (tomllib.loads(f.read_text(encoding="utf-8")) for f in files("kiln.configs").iterdir() if f.name.endswith(".toml"))
    return {table["architecture"]: table for table in tables if "architecture" in table}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}... "


def _as_integer(value: Any) -> int | None:
    """An integer of any number type; None for anything else."""
    if isinstance(value, int | float) and math.isfinite(value) and value == int(value):
        return int(value)
    return None


def _as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


class _Fields:
    """Reads a family's fields from the metadata in whatever number type and form they have; what is wrong is added to `problems`.

    A field that is wrong reads as 1, so that the others can be checked, too.
    """

    def __init__(self, gguf: GGUFFile, table: dict[str, Any], problems: list[str]):
        self.gguf, self.keys, self.problems = gguf, table["keys"], problems

    def fail(self, key: str, what: str, hint: str = "convert the model again") -> None:
        self.problems.append(f"{self.gguf.path}: metadata key {key} {what}; {hint}")

    def raw(self, field: str) -> tuple[str, Any]:
        """Key and value, None where it is missing; an array of one item, or of equal ones, is that item."""
        key, metadata = self.keys[field]["key"], self.gguf.metadata
        if key not in metadata:
            if "default" not in self.keys[field]:
                self.fail(key, "is missing", "it cannot be guessed, convert the model again with a current converter")
            return key, self.keys[field].get("default")
        return key, metadata[key]

    def _positive(self, key: str, value: Any, number_type: type, zero: bool = False) -> Any:
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        number = None if isinstance(value, bool) else (_as_integer if number_type is int else _as_number)(value)
        if number is None or number < 0 or (number == 0 and not zero) or number >= 1 << 48:
            self.fail(key, f"is {_shown(value)}, a positive {'integer' if number_type is int else 'number'} was expected")
            return number_type(1)
        return number_type(number)

    def integer(self, field: str) -> int:
        key, value = self.raw(field)
        return 1 if value is None else self._positive(key, value, int)

    def number(self, field: str, zero: bool = False) -> float:
        key, value = self.raw(field)
        return 1.0 if value is None else self._positive(key, value, float, zero)

    def per_layer(self, field: str, count: int) -> list[int]:
        key, value = self.raw(field)
        if value is None:
            return [1] * count
        if not isinstance(value, list) or len(value) == 1:
            return [self._positive(key, value, int)] * count
        if len(value) != count:
            self.fail(key, f"has {len(value)} entries for {count} layers")
            return [1] * count
        before = len(self.problems)
        numbers = [self._positive(key, v, int) for v in value]
        del self.problems[before + 1 :]  # one line a key is enough
        return numbers

    def pattern(self, field: str, count: int) -> list[bool]:
        """One truth value a layer, as bools or as 0 and 1; or one bool for all; or a period of n layers, the last of them False."""
        key, value = self.raw(field)
        if value is None:
            return [False] * count
        if isinstance(value, bool):
            return [value] * count
        period = _as_integer(value)
        if period is not None and period >= 2:
            return [(i + 1) % period != 0 for i in range(count)]
        if not isinstance(value, list) or len(value) != count or any(_as_integer(v) not in (0, 1) for v in value):
            self.fail(key, f"is {_shown(value)}, it must be {count} booleans, one for each layer")
            return [False] * count
        return [bool(v) for v in value]


def _check_keys(gguf: GGUFFile, table: dict[str, Any], fields: _Fields) -> None:
    """Adds a problem for every metadata key of the architecture that changes the computation and is not applied."""
    known = {spec["key"] for spec in table["keys"].values()} | set(table["same"])
    prefix, harmless = f"{table['architecture']}.", tuple(table["harmless"]["prefixes"])
    refused: set[str] = set()
    for key in gguf.metadata:
        if not key.startswith(prefix) or key in known or key.startswith(harmless):
            continue
        part = next((start for start in table["unsupported"] if key.startswith(start)), None)
        many = gguf.metadata.length(key) or 0
        value = f"an array of {many}" if many > 4096 else gguf.metadata[key]
        items = value if isinstance(value, list) else [value]
        if part:
            if any(v != 0 for v in items) and part not in refused:
                refused.add(part)
                fields.fail(key, f"is {_shown(value)}: {table['unsupported'][part]} are not supported yet", "use a dense model: 31B or 12B")
        elif key == f"{prefix}vocab_size":
            rows = gguf.metadata.length("tokenizer.ggml.tokens")
            if rows is not None and _as_integer(value) != rows:
                fields.fail(key, f"is {_shown(value)}, but tokenizer.ggml.tokens has {rows} tokens")
        elif key not in table["neutral"]:
            fields.fail(key, f"is {_shown(value)}: it is not known to Kiln and may change the computation", "convert the model without it")
        elif not items or any(v not in table["neutral"][key] for v in items):
            fields.fail(key, f"is {_shown(value)}: it changes the computation and is not applied", "convert the model without it")


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
        found = "general.architecture is missing" if architecture is None else f"architecture {_shown(architecture)} is not supported"
        problems.append(f"{gguf.path}: {found}; supported: {known}")
        return None
    fields = _Fields(gguf, table, problems)
    _check_keys(gguf, table, fields)

    count = fields.integer("num_layers")
    if count > MAX_LAYERS:
        fields.fail(table["keys"]["num_layers"]["key"], f"is {count}, more than any model has")
        return None
    sliding = fields.pattern("sliding_pattern", count)
    heads, kv_heads = fields.per_layer("num_heads", count), fields.per_layer("num_kv_heads", count)
    ffn = fields.per_layer("intermediate_size", count)
    head_dims = {s: fields.integer("head_dim_sliding" if s else "head_dim_full") for s in (False, True)}
    theta = {s: fields.number("rope_theta_sliding" if s else "rope_theta_full") for s in (False, True)}
    for key, field in table["same"].items():
        if key in metadata and fields._positive(key, metadata[key], int) != fields.integer(field):
            other = f"{table['keys'][field]['key']} is {fields.integer(field)}"
            fields.fail(key, f"is {_shown(metadata[key])}, but {other}", "unequal ones are not supported")
    for i in range(count if len(problems) == before else 0):
        if heads[i] % kv_heads[i]:
            problems.append(f"{gguf.path}: layer {i} has {heads[i]} heads, no multiple of its {kv_heads[i]} key/value heads")
            break
        if head_dims[sliding[i]] % 2:
            problems.append(f"{gguf.path}: layer {i} has the odd head size {head_dims[sliding[i]]}; rotary embedding needs pairs")
            break
    layers = tuple(
        LayerConfig(
            index=i,
            sliding=sliding[i],
            head_dim=head_dims[sliding[i]],
            num_heads=heads[i],
            num_kv_heads=kv_heads[i],
            intermediate_size=ffn[i],
            rope_theta=theta[sliding[i]],
            # Only a full-attention layer may go without V; a sliding one that lacks it is an incomplete file.
            has_v=sliding[i] or any(f"blk.{i}.{name}.weight" in gguf.tensors for name in ("attn_v", "attn_qkv")),
        )
        for i in range(count)
    )
    vocab = metadata.length("tokenizer.ggml.tokens")
    if vocab is None:
        if "token_embd.weight" not in gguf.tensors:
            problems.append(f"{gguf.path}: tensor token_embd.weight is missing; the file is incomplete, download or convert it again")
            return None
        vocab = gguf.tensors["token_embd.weight"].shape[0]
    given = metadata.get("tokenizer.ggml.suppress_tokens", ())
    suppress = [_as_integer(t) for t in (given if isinstance(given, list | tuple) else (given,))]
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
        final_logit_softcapping=fields.number("final_logit_softcapping", zero=True),
        sliding_window=fields.integer("sliding_window"),
        context_length=fields.integer("context_length"),
        layers=layers,
        tied_head="output.weight" not in gguf.tensors,
        has_layer_scale=any(f"blk.{i}.layer_output_scale.weight" in gguf.tensors for i in range(count)),
        suppress_tokens=tuple(dict.fromkeys(t for t in suppress if t is not None)),
    )
    unique = list(dict.fromkeys(problems[before:]))  # a field that is read twice is told once
    problems[before:] = unique
    return None if unique else config


def from_gguf(gguf: GGUFFile) -> ModelConfig:
    """The configuration alone. Raises KilnError for the first problem."""
    problems: list[str] = []
    config = read_config(gguf, problems)
    if config is None:
        raise Problems(problems, "kiln inspect")
    return config


def _sizes(config: ModelConfig, layer: LayerConfig | None) -> dict[str, int]:
    full = next((x.head_dim for x in config.layers if not x.sliding), 0)
    sizes = {"one": 1, "hidden": config.hidden_size, "vocab": config.vocab_size, "rope_full": full // 2}
    if layer:
        q_dim, kv_dim = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        sizes |= {"head_dim": layer.head_dim, "q_dim": q_dim, "kv_dim": kv_dim, "ffn": layer.intermediate_size}
    return sizes


def expected_tensors(config: ModelConfig, present: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs and its shape. A fused tensor takes the place of its parts where `present` has it."""
    table = families()[config.architecture]
    conditions = {
        "untied_head": not config.tied_head,
        "full_layers": any(not x.sliding for x in config.layers),
        "layer_scale": config.has_layer_scale,
    }
    expected: dict[str, tuple[int, ...]] = {}
    for layer in (None, *config.layers):
        specs = table["layer_tensors"] if layer else table["tensors"]
        prefix = f"blk.{layer.index}." if layer else ""
        if layer:
            conditions["has_v"] = layer.has_v
        sizes = _sizes(config, layer)
        found = {
            prefix + name: tuple(sizes[dim] for dim in spec["shape"])
            for name, spec in specs.items()
            if "when" not in spec or conditions[spec["when"]]
        }
        for fused, parts in table["fused"].items() if layer else ():
            if prefix + fused in present:
                shapes = [found.pop(prefix + part) for part in parts]
                found[prefix + fused] = (sum(s[0] for s in shapes), *shapes[0][1:])
        expected |= found
    return expected


def tensor_problems(config: ModelConfig, gguf: GGUFFile, problems: list[str]) -> list[str]:
    """Adds a problem for a tensor that is missing, has another shape or an unsupported type, or would change the computation unapplied.

    Returns the names of tensors that the text model does not use, such as those of a vision tower.
    """
    expected = expected_tensors(config, gguf.tensors)
    wrong_types: dict[tuple[str, bool], list[str]] = {}
    missing, misshapen = [], []
    for name, shape in expected.items():
        info = gguf.tensors.get(name)
        if info is None:
            missing.append(f"tensor {name} is missing, expected with shape {list(shape)}; the file is incomplete")
        elif info.shape != shape:
            misshapen.append(f"tensor {name} has shape {list(info.shape)}, expected {list(shape)} by the metadata")
        elif info.type not in (tuple(FLOATS) if len(shape) == 1 else (*LAYOUTS, *FLOATS)):
            wrong_types.setdefault((info.type, len(shape) == 1), []).append(name)
    harmless = tuple(families()[config.architecture]["harmless"]["tensors"])
    no_full_layers = all(layer.sliding for layer in config.layers)
    unused: list[str] = []
    unknown: dict[str, list[str]] = {}
    for name in gguf.tensors:
        if name.startswith(harmless) or (name == "rope_freqs.weight" and no_full_layers):
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
    better = {"IQ4": "Q4_K_M or Q4_0", "MXFP": "Q4_K_M or Q8_0", "NVFP": "Q4_K_M or Q8_0", "Q8": "Q8_0"}
    nearest = next((names for start, names in better.items() if block_type.startswith(start)), "Q4_K_M")
    return f"download a {nearest} file of the same model without {block_type} tensors (not an IQ, UD or MXFP4 mix), or quantize it so"


def check_tensors(config: ModelConfig, gguf: GGUFFile) -> list[str]:
    """`tensor_problems`, raised as a KilnError."""
    problems: list[str] = []
    unused = tensor_problems(config, gguf, problems)
    if problems:
        raise Problems(problems, "kiln inspect")
    return unused
