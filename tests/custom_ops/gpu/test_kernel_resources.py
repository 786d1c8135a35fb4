"""Every kernel of every op compiles for every architecture and fits it: shared memory, registers without spilling, and what it does before
it waits for earlier kernels. No GPU needed."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kiln.custom_ops.cases import KernelCase, all_cases
from kiln.custom_ops.gpu import contract
from kiln.custom_ops.gpu.target import KIB, GpuTarget, gpu_targets
from kiln.custom_ops.tq4 import attention, codec
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.compiler.torch_private import cubin_resources
from tests.tools.cubins import cuobjdump

TARGETS = gpu_targets()
FEWEST_REGISTERS = 12  # with fewer a kernel is empty: a tile that an architecture's matrix unit does not take may give one without a word


def compile_case(case: KernelCase, target: GpuTarget) -> triton.compiler.CompiledKernel:
    names = case.fn.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in case.aligned]
    source = ASTSource(case.fn, signature, case.constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", target.sm, 32), options=dict(case.options))


def examine(case: KernelCase, target: GpuTarget) -> tuple[str, list[str]]:
    """A line for the report, and what is wrong."""
    shown = f"{case.name} {case.constexprs} {case.options} on sm_{target.sm}"
    try:
        compiled = compile_case(case, target)
    except Exception as error:  # any of the compiler's: it is the finding
        return shown, [f"{shown}: {type(error).__name__}: {str(error)[:500]}"]
    shared = compiled.metadata.shared
    registers, stack = cubin_resources(compiled.asm["cubin"])
    problems = []
    if shared > target.smem_optin:
        problems.append(f"{shown}: {shared} bytes of shared memory, the limit of {target.name} is {target.smem_optin}")
    if registers < FEWEST_REGISTERS:
        problems.append(f"{shown}: {registers} registers; the compiler found nothing to do")
    if target.sm >= 90:
        problems += [f"{shown}: {problem}" for problem in contract.check(compiled.asm["cubin"])]
    if stack:
        problems.append(f"{shown}: spills {stack} bytes, {registers} registers")
    return f"{case.name}: {registers} registers, {shared} bytes of shared memory", problems


cases_of = functools.cache(lambda target, every: all_cases(TARGETS[target], every))


def examine_one(target: str, every: bool, index: int) -> tuple[str, list[str]]:
    return examine(cases_of(target, every)[index], TARGETS[target])


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["usual", "every"])
@pytest.mark.parametrize("target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.nightly) for t in TARGETS])
def test_kernels_fit(target: str, every: bool, pool: ProcessPoolExecutor) -> None:
    number = len(all_cases(TARGETS[target], every))
    assert number
    results = list(pool.map(examine_one, [target] * number, [every] * number, range(number)))
    print(f"{target}: {number} kernels", *(line for line, _ in results), sep="\n  ")
    problems = [problem for _, found in results for problem in found]
    assert not problems, "\n" + "\n".join(problems)


def test_both_models_are_among_the_cases() -> None:
    """Attention of the 31B and of the 12B, decode and prefill, 16 bits and TQ4; rare block types; nothing is left to the nights alone."""
    names = {case.name for case in all_cases(TARGETS["sm_90"])}
    for full, sliding in (("32:4x512", "32:16x256"), ("16:1x512", "16:8x256")):
        ops = [f"global_attention bf16 {full} {{}}", f"sliding_attention bf16 {sliding} {{}}", f"tq4_attention bf16 {{}} {full}"]
        for name in (op.format(part) for op in ops for part in ("decode", "prefill")):
            assert any(found in (name, name.replace("prefill", "piece")) for found in names), name
        assert {f"prepare {full}", f"tq4_prepare bf16 {full}", f"sliding_decode fp16 3 3 {sliding}"} <= names
    assert all(any(kind in name.split() for name in names) for kind in LAYOUTS)
    assert names < {case.name for case in all_cases(TARGETS["sm_90"], every=True)}


@triton.jit
def product(a, b, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, STEPS, num_stages=4):
        left = tl.load(a + k * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :])
        acc = tl.dot(left, tl.load(b + k * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :]), acc)
    tl.store(out + i[:, None] * BLOCK + i[None, :], acc)


def test_an_oversize_configuration_is_named() -> None:
    signature = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
    case = KernelCase("product", product, signature, {"BLOCK": 128, "STEPS": 64}, {"num_warps": 8})
    _, problems = examine(case, TARGETS["sm_86"])
    assert any(f"the limit of {TARGETS['sm_86'].name} is {99 * KIB}" in problem and "'BLOCK': 128" in problem for problem in problems)
    assert examine(KernelCase("product", product, signature, {"BLOCK": 32, "STEPS": 64}), TARGETS["sm_86"])[1] == []


def test_an_empty_kernel_is_named() -> None:
    """Of float16 queries and this tile the compiler makes one on sm_100."""
    constants = attention.prefill_constants(32, 4, 512, 131072, 256) | {"BLOCK_M": 64, "BLOCK_N": 32, "ASM": True}
    case = next(c for c in attention.kernel_cases(TARGETS["sm_100"]) if c.fn is attention.kiln_tq4_prefill)
    signature = case.signature | {"q_ptr": "*fp16", "out_ptr": "*bf16"}
    case = dataclasses.replace(case, signature=signature, constexprs=constants, options={"num_warps": 8, "num_stages": 2})
    _, problems = examine(case, TARGETS["sm_100"])
    assert any("nothing to do" in problem for problem in problems)


def test_a_spill_is_named() -> None:
    signature = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
    _, problems = examine(KernelCase("product", product, signature, {"BLOCK": 128, "STEPS": 64}, {"num_warps": 1}), TARGETS["sm_120"])
    assert any("spills" in problem for problem in problems)


@pytest.mark.parametrize("target", ["sm_86", "sm_90", "sm_120"])
def test_tables_of_tq4_stay_in_registers(target: str) -> None:
    """Were their values known to the assembler it would fetch them again for every lookup: a tenth more instructions in decode."""
    case = next(c for c in attention.kernel_cases(TARGETS[target]) if c.fn is attention.kiln_tq4_decode and "bf16" in c.name)
    code = re.sub(r"/\*.*?\*/", "", cuobjdump(compile_case(case, TARGETS[target]).asm["cubin"], "-sass"))
    tables = re.findall(r"\.b32 \w, t, (0x[0-9a-f]+);", codec.PLANES_ASM.value[0])
    assert len(tables) == 2
    for table in tables:
        assert [line.split()[0].split(".")[0] for line in code.splitlines() if table in line] == ["LOP3"], table
