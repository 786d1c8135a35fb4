"""Which block type llama-quantize gives each tensor of a model, without an importance matrix. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kiln.custom_ops.weights.block_types import LAYOUTS

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
PER_LAYER_EMBEDDING, PER_LAYER_PROJECTION = "per_layer_token_embd.weight", "per_layer_model_proj.weight"  # the one is never quantized
# Never quantized: what chooses experts, the gate of the network beside them, a convolution's taps.
KEPT = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight", ".ssm_conv1d.weight")
HEAD = "Q6_K"  # of the head, which may be the embedding, in a mix of fewer bits


def more_bits(i: int, n: int) -> bool:
    """The first and last eighth of n, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def first_eighth(i: int, n: int) -> bool:
    return i < n // 8


def first_sixteenth(i: int, n: int) -> bool:
    return i < n // 16


def first_two(i: int, n: int) -> bool:
    return i < 2


def each(i: int, n: int) -> bool:
    return True


@dataclass(frozen=True)
class Mix:
    """Types of a file: of most matrices, of the head (which may be the embedding), and of those that get more bits.

    Matrices that are counted together are joined by "|".
    """

    base: str
    file_type: str  # name in gguf.LlamaFileType
    head: str
    promoted: tuple[tuple[str, Callable[[int, int], bool], str], ...] = ()  # (matrix, if the i-th of n such, type): the first that fits


_K_M = tuple((name, more_bits, "Q6_K") for name in ("attn_v|attn_qkv", "ffn_down", "ffn_down_exps", "ffn_down_shexp"))
_Q3_K_M = (("attn_output", each, "Q4_K"), ("attn_v", first_two, "Q5_K"), ("attn_v", each, "Q4_K"), ("ffn_down", first_sixteenth, "Q5_K"),
           ("ffn_down", each, "Q4_K"))  # fmt: skip
# attn_v of a model with 4 or more query heads for each KV head is Q4_K.
_Q2_K = tuple((name, each, "Q3_K") for name in ("attn_v", "attn_output", "ffn_down"))
MIXES = {
    "q2_k": Mix("Q2_K", "MOSTLY_Q2_K", HEAD, _Q2_K),
    "q3_k_m": Mix("Q3_K", "MOSTLY_Q3_K_M", HEAD, _Q3_K_M),
    "q4_k_m": Mix("Q4_K", "MOSTLY_Q4_K_M", HEAD, _K_M),
    "q5_k_m": Mix("Q5_K", "MOSTLY_Q5_K_M", HEAD, _K_M),
    "q6_k": Mix("Q6_K", "MOSTLY_Q6_K", "Q6_K"),
    "q4_0": Mix("Q4_0", "MOSTLY_Q4_0", HEAD),
    "iq4_nl": Mix("IQ4_NL", "MOSTLY_IQ4_NL", HEAD, (("ffn_down", first_eighth, "Q5_K"),)),
    "iq4_xs": Mix("IQ4_XS", "MOSTLY_IQ4_XS", HEAD, (("ffn_down", first_eighth, "Q5_K"),)),
    "q8_0": Mix("Q8_0", "MOSTLY_Q8_0", "Q8_0"),
    "bf16": Mix("BF16", "MOSTLY_BF16", "BF16"),
    "f32": Mix("F32", "ALL_F32", "F32"),
}
# `kiln synth` makes random blocks of their types.
SYNTHETIC = ("q2_k", "q3_k_m", "q4_k_m", "q6_k", "q4_0", "iq4_nl", "iq4_xs", "q8_0", "f32")


def block_types(mix: Mix, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The type of every tensor, by name; `tensors` are their shapes in PyTorch order. What is no matrix is F32."""
    promoted: dict[str, str] = {}
    head = (OUTPUT if OUTPUT in tensors else EMBEDDING, PER_LAYER_EMBEDDING)
    for stem, chosen, more in mix.promoted:
        ends = tuple(f".{name}.weight" for name in stem.split("|"))
        like = [name for name in tensors if name.endswith(ends)]
        promoted = {name: more for i, name in enumerate(like) if chosen(i, len(like))} | promoted
    found = {}
    for name, shape in tensors.items():
        matrix = mix.head if name in head else promoted.get(name, mix.base)
        block_type = "F32" if len(shape) < 2 or name.endswith(KEPT) else matrix
        if name == PER_LAYER_PROJECTION and mix.base in LAYOUTS:
            block_type = "BF16"  # as the file had it before
        layout = LAYOUTS.get(block_type)
        found[name] = layout.fallback if layout and layout.fallback and shape[-1] % layout.block else block_type
    return found
