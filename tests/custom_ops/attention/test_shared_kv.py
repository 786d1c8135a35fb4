"""Ops of a layer that reads another's keys and values, against those of a layer of its own; the gate of a per-layer embedding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import triton

from kiln.custom_ops.attention import flash, sliding_cut
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.step import add_norm, gate
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.attention.test_prepare import EPS, H200, Inputs, rings
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.step import test_add_norm
from tests.custom_ops.tq4 import test_tq4_decode

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

kiln = torch.ops.kiln


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Fixed point of three bytes; a kernel may add a row up in another order than the one that stored a key."""
    found, expected = fixed_point.dequantize(found), fixed_point.dequantize(expected)
    assert torch.isfinite(found).all()
    assert (found - expected).norm() <= (2e-6 if dtype == torch.float32 else 2e-3) * expected.norm()


def check_sliding(heads: int, kv_heads: int, dim: int, pos: int, window: int, slots: int, dtype: torch.dtype = torch.float32) -> None:
    """The layer that wrote the token, asked again with the same queries, says the same; nothing is written."""
    given, at = Inputs.random(heads, kv_heads, dim, 5, 3, seed=pos), torch.tensor([pos])
    (k_ring, v_ring), *_ = rings(slots, kv_heads, dim, pos, window, dtype)
    expected = kiln.sliding_decode(*given.arguments(), k_ring, v_ring, at, window, EPS, 3)
    before = [t.clone() for t in (k_ring, v_ring)]
    out = kiln.sliding_read(given.q, given.q_weight, given.cos, given.sin, k_ring, v_ring, at, window, EPS, 3)
    close(out, expected, dtype)
    for ring, old in zip((k_ring, v_ring), before, strict=True):
        assert torch.equal(ring.view(torch.uint8), old.view(torch.uint8))
    others = given.q * torch.linspace(-1, 1, given.q.shape[1])
    other = kiln.sliding_read(others, given.q_weight, given.cos, given.sin, k_ring, v_ring, at, window, EPS, 3)
    assert pos == 0 or not torch.equal(other, out)


def check_tq4(heads: int, kv_heads: int, dim: int, pos: int, dtype: torch.dtype = torch.float32) -> None:
    raw, at = test_tq4_decode.projections(heads, kv_heads, dim, 3, 2, pos), torch.tensor([pos])
    caches = test_tq4_decode.cache(kv_heads, dim, pos, pos, dtype)
    expected = kiln.tq4_decode(*raw, *caches, at, EPS, 3, [])
    before = [t.clone() for t in caches]
    close(kiln.tq4_read(raw[0], raw[3], *raw[5:], *caches, at, EPS, 3), expected, dtype)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(caches, before, strict=True))


def check_query() -> None:
    given = Inputs.random(4, 2, 32, 5, 3)
    out = kiln.prepare_q(given.q, given.q_weight, given.cos, given.sin, EPS, torch.float32)
    torch.testing.assert_close(out[0].double(), given.exact()[0], rtol=2e-5, atol=2e-6)


def check_gate(p: int, parts: int, terms: int) -> None:
    g = torch.Generator().manual_seed(p)
    given, value = torch.randn(parts, p, generator=g), torch.randn(1, p, generator=g)
    expected = F.gelu(given.double().sum(0, keepdim=True), approximate="tanh") * value
    out = kiln.gate_fixed(given, value, terms)
    assert fixed_point.form(out) == (terms, fixed_point.extent_of(p)) and fixed_point.elements(out) == p
    assert (fixed_point.dequantize(out) - expected).norm() < {1: 1.5e-2, 2: 5e-5, 3: 1e-6}[terms] * expected.norm()


def check_stream(scaled: bool) -> None:
    """`add_norm` without a weight: the stream as it is, in fixed point."""
    x, branch, post_weight, _ = test_add_norm.inputs(160)
    scale = torch.tensor([0.37]) if scaled else None
    stream, fixed, left = kiln.add_norm(x, branch, test_add_norm.squares(branch), post_weight, scale, None, EPS, 3)
    expected, _ = test_add_norm.exact(x, branch, post_weight, torch.ones(160), scale)
    torch.testing.assert_close(stream.double(), expected, rtol=1e-6, atol=1e-6)
    assert (fixed_point.dequantize(fixed).double() - expected).norm() < 1e-6 * expected.norm()
    torch.testing.assert_close(left.sum().double(), expected.square().sum(), rtol=1e-6, atol=0)


POSITIONS = pytest.mark.parametrize("pos", [0, 7, 16, 40])
GATES = pytest.mark.parametrize("p, parts, terms", [(256, 5, 3), (32, 1, 1), (352, 20, 2)])


@POSITIONS
def test_references(pos: int) -> None:
    check_sliding(4, 2, 32, pos, 16, 16)
    check_sliding(2, 1, 32, pos, 64, 41)  # exported for fewer tokens than the window has
    check_sliding(4, 1, 64, pos, 16, 16, torch.float16)
    check_tq4(4, 2, 64, pos)


@GATES
def test_gate_reference(p: int, parts: int, terms: int) -> None:
    check_gate(p, parts, terms)


def test_query_and_stream_references() -> None:
    check_query()
    check_stream(True)
    check_stream(False)


@pytest.mark.parametrize("pos", [0, 40])
def interpreted_sliding(pos: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one split and several; with 16-bit keys, of which a program reads its first block ahead, but never the token's own."""
    monkeypatch.setitem(sliding_cut.SLIDING_TILES, (90, 256), flash.Tile(keys=16, warps=4, stages=1))
    for sms in (1, 8):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check_sliding(4, 2, 32, pos, 16, 16)
            check_sliding(6, 2, 32, pos, 48, 41, torch.float16)


def interpreted_the_rest() -> None:
    with compiling_for(gpu_targets()["sm_90"]):
        check_query()
        check_stream(True)
        for arguments in ((256, 5, 3), (32, 1, 1), (352, 20, 2)):
            check_gate(*arguments)
        check_tq4(4, 2, 64, 40)
        check_tq4(4, 2, 64, 0)


def test_wrong_arguments_are_named() -> None:
    for given, value in ((torch.zeros(3, 64), torch.zeros(1, 32)), (torch.zeros(3, 48), torch.zeros(1, 48)),
                         (torch.zeros(3, 64), torch.zeros(1, 64).bfloat16())):  # fmt: skip
        with pytest.raises(ValueError, match="gate_fixed: gate is .*; expected float32"):
            kiln.gate_fixed(given, value, 2)
    i = Inputs.random(4, 2, 32)
    with pytest.raises(ValueError, match=r"sliding_read: rings \(16, 3, 32\)"):
        kiln.sliding_read(i.q, i.q_weight, i.cos, i.sin, torch.zeros(16, 3, 32), torch.zeros(16, 3, 32), torch.tensor([3]), 16, EPS, 2)
    codes = [torch.zeros(3, 90, 16, dtype=torch.int16), torch.zeros(3, 90).half()] * 2
    with pytest.raises(ValueError, match="tq4_read: q has 256 elements"):
        kiln.tq4_read(torch.zeros(1, 256), None, torch.zeros(1, 32), torch.zeros(1, 32), *codes, *[torch.zeros(32, 3, 64)] * 2,
                      torch.tensor([3]), EPS, 2)  # fmt: skip


def test_kernel_cases_are_what_is_launched() -> None:
    for case in gate.kernel_cases(H200) + add_norm.kernel_cases(H200):
        assert set(case.signature) | set(case.constexprs) == set(case.fn.arg_names)
