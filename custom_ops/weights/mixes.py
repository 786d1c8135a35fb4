"""Which block type llama-quantize gives each tensor of a model, without an importance matrix. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kiln.custom_ops.weights.block_types import LAYOUTS

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
PROMOTED = ("attn_v", "ffn_down")  # some of these get more bits
MORE_BITS = "Q6_K"


@dataclass(frozen=True)
class Mix:
    """Types of a file: of most matrices, of the head (which may be the embedding), and whether some of PROMOTED get more bits."""

    base: str
    file_type: str  # name in gguf.LlamaFileType
    head: str
    promotes: bool = False


MIXES = {
    "q4_k_m": Mix("Q4_K", "MOSTLY_Q4_K_M", MORE_BITS, promotes=True),
    "q5_k_m": Mix("Q5_K", "MOSTLY_Q5_K_M", MORE_BITS, promotes=True),
    "q6_k": Mix("Q6_K", "MOSTLY_Q6_K", "Q6_K"),
    "q4_0": Mix("Q4_0", "MOSTLY_Q4_0", MORE_BITS),
    "q8_0": Mix("Q8_0", "MOSTLY_Q8_0", "Q8_0"),
    "bf16": Mix("BF16", "MOSTLY_BF16", "BF16"),
    "f32": Mix("F32", "ALL_F32", "F32"),
}
SYNTHETIC = ("q4_k_m", "q6_k", "q4_0", "q8_0", "f32")  # those of whose types `kiln synth` makes random blocks


def more_bits(i: int, n: int) -> bool:
    """Whether the i-th of n like tensors gets more bits: the first and last eighth do, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def block_types(mix: Mix, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The type of every tensor, by name; `tensors` are their shapes in PyTorch order. What is no matrix is F32."""
    promoted, head = set(), OUTPUT if OUTPUT in tensors else EMBEDDING
    for stem in PROMOTED if mix.promotes else ():
        like = [name for name in tensors if name.endswith(f".{stem}.weight")]
        promoted |= {name for i, name in enumerate(like) if more_bits(i, len(like))}
    found = {}
    for name, shape in tensors.items():
        block_type = "F32" if len(shape) != 2 else MORE_BITS if name in promoted else mix.head if name == head else mix.base
        layout = LAYOUTS.get(block_type)
        found[name] = layout.fallback if layout and layout.fallback and shape[1] % layout.block else block_type
    return found
