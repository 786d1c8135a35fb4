"""Scales that are not finite, in every block type and at every place of a row; what is no scale is not taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.layouts import pack
from kiln.exporter.source.finite import TOO_LARGE, bad_halves, bad_row


def sound(block_type: str) -> np.ndarray:
    """Blocks [5, 3, bytes] of all bits set but in scales."""
    layout = LAYOUTS[block_type]
    blocks = np.full((5, 3, layout.block_bytes), 255, np.uint8)
    for at in layout.half_fields:
        blocks[:, :, at : at + 2] = np.array([1.5], np.float16).view(np.uint8)
    if layout.scales == "e8m0":
        blocks[:, :, layout.byte_fields[0]] = 252
    return blocks


def found(block_type: str, blocks: np.ndarray) -> int | None:
    row = bad_row(block_type, blocks.reshape(len(blocks), -1))
    assert bad_halves(block_type, pack(block_type, blocks)[1]) == (row is not None)
    return row


@pytest.mark.parametrize("block_type", LAYOUTS)
def test_scales(block_type: str) -> None:
    layout = LAYOUTS[block_type]
    assert found(block_type, sound(block_type)) is None
    for at in layout.half_fields:
        for value in (np.nan, np.inf, -np.inf):
            blocks = sound(block_type)
            blocks[3:, 2, at : at + 2] = np.array([value], np.float16).view(np.uint8)
            assert found(block_type, blocks) == 3
    for at in layout.byte_fields[0] if layout.scales == "e8m0" else ():
        for value in (253, 255):
            blocks = sound(block_type)
            blocks[2, 1, at] = value
            assert found(block_type, blocks) == 2


def test_largest_power_of_two() -> None:
    """One more, and the largest level of MXFP4 is infinite."""
    with np.errstate(over="ignore"):
        last, first = (quants.dequantize(np.array([[TOO_LARGE - i, *[0x77] * 16]], np.uint8), GGMLQuantizationType.MXFP4) for i in (1, 0))
    assert np.isfinite(last).all() and np.isinf(first).all()
