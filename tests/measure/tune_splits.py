"""Into how many parts `kiln_gemv_sums` best splits K, and how many warps it best gives a multiprocessor, matrix by matrix.

    python -m tests.measure.tune_splits --out F.json [--tokens 1,8]

Times as those of `tune_sums`. A split must be the same for every number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import triton

from kiln.custom_ops.gpu.target import current_target
from kiln.custom_ops.weights import gemv
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.fixed_point import WIDE
from tests.measure.tune_sums import BYTES, MATRICES, inputs, loads_of_matrix, shape, timed

MORE = (  # of Qwen3 32B and 8B
    (51200, 5120, "Q4_K", "glu", 64), (5120, 25600, "Q4_K", "squares", 32), (5120, 25600, "Q6_K", "squares", 32),
    (5120, 8192, "Q4_K", "squares", 64), (10240, 5120, "Q4_K", "split", 32), (9216, 5120, "Q4_K", "split", 32),
    (1024, 5120, "Q6_K", "split", 32), (151936, 5120, "Q6_K", "sum", 1),
    (24576, 4096, "Q4_K", "glu", 36), (4096, 12288, "Q4_K", "squares", 18), (4096, 12288, "Q6_K", "squares", 18),
    (4096, 4096, "Q4_K", "squares", 36), (6144, 4096, "Q4_K", "split", 18), (1024, 4096, "Q6_K", "split", 18),
)  # fmt: skip
WARPS = {1: (12, 13), 2: (8, 9)}  # of a multiprocessor, by the loads of a group's quants
WAVES = 1.3  # of programs, at most: more than run at once are tried up to so many


def choices(matrix: tuple, tokens: int) -> list[tuple[int, int, int]]:
    """(warps of a multiprocessor, splits, groups ahead) to try."""
    n, k, _, end, _ = matrix
    steps, found = k // WIDE, []
    for warps in WARPS[loads_of_matrix(matrix)]:
        each = {triton.cdiv(steps, s) for s in range(1, 25)}
        for splits in sorted({triton.cdiv(steps, e) for e in each}):
            waves = triton.cdiv(n, 32) * splits / (warps * current_target().sm_count)
            if 0.35 < waves < WAVES or (splits == 1 and waves >= WAVES) or (end == "glu" and splits <= 3):
                found += [(warps, splits, ahead) for ahead in ((6, 8) if tokens <= 4 else (4, 8))]
    return found


def use(matrix: tuple, choice: tuple[int, int, int]) -> None:
    warps, splits, ahead = choice
    loads = loads_of_matrix(matrix)
    key = next(key for key in gemv.SUMS_CONFIGS if key[1] == loads)
    gemv.SUMS_CONFIGS[key] = replace(gemv.SUMS_CONFIGS[key], warps_per_sm=warps, ahead=ahead, ahead_apart=ahead, ahead_many=ahead)
    gemv.splits_of_sums = lambda *_: splits


def compile_one(work: tuple) -> None:
    matrix, tokens, choice = work
    use(matrix, choice)
    given = inputs(matrix, tokens, 1)
    timed(matrix, tokens, gemv.SUMS_CONFIGS[next(key for key in gemv.SUMS_CONFIGS if key[1] == loads_of_matrix(matrix))], given)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.tune_splits", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="F.json")
    parser.add_argument("--tokens", default="1,8")
    parser.add_argument("--only", default="", help="matrices whose name holds this")
    options = parser.parse_args()
    matrices = [m for m in (*MATRICES, *MORE) if options.only in shape(m)]
    checked_in, of_splits = dict(gemv.SUMS_CONFIGS), gemv.splits_of_sums
    record: dict[str, dict[str, dict[str, float]]] = {}
    compiled = {}
    for m in matrices:
        for tokens in map(int, options.tokens.split(",")):
            for warps, splits, ahead in choices(m, tokens):
                compiled[m, tokens, warps, splits == 1, ahead] = (m, tokens, (warps, splits, ahead))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, compiled.values(), chunksize=2))
    for m in matrices:
        weights = inputs(m, 1, max(BYTES // (m[0] * m[1] * LAYOUTS[m[2]].bits // 8), 2))[1]
        for tokens in map(int, options.tokens.split(",")):
            x, _, *rest = inputs(m, tokens, 0)
            given = (x, weights, *rest)
            times = record.setdefault(f"{shape(m)}", {}).setdefault(str(tokens), {})
            gemv.SUMS_CONFIGS.update(checked_in)
            gemv.splits_of_sums = of_splits
            key = next(key for key in checked_in if key[1] == loads_of_matrix(m))
            times["now"] = timed(m, tokens, checked_in[key], given)
            for choice in choices(m, tokens):
                use(m, choice)
                times["{} warps, {} splits, {} ahead".format(*choice)] = timed(m, tokens, gemv.SUMS_CONFIGS[key], given)
            order = sorted(times, key=times.__getitem__)[:6]
            print(f"{shape(m)}, {tokens}: now {times['now']:.2f}; {'; '.join(f'{times[c]:.2f} {c}' for c in order)}", flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
