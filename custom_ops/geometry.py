"""Shapes of models: `configs/geometries.toml` as records, and the matrices that a decode step of each multiplies. No torch."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from kiln.custom_ops.weights.mixes import EMBEDDING, MIXES, OUTPUT, block_types

EPS = 1e-6  # inside the roots of all norms
MAX_ROWS = 8  # tokens of one decode step, at most
CONTEXT, EXACT_WINDOW = 131072, 256  # slots of the caches, and of the TQ4 exact window, that kernels are compiled and timed for

# How the matmul with a matrix ends in a fused decode step: in parts that attention adds up, gated, with the sums of squares that a norm
# needs, or as it is. Those that leave squares are the ones without a norm before them.
_ENDS = {"attn_output": "squares", "ffn_down": "squares", "ffn_gate_up": "glu", "token_embd": "sum", "output": "sum"}


@dataclass(frozen=True)
class Heads:
    """Attention of one kind of layer, and how many layers have it."""

    queries: int
    kv: int
    dim: int
    layers: int

    @property
    def label(self) -> str:
        return f"{self.queries}:{self.kv}x{self.dim}"


@dataclass(frozen=True)
class Matrix:
    """`count` weights [n, k] of block type `block_type`."""

    name: str
    block_type: str
    n: int
    k: int
    count: int

    @property
    def end(self) -> str:
        """split, glu, squares or sum."""
        return _ENDS.get(self.name, "split")

    @property
    def normed(self) -> bool:
        """There is a norm before the matmul."""
        return self.end != "squares"


@dataclass(frozen=True)
class Geometry:
    """A dense model of sliding and full attention layers."""

    name: str
    family: str
    hidden: int
    ffn: int
    layers: int
    full_every: int  # layers, of which the last is a full one
    sliding: Heads | None  # None: all layers are full ones
    full: Heads
    window: int
    context: int  # tokens that the model was trained for
    vocab: int
    suppress_tokens: tuple[int, ...] = ()
    tied: bool = True  # the head is the embedding
    full_v: bool = False  # a full layer has a V of its own
    activation: str = "gelu_tanh"
    v_norm: bool = True
    scaled_scores: bool = False  # by 1 / sqrt(head size); otherwise they are as they are
    post_norms: bool = True
    per_layer: int = 0  # values for each layer of a per-layer embedding
    shared_kv: int = 0  # layers, the last ones, that read the keys and values of earlier ones
    shared_ffn: int = 0  # inner size of those layers; 0: that of the others
    experts: tuple[int, int, int] | None = None  # in every layer: how many, how many a token takes, their inner size; ffn is beside them
    delta: tuple[int, int, int, int, int] | None = None  # of the other layers: key heads, value heads, sizes, taps; full ones are gated
    rotary: int = 0  # dimensions of a head that turn; 0: all

    @property
    def form(self) -> dict[str, Any]:
        """Of attention's preparation, as its kernel's constants."""
        scale = self.full.dim**-0.5 if self.scaled_scores else 1.0
        return {"QK_NORM": True, "V_NORM": self.v_norm, "SCALE": scale, "NEIGHBOURS": False, "GATED": self.delta is not None,
                "TURNED": self.rotary}  # fmt: skip

    def is_full(self, layer: int) -> bool:
        return layer % self.full_every == self.full_every - 1

    def shares(self, layer: int) -> bool:
        return layer >= self.layers - self.shared_kv

    def ffn_of(self, layer: int) -> int:
        return self.shared_ffn if self.shared_ffn and self.shares(layer) else self.ffn

    def layer(self, i: int) -> dict[str, tuple[int, int]]:
        """Matrices of a layer, [n, k] by name; gate and up are always of one type, a full layer has no V of its own."""
        if self.delta and not self.is_full(i):
            return self._delta(*self.delta) | {"ffn_gate_up": (2 * self.ffn, self.hidden), "ffn_down": (self.hidden, self.ffn)}
        heads = self.full if self.is_full(i) or self.sliding is None else self.sliding
        q, kv = heads.queries * heads.dim, heads.kv * heads.dim
        own_v = {} if self.is_full(i) and not self.full_v else {"attn_v": (kv, self.hidden)}
        own = {} if self.shares(i) else {"attn_k": (kv, self.hidden), **own_v}
        attention = {"attn_q": (2 * q if self.delta else q, self.hidden), **own, "attn_output": (self.hidden, q)}
        third = {"inp_gate": (self.per_layer, self.hidden), "proj": (self.hidden, self.per_layer)} if self.per_layer else {}
        return attention | {"ffn_gate_up": (2 * self.ffn_of(i), self.hidden), "ffn_down": (self.hidden, self.ffn_of(i))} | third

    def _delta(self, key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int) -> dict[str, tuple[int, int]]:
        values, gates = value_heads * value_dim, {f"ssm_{name}": (value_heads, self.hidden) for name in ("alpha", "beta")}
        first = {"attn_qkv": (2 * key_heads * key_dim + values, self.hidden), "attn_gate": (values, self.hidden)}
        return first | gates | {"ssm_out": (self.hidden, values)}

    def _types(self, mix: str) -> dict[str, str]:
        layers = {f"blk.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in self.layer(i).items()}
        return block_types(MIXES[mix], layers | dict.fromkeys((EMBEDDING, self._head), (self.vocab, self.hidden)))

    @property
    def _head(self) -> str:
        return EMBEDDING if self.tied else OUTPUT

    def layer_matrices(self, mix: str) -> list[list[Matrix]]:
        """Those of each layer, fused where their types agree as the packer does. mix: a key of MIXES."""
        types, found = self._types(mix), []
        for i in range(self.layers):
            left = {name: (types[f"blk.{i}.{name}.weight"], *shape) for name, shape in self.layer(i).items()}
            block_type = left.get("attn_q", ("none",))[0]
            fused = [left.pop(name) for name in ("attn_q", "attn_k", "attn_v") if left.get(name, ("",))[0] == block_type]
            name = "attn_qkv" if len(fused) == 3 else "attn_qk" if len(fused) == 2 else "attn_q"
            first = [Matrix(name, block_type, sum(n for _, n, _ in fused), self.hidden, 1)] if fused else []
            found.append([*first, *(Matrix(name, *rest, 1) for name, rest in left.items())])
        return found

    def matrices(self, mix: str = "q8_0") -> tuple[Matrix, ...]:
        """Those of all layers, counted, then the head, which may be the embedding; see `layer_matrices`.

        With the default mix all types are the same, so that all that may be fused is.
        """
        counts = Counter(matrix for layer in self.layer_matrices(mix) for matrix in layer)
        last = Matrix(self._head.removesuffix(".weight"), self._types(mix)[self._head], self.vocab, self.hidden, 1)
        return (*(replace(matrix, count=count) for matrix, count in counts.items()), last)


def keys_attended(start: int, tokens: int, window: int | None = None) -> int:
    """Sum over positions start .. start + tokens - 1 of the keys a causal query there attends to, at most `window` each."""

    def below(end: int) -> int:  # the sum over positions 0 .. end - 1
        ramp = end if window is None else min(end, window)
        return ramp * (ramp + 1) // 2 + (end - ramp) * (window or 0)

    return below(start + tokens) - below(start)


def _geometry(name: str, row: dict[str, Any]) -> Geometry:
    full = row["layers"] // row["full_every"]
    sliding = Heads(**row["sliding"], layers=row["layers"] - full) if "sliding" in row else None
    heads = {"sliding": sliding, "full": Heads(**row["full"], layers=full), "window": row.get("window", 0)}
    tuples: dict[str, Any] = {field: tuple(row[field]) for field in ("experts", "delta", "suppress_tokens") if field in row}
    return Geometry(**({"name": name} | row | heads | tuples))


GEOMETRIES = {
    name: _geometry(name, row) for name, row in tomllib.loads(files("kiln.configs").joinpath("geometries.toml").read_text()).items()
}
GEMMA4_31B, GEMMA4_12B = GEOMETRIES["gemma4-31b"], GEOMETRIES["gemma4-12b"]
QWEN3_8B = GEOMETRIES["qwen3-8b"]
MEASURED = (GEMMA4_31B, GEMMA4_12B)  # the models that kernels are compiled for in the tests, attention at both shapes
