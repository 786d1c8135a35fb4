"""Matmuls of several tokens that read the weights once: each token's result is the bits that it has alone, whatever the others are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from kiln.custom_ops.gpu.cubin import disassembled, instructions
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.gemv import GemvConfig, RowsConfig, SumsConfig, launch, launch_rows
from kiln.custom_ops.weights.layouts import LAYOUTS
from tests.custom_ops.gpu.test_kernel_resources import compile_case
from tests.custom_ops.interpret import at_night, interpreted
from tests.custom_ops.weights.test_linear import random_weight, random_x

test_kernels_interpreted = interpreted(__file__)
test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)

H200 = gpu_targets()["sm_90"]
USUAL = ("Q4_K", "Q6_K", "Q8_0")  # a block of 256 with minima, one of halves of groups, a block of 32; the others at night
TYPES = [*USUAL, *at_night(*(t for t in LAYOUTS if t not in USUAL))]
kiln = torch.ops.kiln


def counters() -> torch.Tensor:
    return torch.zeros(8, dtype=torch.int32)


def rows_of(tokens: int, k: int) -> torch.Tensor:
    """Rows of very different sizes, the second with nothing but zeros: no scale is another's."""
    x = random_x(tokens, k, torch.float32) * torch.logspace(-3, 3, tokens)[:, None]
    x[1] = 0
    return x


def ends(x: torch.Tensor, squares: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, glu: bool = True) -> list:
    """What every op makes of x, tokens first; squares [T, P], of one token [P]."""
    given, zeros = (x, words, halves, block_type), counters()
    y, left = kiln.fixed_linear_squares(*given, zeros)
    parts = kiln.fixed_partials(*given, squares, 1e-3)
    found = [y, kiln.fixed_linear(*given, zeros, squares, 1e-3), left, parts if parts.dim() == 2 else parts.transpose(0, 1)]
    if glu:
        found.append(kiln.fixed_glu(*given, zeros, squares, 1e-3))
    assert not zeros.any()
    one = x.shape[0] == 1
    return [t if t.shape[0] == x.shape[0] and not (one and i in (2, 3)) else t.unsqueeze(0) for i, t in enumerate(found)]


def check_rows(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, glu: bool = True) -> None:
    squares = torch.rand(x.shape[0], 3)
    together = ends(x, squares, words, halves, block_type, glu)
    for i in range(x.shape[0]):
        for found, alone in zip(together, ends(x[i : i + 1], squares[i], words, halves, block_type, glu), strict=True):
            assert found[i].shape == alone[0].shape and torch.equal(found[i], alone[0]), i


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_on_a_cpu(terms: int) -> None:
    words, halves, _ = random_weight("Q4_K", 128, 256)
    check_rows(kiln.fixed_point(rows_of(5, 256), terms), words, halves, "Q4_K")


def test_wrong_arguments_are_named() -> None:
    words, halves, _ = random_weight("Q4_K", 64, 256)
    x = kiln.fixed_point(random_x(9, 256, torch.float32), 2)
    with pytest.raises(ValueError, match=r"fixed_partials: x is \(9, 1, 176\); expected 1 to 8 tokens"):
        kiln.fixed_partials(x, words, halves, "Q4_K")
    for squares in (torch.ones(4), torch.ones(2, 4), torch.ones(3, 0)):
        with pytest.raises(ValueError, match=r"fixed_linear: squares are torch.float32 .*; expected float32 \[3, P\]"):
            kiln.fixed_linear(x[:3], words, halves, "Q4_K", counters(), squares, 1e-6)


# ---- launches ----


def test_the_split_of_k_is_that_of_one_token() -> None:
    """So is the order in which partial sums are added."""
    for target in gpu_targets().values():
        for tokens in range(2, gemv.MOST_TOGETHER + 1):
            for n, k, gated in ((16384, 5376, False), (43008, 5376, True), (5376, 21504, False), (262144, 5376, False)):
                one, splits, warps = launch("Q4_K", 1, n, k, target, gated=gated)
                constants, *found, _ = launch_rows("Q4_K", tokens, n, k, target, gated, True)
                assert found == [splits, warps]
                assert constants == one | {"M": tokens, "REGISTERS": constants["REGISTERS"]}


def test_tiles_take_aligned_rows_alone() -> None:
    aligned = [launch_rows("Q4_K", 4, n, 512, H200, False, a)[3] for n, a in ((128, True), (130, True), (128, False))]
    assert aligned == [gemv.kiln_gemv_tiles, gemv.kiln_gemv_rows, gemv.kiln_gemv_rows]


@pytest.mark.parametrize("block_type", ["Q4_K", "Q6_K"])
def test_float_operations_are_those_of_one_token(block_type: str) -> None:
    """A token's sums have the same bits only where the compiler fuses the same additions and multiplications: of every row and token
    as many of each kind, in the loop over K."""
    shape = {"Q4_K": "16384x5376 2 bytes, split", "Q6_K": "5376x8192 2 bytes, sum"}[block_type]
    cases = {case.name: case for case in gemv.kernel_cases(H200)}
    counts = []
    for tokens, together in ((1, ""), (4, ", 4 tokens"), (8, ", 8 tokens")):
        name = f"gemv {block_type} {shape}{together}, by 32"
        code = instructions(disassembled(compile_case(cases[name], H200).asm["cubin"]))
        bodies = [code[i.target : at + 1] for at, i in enumerate(code) if i.base == "BRA" and i.target is not None and 0 <= i.target < at]
        body = min((b for b in bodies if any(i.base in ("IDP", "IMMA") for i in b)), key=len)
        pairs = cases[name].constexprs["ROWS"] * tokens // 32  # of a row and a token, that a thread has
        count = lambda base: sum(i.base == base for i in body)  # noqa: E731,B023
        counts.append((count("FFMA") / pairs, count("I2FP") / pairs))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("block_type", ["Q4_K", "Q6_K"])
def test_float_operations_of_integer_sums(block_type: str) -> None:
    """As above; here one token takes as many as four, and eight take twice as many."""
    shape = {"Q4_K": "16384x5376 2 bytes, split", "Q6_K": "5376x8192 2 bytes, sum"}[block_type]
    cases = {case.name: case for case in gemv.kernel_cases(H200)}
    counts = []
    for together in ("", ", 4 tokens", ", 8 tokens"):
        code = instructions(disassembled(compile_case(cases[f"gemv {block_type} {shape}{together}"], H200).asm["cubin"]))
        bodies = [code[i.target : at + 1] for at, i in enumerate(code) if i.base == "BRA" and i.target is not None and 0 <= i.target < at]
        body = min((b for b in bodies if any(i.base == "IMMA" for i in b)), key=len)
        counts.append([sum(i.base == base for i in body) for base in ("FFMA", "I2FP", "FADD")])
    assert counts[0] == counts[1] and counts[2] == [2 * count for count in counts[0]] and counts[0][0] and not counts[0][2]


# ---- under the interpreter ----


def spread(monkeypatch, tiles: bool, programs: int, warps: int = 1):
    """Inside, a card of one multiprocessor that takes `programs` at a time, and tokens by tiles or not."""
    monkeypatch.setitem(gemv.GEMV_CONFIGS, 90, GemvConfig(warps=warps, warps_per_sm=programs * warps))
    for key in gemv.ROWS_CONFIGS:
        monkeypatch.setitem(gemv.ROWS_CONFIGS, key, RowsConfig(tiles, 128))
    for key in gemv.SUMS_CONFIGS:
        monkeypatch.setitem(gemv.SUMS_CONFIGS, key, SumsConfig(rows=32, warps=warps, warps_per_sm=programs * warps))
    return compiling_for(dataclasses.replace(H200, sm_count=1))


@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize("tiles", [True, *at_night(False)], ids=["tiles", "rows"])
@pytest.mark.parametrize("by_32", [False, True])
def interpreted_types(block_type: str, tiles: bool, by_32: bool, monkeypatch) -> None:
    """A slice along N whose last block of rows is masked; each warp with its share of K, the last with less.

    Blocks of 256 are taken by `kiln_gemv_sums`, and those that activations with a scale for each 32 meet by the others.
    """
    wide = LAYOUTS[block_type].block == 256
    if by_32 > wide or (wide and not by_32 and not tiles):
        pytest.skip("the same as another")
    k = 768 if wide and not by_32 else 256 if wide else 5 * LAYOUTS[block_type].block
    words, halves, _ = random_weight(block_type, 48, k)
    cut = slice(4, 40)
    for terms in (2,) if block_type in USUAL else (2, 3):
        x = rows_of(3, k)
        x = fixed_point.quantize(x, terms, 32) if by_32 else gemv.fix(x, terms)
        with spread(monkeypatch, tiles, 1, warps=2):
            together, two = (kiln.fixed_partials(x[:m], words[:, :, cut], halves[:, :, cut], block_type) for m in (3, 2))
            for i in range(3):
                alone = kiln.fixed_partials(x[i : i + 1], words[:, :, cut], halves[:, :, cut], block_type)
                assert torch.equal(together[:, i], alone), i
                assert i == 2 or torch.equal(two[:, i], alone), i


EIGHT = at_night((8, True, 3), (8, False, 2))


@pytest.mark.parametrize("tokens, tiles, terms", [(2, True, 1), (2, False, 2), *EIGHT])
def interpreted_ends(tokens: int, tiles: bool, terms: int, monkeypatch) -> None:
    """Several splits, roots of the rows, sums of squares, and the gated end; up to 8 tokens, whose columns fill two tiles."""
    words, halves, _ = random_weight("Q5_1", 128, 64)
    x = gemv.fix(rows_of(tokens, 64), terms)
    squares = torch.rand(tokens, 3)
    with spread(monkeypatch, tiles, 4):
        together = ends(x, squares, words, halves, "Q5_1")
        for i in (0, 1, tokens - 1):
            for found, alone in zip(together, ends(x[i : i + 1], squares[i], words, halves, "Q5_1"), strict=True):
                assert torch.equal(found[i], alone[0]), i


def interpreted_eight_tokens(monkeypatch) -> None:
    """Their columns fill two tiles."""
    words, halves, _ = random_weight("Q4_0", 32, 64)
    x = gemv.fix(rows_of(8, 64), 2)
    with spread(monkeypatch, True, 1):
        together = kiln.fixed_linear(x, words, halves, "Q4_0", counters())
        for i in (0, 3, 4, 7):
            assert torch.equal(together[i : i + 1], kiln.fixed_linear(x[i : i + 1], words, halves, "Q4_0", counters())), i


def interpreted_neighbours_do_not_matter(monkeypatch) -> None:
    """NaN in one row stays there."""
    words, halves, _ = random_weight("Q4_0", 64, 64)
    x = rows_of(4, 64)
    fixed = gemv.fix(x, 2)
    x[2, 5] = float("nan")
    with spread(monkeypatch, True, 1):
        clean, spoilt = (kiln.fixed_linear(f, words, halves, "Q4_0", counters()) for f in (fixed, gemv.fix(x, 2)))
    assert spoilt[2].isnan().all() and torch.equal(clean[[0, 1, 3]], spoilt[[0, 1, 3]])
