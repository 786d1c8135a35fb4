"""One token's experts as decode takes them: the choice, gates, the weighted sum, two branches' norms; against formulas in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import triton

from kiln.custom_ops.experts import route
from kiln.custom_ops.gpu.target import compiling_for
from kiln.custom_ops.step.add_norm import root
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.experts.test_experts import ONE_SM, error
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.weights.test_linear import H200, random_weight

KILN = torch.ops.kiln
COUNT, EPS, TERMS = 5, 1e-5, 3
CHOSEN = torch.tensor([[4, 2]])
test_kernels_interpreted = interpreted(__file__)
test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))


def counters() -> torch.Tensor:
    return torch.zeros(512, dtype=torch.int32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(arguments: tuple | list, device: str) -> list:
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


def by_experts(matrix: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(matrix).double().view(COUNT, -1, matrix.shape[1])


# ---- the choice ----


def check_choice(d: int, experts: int, used: int, renormalized: bool, whole: bool, dtype: torch.dtype = torch.float32,
                 device: str = "cpu") -> None:
    """whole: experts have factors of their own, and a norm of theirs goes into fixed point beside the choice."""
    x, scale, router = random(1, d), random(d, seed=1), random(experts, d, seed=2).to(dtype)
    squares = torch.tensor([x.square().sum() / 4, x.square().sum() * 3 / 4])
    factors, weight = (random(experts, seed=3).abs(), random(d, seed=4)) if whole else (None, None)
    zeros = counters()
    given = moved((x, squares, EPS, scale, 0.7, router, used, renormalized, factors, zeros), device)
    if whole:
        chosen, weights, fixed = KILN.choose_experts_norm(*given, weight.to(device), TERMS)
        right = fixed_point.quantize(x * weight, TERMS)
        if device == "cpu":
            assert torch.equal(fixed, right)
        else:  # a quotient that is rounded otherwise may move a last bit
            found, right = (fixed_point.dequantize(f) for f in (fixed.cpu(), right))
            assert (found - right).norm() < 1e-4 * right.norm()
    else:
        chosen, weights = KILN.choose_experts(*given)
    logits = (x.double() * scale.double() * 0.7 / (x.double().square().mean() + EPS).sqrt()) @ router.double().T
    found, ids = torch.softmax(logits, -1).topk(used)
    assert chosen.shape == weights.shape == (1, used) and torch.equal(chosen.cpu(), ids)
    expected = (found / found.sum() if renormalized else found) * (1 if factors is None else factors[ids[0]])
    torch.testing.assert_close(weights.double().cpu(), expected, rtol=2e-5, atol=1e-8)
    assert not given[-1].any()


def check_ties(device: str = "cpu") -> None:
    """Equal rows, of integers, whose sums are exact in any order: the lower number first."""
    router = random(1, 64, seed=5).sign().repeat(6, 1)
    router[2] = 0
    x = router[:1] * 2  # whose root is a half
    given = moved((x, x.square().sum(1), 0.0, torch.ones(64), 1.0, router, 3, True, None, counters()), device)
    chosen, weights = KILN.choose_experts(*given)
    assert chosen.tolist() == [[0, 1, 3]]
    torch.testing.assert_close(weights.cpu(), torch.full((1, 3), 1 / 3))


def check_not_numbers(device: str = "cpu") -> None:
    """Experts exist, the weights say so."""
    x = random(1, 64)
    x[0, 7] = torch.nan
    given = moved((x, x.square().sum(1), EPS, torch.ones(64), 1.0, random(6, 64, seed=1), 3, True, None, counters()), device)
    chosen, weights = KILN.choose_experts(*given)
    assert ((chosen >= 0) & (chosen < 6)).all() and weights.isnan().all()


def test_choice() -> None:
    for whole in (False, True):
        check_choice(288, 16, 4, True, whole)
    check_choice(64, 5, 5, False, False, torch.bfloat16)
    check_ties()
    check_not_numbers()


def interpreted_choice() -> None:
    with compiling_for(ONE_SM):
        for whole in (False, True):
            check_choice(288, 16, 4, True, whole)
        check_choice(64, 5, 5, False, False, torch.bfloat16)
        check_choice(64, 300, 3, True, False)  # more than are counted
        check_ties()
        check_not_numbers()


# ---- matmuls ----


def check_glu(block_type: str, size: int, k: int, apart: bool, activation: str, normed: bool, device: str = "cpu") -> None:
    """Gates and values in one matrix or two; expert 1, whom nobody chose, is NaN."""
    matrices = [random_weight(block_type, COUNT * size * (1 if apart else 2), k, seed) for seed in range(2 if apart else 1)]
    rows = [by_experts(matrix)[CHOSEN[0]] for *_, matrix in matrices]
    gates, values = rows if apart else rows[0].chunk(2, 1)
    for _, halves, _ in matrices:
        halves.unflatten(2, (COUNT, -1))[:, :, 1] = torch.nan
    x = random(1, k)
    fixed, squares = fixed_point.quantize(x, TERMS), torch.tensor([3.0, 5.0]) if normed else None
    up = matrices[1][:2] if apart else (None, None)
    given = moved((fixed, *matrices[0][:2], *up, block_type, CHOSEN, COUNT, counters(), squares, EPS, activation), device)
    out = KILN.expert_glu(*given)
    scale = root(squares.double(), k, EPS) if normed else 1.0
    gate, value = (torch.einsum("k,unk->un", fixed_point.dequantize(fixed)[0].double(), part) * scale for part in (gates, values))
    act = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    assert fixed_point.elements(out) == size and fixed_point.form(out) == (TERMS, fixed_point.extent_of(size))
    assert out.shape[0] == 2 and error(fixed_point.dequantize(out.cpu()), act * value) < 3e-6
    assert not given[8].any() and (triton.knobs.runtime.interpret or torch.equal(KILN.expert_glu(*given), out))


def check_sum(block_type: str, n: int, k: int, device: str = "cpu") -> None:
    words, halves, matrix = random_weight(block_type, COUNT * n, k)
    expected_rows = by_experts(matrix)[CHOSEN[0]]
    halves.unflatten(2, (COUNT, -1))[:, :, 1] = torch.nan
    fixed, weights = fixed_point.quantize(random(2, k), TERMS), random(1, 2, seed=1).abs()
    given = moved((fixed, words, halves, block_type, CHOSEN, weights, COUNT, counters()), device)
    out, squares = KILN.expert_sum_squares(*given)
    expected = torch.einsum("uk,unk,u->n", fixed_point.dequantize(fixed).double(), expected_rows, weights[0].double())
    assert out.shape == (1, n) and error(out[0].cpu(), expected) < 2e-6
    torch.testing.assert_close(squares.sum().cpu(), out.square().sum().cpu(), rtol=2e-6, atol=0)
    assert torch.equal(KILN.expert_sum(*given), out) and not given[-1].any()


GLU = [("Q4_K", 96, 256, False, "gelu_tanh", True), ("Q4_K", 64, 256, True, "silu", True), ("Q8_0", 32, 96, True, "gelu_tanh", False),
       ("Q5_0", 128, 96, False, "silu", False)]  # fmt: skip
SUM = [("Q5_0", 96, 160), ("Q8_0", 72, 96), ("Q6_K", 64, 256)]


@pytest.mark.parametrize("arguments", GLU, ids=str)
def test_gates(arguments: tuple) -> None:
    check_glu(*arguments)


@pytest.mark.parametrize("arguments", SUM, ids=str)
def test_weighted_sum(arguments: tuple) -> None:
    check_sum(*arguments)


def by_day(cases: list[tuple], count: int) -> list:
    return [*cases[:count], *(pytest.param(case, marks=pytest.mark.nightly) for case in cases[count:])]


@pytest.mark.parametrize("arguments", by_day(GLU, 2), ids=str)
def interpreted_gates(arguments: tuple) -> None:
    with compiling_for(ONE_SM):
        check_glu(*arguments)


@pytest.mark.parametrize("arguments", by_day(SUM, 2), ids=str)
def interpreted_weighted_sum(arguments: tuple) -> None:
    """The first has more than one split."""
    with compiling_for(dataclasses.replace(H200, sm_count=2) if arguments is SUM[0] else ONE_SM):
        check_sum(*arguments)


# ---- two branches ----


def check_two(d: int, scaled: bool, weighted: bool, device: str = "cpu") -> None:
    x, first, second = (random(1, d, seed=i) for i in range(3))
    first_weight, second_weight, post, weight = (random(d, seed=3 + i).abs() for i in range(4))
    scale = torch.tensor([0.37]) if scaled else None
    squares = [torch.stack(((t * t).sum() / 4, (t * t).sum() * 3 / 4)) for t in (first, second)]
    given = (x, first, squares[0], first_weight, second, squares[1], second_weight, post, scale, weight if weighted else None, EPS, TERMS)
    stream, fixed, left = (t.cpu() for t in KILN.add_norm_two(*moved(given, device)))

    def norm(t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return t * torch.rsqrt(t.square().mean() + EPS) * w.double()

    branch = norm(norm(first.double(), first_weight) + norm(second.double(), second_weight), post)
    expected = (x.double() + branch) * (1 if scale is None else scale.double())
    torch.testing.assert_close(stream.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(left.sum().double(), expected.square().sum(), rtol=2e-6, atol=0)
    after = stream * weight if weighted else stream
    assert error(fixed_point.dequantize(fixed), after.double()) < 1e-6


def test_two_branches() -> None:
    check_two(288, True, True)
    check_two(64, False, False)


def interpreted_two_branches() -> None:
    """Two programs, the second with 32 elements; each reads both branches whole."""
    with compiling_for(ONE_SM):
        check_two(288, True, True)
        check_two(64, False, False)


# ---- refused ----


def test_wrong_arguments_are_named() -> None:
    words, halves, _ = random_weight("Q4_K", COUNT * 64, 256)
    x, zeros = fixed_point.quantize(random(1, 256), TERMS), counters()
    for arguments, message in (
        ((x.repeat(1, 2, 1), words, halves, None, None, "Q4_K", CHOSEN, COUNT, zeros),
         r"x is torch.int32 \(1, 2, 240\); expected int32 \[1, 8"),
        ((x, words, halves, None, None, "Q4_K", CHOSEN.int(), COUNT, zeros), "chosen is torch.int32"),
        ((x, words, halves, None, None, "Q4_K", CHOSEN, 3, zeros), "320 rows are no 3 experts"),
        ((x, words, halves, None, None, "Q4_K", CHOSEN, 10, zeros), "320 rows of 10 experts; expected inner sizes that are multiples"),
        ((x, words, halves, words[:, :, :64], halves[:, :, :64], "Q4_K", CHOSEN, COUNT, zeros), "matrices of other shapes"),
        ((x, words, halves, None, None, "Q4_K", CHOSEN, COUNT, zeros, None, 0.0, "relu"), "activation 'relu'"),
        ((x, words, halves, None, None, "Q4_K", CHOSEN, COUNT, zeros, torch.ones(0), 0.0), r"squares are torch.float32 \(0,\)"),
    ):
        with pytest.raises(ValueError, match=f"expert_glu: .*{message}"):
            KILN.expert_glu(*arguments)
    with pytest.raises(ValueError, match=r"expert_sum: x is torch.int32 \(1, 1, 240\); expected int32 \[2, 8"):
        KILN.expert_sum(x, words, halves, "Q4_K", CHOSEN, torch.ones(1, 2), COUNT, zeros)
    with pytest.raises(ValueError, match=r"expert_sum: weights are torch.float32 \(1, 3\)"):
        KILN.expert_sum(x.repeat(2, 1, 1), words, halves, "Q4_K", CHOSEN, torch.ones(1, 3), COUNT, zeros)
    with pytest.raises(ValueError, match="choose_experts: x torch.float32 .1, 64., .*router torch.float32 .4, 96.*expected"):
        KILN.choose_experts(random(1, 64), torch.ones(1), EPS, random(64), 1.0, random(4, 96), 2, True, None, zeros)
    with pytest.raises(ValueError, match="choose_experts: .*expected .1, D., .P., .D., .5 .. 1024, D."):
        KILN.choose_experts(random(1, 64), torch.ones(1), EPS, random(64), 1.0, random(4, 64), 5, True, None, zeros)
    with pytest.raises(ValueError, match="add_norm_two: .*expected float32"):
        KILN.add_norm_two(*(random(1, 64), random(1, 64), torch.ones(1), random(64)), random(1, 32), torch.ones(1), random(64), random(64),
                          None, None, EPS, TERMS)  # fmt: skip


def interpreted_too_few_counters() -> None:
    words, halves, _ = random_weight("Q4_K", COUNT * 64, 256)
    with compiling_for(ONE_SM), pytest.raises(ValueError, match="expert_glu: 1 counters; 4 are needed"):
        KILN.expert_glu(fixed_point.quantize(random(1, 256), TERMS), words, halves, None, None, "Q4_K", CHOSEN, COUNT, counters()[:1])


# ---- on a GPU ----


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """At the shapes of Gemma 4 26B-A4B and Qwen3-30B-A3B, whose 128 experts are 5 here where they have rows; repeats give the same bits."""
    for d, whole in ((2816, True), (2048, False)):
        check_choice(d, 128, 8, True, whole, device="cuda")
    check_choice(2048, 512, 10, True, False, device="cuda")
    check_ties("cuda")
    check_not_numbers("cuda")
    check_glu("Q4_K", 704, 2816, False, "gelu_tanh", True, "cuda")
    check_glu("Q4_K", 768, 2048, True, "silu", True, "cuda")
    check_glu("Q4_K", 96, 256, False, "gelu_tanh", True, "cuda")
    for arguments in (("Q5_0", 2816, 704), ("Q8_0", 2816, 704), ("Q4_K", 2048, 768), ("Q6_K", 2048, 768)):
        check_sum(*arguments, "cuda")
    for scaled, weighted in ((True, True), (False, False)):
        check_two(2816, scaled, weighted, "cuda")
    logits = random(300, 512, seed=1)
    assert torch.equal(KILN.route(logits.cuda(), 10, True)[0].cpu(), route.reference(logits, 10, True)[0])
