"""Prefill over a TQ4 cache in pieces, under Triton's interpreter, against float64 loops over the decoded vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.tq4 import attention, codec, prefill
from kiln.custom_ops.tq4.prefill import PrefillTile
from tests.custom_ops.attention.test_attention_kernels import error, random
from tests.custom_ops.interpret import at_night, interpreted
from tests.custom_ops.tq4 import tq4_cache

test_kernels_interpreted = interpreted(__file__)
test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

SM_90 = gpu_targets()["sm_90"]
SMALL = PrefillTile(rows=16, keys=16, warps=4, stages=2, piece=64)


def compare(tile: PrefillTile, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: int, first: int, exact_window: int = 32,
            limit: float = 1e-3, centered: bool = False) -> None:
    """Queries at positions first.. of a cache of k and v, all as float16, garbage beyond them: the result is exact to `limit`."""
    q, k, v = (x.to(torch.float16) for x in (q, k, v))
    pos = torch.arange(first, first + q.shape[0])
    with pytest.MonkeyPatch.context() as patch, compiling_for(SM_90):
        patch.setitem(prefill.PIECE_TILES, (SM_90.sm, q.shape[2]), tile)
        center = tq4_cache.center_of(k, exact_window) if centered else None
        out = attention.tq4_attention(q, *tq4_cache.state(k, v, slots, first, exact_window, center), pos, None, 0, center)
    assert error(out, tq4_cache.exact(q, k, v, first, exact_window, center)) < limit


def check(tile: PrefillTile, dim: int, heads: int, kv_heads: int, slots: int, first: int, tokens: int, size: float = 1.0,
          exact_window: int = 32) -> None:
    generator = torch.Generator().manual_seed(first + tokens)
    end = first + tokens
    q, k, v = (random(generator, torch.float32, n, h, dim) for n, h in ((tokens, heads), (end, kv_heads), (end, kv_heads)))
    k = k * torch.linspace(0.1, 2, end)[:, None, None]  # scales that differ from key to key
    v = v * torch.linspace(3, 0.2, end)[:, None, None] * size
    compare(tile, q, k, v, slots, first, exact_window)


@pytest.mark.parametrize("first, tokens", [(0, 33), (31, 33), (96, 2), (158, 4),
                                           *at_night((0, 2), (0, 17), (5, 2), (31, 2), (32, 2), (82, 17), (94, 2), (95, 3), (120, 70),
                                                     (0, 110))])  # fmt: skip
def interpreted_chunks_across_pieces(first: int, tokens: int) -> None:
    """Where codes begin, and before, at and across the ends of pieces; the cache has a whole number of pieces, or one of 64 and a rest."""
    check(SMALL, 64, 4, 2, 224, first, tokens)
    check(SMALL, 64, 3, 1, 201, first, tokens)


@pytest.mark.parametrize("first, tokens", [(0, 33), (95, 3), (100, 1), *at_night((0, 17), (20, 5), (31, 3))])
def interpreted_keys_less_their_center(first: int, tokens: int) -> None:
    """What the center adds to scores is added where the parts are merged: also to one token's, and in float32, whose kernels are others."""
    g = torch.Generator().manual_seed(first)
    q, k, v = (random(g, torch.float32, n, h, 64) for n, h in ((tokens, 4), (first + tokens, 2), (first + tokens, 2)))
    k = k + random(g, torch.float32, 2, 64) * 2
    compare(SMALL, q, k, v, 201, first, centered=True, limit=2e-3)  # scores of larger keys
    center, pos = tq4_cache.center_of(k, 32), torch.arange(first, first + tokens)
    with compiling_for(SM_90):
        out = attention.tq4_attention(q, *tq4_cache.state(k, v, 201, first, 32, center), pos, None, 0, center)
    assert error(out, tq4_cache.exact(q, k, v, first, 32, center)) < 1e-5


@pytest.mark.parametrize("first, tokens", [(0, 30), (23, 1), (24, 30), *at_night((0, 70), (20, 4), (22, 1), (40, 1))])
def interpreted_writing_a_center(first: int, tokens: int) -> None:
    """As the reference: the center where its last key is in the chunk, and the keys that are the oldest in the window of the chunk's."""
    g, dim, kv_heads, window, slots = torch.Generator().manual_seed(first), 64, 2, 32, 96
    k, v = (random(g, torch.float16, first + tokens, kv_heads, dim) for _ in range(2))
    pos, ring = torch.arange(first, first + tokens), tq4_cache.ring_of(k, first, window)
    center = tq4_cache.center_of(k[:first], window).nan_to_num(3.0)
    fresh = [torch.full((kv_heads, slots, dim // 4), 21, dtype=torch.int16), torch.full((kv_heads, slots), 7.0, dtype=torch.float16)] * 2
    found, expected = ([t.clone() for t in (*fresh, center)] for _ in range(2))
    with compiling_for(SM_90):
        codec.tq4_write(*found[:4], k[first:], v[first:], pos, [found[4]], ring, window)
    codec.reference_write(*expected[:4], k[first:], v[first:], pos, expected[4], ring, window)
    torch.testing.assert_close(found[4], expected[4], rtol=1e-5, atol=1e-6)  # added up in another order
    assert torch.equal(found[4], center) == (not first <= 23 < first + tokens)
    coded = slice(max(first - window + 1, 0), max(first + tokens - window + 1, 0))
    others = torch.tensor([s for s in range(slots) if not coded.start <= s < coded.stop], dtype=torch.int64)
    assert (found[0][:, others] == 21).all() and (found[1][:, others] == 7).all()
    for i, at in ((0, coded), (2, slice(first, first + tokens))):
        assert (found[i][:, at] != expected[i][:, at]).sum() <= 2  # a coordinate beside a boundary may go either way
        torch.testing.assert_close(found[i + 1][:, at], expected[i + 1][:, at], rtol=2e-3, atol=0)


def interpreted_exact_windows() -> None:
    """As long as a piece, longer, and longer than the cache."""
    for exact_window in (64, 96, 224):
        for first, tokens in ((0, 70), (exact_window - 1, 3), (150, 40)):
            check(SMALL, 64, 2, 1, max(192, first + tokens), first, tokens, exact_window=exact_window)


@pytest.mark.parametrize("first, tokens", [(10, 3), (100, 1), (100, 20)])
def interpreted_spare_slots(first: int, tokens: int) -> None:
    """A ring of more slots than its window holds older keys, which are read from their codes: bit for bit what it is without them."""
    g, dim, window, slots = torch.Generator().manual_seed(first), 64, 32, 38
    q, k, v = (random(g, torch.float16, n, h, dim) for n, h in ((tokens, 4), (first + tokens, 2), (first + tokens, 2)))
    *given, k_ring, v_ring = tq4_cache.state(k, v, 128, first, window)
    longer = [torch.full((slots, 2, dim), torch.nan, dtype=torch.float16) for _ in range(2)]
    for p in range(max(first - slots, 0), first):
        for ring, x in zip(longer, (k, v), strict=True):
            ring[p % slots] = x[p]
    pos = torch.arange(first, first + tokens)
    with pytest.MonkeyPatch.context() as patch, compiling_for(SM_90):
        patch.setitem(prefill.PIECE_TILES, (SM_90.sm, dim), SMALL)
        expected = attention.tq4_attention(q, *given, k_ring, v_ring, pos, None)
        assert torch.equal(attention.tq4_attention(q, *given, *longer, pos, None, window), expected) and expected.isfinite().all()


@pytest.mark.parametrize("rows, keys", [(32, 16), *at_night((32, 32), (16, 64))])
def interpreted_blocks_of_any_shape(rows: int, keys: int) -> None:
    tile = PrefillTile(rows=rows, keys=keys, warps=4, stages=2, piece=64)
    check(tile, 64, 4, 2, 200, 100, 45)
    check(tile, 64, 4, 2, 40, 7, 33)


@pytest.mark.parametrize("first, tokens", [(31, 2), (96, 2), (158, 4), (150, 17), *at_night((0, 33), (95, 3), (40, 5), (120, 70))])
def interpreted_few_queries(first: int, tokens: int) -> None:
    """Keys split between programs, where the queries are few enough, and where they are not; splits without a key; several pieces."""
    for splits, few in ((2, 4), (3, 6), (8, 4)):
        tile = replace(SMALL, splits=splits, few=few)
        check(tile, 64, 4, 2, 224, first, tokens)
        check(tile, 64, 3, 1, 201, first, tokens)


def interpreted_many_pieces() -> None:
    """Errors of the state between pieces would add up: 16 pieces."""
    check(SMALL, 64, 2, 1, 1056, 1042, 3)
    check(replace(SMALL, splits=3, few=2), 64, 2, 1, 1056, 1042, 3)


@pytest.mark.parametrize("size", [1e-2, 1e4])
def interpreted_small_and_large_values(size: float) -> None:
    check(SMALL, 64, 2, 1, 128, 90, 5, size)


def interpreted_a_query_of_zeros() -> None:
    """It has no scale; every key weighs the same."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (random(generator, torch.float32, n, h, 64) for n, h in ((5, 2), (130, 1), (130, 1)))
    q[1, 0] = 0
    compare(SMALL, q, k, v, 192, 125)


@pytest.mark.parametrize("strong", [{70: 4}, {3: 4, 175: 3}, *at_night({3: 4}, {140: 4}, {175: 4}, {3: 3, 70: 4}, {70: 4, 140: 3})])
def interpreted_scores_beyond_the_resolution_of_float32(strong: dict[int, float]) -> None:
    """One key takes all the weight, in the first piece, a middle one, the last or the exact window, with or without a runner-up."""
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(180, 1, 64, generator=generator) for _ in range(2))
    q = torch.randn(2, 2, 64, generator=generator)
    for place, factor in strong.items():
        k[place] = q[0, 0] * factor
    compare(SMALL, q, k, v, 240, 178, limit=4e-3)  # scores of hundreds: float16 queries move them by hundredths


@pytest.mark.parametrize("rows, keys", sorted({(tile.rows, tile.keys) for tile in prefill.PIECE_TILES.values()}))
def interpreted_every_tile_of_the_table(rows: int, keys: int) -> None:
    check(PrefillTile(rows, keys, 8, 2), 512, 4, 1, 150, 120, 19)


def test_a_piece_is_no_larger_than_the_cache() -> None:
    assert prefill.piece_slots(SMALL, 1000) == 64
    assert prefill.piece_slots(PrefillTile(16, 16, 4, 2), 150) == 192
    assert prefill.piece_slots(PrefillTile(16, 16, 4, 2), 131072) == 16384


def test_tiles_fit_the_piece() -> None:
    """Blocks of keys must be whole in a decompressed block, and decompressed blocks in a piece."""
    for tile in prefill.PIECE_TILES.values():
        assert prefill.DECOMPRESS_ROWS % tile.keys == 0 and tile.piece % prefill.DECOMPRESS_ROWS == 0
        assert tile.rows % prefill.RESTORED.value == 0
