"""Products of fixed-point activations with packed weights: the ops on a CPU, and the GEMV under the interpreter, against float64."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import triton

from kiln.custom_ops.geometry import MEASURED
from kiln.custom_ops.gpu.target import compiling_for, current_target, gpu_targets
from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.gemv import GemvConfig, SumsConfig, launch, launch_sums
from kiln.custom_ops.weights.layouts import LAYOUTS, dequantize
from tests.custom_ops.gpu.test_kernel_resources import compile_case
from tests.custom_ops.interpret import at_night, interpreted
from tests.custom_ops.weights.test_linear import random_weight, random_x, relative_error

test_kernels_interpreted = interpreted(__file__)
test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))
RARE = ("Q4_1", "Q5_1", "Q5_K", "IQ4_XS", "Q2_K", "Q3_K")  # whose forms are those of others; at night

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

TYPES = list(LAYOUTS)
TERMS = (1, 2, 3)
LOSS = {1: 1.6e-2, 2: 6e-5, 3: 1.2e-6}  # relative, of normally distributed activations, 256 to a scale; minima cancel
GATED = {1: 2e-2, 2: 8e-5, 3: 1.2e-6}  # of a gate's result in fixed point, whose largest value of 256 stands out more
KERNEL = 1e-6  # against the activations that the kernel is given
H200 = gpu_targets()["sm_90"]
kiln = torch.ops.kiln


def counters(count: int = gemv.COUNTERS) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def gelu_product(x: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """gelu(gate) * value in float64."""
    gate, value = (x.double() @ torch.from_numpy(matrix).double().T).chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * value


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.shape == exact.shape and torch.isfinite(found).all()
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("block_type", TYPES)
def test_on_a_cpu(block_type: str, terms: int) -> None:
    words, halves, matrix = random_weight(block_type, 512, 512)
    x = random_x(1, 512, torch.float32)
    fixed = kiln.fixed_point(x, terms)
    y = kiln.fixed_linear(fixed, words, halves, block_type, counters())
    assert y.dtype == torch.float32 and relative_error(y, x, matrix) < LOSS[terms]
    assert torch.equal(kiln.fixed_partials(fixed, words, halves, block_type).sum(0, keepdim=True), y)
    out = kiln.fixed_glu(fixed, words, halves, block_type, counters())
    fixed_point.check("out", out, 256, 1)
    assert fixed_point.form(out) == (terms, 256)
    assert relative(fixed_point.dequantize(out), gelu_product(x, matrix)) < 3 * LOSS[terms]
    check_roots(fixed, words, halves, block_type, y)


def check_roots(fixed: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, plain: torch.Tensor) -> None:
    """Every op multiplies the product by the root of the sums of squares it is given; one leaves those of its own."""
    squares, zeros, eps = torch.tensor([300.0, 5.0, 41.5]), counters(), 0.25
    expected = plain.double() * (squares.double().sum() / fixed_point.elements(fixed) + eps) ** -0.5
    given = fixed, words, halves, block_type
    y, left = kiln.fixed_linear_squares(*given, zeros, squares, eps)
    assert relative(kiln.fixed_linear(*given, zeros, squares, eps), expected) < KERNEL
    assert relative(kiln.fixed_partials(*given, squares, eps).sum(0, keepdim=True), expected) < KERNEL
    assert relative(y, expected) < KERNEL and left.dim() == 1
    assert relative(left.sum(), expected.square().sum()) < KERNEL
    alone, left = kiln.fixed_linear_squares(*given, zeros)
    assert relative(alone, plain.double()) < KERNEL and relative(left.sum(), plain.double().square().sum()) < KERNEL
    out = fixed_point.dequantize(kiln.fixed_glu(*given, zeros, squares, eps))
    gate, value = expected.chunk(2, -1)
    limit = GATED[fixed_point.form(fixed)[0]]
    assert relative(out, torch.nn.functional.gelu(gate, approximate="tanh") * value) < limit and not zeros.any()


def test_wrong_arguments_are_named() -> None:
    words, halves, _ = random_weight("Q4_K", 512, 256)
    x = kiln.fixed_point(random_x(1, 256, torch.float32), 2)
    for op in ("fixed_linear", "fixed_linear_squares", "fixed_partials", "fixed_glu"):
        extra = () if op == "fixed_partials" else (counters(),)
        for arguments, message in (
            ((x.repeat(1, 2, 1), words, halves, "Q4_K"), rf"{op}: x is torch.int32 \(1, 2, 176\); expected int32 \[T, 8, 12, 20 or 28\] or "
             r"\[T, 1, 112, 176 or 240\]"),
            ((x.float(), words, halves, "Q4_K"), f"{op}: x is torch.float32"),
            ((x[0], words, halves, "Q4_K"), rf"{op}: x is torch.int32 \(1, 176\)"),
            ((x[:, :, :19], words, halves, "Q4_K"), rf"{op}: x is torch.int32 \(1, 1, 19\)"),
            ((x, words.long(), halves, "Q4_K"), f"{op}: words is torch.int64"),
            ((x, words, halves[:, :1], "Q4_K"), rf"{op}: .* halves \(1, 1, 512\)"),
            ((x, words, halves, "IQ3_S"), f"{op}: no packed layout for block type IQ3_S"),
        ):
            with pytest.raises(ValueError, match=message):
                getattr(kiln, op)(*arguments, *extra)
    with pytest.raises(ValueError, match=r"fixed_linear: squares are torch.float32 \(0,\); expected float32 \[P\]"):
        kiln.fixed_linear(x, words, halves, "Q4_K", counters(), torch.ones(0), 1e-6)
    with pytest.raises(ValueError, match="fixed_glu: 352 rows; expected twice a multiple of 32"):
        kiln.fixed_glu(x, words[:, :, :352], halves[:, :, :352], "Q4_K", counters())


class Gated(torch.nn.Module):
    """gate and up, down, and a projection whose reader sums."""

    def __init__(self) -> None:
        super().__init__()
        for name, block_type, n, k in (("gate_up", "Q4_K", 1024, 256), ("down", "Q6_K", 96, 512)):
            words, halves, _ = random_weight(block_type, n, k)
            self.register_buffer(f"{name}_words", words)
            self.register_buffer(f"{name}_halves", halves)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(gemv.COUNTERS, dtype=torch.int32)
        x = kiln.fixed_point(x, 2)
        parts = kiln.fixed_partials(x, self.gate_up_words[:, :, :96], self.gate_up_halves[:, :, :96], "Q4_K")
        x = kiln.fixed_glu(x, self.gate_up_words, self.gate_up_halves, "Q4_K", zeros)
        return kiln.fixed_linear(x, self.down_words, self.down_halves, "Q6_K", zeros) + parts.sum(0)


def test_opaque_when_exported() -> None:
    x = random_x(1, 256, torch.float32)
    program = torch.export.export(Gated(), (x,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    ours = [target for target in targets if target.startswith("kiln.")]
    assert ours == [f"kiln.{name}.default" for name in ("fixed_point", "fixed_partials", "fixed_glu", "fixed_linear")]
    assert not any(name in target for target in targets for name in ("mm", "matmul", "bitwise", "gelu"))
    assert torch.equal(program.module()(x), Gated()(x))


# ---- launches ----


@pytest.mark.parametrize("target", gpu_targets().values(), ids=lambda target: f"sm_{target.sm}")
def test_launches_fill_the_card(target) -> None:
    """Enough warps to hide memory's latency, no more than run at once where one wave can hold them."""
    for block_type in TYPES:
        for n, k, end in ((m.n, m.k, m.end) for model in MEASURED for mix in ("q8_0", "q4_k_m") for m in model.matrices(mix)):
            constants, splits, warps = launch(block_type, 1, n, k, target)
            steps, blocks = k // (32 * constants["GROUPS"]), -(-n // constants["ROWS"])
            assert 1 <= splits <= gemv.MAX_SPLITS and constants["EVEN"] == (n % constants["ROWS"] == 0) and constants["SHARES"] == warps
            each = -(-steps // (splits * warps))
            assert (splits - 1) * warps * each < steps  # no program without work
            assert LAYOUTS[block_type].block < 256 or LAYOUTS[block_type].block // 32 % constants["GROUPS"] == 0
            running = blocks * splits * warps / target.sm_count
            assert running >= 6, (block_type, n, k, splits)
            assert splits == 1 or running <= GemvConfig().warps_per_sm, (block_type, n, k, splits)
            assert blocks <= gemv.COUNTERS and (end != "glu" or (n // 2) % constants["ROWS"] == 0)


def test_launches_take_the_configuration() -> None:
    constants, splits, warps = launch("Q4_K", 1, 5376, 8192, H200, GemvConfig(rows=128, warps=2, warps_per_sm=8, groups=4))
    assert (constants["ROWS"], constants["GROUPS"], warps) == (128, 4, 2)
    assert splits == 11  # 64 steps, 42 blocks, at most 528 programs: 12 splits of 3 steps a warp, and 11 do
    assert constants["REGISTERS"] == 248 and GemvConfig(warps_per_sm=28).registers == 72
    assert launch("Q8_0", 1, 64, 96, H200, GemvConfig(groups=2))[0]["GROUPS"] == 1  # three groups: none by two
    assert launch("Q4_K", 8, 262144, 5376, H200)[1] == 1
    for block_type in TYPES:
        assert LAYOUTS[block_type].gemv_groups in (1, 2, 4) and GemvConfig().groups == 0


def test_more_rows_than_lanes_hold_take_one_warp() -> None:
    assert GemvConfig(rows=256, warps=1).rows == 256
    with pytest.raises(ValueError, match="GemvConfig: 256 rows and 2 warps; with more than 128 rows one is all"):
        GemvConfig(rows=256, warps=2)


@pytest.mark.parametrize("block_type, n, k", [("Q4_K", 5376, 8192), ("Q6_K", 16384, 5376), ("Q8_0", 18432, 5376)])
@pytest.mark.parametrize("rows", [64, 128])
def test_a_warp_works_on_one_share(block_type: str, n: int, k: int, rows: int, monkeypatch) -> None:
    """The kernel reads its share off the warp's number: the compiler's layout must give warp w the elements of share w, everywhere."""
    monkeypatch.setitem(gemv.GEMV_CONFIGS, 90, GemvConfig(rows=rows))
    case = next(c for c in gemv.kernel_cases(H200) if c.name.startswith(f"gemv {block_type} {n}x{k} 2 bytes") and c.fn is gemv.kiln_gemv)
    shares = case.constexprs["SHARES"]
    assert shares > 1
    text = compile_case(case, H200).asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\d*) = #ttg.blocked<\{(.*)\}>", text))
    used = set(re.findall(rf"tensor<{rows * shares}x[^,>]*, (#\w+)>", text))
    assert len(used) == 1
    expected = f"sizePerThread = [{rows // 32}], threadsPerWarp = [32], warpsPerCTA = [{shares}], order = [0]"
    assert layouts[used.pop()] == expected


def test_glu_rows() -> None:
    """What `fixed_glu` accepts, the configurations can cut: gates and values never share a program."""
    assert gemv.glu_fits(43008) and gemv.glu_fits(1024) and gemv.glu_fits(192) and not gemv.glu_fits(96)
    for config in (GemvConfig(), *gemv.GEMV_CONFIGS.values()):
        assert gemv.GLU_ROWS % config.rows == 0 and config.rows % 32 == 0


# ---- under the interpreter ----


def spread(monkeypatch, programs: int, rows: int = 64, groups: int = 0, warps: int = 1):
    """Inside, a card of one multiprocessor that takes `programs` at a time; warps: that share K."""
    monkeypatch.setitem(gemv.GEMV_CONFIGS, 90, GemvConfig(rows=rows, warps=warps, warps_per_sm=programs * warps, groups=groups))
    sums = SumsConfig(rows=rows, warps=rows // 32 * warps, warps_per_sm=programs * rows // 32 * warps, narrow=rows)
    for key in gemv.SUMS_CONFIGS:
        monkeypatch.setitem(gemv.SUMS_CONFIGS, key, sums)
    return compiling_for(dataclasses.replace(H200, sm_count=1))


@pytest.mark.parametrize("block_type", [*(t for t in TYPES if t not in RARE), *at_night(*RARE)])
def interpreted_gemv(block_type: str, monkeypatch) -> None:
    """A slice that starts and ends inside blocks of rows, 70 rows: a full program and a masked one; several splits.

    Of blocks of 256, which it takes by `kiln_gemv_sums`, another that lies as that needs it, too.
    """
    wide = LAYOUTS[block_type].block == 256
    k = 512 if wide else 256
    words, halves, matrix = random_weight(block_type, 90, k)
    x = random_x(1, k, torch.float32)
    few = block_type in ("IQ4_NL", "MXFP4", "Q5_0", "Q6_K")  # each number of bytes with one type of each kernel
    for terms, cut in (*((t, slice(4, 72)) for t in TERMS if wide and not (few and t == 1)),
                       *((t, slice(5, 75)) for t in ((2,) if wide or few else TERMS))):  # fmt: skip
        fixed, zeros = gemv.fix(x, terms), counters(2)
        with spread(monkeypatch, 8):
            assert launch(block_type, 1, 70, 256, current_target())[1] == 4
            assert not wide or launch_sums(block_type, 1, 68, k, current_target())[1] == 2
            y = kiln.fixed_linear(fixed, words[:, :, cut], halves[:, :, cut], block_type, zeros)
        assert y.dtype == torch.float32 and not zeros.any()
        assert relative_error(y, x, matrix[cut]) < LOSS[terms]
        assert relative_error(y, fixed_point.dequantize(fixed), matrix[cut]) < KERNEL


@pytest.mark.parametrize("block_type, k, programs, warps, splits", [("Q4_K", 512, 4, 4, 2), ("Q6_K", 768, 2, 4, 1), ("Q4_0", 320, 4, 2, 2),
                                                              ("Q8_0", 320, 2, 4, 1)])  # fmt: skip
def interpreted_shares(block_type: str, k: int, programs: int, warps: int, splits: int, monkeypatch) -> None:
    """Warps share a program's part of K; where the steps are no multiple of the shares the last have fewer, or none."""
    words, halves, matrix = random_weight(block_type, 90, k)
    cut = slice(5, 75)
    fixed, zeros = gemv.fix(random_x(1, k, torch.float32), 3), counters(2)
    with spread(monkeypatch, programs, warps=warps):
        constants, found, _ = launch(block_type, 1, 70, k, current_target())
        assert (constants["SHARES"], found) == (warps, splits)
        y = kiln.fixed_linear(fixed, words[:, :, cut], halves[:, :, cut], block_type, zeros)
    assert not zeros.any() and relative_error(y, fixed_point.dequantize(fixed), matrix[cut]) < KERNEL


@pytest.mark.parametrize("block_type, groups",
                         [("Q4_K", 1), ("Q4_K", 4), ("Q6_K", 2), ("Q8_0", 4), ("MXFP4", 1),
                          *at_night(("Q5_K", 4), ("Q6_K", 4), ("Q5_1", 1), ("IQ4_XS", 4), ("Q3_K", 4), ("Q2_K", 4))])  # fmt: skip
def interpreted_groups(block_type: str, groups: int, monkeypatch) -> None:
    """However many groups a lane takes at a time: 4 of a block of 256 are half of it."""
    words, halves, matrix = random_weight(block_type, 64, 256)
    x = random_x(1, 256, torch.float32)
    with spread(monkeypatch, 1, groups=groups):
        assert launch(block_type, 1, 64, 256, current_target())[0]["GROUPS"] == groups
        y = kiln.fixed_linear(fixed_point.quantize(x, 3, 32), words, halves, block_type, counters())
    assert relative_error(y, x, matrix) < LOSS[3]


@pytest.mark.parametrize("block_type, terms, tokens, programs, rows",
                         [("Q4_K", 2, 1, 8, 32), ("Q6_K", 1, 1, 1, 256), ("Q8_0", 2, 1, 8, 64),
                          *at_night(("Q5_0", 3, 2, 8, 256))])  # fmt: skip
def interpreted_glu(block_type: str, terms: int, tokens: int, programs: int, rows: int, monkeypatch) -> None:
    """The last of gates and values, whichever it is, makes the activations of the next product; 8 programs: several splits, 1: one."""
    words, halves, matrix = random_weight(block_type, 512, 256)
    fixed, zeros = gemv.fix(random_x(tokens, 256, torch.float32), terms), counters(16 * tokens)
    with spread(monkeypatch, programs, rows=rows):
        out = kiln.fixed_glu(fixed, words, halves, block_type, zeros)
    assert out.shape == (tokens, 1, fixed_point.extent_words(terms, 256)) and not zeros.any()
    exact = gelu_product(fixed_point.dequantize(fixed), matrix)
    assert relative(fixed_point.dequantize(out), exact) < {1: 1.8e-2, 2: 7e-5, 3: 1e-6}[terms]
    expected = fixed_point.quantize(exact.float(), terms)
    assert relative(fixed_point.dequantize(out), fixed_point.dequantize(expected).double()) < {1: 5e-3, 2: 2e-5, 3: 1e-6}[terms]


@pytest.mark.parametrize("block_type", ["Q4_K", "Q5_1"])
def interpreted_ends_agree(block_type: str, monkeypatch) -> None:
    """"split" leaves what "sum" adds up; with one split there is nothing to add and no counter is touched."""
    k = 1024 if block_type == "Q4_K" else 256
    words, halves, matrix = random_weight(block_type, 64, k)
    x = random_x(1, k, torch.float32)
    fixed = gemv.fix(x, 2)
    for programs, splits in ((8, 4), (1, 1)):
        with spread(monkeypatch, programs):
            parts = kiln.fixed_partials(fixed, words, halves, block_type)
            zeros = counters()
            y = kiln.fixed_linear(fixed, words, halves, block_type, zeros)
            rounded, _ = gemv.multiply(fixed, words, halves, block_type, zeros, torch.bfloat16)
        assert parts.shape == (splits, 64) and not zeros.any()
        torch.testing.assert_close(parts.sum(0, keepdim=True), y, rtol=1e-5, atol=1e-5)
        assert y.shape == (1, 64) and relative_error(y, x, matrix) < LOSS[2]
        assert rounded.dtype == torch.bfloat16 and relative_error(rounded, x, matrix) < 8e-3  # the interpreter truncates to bfloat16


@pytest.mark.parametrize("block_type, programs", [("Q4_K", 64), ("Q8_0", 1)])
def interpreted_roots(block_type: str, programs: int, monkeypatch) -> None:
    """Several splits and one, which has nothing to add up but leaves its sum of squares."""
    k = 512 if block_type == "Q4_K" else 256
    words, halves, _ = random_weight(block_type, 128, k)
    fixed = gemv.fix(random_x(1, k, torch.float32), 2)
    with spread(monkeypatch, programs):
        assert (gemv.launch_any(block_type, 1, 128, k, current_target(), 256, False, True)[1] > 1) == (programs > 1)
        check_roots(fixed, words, halves, block_type, kiln.fixed_linear(fixed, words, halves, block_type, counters()))
        cut = slice(5, 75)  # a masked program
        y, left = kiln.fixed_linear_squares(fixed, words[:, :, cut], halves[:, :, cut], block_type, counters())
    assert left.shape == (2,) and relative(left.sum(), y.double().square().sum()) < KERNEL


def interpreted_too_few_counters_are_refused(monkeypatch) -> None:
    words, halves, _ = random_weight("Q4_K", 192, 512)
    fixed = gemv.fix(random_x(2, 512, torch.float32), 2)
    with spread(monkeypatch, 100), pytest.raises(ValueError, match="gemv: 2 counters; 2 tokens and 192 rows take 3"):
        kiln.fixed_linear(fixed, words, halves, "Q4_K", counters(2))


@pytest.mark.parametrize("size", [0.0, 1e-10, 1e13])
def interpreted_range(size: float, monkeypatch) -> None:
    """Activations far from 1 neither vanish nor overflow."""
    words, halves, matrix = random_weight("Q5_K", 64, 256)
    x = random_x(1, 256, torch.float32) * size
    with spread(monkeypatch, 4):
        y = kiln.fixed_linear(gemv.fix(x, 3), words, halves, "Q5_K", counters())
    assert torch.equal(y, torch.zeros_like(y)) if size == 0 else relative_error(y, x, matrix) < LOSS[3]


def interpreted_largest_activations_do_not_overflow(monkeypatch) -> None:
    """Every byte and every quant at its largest: sums of 32 products, times 256, stay within 32 bits."""
    words, halves, matrix = random_weight("Q8_0", 64, 64)
    words[:] = 0x7F7F7F7F
    exact = dequantize("Q8_0", words, halves).T.numpy()
    for terms in TERMS:
        x = torch.full((1, 64), fixed_point.largest(terms) / 2.0**20)
        with spread(monkeypatch, 4):
            y = kiln.fixed_linear(gemv.fix(x, terms), words, halves, "Q8_0", counters())
        assert relative_error(y, x, exact) < KERNEL


@pytest.mark.parametrize("block_type, byte, scales", [("Q6_K", 0, 0x80), ("Q4_K", 0xFF, 0xFF), ("Q5_K", 0xFF, 0xFF), ("Q2_K", 0xFF, 0xFF)])
def interpreted_largest_sums_do_not_overflow(block_type: str, byte: int, scales: int, monkeypatch) -> None:
    """Every byte, quant, scale and minimum at its largest: a block's sums stay within 32 bits."""
    words, halves, _ = random_weight(block_type, 32, 256)
    words[:] = int.from_bytes([byte] * 4, "little", signed=True)
    words[:, 8 * LAYOUTS[block_type].bits :] = int.from_bytes([scales] * 4, "little", signed=True)
    exact = dequantize(block_type, words, halves).T.double()
    for terms in TERMS:
        x = torch.full((1, 256), fixed_point.largest(terms) / 2.0**20)
        with spread(monkeypatch, 4, rows=32):
            y = kiln.fixed_linear(gemv.fix(x, terms), words, halves, block_type, counters())
        # of what is added: minima cancel
        size = x.double() @ (exact.abs() + 64 * halves.double().abs().sum((0, 1))[:, None]).T
        assert ((y.double() - x.double() @ exact.T).abs() < KERNEL * size).all()


def test_sums_are_cut_alike() -> None:
    """Whatever the number of tokens; no program is without work, and one wave of them holds what fits into one."""
    for block_type in TYPES:
        if LAYOUTS[block_type].block != 256:
            continue
        for n, k, gated in {(m.n, m.k, m.end == "glu") for model in MEASURED for m in model.matrices()}:
            one, splits, _ = launch_sums(block_type, 1, n, k, H200, gated)
            each = -(-(k // 256) // (splits * one["SHARES"]))
            assert (splits * one["SHARES"] - 1) * each < k // 256
            for tokens in (1, 2, 3, 4, 5, 8, 9, 30):
                constants, same, warps = launch_sums(block_type, tokens, n, k, H200, gated)
                assert (same, constants["SHARES"]) == (splits, one["SHARES"]) and constants["M"] == (tokens if tokens <= 8 else 1)
                assert gated or constants["ROWS"] == one["ROWS"], "sums of squares are of as many rows"
                assert constants["ROWS"] * constants["SHARES"] == 32 * warps
                assert not gated or n // 2 % constants["ROWS"] == 0
                assert -(-n // constants["ROWS"]) <= gemv.COUNTERS


@pytest.mark.parametrize(("n", "k", "block_type", "splits"), [  # of gates and values, and of heads
    (43008, 5376, "Q4_K", 1),  # one wave
    (51200, 5120, "Q4_K", 3),  # 16 of 1,600 warps would make a second one
    (262144, 5376, "Q6_K", 1), (151936, 5120, "Q6_K", 1),  # 8 and 5 waves, the last nearly full
])  # fmt: skip
def test_a_last_wave_is_not_of_a_few_warps(n: int, k: int, block_type: str, splits: int) -> None:
    assert [launch_sums(block_type, tokens, n, k, H200, block_type == "Q4_K")[1] for tokens in (1, 8)] == [splits] * 2


def test_sums_fit_what_they_can_read() -> None:
    assert gemv.sums_fit("Q4_K", 256, 260, True)
    for given in (("Q4_K", 32, 260, True), ("Q4_K", 256, 258, True), ("Q4_K", 256, 260, False), ("MXFP4", 256, 260, True)):
        assert not gemv.sums_fit(*given)


def test_groups_divide() -> None:
    for block_type in TYPES:
        for k in (256, 512, 768, 5376, 21504):
            groups = launch(block_type, 1, 64, k, H200)[0]["GROUPS"]
            assert k // 32 % groups == 0 and math.gcd(groups, 8) == groups
