"""The dense product: its arguments, who multiplies, which tile, and the kernels bit for bit whatever the number of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights import linear, matmul
from kiln.custom_ops.weights.matmul import FLOAT32, TILES, UNALIGNED, MatmulTile, choosing, fitting_tile
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.weights.test_linear import random_weight, relative_error

TARGETS = gpu_targets()
test_kernels_interpreted = interpreted(__file__)


def operands(tokens: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)


def error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    exact = x.double() @ w.double()
    return float((y.double() - exact).norm() / exact.norm())


def test_reference() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
        x, w = operands(5, 48, 64, dtype)
        for y in (torch.ops.kiln.matmul(x, w, False), torch.ops.kiln.matmul(x, w.T.contiguous(), True)):
            assert y.dtype == dtype and y.shape == (5, 48) and error(y, x, w) < tolerance


def test_wrong_arguments_are_named() -> None:
    x, w = operands(3, 8, 16, torch.float32)
    for arguments, message in (
        ((x, w, True), r"x is torch.float32 \(3, 16\), w torch.float32 \(16, 8\); expected float32 or bfloat16 \[T, 8\]"),
        ((x.bfloat16(), w, False), "x is torch.bfloat16"),
        ((x.half(), w.half(), False), "x is torch.float16"),
        ((x[0], w, False), r"x is torch.float32 \(16,\)"),
        ((x, w[0], False), "expected two matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.kiln.matmul(*arguments)
    with pytest.raises(ValueError, match="'cublas'; expected one of kiln, blas"), choosing("cublas"):
        pass
    with pytest.raises(ValueError, match="halves, specialize and few go with tma"):
        MatmulTile(specialize=True)


@pytest.mark.parametrize("name", TARGETS)
def test_tiles(name: str) -> None:
    """A descriptor takes rows of whole 16 bytes; float32 never runs on tensor cores, which would round it."""
    target = TARGETS[name]
    usual = fitting_tile(torch.bfloat16, 16384, 5376, 16384, False, target)
    assert usual.tma == (target.sm in (90, 100))
    for n, k, columns, transposed in ((300, 5376, 300, False), (304, 100, 304, True), (304, 96, 308, False)):
        assert fitting_tile(torch.bfloat16, n, k, columns, transposed, target) == UNALIGNED
    assert fitting_tile(torch.float32, 16384, 5376, 16384, False, target) == FLOAT32 and not FLOAT32.tma


def test_bytes_and_operations() -> None:
    assert matmul.bytes_moved(2, 10, 20) == 2 * (2 * 30 + 200) and matmul.flops(2, 10, 20) == 800


# ---- under the interpreter ----

SMALL = MatmulTile(16, 32, 16, 4, 3, 2, tma=True)
TYPES = {
    "tma": SMALL,
    "halves": dataclasses.replace(SMALL, halves=True),
    "few": dataclasses.replace(SMALL, rows=64, few=(16, 16, 16, 2)),
    "specialized": dataclasses.replace(SMALL, specialize=True),
    "pointers": MatmulTile(16, 16, 32, 4, 3, 2),
    "spans": MatmulTile(16, 16, 16, 4, 3, 2, span=32),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block_type", TYPES)
def interpreted_every_way(block_type: str, transposed: bool) -> None:
    """Within a wider result; sizes that no tile divides; fewer tiles than programs, as many, and several waves. Rows stay the same."""
    n, k, tile = 104, 72, TYPES[block_type]
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float32, 1e-6)):  # the interpreter truncates to bfloat16
        given = operands(130, n, k, dtype)
        # numpy's product of a tile may depend on where in it a row lies, so rows are compared where every order of additions is exact; on a
        # GPU they are of any operands (test_gpu_ops).
        for exact, (x, w) in ((False, given), (True, tuple((4 * t).round() for t in given))):
            rows = []
            for tokens in (130, 2, 17, 49) if exact else (130, 17):
                out = torch.full((tokens, n + 24), torch.nan, dtype=dtype)
                with compiling_for(dataclasses.replace(TARGETS["sm_90"], sm_count=5)):
                    matmul.multiply_into(x[:tokens], w.T.contiguous() if transposed else w, out, 8, transposed, tile)
                assert out[:, :8].isnan().all() and out[:, 8 + n :].isnan().all()
                rows.append(out[:, 8 : 8 + n])
                assert error(rows[-1], x[:tokens], w) < tolerance
                assert not exact or torch.equal(rows[-1], rows[0][:tokens])


def interpreted_choice(monkeypatch) -> None:
    """The one place that decides, for float weights and for packed ones, in two pieces."""
    launched = []
    into = matmul.multiply_into
    monkeypatch.setattr(matmul, "multiply_into", lambda *arguments: (launched.append(arguments[3]), into(*arguments)))
    monkeypatch.setattr(linear, "MAX_SCRATCH_BYTES", 256 * 256 * 2)
    monkeypatch.setitem(TILES, 90, TYPES["tma"])
    words, halves, matrix = random_weight("Q4_K", 304, 256)
    x, w = operands(12, 40, 256, torch.bfloat16)
    for choice in matmul.CHOICES:
        launched.clear()
        with compiling_for(TARGETS["sm_90"]), choosing(choice):
            y = torch.ops.kiln.quantized_linear(x, words, halves, "Q4_K")
            z = torch.ops.kiln.matmul(x, w, False)
        assert launched == ([0, 256, 0] if choice == "kiln" else [])
        assert relative_error(y, x, matrix) < 8e-3 and error(z, x, w) < 8e-3


def interpreted_one_row() -> None:
    """A float weight's row by row sum: no tile for one token."""
    for dtype, tolerance in ((torch.bfloat16, 3e-3), (torch.float32, 1e-6)):
        x, w = operands(1, 40, 256, dtype)
        with compiling_for(TARGETS["sm_90"]), choosing("kiln"):
            y = torch.ops.kiln.matmul(x, w.T.contiguous(), True)
        assert y.dtype == dtype and y.shape == (1, 40) and error(y, x, w) < tolerance
