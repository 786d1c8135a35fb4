"""The gated delta rule against its recurrence in float64, token by token, written from the formulas alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from kiln.custom_ops import ops  # noqa: F401  registers torch.ops.kiln
from kiln.custom_ops.delta import rule
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from tests.custom_ops.interpret import interpreted

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-6
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, TAPS = 2, 6, 16, 8, 4  # three value heads a key head: which go together matters
CHANNELS = 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
LOSS = 3e-5  # of float32 sums within a block, beside outputs of about 1; the scan over blocks loses no more


@dataclass(frozen=True)
class Tokens:
    """What the rule is given for T tokens, and its weights."""

    u: Tensor
    alpha: Tensor
    beta: Tensor
    conv: Tensor
    a: Tensor
    dt_bias: Tensor

    def cut(self, at: slice) -> Tokens:
        return replace(self, u=self.u[at], alpha=self.alpha[at], beta=self.beta[at])

    def __iter__(self):
        return iter((self.u, self.alpha, self.beta, self.conv, self.a, self.dt_bias))


def random_tokens(count: int, seed: int = 0, decay: float = 0.3) -> Tokens:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return Tokens(normal(count, CHANNELS), normal(count, VALUE_HEADS), normal(count, VALUE_HEADS), normal(CHANNELS * TAPS) / 2,
                  -decay * torch.rand(VALUE_HEADS, generator=g), normal(VALUE_HEADS))  # fmt: skip


def states(fill: float = 0.0) -> list[Tensor]:
    shapes = ((rule.STATE_SLOTS, TAPS - 1, CHANNELS), (rule.STATE_SLOTS, VALUE_HEADS, KEY_DIM, VALUE_DIM))
    return [torch.full(shape, fill) for shape in shapes]


def recurrence(tokens: Tokens) -> Tensor:
    """[T, V, dv] float64. S <- e^g S; d = beta (v - S^T k); S <- S + k d^T; o = S^T q."""
    u, alpha, beta, conv, a, bias = (x.double() for x in tokens)
    w, past = conv.view(CHANNELS, TAPS), torch.cat((torch.zeros(TAPS - 1, CHANNELS, dtype=torch.float64), u))
    own = torch.arange(VALUE_HEADS) % KEY_HEADS
    state, found = torch.zeros(VALUE_HEADS, KEY_DIM, VALUE_DIM, dtype=torch.float64), []
    for t in range(len(u)):
        c = sum(w[:, j] * past[t + j] for j in range(TAPS))
        c = c / (1 + (-c).exp())
        q, k = (x.view(KEY_HEADS, KEY_DIM) for x in c[: 2 * KEY_HEADS * KEY_DIM].chunk(2))
        q, k = ((x / (x.square().sum(1, keepdim=True) + EPS).sqrt())[own] for x in (q, k))
        v = c[2 * KEY_HEADS * KEY_DIM :].view(VALUE_HEADS, VALUE_DIM)
        state = state * (a * (1 + (alpha[t] + bias).exp()).log()).exp()[:, None, None]
        change = (v - torch.einsum("vkd,vk->vd", state, k)) / (1 + (-beta[t]).exp())[:, None]
        state = state + torch.einsum("vk,vd->vkd", k, change)
        found.append(torch.einsum("vkd,vk->vd", state, q / KEY_DIM**0.5))
    return torch.stack(found)


def fed(tokens: Tokens, size: int, kept: list[Tensor] | None = None, start: int = 0) -> Tensor:
    """The ops, in chunks of `size`, the last one shorter."""
    kept, found = kept or states(), []
    with torch.inference_mode():
        for at in range(0, len(tokens.u), size):
            piece = tokens.cut(slice(at, at + size))
            count = len(piece.u)
            op = torch.ops.kiln.delta_step if count == 1 else torch.ops.kiln.delta_chunk
            found.append(op(*piece, *kept, start + at + torch.arange(count), KEY_HEADS, EPS))
    return torch.cat(found)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65, 100, 200])
def test_any_chunk_is_the_recurrence(size: int) -> None:
    tokens = random_tokens(200)
    torch.testing.assert_close(fed(tokens, size).double(), recurrence(tokens), rtol=0, atol=LOSS)


@pytest.mark.parametrize("decay", [0.0, 30.0], ids=["nothing is forgotten", "all is forgotten"])
def test_the_same_token_again_and_again(decay: float) -> None:
    """Equal keys, written whole, so that the triangular matrix is all ones: its powers are past float32, its inverse is not."""
    one = random_tokens(1, decay=decay)
    tokens = replace(one, u=one.u.expand(150, -1), alpha=one.alpha.expand(150, -1), beta=torch.full((150, VALUE_HEADS), 20.0))
    for size in (1, 64, 150):
        torch.testing.assert_close(fed(tokens, size).double(), recurrence(tokens), rtol=0, atol=LOSS)


def test_4096_tokens() -> None:
    """Token by token against chunks of 512 and one of 4,096: 8 and 64 blocks in the scan."""
    tokens = random_tokens(4096, decay=0.02)
    right = fed(tokens, 1)
    for size in (512, 4096):
        error = (fed(tokens, size) - right).abs().max().item()
        print(f"chunks of {size}: {error:.1e}")
        assert error < 1e-4  # a thousandth of that is one rounding; the bound of logits is 1e-3


@pytest.mark.parametrize("size", [1, 3, 70])
def test_garbage_before_the_first_token_reaches_nothing(size: int) -> None:
    tokens = random_tokens(80)
    assert torch.equal(fed(tokens, size, states(torch.nan)), fed(tokens, size))


@pytest.mark.parametrize("before", [5, 6, 66])
def test_a_discarded_step_changes_nothing(before: int) -> None:
    """Another token at the same position, run and dropped: what follows is bit for bit what it is without."""
    tokens, other = random_tokens(before + 9), random_tokens(1, seed=1)
    kept = states()
    fed(tokens.cut(slice(0, before)), before, kept)
    fed(other, 1, kept, start=before)
    for size in (1, 9):
        copies = [x.clone() for x in kept]
        found = fed(tokens.cut(slice(before, None)), size, copies, start=before)
        clean = states()
        fed(tokens.cut(slice(0, before)), before, clean)
        assert torch.equal(found, fed(tokens.cut(slice(before, None)), size, clean, start=before))


def test_narrow_activations_are_widened() -> None:
    tokens = random_tokens(70)
    narrow = replace(tokens, u=tokens.u.bfloat16(), alpha=tokens.alpha.bfloat16(), beta=tokens.beta.bfloat16())
    wide = replace(tokens, u=narrow.u.float(), alpha=narrow.alpha.float(), beta=narrow.beta.float())
    assert torch.equal(fed(narrow, 70), fed(wide, 70)) and fed(narrow, 70).dtype == torch.float32


def test_what_does_not_fit_is_named() -> None:
    tokens, (conv, delta), pos = random_tokens(3), states(), torch.arange(3)

    def run(given: Tokens = tokens, conv: Tensor = conv, delta: Tensor = delta, pos: Tensor = pos, op: str = "delta_chunk") -> None:
        getattr(torch.ops.kiln, op)(*given, conv, delta, pos, KEY_HEADS, EPS)

    for change, message in (
        ({"given": replace(tokens, u=tokens.u[:, 1:])}, rf"delta_chunk: u is \(3, {CHANNELS - 1}\); expected \[T, {CHANNELS}\]"),
        ({"given": replace(tokens, beta=tokens.beta[:, 1:])}, r"beta is \(3, 5\); expected \[T, 6\]"),
        ({"given": replace(tokens, a=tokens.a.half())}, r"a is torch.float16 \(6,\); expected float32 \[6\]"),
        ({"given": replace(tokens, conv=tokens.conv[1:])}, r"conv is torch.float32 .* expected float32"),
        ({"delta": delta.bfloat16()}, r"states are .* of torch.float32 and torch.bfloat16"),
        ({"delta": delta[:1]}, r"states .* do not fit 2 key heads"),
        ({"delta": delta[:, :5]}, r"states .* do not fit 2 key heads"),
        ({"pos": pos.int()}, r"pos is torch.int32 \(3,\); expected int64 \[T\]"),
        ({"op": "delta_step"}, r"delta_step: u has 3 rows; expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**change)


def interpreted_kernels() -> None:
    """Against the recurrence, heads of 32 with three value heads for a key head; garbage before; then a step that is discarded."""
    global KEY_DIM, VALUE_DIM, CHANNELS  # the kernels' least
    KEY_DIM = VALUE_DIM = 32
    CHANNELS = 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
    with compiling_for(gpu_targets()["sm_90"]):
        _check_kernels()
    tokens = random_tokens(40)
    with compiling_for(gpu_targets()["sm_80"]):  # smaller blocks
        torch.testing.assert_close(fed(tokens, 40).double(), recurrence(tokens), rtol=0, atol=LOSS)


def _check_kernels() -> None:
    tokens = random_tokens(75)
    right, kept = recurrence(tokens), states(torch.nan)
    found = [fed(tokens.cut(slice(0, 2)), 2, kept), fed(tokens.cut(slice(2, 4)), 1, kept, start=2)]
    fed(random_tokens(1, seed=1), 1, kept, start=4)
    found += [fed(tokens.cut(slice(4, 5)), 1, kept, start=4), fed(tokens.cut(slice(5, 75)), 70, kept, start=5)]
    torch.testing.assert_close(torch.cat(found).double(), right, rtol=0, atol=LOSS)
    few = tokens.cut(slice(0, 20))
    narrow = replace(few, u=few.u.bfloat16(), alpha=few.alpha.bfloat16(), beta=few.beta.bfloat16())
    torch.testing.assert_close(fed(narrow, 19).double(), recurrence(narrow), rtol=0, atol=LOSS)


test_kernels_interpreted = interpreted(__file__)


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, state in zip(("conv", "delta"), states(), strict=True):
            self.register_buffer(name, state)

    def forward(self, u, alpha, beta, conv, a, dt_bias, pos):
        return torch.ops.kiln.delta_chunk(u, alpha, beta, conv, a, dt_bias, self.conv, self.delta, pos, KEY_HEADS, EPS)


def test_opaque_when_exported_for_any_length() -> None:
    tokens, length = random_tokens(97), Dim("T", min=2, max=130)
    dynamic = (*[{0: length}] * 3, None, None, None, {0: length})
    program = torch.export.export(_Model(), (*tokens, torch.arange(97)), dynamic_shapes=dynamic, strict=False)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls == [torch.ops.kiln.delta_chunk.default]
    for count in (2, 64, 65, 128, 130):
        given = random_tokens(count)
        torch.testing.assert_close(program.module()(*given, torch.arange(count)).double(), recurrence(given), rtol=0, atol=LOSS)
