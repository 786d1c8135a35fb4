"""Artifacts on a GPU through kiln-run and the Python module: accuracy, graph replay, sessions."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kiln.exporter.compiler.packing_kernel import compile_packing
from kiln.exporter.tools.synth import write_synthetic
from tests.code_only import add_to_package, code_only
from tests.conftest import kiln, shared
from tests.exporter.artifact.test_artifact import ids, run
from tests.runtime.toy import change
from tests.sessions import interleaved_equal_solo
from tests.timeline import CHUNK, FIXTURES, GREEDY, fixture_logits, fixture_tokens, graph_spec, weights, worst
from tests.tools.rebuild import complete

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TINY = FIXTURES / "gemma4-tiny-dense.gguf"
WAYS = {"one batch": 96, "chunks": CHUNK, "token by token": 1}


MODELS = {  # name -> GGUF, options of the export
    "float32": (TINY, "--activation-dtype", "float32", "--max-seq-len", 96, "--prefill-chunk", 96, "--weights", "copy"),
    "bfloat16": (TINY, "--activation-dtype", "bfloat16", "--max-seq-len", 96, "--prefill-chunk", 96, "--weights", "copy"),
    "tq4": ("tiny-cuda.gguf", "--max-seq-len", 4096, "--prefill-chunk", 1024, "--turboquant", "--weights", "copy"),
}


@pytest.fixture(scope="session")
def gpu(tmp_path_factory):
    """Artifacts for the GPU of this machine: float32 and bfloat16 activations, and TurboQuant at the real head sizes.

    KILN_TEST_COMPILED names a directory with their manifests and code, compiled elsewhere; what is not there is exported here.
    """

    def make(root: Path) -> None:
        root.mkdir()
        compiled = Path(os.environ.get("KILN_TEST_COMPILED", root / "none"))
        write_synthetic(root / "tiny-cuda.gguf", "tiny-cuda", "q4_k_m", 0)
        for name, (gguf, *options) in MODELS.items():
            if (compiled / name).is_dir():
                complete(compiled / name, root / gguf, root / name)
            else:
                kiln("export", "--gguf", root / gguf, "--out", root / name, "--target", "native", *options)

    return shared(tmp_path_factory, "gpu-artifacts", make)


def logits_of(artifact: Path, chunk: int, tmp_path: Path) -> dict[int, torch.Tensor]:
    tokens, out = fixture_tokens(), tmp_path / "logits.f32"
    run(artifact, "--tokens", ids(tokens), "--max-new-tokens", 1, "--prefill-chunk", chunk, "--json", "--logits", out)
    rows = torch.from_numpy(np.fromfile(out, np.float32)).view(-1, fixture_logits().shape[1])
    return dict(zip([min(start + chunk, 80) - 1 for start in range(0, 80, chunk)], rows, strict=True))


def eager_bf16(tmp_path: Path) -> torch.Tensor:
    """Every position's logits by the plain decoder with bfloat16 activations."""
    model = dataclasses.replace(graph_spec(TINY, dtype="bfloat16"), cache="bfloat16").model()
    model.load_state_dict(weights(TINY, tmp_path), strict=False)
    with torch.inference_mode():
        return torch.stack([model(t[None], torch.tensor([i]), *GREEDY)[1][0] for i, t in enumerate(fixture_tokens())])


def relative(rows: torch.Tensor, reference: torch.Tensor) -> float:
    return ((rows - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("way", WAYS)
def test_float32(gpu, way, tmp_path):
    rows = logits_of(gpu / "float32", WAYS[way], tmp_path)
    error = worst(rows, fixture_logits())
    print(f"float32, {way}: max |dlogit| {error:.2e}")
    assert error < 3e-4


def test_bfloat16_is_no_worse_than_eager(gpu, tmp_path):
    reference = fixture_logits()
    eager = eager_bf16(tmp_path)
    rows = {way: logits_of(gpu / "bfloat16", chunk, tmp_path) for way, chunk in WAYS.items()}
    every = torch.stack([rows["token by token"][i] for i in range(80)])
    got, want = relative(every, reference), relative(eager, reference)
    print(
        f"bfloat16: relative error {got:.4f}, max |dlogit| {(every - reference).abs().max():.3f}; eager bfloat16 {want:.4f}, "
        f"{(eager - reference).abs().max():.3f}; argmax agreement {(every.argmax(1) == reference.argmax(1)).float().mean():.3f}"
    )
    assert got <= 1.2 * want
    for way, found in rows.items():
        for i, row in found.items():
            assert relative(row, reference[i]) < 3 * want, (way, i)


def generate(artifact: Path, *options) -> dict:
    tokens = torch.arange(1500) * 7919 % 500 + 6
    return json.loads(run(artifact, "--tokens", ids(tokens), "--max-new-tokens", 48, "--no-eog", "--json", *options).stdout)


def test_greedy_repeats_and_graph_replay_equals_direct_calls(gpu, tmp_path):
    answers = [generate(gpu / "tq4")["tokens"] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2] and len(set(answers[0])) > 3
    files = [tmp_path / "graph", tmp_path / "direct"]
    generate(gpu / "tq4", "--logits", files[0])
    generate(gpu / "tq4", "--logits", files[1], "--no-graph")
    replayed, direct = (np.fromfile(f, np.float32) for f in files)
    assert np.isfinite(replayed).all() and np.array_equal(replayed, direct)


def test_early_launch_changes_no_bit(gpu, tmp_path):
    waits = json.loads((gpu / "tq4" / "manifest.json").read_text())["entry_points"]["decode"].get("waits", [])
    rows, early = {}, {}
    for name, options in {"plain": ("--no-early-launch",), "first": (), "second": ()}.items():
        early[name] = generate(gpu / "tq4", "--memory", "--logits", tmp_path / name, *options)["early_launches"]
        rows[name] = np.fromfile(tmp_path / name, np.float32)
    print(f"early launches: {early}; kernels that wait: {waits}")
    assert early["plain"] == 0 and (early["first"] > 0) == (bool(waits) and torch.cuda.get_device_capability() >= (9, 0))
    assert np.array_equal(rows["first"], rows["plain"]) and np.array_equal(rows["second"], rows["plain"])


def test_sampling_is_reproducible(gpu):
    options = ("--temperature", 1.0, "--top-k", 64, "--top-p", 0.95, "--seed")
    a, b, c = (generate(gpu / "tq4", *options, seed)["tokens"] for seed in (1, 1, 2))
    assert a == b != c


def test_chunkings_agree(gpu, tmp_path):
    answers = {chunk: generate(gpu / "tq4", "--prefill-chunk", chunk, "--logits", tmp_path / str(chunk)) for chunk in (1024, 300, 1)}
    vocab = json.loads((gpu / "tq4" / "manifest.json").read_text())["config"]["vocab_size"]
    last = {c: np.fromfile(tmp_path / str(c), np.float32).reshape(-1, vocab)[-48] for c in answers}
    for chunk in (300, 1):
        error = np.linalg.norm(last[chunk] - last[1024]) / np.linalg.norm(last[1024])
        print(f"chunks of {chunk} against 1024: relative difference of the first answer's logits {error:.4f}")
        assert error < 0.03  # the reference in bfloat16 differs by 0.015 among chunkings


def test_sessions_interleaved_equal_solo(gpu):
    import kiln as runtime

    assert interleaved_equal_solo(runtime.Model(str(gpu / "tq4")), [[2, *range(10 + i, 300 + 40 * i)] for i in range(2)], 20)


def test_bench_says_its_share_of_the_ceilings(gpu):
    """Which are measured after the runner has ended, by the one function that measures them."""
    record = json.loads(kiln("bench", gpu / "tq4", "--depths", "128,2048", "--steps", 8, "--json").stdout)
    ceilings = record["ceilings"]
    print(ceilings)
    assert 0 < ceilings["matmul_sustained_tflop_s"] < 1.1 * ceilings["matmul_tflop_s"]
    assert 0.5 < ceilings["copy_gb_s"] / ceilings["read_gb_s"] < 2
    for row in record["depths"]:
        assert 0 < row["decode"]["percent"] < 100 and 0 < row["prefill"]["percent"] < 100


def test_memory_report(gpu):
    """The parts are the manifest's and add up to what is used; both of the report's forms say the same."""
    manifest = json.loads((gpu / "tq4" / "manifest.json").read_text())
    result = run(gpu / "tq4", "--tokens", "2,3", "--max-new-tokens", 2, "--memory", "--json")
    memory = json.loads(result.stdout)["memory"]
    print(memory, result.stderr)
    kv = {kind: sum(b["bytes"] for b in manifest["kv"] if b["kind"] == kind) for kind in ("ring", "global", "prefix")}
    assert memory["weights"] == sum(c["bytes"] for c in manifest["constants"])
    assert (memory["kv_ring"], memory["kv_global"]) == (kv["ring"], kv["global"] + kv["prefix"])
    assert memory["activations"] > 0 and memory["total"] == sum(size for part, size in memory.items() if part != "total")
    text = run(gpu / "tq4", "--tokens", "2,3", "--max-new-tokens", 2, "--memory").stderr
    for part, name in (("weights", "weights"), ("KV ring", "kv_ring"), ("KV global", "kv_global")):
        assert f"{part} {memory[name] / 1e9:.3f} GB" in text, text
    assert re.search(r"decode graph: \d+ kernels start early", text), text


def test_weights_left_in_the_file(gpu, tmp_path):
    """Packed on the GPU while they are loaded they are the bits of the copied ones, and so is what is played."""
    import kiln as runner

    artifact, file = code_only(gpu / "tq4", gpu / "tiny-cuda.gguf", tmp_path / "code"), gpu / "tiny-cuda.gguf"

    def with_kernels(manifest: dict) -> None:
        (target,) = manifest["targets"]
        compiled = compile_packing(target["target"], tmp_path / "triton")
        target["packing"] = {k.plane: k.record for k in compiled}
        add_to_package(artifact, target, {k.record["file"]: k.image for k in compiled})

    change(artifact, with_kernels)
    models = [runner.Model(str(gpu / "tq4")), runner.Model(str(artifact), weights=str(file))]
    want, got = ({name: device_bytes(*place) for name, place in model.weight_memory().items()} for model in models)
    assert want.keys() == got.keys() and [name for name in want if not torch.equal(want[name], got[name])] == []
    rows = []
    for model in models:
        session = runner.Session(model)
        seen: list[np.ndarray] = []
        session.set_logits_sink(seen.append)
        session.prefill(list(range(2, 300)))
        session.generate(8, stop_at_eog=False)
        rows.append(np.stack(seen))
    np.testing.assert_array_equal(rows[0], rows[1])


def device_bytes(address: int, size: int) -> torch.Tensor:
    """What lies at an address of the GPU, copied to the host."""
    out = torch.empty(size, dtype=torch.uint8)
    torch.cuda.synchronize()  # makes the GPU's context current
    copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoH_v2
    assert copy(ctypes.c_void_p(out.data_ptr()), ctypes.c_uint64(address), ctypes.c_size_t(size)) == 0
    return out
