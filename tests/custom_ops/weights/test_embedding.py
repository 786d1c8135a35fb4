"""Quantized embedding: the reference against the gguf package, an exported program, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from kiln.custom_ops.weights import embedding as op
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.weights.test_linear import TYPES, random_weight

IDS = torch.tensor([3, 0, 49, 3, 12])
test_kernels_interpreted = interpreted(__file__)


@pytest.mark.parametrize("block_type", TYPES)
def test_reference(block_type: str) -> None:
    words, halves, matrix = random_weight(block_type, 50, 512)
    for ids in (IDS, IDS[:1]):
        rows = torch.ops.kiln.quantized_embedding(ids, words, halves, block_type)
        assert rows.dtype == torch.float32 and torch.equal(rows, torch.from_numpy(matrix)[ids])


def test_wrong_arguments_are_named() -> None:
    words, halves, _ = random_weight("Q6_K", 16, 256)
    with pytest.raises(ValueError, match=r"ids is torch.int32 \(5,\); expected int64 \[T\]"):
        torch.ops.kiln.quantized_embedding(IDS.int(), words, halves, "Q6_K")
    with pytest.raises(ValueError, match=r"Q4_K words \(1, 52, 16\)"):
        torch.ops.kiln.quantized_embedding(IDS, words, halves, "Q4_K")


class Table(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        words, halves, _ = random_weight("Q6_K", 50, 512)
        self.register_buffer("words", words)
        self.register_buffer("halves", halves)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.kiln.quantized_embedding(ids, self.words, self.halves, "Q6_K") * 2


def test_opaque_when_exported() -> None:
    """The number of tokens stays free. Compiled: see test_sample."""
    tokens = torch.export.Dim("tokens", min=2, max=2048)
    program = torch.export.export(Table(), (IDS,), dynamic_shapes=({0: tokens},), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["kiln.quantized_embedding.default", "aten.mul.Tensor"]


# ---- under the interpreter ----


@pytest.mark.parametrize("block_type", TYPES)
def interpreted_embedding(block_type: str) -> None:
    """Bit for bit: one token, fewer tokens than a program takes, and more; also of a slice of a table."""
    words, halves, _ = random_weight(block_type, 50, 256)
    for ids in (IDS[2:3], IDS, torch.arange(40)):
        assert torch.equal(torch.ops.kiln.quantized_embedding(ids, words, halves, block_type), op.reference(ids, words, halves, block_type))
    words, halves = words[:, :, 3:30], halves[:, :, 3:30]
    looked_up = torch.ops.kiln.quantized_embedding(IDS % 20, words, halves, block_type)
    assert torch.equal(looked_up, op.reference(IDS % 20, words, halves, block_type))
