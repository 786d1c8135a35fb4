"""The reader of machine code finds what breaks the early-launch contract, and passes what keeps it."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase, all_cases
from kiln.custom_ops.gpu import contract, cubin
from kiln.custom_ops.gpu.early import Waiting, after_waiting, wait_for_earlier_kernels, waiting_kernels
from kiln.custom_ops.gpu.target import gpu_targets
from tests.custom_ops.gpu.test_kernel_resources import compile_case

TARGETS = ("sm_90", "sm_100", "sm_120")
ARGUMENTS = ("weight", "x", "out", "n")
BLOCK = 128


@triton.jit
def kept(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + i, i < n)
    wait_for_earlier_kernels(EARLY)
    tl.store(out + i, w * tl.load(x + i, i < n), i < n)


@triton.jit
def loads_a_result(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + i, i < n)
    value = tl.load(x + i, i < n)
    wait_for_earlier_kernels(EARLY)
    tl.store(out + i, w * value, i < n)


@triton.jit
def loads_one_or_the_other(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(tl.where(n > 5, x, weight) + i, i < n)
    wait_for_earlier_kernels(EARLY)
    tl.store(out + i, value * tl.load(weight + i, i < n), i < n)


@triton.jit
def loads_in_pure_assembly(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr, PINNED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_earlier_kernels(EARLY)
    if PINNED:
        x += after_waiting(0, EARLY)
    value = tl.inline_asm_elementwise("ld.global.b32 $0, [$1];", "=r,l", [x + i], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + i, value.to(tl.float32, bitcast=True) * tl.load(weight + i), i < n)


@triton.jit
def stores(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(weight + i, i < n), i < n)
    wait_for_earlier_kernels(EARLY)
    tl.store(x + i, 0.0, i < n)


@triton.jit
def counts(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    tl.atomic_add(out, 1.0)
    wait_for_earlier_kernels(EARLY)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(weight + i, i < n) * tl.load(x + i, i < n), i < n)


@triton.jit
def waits_in_a_branch(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + i, i < n)
    if n > 1000:
        wait_for_earlier_kernels(EARLY)
    tl.store(out + i, w * tl.load(x + i, i < n), i < n)


@triton.jit
def ends_idle(weight, x, out, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= n:
        return
    w = tl.load(weight + i, i < n)
    wait_for_earlier_kernels(EARLY)
    tl.store(out + i, w * tl.load(x + i, i < n), i < n)


@triton.jit
def kiln_fixes(out):
    tl.store(out, 0.0)


def found(fn, target: str, reads: tuple[str, ...] = ("weight",), idle: bool = False, early: bool = True, **constants) -> list[str]:
    signature = dict.fromkeys(ARGUMENTS[:3], "*fp32") | {"n": "i32"}
    case = KernelCase(fn.__name__, fn, signature, {"BLOCK": BLOCK, "EARLY": early} | constants, {"num_warps": 4})
    image = compile_case(case, gpu_targets()[target]).asm["cubin"]
    return contract.problems(image, fn.__name__, Waiting(ARGUMENTS, reads, idle))


# What is planted, and what every finding's text holds, one of them for each word.
PLANTED = (
    (loads_a_result, {}, ["a load from x"]),
    (kept, {"reads": ()}, ["a load from weight"]),
    (loads_one_or_the_other, {}, ["x"]),
    (stores, {}, ["ST", "is no load"]),
    (counts, {}, ["is no load"]),
    (waits_in_a_branch, {}, ["is no load", "a load from x", "may end without waiting"]),
    (ends_idle, {}, ["may end without waiting: @"]),
    (kept, {"early": False}, ["no ACQBULK", "a load from x", "is no load", "may end without waiting"]),
)


@pytest.mark.parametrize("target", TARGETS)
def test_planted_violations_are_found(target: str) -> None:
    for fn, options, words in PLANTED:
        problems = found(fn, target, **options)
        for word in words:
            assert any(word in problem for problem in problems), (fn.__name__, word, problems)
        assert all(any(word in problem for word in words) for problem in problems), (fn.__name__, problems)


@pytest.mark.parametrize("target", TARGETS)
def test_what_keeps_the_contract_passes(target: str) -> None:
    for fn, options in ((kept, {}), (ends_idle, {"idle": True}), (loads_one_or_the_other, {"reads": ("weight", "x")}),
                        (loads_in_pure_assembly, {"PINNED": True})):  # fmt: skip
        assert found(fn, target, **options) == [], fn.__name__


def test_a_factor_of_a_wide_product_is_one_register() -> None:
    """Of R6, R7 = R3 * 8 + (R6, R7) the register R4 is no source, whatever lies there; what is added is two."""
    product = cubin.Instruction(0, "", "IMAD.WIDE.U32", ("R6", "R3", "0x8", "R6"))
    state = contract.step(product, {"R4": frozenset("x"), "R6": frozenset("w"), "R7": frozenset("w")}, {})
    assert state["R6"] == state["R7"] == frozenset("w")
    for register in ("R3", "R6", "R7"):
        assert contract.step(product, {register: frozenset("x")}, {})["R6"] == frozenset("x")


def test_names() -> None:
    """A kernel is one of those that wait by its name; its arguments have to be those that are declared."""
    declared = waiting_kernels()
    assert len(declared) == 28 and all(name.startswith("kiln_") for name in declared)
    cases = all_cases(gpu_targets()["sm_90"])
    assert all(case.fn.__name__.startswith("kiln_") for case in cases)
    # which is no case, for its sine of a large angle keeps a table on the stack; a decode package has it
    assert declared.keys() - {case.fn.__name__ for case in cases} == {"kiln_rope_table"}
    for name in {case.fn.__name__ for case in cases}:  # the runner goes by the beginning of a name
        assert any(name.startswith(prefix) for prefix in declared) == (name in declared), name
    case = next(case for case in cases if case.fn.__name__ == "kiln_fix")
    image = compile_case(case, gpu_targets()["sm_90"]).asm["cubin"]
    assert contract.check(image) == []
    assert "its parameters are not a" in contract.problems(image, "kiln_fix", Waiting(("a",), (), False))[0]
    assert [p.pointer for p in cubin.parameters(image, "kiln_fix")] == [True, True, False, True, True]
    image = compile_case(KernelCase("", kiln_fixes, {"out": "*fp32"}, {}), gpu_targets()["sm_90"]).asm["cubin"]
    assert contract.check(image) == ["kernel kiln_fixes begins with the name of a kernel that waits, and is none"]
