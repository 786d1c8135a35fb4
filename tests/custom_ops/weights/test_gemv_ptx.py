"""The PTX of decode matmuls, inline assembly with it, on a CPU: right, and each token the bits that it has alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from kiln.custom_ops.gpu.target import gpu_targets
from kiln.custom_ops.markers import GATED
from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.gemv import GemvConfig
from kiln.custom_ops.weights.layouts import LAYOUTS
from tests.custom_ops.interpret import at_night
from tests.custom_ops.ptx.launcher import Launcher, playing
from tests.custom_ops.weights.test_linear import random_weight, random_x

H200 = gpu_targets()["sm_90"]
BOUND = {1: 2e-2, 2: 2e-5, 3: 2e-6}  # of a row's largest result, by bytes of an activation
kiln = torch.ops.kiln


@pytest.fixture()
def launcher(monkeypatch) -> Iterator[Launcher]:
    """A card of one multiprocessor, on which two programs of 32 rows run at a time."""
    for key in gemv.SUMS_CONFIGS:
        config = dataclasses.replace(gemv.SUMS_CONFIGS[key], rows=32, warps=1, warps_per_sm=4)
        monkeypatch.setitem(gemv.SUMS_CONFIGS, key, config)
    monkeypatch.setitem(gemv.GEMV_CONFIGS, 90, GemvConfig(warps_per_sm=8))
    with playing(monkeypatch, dataclasses.replace(H200, sm_count=1)) as launcher:
        yield launcher


def result(end: str, x: torch.Tensor, squares: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str,
           alone: bool = False) -> torch.Tensor:
    """What the op of this end makes of x, tokens first; squares [T, P]."""
    given, zeros, one = (x, words, halves, block_type), torch.zeros(8, dtype=torch.int32), x.shape[0] == 1
    roots = squares[0] if one else squares
    if end == "split":
        parts = kiln.fixed_partials(*given, roots, 1e-3, alone=alone)
        return parts.unsqueeze(0) if one else parts.transpose(0, 1)
    if end == "glu":
        found = kiln.fixed_glu(*given, zeros, roots, 1e-3, alone=alone)
    else:
        found, left = kiln.fixed_linear_squares(*given, zeros, roots, 1e-3, alone=alone)
        found = torch.cat([found, left.unsqueeze(0) if one else left], 1)
    assert not zeros.any()
    return found


OTHERS = [(t, end, 8) for t in LAYOUTS if LAYOUTS[t].block == 256 for end in ("split", "squares", "glu")]


@pytest.mark.parametrize("block_type, end, most", [("Q4_K", "split", 4), ("Q4_K", "glu", 2), ("Q6_K", "split", 2), *at_night(*OTHERS)])
def test_integer_sums(launcher: Launcher, block_type: str, end: str, most: int) -> None:
    """An odd number of blocks of 256 for a program, so that the last turn of a loop over two has one."""
    words, halves, _ = random_weight(block_type, 64, 5 * 256)
    for terms in (2,) if most < 8 else (1, 2, 3):
        x = fixed_point.quantize(random_x(most, 5 * 256, torch.float32) * torch.logspace(-2, 2, most)[:, None], terms)
        squares = torch.rand(most, 3)
        together = result(end, x, squares, words, halves, block_type)
        right, bound = gemv.reference(x, words, halves, block_type, squares, 1e-3), BOUND[terms]
        found = together.sum(1) if end == "split" else together[:, :64]
        if end == "glu":
            right = fixed_point.dequantize(fixed_point.quantize(GATED["gelu_tanh"](*right.chunk(2, 1)), terms))
            found, bound = fixed_point.dequantize(together), bound + 1.1 / fixed_point.largest(terms)  # the last bit of what is kept
        assert ((found - right).abs().amax(1) <= bound * right.abs().amax(1)).all()
        for m in (m for m in (1, 2, 4) if m < most):
            assert torch.equal(result(end, x[:m], squares[:m], words, halves, block_type), together[:m]), (terms, m)
    assert set(launcher.launched) == {"kiln_gemv_sums"}


@pytest.mark.parametrize("end", ["split", *at_night("squares", "glu")])
def test_one_token_alone(launcher: Launcher, end: str) -> None:
    """Q6_K by `kiln_gemv` where no step of several tokens is beside, within the bound of the other kernel; Q4_K as among others."""
    for block_type, kernel in (("Q6_K", "kiln_gemv"), ("Q4_K", "kiln_gemv_sums")):
        words, halves, _ = random_weight(block_type, 64, 512)
        x, squares = fixed_point.quantize(random_x(1, 512, torch.float32), 2), torch.rand(1, 3)
        launcher.launched.clear()
        found = result(end, x, squares, words, halves, block_type, alone=True)
        assert set(launcher.launched) == {kernel}
        right = result(end, x, squares, words, halves, block_type)
        if end == "split":
            found, right = found.sum(1), right.sum(1)
        if end == "glu":
            found, right = fixed_point.dequantize(found), fixed_point.dequantize(right)
        columns = slice(None, 64)
        assert torch.allclose(found[:, columns], right[:, columns], rtol=0, atol=float(4e-5 * right[:, columns].abs().max()))
        assert block_type == "Q6_K" or torch.equal(found, right)


def test_rows_past_the_end(launcher: Launcher) -> None:
    """A slice whose last program has rows that others computed, and whose neighbours are not written."""
    words, halves, _ = random_weight("Q4_K", 64, 512)
    cut = slice(4, 48)
    x = fixed_point.quantize(random_x(3, 512, torch.float32), 2)
    right = gemv.reference(x, words[:, :, cut], halves[:, :, cut], "Q4_K", None, 0.0)
    for m in (1, 2, 3):
        parts = kiln.fixed_partials(x[:m], words[:, :, cut], halves[:, :, cut], "Q4_K").view(-1, m, 44)
        assert torch.allclose(parts.sum(0), right[:m], rtol=0, atol=float(2e-5 * right.abs().max()))


@pytest.mark.parametrize("block_type", ["Q4_0", *at_night("Q8_0", "Q5_1", "MXFP4")])
def test_blocks_of_32(launcher: Launcher, block_type: str) -> None:
    words, halves, _ = random_weight(block_type, 64, 256)
    x = fixed_point.quantize(random_x(4, 256, torch.float32), 2)
    together = kiln.fixed_linear(x, words, halves, block_type, torch.zeros(8, dtype=torch.int32))
    right = gemv.reference(x, words, halves, block_type, None, 0.0)
    assert ((together - right).abs().amax(1) <= 2e-5 * right.abs().amax(1)).all()
    for m in (1, 2):
        assert torch.equal(kiln.fixed_linear(x[:m], words, halves, block_type, torch.zeros(8, dtype=torch.int32)), together[:m]), m
    assert set(launcher.launched) == {"kiln_gemv", "kiln_gemv_tiles"}
