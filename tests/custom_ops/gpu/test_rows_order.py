"""Kernels of several tokens add up in the order of those of one, as far as the compiler's layouts say: no GPU needed.

The order of a reduction follows from which threads and registers hold what. So every reduction of floats of a kernel of several tokens must
be one of the kernel of one token, by shape and layout.
"""

from __future__ import annotations

import importlib
import re

import pytest

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.gpu.target import GpuTarget, gpu_targets
from tests.custom_ops.gpu.test_kernel_resources import compile_case

H200 = gpu_targets()["sm_90"]
SHARES = r"tensor<(\d+)x(?:64|32x4)xf32, #blocked<\{.*, warpsPerCTA = \[(\d+)(?:, 1)+\]"


def reductions(case: KernelCase, target: GpuTarget) -> set[str]:
    """Operation and type, with its layout written out, of every reduction of floats."""
    text = compile_case(case, target).asm["ttgir"]
    layouts = re.findall(r"(#\w+) = #ttg\.(\w+<.*>)\n", text)
    lines, found = text.splitlines(), set()
    for at, line in enumerate(lines):
        if '"tt.reduce"' in line:
            end = next(x for x in lines[at:] if re.match(r"\s*\}\) : ", x))
            operation = next(re.search(r"arith\.\w+", x)[0] for x in lines[at:] if "arith" in x)  # type: ignore[index]
            operand = end[end.index(": (") + 3 : end.rindex(") ->")]
            for name, layout in layouts:
                operand = re.sub(rf"{name}\b", f"#{layout}", operand)
            if "xf32" in operand:
                # of the shares of K a program adds up one a warp, whatever a warp's threads hold of each
                shares = re.match(SHARES, operand)
                alone = "axis = 0 " in line and operand.startswith("tensor<1x")  # nothing is added to it
                warps = "1" if alone else shares[1] if shares and shares[1] == shares[2] else ""
                found.add(f"{operation} of {warps} shares" if warps else f"{operation} {operand}")
    return found


def case(module: str, name: str) -> KernelCase:
    cases = importlib.import_module(f"kiln.custom_ops.{module}").kernel_cases(H200)
    return next(c for c in cases if c.name == name)


@pytest.mark.parametrize(("module", "one", "several"), [
    ("weights.gemv", "gemv Q4_K 5376x8192 2 bytes, sum", ["weights.gemv: gemv Q4_K 5376x8192 2 bytes, sum, 8 tokens"]),
    ("weights.gemv", "gemv Q4_K 43008x5376 2 bytes, glu", ["weights.gemv: gemv Q4_K 43008x5376 2 bytes, glu, 4 tokens"]),
    ("attention.sliding_decode", "sliding_decode fp16 3 3 32:16x256",
     [f"attention.sliding_rows: sliding_decode_rows {part} fp16 32:16x256" for part in ("write", "attend")]),
    ("tq4.decode", "tq4_prepare fp16 32:4x512", ["tq4.decode_rows: tq4_prepare_rows fp16 32:4x512"]),
])  # fmt: skip
def test_reductions_are_those_of_one_token(module: str, one: str, several: list[str]) -> None:
    expected = reductions(case(module, one), H200)
    assert expected
    for name in several:
        found = reductions(case(*name.split(": ")), H200)
        assert found and found - {"arith.addf of 1 shares"} <= expected, name
