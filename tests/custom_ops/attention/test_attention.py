"""Sliding and global attention in plain torch: the reference every kernel is held against."""

from __future__ import annotations

import pytest
import torch

from kiln.custom_ops.attention.global_attention import global_attention
from kiln.custom_ops.attention.sliding_attention import sliding_attention
from tests.opaque import check_whole

GARBAGE = (1000.0, float("nan"), float("inf"), float("-inf"))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.25


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, window: int | None) -> torch.Tensor:
    """float64, a loop over queries and heads; k, v [positions, KV, D]; the first query is at position `first`."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        end = first + t + 1
        start = 0 if window is None else max(0, end - window)
        for h in range(q.shape[1]):
            weights = torch.softmax(k[start:end, h // group].double() @ q[t, h].double(), 0)
            out[t, h] = weights @ v[start:end, h // group].double()
    return out


def ring_of(x: torch.Tensor, first: int, slots: int, garbage: float, window: int) -> torch.Tensor:
    """The ring before position `first`, garbage in every slot that no query from `first` on may see."""
    ring = torch.full((slots, *x.shape[1:]), garbage)
    for p in range(max(0, first - window + 1), first):
        ring[p % slots] = x[p]
    return ring


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("first, tokens", [(0, 1), (0, 7), (9, 1), (5, 6), (19, 5)])
def test_global_attention(heads: int, kv_heads: int, first: int, tokens: int) -> None:
    q, k, v = random(1, tokens, heads, 32), random(2, 24, kv_heads, 32), random(3, 24, kv_heads, 32)
    out = global_attention(q, k, v, torch.arange(first, first + tokens), None)
    torch.testing.assert_close(out.double(), exact(q, k, v, first, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 5])
def test_global_garbage_and_kv_len_change_nothing(tokens: int) -> None:
    q, k, v = random(1, tokens, 4, 32), random(2, 24, 2, 32), random(3, 24, 2, 32)
    pos, kv_len = torch.arange(12 - tokens, 12), torch.tensor([12], dtype=torch.int32)
    expected = global_attention(q, k, v, pos, None)
    assert torch.equal(global_attention(q, k, v, pos, kv_len), expected)
    for value in GARBAGE:
        k[12:], v[12:] = value, value
        assert torch.equal(global_attention(q, k, v, pos, None), expected)
        assert torch.equal(global_attention(q, k, v, pos, kv_len), expected)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 1)])
@pytest.mark.parametrize("first, tokens", [(0, 1), (0, 5), (0, 30), (3, 1), (7, 1), (8, 1), (9, 1), (21, 1), (6, 4), (8, 8), (13, 20)])
def test_sliding_attention(heads: int, kv_heads: int, first: int, tokens: int) -> None:
    """Chunks shorter and longer than the window, before and after the ring has wrapped, with garbage in every slot that is not seen."""
    window = 8
    q, k, v = random(1, tokens, heads, 32), random(2, first + tokens, kv_heads, 32), random(3, first + tokens, kv_heads, 32)
    expected = exact(q, k, v, first, window)
    for value in GARBAGE:
        rings = [ring_of(x, first, window, value, window) for x in (k, v)]
        out = sliding_attention(q, k[first:], v[first:], *rings, torch.arange(first, first + tokens), window)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_ring_shorter_than_the_window() -> None:
    """max_seq_len below the window: the ring has max_seq_len slots and holds every position."""
    q, k, v = random(1, 4, 2, 32), random(2, 12, 1, 32), random(3, 12, 1, 32)
    rings = [ring_of(x, 8, 12, float("nan"), 64) for x in (k, v)]
    out = sliding_attention(q, k[8:], v[8:], *rings, torch.arange(8, 12), 64)
    torch.testing.assert_close(out.double(), exact(q, k, v, 8, 64), rtol=1e-5, atol=1e-6)


def test_decode_over_a_ring_is_bit_equal_to_the_tail_of_a_full_cache() -> None:
    """The ring is read in position order, so decoding does not depend on where it has wrapped to."""
    window, end = 8, 30
    k, v = random(2, end, 2, 32), random(3, end, 2, 32)
    for p in range(window, end):
        q = random(p, 1, 4, 32)
        rings = [ring_of(x, p, window, 0.0, window + 1) for x in (k, v)]
        straight = [x[p - window : p] for x in (k, v)]
        own = (k[p : p + 1], v[p : p + 1])
        out = sliding_attention(q, *own, *rings, torch.tensor([p]), window)
        # positions 8..15 of a ring of 8 lie unrotated, so the same keys moved there are a full cache's last slots
        assert torch.equal(out, sliding_attention(q, *own, *straight, torch.tensor([2 * window]), window))
        torch.testing.assert_close(out.double(), exact(q, k, v, p, window), rtol=1e-5, atol=1e-6)


def test_sliding_chunk_equals_its_tokens_one_by_one() -> None:
    window, end = 8, 20
    q, k, v = random(1, end, 4, 32), random(2, end, 2, 32), random(3, end, 2, 32)
    empty = torch.full((window, 2, 32), float("nan"))
    out = sliding_attention(q, k, v, empty, empty, torch.arange(end), window)
    for p in range(end):
        rings = [ring_of(x, p, window, float("nan"), window) for x in (k, v)]
        one = sliding_attention(q[p : p + 1], k[p : p + 1], v[p : p + 1], *rings, torch.tensor([p]), window)
        torch.testing.assert_close(one[0], out[p], rtol=1e-5, atol=1e-6)


def test_bfloat16_is_computed_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in (random(1, 3, 4, 32), random(2, 16, 2, 32), random(3, 16, 2, 32)))
    out = global_attention(q, k, v, torch.arange(13, 16), None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(q, k, v, 13, None), rtol=2**-8, atol=1e-5)


def test_wrong_shapes_are_refused() -> None:
    cache = torch.zeros(8, 2, 32)
    with pytest.raises(ValueError, match="global_attention: q is"):
        global_attention(torch.zeros(1, 3, 32), cache, cache, torch.tensor([0]), None)
    with pytest.raises(ValueError, match="sliding_attention: q is"):
        sliding_attention(torch.zeros(1, 2, 16), cache[:1], cache[:1], cache, cache, torch.tensor([0]), 8)


class Model(torch.nn.Module):
    """One layer of each kind with its caches, written as the model writes them."""

    def __init__(self) -> None:
        super().__init__()
        for name, slots in (("k_ring", 8), ("v_ring", 8), ("k_cache", 32), ("v_cache", 32)):
            self.register_buffer(name, torch.zeros(slots, 2, 32))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        out = torch.ops.kiln.sliding_attention(q, k, v, self.k_ring, self.v_ring, pos, 8)
        self.k_cache.index_copy_(0, pos, k)
        self.v_cache.index_copy_(0, pos, v)
        return out + torch.ops.kiln.global_attention(q, self.k_cache, self.v_cache, pos, None)


def test_export_keeps_the_ops_whole() -> None:
    args = (random(1, 5, 4, 32), random(2, 5, 2, 32), random(3, 5, 2, 32), torch.arange(5))
    longer = (random(4, 11, 4, 32), random(5, 11, 2, 32), random(6, 11, 2, 32), torch.arange(11))
    check_whole(Model, args, longer, 32, "sliding_attention", "global_attention")
