"""The block behind the layers of some files that predicts the token after the next, as a plain module: a reference, in no artifact yet.

It is a decoder of one attention layer. Its input at position p is the token there and what the model's norm before the head left at p - 1;
its own norm leaves what takes that one's place for the draft after, at position p + 1. It has keys and values of its own, of all tokens.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from kiln.exporter.errors import KilnError
from kiln.exporter.model.decoder import Decoder
from kiln.exporter.model.parts import Matrix, Norm
from kiln.exporter.model.records import ModelConfig
from kiln.exporter.source.config import expected_tensors, families
from kiln.exporter.source.gguf import GGUFFile
from kiln.exporter.source.weights import WeightPlan, plan_weights

MIXED = "nextn.eh_proj"  # of both inputs to the block's
NORM = "nextn.shared_head_norm.weight"


def draft_config(config: ModelConfig) -> ModelConfig:
    """The block as a model of one layer, which is that of the last attention. KilnError where the file has no block, or several."""
    if config.draft_blocks != 1:
        raise KilnError(f"{config.name} has {config.draft_blocks} drafting blocks; one was expected")
    last = config.layers[max(config.attentions)]
    return replace(config, layers=(replace(last, index=0),), draft_blocks=0)


def draft_plan(config: ModelConfig, gguf: GGUFFile) -> list[WeightPlan]:
    """Of `Drafter`: the block's tensors as those of layer 0, its norm as the last one, embedding and head its own where it has any."""
    one, block = draft_config(config), f"blk.{len(config.layers)}."
    table = families()[config.architecture]["draft_tensors"]
    behind = replace(one, layers=(replace(one.layers[0], index=len(config.layers)),))
    needed = (*expected_tensors(behind, gguf.tensors), f"{block}{NORM}", f"{block}{MIXED}.weight")
    if lacking := [name for name in needed if name not in gguf.tensors]:
        raise KilnError(f"{gguf.path}: tensor {lacking[0]} of the drafting block is missing; the file is incomplete")
    own = {"token_embd": "nextn.embed_tokens.weight", "output": "nextn.shared_head_head.weight", "output_norm": NORM}
    plan = []
    for p in plan_weights(behind, gguf):
        source = block + own.get(p.name, "")
        if p.name in own and source in gguf.tensors:
            p = replace(p, block_type=gguf.tensors[source].type if p.K else "F32", sources=(source,))
        plan.append(replace(p, name=p.name.replace(block, "blk.0.")))
    sizes = {"hidden": config.hidden_size, "twice_hidden": 2 * config.hidden_size}
    for name in (f"{MIXED}.weight", "nextn.enorm.weight", "nextn.hnorm.weight"):
        shape = tuple(sizes[d] for d in table[name]["shape"])
        info = gguf.tensors.get(block + name)
        if info is None or info.shape != shape:
            raise KilnError(f"{gguf.path}: tensor {block}{name} of the drafting block is missing or not of shape {list(shape)}")
        matrix = len(shape) == 2
        target = name.removesuffix(".weight").replace(".", "_")
        plan.append(WeightPlan(target, info.type if matrix else "F32", shape[0], prod(shape[1:]) if matrix else 0, (block + name,)))
    return plan


class Drafter(Decoder):
    """`draft_config` over `draft_plan`."""

    def __init__(self, config: ModelConfig, plan: list[WeightPlan], max_seq_len: int, dtype: torch.dtype):
        super().__init__(config, plan, max_seq_len, dtype)
        self.nextn_eh_proj = Matrix(next(p for p in plan if p.name == "nextn_eh_proj"))
        self.nextn_enorm, self.nextn_hnorm = (Norm(config.hidden_size, config.rms_norm_eps) for _ in range(2))

    def draft(self, tokens: Tensor, hidden: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, pos [T]; hidden [T, D], the model's or a draft's at pos - 1, zeros before the first -> float32 [T, V], hidden [T, D].

        Row p is of the token behind tokens[p].
        """
        e = self.token_embd.rows(tokens).to(self.dtype)
        x = self.nextn_eh_proj.linear(torch.cat((self.nextn_enorm(e), self.nextn_hnorm(hidden)), -1))
        y = self.blk[0](x, pos, self.rope_tables(pos), {}, None)
        return self.logits(y), self.output_norm(y)
