"""What families have that Gemma 4 has not: absent norms, scaled queries, neighbouring pairs, a plain residual stream, SiLU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.step import add_norm
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.gemv import GLU_ROWS, fix, glu_fits
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.tq4 import test_tq4_decode
from tests.custom_ops.weights import test_gemv
from tests.custom_ops.weights.test_linear import random_weight

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)

EPS = 1e-6
H200 = dataclasses.replace(gpu_targets()["sm_90"], sm_count=4)
kiln = torch.ops.kiln

# weights of q's and k's norms, scale of q, norm of v, neighbours: Qwen3 and Gemma 3, Llama, and the rest of the combinations
FORMS = pytest.mark.parametrize("norms, scale, v_norm, neighbours", [(True, 0.18, False, False), (False, 0.125, False, True),
                                                                     (False, 1.0, True, False), (True, 0.5, True, True)])  # fmt: skip


def form(norms: bool, scale: float, v_norm: bool, neighbours: bool, dim: int, seed: int) -> tuple[tuple, tuple]:
    """Projections with norms' weights, and what the ops are told."""
    q, k, v, q_weight, k_weight, cos, sin = test_tq4_decode.projections(6, 2, dim, 3, 2, seed)
    weights = (q_weight, k_weight) if norms else (None, None)
    return (q, k, v, *weights, cos, sin), (scale, v_norm, neighbours)


def exact(raw: tuple, scale: float, v_norm: bool, neighbours: bool) -> list[torch.Tensor]:
    """q, k, v [heads, D] in float64; a pair is a complex number. Of neighbours, the first of each pair before all of the second."""
    q, k, v, q_weight, k_weight, cos, sin = raw
    dim, found = 2 * cos.shape[1], []
    for x, weight, factor in ((q, q_weight, scale), (k, k_weight, 1.0)):
        x = x.double().sum(0).view(-1, dim)
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        pairs = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, -1)
        turned = torch.complex(*pairs) * torch.complex(cos, sin).to(torch.complex128)
        found.append(torch.cat((turned.real, turned.imag), 1) * factor)
    v = v.double().sum(0).view(-1, dim)
    return [*found, v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() if v_norm else v]


def check_prepare(*which) -> None:
    raw, told = form(*which, dim=32, seed=1)
    for out, expected in zip(kiln.prepare_qkv(*raw, EPS, torch.float32, *told), exact(raw, *told), strict=True):
        torch.testing.assert_close(out[0].double(), expected, rtol=2e-5, atol=2e-6)


def check_sliding(scale: float, v_norm: bool) -> None:
    """The window of 16 is full: the new key and 15 older ones."""
    raw, _ = form(True, scale, v_norm, False, dim=32, seed=2)
    g = torch.Generator().manual_seed(3)
    rings = [torch.randn(16, 2, 32, generator=g) for _ in range(2)]
    past = [ring[torch.arange(25, 40) % 16].double() for ring in rings]
    out = kiln.sliding_decode(*raw, *rings, torch.tensor([40]), 16, EPS, 3, scale, v_norm)
    q, k, v = exact(raw, scale, v_norm, False)
    keys, values = (torch.cat((x, own[None])) for x, own in zip(past, (k, v), strict=True))
    expected = torch.stack([torch.softmax(keys[:, h // 3] @ q[h], 0) @ values[:, h // 3] for h in range(6)]).flatten()
    assert (fixed_point.dequantize(out)[0] - expected).norm() < 2e-5 * expected.norm()
    for ring, own in zip(rings, (k, v), strict=True):
        torch.testing.assert_close(ring[40 % 16].double(), own, rtol=2e-5, atol=2e-6)


def check_tq4(*which) -> None:
    """At a position before the exact window is full, so that no code is read: against exact attention."""
    raw, told = form(*which, dim=64, seed=4)
    pos = 5
    caches = test_tq4_decode.cache(2, 64, pos, 5)
    past = [ring[:pos].double() for ring in caches[4:]]
    out = kiln.tq4_decode(*raw, *caches, torch.tensor([pos]), EPS, 3, [], *told)
    q, k, v = exact(raw, *told)
    keys, values = (torch.cat((x, own[None])) for x, own in zip(past, (k, v), strict=True))
    expected = torch.stack([torch.softmax(keys[:, h // 3] @ q[h], 0) @ values[:, h // 3] for h in range(6)]).flatten()
    assert (fixed_point.dequantize(out)[0] - expected).norm() < 2e-5 * expected.norm()


def check_plain_residual(d: int) -> None:
    g = torch.Generator().manual_seed(d)
    x, branch = (torch.randn(1, d, generator=g) for _ in range(2))
    weight = torch.rand(d, generator=g) + 0.5
    for scale in (None, torch.tensor([0.37])):
        stream, fixed, left = kiln.add_norm(x, branch, None, None, scale, weight, EPS, 3)
        expected = (x.double() + branch) * (1 if scale is None else scale)
        torch.testing.assert_close(stream.double(), expected, rtol=3e-7, atol=3e-7)
        norm = expected / (expected.square().mean() + EPS).sqrt() * weight
        assert (fixed_point.dequantize(fixed).double() * add_norm.root(left.double(), d, EPS) - norm).norm() < 2e-6 * norm.norm()


def check_silu(n: int) -> None:
    words, halves, matrix = random_weight("Q4_K", n, 256)
    x, counters = torch.randn(1, 256, generator=torch.Generator().manual_seed(n)), test_gemv.counters()
    fixed = fix(x, 3) if triton.knobs.runtime.interpret else kiln.fixed_point(x, 3)
    out = fixed_point.dequantize(kiln.fixed_glu(fixed, words, halves, "Q4_K", counters, None, 0.0, "silu"))
    gate, value = (fixed_point.dequantize(fixed).double() @ torch.as_tensor(matrix).double().T).chunk(2, -1)
    expected = gate / (1 + torch.exp(-gate)) * value
    assert (out - expected).norm() < 1e-6 * expected.norm() and not counters.any()


@FORMS
def test_references(norms: bool, scale: float, v_norm: bool, neighbours: bool) -> None:
    check_prepare(norms, scale, v_norm, neighbours)
    check_tq4(norms, scale, v_norm, neighbours)
    check_sliding(scale, v_norm)


def test_references_of_a_plain_stream() -> None:
    check_plain_residual(160)
    check_silu(6 * GLU_ROWS)


@FORMS
def interpreted_attention(norms: bool, scale: float, v_norm: bool, neighbours: bool) -> None:
    with compiling_for(H200):
        check_prepare(norms, scale, v_norm, neighbours)
        check_tq4(norms, scale, v_norm, neighbours)
        check_sliding(scale, v_norm)


def interpreted_plain_stream() -> None:
    """Gates of 3 programs of 64 rows, and of 3 of 32."""
    with compiling_for(H200):
        check_plain_residual(160)
        check_silu(6 * GLU_ROWS)
        check_silu(3 * GLU_ROWS)


def test_glu_sizes() -> None:
    assert glu_fits(2 * 2112) and glu_fits(2 * 704) and glu_fits(2 * 12288) and glu_fits(2 * 96) and not glu_fits(2 * 48)
    words, halves, _ = random_weight("Q4_K", 128, 256)
    with pytest.raises(ValueError, match="activation 'relu'; expected gelu_tanh or silu"):
        kiln.fixed_glu(kiln.fixed_point(torch.zeros(1, 256), 2), words, halves, "Q4_K", test_gemv.counters(), None, 0.0, "relu")


def test_a_norm_of_queries_alone_is_refused() -> None:
    raw, _ = form(True, 1.0, True, False, dim=32, seed=1)
    with pytest.raises(ValueError, match="a norm's weight for q or k alone"):
        kiln.prepare_qkv(*raw[:4], None, *raw[5:], EPS, torch.float32)


@pytest.mark.gpu
@FORMS
def test_on_a_gpu(norms: bool, scale: float, v_norm: bool, neighbours: bool) -> None:
    """The compiled kernels against the references, at Qwen3's head size."""

    def moved(arguments: tuple) -> list:
        return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]

    raw, told = form(norms, scale, v_norm, neighbours, dim=128, seed=6)
    qk = torch.cat(raw[:2], -1).cuda()  # of one matmul: a copy of a part of it would have strides of its own
    on_device = [*qk.split([x.shape[-1] for x in raw[:2]], -1), *moved(raw[2:])]
    for found, expected in zip(kiln.prepare_qkv(*on_device, EPS, torch.float32, *told), exact(raw, *told), strict=True):
        torch.testing.assert_close(found[0].double().cpu(), expected, rtol=2e-5, atol=5e-6)
    caches = test_tq4_decode.cache(2, 128, 70, 7)
    on_gpu, pos = moved(tuple(caches)), torch.tensor([70])
    found = kiln.tq4_decode(*on_device, *on_gpu, pos.cuda(), EPS, 3, [], *told)
    expected = fixed_point.dequantize(kiln.tq4_decode(*raw, *caches, pos, EPS, 3, [], *told))
    assert (fixed_point.dequantize(found.cpu()) - expected).norm() < 1e-2 * expected.norm()  # a code beside a boundary may go either way
    x, branch, weight = torch.randn(1, 160), torch.randn(1, 160), torch.rand(160)
    stream, _, left = kiln.add_norm(*moved((x, branch)), None, None, None, weight.cuda(), EPS, 3)
    torch.testing.assert_close(stream.cpu(), x + branch)
    torch.testing.assert_close(left.sum().cpu(), (x + branch).square().sum())
    words, halves, _ = random_weight("Q4_K", 6 * GLU_ROWS, 256)
    fixed, counters = kiln.fixed_point(torch.randn(1, 256), 3), test_gemv.counters()
    arguments = (fixed, words, halves, "Q4_K", counters, None, 0.0, "silu")
    found, expected = (fixed_point.dequantize(kiln.fixed_glu(*a).cpu()) for a in (moved(arguments), arguments))
    assert (found - expected).norm() < 1e-6 * expected.norm()
