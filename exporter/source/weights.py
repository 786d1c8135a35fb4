"""Which constants a model has: its weights, planned from tensor shapes alone, and what is derived from metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log, pi, prod

import numpy as np

from kiln.custom_ops.dtypes import DTYPES, FLOATS
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.errors import KilnError
from kiln.exporter.model.records import DraftConfig, ModelConfig, Rope
from kiln.exporter.source.config import expected_tensors, tensor_spec
from kiln.exporter.source.gguf import GGUFFile

DRAFT = "draft."  # before the names of a drafter's constants, beside its model's
ROPE_OFF = 1e20  # a frequency divisor this large (GGUF writes 1e30) means: this pair does not rotate

# Tensors fused along N when all are there with one type: they read the same input.
_FUSIONS = (
    ("attn_qkv", ("attn_q", "attn_k", "attn_v")),
    ("attn_qk", ("attn_q", "attn_k")),
    ("ssm_in_gates", ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta")),
    ("ssm_gates", ("attn_gate", "ssm_alpha", "ssm_beta")),
    ("ssm_alpha_beta", ("ssm_alpha", "ssm_beta")),
    ("ffn_gate_up", ("ffn_gate", "ffn_up")),
    ("ffn_gate_up", ("ffn_gate_shexp", "ffn_up_shexp")),  # of a network beside experts
)


PER_LAYER_TABLE = "per_layer_token_embd"


@dataclass(frozen=True)
class WeightPlan:
    """One weight of the model: a matrix [N, K], or a vector [N] when K is 0 (always F32).

    block_type: a packed block type, F32, F16 or BF16. sources: the GGUF tensors it is made of, rows one after another.
    stack: of how many matrices [N / stack, K] the rows are, one after another, as of experts.
    """

    name: str
    block_type: str
    N: int
    K: int
    sources: tuple[str, ...]
    stack: int = 1

    @property
    def gathered(self) -> bool:
        """Whether only rows of it are read, of a table that a device need not hold."""
        return self.name == PER_LAYER_TABLE

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
    done = {rope.divisors for rope in config.ropes.values() if rope.divisors}  # not constants themselves
    for name, shape in expected.items():
        if name in done:
            continue
        at, spec = name.index(".", len("blk.")) + 1 if name.startswith("blk.") else 0, tensor_spec(config, name)
        prefix, target = name[:at], name[at:].removesuffix(".weight").replace(".", "_")  # "ffn_gate_inp.scale" is ffn_gate_inp_scale
        target = spec.get("as", target)
        sources: tuple[str, ...] = (name,)
        for fused, parts in _FUSIONS:
            names = tuple(f"{prefix}{part}.weight" for part in parts)
            if name == names[0] and all(n in expected for n in names) and len({gguf.tensors[n].type for n in names}) == 1:
                target, sources = fused, names
                break
        done.update(sources)
        if len(shape) == 1 or "flat" in spec:
            plan.append(WeightPlan(prefix + target, "F32", prod(shape), 0, sources))
        else:
            rows, stack = sum(prod(expected[s][:-1]) for s in sources), prod(shape[:-2])
            plan.append(WeightPlan(prefix + target, gguf.tensors[name].type, rows, shape[-1], sources, stack))
    return plan


def plan_constants(plan: WeightPlan) -> tuple[ConstantSpec, ...]:
    if plan.block_type in LAYOUTS:
        layout = LAYOUTS[plan.block_type]
        groups = plan.K // layout.block
        return (
            ConstantSpec(f"{plan.name}.words", "int32", (groups, layout.words, plan.N)),
            ConstantSpec(f"{plan.name}.halves", layout.halves_dtype, (groups, layout.halves, plan.N)),
        )
    shape = (plan.N, plan.K) if plan.K else (plan.N,)
    return (ConstantSpec(f"{plan.name}.weight", FLOATS[plan.block_type].name, shape),)


def derived_specs(config: ModelConfig) -> list[ConstantSpec]:
    specs = [ConstantSpec(name, "float32", (rope.size // 2,)) for name, rope in config.ropes.items()]
    if config.suppress_tokens:
        specs.append(ConstantSpec("suppress_tokens", "int64", (len(config.suppress_tokens),)))
    return specs


def constants(config: ModelConfig, plan: Sequence[WeightPlan]) -> list[ConstantSpec]:
    """Every constant, in the order of the weights file: those of the plan, then the derived ones."""
    return [spec for p in plan for spec in plan_constants(p)] + derived_specs(config)


def draft_constants(config: DraftConfig, plan: Sequence[WeightPlan]) -> list[ConstantSpec]:
    """A drafter's, as `constants`, by the names that they have beside its model's."""
    return [replace(spec, name=DRAFT + spec.name) for spec in constants(config, plan)]


def weight_bytes(config: ModelConfig, plan: Sequence[WeightPlan]) -> int:
    """Bytes of all constants, without the file's header and filler."""
    return sum(spec.nbytes for spec in constants(config, plan))


def vector(gguf: GGUFFile, name: str) -> np.ndarray:
    """A float tensor of one dimension as float32."""
    raw, block_type = gguf.data(name).reshape(-1), gguf.tensors[name].type
    if block_type == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if block_type == "F32" else "<f2").astype(np.float32)


def _frequencies(rope: Rope) -> np.ndarray:
    """Radians a position of each pair, float64 [size / 2], before divisors."""
    inv_freq = float(rope.base) ** (-np.arange(0, rope.size, 2, dtype=np.float64) / rope.size)
    if rope.yarn is None:
        return inv_freq / rope.factor
    # the pair that makes so many turns in the context, and its neighbours outwards
    turns = (rope.yarn.fast, rope.yarn.slow)
    first, last = (rope.size * log(rope.yarn.context / (n * 2 * pi)) / (2 * log(rope.base)) for n in turns)
    first, last = max(floor(first), 0), min(ceil(last), rope.size - 1)
    slowed = np.clip((np.arange(rope.size // 2) - first) / max(last - first, 0.001), 0, 1)
    return inv_freq * (1 - slowed) + inv_freq / rope.factor * slowed


def derived_constants(config: ModelConfig, gguf: GGUFFile) -> dict[str, np.ndarray]:
    """`rope_inv_freq*` float32 [size / 2] and `suppress_tokens` int64, by name. A pair whose divisor says "off" gets exactly 0."""
    derived: dict[str, np.ndarray] = {}
    for name, rope in config.ropes.items():
        with np.errstate(over="ignore"):  # told below
            inv_freq = _frequencies(rope)
            if rope.divisors:
                divisor = vector(gguf, rope.divisors).astype(np.float64)
                if not (divisor > 0).all():  # also false for NaN
                    raise KilnError(f"{gguf.path}: tensor {rope.divisors} has values that are not positive; convert the model again")
                inv_freq = np.where(divisor >= ROPE_OFF, 0.0, inv_freq / divisor)
            derived[name] = inv_freq.astype(np.float32)
        if not np.isfinite(derived[name]).all():
            source = f"tensor {rope.divisors}" if rope.divisors else f"a rotary base of {rope.base:g} with a factor of {rope.factor:g}"
            raise KilnError(f"{gguf.path}: {source} makes frequencies beyond float32; convert the model again")
    if config.suppress_tokens:
        derived["suppress_tokens"] = np.array(config.suppress_tokens, dtype=np.int64)
    return derived
