"""The TQ4 codec, the write op and attention over its cache, in plain torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kiln.custom_ops.attention.flash import attend
from kiln.custom_ops.geometry import GEMMA4_31B
from kiln.custom_ops.gpu.target import gpu_targets
from kiln.custom_ops.tq4 import attention, codec, decode, decode_rows
from kiln.custom_ops.tq4.attention import tq4_attention
from kiln.custom_ops.tq4.codec import tq4_write
from tests.custom_ops.tq4 import tq4_cache
from tests.opaque import check_whole

DIMS = (64, 128, 256, 512)
MSE = 0.009501  # of the optimal 16-level quantizer of a standard normal
SPREAD = codec.SPREAD.value  # of the normal distribution that the levels fit


def normal_mse(levels: np.ndarray) -> float:
    """Mean squared error of a standard normal's nearest levels, +- each of `levels`."""
    edges = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    inside, mean = norm.cdf(edges[1:]) - norm.cdf(edges[:-1]), norm.pdf(edges[:-1]) - norm.pdf(edges[1:])
    return 1 + 2 * (inside * levels**2 - 2 * mean * levels).sum()


def test_levels_are_lloyd_max() -> None:
    """Lloyd's iteration for a standard normal: boundaries halfway between levels, levels the means between boundaries. Those of the codec
    are that to within their unit, 8-bit integers of it, exact in 16 bits, and cost 0.06 % more error."""
    levels = np.arange(1, 16, 2) / 5
    for _ in range(2000):
        edges = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = (norm.pdf(edges[:-1]) - norm.pdf(edges[1:])) / (norm.cdf(edges[1:]) - norm.cdf(edges[:-1]))
    assert abs(normal_mse(levels) - MSE) < 1e-6
    unit, chosen = codec.LEVEL_UNIT.value, np.array(codec.LEVELS)
    np.testing.assert_allclose(chosen / SPREAD, levels, atol=0.5 / unit / SPREAD)
    np.testing.assert_allclose(codec.BOUNDARIES, (chosen[1:] + chosen[:-1]) / 2)
    assert normal_mse(chosen / SPREAD) < 1.0006 * MSE
    assert min(normal_mse(chosen / SPREAD * factor) for factor in np.linspace(0.99, 1.01, 201)) > (1 - 1e-7) * normal_mse(chosen / SPREAD)
    integers = torch.tensor(codec.LEVELS, dtype=torch.float64) * unit
    for dtype in (torch.int8, torch.float16, torch.bfloat16):
        assert torch.equal(integers.to(dtype).double(), integers)


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_orthogonal_and_fixed(dim: int) -> None:
    r = codec.rotate(torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(r @ r.T, torch.eye(dim, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(codec.unrotate(r), torch.eye(dim, dtype=torch.float64), atol=1e-12, rtol=0)
    signs = codec.signs(dim)
    assert abs(signs.sum()) < 3 * dim**0.5 and set(signs.tolist()) == {-1, 1}
    parity = torch.tensor([[1 - 2 * (bin(i & j).count("1") % 2) for j in range(dim)] for i in range(dim)], dtype=torch.float64)
    torch.testing.assert_close(r, (parity * signs[None, :]).T * dim**-0.5, atol=1e-12, rtol=0)
    assert codec.signs(16).tolist() == SIGNS


SIGNS = [-1, -1, 1, -1, 1, -1, -1, 1, -1, 1, -1, 1, 1, 1, 1, -1]  # prefill and decode, compiled apart, share a cache


def vectors(dim: int, count: int = 2000, outliers: bool = False) -> torch.Tensor:
    """Vectors of length sqrt(dim); with outliers: three channels far larger than the others and off centre, as keys have."""
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(dim))
    if outliers:
        x[:, :3] = x[:, :3] * 8 + 5
    return x / x.norm(dim=1, keepdim=True) * dim**0.5


@pytest.mark.parametrize("dim", DIMS)
def test_codebook_error_per_coordinate(dim: int) -> None:
    """Coordinates drawn from N(0, 1/dim), each put on its nearest level: within 3 % of 0.0095 / dim."""
    x = torch.randn(4000, dim, generator=torch.Generator().manual_seed(dim)) * dim**-0.5
    size = torch.bucketize(x.abs() * SPREAD * dim**0.5, torch.tensor(codec.BOUNDARIES))
    decoded = codec.levels(size + 8 * (x < 0)) * dim**-0.5 / SPREAD
    assert abs((decoded - x).square().mean().item() * dim / 0.0095 - 1) < 0.03


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("corrected", [True, False])
def test_error_is_that_of_the_optimal_quantizer(dim: int, corrected: bool) -> None:
    """Within 3 %, and less by some 4.5/dim: coordinates of a vector of fixed length have lighter tails than a normal."""
    x = vectors(dim)
    codes, scale = codec.encode(x)
    decoded = codec.decode(codes, scale if corrected else torch.full((len(x),), 1 / SPREAD))
    assert -0.01 - 4.5 / dim < (decoded - x).square().mean() / MSE - 1 < 0.03


@pytest.mark.parametrize("dim", DIMS)
def test_outlier_channels_cost_nothing(dim: int) -> None:
    x = vectors(dim, outliers=True)
    assert (codec.decode(*codec.encode(x)) - x).square().mean() < MSE


@pytest.mark.parametrize("dim", DIMS)
def test_length_is_kept(dim: int) -> None:
    x = vectors(dim, 200) * torch.logspace(-3, 3, 200)[:, None]
    ratio = codec.decode(*codec.encode(x)).norm(dim=1) / x.norm(dim=1)
    assert (ratio - 1).abs().max() < 2**-11 + 1e-6  # float16 rounding of the scale


def test_extreme_vectors() -> None:
    """1e30: a norm beyond float32 is no number, and is not swallowed; 1e8: one beyond float16 is the largest there is."""
    x = vectors(128, 5) * torch.tensor([0.0, 1e-30, 1e30, 2e4, 1e8])[:, None]
    codes, scale = codec.encode(x)
    assert scale[0] == 0 and scale[1] == 0 and scale[2].isnan() and abs(scale[3] * SPREAD / 2e4 - 1) < 0.05 and scale[4] == codec.MAX_SCALE
    assert (codec.decode(codes, scale)[:2] == 0).all()


def test_nibble_places() -> None:
    """Word w holds rotated coordinates j * D/4 + w: the magnitude in the low bits of nibble j, the sign in bit 7, 15, 3 or 11."""
    word = torch.zeros(16, dtype=torch.int16)
    word[5] = 0x7203 | 1 << 11  # magnitudes from the lowest: 3, 0, 2, 7, the last of them negative
    expected = torch.full((64,), 2 * codec.LEVELS[0])
    expected[5::16] = 2 * torch.tensor([codec.LEVELS[3], codec.LEVELS[0], codec.LEVELS[2], -codec.LEVELS[7]])
    torch.testing.assert_close(codec.decode_rotated(word, torch.tensor(2.0)), expected, rtol=1e-6, atol=0)


def test_encode_takes_the_nearest_level() -> None:
    x = vectors(64, 50).double()
    table = torch.tensor([*codec.LEVELS, *(-level for level in codec.LEVELS)], dtype=torch.float64)
    nearest = (SPREAD * codec.rotate(x)[..., None] - table).abs().argmin(-1).view(50, 4, 16)
    words = sum((nearest[:, j] & 7) << 4 * j | nearest[:, j] >> 3 << codec.SIGN_BITS[j] for j in range(4))
    codes, scale = codec.encode(x)
    assert torch.equal(codes.to(torch.int64) & 0xFFFF, words)
    torch.testing.assert_close(scale.double(), 8 / table[nearest].flatten(1).norm(dim=1), rtol=2**-11, atol=0)


def empty_cache(kv_heads: int, slots: int, dim: int) -> list[torch.Tensor]:
    codes, scales = torch.zeros(kv_heads, slots, dim // 4, dtype=torch.int16), torch.zeros(kv_heads, slots, dtype=torch.float16)
    return [codes, scales, codes.clone(), scales.clone()]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.25


def test_write_touches_its_slots_only() -> None:
    cache = empty_cache(2, 10, 64)
    before = [c.clone() for c in cache]
    k, v = random(1, 3, 2, 64), random(2, 3, 2, 64)
    tq4_write(*cache, k, v, torch.tensor([4, 5, 6]), [])
    for x, codes, scales in ((k, *cache[:2]), (v, *cache[2:])):
        expected = codec.encode(x.transpose(0, 1))
        assert torch.equal(codes[:, 4:7], expected[0]) and torch.equal(scales[:, 4:7], expected[1])
    for c, b in zip(cache, before, strict=True):
        assert torch.equal(c[:, :4], b[:, :4]) and torch.equal(c[:, 7:], b[:, 7:])


EXACT_WINDOW = 8


def vectors_of(heads: int, kv_heads: int, tokens: int, end: int, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """q [tokens, heads, dim], k and v [end, kv_heads, dim]."""
    return random(5, tokens, heads, dim), random(3, end, kv_heads, dim), random(4, end, kv_heads, dim)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("first, tokens", [(0, 1), (0, 8), (0, 9), (0, 20), (6, 1), (7, 1), (8, 1), (6, 3), (17, 3), (19, 5), (22, 1)])
def test_attention_reads_the_newest_exactly_and_the_rest_in_code(heads: int, kv_heads: int, first: int, tokens: int,
                                                                 centered: bool) -> None:
    """Garbage in every slot that is not read, in the center too, before there is one."""
    q, k, v = vectors_of(heads, kv_heads, tokens, first + tokens)
    k = k + random(6, kv_heads, 64)
    center = tq4_cache.center_of(k, EXACT_WINDOW) if centered else None
    out = tq4_attention(q, *tq4_cache.state(k, v, 24, first, EXACT_WINDOW, center), torch.arange(first, first + tokens), None, 0, center)
    torch.testing.assert_close(out.double(), tq4_cache.exact(q, k, v, first, EXACT_WINDOW, center), rtol=1e-5, atol=3e-6)


def test_keys_that_share_most_of_their_length_lose_least() -> None:
    """Keys of a large mean: the error of scores, but for what all share, falls with the square length that is coded."""
    q, k, v = vectors_of(2, 2, 1, 400)
    k = k + 4 * random(6, 2, 64)
    errors = []
    for center in (None, tq4_cache.center_of(k, 256)):
        moved = tq4_cache.decoded(tq4_cache.less(k, center)) - tq4_cache.less(k, center)
        scores = (moved * q[0][None]).sum(-1)
        errors.append(float((scores - scores.mean(0)).square().mean()))
    assert errors[1] < errors[0] / 12


def test_a_exact_window_longer_than_the_sequence_is_exact_attention() -> None:
    q, k, v = vectors_of(4, 2, 12, 12)
    out = tq4_attention(q, *tq4_cache.state(k, v, 16, 0, 32), torch.arange(12), None)
    torch.testing.assert_close(out, attend(q, k, v, torch.ones(12, 12).tril().bool()), rtol=1e-5, atol=2e-6)


def test_attention_is_close_to_that_over_the_original_vectors() -> None:
    """4 bits cost about 10 % of each value's length, which averaging over keys reduces."""
    q, k, v = vectors_of(2, 2, 1, 20)
    out = tq4_attention(q, *tq4_cache.state(k, v, 24, 19, 4), torch.tensor([19]), None)
    expected = torch.stack([torch.softmax(k[:, h] @ q[0, h], 0) @ v[:, h] for h in range(2)])
    assert 0.001 < (out[0] - expected).norm() / expected.norm() < 0.15


def test_garbage_and_kv_len_change_nothing() -> None:
    q, k, v = vectors_of(4, 2, 3, 20)
    pos, kv_len = torch.arange(17, 20), torch.tensor([20], dtype=torch.int32)
    own_k, own_v, *caches, k_ring, v_ring = tq4_cache.state(k, v, 24, 17, EXACT_WINDOW)
    expected = tq4_attention(q, own_k, own_v, *caches, k_ring, v_ring, pos, None)
    assert torch.equal(tq4_attention(q, own_k, own_v, *caches, k_ring, v_ring, pos, kv_len), expected)
    for value in (1000.0, float("nan"), float("inf")):
        for c in caches:
            c[:, 12:] = 0x5A5A if c.dtype == torch.int16 else value
        for ring in (k_ring, v_ring):
            ring[17 % EXACT_WINDOW] = value  # position 9, which the query at 17 reads in code
        assert torch.equal(tq4_attention(q, own_k, own_v, *caches, k_ring, v_ring, pos, kv_len), expected)
        assert torch.equal(tq4_attention(q, own_k, own_v, *caches, k_ring, v_ring, pos, None), expected)


def play(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: list[int], centered: bool = False, window: int = EXACT_WINDOW,
         spare: int = 0, state: tuple[list[torch.Tensor], int] | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output of every query, fed in chunks as the lowered graph does, and the caches in the end. state: caches that are gone on with,
    and where.
    """
    slots, ring = max(32, len(k)), window + spare
    fresh = empty_cache(2, slots, 64) + [torch.full((ring, 2, 64), float("nan")) for _ in range(2)] + [torch.full((2, 64), float("nan"))]
    held, start = state or (fresh, 0)
    caches, rings, center = held[:4], held[4:6], held[6] if centered else None
    outs = []
    for size in chunks:
        pos = torch.arange(start, start + size)
        own = k[pos], v[pos]
        tq4_write(*caches, *own, pos, *(([center], rings[0], window) if centered else ([],)))
        outs.append(tq4_attention(q[pos], *own, *caches, *rings, pos, None, window, center))
        for cache, x in zip(rings, own, strict=True):
            for i in range(size):
                cache[(start + i) % ring] = x[i]
        start += size
    return torch.cat(outs), held


def written(held: list[torch.Tensor], end: int, window: int) -> list[torch.Tensor]:
    """What is defined of caches whose keys are coded late, at position `end`."""
    k_codes, k_scales, v_codes, v_scales, *rest = held
    coded = max(end - window + 1, 0)
    return [k_codes[:, :coded], k_scales[:, :coded], v_codes, v_scales, *rest]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 30, [7, 1, 1, 13, 8], [8, 8, 14], [9, 21], [29, 1], [3, 27]])
def test_chunks_of_any_size_give_the_same(chunks: list[int], centered: bool) -> None:
    q, k, v = vectors_of(4, 2, 30, 30)
    expected, state = play(q, k, v, [30], centered)
    out, other = play(q, k, v, chunks, centered)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    for a, b in zip(written(state, 30, EXACT_WINDOW), written(other, 30, EXACT_WINDOW), strict=True):
        assert torch.equal(a, b) or (a.isnan().all() and b.isnan().all() and not centered)


@pytest.mark.parametrize("size", [7, 64, 191, 192, 193, 255, 256, 257])
def test_chunks_about_the_exact_window_give_the_same_codes(size: int) -> None:
    """The window of 256 that ships: where the center is made, where the first key is coded and where the first code is read."""
    q, k, v = vectors_of(2, 2, 520, 520)
    k = k + random(6, 2, 64)
    expected, state = play(q, k, v, [520], True, 256)
    chunks = [size] * (520 // size) + [520 % size] * (520 % size > 0)
    out, other = play(q, k, v, chunks, True, 256)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=3e-6)
    for a, b in zip(written(state, 520, 256), written(other, 520, 256), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(state[6], tq4_cache.center_of(k, 256), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(expected.double(), tq4_cache.exact(q, k, v, 0, 256, state[6]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [[12], [3, 9], [1] * 12])
@pytest.mark.parametrize("end, back", [(3, 1), (5, 2), (7, 3), (10, 4), (10, 10), (14, 8), (40, 36), (40, 34)])
def test_a_rewind_forgets_all_that_was_taken_back(end: int, back: int, chunks: list[int]) -> None:
    """Tokens behind `back` are played and taken back, over the last key of the center, the first code and the first read: what follows has
    the bits of what never had them. A ring of 8 with 6 spare slots keeps as many back."""
    q, k, v = vectors_of(4, 2, 52, 52)
    k = k + random(6, 2, 64)
    wrong_k, wrong_v = random(8, 52, 2, 64), random(9, 52, 2, 64)
    wrong_k[:back], wrong_v[:back] = k[:back], v[:back]
    _, held = play(q, wrong_k, wrong_v, [1] * end, True, spare=6)
    out, held = play(q, k, v, chunks, True, spare=6, state=(held, back))
    _, plain = play(q, k, v, [1] * back, True, spare=6)
    expected, plain = play(q, k, v, chunks, True, spare=6, state=(plain, back))
    assert torch.equal(out, expected) and expected.isfinite().all()
    coded = back + 12 - EXACT_WINDOW + 1
    for a, b in zip(held[:2], plain[:2], strict=True):
        assert torch.equal(a[:, :coded], b[:, :coded])
    assert torch.equal(held[6], plain[6])


def test_a_center_that_does_not_fit_is_refused() -> None:
    cache, (q, k, v) = empty_cache(2, 24, 64), vectors_of(4, 2, 1, 1)
    rings, pos = (torch.zeros(8, 2, 64), torch.zeros(8, 2, 64)), torch.tensor([0])
    with pytest.raises(ValueError, match=r"tq4_attention: k_center is torch.float16 \(2, 64\); expected float32 \(2, 64\)"):
        tq4_attention(q, k, v, *cache, *rings, pos, None, 0, torch.zeros(2, 64).half())
    with pytest.raises(ValueError, match=r"tq4_write: k_center is torch.float32 \(1, 64\); expected float32 \(2, 64\)"):
        tq4_write(*cache, k, v, pos, [torch.zeros(1, 64)], rings[0], 8)
    with pytest.raises(ValueError, match="tq4_write: an exact window of 8 in a ring of 0 slots"):
        tq4_write(*cache, k, v, pos, [torch.zeros(2, 64)], None, 8)
    with pytest.raises(ValueError, match="tq4_write: an exact window of 1 in a ring of 8 slots; with a center expected at least 2"):
        tq4_write(*cache, k, v, pos, [torch.zeros(2, 64)], rings[0], 1)
    with pytest.raises(ValueError, match="tq4_write: k is torch.float32, exact window torch.float16; expected one dtype"):
        tq4_write(*cache, k, v, pos, [torch.zeros(2, 64)], rings[0].half(), 8)
    with pytest.raises(ValueError, match="tq4_write: 2 centers; expected one or none"):
        tq4_write(*cache, k, v, pos, [torch.zeros(2, 64)] * 2, rings[0], 8)
    step = [t[None] for t in cache], *(x.expand(3, 2, 64) for x in (k, v)), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="tq4_write_rows: a step of 3 tokens could code with .* it makes; a window of 8 takes 2"):
        torch.ops.kiln.tq4_write_rows(*step[0], *step[1:], [torch.zeros(1, 2, 64)], rings[0][None], 8)


def test_wrong_arguments_are_refused() -> None:
    cache, (q, k, v) = empty_cache(2, 24, 64), vectors_of(4, 2, 1, 1)
    rings, pos = (torch.zeros(8, 2, 64), torch.zeros(8, 2, 64)), torch.tensor([0])
    with pytest.raises(ValueError, match="tq4_attention: q is"):
        tq4_attention(q[:, :3], k, v, *cache, *rings, pos, None)
    with pytest.raises(ValueError, match=r"tq4_attention: exact window \(8, 2, 64\), \(7, 2, 64\); expected \[R, 2, 64\]"):
        tq4_attention(q, k, v, *cache, rings[0], rings[1][:7], pos, None)
    with pytest.raises(ValueError, match="tq4_attention: q, k, v are torch.float32, .* exact window torch.float16; expected one dtype"):
        tq4_attention(q, k, v, *cache, rings[0].half(), rings[1].half(), pos, None)
    with pytest.raises(ValueError, match="head dimension 96"):
        codec.encode(random(1, 2, 96))
    with pytest.raises(ValueError, match="tq4_write: k is"):
        tq4_write(*cache, random(1, 1, 2, 128), random(1, 1, 2, 128), torch.tensor([0]), [])


class Model(torch.nn.Module):
    """One TQ4 layer with its cache."""

    def __init__(self, centered: bool = False) -> None:
        super().__init__()
        self.centered = centered
        if centered:
            self.register_buffer("k_center", torch.zeros(2, 64))
        for name, tensor in zip(("k_codes", "k_scales", "v_codes", "v_scales"), empty_cache(2, 16, 64), strict=True):
            self.register_buffer(name, tensor)
        for name in ("k_exact", "v_exact"):
            self.register_buffer(name, torch.zeros(4, 2, 64))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        caches = (self.k_codes, self.k_scales, self.v_codes, self.v_scales)
        torch.ops.kiln.tq4_write(*caches, k, v, pos, *(([self.k_center], self.k_exact, 4) if self.centered else ([],)))
        center = (4, self.k_center) if self.centered else ()
        return torch.ops.kiln.tq4_attention(q, k, v, *caches, self.k_exact, self.v_exact, pos, (pos[-1:] + 1).to(torch.int32), *center)


@pytest.mark.parametrize("centered", [False, True])
def test_export_keeps_the_ops_whole(centered: bool) -> None:
    args = (random(1, 5, 4, 64), random(2, 5, 2, 64), random(3, 5, 2, 64), torch.arange(5))
    longer = tuple(x[:1].repeat(9, *[1] * (x.dim() - 1)) for x in args[:3]) + (torch.arange(9),)
    check_whole(lambda: Model(centered), args, longer, 16, "tq4_write", "tq4_attention")


@pytest.mark.parametrize("dim", DIMS)
def test_no_lane_is_without_an_element(dim: int) -> None:
    """Of a kernel that transforms a vector: Triton 3.6 would leave elements out of the sums over it."""
    heads = dataclasses.replace(GEMMA4_31B.full, dim=dim)
    model = dataclasses.replace(GEMMA4_31B, full=heads)
    target, seen = gpu_targets()["sm_90"], set()
    transforms = {f"kiln_tq4_{name}" for name in ("write", "rotate", "unrotate", "merge", "prepare", "prepare_rows")}
    for case in [c for module in (codec, attention, decode, decode_rows) for c in module.kernel_cases(target, model)]:
        name = case.fn.__name__
        if name in transforms:
            parts = 2 if "prepare" in name else 1  # a vector of two halves
            assert 32 * case.options["num_warps"] * parts <= case.constexprs["D"] == dim, case.name
            seen.add(name)
    assert seen == transforms
