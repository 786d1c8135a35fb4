"""`python -m kiln.custom_ops.bench --tune`: times a grid of kernel configurations at the shapes of the 31B, each checked first.

Nothing is changed on disk: the best are printed, and recorded as `winners`, as the lines to check in beside the kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kiln.custom_ops.attention.flash import Tile
from kiln.custom_ops.bench import ceilings, harness
from kiln.custom_ops.bench.attention_cases import global_case, sliding_case, sliding_decode_case, tq4_case
from kiln.custom_ops.bench.cases import GEMMA4_31B, Case, Tensors, Workload, fixed_case
from kiln.custom_ops.geometry import Matrix
from kiln.custom_ops.gpu.tables import nearest, pick
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights import gemv
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.fixed_point import GROUP
from kiln.custom_ops.weights.gemv import GemvConfig

REPLAYS = 15
SHOWN = 3  # of the best candidates of a case
HOPELESS = 2.0  # times the best so far: one call tells enough


@dataclass
class Family:
    """Cases that share a table, and the candidates for its entry; the first is what the table holds."""

    name: str
    cases: list[Case]
    candidates: list[Any]
    table: str  # module and name
    key: Any  # of its entry
    matrix: Matrix | None = None  # the GEMV's

    @property
    def entries(self) -> dict:
        module, name = self.table.rsplit(".", 1)
        return getattr(importlib.import_module(f"kiln.custom_ops.{module}"), name)


@dataclass
class Trial:
    family: Family
    case: Case
    candidate: Any
    us: float | None = None
    error: float | None = None
    failure: str = ""

    def row(self) -> dict:
        result = {"us": self.us, "error": self.error, "failure": self.failure}
        return {"op": self.case.op, "shape": self.case.shape, "config": dict(vars(self.candidate)), **result}


@dataclass
class Tuning:
    trials: list[Trial] = field(default_factory=list)
    skipped: int = 0


# ---- the grid ----


def gemv_current(target: GpuTarget, m: Matrix) -> GemvConfig:
    config = gemv.GEMV_CONFIGS[nearest(gemv.GEMV_CONFIGS, target)]
    return replace(config, groups=config.groups or LAYOUTS[m.block_type].gemv_groups)


def first(current: Any, others: Iterator[Any]) -> list[Any]:
    return list(dict.fromkeys([current, *others]))


def tiles(current: Tile, **choices: tuple[int, ...]) -> list[Tile]:
    """The current tile and every combination of the choices."""
    grid = (replace(current, **dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values()))
    return first(current, grid)


def families(target: GpuTarget, work: Workload = GEMMA4_31B) -> list[Family]:
    chunk, full = work.chunks[-1], work.full
    short, far, long = work.depths[2], work.depths[-2], work.depths[-1]
    found = []
    for m in (*work.matrices, work.head):
        case = fixed_case(m, at_once=GROUP)  # what `kiln_gemv_sums` takes is not cut by GEMV_CONFIGS
        grid = (GemvConfig(*choice) for choice in itertools.product((64, 128), (1, 2, 4), (16, 24, 28, 32), (1, 2, 4)))
        found.append(Family(case.name, [case], first(gemv_current(target, m), grid), "weights.gemv.GEMV_CONFIGS", target.sm, m))

    def tiled(name: str, table: str, dim: int, cases: list[Case], **choices: tuple[int, ...]) -> None:
        family = Family(name, cases, [], table, None)
        family.candidates = tiles(pick(family.entries, target, dim), **choices)
        family.key = target.sm, dim
        found.append(family)

    decode = {"keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3), "splits_per_sm": (1, 2, 3, 4)}
    prefill = {"rows": (32, 64, 128), "keys": (32, 64), "warps": (4, 8), "stages": (1, 2, 3)}
    tiled("tq4 decode", "tq4.attention.DECODE_TILES", full.dim, [tq4_case(work, 1, short), tq4_case(work, 1, long)], **decode)
    pieces = {"rows": (32, 64, 128), "keys": (16, 32, 64), "warps": (4, 8), "stages": (2, 3), "piece": (8192, 16384)}
    tiled("tq4 prefill", "tq4.prefill.PIECE_TILES", full.dim, [tq4_case(work, chunk, far)], **pieces)
    decode["keys"] = (16, 32, 64)
    if sliding := work.sliding:
        tiled("fused sliding decode", "attention.sliding_cut.SLIDING_TILES", sliding.dim, [sliding_decode_case(sliding, work.window)],
              **decode | {"stages": (1,)})  # fmt: skip
        tiled("sliding decode", "attention.flash.DECODE_TILES", sliding.dim, [sliding_case(sliding, work.window, 1)], **decode)
        tiled("sliding prefill", "attention.flash.PREFILL_TILES", sliding.dim, [sliding_case(sliding, work.window, chunk)], **prefill)
    tiled("global decode", "attention.flash.DECODE_TILES", full.dim, [global_case(full, 1, short), global_case(full, 1, long)], **decode)
    tiled("global prefill", "attention.flash.PREFILL_TILES", full.dim, [global_case(full, chunk, far)], **prefill)
    return found


@contextlib.contextmanager
def applied(family: Family, candidate: Any) -> Iterator[None]:
    """Inside, the ops take the candidate."""
    table, key = family.entries, family.key
    kept = table.get(key)
    table[key] = candidate
    try:
        yield
    finally:
        if kept is None:
            del table[key]
        else:
            table[key] = kept


# ---- trials ----


def compile_family(family: Family, arguments: dict[str, Tensors]) -> None:
    with harness.compiling_ahead():
        for case in family.cases:
            for candidate in family.candidates:
                with applied(family, candidate):
                    case.call(*arguments[case.name])


def attempt(trial: Trial, expected: torch.Tensor, copies: list[Tensors], best: float) -> None:
    """Checks, then times. A candidate may need more than the device has; a device that failed ends everything.

    best: microseconds of the fastest candidate so far.
    """
    case = trial.case
    try:
        trial.error = harness.check(case, copies[0], expected)
        if not trial.error <= case.limit:
            trial.failure = f"wrong: error {trial.error:.2e}"
            return
        once = ceilings.call_time(lambda: case.call(*copies[-1]))
        if once > ceilings.LONG and once * 1e3 > HOPELESS * best:
            trial.failure = f"over {HOPELESS:.0f} times the best"
            return
        trial.us = ceilings.graph_time(lambda i: case.call(*copies[i]), len(copies), REPLAYS)
    except Exception as e:  # any of the compiler's or the launcher's: it is the finding
        trial.failure = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
        torch.cuda.synchronize()


def launch_of(family: Family, candidate: Any, target: GpuTarget) -> Any:
    """What tells launches apart: several GEMV candidates come to the same number of splits."""
    if not family.matrix:
        return candidate
    m = family.matrix
    constants, splits, warps = gemv.launch(m.block_type, 1, m.n, m.k, target)
    return tuple(constants.values()), splits, warps


def run_family(family: Family, tuning: Tuning, target: GpuTarget, deadline: float) -> None:
    l2 = torch.cuda.get_device_properties().L2_cache_size
    arguments = {case.name: case.arguments(torch.Generator("cuda").manual_seed(harness.SEED)) for case in family.cases}
    if time.monotonic() < deadline:
        compile_family(family, arguments)
    for case in family.cases:
        expected = case.reference(*arguments[case.name])
        generator = torch.Generator("cuda").manual_seed(harness.SEED)
        copies = harness.cold_copies(case, arguments[case.name], generator, l2, harness.free_memory())
        launches: dict[Any, Trial] = {}
        for candidate in family.candidates:
            if time.monotonic() > deadline:
                tuning.skipped += 1
                continue
            with applied(family, candidate):
                launch = launch_of(family, candidate, target)
                if launch in launches:
                    trial = replace(launches[launch], candidate=candidate)
                else:
                    trial = launches[launch] = Trial(family, case, candidate)
                    attempt(trial, expected, copies, min((t.us for t in launches.values() if t.us), default=math.inf))
            tuning.trials.append(trial)
        report(case, [t for t in tuning.trials if t.case is case])


def describe(candidate: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in vars(candidate).items())


def report(case: Case, trials: list[Trial]) -> None:
    timed = sorted((t for t in trials if t.us is not None), key=lambda t: t.us or 0.0)
    failed = [t for t in trials if t.us is None]
    print(f"{case.name}: {len(timed)} timed, {sum('wrong' in t.failure for t in failed)} wrong, {len(failed)} not timed")
    if trials and trials[0].us is not None:
        print(f"  now  {trials[0].us:9.2f} us  {describe(trials[0].candidate)}")
    for t in timed[:SHOWN]:
        print(f"  best {t.us:9.2f} us  {describe(t.candidate)}")
    for failure in dict.fromkeys(t.failure for t in failed):
        print(f"  {sum(t.failure == failure for t in failed):3d} x {failure}")
    print(end="", flush=True)


# ---- what to write into the tables ----


def best_tile(family: Family, trials: list[Trial]) -> tuple[Any, float] | None:
    """The tile that is fastest over the family's cases, by geometric mean, and that mean; None when no tile was timed in all of them."""
    logs: dict[Any, list[float]] = {}
    for t in trials:
        if t.family is family and t.us is not None:
            logs.setdefault(t.candidate, []).append(math.log(t.us))
    means = {tile: sum(values) / len(values) for tile, values in logs.items() if len(values) == len(family.cases)}
    if not means:
        return None
    tile = min(means, key=means.__getitem__)
    return tile, math.exp(means[tile])


def best_gemv(trials: list[Trial]) -> tuple[GemvConfig, dict[str, int], float] | None:
    """The one GemvConfig and groups of each block type with the least time for all matmuls of a decode step, and that time.

    None when no combination was timed for every matrix.
    """
    times: dict[Matrix, dict[GemvConfig, float]] = {}
    for t in trials:
        if t.family.matrix:
            found = times.setdefault(t.family.matrix, {})
            if t.us is not None:
                found[t.candidate] = t.us
    candidates = {c for found in times.values() for c in found}
    block_types = sorted({m.block_type for m in times})
    best = None
    for config in sorted({replace(c, groups=0) for c in candidates}, key=lambda c: tuple(vars(c).values())):
        by_type, total = {}, 0.0
        for block_type in block_types:  # its groups are its own affair
            sums = {g: sum(m.count * found.get(replace(config, groups=g), math.inf) for m, found in times.items()
                           if m.block_type == block_type) for g in sorted({c.groups for c in candidates})}  # fmt: skip
            by_type[block_type] = min(sums, key=sums.__getitem__)
            total += sums[by_type[block_type]]
        if math.isfinite(total) and (best is None or total < best[2]):
            best = config, by_type, total
    return best


def winners(chosen: list[Family], trials: list[Trial]) -> list[dict]:
    """For each table entry that was found: the file, the line to write there, and what it was chosen by."""
    found = []
    if matmuls := best_gemv(trials):
        config, groups, us = matmuls
        family = next(family for family in chosen if family.matrix)
        by = f"{us / 1e3:.3f} ms for the matmuls of a decode step, with gemv_groups {groups} in block_types.py"
        found.append((family, config, by))
    for family in chosen:
        if not family.matrix and (best := best_tile(family, trials)):
            found.append((family, best[0], f"{best[1]:.2f} us, geometric mean of {len(family.cases)}"))
    lines = []
    for family, entry, by in found:
        module, table = family.table.rsplit(".", 1)
        lines.append({"file": f"custom_ops/{module.replace('.', '/')}.py", "table": table, "line": f"{family.key}: {entry},", "by": by})
    return lines


def tune(chosen: list[Family], budget: float) -> dict:
    """Prints the best candidates of every case of the families, trying none after `budget` seconds; the record of all trials."""
    began = time.monotonic()
    target, tuning, measured = current_target(), Tuning(), ceilings.measure_ceilings()
    for family in chosen:
        run_family(family, tuning, target, began + budget)
        torch.cuda.empty_cache()
    best = winners(chosen, tuning.trials)
    for entry in best:
        print(f"\n{entry['file']}, {entry['table']}: {entry['by']}\n    {entry['line']}")
    if tuning.skipped:
        print(f"{tuning.skipped} candidates not tried: {budget:.0f} s were over; raise --budget or narrow --only")
    print(f"{time.monotonic() - began:.0f} s")
    return harness.machine(measured) | {"winners": best, "trials": [t.row() for t in tuning.trials], "skipped": tuning.skipped}
