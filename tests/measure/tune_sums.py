"""How `kiln_gemv_sums` is best spread: every cut of a list, over the matrices of the 31B, one token, then several.

    python -m tests.measure.tune_sums --out F.json

A cut must be the same for every number of tokens, see `SumsConfig`. Times are of a CUDA graph over copies of a matrix that the caches
cannot hold. The kernels are compiled first, by as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.bench.cases import packed
from kiln.custom_ops.gpu.tables import nearest
from kiln.custom_ops.gpu.target import current_target
from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.gemv import COUNTERS, SumsConfig
from kiln.custom_ops.weights.gemv_fragments import loads_of

# Matrices of a step of the 31B in Q4_K_M: rows, K, block type, how it ends, how many there are.
MATRICES = (
    (43008, 5376, "Q4_K", "glu", 60), (5376, 21504, "Q6_K", "squares", 30), (5376, 21504, "Q4_K", "squares", 30),
    (5376, 8192, "Q4_K", "squares", 50), (5376, 16384, "Q4_K", "squares", 10), (16384, 5376, "Q4_K", "split", 25),
    (12288, 5376, "Q4_K", "split", 25), (4096, 5376, "Q6_K", "split", 25), (18432, 5376, "Q4_K", "split", 10),
    (262144, 5376, "Q6_K", "sum", 1),
)  # fmt: skip
BYTES = 400 << 20  # of the copies of a matrix
FORMS = [(128, 4), (64, 2), (32, 1), (128, 8)]  # rows, warps
SHARED = {1: ((8, 12, 16), (6, 8)), 2: ((8, 12), (6, 8))}  # warps_per_sm, ahead, by the loads of a group's quants


def configs(loads: int) -> list[SumsConfig]:
    of_sm, ahead = SHARED[loads]
    found = []
    for (rows, warps), per_sm, a in itertools.product(FORMS, of_sm, ahead):
        found.append(SumsConfig(rows=rows, warps=warps, warps_per_sm=per_sm, narrow=rows, ahead=a, ahead_apart=a, ahead_many=6))
    return found


def name(c: SumsConfig) -> str:
    rows = f"{c.rows} rows" + f", {c.narrow} of one program" * (c.narrow < c.rows)
    return f"{rows}, {c.warps} warps, {c.warps_per_sm} an SM, {c.ahead}/{c.ahead_apart}/{c.ahead_many} ahead"


def use(config: SumsConfig) -> None:
    for loads in (1, 2):
        gemv.SUMS_CONFIGS[nearest({key[0]: 0 for key in gemv.SUMS_CONFIGS}, current_target()), loads] = config


def call(end: str, x: torch.Tensor, weight: tuple, block_type: str, zeros: torch.Tensor, squares: torch.Tensor) -> None:
    ops_of = torch.ops.kiln
    if end == "glu":
        ops_of.fixed_glu(x, *weight, block_type, zeros, squares, 1e-6)
    elif end == "squares":
        ops_of.fixed_linear_squares(x, *weight, block_type, zeros)
    elif end == "split":
        ops_of.fixed_partials(x, *weight, block_type, squares, 1e-6)
    else:
        ops_of.fixed_linear(x, *weight, block_type, zeros, squares, 1e-6)


def inputs(matrix: tuple, tokens: int, copies: int):
    n, k, block_type, end, _ = matrix
    g = torch.Generator("cuda").manual_seed(0)
    weights = [packed(block_type, n, k, g) for _ in range(copies)]
    x = fixed_point.quantize(torch.randn(tokens, k, generator=g, device="cuda"), 2)
    squares = torch.rand(tokens, -(-k // 256), generator=g, device="cuda")
    return x, weights, squares[0].contiguous() if tokens == 1 else squares, torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")


def compile_one(work: tuple) -> None:
    matrix, tokens, config = work
    use(config)
    x, (weight,), squares, zeros = inputs(matrix, tokens, 1)
    call(matrix[3], x, weight, matrix[2], zeros, squares)
    torch.cuda.synchronize()


def timed(matrix: tuple, tokens: int, config: SumsConfig, given: tuple) -> float:
    """Microseconds of one product: the median of replays of all copies."""
    use(config)
    x, weights, squares, zeros = given
    call(matrix[3], x, weights[0], matrix[2], zeros, squares)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(matrix[3], x, weight, matrix[2], zeros, squares)
    found = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / len(weights))
    return statistics.median(found[1:])


def best(times: dict[str, dict[str, float]], matrices: list[tuple], count: int) -> list[str]:
    """Configurations by the time of all matrices of a step."""
    total = {c: sum(m[4] * row[shape(m)] for m in matrices) for c, row in times.items()}
    return sorted(total, key=total.__getitem__)[:count]


def shape(matrix: tuple) -> str:
    return f"{matrix[2]} {matrix[0]}x{matrix[1]} {matrix[3]}"


def loads_of_matrix(matrix: tuple) -> int:
    return loads_of(LAYOUTS[matrix[2]].bits)


def told(tokens: int, rows: dict[str, dict[str, float]], matrices: list[tuple], now: str) -> list[str]:
    lines = [f"{tokens} tokens: {', '.join(map(shape, matrices))}"]
    for c in dict.fromkeys((now, *best(rows, matrices, 8))):
        step = sum(m[4] * rows[c][shape(m)] for m in matrices)
        lines.append(f"  {step:8.1f} us  {'  '.join(f'{rows[c][shape(m)]:7.2f}' for m in matrices)}  {c}")
    for m in matrices:
        c = min(rows, key=lambda c, m=m: rows[c][shape(m)])
        lines.append(f"    {shape(m)}: {rows[now][shape(m)]:.2f} us now, at best {rows[c][shape(m)]:.2f} of {c}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.tune_sums", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="F.json")
    parser.add_argument("--tokens", default="4,8", help="after one")
    parser.add_argument("--now", action="store_true", help="only the cut that is checked in")
    parser.add_argument("--count", type=int, default=3, help="configurations that are timed for several tokens")
    options = parser.parse_args()
    record: dict = {}
    now = {key[1]: config for key, config in gemv.SUMS_CONFIGS.items()}
    tried = {loads: {name(c): c for c in (now[loads], *([] if options.now else configs(loads)))} for loads in now}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for tokens in (1, *map(int, options.tokens.split(","))):
            rows: dict[int, dict[str, dict[str, float]]] = {loads: {c: {} for c in tried[loads]} for loads in now}
            list(pool.map(compile_one, [(m, tokens, c) for m in MATRICES for c in tried[loads_of_matrix(m)].values()], chunksize=2))
            for m in MATRICES:
                given = inputs(m, tokens, max(BYTES // (m[0] * m[1] * LAYOUTS[m[2]].bits // 8), 2))
                for c, config in tried[loads_of_matrix(m)].items():
                    rows[loads_of_matrix(m)][c][shape(m)] = timed(m, tokens, config, given)
                del given
            for loads in now:
                matrices = [m for m in MATRICES if loads_of_matrix(m) == loads]
                print("\n".join(told(tokens, rows[loads], matrices, name(now[loads]))), flush=True)
                kept = {c: tried[loads][c] for c in (name(now[loads]), *best(rows[loads], matrices, options.count))}
                many = (replace(c, ahead_many=a) for c in kept.values() for a in (4, 8) if tokens == 4 and not options.now)  # for 8
                tried[loads] = kept | {name(c): c for c in many}
            record[tokens] = rows
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
