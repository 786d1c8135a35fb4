"""Attention of one token from its raw projections, against float64 loops that share nothing with the ops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from kiln.custom_ops.attention import flash, prepare, sliding_cut, sliding_decode
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.interpret import interpreted

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

EPS = 1e-6
H200 = gpu_targets()["sm_90"]
POSITIONS = (0, 1, 7, 15, 16, 17, 40)  # of a window of 16: first, within, the last before the ring is full, its wrap, past it
LOSS = {1: 1.5e-2, 2: 5e-5, 3: 2e-6}
kiln = torch.ops.kiln


@dataclasses.dataclass
class Inputs:
    """Projections in `parts` parts, q and k columns of one tensor as a fused product leaves them, v of another with parts of its own."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def random(cls, heads: int, kv_heads: int, dim: int, parts: int = 1, v_parts: int = 1, seed: int = 0) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        qk = torch.randn(parts, (heads + kv_heads) * dim, generator=g)
        v = torch.randn(v_parts, kv_heads * dim, generator=g)
        angle = torch.rand(1, dim // 2, generator=g) * 6
        weights = (torch.rand(dim, generator=g) * dim**-0.25 * 2 for _ in range(2))
        return cls(qk[:, : heads * dim], qk[:, heads * dim :], v, *weights, angle.cos(), angle.sin())

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.q_weight, self.k_weight, self.cos, self.sin

    def exact(self) -> list[torch.Tensor]:
        """q [heads, D], k and v [KV, D] as attention takes them, float64, pair by pair."""
        dim = self.q_weight.shape[0]
        out = []
        for x, weight in ((self.q, self.q_weight), (self.k, self.k_weight), (self.v, None)):
            x = x.double().sum(0).view(-1, dim)
            x = x / (x.square().mean(1, keepdim=True) + EPS).sqrt()
            if weight is not None:
                x = x * weight.double()
                turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * torch.complex(self.cos, self.sin).to(torch.complex128)
                x = torch.cat((turned.real, turned.imag), 1)
            out.append(x)
        return out


def check_prepare(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int, dtype: torch.dtype = torch.float32) -> None:
    given = Inputs.random(heads, kv_heads, dim, parts, v_parts)
    found = kiln.prepare_qkv(*given.arguments(), EPS, dtype)
    for out, expected, count in zip(found, given.exact(), (heads, kv_heads, kv_heads), strict=True):
        assert out.dtype == dtype and out.shape == (1, count, dim)
        torch.testing.assert_close(out[0].double(), expected, **({"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32
                                                                  else {"rtol": 2**-7, "atol": 1e-6}))  # fmt: skip


def rings(slots: int, kv_heads: int, dim: int, pos: int, window: int,
          dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[k_ring, v_ring] before position `pos`, garbage where no query from `pos` on may look, and keys and values by position."""
    g = torch.Generator().manual_seed(pos)
    past = [(torch.randn(pos, kv_heads, dim, generator=g) * dim**-0.25).to(dtype) for _ in range(2)]
    found = []
    for x in past:
        ring = torch.tensor([float("nan"), float("inf"), -1e30, 1000.0], dtype=dtype).repeat(dim // 4).expand(slots, kv_heads, dim).clone()
        for p in range(max(0, pos - window + 1), pos):
            ring[p % slots] = x[p]
        found.append(ring)
    return found, past[0], past[1]


def check_sliding(heads: int, kv_heads: int, dim: int, pos: int, window: int, slots: int, parts: int, v_parts: int, terms: int,
                  dtype: torch.dtype = torch.float32) -> None:
    given = Inputs.random(heads, kv_heads, dim, parts, v_parts, seed=pos)
    (k_ring, v_ring), k_past, v_past = rings(slots, kv_heads, dim, pos, window, dtype)
    before = k_ring.clone(), v_ring.clone()
    out = kiln.sliding_decode(*given.arguments(), k_ring, v_ring, torch.tensor([pos]), window, EPS, terms)
    q, k, v = given.exact()
    first = max(0, pos - window + 1)
    keys, values = torch.cat((k_past[first:].double(), k[None])), torch.cat((v_past[first:].double(), v[None]))
    expected = torch.empty(heads, dim, dtype=torch.float64)
    for h in range(heads):
        j = h // (heads // kv_heads)
        expected[h] = torch.softmax(keys[:, j] @ q[h], 0) @ values[:, j]
    fixed_point.check("out", out, heads * dim, 1)
    assert fixed_point.form(out) == (terms, fixed_point.extent_of(heads * dim, dim))
    found = fixed_point.dequantize(out).double()
    assert torch.isfinite(found).all()
    whole = dtype == torch.float32
    assert (found - expected.flatten()).norm() / expected.norm() < LOSS[terms] + (0 if whole else 2e-3)
    for ring, old, own in ((k_ring, before[0], k), (v_ring, before[1], v)):
        torch.testing.assert_close(ring[pos % slots].double(), own, **({"rtol": 2e-5, "atol": 2e-6} if whole else
                                                                        {"rtol": 2**-10, "atol": 1e-6}))  # fmt: skip
        others = [s for s in range(slots) if s != pos % slots]
        bits = torch.int32 if whole else torch.int16
        assert torch.equal(ring[others].view(bits), old[others].view(bits))


SHAPES = [(4, 2, 32, 1, 1), (4, 2, 32, 5, 3), (2, 1, 64, 3, 9), (3, 3, 64, 70, 1)]
PREPARED = pytest.mark.parametrize("heads, kv_heads, dim, parts, v_parts", SHAPES)
SLIDING = pytest.mark.parametrize("pos", POSITIONS)


@PREPARED
def test_prepare_reference(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int) -> None:
    check_prepare(heads, kv_heads, dim, parts, v_parts)
    check_prepare(heads, kv_heads, dim, parts, v_parts, torch.bfloat16)


@SLIDING
def test_sliding_reference(pos: int) -> None:
    check_sliding(4, 2, 32, pos, 16, 16, 5, 3, 2)
    check_sliding(4, 1, 64, pos, 16, 16, 1, 1, 3)
    check_sliding(2, 1, 32, pos, 64, 41, 2, 1, 1)  # exported for fewer tokens than the window has
    check_sliding(4, 2, 32, pos, 16, 16, 5, 3, 2, torch.float16)


@PREPARED
def interpreted_prepare(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int) -> None:
    with compiling_for(H200):
        check_prepare(heads, kv_heads, dim, parts, v_parts)


@SLIDING
def interpreted_sliding(pos: int) -> None:
    """One split and several: the merge writes fixed point either way."""
    for sms in (2, 8):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check_sliding(4, 2, 32, pos, 16, 16, 5, 3, 2)
    with compiling_for(H200):
        check_sliding(4, 1, 64, pos, 32, 32, 3, 1, 3)
        check_sliding(2, 1, 32, pos, 64, 41, 2, 1, 1)


@SLIDING
def interpreted_sliding_ahead(pos: int, monkeypatch) -> None:
    """16-bit keys, of which each program reads its first block ahead: one block and several to a split, groups of 1, 3 and 8 heads."""
    monkeypatch.setitem(sliding_cut.SLIDING_TILES, (90, 256), flash.Tile(keys=16, warps=4, stages=1))
    for sms in (1, 8):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check_sliding(6, 2, 32, pos, 48, 48, 5, 3, 2, torch.float16)
    with compiling_for(H200):
        check_sliding(2, 2, 32, pos, 32, 32, 1, 2, 3, torch.float16)
        check_sliding(8, 1, 64, pos, 64, 41, 3, 1, 2, torch.float16)


def interpreted_several_steps() -> None:
    """Token after token over one ring that began as garbage: the ring holds what attention reads, across its wrap."""
    slots, kv_heads, dim, heads = 8, 2, 32, 4
    ring = [torch.full((slots, kv_heads, dim), float("nan")) for _ in range(2)]
    keys, values = [], []
    for pos in range(19):
        given = Inputs.random(heads, kv_heads, dim, 3, 2, seed=100 + pos)
        with compiling_for(dataclasses.replace(H200, sm_count=4)):
            out = kiln.sliding_decode(*given.arguments(), *ring, torch.tensor([pos]), slots, EPS, 3)
        q, k, v = given.exact()
        keys, values = [*keys, k][-slots:], [*values, v][-slots:]
        for h in range(heads):
            expected = torch.softmax(torch.stack(keys)[:, h // 2] @ q[h], 0) @ torch.stack(values)[:, h // 2]
            found = fixed_point.dequantize(out)[0, h * dim : (h + 1) * dim]
            torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("pos", [0, 5, 131071])
def interpreted_rope_table(pos: int) -> None:
    """Also of sizes that are no power of two; the angle is float32, as in the model."""
    inv_freq = 1e4 ** -(torch.arange(48) / 48)
    with compiling_for(H200):
        cos, sin = kiln.rope_table(torch.tensor([pos]), inv_freq)
    angle = (torch.tensor([float(pos)])[:, None] * inv_freq).double()
    assert cos.shape == sin.shape == (1, 48)
    torch.testing.assert_close(torch.stack((cos, sin)).double(), torch.stack((angle.cos(), angle.sin())), rtol=0, atol=2e-7)


def test_wrong_arguments_are_named() -> None:
    def changed(**fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return dataclasses.replace(Inputs.random(4, 2, 32, parts=3), **fields).arguments()

    ring, pos = torch.zeros(16, 2, 32), torch.tensor([3])
    for arguments, message in (
        (changed(q=torch.zeros(3, 100)), r"q, k, v have \[100, 64, 64\] elements; .* whole heads of 32"),
        (changed(v=torch.zeros(1, 32)), r"q, k, v have \[128, 64, 32\]"),
        (changed(k=torch.zeros(3, 64).bfloat16()), "expected float32"),
        (changed(q=torch.zeros(3, 96)), r"3 heads to 2"),
        (changed(cos=torch.zeros(1, 32)), r"cos \(1, 32\); expected \[1, 16\]"),
        (changed(q=torch.zeros(2, 128)), "q has 2 parts 128 apart, k 3, 192"),
        (changed(q=torch.zeros(3, 128)), "q has 3 parts 128 apart, k 3, 192"),
    ):
        with pytest.raises(ValueError, match=f"prepare_qkv: .*{message}"):
            kiln.prepare_qkv(*arguments, EPS, torch.float32)
        with pytest.raises(ValueError, match=f"sliding_decode: .*{message}"):
            kiln.sliding_decode(*arguments, ring, ring.clone(), pos, 16, EPS, 2)
    with pytest.raises(ValueError, match=r"sliding_decode: rings \(16, 1, 32\), \(16, 2, 32\); expected \[R, 2, 32\]"):
        kiln.sliding_decode(*changed(), ring[:, :1], ring.clone(), pos, 16, EPS, 2)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("k_ring", "v_ring"):
            self.register_buffer(name, torch.zeros(16, 2, 32))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *weights, pos = rest
        q, k, v = (x.contiguous() for x in (q, k, v))
        prepared = kiln.prepare_qkv(q, k, v, *weights, EPS, torch.float32)
        return kiln.sliding_decode(q, k, v, *weights, self.k_ring, self.v_ring, pos, 16, EPS, 2), prepared[0]


def test_opaque_when_exported() -> None:
    arguments = (*Inputs.random(4, 2, 32).arguments(), torch.tensor([3]))
    program = torch.export.export(Layer(), arguments, strict=False)
    ours = [str(node.target) for node in program.graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)]
    assert {"kiln.prepare_qkv.default", "kiln.sliding_decode.default"} == {name for name in ours if "kiln" in name}
    assert not any("softmax" in name or "matmul" in name or "index" in name for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*arguments), Layer()(*arguments), strict=True))


def test_kernel_cases_are_what_is_launched() -> None:
    for case in prepare.kernel_cases(H200) + sliding_decode.kernel_cases(H200):
        assert set(case.signature) | set(case.constexprs) == set(case.fn.arg_names)
