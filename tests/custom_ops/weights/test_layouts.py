"""Packed layouts: same bytes, and dequantization bit-equal to the gguf package's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from kiln.custom_ops.weights.layouts import LAYOUTS, dequantize, pack, unpack

FIXTURES = Path(__file__).parents[2] / "fixtures"
TYPES = list(LAYOUTS)
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def random_blocks(block_type: str, n: int, g: int, seed: int = 0) -> np.ndarray:
    """Random bytes [n, g, block bytes] whose fp16 scales are finite."""
    layout = LAYOUTS[block_type]
    blocks = np.random.default_rng(seed).integers(0, 256, (n, g, layout.block_bytes), dtype=np.uint8)
    for at in layout.half_fields:
        blocks[:, :, at + 1] &= 0xBF  # clears the top exponent bit: |scale| < 2
    return blocks


def oracle(block_type: str, blocks: np.ndarray) -> np.ndarray:
    """float32 [N, K] from uint8 [N, G, block bytes]."""
    return gguf.quants.dequantize(blocks.reshape(blocks.shape[0], -1), GGMLQuantizationType[block_type])


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize("block_type", TYPES)
def test_sizes(block_type: str) -> None:
    layout = LAYOUTS[block_type]
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[block_type]]
    assert (layout.block, layout.block_bytes) == (layout.together * block, layout.together * size)
    assert layout.ggml_type == GGMLQuantizationType[block_type]


@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize(("n", "g"), [(1, 1), (7, 3), (64, 5)])
def test_random_blocks(block_type: str, n: int, g: int) -> None:
    blocks = random_blocks(block_type, n, g)
    words, halves = pack(block_type, blocks)
    layout = LAYOUTS[block_type]
    assert words.shape == (g, layout.words, n) and words.dtype == np.int32
    assert halves.shape == (g, layout.halves, n) and halves.dtype == layout.halves_dtype
    np.testing.assert_array_equal(unpack(block_type, words, halves), blocks)
    got = dequantize(block_type, torch.from_numpy(words), torch.from_numpy(halves))
    assert got.shape == (g * layout.block, n) and got.dtype == torch.float32
    np.testing.assert_array_equal(bits(got.numpy().T), bits(oracle(block_type, blocks)))


@pytest.mark.parametrize("block_type", TYPES)
def test_row_chunks_and_strided_input(block_type: str) -> None:
    blocks = random_blocks(block_type, 50, 6)
    whole = pack(block_type, blocks[:, 2:5])
    words, halves = np.empty_like(whole[0]), np.empty_like(whole[1])
    for n0, n1 in ((0, 17), (17, 18), (18, 50)):
        pack(block_type, blocks[n0:n1, 2:5], out=(words[:, :, n0:n1], halves[:, :, n0:n1]))
    np.testing.assert_array_equal(words, whole[0])
    np.testing.assert_array_equal(halves.view(np.uint16), whole[1].view(np.uint16))
    np.testing.assert_array_equal(unpack(block_type, words, halves), blocks[:, 2:5])


@pytest.mark.parametrize("block_type", ["Q4_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K", "MXFP4"])
def test_word_order(block_type: str) -> None:
    """The documented place of every element, read back one by one in plain Python."""
    layout = LAYOUTS[block_type]
    blocks = random_blocks(block_type, 2, 1, seed=3)
    words, halves = pack(block_type, blocks)
    raw = halves[0, :, 1].view(np.uint16)
    words, halves = words[0, :, 1].view(np.uint32).tolist(), raw.view(np.float16).astype(np.float32)

    def byte(word: int, b: int) -> int:
        return words[word] >> (8 * b) & 255

    groups = layout.block // 32
    expected = oracle(block_type, blocks)[1]
    for e in range(layout.block):
        group, i = divmod(e, 32)
        if block_type == "Q8_0":
            value = np.float32(np.uint8(byte(i // 4, i % 4)).view(np.int8)) * halves[0]
        elif block_type == "Q2_K":
            q, both = byte(2 * group + i // 16, i % 4) >> (2 * (i % 16 // 4)) & 3, byte(16 + e // 64, e // 16 % 4)
            value = halves[0] * np.float32(both & 15) * np.float32(q) - halves[1] * np.float32(both >> 4)
        elif block_type == "Q3_K":
            q = byte(2 * group + i // 16, i % 4) >> (2 * (i % 16 // 4)) & 3 | (byte(16 + group, i % 4) >> (i // 4) & 1) << 2
            s = e // 16
            scale = byte(24 + s % 8 // 4, s % 4) >> 4 * (s // 8) & 15 | (byte(26, s % 4) >> 2 * (s // 4) & 3) << 4
            value = halves[0] * np.float32(scale - 32) * np.float32(q - 4)
        else:
            q = byte(4 * group + i // 8, i % 4) >> (4 if i % 8 >= 4 else 0) & 15
            if block_type in ("Q5_1", "Q5_K"):
                q |= (byte(4 * groups + group, i % 4) >> (i // 4) & 1) << 4
            if block_type == "Q6_K":
                q |= (byte(32 + 2 * group + i // 16, i % 4) >> (2 * (i % 16 // 4)) & 3) << 4
                index = e // 16
                scale = np.uint8(byte(48 + index // 4, index % 4)).view(np.int8)
                value = halves[0] * np.float32(scale) * np.float32(q - 32)
            elif block_type == "IQ4_NL":
                value = halves[0] * np.float32(IQ4_LEVELS[q])
            elif block_type == "MXFP4":
                levels = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
                value = np.ldexp(np.float32(levels[q]), (int(raw[0]) >> 8 * group & 255) - 128)
            elif block_type == "IQ4_XS":
                scale = byte(32, group // 2) >> 4 * (group % 2) & 15 | (int(raw[1]) >> 2 * group & 3) << 4
                value = halves[0] * np.float32(scale - 32) * np.float32(IQ4_LEVELS[q])
            elif block_type == "Q4_0":
                value = halves[0] * np.float32(q - 8)
            elif block_type == "Q5_1":
                value = halves[0] * np.float32(q) + halves[1]
            else:
                sc = [byte(layout.words - 3 + j // 4, j % 4) for j in range(12)]
                if group < 4:
                    s, m = sc[group] & 63, sc[group + 4] & 63
                else:
                    s, m = sc[group + 4] & 15 | sc[group - 4] >> 6 << 4, sc[group + 4] >> 4 | sc[group] >> 6 << 4
                value = halves[0] * np.float32(s) * np.float32(q) - halves[1] * np.float32(m)
        assert value == expected[e], (block_type, e)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*-wide-*.gguf")), ids=lambda p: p.stem)
def test_every_fixture_tensor(path: Path) -> None:
    tensors = [t for t in gguf.GGUFReader(path).tensors if t.tensor_type.name in LAYOUTS]
    assert tensors
    for tensor in tensors:
        block_type = tensor.tensor_type.name
        rows = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])  # of a stack of matrices, too
        blocks = rows.reshape(rows.shape[0], -1, LAYOUTS[block_type].block_bytes)
        words, halves = pack(block_type, blocks)
        np.testing.assert_array_equal(unpack(block_type, words, halves), blocks)
        got = dequantize(block_type, torch.from_numpy(words), torch.from_numpy(halves)).numpy()
        np.testing.assert_array_equal(bits(got.T), bits(gguf.quants.dequantize(rows, tensor.tensor_type)), err_msg=tensor.name)


@pytest.mark.parametrize("block_type", TYPES)
def test_exports_without_constants(block_type: str) -> None:
    class Dequantize(torch.nn.Module):
        def forward(self, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
            return dequantize(block_type, words, halves)

    args = tuple(torch.from_numpy(x) for x in pack(block_type, random_blocks(block_type, 8, 2)))
    program = torch.export.export(Dequantize(), args)
    assert not program.constants
    assert torch.equal(program.module()(*args), dequantize(block_type, *args))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="IQ3_S"):
        pack("IQ3_S", np.zeros((1, 1, 110), np.uint8))
    with pytest.raises(ValueError, match="144 bytes, got 100"):
        pack("Q4_K", np.zeros((1, 1, 100), np.uint8))
