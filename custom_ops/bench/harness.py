"""Times ops on this machine's GPU at the shapes of the 31B.

A row is timed only after its result agreed with the reference. Data is cold, as in a model, where other weights come in between: a CUDA
graph runs over copies that are together more than COLD times the L2 cache. Shares are of ceilings measured in the same process.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import triton

from kiln.custom_ops.attention import flash, prepare, sliding_decode, sliding_rows, sliding_together
from kiln.custom_ops.bench.attention_cases import decode_attention_cases, prefill_attention_cases, tq4_write_case
from kiln.custom_ops.bench.cases import (
    GEMMA4_31B,
    Case,
    Tensors,
    Workload,
    add_norm_case,
    embedding_case,
    fixed_cases,
    fixed_rows_cases,
    gemv_cases,
    linear_cases,
    sample_case,
)
from kiln.custom_ops.bench.ceilings import Ceilings, graph_time, measure_ceilings
from kiln.custom_ops.chain import chain
from kiln.custom_ops.delta import chunk as delta_chunk
from kiln.custom_ops.delta import decode as delta_decode
from kiln.custom_ops.delta import step as delta_step
from kiln.custom_ops.experts import branches, route, router
from kiln.custom_ops.experts import decode as expert_decode
from kiln.custom_ops.experts import linear as expert_linear
from kiln.custom_ops.step import add_norm, gate, sample
from kiln.custom_ops.tq4 import attention, codec, decode, decode_rows, prefill, rotation
from kiln.custom_ops.weights import embedding, gemv, linear, matmul

COLD = 4
MOST_COPIES = 1024
# modules whose ops launch kernels
LAUNCHING = (prepare, flash, gemv, chain, matmul, add_norm, gate, embedding, linear, route, expert_linear, sample, sliding_decode,
             sliding_rows, sliding_together, codec, attention, decode, decode_rows, prefill, rotation, delta_step, delta_chunk,
             delta_decode, branches, expert_decode, router)  # fmt: skip
SEED = 1


def all_cases(work: Workload = GEMMA4_31B) -> list[Case]:
    chunk, vocab = work.chunks[-1], work.head.n
    return [
        *fixed_cases(work),
        *fixed_rows_cases(work),
        add_norm_case(work),
        *gemv_cases(work),
        *linear_cases(work),
        embedding_case(work.head, 1),
        embedding_case(work.head, chunk),
        *decode_attention_cases(work),
        *prefill_attention_cases(work),
        tq4_write_case(work.full, 1),
        tq4_write_case(work.full, chunk),
        sample_case(vocab, "greedy", 0.0, 0, 1.0),
        sample_case(vocab, "top-k 64, top-p 0.95", 1.0, 64, 0.95),
        sample_case(vocab, "no limits", 1.0, 0, 1.0),
    ]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; NaN where anything is not finite or the shapes differ."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return math.nan
    expected = expected.double()
    difference = (found.double() - expected).norm().item()
    norm = expected.norm().item()
    return difference / norm if norm else difference


def check(case: Case, arguments: Tensors, expected: torch.Tensor) -> float:
    """The relative error of a call whose output most likely lies in memory full of NaN or of -1."""
    first = case.call(*arguments)
    if isinstance(first, torch.Tensor):
        first.fill_(math.nan if first.is_floating_point() else -1)
        del first  # the allocator hands its memory to the next call
    return relative_error(case.result(case.call(*arguments), arguments), expected)


def cold_copies(case: Case, arguments: Tensors, g: torch.Generator, l2: int, memory: int) -> list[Tensors]:
    """Arguments for calls in turn, so that a copy has left the cache when its turn comes again; fewer where `memory` ends."""
    fresh = case.copy(arguments, g)
    size = sum(new.nbytes for new, old in zip(fresh, arguments, strict=True) if new is not old)
    copies = min(math.ceil(COLD * l2 / case.bytes), MOST_COPIES, max(1, memory // size))
    return [arguments, fresh, *(case.copy(arguments, g) for _ in range(copies - 2))][:copies]


def measure(case: Case, ceilings: Ceilings, l2: int, memory: int, device: str = "cuda",
            timer: Callable[[Callable[[int], Any], int], float] = graph_time) -> dict:
    """Checks a case and, if it is right, times it. A row for the table and the record."""
    g = torch.Generator(device).manual_seed(SEED)
    arguments = case.arguments(g)
    expected = case.reference(*arguments)
    error = check(case, arguments, expected)
    del expected
    row = {
        "op": case.op,
        "shape": case.shape,
        "bytes": case.bytes,
        "flops": case.flops,
        "error": error if math.isfinite(error) else None,
        "limit": case.limit,
        "group": case.group,
        "count": case.count,
        "right": error <= case.limit,
    }
    if not row["right"]:
        return row
    copies = cold_copies(case, arguments, g, l2, memory)
    us = timer(lambda i: case.call(*copies[i]), len(copies))
    return row | {
        "us": us,
        "gb_s": case.bytes / us / 1e3,
        "tflop_s": case.flops / us / 1e6,
        "percent": 100 * ceilings.floor_us(case.bytes, case.flops) / us,
        "cold": len(copies) * case.bytes / l2,  # times the L2 cache that all copies together are
    }


HEADER = f"{'op':18} {'shape':28} {'us':>9} {'GB/s':>7} {'TFLOP/s':>8} {'of max':>7} {'error':>8} {'x L2':>5}"


def line(row: dict) -> str:
    name = f"{row['op']:18} {row['shape']:28}"
    if not row["right"]:
        error = "not finite" if row["error"] is None else f"{row['error']:.2e}"
        return f"{name} WRONG: error {error}, limit {row['limit']:.0e}; not timed"
    rates = f"{row['us']:9.2f} {row['gb_s']:7.0f} {row['tflop_s']:8.2f} {row['percent']:5.1f} %"
    return f"{name} {rates} {row['error']:8.1e} {row['cold']:5.1f}"


def group_lines(rows: list[dict]) -> list[str]:
    """Sums of the groups all of whose rows were timed; those of several tokens beside that of one."""
    lines: list[str] = []
    sums: dict[str, float] = {}
    for group in dict.fromkeys(row["group"] for row in rows if row["group"]):
        members = [row for row in rows if row["group"] == group]
        if all("us" in row for row in members):
            us = sum(row["us"] * row["count"] for row in members)
            moved, flops = (sum(row[what] * row["count"] for row in members) for what in ("bytes", "flops"))
            sums[group] = us
            one = sums.get(re.sub(r", \d+ tokens$", "", group), us)
            ratio = f", {us / one:.3f} of one token" if one != us else ""
            lines.append(f"{group}: {us / 1e3:.3f} ms, {moved / us / 1e3:.0f} GB/s, {flops / us / 1e6:.1f} TFLOP/s{ratio}")
    return lines


class _Compile:
    """What `launch.kernel` gives, but compiling instead of launching."""

    def __init__(self, fn: Any, registers: int | None = None, x: torch.Tensor | None = None):
        self.fn, self.limit = fn, {"maxnreg": registers} if registers else {}

    def __getitem__(self, grid: tuple) -> Callable[..., Any]:
        return lambda *args, **options: self.fn.warmup(*args, grid=grid, **options, **self.limit)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, the ops launch nothing: their kernels are compiled, on all cores, until the block ends. A failure shows at the launch."""
    kept: list[tuple[Any, Any]] = [(module, module.kernel) for module in LAUNCHING]
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        try:
            for module, _ in kept:
                module.kernel = _Compile
            yield
        finally:
            for module, launch in kept:
                module.kernel = launch


def compile_cases(cases: list[Case], device: str = "cuda") -> None:
    with compiling_ahead():
        for case in cases:
            case.call(*case.arguments(torch.Generator(device).manual_seed(SEED)))


def free_memory() -> int:
    """Bytes that copies may take: half of what is free, the allocator's cache included."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] // 2


def machine(ceilings: Ceilings) -> dict:
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "ceilings": asdict(ceilings)}


def bench(cases: list[Case]) -> tuple[list[dict], dict]:
    """Prints the table; the rows and what they were measured on."""
    began = time.monotonic()
    compile_cases(cases)
    compiled = time.monotonic()
    ceilings, l2 = measure_ceilings(), torch.cuda.get_device_properties().L2_cache_size
    print(f"{torch.cuda.get_device_name()}: copy {ceilings.copy_gb_s:.0f} GB/s, read {ceilings.read_gb_s:.0f} GB/s, "
          f"bfloat16 matmul {ceilings.matmul_tflop_s:.0f} TFLOP/s; {len(cases)} cases, compiled in {compiled - began:.0f} s")  # fmt: skip
    print(HEADER, flush=True)
    rows = []
    for case in cases:
        rows.append(measure(case, ceilings, l2, free_memory()))
        print(line(rows[-1]), flush=True)
    for text in group_lines(rows):
        print(text)
    print(f"{time.monotonic() - began:.0f} s")
    return rows, machine(ceilings)
