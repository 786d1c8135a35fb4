"""Fixed-point activations: error bounds, the layout of a row byte for byte, extreme values, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.fixed_point import GROUP, WIDE, dequantize, elements, extent_of, extent_words, form, largest, quantize
from tests.custom_ops.interpret import interpreted

test_kernels_interpreted = interpreted(__file__)

TERMS = (1, 2, 3)
EXTENTS = (GROUP, WIDE)
# Half a step of the largest value of an extent, and float32's own rounding of scale * v.
WORST = {terms: 0.5 / largest(terms) + 2**-23 for terms in TERMS}
RELATIVE = {1: 1e-2, 2: 4e-5, 3: 2e-7}  # of normally distributed values


def values(seed: int, tokens: int, k: int) -> torch.Tensor:
    """Groups of sizes from 1e-6 to 1e6."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-6, 6, k // GROUP).repeat_interleave(GROUP)


def test_extents() -> None:
    """Of a row, and of what its maker has at once; the shape tells them apart."""
    assert [extent_of(k) for k in (32, 640, 704, 256, 5376)] == [32, 32, 32, 256, 256]
    assert [extent_of(1024, at_once) for at_once in (64, 128, 256, 512)] == [32, 32, 256, 256]
    assert len({extent_words(t, e) for t in TERMS for e in EXTENTS}) == 6
    for terms in TERMS:
        for at_once, extent in ((128, 32), (None, 256)):
            x = quantize(torch.ones(2, 512), terms, at_once)
            assert form(x) == (terms, extent) and elements(x) == 512 and x.shape == (2, 512 // extent, extent_words(terms, extent))
            fixed_point.check("op", x, 512)
    with pytest.raises(ValueError, match=r"op: x is torch.int32 \(2, 2, 112\); expected int32 \[3, 16, 12, 20 or 28\] or \[3, 2, 112"):
        fixed_point.check("op", quantize(torch.ones(2, 512), 1), 512, 3)


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("terms", TERMS)
def test_error(terms: int, extent: int) -> None:
    x = values(0, 3, 1280)
    fixed = quantize(x, terms, extent)
    assert fixed.dtype == torch.int32 and fixed.shape == (3, 1280 // extent, extent_words(terms, extent)) and fixed.is_contiguous()
    difference = (dequantize(fixed).double() - x.double()).abs().unflatten(1, (-1, extent))
    assert (difference / x.abs().double().unflatten(1, (-1, extent)).amax(-1, keepdim=True)).max() <= WORST[terms]
    normal = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1))
    assert (dequantize(quantize(normal, terms, extent)) - normal).norm() / normal.norm() < RELATIVE[terms]


def test_as_many_bytes_as_a_dtype_needs() -> None:
    """The rounding of bfloat16 is a hundred times what its two bytes lose; three bytes lose what float32 itself does."""
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(2))
    loss = {terms: float((dequantize(quantize(x, terms)) - x).norm() / x.norm()) for terms in TERMS}
    rounding = float((x.bfloat16().float() - x).norm() / x.norm())
    assert fixed_point.TERMS == {torch.float32: 3, torch.bfloat16: 2}
    assert loss[2] < rounding / 40 and loss[3] < 2.5 * 2**-24 and loss[1] > rounding


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("terms", TERMS)
def test_a_row_byte_for_byte(terms: int, extent: int) -> None:
    """Element 8j + 4h + i of a group is byte i of words 2 (terms * j + t) + h, most significant byte first; scales, sums; bytes of sums."""
    x = values(3, 2, 768)
    fixed = quantize(x, terms, extent)
    groups = extent // GROUP
    for t in range(2):
        for e in range(fixed.shape[1]):
            row = fixed[t, e].numpy()
            octets, tails = row[: 8 * terms * groups].astype("<i4").tobytes(), row[8 * terms * groups :][: 4 * groups].view("<f4")
            part = x[t, extent * e : extent * (e + 1)]
            v = []
            for element in range(extent):
                g, (j, rest) = element // 32, divmod(element % 32, 8)
                words = [8 * terms * g + 2 * (terms * j + b) + rest // 4 for b in range(terms)]
                signed = [int.from_bytes(octets[4 * word + rest % 4 :][:1], "little", signed=True) for word in words]
                v.append(sum(byte << (8 * (terms - 1 - b)) for b, byte in enumerate(signed)))
            for g in range(groups):
                scale, first, second, total = tails[4 * g : 4 * g + 4].tolist()
                assert scale == pytest.approx(float(part.abs().max()) / largest(terms), rel=1e-6)
                own = v[32 * g : 32 * g + 32]
                for found, exact in ((first, own[:16]), (second, own[16:]), (total, own)):
                    assert found == pytest.approx(sum(exact) * scale, rel=1e-6, abs=1e-12)
            assert max(abs(a * scale - float(b)) for a, b in zip(v, part, strict=True)) <= WORST[terms] * float(part.abs().max())
            assert abs(max(map(abs, v)) - largest(terms)) <= 1
            if extent == WIDE:
                sums = row[-16:].astype("<i4").tobytes()
                for i in range(16):
                    q, b = divmod(i, 4)
                    at = [4 * (4 * q + 2 * (p % 2) + p // 2) + b for p in range(4)]
                    found = sum(int.from_bytes(sums[a : a + 1], "little", signed=True) << (8 * p) for p, a in enumerate(at))
                    assert found == sum(v[16 * i : 16 * i + 16])


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


@pytest.mark.parametrize("k", [1088, 1280])
@pytest.mark.parametrize("terms", TERMS)
def interpreted_kernel_equals_the_reference(terms: int, k: int) -> None:
    """Bit for bit; rows of either extent that are no multiples of a program: programs across rows, and a rest."""
    x = values(4, 3, k)
    x[1, 64:96] = 0
    x[2, :256] = 0
    assert torch.equal(gemv.fix(x, terms), quantize(x, terms))


def interpreted_kernel_of_bfloat16() -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert torch.equal(gemv.fix(x, 2), quantize(x, 2))
