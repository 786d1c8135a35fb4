"""Fixed-point activations: error bounds, the layout of a row byte for byte, extreme values, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.fixed_point import GROUP, dequantize, group_words, largest, quantize
from tests.custom_ops.interpret import interpreted

test_kernels_interpreted = interpreted(__file__)

TERMS = (1, 2, 3)
# Half a step of the largest value of a group, and float32's own rounding of scale * v.
WORST = {terms: 0.5 / largest(terms) + 2**-23 for terms in TERMS}
RELATIVE = {1: 1e-2, 2: 4e-5, 3: 2e-7}  # of normally distributed values


def values(seed: int, tokens: int, k: int) -> torch.Tensor:
    """Groups of sizes from 1e-6 to 1e6."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-6, 6, k // GROUP).repeat_interleave(GROUP)


@pytest.mark.parametrize("terms", TERMS)
def test_error(terms: int) -> None:
    x = values(0, 3, 640)
    fixed = quantize(x, terms)
    assert fixed.dtype == torch.int32 and fixed.shape == (3, 20, group_words(terms)) and fixed.is_contiguous()
    difference = (dequantize(fixed).double() - x.double()).abs().unflatten(1, (-1, GROUP))
    assert (difference / x.abs().double().unflatten(1, (-1, GROUP)).amax(-1, keepdim=True)).max() <= WORST[terms]
    normal = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1))
    assert (dequantize(quantize(normal, terms)) - normal).norm() / normal.norm() < RELATIVE[terms]


def test_as_many_bytes_as_a_dtype_needs() -> None:
    """The rounding of bfloat16 is a hundred times what its two bytes lose; three bytes lose what float32 itself does."""
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(2))
    loss = {terms: float((dequantize(quantize(x, terms)) - x).norm() / x.norm()) for terms in TERMS}
    rounding = float((x.bfloat16().float() - x).norm() / x.norm())
    assert fixed_point.TERMS == {torch.float32: 3, torch.bfloat16: 2}
    assert loss[2] < rounding / 40 and loss[3] < 2 * 2**-24 and loss[1] > rounding


@pytest.mark.parametrize("terms", TERMS)
def test_a_row_byte_for_byte(terms: int) -> None:
    """Element 4i + j is byte j of the words terms * i .., most significant byte first; then scale and three sums."""
    x = values(3, 2, 96)
    fixed = quantize(x, terms)
    for t in range(2):
        for g in range(3):
            row = fixed[t, g].numpy()
            octets = row[: 8 * terms].astype("<i4").tobytes()
            scale, first, second, total = row[8 * terms :].view("<f4").tolist()
            group = x[t, 32 * g : 32 * g + 32]
            assert scale == pytest.approx(float(group.abs().max()) / largest(terms), rel=1e-6)
            v = []
            for element in range(32):
                i, j = divmod(element, 4)
                signed = [int.from_bytes(octets[(terms * i + b) * 4 + j :][:1], "little", signed=True) for b in range(terms)]
                v.append(sum(byte << (8 * (terms - 1 - b)) for b, byte in enumerate(signed)))
            assert max(abs(a * scale - float(e)) for a, e in zip(v, group, strict=True)) <= WORST[terms] * float(group.abs().max())
            assert abs(max(map(abs, v)) - largest(terms)) <= 1
            for found, exact in ((first, v[:16]), (second, v[16:]), (total, v)):
                assert found == pytest.approx(sum(exact) * scale, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("terms", TERMS)
def test_extremes(terms: int) -> None:
    """Zeros stay zeros; large and small groups beside each other do not touch; below float32's normal numbers a group may vanish."""
    assert not quantize(torch.zeros(2, 64), terms).any()
    x = torch.zeros(1, 160)
    pattern = torch.linspace(-1, 1, 32)
    for g, size in enumerate((1e36, 1e-28, 1.0, 0.0, 1e-42)):
        x[0, 32 * g : 32 * g + 32] = pattern * size
    fixed = quantize(x, terms)
    y = dequantize(fixed)[0].unflatten(0, (5, 32))
    assert torch.isfinite(fixed[:, :, 8 * terms :].contiguous().view(torch.float32)).all()
    for g, size in ((0, 1e36), (1, 1e-28), (2, 1.0)):
        assert (y[g].double() / size - pattern.double()).abs().max() <= WORST[terms]
    assert not y[3].any() and y[4].abs().max() < 1e-28
    one = torch.zeros(1, 32)
    one[0, 7] = -5.0
    assert torch.equal(dequantize(quantize(one, terms)).nonzero(), torch.tensor([[0, 7]]))


def test_wrong_arguments_are_named() -> None:
    for x, terms in ((torch.zeros(1, 48), 2), (torch.zeros(32), 2), (torch.zeros(1, 32), 4), (torch.zeros(1, 32), 0)):
        with pytest.raises(ValueError, match="fixed_point: x is"):
            torch.ops.kiln.fixed_point(x, terms)


# ---- under the interpreter ----


@pytest.mark.parametrize("terms", TERMS)
def interpreted_kernel_equals_the_reference(terms: int) -> None:
    """Bit for bit but for the order in which 32 integers are added; 1088 elements a row: programs across rows, and a rest."""
    x = values(4, 3, 1088)
    x[1, 64:96] = 0
    expected, found = quantize(x, terms), gemv.fix(x, terms)
    assert torch.equal(found, torch.ops.kiln.fixed_point(x, terms))
    assert torch.equal(found[:, :, : 8 * terms + 1], expected[:, :, : 8 * terms + 1])
    sums = [f[:, :, 8 * terms + 1 :].contiguous().view(torch.float32) for f in (found, expected)]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=0)


def interpreted_kernel_of_bfloat16() -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert torch.equal(gemv.fix(x, 2), quantize(x, 2))
