"""`kiln bench`: depths, the table, the record, what the work costs by the manifest; the parts of the kernel profile that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kiln.exporter.artifact.cost import cost
from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.artifact.record import kv_record
from kiln.exporter.errors import KilnError
from kiln.exporter.measure import bench, bench_command, kernel_times, picture
from kiln.exporter.measure.runner import runner
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.model.records import Experts
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.weights import WeightPlan, plan_constants, plan_weights
from kiln.exporter.tools.synth import write_synthetic
from kiln.passes.records import PassOptions
from tests.conftest import kiln

RUNNER = Path(runner())
SLOTS = 131072


@pytest.fixture(scope="module")
def record(artifacts, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    options = ("--depths", "48,16,96,16", "--steps", 8, "--prefill-chunk", 24, "--threads", 1, "--json", "--out", out)
    printed = json.loads(kiln("bench", artifacts["tq4"], *options).stdout)
    assert json.loads(out.read_text()) == printed
    return printed


def test_depths(record):
    """Sorted, each once; the last one moved before max_seq_len; the timed call is a whole chunk, or the prompt when that is shorter."""
    rows = record["depths"]
    assert [row["depth"] for row in rows] == [16, 48, 96]
    assert [row["position"] for row in rows] == [16, 48, 96 - 8 - 4]
    assert [(row["prefill"]["start"], row["prefill"]["tokens"]) for row in rows] == [(0, 16), (24, 24), (60, 24)]
    assert [row["decode"]["start"] for row in rows] == [20, 52, 88]
    assert rows[1]["prompt"]["tokens"] == 48  # one chunk to fill, one that is timed
    assert rows[2]["prompt"]["tokens"] == 84 - 12  # decode filled 12 of them


def test_rates(record):
    for row in record["depths"]:
        decode, prefill = row["decode"], row["prefill"]
        assert len(decode["windows"]) == decode["steps"] == 8 and min(decode["windows"]) > 0
        assert decode["tok_s"] == pytest.approx(sum(sorted(decode["windows"])[3:5]) / 2, rel=1e-4)
        assert min(decode["windows"]) <= decode["p10"] <= decode["tok_s"] <= decode["p90"] <= max(decode["windows"])
        assert prefill["tok_s"] == pytest.approx(prefill["tokens"] / prefill["seconds"], rel=1e-4)
        assert prefill["tflop_s"] == pytest.approx(prefill["flops"] / prefill["seconds"] / 1e12)
        assert decode["gb_s"] == pytest.approx((decode["weight_bytes"] + decode["kv_bytes"]) * decode["tok_s"] / 1e9)
    assert record["load_s"] > 0 and record["first_chunk"]["tokens"] == 24 and record["first_chunk"]["cold_s"] > 0
    assert record["ceilings"] is None and record["device"] == "cpu" and record["device_name"]


def test_costs_of_the_artifact(record, artifacts):
    """The tied head is read with everything else; a ring of 16 slots is full at every depth, the exact window of 32 from the second on."""
    manifest = json.loads((artifacts["tq4"] / "manifest.json").read_text())
    memory = record["memory"]
    assert memory["weights"] == sum(c["bytes"] for c in manifest["constants"])
    ring = sum(kv["bytes"] for kv in manifest["kv"] if kv["kind"] == "ring")
    assert memory["kv_ring"] == ring and memory["total"] == sum(v for k, v in memory.items() if k != "total")
    for row in record["depths"]:
        assert row["decode"]["weight_bytes"] == memory["weights"]
        middle = row["decode"]["start"] + 4
        exact_window = sum(kv["bytes"] for kv in manifest["kv"] if kv["name"].endswith("_exact"))
        assert manifest["residual_length"] == 32 and 0 < exact_window < ring
        center = sum(kv["bytes"] for kv in manifest["kv"] if kv["kind"] == "prefix")
        assert manifest["key_center"] == 24 and center == 2 * 128 * 4 and center < memory["kv_global"]
        read = center + (memory["kv_global"] - center) * max(middle - 32, 0) // 96 + exact_window * min(middle, 32) // 32
        assert row["decode"]["kv_bytes"] == ring - exact_window + read


def test_table_and_default_depths(artifacts):
    done = kiln("bench", artifacts["plain"], "--steps", 2, "--threads", 1)
    assert "* 96: measured at 90, so that the decode steps fit" in done.stdout
    assert "KV cache float32" in done.stdout and "load " in done.stdout
    done = subprocess.run([str(RUNNER), str(artifacts["plain"]), "--bench", "--depths", "8", "--steps", "2", "--threads", "1"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "decode tok/s" in done.stdout and "memory: weights" in done.stdout


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"depths": "16,x"}, "must be integers"),
        ({"depths": "97"}, "depth 97: the artifact holds 1 to 96 tokens"),
        ({"depths": "16,0"}, "depth 0"),
        ({"steps": 92}, "92 steps"),
        ({"prefill_chunk": 97}, "prefill chunk 97"),
        ({"profile": True, "device": "cpu"}, "needs an NVIDIA GPU"),
        ({"profile": True, "picture": Path("speed.png")}, "run them apart"),
        ({"device": "tpu"}, "--device tpu: must be auto, cpu, cuda or cuda:N"),
        ({"out": Path("/nowhere/bench.json"), "depths": "4", "steps": 1}, "--out /nowhere/bench.json"),
        ({"rows": "1,x"}, "--rows 1,x: must be integers"),
        ({"rows": "1,2"}, "the artifact's steps are of 1 tokens; export it with --decode-rows"),
        ({"rows": "1"}, "leaves depths of 1 to 24"),
        ({"rows": "1", "steps": 96}, "leaves no depth for as many"),
        ({"rows": "1", "depths": "8", "picture": Path("speed.png")}, "neither --plot nor --prefill-chunk"),
    ],
)
def test_bad_input(artifacts, options, match):
    usual = dict.fromkeys(("depths", "prefill_chunk", "out", "picture"))
    usual |= {"steps": 64, "device": "auto", "threads": 1, "profile": False}
    with pytest.raises(KilnError, match=match) as error:
        bench_command.bench(artifacts["plain"], **usual | options)
    assert "\n" not in str(error.value)


def test_rows(artifacts):
    """Of an artifact of one timeline: steps of one token, in all three ways, and their table."""
    usual = dict.fromkeys(("prefill_chunk", "out", "picture")) | {"device": "cpu", "threads": 1, "profile": False}
    record, text = bench_command.bench(artifacts["plain"], depths="8,30", rows="1", steps=7, **usual)
    manifest = read_manifest(artifacts["plain"])
    assert [at["depth"] for at in record["depths"]] == [8, 30] and record["sessions"] == 1
    for at in record["depths"]:
        (row,) = at["rows"]
        for way in ("one session", "sessions", "batch"):
            part = row[way]
            assert part["of one"] == 1 and part["least"] <= part["ms"] <= part["most"] and part["tok_s"] == pytest.approx(1e3 / part["ms"])
            assert part["gb_s"] == pytest.approx((bench.weight_bytes(manifest) + bench.kv_bytes(manifest, at["depth"])) / part["ms"] / 1e6)
    assert [line.split()[:2] for line in text.splitlines()[2:]] == [["8", "1"], ["30", "1"]]


def test_bad_input_of_the_command(tmp_path):
    done = kiln("bench", tmp_path, check=False)
    assert done.returncode == 1 and "is not an artifact" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [("--bench", "--tokens", "1"), ("--depths", "16", "--tokens", "1"), ("--bench", "--depths", "1,"), ()])
def test_bad_usage_of_the_runner(artifacts, options):
    done = subprocess.run([str(RUNNER), str(artifacts["plain"]), *options], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


# ---- costs ----


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> dict:
    """What the costs need of the manifest of a Q4_K_M 31B with TurboQuant and 131,072 tokens."""
    path = tmp_path_factory.mktemp("31b") / "31b.gguf"
    write_synthetic(path, "gemma4-31b", "q4_k_m", 0, sparse=True)
    gguf = open_gguf(path)
    config = from_gguf(gguf)
    plan, options = plan_weights(config, gguf), PassOptions(turboquant=True)
    path.unlink()
    return {
        "cost": cost(config, plan),
        "plan": (config, plan),
        "max_seq_len": SLOTS,
        "residual_length": 256,
        "kv": [kv_record(b) for b in kv_plan(config, SLOTS, torch.bfloat16, options)],
    }


def test_costs_of_the_31b(big):
    """Against counts made by hand: 10 global layers of 4 x 512, 50 sliding ones of 16 x 256."""
    assert bench.weight_bytes(big) == pytest.approx(18.67e9, rel=1e-3)
    ring, exact_window = 50 * 2 * 1024 * 16 * 256 * 2, 10 * 2 * 256 * 4 * 512 * 2
    center = 10 * 4 * 512 * 4
    assert bench.kv_bytes(big, SLOTS) == ring + exact_window + center + 10 * 2 * (SLOTS - 256) * 4 * (256 + 2)
    assert bench.kv_bytes(big, 512) == ring // 2 + exact_window + center + 10 * 2 * 256 * 4 * (256 + 2)
    assert bench.kv_bytes(big, 128) == ring // 8 + exact_window // 2 + center
    layers = 2 * 5376 * (50 * (16384 + 8192) + 10 * (18432 + 16384) + 60 * 3 * 21504)
    head = 2 * 262144 * 5376
    sliding, full = 50 * 4 * 32 * 256, 10 * 4 * 32 * 512
    assert bench.prefill_flops(big, 0, 1) == layers + head + sliding + full
    assert bench.prefill_flops(big, 5000, 1) == layers + head + sliding * 1024 + full * 5001


def test_an_embedding_beside_the_head_is_not_read(big):
    config, plan = big["plan"]
    (words,) = (p for p in plan if p.name == "token_embd")
    untied = {**big, "cost": cost(replace(config, tied_head=False), [*plan, replace(words, name="output")])}
    row = sum(spec.nbytes for spec in plan_constants(words)) // 262144
    assert bench.weight_bytes(untied) == bench.weight_bytes(big) + row
    assert bench.prefill_flops(untied, 7, 9) == bench.prefill_flops(big, 7, 9)


def test_of_experts_those_that_a_token_uses_and_of_a_shared_cache_every_reader(big):
    """8 of 128 experts of inner size 704 in each of 60 layers; one layer reads the keys and values of another."""
    config, plan = big["plan"]
    experts = Experts(128, 8, 704, "gelu_tanh")
    layers = [replace(layer, ffn=experts) for layer in config.layers]
    layers[3] = replace(layers[3], mixer=replace(layers[3].mixer, kv_from=2))
    stacks = [WeightPlan(f"blk.{i}.ffn_down_exps", "BF16", 128 * 5376, 704, (), 128) for i in range(60)]
    found = cost(replace(config, layers=tuple(layers)), [*plan, *stacks])
    assert found["weight_bytes"] - big["cost"]["weight_bytes"] == 60 * 8 * 5376 * 704 * 2
    assert found["token_flops"] - big["cost"]["token_flops"] == 60 * 8 * 2 * 5376 * 704
    assert found["readers"] == {"blk.2.cache": 2}
    own, shared = ({**big, "cost": c, "kv": big["kv"][:1]} for c in (big["cost"], {**found, "readers": {"blk.0.cache": 3}}))
    assert bench.kv_bytes(shared, 700) == 3 * bench.kv_bytes(own, 700) > 0


def test_an_artifact_without_costs_is_refused(big):
    with pytest.raises(KilnError, match="export it again"):
        bench.weight_bytes({key: value for key, value in big.items() if key != "cost"})


@pytest.mark.parametrize("window", [None, 1, 5, 16])
def test_keys_attended(window):
    for start in (0, 3, 5, 40):
        for tokens in (1, 2, 30):
            counted = sum(1 for p in range(start, start + tokens) for key in range(p + 1) if window is None or p - key < window)
            assert bench.keys_attended(start, tokens, window) == counted


def test_share_of_the_ceilings(big):
    row = {"decode": {"start": 100, "steps": 8, "tok_s": 10.0}, "prefill": {"start": 0, "tokens": 64, "seconds": 0.5}}
    ceilings = {"copy_gb_s": 900.0, "read_gb_s": 1000.0, "matmul_tflop_s": 100.0}
    first = {"tokens": 2048, "warm_s": 0.25}
    bench.add_costs({"depths": [row], "ceilings": ceilings, "first_chunk": first}, big)
    assert row["decode"]["percent"] == pytest.approx((bench.weight_bytes(big) + bench.kv_bytes(big, 104)) * 10 / 1e9 / 1000 * 100)
    assert row["prefill"]["percent"] == pytest.approx(bench.prefill_flops(big, 0, 64) / 0.5 / 1e12)
    assert first["tok_s"] == 8192 and first["percent"] == pytest.approx(bench.prefill_flops(big, 0, 2048) / 0.25 / 1e12)


# ---- pictures and profiles ----


def test_plot(record, tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot(record, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KilnError, match="--plot .*speed.nonsense"):
        bench.plot(record, tmp_path / "speed.nonsense")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KilnError, match="pip install matplotlib"):
        picture.check_plot()


def test_kernel_rows():
    def event(name, us, grid=None, cat="kernel"):
        return {"ph": "X", "cat": cat, "name": name, "dur": us, "args": {"grid": grid} if grid else {}}

    trace = {
        "traceEvents": [
            event("kiln_gemv", 10.0, [126, 21, 1]),
            event("kiln_gemv", 12.0, [126, 21, 1]),
            event("kiln_gemv", 30.0, [42, 64, 1]),
            event("kiln_gemv", 34.0, [42, 64, 1]),
            event("triton_poi_fused_add_3", 2.0, [5, 1, 1]),
            event("triton_poi_fused_mul_4", 2.0, [5, 1, 1]),
            event("Memcpy DtoD (Device -> Device)", 1.0, cat="gpu_memcpy"),
            event("cudaLaunchKernel", 99.0, cat="cuda_runtime"),
            {"ph": "M", "name": "process_name"},
        ]
    }
    rows = kernel_times.kernel_rows(trace, 2)
    longest = [("kiln_gemv", [42, 64, 1], 1, 32.0), ("kiln_gemv", [126, 21, 1], 1, 11.0)]
    assert [(r["kernel"], r["grid"], r["count"], r["us"]) for r in rows[:2]] == longest
    assert sum(r["us"] for r in rows) == 45.5
    sums = {r["family"]: (r["count"], r["us"]) for r in kernel_times.families(rows)}
    assert sums == {"kiln_gemv": (2, 43.0), "fused pointwise": (1, 2.0), "Memcpy": (0.5, 0.5)}
    part = kernel_times._part("decode", 2048, 1, True, 50.0, trace, 2)
    text = kernel_times.text({"model": "m", "device_name": "d", "target": "sm_90", "kv_cache": "tq4", "profiles": [part]})
    assert "kernels 45.5 us" in text and "rest 4.5" in text and "[42, 64, 1]" in text


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("kiln_tq4_decode", "kiln_tq4_decode"),
        ("kiln_gemv_7", "kiln_gemv"),
        ("triton_red_fused_mean_rsqrt_12", "fused reduction"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<long>>", "torch"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_family(kernel, name):
    assert kernel_times.family(kernel) == name
