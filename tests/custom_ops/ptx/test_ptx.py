"""The player of PTX against what kernels are to do: threads that part and meet, shared memory, atomics, and what it has to refuse."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kiln.custom_ops.gpu.target import gpu_targets
from tests.custom_ops.interpret import at_night
from tests.custom_ops.ptx.block import Block, Memory
from tests.custom_ops.ptx.launcher import Launcher
from tests.custom_ops.ptx.program import Program

if triton.knobs.runtime.interpret:
    pytest.skip("plays what is compiled", allow_module_level=True)
TARGETS = ["sm_90", *at_night("sm_80", "sm_120")]


@pytest.fixture(params=TARGETS)
def launcher(request) -> Launcher:
    return Launcher(gpu_targets()[request.param])


@triton.jit
def kiln_test_rows(x, y, counter, n, scale, N: tl.constexpr):
    """y[row] = scale * sum(x[row]) / max(|x[row]|), as many times as the row's number, and the programs are counted."""
    row = tl.program_id(0)
    at = tl.arange(0, N)
    value = tl.load(x + row * n + at, at < n, other=0.0)
    total = tl.sum(value, 0) / tl.max(tl.abs(value), 0)
    result = total * 0.0
    for _ in tl.range(0, row):
        result += total * scale
    tl.store(y + row, result)
    tl.atomic_add(counter, 1)


def test_loops_sums_and_counts(launcher: Launcher) -> None:
    x, y, counter = torch.randn(5, 1000), torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    launcher(kiln_test_rows)[(5,)](x, y, counter, 1000, 0.5, N=1024, num_warps=4)
    right = torch.arange(5) * 0.5 * x.sum(1) / x.abs().amax(1)
    assert torch.allclose(y, right, rtol=1e-4, atol=1e-5) and counter == 5 and launcher.launched == ["kiln_test_rows"]


@triton.jit
def kiln_test_dot(a, b, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(y + m[:, None] * N + n[None, :], tl.dot(left, right))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_tensor_cores(dtype: torch.dtype) -> None:
    launcher = Launcher(gpu_targets()["sm_80"])  # mma; wgmma is not played
    a, b = (torch.randint(-9, 9, shape).to(dtype) for shape in ((32, 64), (64, 16)))
    y = torch.zeros(32, 16, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    launcher(kiln_test_dot)[(1,)](a, b, y, M=32, N=16, K=64, num_warps=2)
    assert torch.equal(y, (a.float() @ b.float()).to(y.dtype))


def test_what_is_outside_is_refused(launcher: Launcher) -> None:
    """A row too many, whether neighbours lie there or not."""
    x, y, counter = torch.randn(5, 1000), torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(IndexError, match="outside every tensor"):
        launcher(kiln_test_rows)[(5,)](x, y, counter, 1000, 0.5, N=1024, num_warps=4)
    with pytest.raises(IndexError, match="outside every tensor"):
        launcher(kiln_test_rows)[(5,)](x, torch.zeros(5), counter, 1001, 0.5, N=1024, num_warps=4)


def test_views_lie_where_their_tensor_does() -> None:
    t = torch.arange(8, dtype=torch.int32)
    memory = Memory([t[2:], t])
    assert memory.address(t[2:]) - memory.address(t) == 8 and memory.valid.sum() == 32


def test_an_unknown_instruction_is_named() -> None:
    program = Program.parse(".visible .entry k(\n)\n{\n.reg .b32 %r<2>;\nsin.approx.f32 %r0, %r1;\nret;\n}\n")
    with pytest.raises(NotImplementedError, match="sin.approx.f32"):
        Block(program, 32, 0, Memory([]), {}).run((0, 0, 0), (1, 1, 1))
