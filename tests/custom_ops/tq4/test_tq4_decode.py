"""One token over a TQ4 cache from its raw projections: against the ops it stands for, and the kernels under the interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from kiln.custom_ops.attention import prepare
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.tq4 import attention, codec, decode
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.tq4 import tq4_cache

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

EPS = 1e-6
SLOTS, EXACT_WINDOW = 90, 32
H200 = gpu_targets()["sm_90"]
LOSS = {1: 1.2e-2, 2: 6e-5, 3: 3e-6}  # relative, of the output in so many bytes
kiln = torch.ops.kiln


def projections(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int, seed: int) -> tuple[torch.Tensor, ...]:
    """q, k, v in parts, weights, cos and sin."""
    g = torch.Generator().manual_seed(seed)
    qk = torch.randn(parts, (heads + kv_heads) * dim, generator=g)
    v = torch.randn(v_parts, kv_heads * dim, generator=g)
    angle = torch.rand(1, dim // 2, generator=g) * 6
    weights = (torch.rand(dim, generator=g) + 0.5 for _ in range(2))
    return qk[:, : heads * dim], qk[:, heads * dim :], v, *weights, angle.cos(), angle.sin()


def cache(kv_heads: int, dim: int, length: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Codes, scales and exact window with `length` vectors, garbage elsewhere."""
    g = torch.Generator().manual_seed(seed)
    k, v = ((torch.randn(length, kv_heads, dim, generator=g) * dim**-0.25).to(dtype) for _ in range(2))
    return [t for x in (k, v) for t in tq4_cache.codes_of(x, SLOTS, length)] + [tq4_cache.ring_of(x, length, EXACT_WINDOW) for x in (k, v)]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def check(heads: int, kv_heads: int, dim: int, pos: int, parts: int, v_parts: int, terms: int, dtype: torch.dtype = torch.float32) -> None:
    """Against norm, rotary embedding, encoding and attention in plain torch, over the codes and the exact window that were written."""
    raw, caches = projections(heads, kv_heads, dim, parts, v_parts, pos), cache(kv_heads, dim, pos, pos, dtype)
    before, at = [t.clone() for t in caches], torch.tensor([pos])
    out = kiln.tq4_decode(*raw, *caches, at, EPS, terms, [])
    q, *written = prepare.prepare_reference(*raw, EPS, torch.float32)
    fixed_point.check("out", out, heads * dim, 1)
    assert fixed_point.form(out) == (terms, fixed_point.extent_of(heads * dim, dim))
    stored = [ring[at % EXACT_WINDOW].clone() for ring in caches[4:]]
    expected = attention.reference(q.double(), *stored, *caches[:4], *before[4:], at, None).flatten(1)
    found = fixed_point.dequantize(out).double()
    limit, rounding = {torch.float32: (LOSS[terms], 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (1e-2, 8e-3)}[dtype]
    assert torch.isfinite(found).all() and (found - expected).norm() / expected.norm() < limit
    others = [s for s in range(SLOTS) if s != pos]
    for i, x in enumerate(written):
        codes, scales = caches[2 * i], caches[2 * i + 1]
        exact = codec.decode(*codec.encode(x[0]))
        # a coordinate beside a boundary may go either way
        assert (codec.decode(codes[:, pos], scales[:, pos]) - exact).norm() / exact.norm() < 5e-3
        assert torch.equal(codes[:, others], before[2 * i][:, others])
        assert torch.equal(bits(scales[:, others]), bits(before[2 * i + 1][:, others]))
    others = [s for s in range(EXACT_WINDOW) if s != pos % EXACT_WINDOW]
    for ring, old, x in zip(caches[4:], before[4:], written, strict=True):
        torch.testing.assert_close(ring[pos % EXACT_WINDOW].float(), x[0], rtol=rounding, atol=1e-5)
        assert torch.equal(bits(ring[others]), bits(old[others]))


def check_centered(heads: int, kv_heads: int, dim: int, pos: int, dtype: torch.dtype) -> None:
    """Keys that share most of their length, coded less their center, which is no number before it is made."""
    g, at = torch.Generator().manual_seed(pos), torch.tensor([pos])
    raw = projections(heads, kv_heads, dim, 3, 2, pos)
    shared = torch.randn(kv_heads, dim, generator=g) * dim**-0.25
    k, v = ((torch.randn(pos, kv_heads, dim, generator=g) * dim**-0.25 + shared).to(dtype) for _ in range(2))
    center, late = tq4_cache.center_of(k, EXACT_WINDOW), pos - EXACT_WINDOW + 1
    codes = tq4_cache.codes_of(tq4_cache.less(k, center), SLOTS, max(late, 0)) + tq4_cache.codes_of(v, SLOTS, pos)
    caches = codes + [tq4_cache.ring_of(x, pos, EXACT_WINDOW) for x in (k, v)]
    before, held = [t.clone() for t in caches], center.clone()
    out = kiln.tq4_decode(*raw, *caches, at, EPS, 2, [held])
    q, own_k, own_v = prepare.prepare_reference(*raw, EPS, torch.float32)
    stored = [ring[at % EXACT_WINDOW].clone() for ring in caches[4:]]
    expected = attention.reference(q.double(), *stored, *caches[:4], *before[4:], at, None, 0, held).flatten(1)
    found = fixed_point.dequantize(out).double()
    limit = {torch.float32: 6e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]  # of two bytes; of what the exact window is rounded to
    assert torch.isfinite(found).all() and (found - expected).norm() / expected.norm() < limit
    if pos == EXACT_WINDOW * 3 // 4 - 1:  # the token's own key is the last of the center
        torch.testing.assert_close(held, tq4_cache.center_of(torch.cat([k, stored[0]]), EXACT_WINDOW), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(bits(held), bits(center))
    used = [p for p in range(SLOTS - EXACT_WINDOW) if p != late]  # the reference writes behind them where there is no key to code
    for i, exact, place in ((0, k[late].float() - center if late >= 0 else None, late), (2, own_v[0], pos)):
        if exact is not None:
            decoded = codec.decode(*codec.encode(exact))  # a coordinate beside a boundary may go either way
            assert (codec.decode(caches[i][:, place], caches[i + 1][:, place]) - decoded).norm() / decoded.norm() < 5e-3
        for t, old in zip(caches[i : i + 2], before[i : i + 2], strict=True):
            others = [p for p in used if p != place]
            assert torch.equal(bits(t[:, others]), bits(old[:, others]))
    for ring, old in zip(caches[4:], before[4:], strict=True):
        others = [s for s in range(EXACT_WINDOW) if s != pos % EXACT_WINDOW]
        assert torch.equal(bits(ring[others]), bits(old[others]))
    if pos >= EXACT_WINDOW:
        read = kiln.tq4_read(raw[0], raw[3], *raw[5:], *caches, at, EPS, 2, k_center=held)
        assert torch.equal(read, out)


SHAPES = pytest.mark.parametrize("heads, kv_heads, dim, parts, v_parts, terms",
                                 [(4, 2, 64, 1, 1, 2), (8, 1, 64, 5, 3, 3), (2, 1, 128, 3, 9, 1)])  # fmt: skip
POSITIONS = pytest.mark.parametrize("pos", [0, 1, 16, 30, 31, 32, 33, 63, 64, 85])


@POSITIONS
@SHAPES
def test_reference(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int, terms: int, pos: int) -> None:
    check(heads, kv_heads, dim, pos, parts, v_parts, terms)


CENTERS = pytest.mark.parametrize("pos", [0, 22, 23, 24, 30, 31, 32, 55, 85])


@CENTERS
def test_reference_with_a_center(pos: int) -> None:
    check_centered(4, 2, 64, pos, torch.float32)
    check_centered(2, 1, 128, pos, torch.float16)


@CENTERS
def interpreted_center(pos: int) -> None:
    """One split of the keys and several."""
    for sms, dtype in ((1, torch.float16), (8, torch.float32)):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check_centered(4, 2, 64, pos, dtype)


@POSITIONS
@SHAPES
def interpreted_kernels(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int, terms: int, pos: int) -> None:
    """One split of the keys and several."""
    for sms in (1, 8):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check(heads, kv_heads, dim, pos, parts, v_parts, terms)


@pytest.mark.parametrize("pos", [0, 31, 70])
def interpreted_exact_window_of_16_bits(pos: int) -> None:
    for sms in (1, 8):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            for dtype in (torch.float16, torch.bfloat16):
                check(4, 2, 64, pos, 3, 1, 2, dtype)


def test_wrong_arguments_are_named() -> None:
    raw, caches, pos = projections(4, 2, 64, 1, 1, 0), cache(2, 64, 3, 0), torch.tensor([3])
    with pytest.raises(ValueError, match=r"tq4_decode: q, k, v have \[256, 64, 128\] elements"):
        kiln.tq4_decode(raw[0], raw[1][:, :64], *raw[2:], *caches, pos, EPS, 2, [])
    with pytest.raises(ValueError, match=r"tq4_decode: k has 128 elements, k_codes is \(1, 90, 16\); expected \[KV, S, D/4\], D 64"):
        kiln.tq4_decode(*raw, *(t[:1] for t in caches), pos, EPS, 2, [])
    with pytest.raises(ValueError, match=r"tq4_decode: exact window \(32, 1, 64\), \(32, 2, 64\); expected \[R, 2, 64\]"):
        kiln.tq4_decode(*raw, *caches[:4], caches[4][:, :1], caches[5], pos, EPS, 2, [])
    with pytest.raises(ValueError, match="tq4: head dimension 32; expected 64, 128, 256 or 512"):
        kiln.tq4_decode(*projections(4, 2, 32, 1, 1, 0), *cache(2, 64, 3, 0), pos, EPS, 2, [])


NAMES = ("k_codes", "k_scales", "v_codes", "v_scales", "k_exact", "v_exact")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_center", torch.zeros(2, 64))
        for name, tensor in zip(NAMES, cache(2, 64, 3, 0), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        *raw, pos = arguments
        return kiln.tq4_decode(*raw, *(getattr(self, name) for name in NAMES), pos, EPS, 2, [self.k_center])


def test_opaque_when_exported() -> None:
    arguments = (*(t.contiguous() for t in projections(4, 2, 64, 1, 1, 0)), torch.tensor([3]))
    program = torch.export.export(Layer(), arguments, strict=False)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["kiln.tq4_decode.default"]
    assert torch.equal(program.module()(*arguments), Layer()(*arguments))


def test_kernel_cases_are_what_is_launched() -> None:
    for case in decode.kernel_cases(H200):
        assert set(case.signature) | set(case.constexprs) == set(case.fn.arg_names)
