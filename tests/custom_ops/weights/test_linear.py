"""Quantized linear: the reference against the gguf package, an exported program, and the kernels (the GEMV itself: test_gemv)."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch

from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights import linear as op
from kiln.custom_ops.weights.layouts import LAYOUTS, dequantize, pack
from tests.custom_ops.interpret import interpreted

TYPES = list(LAYOUTS)
H200 = gpu_targets()["sm_90"]
test_kernels_interpreted = interpreted(__file__)


def random_weight(block_type: str, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """words, halves and the float32 matrix [n, k] by the gguf package, from random quants and scales of ordinary size."""
    random = np.random.default_rng(seed)
    layout = LAYOUTS[block_type]
    blocks = random.integers(0, 256, (n, k // layout.block, layout.block_bytes), dtype=np.uint8)
    for at in layout.half_fields:
        blocks[:, :, at : at + 2] = random.normal(0, 0.02, (n, k // layout.block, 1)).astype(np.float16).view(np.uint8)
    if layout.scales == "e8m0":
        blocks[:, :, layout.byte_fields[0]] = random.integers(118, 124, (n, k // layout.block, 2))
    matrix = gguf.quants.dequantize(blocks.reshape(n, -1), gguf.GGMLQuantizationType[block_type])
    words, halves = pack(block_type, blocks)
    return torch.from_numpy(words), torch.from_numpy(halves), matrix


def random_x(tokens: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(y: torch.Tensor, x: torch.Tensor, matrix: np.ndarray) -> float:
    exact = x.double() @ torch.from_numpy(matrix).double().T
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("block_type", TYPES)
def test_reference(block_type: str) -> None:
    words, halves, matrix = random_weight(block_type, 40, 512)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
        x = random_x(3, 512, dtype)
        y = torch.ops.kiln.quantized_linear(x, words, halves, block_type)
        assert y.dtype == dtype and y.shape == (3, 40)
        assert relative_error(y, x, matrix) < tolerance
        part = torch.ops.kiln.quantized_linear(x, words[:, :, 8:24], halves[:, :, 8:24], block_type)
        assert relative_error(part, x, matrix[8:24]) < tolerance


def test_wrong_arguments_are_named() -> None:
    words, halves, _ = random_weight("Q4_K", 16, 256)
    x = random_x(1, 256, torch.float32)
    for arguments, message in (
        ((x[:, :128], words, halves, "Q4_K"), r"x is torch.float32 \(1, 128\); expected .* \[T, 256\]"),
        ((x.half(), words, halves, "Q4_K"), "x is torch.float16"),
        ((x[0], words, halves, "Q4_K"), r"x is torch.float32 \(256,\)"),
        ((x, words.long(), halves, "Q4_K"), "words is torch.int64"),
        ((x, words, halves.float(), "Q4_K"), "halves torch.float32"),
        ((x, words, halves, "Q5_K"), r"Q5_K words \(1, 35, 16\) .* expected \[G, 43, N\]"),
        ((x, words, halves[:, :1], "Q4_K"), r"halves \(1, 1, 16\)"),
        ((x, words, halves, "IQ3_S"), "no packed layout for block type IQ3_S"),
        ((x, words.transpose(1, 2).contiguous().transpose(1, 2), halves, "Q4_K"), "words has strides"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.kiln.quantized_linear(*arguments)


class TwoLayers(torch.nn.Module):
    """A matrix, and a slice of another along N."""

    def __init__(self) -> None:
        super().__init__()
        for name, block_type, n, k in (("up", "Q4_K", 96, 256), ("down", "Q5_0", 80, 96)):
            words, halves, _ = random_weight(block_type, n, k)
            self.register_buffer(f"{name}_words", words)
            self.register_buffer(f"{name}_halves", halves)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.ops.kiln.quantized_linear(x, self.up_words, self.up_halves, "Q4_K")
        return torch.ops.kiln.quantized_linear(torch.tanh(x), self.down_words[:, :, 16:48], self.down_halves[:, :, 16:48], "Q5_0")


def test_opaque_when_exported() -> None:
    """Compiled: see test_sample."""
    tokens = torch.export.Dim("tokens", min=2, max=2048)
    program = torch.export.export(TwoLayers(), (random_x(5, 256, torch.float32),), dynamic_shapes=({0: tokens},), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("kiln.quantized_linear.default") == 2
    assert set(targets) <= {"kiln.quantized_linear.default", "aten.tanh.default", "aten.slice.Tensor"}


def test_scratch_is_bounded() -> None:
    assert op.chunk_rows(43008, 5376, 2) == 21504  # gate and up apart
    assert op.chunk_rows(16384, 5376, 2) == 16384
    for n, k, itemsize in ((262144, 5376, 2), (43008, 5376, 4), (300, 64, 2), (21504, 16384, 4)):
        rows = op.chunk_rows(n, k, itemsize)
        assert rows % op.DEQUANTIZE_ROWS == 0 and rows * k * itemsize <= op.MAX_SCRATCH_BYTES
        assert (-(-n // rows) - 1) * rows < n


def test_bytes_and_operations() -> None:
    assert op.bytes_moved("Q4_K", 1, 5376, 8192) == 5376 * 8192 * 9 // 16 + 2 * (5376 + 8192)
    assert op.bytes_moved("Q6_K", 2, 256, 512, itemsize=4) == 256 * 2 * 210 + 2 * 4 * (256 + 512)
    assert op.flops(3, 10, 20) == 1200


# ---- under the interpreter ----


@pytest.mark.parametrize("block_type,k,tokens", [("Q4_K", 256, 1), ("Q8_0", 96, 3), ("Q5_1", 160, 2), ("Q6_K", 256, 2), ("IQ4_NL", 96, 1)])
def interpreted_few_tokens(block_type: str, k: int, tokens: int) -> None:
    """In fixed point: also K that the usual number of groups at a time does not divide, and rows that no program's rows divide."""
    words, halves, matrix = random_weight(block_type, 70, k)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):  # the interpreter truncates to bfloat16
        x = random_x(tokens, k, dtype)
        with compiling_for(dataclasses.replace(H200, sm_count=1)):
            y = torch.ops.kiln.quantized_linear(x, words, halves, block_type)
        assert y.dtype == dtype and y.shape == (tokens, 70)
        assert relative_error(y, x, matrix) < tolerance


@pytest.mark.parametrize("block_type", TYPES)
def interpreted_dequantize(block_type: str) -> None:
    """Bit for bit, also of a slice that no program's rows divide."""
    words, halves, matrix = random_weight(block_type, 300, 256)
    for cut in (slice(0, 256), slice(7, 290)):
        expected = torch.from_numpy(matrix[cut]).T
        assert torch.equal(op.dequantized(words[:, :, cut], halves[:, :, cut], block_type, torch.float32, words), expected)
        assert torch.equal(expected, dequantize(block_type, words[:, :, cut], halves[:, :, cut]))
    rounded = op.dequantized(words[:, :, cut], halves[:, :, cut], block_type, torch.bfloat16, words)
    torch.testing.assert_close(rounded.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("block_type", ["Q4_K", "Q5_0"])
def interpreted_many_tokens(block_type: str, monkeypatch) -> None:
    """Dequantized in two chunks along N, the second shorter, and multiplied."""
    words, halves, matrix = random_weight(block_type, 300, 256)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        monkeypatch.setattr(op, "MAX_SCRATCH_BYTES", 256 * 256 * dtype.itemsize)
        assert op.chunk_rows(300, 256, dtype.itemsize) == 256
        x = random_x(op.MAX_GEMV_TOKENS + 4, 256, dtype)
        with compiling_for(dataclasses.replace(H200, sm_count=1)):
            y = torch.ops.kiln.quantized_linear(x, words, halves, block_type)
        assert y.dtype == dtype and y.shape == (12, 300)
        assert relative_error(y, x, matrix) < tolerance
