"""The attention and TQ4 kernels under Triton's interpreter, against float64 loops that share nothing with them.

Every configuration of the tables runs here at least once. The inline PTX of the TQ4 planes cannot run there: a small PTX interpreter
checks it on every word.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import triton

from kiln.custom_ops.attention import flash
from kiln.custom_ops.attention.global_attention import global_attention
from kiln.custom_ops.attention.sliding_attention import sliding_attention
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.tq4 import attention, codec
from tests.custom_ops.interpret import at_night, interpreted
from tests.custom_ops.tq4 import tq4_cache

test_kernels_interpreted = interpreted(__file__)
test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

TARGETS = gpu_targets()
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # the interpreter truncates to bfloat16 instead of rounding


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: list[int], visible) -> torch.Tensor:
    """Attention in float64, one query head at a time: k, v [positions, KV, D], `visible(pos_q, pos_k)`."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for t, p in enumerate(pos):
        keys = [j for j in range(k.shape[0]) if visible(p, j)]
        for h in range(q.shape[1]):
            weights = torch.softmax(k[keys, h // group].double() @ q[t, h].double(), 0)
            out[t, h] = weights @ v[keys, h // group].double()
    return out


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Values whose scores spread over a few units, so that no single key takes all the weight."""
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.25).to(dtype)


def poison(cache: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """`cache` with values that must not be read at `slots`."""
    cache = cache.clone()
    cache[slots] = torch.tensor([float("nan"), float("inf"), -1e30, 1000.0]).to(cache.dtype).repeat(cache.shape[-1] // 4)
    return cache


def check_global(target: str, dtype: torch.dtype, dim: int, heads: int, kv_heads: int, slots: int, first: int, tokens: int,
                 with_len: bool) -> None:
    generator = torch.Generator().manual_seed(first + tokens)
    end = first + tokens
    q, k, v = (random(generator, dtype, n, h, dim) for n, h in ((tokens, heads), (slots, kv_heads), (slots, kv_heads)))
    garbage = list(range(end, slots))
    kv_len = torch.tensor([end], dtype=torch.int32) if with_len else None
    with compiling_for(TARGETS[target]):
        out = global_attention(q, poison(k, garbage), poison(v, garbage), torch.arange(first, end), kv_len)
    assert error(out, exact(q, k, v, list(range(first, end)), lambda pq, pk: pk <= pq)) < TOLERANCE[dtype]


def check_sliding(target: str, dtype: torch.dtype, dim: int, heads: int, kv_heads: int, window: int, slots: int, first: int,
                  tokens: int) -> None:
    generator = torch.Generator().manual_seed(first + tokens)
    end = first + tokens
    q, k, v = (random(generator, dtype, n, h, dim) for n, h in ((tokens, heads), (end, kv_heads), (end, kv_heads)))
    rings = []
    for x in (k, v):
        ring = poison(torch.zeros(slots, kv_heads, dim, dtype=dtype), list(range(slots)))
        for p in range(max(first - window + 1, 0), first):  # what is older than any query's window stays garbage
            ring[p % slots] = x[p]
        rings.append(ring)
    with compiling_for(TARGETS[target]):
        out = sliding_attention(q, k[first:].clone(), v[first:].clone(), *rings, torch.arange(first, end), window)
    assert error(out, exact(q, k, v, list(range(first, end)), lambda pq, pk: 0 <= pq - pk < window)) < TOLERANCE[dtype]


def distinct_targets(*tables: dict) -> list[str]:
    """One target for each architecture that has an entry of its own."""
    named = {sm for table in tables for sm, _ in table}
    return [name for name, target in TARGETS.items() if target.sm in named]


LENGTHS = (1, 17, 32, 33, 100, *at_night(15, 16, 31, 64, 65))


@pytest.mark.parametrize("length", LENGTHS)
def interpreted_global_decode_lengths(length: int) -> None:
    check_global("sm_86", torch.float32, 64, 4, 2, 100, length - 1, 1, with_len=length % 2 == 0)
    check_global("sm_86", torch.bfloat16, 64, 4, 2, 100, length - 1, 1, with_len=length % 2 == 1)


@pytest.mark.parametrize("first, tokens", [(0, 16), (0, 17), (31, 33), (63, 2),
                                           *at_night((0, 2), (0, 15), (0, 40), (5, 2), (16, 16), (50, 17))])
def interpreted_global_prefill_chunks(first: int, tokens: int) -> None:
    check_global("sm_86", torch.float32, 64, 4, 2, 96, first, tokens, with_len=True)
    check_global("sm_86", torch.bfloat16, 64, 3, 1, 96, first, tokens, with_len=False)


@pytest.mark.parametrize("target", distinct_targets(flash.DECODE_TILES, flash.PREFILL_TILES))
@pytest.mark.parametrize("dim", [256, 512])
def interpreted_global_every_configuration(target: str, dim: int) -> None:
    check_global(target, torch.bfloat16, dim, 8, 1, 150, 139, 1, with_len=True)
    check_global(target, torch.bfloat16, dim, 16, 1, 150, 101, 1, with_len=False)
    check_global(target, torch.bfloat16, dim, 8, 1, 150, 120, 19, with_len=True)


def interpreted_global_float32_at_the_largest_head() -> None:
    check_global("sm_90", torch.float32, 512, 8, 1, 80, 69, 1, with_len=True)
    check_global("sm_90", torch.float32, 512, 8, 1, 80, 50, 19, with_len=True)


@pytest.mark.parametrize("first", [0, 16, 31, 47, *at_night(1, 14, 15, 17, 32, 100)])
def interpreted_sliding_decode_lengths(first: int) -> None:
    check_sliding("sm_86", torch.float32, 64, 4, 2, 32, 32, first, 1)
    check_sliding("sm_86", torch.bfloat16, 128, 2, 2, 17, 17, first, 1)


@pytest.mark.parametrize("first, tokens", [(0, 17), (16, 16), (40, 33), (33, 70),
                                           *at_night((0, 2), (0, 70), (3, 15), (31, 2), (100, 31), (7, 16))])
def interpreted_sliding_prefill_chunks(first: int, tokens: int) -> None:
    check_sliding("sm_86", torch.float32, 64, 4, 2, 32, 32, first, tokens)
    check_sliding("sm_86", torch.bfloat16, 64, 2, 1, 17, 17, first, tokens)


def interpreted_sliding_window_longer_than_the_ring() -> None:
    """A model exported with max_seq_len below its window: the ring has max_seq_len slots and never wraps."""
    for first, tokens in ((0, 1), (20, 1), (0, 24), (9, 15)):
        check_sliding("sm_90", torch.float32, 64, 2, 1, 64, 24, first, tokens)


@pytest.mark.parametrize("target", distinct_targets(flash.DECODE_TILES, flash.PREFILL_TILES))
def interpreted_sliding_every_configuration(target: str) -> None:
    check_sliding(target, torch.bfloat16, 256, 4, 2, 90, 90, 200, 1)
    check_sliding(target, torch.bfloat16, 256, 4, 2, 90, 90, 200, 37)
    check_sliding(target, torch.bfloat16, 256, 2, 1, 90, 90, 40, 100)


def check_tq4(target: str, dtype: torch.dtype, dim: int, heads: int, kv_heads: int, slots: int, first: int, tokens: int,
              with_len: bool, exact_window: int = 32) -> None:
    generator = torch.Generator().manual_seed(first + tokens)
    end = first + tokens
    q, k, v = (random(generator, dtype, n, h, dim) for n, h in ((tokens, heads), (end, kv_heads), (end, kv_heads)))
    k = k * torch.linspace(0.1, 2, end)[:, None, None].to(dtype)  # scales that differ from key to key
    v = v * torch.linspace(3, 0.2, end)[:, None, None].to(dtype)
    kv_len = torch.tensor([end], dtype=torch.int32) if with_len else None
    with compiling_for(TARGETS[target]):
        out = attention.tq4_attention(q, *tq4_cache.state(k, v, slots, first, exact_window), torch.arange(first, end), kv_len)
    assert error(out, tq4_cache.exact(q, k, v, first, exact_window)) < TOLERANCE[dtype]


@pytest.mark.parametrize("length", LENGTHS)
def interpreted_tq4_decode_lengths(length: int) -> None:
    """Below the exact window's length, at it, and past it; caches of whole blocks of keys and others."""
    check_tq4("sm_86", torch.float32, 64, 4, 2, 112, length - 1, 1, with_len=True)
    check_tq4("sm_86", torch.float32, 64, 4, 2, 100, length - 1, 1, with_len=length % 2 == 0)
    check_tq4("sm_86", torch.bfloat16, 128, 3, 1, 100, length - 1, 1, with_len=length % 2 == 1)


@pytest.mark.parametrize("exact_window", [64, *at_night(32, 96)])
def interpreted_tq4_decode_exact_window_in_splits(exact_window: int) -> None:
    """On sm_90 the exact window of one KV head has a program for every 32 keys; on a small card one or two for all of them."""
    for sms in (1, 4, 132):
        target = dataclasses.replace(TARGETS["sm_90"], sm_count=sms)
        split = attention.decode_launch(torch.float32, False, target, 2, 1, 64, 200, exact_window)[1]
        assert split["EXACT"] == {1: 1, 4: 1, 132: exact_window // 32}[sms] and split["SPLITS"] == min(sms, 13)  # of 16 keys
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TARGETS, "small", target)
            for first in (40, exact_window - 1, exact_window, 150):
                check_tq4("small", torch.float32, 64, 2, 1, 200, first, 1, False, exact_window)


@pytest.mark.parametrize("first, tokens", [(0, 33), (31, 33), (31, 2), (50, 17),
                                           *at_night((0, 2), (0, 17), (5, 2), (30, 2), (32, 2), (0, 90))])
def interpreted_tq4_prefill_chunks(first: int, tokens: int) -> None:
    check_tq4("sm_86", torch.float32, 64, 4, 2, 96, first, tokens, with_len=True)
    check_tq4("sm_86", torch.bfloat16, 128, 3, 1, 96, first, tokens, with_len=False)


def interpreted_tq4_exact_window_longer_than_the_cache() -> None:
    for first, tokens in ((0, 1), (39, 1), (0, 40), (17, 5)):
        check_tq4("sm_86", torch.float32, 64, 4, 2, 40, first, tokens, True, exact_window=64)


@pytest.mark.parametrize("target", distinct_targets(attention.DECODE_TILES))
def interpreted_tq4_every_configuration(target: str) -> None:
    check_tq4(target, torch.bfloat16, 512, 4, 1, 150, 139, 1, with_len=True)
    check_tq4(target, torch.bfloat16, 512, 4, 1, 256, 139, 1, with_len=True)
    check_tq4(target, torch.bfloat16, 512, 16, 1, 150, 139, 1, with_len=True)
    check_tq4(target, torch.bfloat16, 512, 4, 1, 150, 120, 19, with_len=True)


def interpreted_tq4_float32_at_the_largest_head() -> None:
    check_tq4("sm_90", torch.float32, 512, 4, 1, 50, 45, 1, with_len=True)
    check_tq4("sm_90", torch.float32, 512, 4, 1, 50, 40, 7, with_len=True)


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def interpreted_tq4_write(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    tokens, kv_heads, slots = 5, 2, 9
    k, v = (torch.randn(tokens, kv_heads, dim, generator=generator) * torch.logspace(-3, 3, tokens)[:, None, None] for _ in range(2))
    k[1, 0] = 0
    pos = torch.arange(3, 3 + tokens)
    caches = [torch.full((kv_heads, slots, dim // 4), 21, dtype=torch.int16), torch.full((kv_heads, slots), 7.0, dtype=torch.float16)] * 2
    caches = [c.clone() for c in caches]
    codec.tq4_write(*caches, k.to(dtype), v.to(dtype), pos, [])
    for x, codes, scales in ((k, *caches[:2]), (v, *caches[2:])):
        x = x.to(dtype).transpose(0, 1)
        expected_codes, expected_scales = codec.encode(x)
        others = [s for s in range(slots) if s not in pos]
        assert (codes[:, others] == 21).all() and (scales[:, others] == 7).all()
        torch.testing.assert_close(scales[:, pos], expected_scales, rtol=2e-3, atol=0)
        # a coordinate within float32 rounding of a boundary may go either way
        assert (codes[:, pos] != expected_codes).sum() <= 1
        decoded = codec.decode(codes[:, pos], scales[:, pos])
        assert ((decoded - x.float()).norm() / x.float().norm()) < 0.11


PTX = re.compile(r"(\w+)\.[bu]32 ([^;]+);")


def run_ptx(text: str, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The few PTX instructions of the planes, on int64 tensors that hold 32-bit registers; $2 is the input."""
    registers = {"$2": word, "%lanemask_lt": torch.full_like(word, 0x7FFFFFFF)}  # the highest lane's

    def value(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.full_like(word, int(name, 0))

    def permute(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
        table = torch.stack([(x >> shift) & 255 for x in (a, b) for shift in (0, 8, 16, 24)])
        out = torch.zeros_like(word)
        for byte in range(4):
            select = (selector >> (4 * byte)) & 15
            picked = table.gather(0, (select & 7)[None])[0]
            picked = torch.where(select >= 8, torch.where(picked >= 128, 255, 0), picked)  # bit 3: the byte's sign bit, eight times
            out |= picked << (8 * byte)
        return out

    for name, operands in PTX.findall(text.split(";", 1)[1]):
        target, *sources = (x.strip() for x in operands.split(","))
        a, b = value(sources[0]), value(sources[-1])
        if name == "mov":
            registers[target] = a
        elif name == "and":
            registers[target] = a & b
        elif name == "xor":
            registers[target] = a ^ b
        elif name == "shl":
            registers[target] = a << b & 0xFFFFFFFF
        elif name == "shr":
            registers[target] = a >> b
        elif name == "prmt":
            registers[target] = permute(a, value(sources[1]), b)
        else:
            assert (name, sources[3]) == ("lop3", "0xEA")
            registers[target] = a & value(sources[1]) | value(sources[2])
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("pair", [0, 1])
def test_planes_ptx_decodes_every_word(pair: int) -> None:
    first = torch.arange(1 << 16)
    second = first.flip(0) * 40503 % (1 << 16)
    out = run_ptx(codec.PLANES_ASM.value[pair], first | second << 16)
    for plane, register in zip((2 * pair, 2 * pair + 1), out, strict=True):
        for half, word in ((register & 0xFFFF, first), (register >> 16, second)):
            nibble = word >> 4 * plane & 7 | (word >> codec.SIGN_BITS[plane] & 1) << 3
            expected = codec.levels(nibble.to(torch.int32)).to(torch.float16)
            assert torch.equal(half, expected.view(torch.int16).to(torch.int64) & 0xFFFF)
