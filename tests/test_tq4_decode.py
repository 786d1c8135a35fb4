"""One token over a TQ4 cache from its raw projections: against the ops it stands for, and the kernels under the interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from custom_ops import decode_attention, fixed_point, tq4, tq4_attention, tq4_decode
from custom_ops.target import compiling_for, gpu_targets
from tests.interpret import interpreted

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

EPS = 1e-6
SLOTS = 40
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


def cache(kv_heads: int, dim: int, length: int, seed: int) -> list[torch.Tensor]:
    """k_codes, k_scales, v_codes, v_scales with `length` vectors, and garbage behind them."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        codes = torch.randint(-(1 << 15), 1 << 15, (kv_heads, SLOTS, dim // 4), generator=g).to(torch.int16)
        scales = torch.full((kv_heads, SLOTS), float("nan"), dtype=torch.float16)
        codes[:, :length], scales[:, :length] = tq4.encode(torch.randn(kv_heads, length, dim, generator=g) * dim**-0.25)
        found += [codes, scales]
    return found


def check(heads: int, kv_heads: int, dim: int, pos: int, parts: int, v_parts: int, terms: int) -> None:
    """Against norm, rotary embedding, encoding and attention in plain torch, over the codes that were written."""
    raw, caches = projections(heads, kv_heads, dim, parts, v_parts, pos), cache(kv_heads, dim, pos, pos)
    before = [t.clone() for t in caches]
    out = kiln.tq4_decode(*raw, *caches, torch.tensor([pos]), EPS, terms, torch.float32)
    q, *written = decode_attention.prepare_reference(*raw, EPS, torch.float32)
    assert out.dtype == torch.int32 and out.shape == (1, heads * dim // 32, fixed_point.group_words(terms))
    expected = tq4_attention.reference(q.double(), *caches, torch.tensor([pos]), None).flatten(1)
    found = fixed_point.dequantize(out).double()
    assert torch.isfinite(found).all() and (found - expected).norm() / expected.norm() < LOSS[terms]
    others = [s for s in range(SLOTS) if s != pos]
    for i, x in enumerate(written):
        codes, scales = caches[2 * i], caches[2 * i + 1]
        exact = tq4.decode(*tq4.encode(x[0]))
        # a coordinate beside a boundary may go either way
        assert (tq4.decode(codes[:, pos], scales[:, pos]) - exact).norm() / exact.norm() < 5e-3
        assert torch.equal(codes[:, others], before[2 * i][:, others])
        assert torch.equal(scales[:, others].view(torch.int16), before[2 * i + 1][:, others].view(torch.int16))


SHAPES = pytest.mark.parametrize("heads, kv_heads, dim, parts, v_parts, terms",
                                 [(4, 2, 64, 1, 1, 2), (8, 1, 64, 5, 3, 3), (2, 1, 128, 3, 9, 1)])  # fmt: skip
POSITIONS = pytest.mark.parametrize("pos", [0, 1, 15, 16, 37])


@POSITIONS
@SHAPES
def test_reference(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int, terms: int, pos: int) -> None:
    check(heads, kv_heads, dim, pos, parts, v_parts, terms)


@POSITIONS
@SHAPES
def interpreted_kernels(heads: int, kv_heads: int, dim: int, parts: int, v_parts: int, terms: int, pos: int) -> None:
    """One split of the keys and several."""
    for sms in (1, 8):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check(heads, kv_heads, dim, pos, parts, v_parts, terms)


def test_wrong_arguments_are_named() -> None:
    raw, caches, pos = projections(4, 2, 64, 1, 1, 0), cache(2, 64, 3, 0), torch.tensor([3])
    with pytest.raises(ValueError, match=r"tq4_decode: q, k, v have \[256, 64, 128\] elements"):
        kiln.tq4_decode(raw[0], raw[1][:, :64], *raw[2:], *caches, pos, EPS, 2, torch.float32)
    with pytest.raises(ValueError, match=r"tq4_decode: k has 128 elements, k_codes is \(1, 40, 16\); expected \[KV, S, D/4\], D 64"):
        kiln.tq4_decode(*raw, *(t[:1] for t in caches), pos, EPS, 2, torch.float32)
    with pytest.raises(ValueError, match="tq4: head dimension 32; expected 64, 128, 256 or 512"):
        kiln.tq4_decode(*projections(4, 2, 32, 1, 1, 0), *cache(2, 64, 3, 0), pos, EPS, 2, torch.float32)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, tensor in zip(("k_codes", "k_scales", "v_codes", "v_scales"), cache(2, 64, 3, 0), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        *raw, pos = arguments
        return kiln.tq4_decode(*raw, self.k_codes, self.k_scales, self.v_codes, self.v_scales, pos, EPS, 2, torch.bfloat16)


def test_opaque_when_exported() -> None:
    arguments = (*(t.contiguous() for t in projections(4, 2, 64, 1, 1, 0)), torch.tensor([3]))
    program = torch.export.export(Layer(), arguments, strict=False)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["kiln.tq4_decode.default"]
    assert torch.equal(program.module()(*arguments), Layer()(*arguments))


def test_kernel_cases_are_what_is_launched() -> None:
    for case in tq4_decode.kernel_cases(H200):
        assert set(case.signature) | set(case.constexprs) == set(case.fn.arg_names)
