"""Experts: the choice of them, and matmuls with the chosen ones, against formulas and the gguf package; then the kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kiln.custom_ops.experts import linear as op
from kiln.custom_ops.experts import route
from kiln.custom_ops.gpu.target import compiling_for
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.weights.test_linear import H200, random_weight

KILN = torch.ops.kiln
COUNT, USED = 5, 2
ONE_SM = dataclasses.replace(H200, sm_count=1)
test_kernels_interpreted = interpreted(__file__)


def random_logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def random_choice(tokens: int, experts: int = COUNT, used: int = USED, seed: int = 0) -> torch.Tensor:
    """Of each token different ones; expert 1 is nobody's."""
    weight = torch.ones(tokens, experts)
    weight[:, 1] = 0
    return torch.multinomial(weight, used, generator=torch.Generator().manual_seed(seed))


def exact(x: torch.Tensor, matrix: np.ndarray, chosen: torch.Tensor, count: int = COUNT) -> torch.Tensor:
    """In float64, pair by pair."""
    matrices = torch.from_numpy(matrix).double().view(count, -1, matrix.shape[1])
    x = x.double().expand(-1, chosen.shape[1], -1)
    return torch.stack([torch.stack([matrices[e] @ x[t, u] for u, e in enumerate(row)]) for t, row in enumerate(chosen)])


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.double() - wanted).norm() / wanted.norm())


def given(tokens: int, k: int, each: bool, dtype: torch.dtype) -> torch.Tensor:
    """One input for a token's experts, or one for each."""
    shape = (tokens, USED if each else 1, k)
    return torch.randn(shape, generator=torch.Generator().manual_seed(tokens)).to(dtype)


# ---- the choice ----


def check_choice(logits: torch.Tensor, used: int) -> None:
    p = torch.softmax(logits.double(), -1)
    wanted, ids = p.topk(used, -1)
    for renormalized in (True, False):
        chosen, weights = KILN.route(logits, used, renormalized)
        assert chosen.dtype == torch.int64 and torch.equal(chosen, ids)
        torch.testing.assert_close(weights.double(), wanted / wanted.sum(-1, keepdim=True) if renormalized else wanted, rtol=2e-6, atol=0)


def test_the_largest_are_chosen_and_renormalized() -> None:
    check_choice(random_logits(9, 16), 4)
    check_choice(random_logits(3, 5), 5)


def check_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    chosen, weights = KILN.route(logits, 2, True)
    assert chosen.tolist() == [[1, 2], [0, 1]] and torch.equal(weights, torch.full((2, 2), 0.5))


def test_of_equal_ones_the_lower_number() -> None:
    check_ties()


def check_not_numbers() -> None:
    """The search for the first number that is not finite comes after the step: until then experts exist and weights say so."""
    logits = random_logits(2, 6)
    logits[0, 2] = torch.nan
    chosen, weights = KILN.route(logits, 3, True)
    assert ((chosen >= 0) & (chosen < 6)).all() and weights[0].isnan().all() and weights[1].isfinite().all()


def test_what_is_no_number_stays_visible() -> None:
    check_not_numbers()


@pytest.mark.parametrize(
    ("logits", "used"), [(torch.zeros(2, 4).half(), 2), (torch.zeros(4), 2), (torch.zeros(2, 4), 5), (torch.zeros(2, 4), 0)]
)
def test_a_choice_that_cannot_be_is_refused(logits: torch.Tensor, used: int) -> None:
    with pytest.raises(ValueError, match="route: logits are"):
        KILN.route(logits, used, True)


# ---- matmuls ----


@pytest.mark.parametrize("each", [False, True], ids=["one input", "an input each"])
@pytest.mark.parametrize("block_type,k", [("Q4_K", 256), ("Q5_0", 704), ("Q8_0", 96)])
def test_chosen_rows_multiply(block_type: str, k: int, each: bool) -> None:
    """A few tokens, and many, whose experts go through scratch in pieces."""
    words, halves, matrix = random_weight(block_type, COUNT * 24, k)
    for tokens in (1, op.MAX_GEMV_TOKENS, op.MAX_GEMV_TOKENS + 5):
        x, chosen = given(tokens, k, each, torch.float32), random_choice(tokens)
        y = KILN.expert_linear(x, words, halves, block_type, chosen, COUNT)
        assert y.dtype == x.dtype and y.shape == (tokens, USED, 24)
        assert error(y, exact(x, matrix, chosen)) < 1e-6
        y = KILN.expert_matmul(x, torch.from_numpy(matrix), chosen, COUNT)
        assert error(y, exact(x, matrix, chosen)) < 1e-6


def test_pieces_of_many_tokens(monkeypatch) -> None:
    words, halves, matrix = random_weight("Q4_K", COUNT * 24, 256)
    monkeypatch.setattr(op, "MAX_SCRATCH_BYTES", 2 * 24 * 256 * 4)
    assert op.experts_at_once(24, 256, 4, COUNT) == 2
    for each in (False, True):
        x, chosen = given(12, 256, each, torch.float32), random_choice(12)
        assert error(KILN.expert_linear(x, words, halves, "Q4_K", chosen, COUNT), exact(x, matrix, chosen)) < 1e-6


def check_others_are_not_read(tokens: int) -> None:
    """Whatever the experts that nobody chose hold, NaN included, reaches no result."""
    words, halves, matrix = random_weight("Q5_0", COUNT * 24, 96)
    x, chosen = given(tokens, 96, False, torch.float32), random_choice(tokens)
    halves[:, :, 24:48] = torch.nan
    matrix[24:48] = np.nan
    y = KILN.expert_linear(x, words, halves, "Q5_0", chosen, COUNT)
    assert error(y, exact(x, matrix, chosen)) < 1e-6
    assert error(KILN.expert_matmul(x, torch.from_numpy(matrix), chosen, COUNT), exact(x, matrix, chosen)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 12])
def test_other_experts_reach_no_result(tokens: int) -> None:
    check_others_are_not_read(tokens)


def test_a_decode_step_makes_nothing_of_the_size_of_all_experts() -> None:
    """One token: no value of the graph has as many elements as the matrix, so its rows are picked before they are dequantized."""
    words, halves, _ = random_weight("Q5_0", 64 * 8, 96)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            out = fn(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "view" not in str(fn) and "unflatten" not in str(fn):
                sizes.append(out.numel())
            return out

    with Sizes():
        op.reference(given(1, 96, False, torch.float32), words, halves, "Q5_0", torch.tensor([[3, 60]]), 64)
    assert sizes and max(sizes) <= 2 * 2 * 8 * 96


def test_wrong_arguments_are_named() -> None:
    words, halves, matrix = random_weight("Q4_K", 20, 256)
    x, chosen = given(1, 256, False, torch.float32), random_choice(1)
    for arguments, message in (
        ((x[:, :, :128], words, halves, "Q4_K", chosen, COUNT), r"x is torch.float32 \(1, 1, 128\)"),
        ((x.half(), words, halves, "Q4_K", chosen, COUNT), "x is torch.float16"),
        ((x, words, halves, "Q4_K", chosen.int(), COUNT), "chosen is torch.int32"),
        ((x.expand(1, 3, 256), words, halves, "Q4_K", chosen, COUNT), r"x \(1, 3, 256\)"),
        ((x, words, halves, "Q4_K", chosen, 3), "20 rows are no 3 experts"),
        ((x, words, halves, "Q9_K", chosen, COUNT), "no packed layout"),
    ):
        with pytest.raises(ValueError, match=message):
            KILN.expert_linear(*arguments)
    with pytest.raises(ValueError, match="expert_matmul: 20 rows"):
        KILN.expert_matmul(x, torch.from_numpy(matrix), chosen, 3)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        words, halves, _ = random_weight("Q4_K", COUNT * 24, 256)
        self.register_buffer("words", words)
        self.register_buffer("halves", halves)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights = KILN.route(x[:, :COUNT], USED, True)
        return (KILN.expert_linear(x.unsqueeze(1), self.words, self.halves, "Q4_K", chosen, COUNT) * weights.unsqueeze(-1)).sum(1)


def test_opaque_when_exported() -> None:
    tokens = torch.export.Dim("tokens", min=2, max=2048)
    program = torch.export.export(Layer(), (torch.randn(5, 256),), dynamic_shapes=({0: tokens},), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("kiln.expert_linear.default") == targets.count("kiln.route.default") == 1
    assert not any("dequantize" in target or "topk" in target for target in targets)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block_type", "n", "k", "each"), [("Q4_K", 1408, 2816, False), ("Q5_0", 2816, 704, True), ("Q8_0", 2816, 704, True)]
)
def test_on_a_gpu(block_type: str, n: int, k: int, each: bool) -> None:
    """At the shapes of Gemma 4 26B-A4B; what nobody chose is NaN. Repeats give the same bits."""
    words, halves, matrix = random_weight(block_type, COUNT * n, k)
    halves[:, :, n : 2 * n] = torch.nan
    for tokens in (1, 3, 300):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
            x, chosen = given(tokens, k, each, dtype), random_choice(tokens)
            on = [t.cuda() for t in (x, words, halves, chosen)]
            y, again = (KILN.expert_linear(*on[:3], block_type, on[3], COUNT) for _ in range(2))
            assert torch.equal(y, again) and error(y.cpu(), exact(x, matrix, chosen)) < tolerance
    check = random_logits(300, 128)
    got, wanted = KILN.route(check.cuda(), 8, True), route.reference(check, 8, True)
    assert torch.equal(got[0].cpu(), wanted[0])
    torch.testing.assert_close(got[1].cpu(), wanted[1], rtol=2e-6, atol=0)


# ---- under the interpreter ----


def interpreted_choice() -> None:
    for tokens, experts, used in ((3, 16, 4), (1, 6, 2), (2, 5, 5)):
        check_choice(random_logits(tokens, experts), used)
    check_ties()
    check_not_numbers()


def interpreted_pair_order() -> None:
    """More pairs than a block has; an expert that nobody chose."""
    chosen = random_choice(11)
    order, starts = torch.empty(22, dtype=torch.int32), torch.empty(COUNT + 1, dtype=torch.int32)
    op.kernel(op.kiln_pair_order)[(COUNT + 1,)](chosen, order, starts, 22, BLOCK=16)
    assert order.tolist() == chosen.flatten().argsort(stable=True).tolist()
    assert starts.tolist() == [int((chosen < e).sum()) for e in range(COUNT + 1)]


@pytest.mark.parametrize("block_type,k", [("Q4_K", 256), ("Q5_0", 96), ("Q8_0", 96), ("Q6_K", 256)])
def interpreted_few_tokens(block_type: str, k: int) -> None:
    """Rows of an expert that no program's rows divide."""
    words, halves, matrix = random_weight(block_type, COUNT * 72, k)
    for each, tokens, dtype, tolerance in ((False, 1, torch.float32, 1e-6), (True, 2, torch.bfloat16, 8e-3)):
        x, chosen = given(tokens, k, each, dtype), random_choice(tokens)
        with compiling_for(ONE_SM):
            y = KILN.expert_linear(x, words, halves, block_type, chosen, COUNT)
        assert y.dtype == dtype and error(y, exact(x, matrix, chosen)) < tolerance


@pytest.mark.parametrize("n,k", [(72, 96), (128, 32)])
def interpreted_many_tokens(n: int, k: int, monkeypatch) -> None:
    """Tiles of one expert, some full, some not; experts in two pieces of scratch; packed and float."""
    words, halves, matrix = random_weight("Q5_0", COUNT * n, k)
    small = dataclasses.replace(op.TILE, rows=16)
    monkeypatch.setattr(op, "TILE", small)
    monkeypatch.setattr(op, "FLOAT32", small)
    for each, dtype, tolerance in ((False, torch.float32, 1e-6), (True, torch.float32, 1e-6), (True, torch.bfloat16, 8e-3)):
        monkeypatch.setattr(op, "MAX_SCRATCH_BYTES", 3 * n * k * dtype.itemsize)
        x, chosen = given(21, k, each, dtype), random_choice(21)
        with compiling_for(ONE_SM):
            for y in (KILN.expert_linear(x, words, halves, "Q5_0", chosen, COUNT),
                      KILN.expert_matmul(x, torch.from_numpy(matrix), chosen, COUNT)):  # fmt: skip
                assert y.dtype == dtype and error(y, exact(x, matrix, chosen)) < tolerance


def interpreted_other_experts_reach_no_result() -> None:
    with compiling_for(ONE_SM):
        for tokens in (1, 12):
            check_others_are_not_read(tokens)
