"""Which constants a model has: its weights, planned from tensor shapes alone, and what is derived from metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from kiln.custom_ops.dtypes import DTYPES, FLOATS
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.errors import KilnError
from kiln.exporter.source.config import ModelConfig, expected_tensors
from kiln.exporter.source.gguf import GGUFFile

ROPE_OFF = 1e20  # a frequency divisor this large (GGUF writes 1e30) means: this pair does not rotate

# Tensors fused along N when all are there with one type: they read the same input.
_FUSIONS = (
    ("attn_qkv", ("attn_q", "attn_k", "attn_v")),
    ("attn_qk", ("attn_q", "attn_k")),
    ("ffn_gate_up", ("ffn_gate", "ffn_up")),
)
_DERIVED_FROM = ("rope_freqs.weight",)  # not constants themselves


@dataclass(frozen=True)
class WeightPlan:
    """One weight of the model: a matrix [N, K], or a vector [N] when K is 0 (always F32).

    block_type: a packed block type, F32, F16 or BF16. sources: the GGUF tensors it is made of, rows one after another.
    """

    name: str
    block_type: str
    N: int
    K: int
    sources: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        if self.block_type in LAYOUTS:
            return LAYOUTS[self.block_type].bits_per_weight
        return 8.0 * FLOATS[self.block_type].size


@dataclass(frozen=True)
class ConstantSpec:
    """One constant of the compiled model: fully qualified name, torch dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].size


def plan_weights(config: ModelConfig, gguf: GGUFFile) -> list[WeightPlan]:
    """The model's weights in file order, fused along N where types agree. The tensors must have passed `check_tensors`."""
    expected = expected_tensors(config, gguf.tensors)
    plan: list[WeightPlan] = []
    done: set[str] = set(_DERIVED_FROM)
    for name, shape in expected.items():
        if name in done:
            continue
        prefix, _, stem = name.removesuffix(".weight").rpartition(".")
        prefix += "." if prefix else ""
        target = stem
        sources: tuple[str, ...] = (name,)
        for fused, parts in _FUSIONS:
            names = tuple(f"{prefix}{part}.weight" for part in parts)
            if name == names[0] and all(n in expected for n in names) and len({gguf.tensors[n].type for n in names}) == 1:
                target, sources = fused, names
                break
        done.update(sources)
        rows = sum(expected[s][0] for s in sources)
        if len(shape) == 1:
            plan.append(WeightPlan(prefix + target, "F32", rows, 0, sources))
        else:
            plan.append(WeightPlan(prefix + target, gguf.tensors[name].type, rows, shape[1], sources))
    return plan


def plan_constants(plan: WeightPlan) -> tuple[ConstantSpec, ...]:
    if plan.block_type in LAYOUTS:
        layout = LAYOUTS[plan.block_type]
        groups = plan.K // layout.block
        return (
            ConstantSpec(f"{plan.name}.words", "int32", (groups, layout.words, plan.N)),
            ConstantSpec(f"{plan.name}.halves", "float16", (groups, layout.halves, plan.N)),
        )
    shape = (plan.N, plan.K) if plan.K else (plan.N,)
    return (ConstantSpec(f"{plan.name}.weight", FLOATS[plan.block_type].name, shape),)


def _rotary(config: ModelConfig) -> dict[str, tuple[int, float]]:
    """Rotary constants: name -> (head size, theta)."""
    found: dict[str, tuple[int, float]] = {}
    for layer in config.layers:
        found.setdefault("rope_inv_freq_sliding" if layer.sliding else "rope_inv_freq_full", (layer.head_dim, layer.rope_theta))
    return found


def derived_specs(config: ModelConfig) -> list[ConstantSpec]:
    specs = [ConstantSpec(name, "float32", (head_dim // 2,)) for name, (head_dim, _) in _rotary(config).items()]
    if config.suppress_tokens:
        specs.append(ConstantSpec("suppress_tokens", "int64", (len(config.suppress_tokens),)))
    return specs


def constants(config: ModelConfig, plan: Sequence[WeightPlan]) -> list[ConstantSpec]:
    """Every constant, in the order of the weights file: those of the plan, then the derived ones."""
    return [spec for p in plan for spec in plan_constants(p)] + derived_specs(config)


def weight_bytes(config: ModelConfig, plan: Sequence[WeightPlan]) -> int:
    """Bytes of all constants, without the file's header and filler."""
    return sum(spec.nbytes for spec in constants(config, plan))


def vector(gguf: GGUFFile, name: str) -> np.ndarray:
    """A float tensor of one dimension as float32."""
    raw, block_type = gguf.data(name).reshape(-1), gguf.tensors[name].type
    if block_type == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if block_type == "F32" else "<f2").astype(np.float32)


def derived_constants(config: ModelConfig, gguf: GGUFFile) -> dict[str, np.ndarray]:
    """`rope_inv_freq_*` float32 [head size / 2] and `suppress_tokens` int64, by name.

    Full-attention layers divide theta^(-2d / head size) by `rope_freqs`; a pair whose divisor says "off" gets exactly 0.
    """
    derived: dict[str, np.ndarray] = {}
    for name, (head_dim, theta) in _rotary(config).items():
        inv_freq = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if name == "rope_inv_freq_full":
            divisor = vector(gguf, "rope_freqs.weight").astype(np.float64)
            if not (divisor > 0).all():  # also false for NaN
                raise KilnError(f"{gguf.path}: tensor rope_freqs.weight has values that are not positive; convert the model again")
            inv_freq = np.where(divisor >= ROPE_OFF, 0.0, inv_freq / divisor)
        derived[name] = inv_freq.astype(np.float32)
    if config.suppress_tokens:
        derived["suppress_tokens"] = np.array(config.suppress_tokens, dtype=np.int64)
    return derived
