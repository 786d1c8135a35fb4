"""The model's hyper-parameters, read from GGUF metadata, and the check that the file holds the tensors they call for.

What belongs to a model family (keys, tensor names, shapes) is in `configs/<family>.toml`.
"""

from __future__ import annotations

import functools
import math
import sys
import tomllib
from collections.abc import Container
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from custom_ops.dtypes import FLOATS
from custom_ops.weights.block_types import LAYOUTS
from exporter.errors import KilnError
from exporter.source.gguf import GGUFFile


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
    tables = (tomllib.loads(f.read_text()) for f in files("configs").iterdir() if f.name.endswith(".toml"))
    return {table["architecture"]: table for table in tables if "architecture" in table}


class _Fields:
    """Reads a family's fields from the metadata, with type checks."""

    def __init__(self, gguf: GGUFFile, table: dict[str, Any]):
        self.gguf, self.keys = gguf, table["keys"]

    def fail(self, key: str, what: str, hint: str = "convert the model again") -> KilnError:
        return KilnError(f"{self.gguf.path}: metadata key {key} {what}; {hint}")

    def raw(self, field: str) -> tuple[str, Any]:
        key, metadata = self.keys[field]["key"], self.gguf.metadata
        if key in metadata:
            return key, metadata[key]
        if "default" in self.keys[field]:
            return key, self.keys[field]["default"]
        raise self.fail(key, "is missing", "it cannot be guessed, convert the model again with a current converter")

    def _positive(self, key: str, value: Any, kind: type) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or (kind is int and value != int(value)):
            raise self.fail(key, f"is {value!r}, a positive {'integer' if kind is int else 'number'} was expected")
        return kind(value)

    def integer(self, field: str) -> int:
        return self._positive(*self.raw(field), int)

    def number(self, field: str) -> float:
        return self._positive(*self.raw(field), float)

    def per_layer(self, field: str, count: int) -> list[int]:
        key, value = self.raw(field)
        if not isinstance(value, list):
            return [self._positive(key, value, int)] * count
        if len(value) != count:
            raise self.fail(key, f"has {len(value)} entries for {count} layers")
        return [self._positive(key, v, int) for v in value]

    def bools(self, field: str, count: int) -> list[bool]:
        key, value = self.raw(field)
        if not isinstance(value, list) or not all(isinstance(v, bool) for v in value) or len(value) != count:
            raise self.fail(key, f"must be {count} booleans, one for each layer")
        return value


def from_gguf(gguf: GGUFFile) -> ModelConfig:
    """Reads the configuration. Raises KilnError for an unknown architecture, an unsupported variant, a missing or senseless key."""
    metadata = gguf.metadata
    architecture = metadata.get("general.architecture", "")
    table = families().get(architecture)
    if table is None:
        known = ", ".join(sorted(families()))
        raise KilnError(f"{gguf.path}: architecture {architecture!r} is not supported; supported: {known}")
    fields = _Fields(gguf, table)
    for key, what in table["unsupported"].items():
        if metadata.get(key, 0):
            raise fields.fail(key, f"is {metadata[key]}: {what} are not supported yet", "use a dense model such as 31B or 12B")

    count = fields.integer("num_layers")
    sliding = fields.bools("sliding_pattern", count)
    heads, kv_heads = fields.per_layer("num_heads", count), fields.per_layer("num_kv_heads", count)
    ffn = fields.per_layer("intermediate_size", count)
    head_dims = {s: fields.integer("head_dim_sliding" if s else "head_dim_full") for s in (False, True)}
    theta = {s: fields.number("rope_theta_sliding" if s else "rope_theta_full") for s in (False, True)}
    for key, field in table["same"].items():
        if key in metadata and metadata[key] != fields.integer(field):
            other = f"{table['keys'][field]['key']} is {fields.integer(field)}"
            raise fields.fail(key, f"is {metadata[key]}, but {other}", "unequal ones are not supported")
    for i in range(count):
        if heads[i] % kv_heads[i]:
            raise KilnError(f"{gguf.path}: layer {i} has {heads[i]} heads, no multiple of its {kv_heads[i]} key/value heads")
        if head_dims[sliding[i]] % 2:
            raise KilnError(f"{gguf.path}: layer {i} has the odd head size {head_dims[sliding[i]]}; rotary embedding needs pairs")
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
            raise KilnError(f"{gguf.path}: tensor token_embd.weight is missing; the file is incomplete, download or convert it again")
        vocab = gguf.tensors["token_embd.weight"].shape[0]
    suppress = tuple(metadata.get("tokenizer.ggml.suppress_tokens", ()))
    if any(not 0 <= t < vocab for t in suppress):
        raise fields.fail("tokenizer.ggml.suppress_tokens", f"names a token outside the vocabulary of {vocab}")
    return ModelConfig(
        architecture=architecture,
        name=metadata.get("general.name", gguf.path.stem),
        vocab_size=vocab,
        hidden_size=fields.integer("hidden_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        final_logit_softcapping=fields.number("final_logit_softcapping"),
        sliding_window=fields.integer("sliding_window"),
        context_length=fields.integer("context_length"),
        layers=layers,
        tied_head="output.weight" not in gguf.tensors,
        has_layer_scale=any(f"blk.{i}.layer_output_scale.weight" in gguf.tensors for i in range(count)),
        suppress_tokens=suppress,
    )


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


def check_tensors(config: ModelConfig, gguf: GGUFFile) -> list[str]:
    """Every tensor the model needs is there, with the expected shape and a supported type; else KilnError.

    Tensors the model does not use are named once on stderr and returned.
    """
    expected = expected_tensors(config, gguf.tensors)
    for name, shape in expected.items():
        info = gguf.tensors.get(name)
        if info is None:
            raise KilnError(f"{gguf.path}: tensor {name} is missing, expected with shape {list(shape)}; the file is incomplete")
        if info.shape != shape:
            raise KilnError(f"{gguf.path}: tensor {name} has shape {list(info.shape)}, expected {list(shape)} by the metadata")
        supported = tuple(FLOATS) if len(shape) == 1 else (*LAYOUTS, *FLOATS)
        if info.type not in supported:
            raise KilnError(f"{gguf.path}: tensor {name} has the unsupported type {info.type}; supported here: {', '.join(supported)}")
    unused = [name for name in gguf.tensors if name not in expected]
    if unused:
        shown = ", ".join(unused[:8]) + (f" and {len(unused) - 8} more" if len(unused) > 8 else "")
        print(f"warning: {gguf.path}: skipping {len(unused)} tensors the model does not use: {shown}", file=sys.stderr)
    return unused
