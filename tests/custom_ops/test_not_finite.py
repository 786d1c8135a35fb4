"""A NaN or an Inf that goes into an op comes out of it: of the references, and of the kernels under the interpreter.

What a softmax or a maximum would drop, fixed point would turn into an integer, and sampling into a token.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.step.sample import CHUNK
from kiln.custom_ops.tq4 import codec
from kiln.custom_ops.weights import gemv
from kiln.custom_ops.weights.fixed_point import dequantize, quantize
from tests.custom_ops.attention.test_prepare import Inputs, rings
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.step.test_sample import arguments
from tests.custom_ops.tq4 import tq4_cache
from tests.custom_ops.tq4.test_tq4_decode import EXACT_WINDOW, SLOTS, cache, projections
from tests.custom_ops.weights.test_linear import random_weight

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

NAN, INF = float("nan"), float("inf")
BAD = (NAN, -NAN, INF, -INF)
EPS = 1e-6
kiln = torch.ops.kiln


def nan(x: torch.Tensor) -> bool:
    return bool(x.isnan().all())


def finite(x: torch.Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def fixed_point() -> None:
    """The group of the value, and no other."""
    for terms in (1, 2, 3):
        for i, bad in enumerate(BAD):
            x = torch.randn(2, 96, generator=torch.Generator().manual_seed(i))
            x[1, 33 + 7 * i] = bad
            y = dequantize(kiln.fixed_point(x, terms))
            assert nan(y[1, 32:64]) and finite(y[0]) and finite(y[1, :32]) and finite(y[1, 64:])
            wide = torch.cat((x, x, x, x, x, x, x, x), 1)
            y = dequantize(kiln.fixed_point(wide, terms)).unflatten(1, (3, 256))
            assert nan(y[1]) and finite(y[0])
            assert nan(dequantize(kiln.fixed_point(torch.full((1, 32), bad), terms)))


def products() -> None:
    """From an activation, from a norm's sums, from a weight; every way a product may end."""
    zeros = torch.zeros(gemv.COUNTERS, dtype=torch.int32)
    for block_type in ("Q6_K",) if triton.knobs.runtime.interpret else ("Q4_K", "Q6_K", "Q8_0"):
        words, halves, _ = random_weight(block_type, 1024, 256)
        x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
        good, squares = quantize(x, 2), torch.tensor([NAN, 1.0])
        x[0, 200] = INF
        for fixed, given in ((quantize(x, 2), None), (good, squares)):
            assert nan(dequantize(kiln.fixed_glu(fixed, words, halves, block_type, zeros, given, EPS)))
            cut = words[:, :, :64], halves[:, :, :64]
            y, left = kiln.fixed_linear_squares(fixed, *cut, block_type, zeros, given, EPS)
            assert nan(y) and nan(left.sum()) and nan(kiln.fixed_linear(fixed, *cut, block_type, zeros, given, EPS))
            assert nan(kiln.fixed_partials(fixed, *cut, block_type, given, EPS).sum(0))
        halves = halves.clone()
        halves[0, 0, 300] = NAN
        y = kiln.fixed_linear(good, words[:, :, 256:320], halves[:, :, 256:320], block_type, zeros)
        assert nan(y[:, 44]) and finite(y[:, :44]) and finite(y[:, 45:])
        y = dequantize(kiln.fixed_glu(good, words, halves, block_type, zeros))  # 300 is a gate: its extent
        assert nan(y[:, 256:]) and finite(y[:, :256])


def plain_products() -> None:
    """The product of prefill and the embedding, from a weight; an id below 0 reads row 0."""
    words, halves, _ = random_weight("Q4_K", 64, 256)
    halves = halves.clone()
    halves[0, 0, 5] = NAN
    y = kiln.quantized_linear(torch.ones(3, 256), words, halves, "Q4_K")
    assert nan(y[:, 5]) and finite(y[:, 6:])
    rows = kiln.quantized_embedding(torch.tensor([5, 7, -1]), words, halves, "Q4_K")
    assert nan(rows[0]) and finite(rows[1:]) and torch.equal(rows[2], kiln.quantized_embedding(torch.tensor([0]), words, halves, "Q4_K")[0])


def norms() -> None:
    """A value leaves NaN in its group and in the sum that every product is multiplied by the root of."""
    g = torch.Generator().manual_seed(3)
    for bad in (NAN, INF):
        for where in range(4):
            x, branch, post, weight = (torch.randn(n, generator=g) for n in ((1, 320), (1, 320), (320,), (320,)))
            squares = (branch * branch).sum(1)
            (x[0], branch[0], post, weight)[where][40] = bad
            stream, fixed, left = kiln.add_norm(x, branch, squares, post, torch.tensor([0.5]), weight, EPS, 2)
            y = dequantize(fixed)
            assert nan(y[0, 32:64]) and finite(y[0, :32]) and finite(y[0, 64:])
            if where < 3:
                assert not torch.isfinite(stream[0, 40]) and not torch.isfinite(left.sum())
                fixed, left = kiln.norm_fixed(x if where == 0 else stream, weight, 2)
                assert nan(dequantize(fixed)[0, 32:64]) and not torch.isfinite(left.sum())
        stream, fixed, left = kiln.add_norm(x, branch, torch.tensor([NAN]), post, None, weight, EPS, 2)
        assert nan(stream) and nan(dequantize(fixed)) and nan(left.sum())


def sliding() -> None:
    """From the projections of a head, and from what an earlier step left in the ring."""
    heads, kv_heads, dim, pos = 4, 2, 64, 21
    for where in range(5):
        given = list(Inputs.random(heads, kv_heads, dim, 3, 2, seed=1).arguments())
        (k_ring, v_ring), _, _ = rings(16, kv_heads, dim, pos, 16, torch.float32)
        if where < 3:
            given[where][1, 5] = NAN
        else:
            (k_ring, v_ring)[where - 3][(pos - 4) % 16, 0, 5] = NAN
        y = dequantize(kiln.sliding_decode(*given, k_ring, v_ring, torch.tensor([pos]), 16, EPS, 2)).view(heads, dim)
        rest = y[1:] if where == 0 else y[2:]  # a head's query; a KV head's queries
        assert finite(rest) and nan(y[0, :32]) and (where == 4 or nan(y[: heads - len(rest)]))
        if where in (1, 2):
            assert nan((k_ring, v_ring)[where - 1][pos % 16, 0])


def tq4_codec() -> None:
    for dim in (64, 512):
        for bad in BAD:
            k, v = (torch.randn(2, 2, dim, generator=torch.Generator().manual_seed(dim)) for _ in range(2))
            k[1, 0, 7] = bad
            codes, scales = codec.encode(k)
            assert nan(scales[1, 0]) and finite(scales[0]) and nan(codec.decode(codes, scales)[1, 0])
            caches = [torch.zeros(2, 9, dim // 4, dtype=torch.int16), torch.zeros(2, 9, dtype=torch.float16)] * 2
            caches = [t.clone() for t in caches]
            kiln.tq4_write(*caches, k, v, torch.tensor([3, 4]), [])
            assert nan(caches[1][0, 4]) and finite(caches[1][1]) and finite(caches[1][0, :4]) and finite(caches[3])


def tq4_decode() -> None:
    """From the projections, from a code's scale, from the exact window."""
    heads, kv_heads, dim, pos = 4, 2, 64, 70
    for where in range(7):
        raw, caches = list(projections(heads, kv_heads, dim, 3, 2, 1)), cache(kv_heads, dim, pos, 1)
        if where < 3:
            raw[where][1, 5] = NAN
        elif where < 5:
            caches[1 + 2 * (where - 3)][0, 11] = NAN
        else:
            caches[where - 1][(pos - 4) % EXACT_WINDOW, 0, 5] = NAN
        y = dequantize(kiln.tq4_decode(*raw, *caches, torch.tensor([pos]), EPS, 2, [])).view(heads, dim)
        rest = y[1:] if where == 0 else y[2:]
        assert finite(rest) and nan(y[0, :32]) and (where == 6 or nan(y[: heads - len(rest)]))
        if where in (1, 2):
            assert nan(caches[2 * where - 1][0, pos])


def attention_of_a_chunk() -> None:
    """Prefill, and decode that is not fused, over each kind of cache: queries that read a bad key or value, and those that do not."""
    g = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.float16):
        for tokens in (1, 20):
            first = 60
            end = first + tokens
            for where in range(3):
                q, k, v = (torch.randn(n, h, 64, generator=g).to(dtype) for n, h in ((tokens, 4), (end, 2), (end, 2)))
                (q, k, v)[where][-1 if where == 0 else 10, 0, 3] = NAN
                pos = torch.arange(first, end)
                everything = [torch.cat([x, torch.zeros(5, 2, 64, dtype=dtype)]) for x in (k, v)]
                coded = tq4_cache.state(k, v, SLOTS, first, EXACT_WINDOW)
                ring = [x[first - 32 : first].roll(first, 0) for x in (k, v)]  # the key at 10 is older than the window
                outs = [kiln.global_attention(q, *everything, pos, None), kiln.tq4_attention(q, *coded, pos, None)]
                for out in outs:
                    bad = out[-1, 0] if where == 0 else out[:, :2]
                    assert nan(bad) if where < 2 or out is outs[1] else nan(bad[..., 3])
                    assert finite(out[:, 2:])
                out = kiln.sliding_attention(q, k[first:], v[first:], *ring, pos, 32)
                assert nan(out[-1, 0]) and finite(out[:, 2:]) if where == 0 else finite(out)
                ring[0][7, 0, 3] = NAN  # of position 39, which the first query reads
                assert where == 0 or nan(kiln.sliding_attention(q, k[first:], v[first:], *ring, pos, 32)[0, :2])


def sampling() -> None:
    """-1 for a NaN or +Inf anywhere, or where every token is forbidden; a forbidden token is legal."""
    for vocab in (5, 2 * CHUNK + 100):
        for heat, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 3, 0.9), (1.0, 0, 0.5)):
            logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
            logits[1] = -INF
            assert 0 <= int(kiln.sample(*arguments(logits, heat, top_k, top_p))) < vocab
            for bad in (NAN, -NAN, INF):
                for place in (0, vocab - 1):
                    planted = logits.clone()
                    planted[place] = bad
                    assert int(kiln.sample(*arguments(planted, heat, top_k, top_p))) == -1, (vocab, heat, bad, place)
            for bad in (NAN, -INF):
                assert int(kiln.sample(*arguments(torch.full((vocab,), bad), heat, top_k, top_p))) == -1
            logits = torch.full((vocab,), -INF)
            logits[vocab - 1] = -1e30
            assert int(kiln.sample(*arguments(logits, heat, top_k, top_p))) == vocab - 1


CHECKS = (fixed_point, products, plain_products, norms, sliding, tq4_codec, tq4_decode, attention_of_a_chunk, sampling)


@pytest.mark.parametrize("check", CHECKS)
def test_reference(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("check", CHECKS)
def interpreted_kernels(check: Callable[[], None]) -> None:
    with compiling_for(gpu_targets()["sm_90"]):
        check()
