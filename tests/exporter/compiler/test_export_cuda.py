"""Compiling for GPUs that are not there: a complete artifact, code of the right architecture, nothing else in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kiln.custom_ops.geometry import GEOMETRIES
from kiln.custom_ops.gpu import contract
from kiln.custom_ops.gpu.cubin import kernels, most_registers, parameters
from kiln.custom_ops.weights.gemv import GEMV_CONFIGS, SUMS_CONFIGS
from kiln.exporter.artifact.verify import verify
from kiln.exporter.measure.runner import runner
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.tools.synth import write_synthetic
from tests.conftest import kiln
from tests.tools.cubins import architecture, cubins, registers
from tests.tools.drafters import draft_config, random_tensor, write_drafter

KILN_RUN = Path(runner())
TARGETS = ("sm_90", "sm_120")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A small model, a layer of each kind, of real head sizes and ratios, at 131,072 tokens with TurboQuant; weights stay in its file."""
    root = tmp_path_factory.mktemp("it's \"cuda\" (ö) $HOME")  # a compiler's command is made of such paths, see test_paths
    (root / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GEOMETRIES, "pair", dataclasses.replace(GEOMETRIES["tiny-cuda"], layers=2, full_every=2))
        write_synthetic(root / "model.gguf", "pair", "q4_k_m", 0)
    targets = [word for target in TARGETS for word in ("--target", target)]
    context = ("--max-seq-len", "131072", "--turboquant")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(root / "tmp"))
        result = kiln("export", "--gguf", root / "model.gguf", "--out", root / "artifact", *targets, *context)
    assert {entry.name for entry in root.iterdir()} == {"tmp", "model.gguf", "artifact"} and not list((root / "tmp").iterdir())
    print(result.stderr)
    return root / "artifact", result.stderr


def test_the_artifact_is_complete_and_has_nothing_twice(export):
    artifact, _ = export
    record = json.loads((artifact / "manifest.json").read_text())
    names = {"manifest.json", "weights.safetensors", "tokenizer.json", "model.gguf", *(f"model.{t}.pt2" for t in TARGETS)}
    assert {f.name for f in artifact.iterdir()} == names
    assert [(t["target"], t["device"], t["compute_capability"]) for t in record["targets"]] == [
        ("sm_90", "cuda", [9, 0]),
        ("sm_120", "cuda", [12, 0]),
    ]
    assert record["activation_dtype"] == "bfloat16" and record["kv_cache"] == "tq4"
    weights = (artifact / "weights.safetensors").stat().st_size
    total = sum(f.lstat().st_size for f in artifact.iterdir())
    kv = sum(b["bytes"] for b in record["kv"])
    assert kv > 200 << 20 and total < 60 << 20 and weights < 8192, "cache bytes or weights were packed"


def test_the_kernels_that_pack_are_there(export):
    """For the target, with the arguments that the runner gives: ten and two null pointers."""
    artifact, _ = export
    verify(artifact)
    for target in json.loads((artifact / "manifest.json").read_text())["targets"]:
        with zipfile.ZipFile(artifact / target["file"]) as package:
            for plane in ("words", "halves"):
                image = package.read(target["packing"][plane]["file"])
                assert architecture(image) == target["target"] and kernels(image) == [target["packing"][plane]["kernel"]]
                sizes = [p.end - p.begin for p in parameters(image, "kiln_pack_plane")]
                assert sizes == [8] * 4 + [4] * 6 + [8] * 2
                sizes = {"threads": 128, "rows": 128, "units": 4}
                assert target["packing"][plane].items() >= sizes.items()


def test_code_of_the_right_architecture(export):
    artifact, _ = export
    for target in TARGETS:
        images = cubins(artifact / f"model.{target}.pt2")
        assert set(images) == {"prefill", "decode"}
        for entry, found in images.items():
            assert len(found) > 20, entry
            assert {architecture(image) for image in found[:: len(found) // 4]} == {target}
    assert not set(images["decode"]) & set(cubins(artifact / "model.sm_90.pt2")["decode"])


def test_products_have_the_registers_that_were_asked_for(export):
    """Left alone the assembler takes few of them, and loads late."""
    artifact, _ = export
    images = cubins(artifact / "model.sm_90.pt2")["decode"]
    found = [(re.sub(r"_\d+$", "", name), most_registers(image, name), count)
             for image in images for name, count in registers(image).items() if name.startswith("kiln_gemv")]  # fmt: skip
    tables = {"kiln_gemv_sums": SUMS_CONFIGS, "kiln_gemv": GEMV_CONFIGS}
    asked = {kernel: {config.registers for config in configs.values()} for kernel, configs in tables.items()}
    assert len(found) > 3 and all(most in asked[kernel] and 0.6 * most < count <= most for kernel, most, count in found), found
    assert {kernel for kernel, _, _ in found} == set(asked)  # Q4_K; Q6_K, where no step of several tokens is beside


def test_memory_constants_and_paths(export):
    artifact, log = export
    record = json.loads((artifact / "manifest.json").read_text())
    constants = len(record["constants"]) + len(record["kv"])
    assert len(re.findall(rf"\b{constants} constants", log)) == 2 * len(TARGETS), "constants were merged or lost"
    assert float(re.search(r"peak memory of one process ([\d.]+) GiB", log)[1]) < 3
    for target in TARGETS:
        package = (artifact / f"model.{target}.pt2").read_bytes()
        assert b"kiln-work-" not in package and b"site-packages/torch" not in package


def theirs(images: list[bytes]) -> set[str]:
    """What kernels of the compiler's own do, by their names: no layer of a decode step has one, since they start late."""
    names = {name for image in images for name in kernels(image) if not name.startswith("kiln_")}
    return {re.sub(r"^decode_(\d_)?triton_poi_fused_|_\d+$", "", name) for name in names}


def test_no_layer_of_a_step_has_a_kernel_of_the_compilers(export):
    """The embedding's scale, the counters' zeros, the logits' cap."""
    images = cubins(export[0] / "model.sm_90.pt2")["decode"]
    assert {name.split("_")[0] for name in theirs(images)} == {"mul", "zeros", "abs"}


@pytest.mark.parametrize("target", [TARGETS[0], *(pytest.param(t, marks=pytest.mark.nightly) for t in TARGETS[1:])])
def test_kernels_that_may_start_early_wait(export, target):
    """In the machine code of the decode package: what the export has checked itself, and that there is something to check."""
    artifact, _ = export
    waits = json.loads((artifact / "manifest.json").read_text())["entry_points"]["decode"]["waits"]
    images = cubins(artifact / f"model.{target}.pt2")["decode"]
    found = [name for image in images for name in kernels(image) if name.startswith(tuple(waits))]
    assert {re.sub(r"_\d+$", "", name) for name in found} == {
        "kiln_gemv", "kiln_gemv_sums", "kiln_add_norm", "kiln_rope_table", "kiln_sliding_decode", "kiln_flash_merge", "kiln_tq4_prepare",
        "kiln_tq4_decode", "kiln_tq4_merge"}  # fmt: skip
    for image in images:
        assert contract.check(image) == []


def test_passes(export):
    artifact, _ = export
    record = json.loads((artifact / "manifest.json").read_text())
    assert all(p["expected"] == p["matches"] and not p["missed"] for p in record["passes"])
    assert [t["shortfalls"] for t in record["targets"]] == [[], []] and "sm_90" not in record["targets"][0]["borrowed"]
    status = {p["name"]: p["status"] for p in record["passes"]}
    assert status == {
        "index_copy": "applied",
        "turboquant": "applied",
        "kv_len": "applied",
        "chunked_lm_head": "not needed",  # the kernels read the packed head
        "fuse_decode": "applied",
        "own_matmul": "off",
        "packed_linear": "off",  # the CPU's
        "free_kv_buffers": "applied",
    }


@pytest.fixture(scope="module")
def fake_gpu(tmp_path_factory):
    """Runs kiln-run, or a program, over a driver and a cublasLt that only check what they are asked: its result, and what was left."""
    folder = tmp_path_factory.mktemp("fake")
    source = Path(__file__).parents[2] / "runtime" / "fake_cuda.c"
    for name, flags in (("libcuda.so.1", ["-DDRIVER"]), ("libcublasLt.so.13", [])):
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", *flags, source, "-o", folder / name], check=True)
    fakes = {"LD_LIBRARY_PATH": str(folder), "KILN_CUBLASLT": str(folder / "libcublasLt.so.13"), "FAKE_CUDA_REPORT": str(folder / "report")}

    def run(artifact: Path, *arguments: object, program: str = "", **environment: str) -> tuple[subprocess.CompletedProcess, dict]:
        (folder / "report").unlink(missing_ok=True)
        start = [sys.executable, "-c", program, artifact, artifact.parent / "model.gguf"] if program else [KILN_RUN, artifact]
        command = list(map(str, [*start, *arguments]))
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | fakes | environment)
        return result, json.loads((folder / "report").read_text())

    return run


LEFT = ("bytes", "streams", "events", "graphs", "modules", "handles", "ranges")


def test_it_plays_on_a_driver_without_a_gpu(export, fake_gpu):
    """Contexts, streams, captures, addresses and shapes of matmuls are right, and nothing is left behind; kernels do nothing here."""
    artifact, _ = export
    tokens = ",".join(map(str, range(2, 60)))
    for arguments in ((), ("--no-graph",), ("--device", "cuda:1"), ("--prefill-chunk", 1)):
        result, left = fake_gpu(artifact, "--tokens", tokens, "--max-new-tokens", 5, "--no-eog", "--json", "--memory", *arguments)
        assert result.returncode == 0, result.stderr
        record = json.loads(result.stdout)
        assert len(record["tokens"]) == 5 and record["device"] == ("cuda:1" if "cuda:1" in arguments else "cuda:0")
        assert not any(left[what] for what in LEFT), left
        assert (left["replays"] > 0) == ("--no-graph" not in arguments) and left["launches"] > 40
        assert record["memory"]["total"] <= left["most"] + (1 << 20)


SNAPSHOTS = """
import sys
import kiln

model = kiln.Model(sys.argv[1], device="cuda:1", weights=sys.argv[2])
a, b = (kiln.Session(model, prefill_chunk=64) for _ in range(2))
a.prefill(range(2, 60))
kept = [a.snapshot(whole=w, host=h) for w in (False, True) for h in (False, True)]
assert [s.on_device for s in kept] == [True, False] * 2 and kept[1].host_bytes == kept[0].host_bytes + kept[0].device_bytes
for snapshot in [*kept, *(s.to_host() for s in kept if s.on_device)]:
    for taker in (a, b):
        taker.restore(snapshot)
        assert taker.tokens == [*range(2, 60)]
        taker.prefill([7, 8])
        a.restore(kept[1])
    b.reset()
a.save(sys.argv[3])
b.restore(sys.argv[3])
assert b.tokens == a.tokens
each = kept[3].host_bytes  # all of it counts where the copies lie
assert each == kept[2].device_bytes + kept[2].host_bytes
on_device, on_host = 2 * each, 3 * each
store = kiln.SnapshotStore(on_device, on_host)
for i in range(8):
    a.rewind(0)
    a.prefill([i + 2, *range(9, 66)])
    assert store.take(a, str(i % 3), whole=True)
    counts = store.counts()
    assert 0 < counts["device_bytes"] <= on_device and counts["host_bytes"] <= on_host
assert counts["moved"] == 6 and counts["evicted"] > 0
found = [store.longest(b, [i + 2, *range(9, 67)], "x") for i in range(8)]
assert [s.on_device for s in found[-2:]] == [True, True] and not any(s and s.on_device for s in found[:-2])
for snapshot in found:
    if snapshot:
        b.restore(snapshot)
        b.prefill([5])
alone = kiln.SnapshotStore(each, 0)
assert alone.take(a, "x", whole=True) and alone.counts()["device_bytes"] == each and not alone.counts()["host_bytes"]
"""


def test_snapshots_on_a_driver_without_a_gpu(export, fake_gpu, tmp_path):
    """From the device to the host and back, between sessions and by a file: every copy lies in its caches, and nothing is left behind."""
    artifact, _ = export
    result, left = fake_gpu(artifact, tmp_path / "session", program=SNAPSHOTS)
    assert result.returncode == 0, result.stderr
    assert not any(left[what] for what in LEFT), left


def test_drivers_that_do_not_do(export, fake_gpu, tmp_path):
    artifact, _ = export
    for environment, message in (
        ({"FAKE_CUDA": "broken"}, "no usable GPU: the NVIDIA driver does not start: fake error"),
        ({"FAKE_CUDA_WITHOUT": "cuMemMap"}, "the NVIDIA driver has no cuMemMap of CUDA 10.2; update it"),
    ):
        result, left = fake_gpu(artifact, "--tokens", "5,6", **environment)
        assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not any(left[what] for what in LEFT), left
    # Without cublasLt: a clear line where a prompt needs it, and nothing where our own kernels multiply.
    used = tmp_path / "used"
    fake_gpu(artifact, "--tokens", "5,6", FAKE_CUBLASLT_USED=str(used))
    result, _ = fake_gpu(artifact, "--tokens", "5,6", KILN_CUBLASLT="/nowhere/libcublasLt.so")
    assert result.returncode == used.exists() and ("name the file libcublasLt.so.13 in KILN_CUBLASLT" in result.stderr) == used.exists()
    result, _ = fake_gpu(artifact, "--tokens", "5,6", "--max-new-tokens", 2, FAKE_CUDA_WITHOUT="cuGraphGetEdges")
    assert result.returncode == 0 and "note: no early launch in the decode graph" in result.stderr


@pytest.fixture(scope="module")
def of_rows(tmp_path_factory):
    """The same model with steps of up to 8 tokens over 3 timelines, and with a drafter."""
    root = tmp_path_factory.mktemp("rows")
    write_synthetic(root / "model.gguf", "tiny-cuda", "q4_k_m", 0)
    config = draft_config("tiny-assistant", from_gguf(open_gguf(root / "model.gguf")), hidden=128, ffn=128, heads=4)
    write_drafter(config, root / "drafter.gguf", "Q8_0", random_tensor)
    kiln("export", "--gguf", root / "model.gguf", "--out", root / "artifact", "--target", "sm_90", "--max-seq-len", 4096, "--turboquant",
         "--decode-rows", "1,2,4,8", "--rows", 3, "--draft-gguf", root / "drafter.gguf")  # fmt: skip
    return root / "artifact"


@pytest.mark.nightly
def test_steps_of_several_tokens_are_fused(of_rows):
    """Every place of the model, in kernels of several tokens whose machine code waits as it is declared."""
    record = json.loads((of_rows / "manifest.json").read_text())
    entries = record["entry_points"]
    assert list(entries) == ["prefill", "decode", "decode_2", "decode_4", "decode_8", "draft"] and record["rows"] == 3
    assert all(p["expected"] == p["matches"] and not p["missed"] for p in record["passes"])  # of the last entry
    images = cubins(of_rows / "model.sm_90.pt2")
    assert [finding for image in images["draft"] for finding in contract.check(image)] == []
    for entry in ("decode_2", "decode_4", "decode_8"):
        found = {re.sub(r"_\d+$", "", name) for image in images[entry] for name in kernels(image) if name.startswith("kiln_")}
        waiting = {name for name in found if name.startswith(tuple(entries[entry]["waits"]))}
        assert waiting == {"kiln_gemv_sums", "kiln_add_norm", "kiln_rope_table", "kiln_sliding_decode", "kiln_flash_merge",
                           "kiln_tq4_prepare_rows", "kiln_tq4_decode_rows", "kiln_tq4_merge"}  # fmt: skip
        assert found - waiting == {"kiln_dequantize", "kiln_row_maxima", "kiln_weigh_bins", "kiln_settle_bins", "kiln_choose"}
        assert len(theirs(images[entry])) < 6, theirs(images[entry])
        assert [finding for image in images[entry] for finding in contract.check(image)] == []


BATCH = """
import sys
import kiln

model = kiln.Model(sys.argv[1], device="cuda:1", weights=sys.argv[2])
for graph in (True, False):
    batch = kiln.Batch(model, prefill_chunk=64, keep_logits=True, graph=graph)
    for m in (1, 2, 4, 8):
        for places in (list(range(60, 60 + m)), [0] * m), ([70] * m, [i % 3 for i in range(m)]):
            sampled, logits, _ = batch.probe([5 + i for i in range(m)], *places, times=3)
            assert len(sampled) == m and logits.shape == (m, model.vocab_size)
    for i in range(3):
        drafting = {"draft": "mtp", "draft_length": 2, "draft_fixed": True} if i else {}
        batch.join([5, *range(9, 9 + 40 * i)], max_new_tokens=6, stop_at_eog=False, **drafting)
    while batch.active:
        assert not any(error for *_, error in batch.step())
    assert sum(batch.draft_counts["tried"]) > 0
    del batch
    session = kiln.Session(model, prefill_chunk=64, graph=graph)
    session.prefill([5, 6, 7])
    session.generate(12, stop_at_eog=False, draft="mtp", draft_length=3, draft_fixed=True)
    assert sum(session.draft_counts["tried"]) > 0 and len(session.probe_drafts(7)[0]) > 0
"""


@pytest.mark.nightly
def test_a_batch_plays_on_a_driver_without_a_gpu(of_rows, fake_gpu):
    result, left = fake_gpu(of_rows, program=BATCH)
    assert result.returncode == 0, result.stderr
    assert not any(left[what] for what in LEFT) and left["replays"] > 0, left


@pytest.mark.nightly  # three minutes: two more exports
@pytest.mark.parametrize("cache", ["f16", "tq4"])
def test_a_hybrid(cache, fake_gpu, tmp_path, monkeypatch):
    """Delta rules, gated attention and experts beside a gated network: nothing is left unfused, and states are copied where they lie."""
    monkeypatch.setitem(GEOMETRIES, "pair", dataclasses.replace(GEOMETRIES["qwen35-moe-tiny"], layers=2, full_every=2))
    write_synthetic(tmp_path / "model.gguf", "pair", "q4_k_m", 0)
    artifact = tmp_path / "artifact"
    kiln("export", "--gguf", tmp_path / "model.gguf", "--out", artifact, "--target", "sm_90", "--kv-cache", cache, "--max-seq-len", 512,
         "--prefill-chunk", 128)  # fmt: skip
    record = json.loads((artifact / "manifest.json").read_text())
    assert all(p["expected"] == p["matches"] and not p["missed"] for p in record["passes"])
    images = cubins(artifact / "model.sm_90.pt2")
    names = {entry: {re.sub(r"_\d+$", "", n) for image in found for n in kernels(image)} for entry, found in images.items()}
    assert {"kiln_delta_decode", "kiln_choose_experts", "kiln_chosen_sum"} <= names["decode"] and "kiln_delta_step" not in names["decode"]
    assert {"kiln_delta_heads", "kiln_delta_blocks", "kiln_delta_states", "kiln_delta_outputs"} <= names["prefill"]
    assert all(contract.check(image) == [] for image in images["decode"])
    for arguments in ((), ("--no-graph",)):
        result, left = fake_gpu(artifact, "--tokens", ",".join(map(str, range(2, 260))), "--max-new-tokens", 5, "--no-eog", *arguments)
        assert result.returncode == 0 and not any(left[what] for what in LEFT), (result.stderr, left)
    result, left = fake_gpu(artifact, tmp_path / "session", program=SNAPSHOTS)
    assert result.returncode == 0 and not any(left[what] for what in LEFT), (result.stderr, left)
