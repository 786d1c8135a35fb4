"""The matmul of a few tokens straight from packed weights, interpreted: every block type, rows and tokens that no tile divides."""

from __future__ import annotations

import pytest
import torch

from kiln.custom_ops.bench.cases import packed
from kiln.custom_ops.weights.layouts import LAYOUTS, dequantize
from tests.custom_ops.interpret import interpreted
from tests.measure.few_tokens import Tile, few, off

test_kernels_interpreted = interpreted(__file__)


@pytest.mark.parametrize("block_type", list(LAYOUTS))
def interpreted_every_type(block_type: str) -> None:
    g = torch.Generator().manual_seed(0)
    words, halves = packed(block_type, 80, 768, g)
    x = torch.randn(5, 768, generator=g).bfloat16()
    expected = x.float() @ dequantize(block_type, words, halves)
    for tile in (Tile(32, 1, 4, 2, 2), Tile(64, 3, 4, 2, 4)):
        assert off(few(x, words, halves, block_type, tile), expected) < 8e-3  # the interpreter cuts bfloat16 off
