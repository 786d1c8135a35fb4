"""How long work takes on this machine's GPU, and what the GPU does at best: the one place where ceilings are measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

REPLAYS = 21
LONG = 2.0  # milliseconds of a call above which a graph holds each copy once only
LAUNCHES = 20  # of a graph of shorter calls
CEILING_BYTES = 4_000_000_000
MATMUL = 8192
SUSTAINED = 0.3  # seconds


@dataclass(frozen=True)
class Ceilings:
    """What the GPU does at best."""

    copy_gb_s: float  # device to device, bytes read + bytes written
    read_gb_s: float
    matmul_tflop_s: float  # bfloat16, 8192^3
    matmul_sustained_tflop_s: float  # the same for SUSTAINED seconds: power and heat bound it

    @property
    def gb_s(self) -> float:
        return max(self.copy_gb_s, self.read_gb_s)

    def floor_us(self, moved: int, flops: int) -> float:
        """No kernel that moves and computes this much takes less."""
        return max(moved / self.gb_s / 1e3, flops / self.matmul_tflop_s / 1e6)


def call_time(call: Callable[[], Any]) -> float:
    """Milliseconds of one call, launching included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graph_time(call: Callable[[int], Any], copies: int, replays: int = REPLAYS,
               summary: Callable[[list[float]], float] = statistics.median) -> float:
    """Microseconds of call(i), i going round 0 .. copies - 1: the median (or `summary`) over replays of one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)  # loads the kernels and makes the libraries' workspaces
        rounds = 1 if call_time(lambda: call(copies - 1)) > LONG else math.ceil(LAUNCHES / copies)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(copies * rounds):
            call(i % copies)
    graph.replay()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return summary(times) * 1e3 / (copies * rounds)


@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[program] = the sum of its BLOCKS * BLOCK elements of x."""
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(BLOCKS):
        total += tl.load(x_ptr + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def memory_rates(size: int) -> tuple[float, float]:
    """GB/s of a copy, bytes read + bytes written, and of a plain read of `size` bytes."""
    block, blocks = 2048, 8
    programs = size // 4 // (block * blocks)
    x = torch.randint(1 << 16, (programs * block * blocks,), dtype=torch.int32, device="cuda")
    y, sums = torch.empty_like(x), torch.empty(programs, dtype=torch.int32, device="cuda")
    copy = graph_time(lambda i: y.copy_(x), 1, summary=min)
    read = graph_time(lambda i: read_kernel[(programs,)](x, sums, BLOCK=block, BLOCKS=blocks, num_warps=4), 1, summary=min)
    if sums.sum() != x.sum():
        raise RuntimeError("the read kernel gave a wrong sum: its time means nothing")
    return 2 * x.nbytes / copy / 1e3, x.nbytes / read / 1e3


def measure_ceilings() -> Ceilings:
    """Of the current device: the best of several, on random data, because zeros take less power and run faster."""
    copy, read = memory_rates(min(CEILING_BYTES, torch.cuda.mem_get_info()[0] // 3))
    a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    c = torch.empty_like(a)

    def matmul(i: int) -> torch.Tensor:
        return torch.mm(a, b, out=c)

    megaflop, once = 2 * MATMUL**3 / 1e6, graph_time(matmul, 1, summary=min)
    calls = max(1, round(SUSTAINED * 1e6 / once))
    sustained = call_time(lambda: [matmul(i) for i in range(calls)]) * 1e3 / calls
    return Ceilings(copy, read, megaflop / once, megaflop / sustained)
