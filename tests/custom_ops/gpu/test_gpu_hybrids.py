"""The kernels of gated delta rules and gated attention on a GPU, at the shapes of the hybrids, against references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.attention.prepare import prepare_reference, queries_of
from kiln.custom_ops.delta import chunk, decode, rule
from kiln.custom_ops.experts import router
from kiln.custom_ops.geometry import EPS
from kiln.custom_ops.step.add_norm import root
from kiln.custom_ops.tq4 import attention
from kiln.custom_ops.weights import fixed_point

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
kiln = torch.ops.kiln
models = pytest.mark.parametrize("model", rule.HYBRIDS, ids=lambda model: model.name)
LOSS = 1e-4  # of outputs of about 1: products of float32 in three terms, sums of 64 and more


def close(found: Tensor, expected: Tensor, loss: float) -> float:
    assert found.isfinite().all()
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < loss, error
    return error


class Rule:
    """Random projections of T tokens, and the weights of a layer."""

    def __init__(self, model, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        self.key_heads, self.value_heads, self.dk, self.dv, self.taps = model.delta
        self.channels = 2 * self.key_heads * self.dk + self.value_heads * self.dv
        g = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device="cuda")

        self.u, self.alpha, self.beta = (normal(tokens, n).to(dtype) for n in (self.channels, self.value_heads, self.value_heads))
        self.z, self.norm = normal(tokens, self.value_heads * self.dv), 1 + normal(self.dv) / 4
        self.conv, self.a, self.bias = normal(self.channels * self.taps) / 2, -normal(self.value_heads).abs() / 8, normal(self.value_heads)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.conv, self.a, self.bias

    def states(self, fill: float = torch.nan) -> list[Tensor]:
        shapes = ((rule.STATE_SLOTS, self.taps - 1, self.channels), (rule.STATE_SLOTS, self.value_heads, self.dk, self.dv))
        return [torch.full(shape, fill, device="cuda") for shape in shapes]

    def fed(self, size: int, states: list[Tensor], start: int = 0, end: int | None = None) -> Tensor:
        found = []
        for at in range(start, end or len(self.u), size):
            piece = slice(at, min(at + size, end or len(self.u)))
            pos = torch.arange(piece.start, piece.stop, device="cuda")
            op = kiln.delta_step if len(pos) == 1 else kiln.delta_chunk
            found.append(op(self.u[piece], self.alpha[piece], self.beta[piece], *self.weights, *states, pos, self.key_heads, EPS))
        return torch.cat(found)

    def recurrence(self) -> Tensor:
        """float64 [T, V, dv], token by token."""
        w = self.conv.double().view(-1, self.taps)
        past = torch.cat((torch.zeros(self.taps - 1, self.channels, device="cuda", dtype=torch.float64), self.u.double()))
        own = torch.arange(self.value_heads, device="cuda") % self.key_heads
        state, found = torch.zeros(self.value_heads, self.dk, self.dv, device="cuda", dtype=torch.float64), []
        for t in range(len(self.u)):
            c = sum(w[:, j] * past[t + j] for j in range(self.taps))
            c = c * c.sigmoid()
            q, k = (x.view(self.key_heads, self.dk) for x in c[: 2 * self.key_heads * self.dk].chunk(2))
            q, k = ((x / (x.square().sum(1, keepdim=True) + EPS).sqrt())[own] for x in (q, k))
            v = c[2 * self.key_heads * self.dk :].view(self.value_heads, self.dv)
            state = state * (self.a * torch.nn.functional.softplus(self.alpha[t].double() + self.bias)).exp()[:, None, None]
            change = (v - torch.einsum("vkd,vk->vd", state, k)) * self.beta[t].double().sigmoid()[:, None]
            state = state + torch.einsum("vk,vd->vkd", k, change)
            found.append(torch.einsum("vkd,vk->vd", state, q / self.dk**0.5))
        return torch.stack(found)


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_chunk_is_the_recurrence(model, dtype: torch.dtype) -> None:
    """Garbage before the first token; repeats give the same bits."""
    given = Rule(model, 200, dtype)
    expected, before = given.recurrence(), None
    for size in (1, 7, 64, 65, 200):
        states = given.states()
        found = given.fed(size, states)
        print(f"{model.name} {dtype}, chunks of {size}: {close(found, expected, LOSS):.1e}")
        again = given.states()
        assert torch.equal(given.fed(size, again), found) and all(map(torch.equal, (s[0] for s in again), (s[0] for s in states)))
        assert before is None or close(states[1][0], before, LOSS) < LOSS  # 200 tokens: slot 0
        before = states[1][0]


@models
def test_a_long_chunk(model) -> None:
    given = Rule(model, 2048, torch.bfloat16)
    states, other = given.states(), given.states()
    found = given.fed(2048, states)
    pos = torch.arange(2048, device="cuda")
    expected = chunk.reference(given.u, given.alpha, given.beta, *given.weights, *other, pos, given.key_heads, EPS)
    print(f"{model.name}, 2,048 tokens: {close(found, expected, LOSS):.1e}, state {close(states[1][0], other[1][0], LOSS):.1e}")


@models
def test_a_step_of_a_fused_graph(model) -> None:
    """In parts, and in one matrix, as the packer joins projections; after another token at its position that was dropped."""
    given, parts = Rule(model, 70), 5
    states, counters = given.states(), torch.zeros(8192, dtype=torch.int32, device="cuda")
    given.fed(64, states, end=64)
    g = torch.Generator("cuda").manual_seed(1)
    for at in range(64, 70):
        whole = torch.cat([x[at] for x in (given.u, given.z, given.alpha, given.beta)])
        shares = torch.rand(parts, len(whole), generator=g, device="cuda")
        joined = whole * shares / shares.sum(0)
        sizes = (given.channels, given.z.shape[1], given.value_heads, given.value_heads)
        u, z, alpha, beta = joined.split(sizes, dim=1)
        pos, found = torch.tensor([at], device="cuda"), []
        apart = [x.contiguous() for x in (u, alpha, beta)]
        for projections in ((-u, -alpha, beta, z), (u, alpha, beta, z), (*apart, z.sum(0, keepdim=True))):
            found.append(kiln.delta_decode(*projections, *given.weights, given.norm, *states, pos, counters, given.key_heads, EPS, 2))
        assert not counters.any() and not torch.equal(found[0], found[1])
        other = [x.clone() for x in states]
        expected = decode.reference(u, alpha, beta, z, *given.weights, given.norm, *other, pos, given.key_heads, EPS, 2)
        values = [fixed_point.dequantize(x) for x in (found[1], found[2], expected)]
        print(f"{model.name}, position {at}: {close(values[0], values[2], LOSS):.1e}")
        close(values[1], values[2], LOSS)
        for mine, right in zip(states, other, strict=True):
            close(mine[(at + 1) % 2], right[(at + 1) % 2], LOSS)


def test_the_choice_with_a_gate_beside() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x, scale, beside = (torch.randn(n, generator=g, device="cuda") for n in ((1, 2048), 2048, 2048))
    matrix = torch.randn(256, 2048, generator=g, device="cuda") / 45
    squares, counters = (x * x).view(8, 256).sum(1), torch.zeros(64, dtype=torch.int32, device="cuda")
    arguments = (x, squares, EPS, scale, 1.0, matrix, 8, True, None)
    found = kiln.choose_experts(*arguments, counters, beside)
    expected = router.reference(*arguments, beside)
    assert torch.equal(found[0], expected[0]) and not counters.any() and found[1].shape == (1, 9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    gate = (x * root(squares, 2048, EPS) * scale * beside).double().sum().sigmoid()
    assert abs(found[1][0, 8] - gate) < 1e-4


@models
def test_gated_attention_that_turns_in_part(model) -> None:
    """Preparation, the gate over 16-bit caches, and the whole over codes, at 300 positions of which 256 are exact."""
    heads, g = model.full, torch.Generator("cuda").manual_seed(0)
    dim, half = heads.dim, model.rotary // 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    q, k = normal(4, (2 * heads.queries + heads.kv) * dim).split((2 * heads.queries * dim, heads.kv * dim), 1)  # of one matmul
    v = normal(2, heads.kv * dim)
    angle = torch.rand(1, half, generator=g, device="cuda") * 6
    weights = (1 + normal(dim) / 4, 1 + normal(dim) / 4)
    shared = (*weights, angle.cos(), angle.sin())
    query, gate = queries_of(q, dim, True)
    expected = prepare_reference(query, k, v, *shared, EPS, torch.float32, dim**-0.5, False)
    for found, right in zip(kiln.prepare_qkv(q, k, v, *shared, EPS, torch.float32, dim**-0.5, False, False, True), expected, strict=True):
        close(found, right, 1e-5)
    value = normal(1, heads.queries, dim).half()
    gated = fixed_point.dequantize(kiln.attention_gate_fixed(q, value, 2))
    close(gated, value.flatten(1).double() * gate.double().sum(0).sigmoid(), 1e-3)
    slots, exact = 1024, 256
    codes = torch.randint(-(1 << 15), 1 << 15, (2, heads.kv, slots, dim // 4), generator=g, device="cuda").short()
    scales = (torch.rand(2, heads.kv, slots, generator=g, device="cuda") + 0.5).half()
    caches, rings = (codes[0], scales[0], codes[1], scales[1]), [normal(exact, heads.kv, dim).half() for _ in range(2)]
    pos = torch.tensor([300], device="cuda")
    copies = [x.clone() for x in (*caches, *rings)]
    out = kiln.tq4_decode(q, k, v, *shared, *copies, pos, EPS, 2, [], dim**-0.5, False, False, 0, True)
    q, k, v = expected
    right = attention.reference(q, k.half(), v.half(), *caches, *rings, pos, None)  # its own code is not read yet
    print(f"{model.name}: {close(fixed_point.dequantize(out), right.flatten(1).double() * gate.double().sum(0).sigmoid(), 5e-3):.1e}")
