"""The op bench and the tuner where there is no GPU: every case against its reference at small shapes, rows, sums, candidates."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil

import pytest
import torch

from kiln import custom_ops
from kiln.custom_ops import geometry
from kiln.custom_ops.attention import flash, sliding_cut
from kiln.custom_ops.attention.flash import Tile
from kiln.custom_ops.bench import __main__ as command
from kiln.custom_ops.bench import harness, tune
from kiln.custom_ops.bench.cases import Workload, fixed_cases, gemv_cases, workload
from kiln.custom_ops.bench.ceilings import Ceilings
from kiln.custom_ops.bench.harness import all_cases
from kiln.custom_ops.geometry import Heads, Matrix
from kiln.custom_ops.gpu import launch
from kiln.custom_ops.gpu.tables import pick
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.tq4 import attention, prefill
from kiln.custom_ops.weights import gemv
from kiln.custom_ops.weights.gemv import GemvConfig
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.weights import plan_weights
from kiln.exporter.tools.synth import write_synthetic

TINY = Workload(
    matrices=(Matrix("attn_qkv", "Q4_K", 300, 512, 2), Matrix("ffn_down", "Q6_K", 256, 768, 3), Matrix("ffn_gate_up", "Q4_K", 512, 256, 1)),
    head=Matrix("token_embd", "Q6_K", 9000, 256, 1),
    sliding=Heads(4, 2, 64, 2),
    window=16,
    full=Heads(8, 2, 64, 1),
    depths=(8, 24, 64),
    chunks=(12, 40),
    exact_window=16,
    together=(3,),
)
CASES = {case.name: case for case in all_cases(TINY)}
CEILINGS = Ceilings(copy_gb_s=900.0, read_gb_s=1000.0, matmul_tflop_s=100.0, matmul_sustained_tflop_s=80.0)
H200 = gpu_targets()["sm_90"]


def call_last(call, copies) -> float:
    call(copies - 1)
    return 50.0


def test_every_module_that_launches_is_compiled_ahead():
    names = [m.name for m in pkgutil.walk_packages(custom_ops.__path__, "kiln.custom_ops.") if not m.name.endswith("__main__")]
    modules = (importlib.import_module(name) for name in names)
    launching = [m for m in modules if getattr(m, "kernel", None) is launch.kernel and m is not launch]
    assert sorted(m.__name__ for m in launching) == sorted(m.__name__ for m in harness.LAUNCHING)


def test_names_are_unique():
    assert len(CASES) == len(all_cases(TINY)) and len({c.name for c in all_cases()}) == len(all_cases())


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    """The op agrees with the case's reference, and copies share what may stay in the cache, and nothing else."""
    case = CASES[name]
    row = harness.measure(case, CEILINGS, l2=1 << 20, memory=1 << 24, device="cpu", timer=call_last)
    assert row["right"] and row["us"] == 50.0, row
    assert row["gb_s"] == pytest.approx(case.bytes / 50e-6 / 1e9)
    floor = max(case.bytes / 1000e9, case.flops / 100e12)
    assert row["percent"] == pytest.approx(100 * floor / 50e-6)
    assert case.name.split()[0] in harness.line(row) and "WRONG" not in harness.line(row)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_sees_an_error(name):
    """A result that is off by a little more than the limit is not timed."""
    case = CASES[name]

    def wrong(out, arguments):
        found = case.result(out, arguments)
        return found + 1 if not found.is_floating_point() else found * (1 + 10 * max(case.limit, 1e-6))

    row = harness.measure(dataclasses.replace(case, result=wrong), CEILINGS, l2=1, memory=1, device="cpu", timer=call_last)
    assert not row["right"] and "us" not in row and "WRONG" in harness.line(row)
    nan = dataclasses.replace(case, result=lambda out, arguments: torch.tensor([math.nan]))
    row = harness.measure(nan, CEILINGS, 1, 1, "cpu", call_last)
    assert not row["right"] and row["error"] is None and "not finite" in harness.line(row)


def test_unwritten_output_is_seen():
    """The first call's output is poisoned; one that never writes a row keeps the poison or other garbage."""
    case = CASES["gemv Q4_K [1, 512] x 300"]
    kept = torch.empty(1, 300, dtype=torch.bfloat16)
    arguments = case.arguments(torch.Generator().manual_seed(0))

    def half(x, words, halves):
        kept[:, :150] = case.call(x, words, halves)[:, :150]
        return kept

    error = harness.check(dataclasses.replace(case, call=half), arguments, case.reference(*arguments))
    assert math.isnan(error)


def test_relative_error():
    x = torch.tensor([3.0, 4.0])
    assert harness.relative_error(x * 1.01, x) == pytest.approx(0.01, rel=1e-4)
    assert math.isnan(harness.relative_error(torch.tensor([math.nan, 4.0]), x)) and math.isnan(harness.relative_error(x[:1], x))
    assert not math.nan <= 1.0  # what `measure` relies on


def test_copies():
    case = CASES["gemv Q4_K [1, 512] x 300"]
    g = torch.Generator().manual_seed(0)
    arguments = case.arguments(g)
    copies = harness.cold_copies(case, arguments, g, l2=1 << 20, memory=1 << 30)
    assert (len(copies) - 1) * case.bytes < harness.COLD << 20 <= len(copies) * case.bytes
    assert len({c[1].data_ptr() for c in copies}) == len(copies) and len({c[0].data_ptr() for c in copies}) == 1
    assert len(harness.cold_copies(case, arguments, g, l2=1 << 20, memory=0)) == 1
    assert len(harness.cold_copies(case, arguments, g, l2=1, memory=1 << 30)) == 1
    case = CASES["embedding Q6_K 1 of 9000, 256"]
    rows = harness.cold_copies(case, case.arguments(g), g, 1 << 14, 1 << 30)
    assert len({int(c[0]) for c in rows}) > 1 and len({c[1].data_ptr() for c in rows}) == 1


def test_group_lines():
    rows = [
        {"group": "g", "count": 2, "us": 10.0, "bytes": 1000000, "flops": 4000000},
        {"group": "g", "count": 1, "us": 5.0, "bytes": 500000, "flops": 2000000},
    ]
    assert harness.group_lines(rows) == ["g: 0.025 ms, 100 GB/s, 0.4 TFLOP/s"]
    assert harness.group_lines([*rows, {"group": "g", "count": 1}]) == []
    several = {"group": "g, 4 tokens", "count": 1, "us": 30.0, "bytes": 1500000, "flops": 24000000}
    assert harness.group_lines([*rows, several])[1] == "g, 4 tokens: 0.030 ms, 50 GB/s, 0.8 TFLOP/s, 1.200 of one token"


@pytest.mark.parametrize("model, step", [(geometry.GEMMA4_31B, 18.67e9), (geometry.GEMMA4_12B, 7.367e9)], ids=["31b", "12b"])
def test_a_workload_is_what_the_exporter_plans(tmp_path, model, step):
    """Matrices, heads and windows of the geometry, and the bytes that a decode step reads."""
    path, work = tmp_path / "model.gguf", workload(model, "q4_k_m")
    write_synthetic(path, model.name, "q4_k_m", 0, sparse=True)
    gguf = open_gguf(path)
    config = from_gguf(gguf)
    counts: dict[tuple, int] = {}
    for p in plan_weights(config, gguf):
        if p.K:
            key = (p.name.split(".")[-1], p.block_type, p.N, p.K)
            counts[key] = counts.get(key, 0) + 1
    assert counts == {(m.name, m.block_type, m.n, m.k): m.count for m in (*work.matrices, work.head)}
    for heads, sliding in ((work.sliding, True), (work.full, False)):
        mixers = [layer.mixer for layer in config.layers if (layer.mixer.window is not None) == sliding]
        assert len(mixers) == heads.layers
        assert {(m.heads, m.kv_heads, m.head_dim) for m in mixers} == {(heads.queries, heads.kv, heads.dim)}
        assert {m.window for m in mixers} == {work.window if sliding else None}
    for cases in (gemv_cases(work), fixed_cases(work)):
        assert sum(case.bytes * case.count for case in cases) == pytest.approx(step, rel=2e-3)


@pytest.mark.parametrize("name", sorted(geometry.GEOMETRIES))
def test_every_geometry_can_be_timed(name):
    """Those without sliding layers and those whose feed-forward is experts alone, too."""
    model = geometry.GEOMETRIES[name]
    work = workload(model, "q4_k_m")
    cases = all_cases(work)
    assert all(m.n and m.k for m in work.matrices)
    assert any(c.op == "tq4_decode" for c in cases) and any("sliding" in c.op for c in cases) == (model.sliding is not None)
    assert {f.key for f in tune.families(H200, work) if f.name == "tq4 decode"} == {(90, model.full.dim)}


# ---- tuning ----


@pytest.mark.parametrize("family", tune.families(H200), ids=lambda f: f.name)
def test_family(family):
    """The first candidate is what the tables hold; applying one is seen by the launch and leaves no trace."""
    tables = [gemv.GEMV_CONFIGS, flash.DECODE_TILES, flash.PREFILL_TILES, sliding_cut.SLIDING_TILES,
              attention.DECODE_TILES, prefill.PIECE_TILES]  # fmt: skip
    before = [dict(table) for table in tables]
    assert len(set(family.candidates)) == len(family.candidates) > 10

    def launch():
        if family.matrix:
            m = family.matrix
            return gemv.launch(m.block_type, 1, m.n, m.k, H200)
        if family.entries is prefill.PIECE_TILES:
            return prefill.piece_tile(H200, family.key[1])
        return pick(family.entries, H200, family.key[1])

    now = launch()
    with tune.applied(family, family.candidates[0]):
        assert launch() == now
    for candidate in family.candidates[1:]:
        with tune.applied(family, candidate):
            if family.matrix:
                constants, splits, warps = launch()
                assert constants["ROWS"] == candidate.rows and constants["REGISTERS"] == candidate.registers
                assert constants["SHARES"] == warps <= candidate.warps
                assert constants["GROUPS"] == candidate.groups and splits >= 1
            else:
                assert launch() == candidate
    assert [dict(table) for table in tables] == before


def gemv_trials(times) -> list[tune.Trial]:
    """`times(matrix, candidate)` for every candidate of every matrix of the tiny geometry."""
    families = [f for f in tune.families(H200, TINY) if f.matrix]
    return [tune.Trial(f, f.cases[0], c, us=times(f.matrix, c), error=0.0) for f in families for c in f.candidates]


def test_best_gemv():
    """Groups may differ by block type, the rest may not: the sum over the model decides."""

    def times(m, c):
        us = 10.0 + (c.rows != 128) + (c.groups != {"Q4_K": 4, "Q6_K": 2}[m.block_type]) + (c.warps != 2)
        return us + {"attn_qkv": 3.0 * (c.warps_per_sm != 16), "ffn_down": 5.0 * (c.warps_per_sm != 24)}.get(m.name, 0.0)

    config, groups, us = tune.best_gemv(gemv_trials(times))
    assert config == GemvConfig(rows=128, warps=2, warps_per_sm=24)
    assert groups == {"Q4_K": 4, "Q6_K": 2} and us == pytest.approx(2 * 13 + 3 * 10 + 10 + 10)

    def unfit(m, c):
        return None if m.block_type == "Q6_K" and c.groups == 2 else times(m, c)

    assert tune.best_gemv(gemv_trials(unfit))[1]["Q6_K"] in (1, 4)
    assert tune.best_gemv(gemv_trials(lambda m, c: None)) is None and tune.best_gemv([]) is None


def test_best_tile():
    family = next(f for f in tune.families(H200, TINY) if f.name == "tq4 decode")
    a, b, c = (Tile(keys=keys, warps=4, stages=2) for keys in (16, 32, 64))
    one, two = family.cases
    trials = [tune.Trial(family, case, tile, us) for case, tile, us in
              ((one, a, 4.0), (two, a, 100.0), (one, b, 5.0), (two, b, 60.0), (one, c, 1.0), (two, c, None))]  # fmt: skip
    tile, mean = tune.best_tile(family, trials)
    assert tile == b and mean == pytest.approx(math.sqrt(300))
    assert tune.best_tile(family, trials[4:]) is None


def test_winners_are_lines_of_the_tables():
    """What is printed, written into the named table, is what was timed best there."""
    families = [f for f in tune.families(H200, TINY) if f.name in ("tq4 decode", "sliding prefill") or f.matrix]
    best = {f.name: f.candidates[-1] for f in families}
    trials = [tune.Trial(f, case, c, us=1.0 if c == best[f.name] else 2.0) for f in families for case in f.cases for c in f.candidates]
    found = {(row["file"], row["table"]): row["line"] for row in tune.winners(families, trials)}
    names = {"GemvConfig": GemvConfig, "Tile": Tile}
    entries = {place: eval(f"{{{line}}}", names) for place, line in found.items()}  # noqa: S307
    assert entries.pop(("custom_ops/weights/gemv.py", "GEMV_CONFIGS")) == {90: dataclasses.replace(best[families[0].name], groups=0)}
    assert entries == {
        ("custom_ops/tq4/attention.py", "DECODE_TILES"): {(90, TINY.full.dim): best["tq4 decode"]},
        ("custom_ops/attention/flash.py", "PREFILL_TILES"): {(90, TINY.sliding.dim): best["sliding prefill"]},
    }
    assert tune.winners(families, []) == []


def test_report(capsys):
    family = next(f for f in tune.families(H200, TINY) if f.name == "sliding decode")
    case, tiles = family.cases[0], family.candidates
    trials = [tune.Trial(family, case, tiles[0], 9.0), tune.Trial(family, case, tiles[1], 7.0),
              tune.Trial(family, case, tiles[2], failure="out of resource: shared memory"),
              tune.Trial(family, case, tiles[3], failure="wrong: error 1.00e+00")]  # fmt: skip
    tune.report(case, trials)
    lines = capsys.readouterr().out.splitlines()
    assert "2 timed, 1 wrong, 2 not timed" in lines[0]
    assert lines[1].split()[:2] == ["now", "9.00"] and lines[2].split()[:2] == ["best", "7.00"]
    assert any("1 x out of resource" in text for text in lines)


def test_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main([]) == 1 and "no usable NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [[], ["--tune"]])
def test_nothing_of_that_name(mode, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with compiling_for(H200):
        assert command.main([*mode, "--only", "no such op"]) == 2
    assert "nothing to time is called 'no such op'" in capsys.readouterr().err
