"""The compiled artifact end to end on the CPU: AOTInductor, the C++ runner, its Python module; logits against the reference."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import kiln as kiln_module
from kiln.exporter.measure.runner import runner
from kiln.passes.pipeline import PIPELINE
from tests.conftest import kiln
from tests.timeline import CHUNK, TOLERANCE, WINDOW, all_ways, fixture_logits, fixture_tokens, worst

RUNNER = Path(runner())


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run([str(RUNNER), *map(str, arguments)], capture_output=True, text=True)
    if check and result.returncode:
        raise AssertionError(f"kiln-run gave {result.returncode}: {result.stderr}")
    return result


def manifest(artifact: Path) -> dict:
    return json.loads((artifact / "manifest.json").read_text())


def ids(tokens: torch.Tensor) -> str:
    return ",".join(map(str, tokens.tolist()))


def test_session(artifacts):
    """Both compiled graphs over one copy of the weights and of the caches, from Python, every call with its own tokens."""
    model = kiln_module.Model(str(artifacts["plain"]), "cpu")

    def start():
        session = kiln_module.Session(model)

        def call(tokens, pos, *_):
            assert session.position == pos[0]
            session.decode(int(tokens)) if len(tokens) == 1 else session.prefill(tokens.tolist())
            return None, torch.from_numpy(session.logits())[None]

        return call, call

    for way, rows in all_ways(start, fixture_tokens()).items():
        error = worst(rows, fixture_logits())
        print(f"{way}: max |dlogit| {error:.2e}")
        assert error <= TOLERANCE, way


@pytest.mark.parametrize("way", ["one batch", "chunks", "token by token"])
def test_kiln_run_logits(artifacts, way, tmp_path):
    tokens, reference = fixture_tokens(), fixture_logits()
    chunk = {"one batch": 96, "chunks": CHUNK, "token by token": 1}[way]
    for length in (2, WINDOW, WINDOW + 1, 3 * WINDOW + 5, 80) if way == "one batch" else (80,):
        out = tmp_path / "logits.f32"
        result = run(
            artifacts["plain"],
            "--tokens",
            ids(tokens[:length]),
            "--raw",
            "--max-new-tokens",
            1,
            "--prefill-chunk",
            chunk,
            "--json",
            "--logits",
            out,
        )
        record = json.loads(result.stdout)
        rows = torch.from_numpy(np.fromfile(out, np.float32)).view(-1, reference.shape[1])
        ends = [min(start + chunk, length) - 1 for start in range(0, length, chunk)]
        assert len(rows) == len(ends)
        error = worst(dict(zip(ends, rows, strict=True)), reference)
        print(f"{way} of {length}: max |dlogit| {error:.2e}")
        assert error <= TOLERANCE
        assert len(record["prompt_tokens"]) == length and record["tokens"] == [reference[length - 1].argmax().item()]


def test_turboquant_artifact_generates_the_same_in_every_chunking(artifacts):
    tokens = ids(fixture_tokens("gemma4-tiny-dense-wide")[:50])
    common = (artifacts["tq4"], "--tokens", tokens, "--max-new-tokens", 30, "--no-eog", "--json")
    answers = [json.loads(run(*common, "--prefill-chunk", chunk).stdout)["tokens"] for chunk in (96, CHUNK, 1)]
    assert len(answers[0]) == 30 and answers[0] == answers[1] == answers[2]


def test_sampling_is_reproducible_and_seeded(artifacts):
    common = (
        artifacts["tq4"],
        "--tokens",
        "2,9,20",
        "--max-new-tokens",
        20,
        "--no-eog",
        "--json",
        "--temperature",
        1.5,
        "--top-k",
        50,
        "--top-p",
        0.95,
    )
    a, b, c = (json.loads(run(*common, "--seed", seed).stdout)["tokens"] for seed in (1, 1, 2))
    assert a == b != c


def test_text_streams_and_reports_speed(artifacts):
    command = (artifacts["tq4"], "--raw", "--prompt", "hot kiln", "--max-new-tokens", 16, "--no-eog")
    answer, result = json.loads(run(*command, "--json").stdout), run(*command)
    assert len(answer["tokens"]) == 16 and result.stdout == answer["text"] + "\n" != "\n"
    speeds = [float(x) for x in re.findall(r"([\d.]+) tok/s", result.stderr)]
    assert len(speeds) == 2 and min(speeds) > 0, result.stderr  # of the prompt and of the answer


def test_python_module(artifacts):
    import kiln as runtime

    model = runtime.Model(str(artifacts["plain"]))
    one, two = runtime.Session(model), runtime.Session(model)
    tokens = fixture_tokens().tolist()
    one.prefill(tokens)
    two.prefill(tokens[:10])  # another timeline must not disturb the first
    assert torch.allclose(torch.from_numpy(np.array(one.logits())), fixture_logits()[79], atol=TOLERANCE)
    two.prefill(tokens[10:])
    assert np.allclose(one.logits(), two.logits(), atol=2 * TOLERANCE)


def test_manifest(artifacts):
    result = kiln("inspect", artifacts["tq4"], "--json", "--verify")
    record = json.loads(result.stdout)
    assert [p["name"] for p in record["passes"]] == [name for name, _ in PIPELINE]
    assert [p["status"] for p in record["passes"]] == ["applied", "applied", "applied", "not needed", "off", "off", "applied", "applied"]
    assert [(p["expected"], p["matches"], p["missed"]) for p in record["passes"]] == [(n, n, []) for n in (12, 2, 2, 0, 0, 0, 27, 22)]
    assert record["targets"][0]["shortfalls"] == [] and record["targets"][0]["borrowed"] == {}
    assert record["format_version"] == 2 and record["kv_cache"] == "tq4" and record["tokenizer"]["eog"]
    assert record["residual_length"] == 32 and json.loads((artifacts["plain"] / "manifest.json").read_text())["residual_length"] is None
    rings = [kv for kv in record["kv"] if kv["name"].endswith("_exact")]
    assert [(kv["kind"], kv["dtype"], kv["shape"][0]) for kv in rings] == [("ring", "float32", 32)] * 4
    centers = [kv for kv in record["kv"] if kv["kind"] == "prefix"]
    assert record["key_center"] == 24 and [(kv["dtype"], len(kv["shape"]), kv["behind"]) for kv in centers] == [("float32", 2, 23)] * 2
    assert {kv["name"].rpartition(".")[2]: kv["behind"] for kv in record["kv"] if "behind" in kv} == {
        "k_center": 23, "k_codes": 31, "k_scales": 31}  # fmt: skip
    note = "residual length 32, keys less the mean of the first 24"
    assert re.search(f"pass    turboquant .* 2/2 +{note}\n", kiln("inspect", artifacts["tq4"]).stdout)
    fused = {q["name"]: q for q in record["quantization"]}
    qkv = fused["blk.0.attn_qkv"]
    assert qkv["sources"] == [f"blk.0.attn_{x}.weight" for x in "qkv"] and qkv["bits_per_weight"] == 4.5
    assert "blk.3.attn_qk" in fused and "blk.3.attn_v" in fused  # V is Q6_K there


def test_nothing_is_stored_twice_and_no_cache_at_all(artifacts):
    for name, linked in (("plain", ["gemma4-tiny-dense.gguf"]), ("tq4", [])):
        record, directory = manifest(artifacts[name]), artifacts[name]
        names = sorted(f.name for f in directory.iterdir())
        assert names == [*linked, "manifest.json", "model.pt2", "tokenizer.json", "weights.safetensors"]
        held = [c for c in record["constants"] if "source" not in c]
        assert linked or held == record["constants"]
        size = sum(c["bytes"] for c in held)
        assert size <= record["weights"]["bytes"] < size + 256 * len(held) + (64 << 10)
        assert not {b["name"] for b in record["kv"]} & {c["name"] for c in record["constants"]}
        assert len({c["sha256"] for c in held if c["bytes"] > 4}) == sum(c["bytes"] > 4 for c in held)


def test_no_build_path_in_the_package(artifacts):
    package = (artifacts["plain"] / "model.pt2").read_bytes()  # the archive stores, it does not compress
    for word in (str(Path(torch.__file__).parent).encode(), b".partial", str(Path.home()).encode(), b"/tmp/"):
        assert word not in package, word


class TestInspectOfBadArtifacts:
    """One clear line, exit code 1. What the runner says of them: tests/runtime/artifact/test_refused.py."""

    @pytest.fixture()
    def copy(self, artifacts, tmp_path):
        return Path(shutil.copytree(artifacts["tq4"], tmp_path / "artifact"))

    def fails(self, *arguments, match: str):
        result = kiln("inspect", *arguments, check=False)
        assert result.returncode == 1 and match in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr

    def test_another_format_version(self, copy):
        (copy / "manifest.json").write_text(json.dumps(manifest(copy) | {"format_version": 1}))
        self.fails(copy, match="version 1")

    def test_weights_cut_short(self, copy):
        with (copy / "weights.safetensors").open("r+b") as f:
            f.truncate(1 << 20)
        self.fails(copy, "--verify", match="weights.safetensors")

    def test_one_flipped_byte(self, copy):
        constant = manifest(copy)["constants"][7]
        with (copy / "weights.safetensors").open("r+b") as f:
            f.seek(constant["offset"] + constant["bytes"] // 2)
            byte = f.read(1)[0]
            f.seek(-1, 1)
            f.write(bytes([byte ^ 1]))
        self.fails(copy, "--verify", match=constant["name"])
