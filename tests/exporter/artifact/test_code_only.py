"""Artifacts of code alone: played with the weights of their file they give the bits of copied weights, with another file's those of that
one; whatever a file may not have otherwise is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.artifact import show
from kiln.exporter.artifact.mapping import directory_sha256, metadata_record, value_sha256
from kiln.exporter.artifact.rebind import rebind
from kiln.exporter.artifact.verify import verify
from kiln.exporter.errors import KilnError
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from tests.code_only import code_only, with_weights
from tests.exporter.source.test_gguf import split
from tests.gguf_files import WIDE, rewrite
from tests.runtime.toy import fails, run
from tests.timeline import FIXTURES
from tests.tools.rebuild import complete

TOKENS = ",".join(map(str, range(2, 40)))


@pytest.fixture(scope="module")
def copied(artifacts) -> Path:
    return artifacts["tq4"]


@pytest.fixture(scope="module")
def code(copied, tmp_path_factory) -> Path:
    return code_only(copied, WIDE, tmp_path_factory.mktemp("code") / "artifact", hash_weights=True)


def rows(artifact: Path, out: Path, *arguments: object) -> bytes:
    result = run(artifact, "--tokens", TOKENS, "--max-new-tokens", 6, "--no-eog", "--logits", out, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) == 6
    return out.read_bytes()


def other_weights(path: Path) -> Path:
    """Every matrix of WIDE with its rows in another order: another model of the same shapes and types."""
    gguf, rng = open_gguf(WIDE), np.random.default_rng(3)
    changed = {
        t.name: (t.shape, t.type, rng.permutation(gguf.data(t.name)))
        for t in gguf.tensors.values()
        if t.type in LAYOUTS and t.name != "token_embd.weight"
    }
    return rewrite(path, set_tensors=changed)


MODELS = [path for path in sorted(FIXTURES.glob("*.gguf")) if not {"assistant", "vocab"} & set(path.stem.split("-"))]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_an_artifact_knows_every_key_of_its_own_file(path: Path) -> None:
    """Also those that its family may have and it does not need: the length of dense layers in a model of experts alone."""
    gguf = open_gguf(path)
    record = metadata_record(read_plan(path))
    checked = (key for key in gguf.metadata if any(fnmatchcase(key, pattern) for pattern in record["checked"]))
    assert not [key for key in checked if key not in record["equal"] and not any(fnmatchcase(key, pattern) for pattern in record["free"])]


def test_the_manifest_and_the_packages_are_all_that_travels(code, tmp_path):
    sent = tmp_path / "sent"
    sent.mkdir()
    manifest = json.loads((code / "manifest.json").read_text())
    for name in ("manifest.json", *(target["file"] for target in manifest["targets"])):
        shutil.copy(code / name, sent / name)
    made = complete(sent, WIDE, tmp_path / "made")
    for name in ("tokenizer.json", "weights.safetensors"):
        assert (made / name).read_bytes() == (code / name).read_bytes()
    assert rows(made, tmp_path / "got", "--weights", WIDE) == rows(code, tmp_path / "want", "--weights", WIDE)


def test_the_same_bits_as_copied_weights(code, copied, tmp_path):
    want = rows(copied, tmp_path / "want")
    assert rows(code, tmp_path / "got", "--weights", WIDE, "--verify") == want
    parts = split(tmp_path, WIDE, 3)
    for part in parts:
        assert rows(code, tmp_path / "got", "--weights", part) == want
    shutil.copy(WIDE, tmp_path / "renamed")
    assert rows(code, tmp_path / "got", "--weights", tmp_path / "renamed") == want
    parts[1].unlink()
    fails("missing part 2 of 3 of the split model", code, "--tokens", 5, "--weights", parts[0])


def test_another_file_of_the_same_model(code, copied, tmp_path):
    other = other_weights(tmp_path / "other.gguf")
    want = rows(with_weights(copied, other, tmp_path / "copied"), tmp_path / "want")
    assert rows(code, tmp_path / "got", "--weights", other) == want != rows(copied, tmp_path / "first")
    fails("tensor blk.0.attn_k.weight has other values than in the file that the artifact was made of: another file, or damaged", code,
          "--tokens", 5, "--weights", other, "--verify")  # fmt: skip
    vector = "blk.1.attn_norm.weight"
    half = rewrite(
        tmp_path / "half.gguf", set_tensors={vector: ((256,), "F16", open_gguf(WIDE).data(vector).reshape(-1).view("<f4").astype("<f2"))}
    )
    want = rows(with_weights(copied, half, tmp_path / "half"), tmp_path / "want")
    assert rows(code, tmp_path / "got", "--weights", half) == want  # a vector becomes float32 whatever float type it has


def zeros(shape: tuple[int, ...], kind: str) -> tuple:
    layout = LAYOUTS[kind]
    return shape, kind, np.zeros((shape[0], shape[1] // layout.block * layout.block_bytes), np.uint8)


def tensor(name: str, *changed: object) -> dict:
    return {"set_tensors": {name: changed[0] if len(changed) == 1 else changed}}


def key(name: str, value_type: GGUFValueType, value: object) -> dict:
    return {"set_keys": {name: (value_type, value)}}


DOWN, BIAS = "blk.1.ffn_down.weight", "blk.0.attn_q.bias"
F32, F64, TEXT, I32 = GGUFValueType.FLOAT32, GGUFValueType.FLOAT64, GGUFValueType.STRING, GGUFValueType.INT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensor(DOWN, zeros((256, 512), "Q8_0")), f"tensor {DOWN} is of type Q8_0, the artifact was made for"),
        (tensor(DOWN, zeros((256, 768), "Q4_K")), f"tensor {DOWN} has shape [256, 768], the artifact was made for"),
        ({"drop": [DOWN]}, f"tensor {DOWN} is missing"),
        (tensor(BIAS, (4,), "F32", np.zeros(4, np.float32)), f"tensor {BIAS} is there, of which the artifact knows nothing"),
        (tensor("rope_freqs.weight", (64,), "F32", np.full(64, 2, np.float32)), "tensor rope_freqs.weight has other values"),
        (key("gemma4.rope.freq_base", F32, 5e5), "metadata key gemma4.rope.freq_base has another value"),
        (key("gemma4.rope.freq_base", F64, 1e6), "metadata key gemma4.rope.freq_base has another value"),
        (key("gemma4.rope.scaling.factor", F32, 8.0), "metadata key gemma4.rope.scaling.factor is there, of which"),
        (key("tokenizer.ggml.pre", TEXT, "x"), "metadata key tokenizer.ggml.pre is there, which it is not in the file"),
        (key("tokenizer.ggml.suppress_tokens", I32, [7]), "metadata key tokenizer.ggml.suppress_tokens is there"),
        ({"drop": ["gemma4.final_logit_softcapping"]}, "metadata key gemma4.final_logit_softcapping is missing"),
    ],
)
def test_what_may_not_differ(code, tmp_path, change, message):
    fails(message, code, "--tokens", 5, "--weights", rewrite(tmp_path / "m.gguf", **change))


def test_what_may_differ(code, tmp_path):
    keys = {
        "general.name": (GGUFValueType.STRING, "a fine-tune"),
        "tokenizer.ggml.padding_token_id": (GGUFValueType.UINT32, 3),
        "gemma4.vision.block_count": (GGUFValueType.UINT32, 3),
        "other.key": (GGUFValueType.UINT32, 3),
    }
    file = rewrite(tmp_path / "m.gguf", set_keys=keys, set_tensors={"v.patch": ((4,), "F32", np.zeros(4, np.float32))})
    result = run(code, "--tokens", 5, "--max-new-tokens", 2, "--weights", file)
    assert result.returncode == 0 and "note" not in result.stderr, result.stderr
    file = rewrite(tmp_path / "m.gguf", set_keys={"tokenizer.chat_template": (GGUFValueType.STRING, "{{ 1 }}")})
    result = run(code, "--tokens", 5, "--max-new-tokens", 2, "--weights", file)
    assert result.returncode == 0
    assert "kiln-run: note: " in result.stderr and "metadata key tokenizer.chat_template differs from that of the file" in result.stderr


def test_numbers_that_are_not_finite_are_named(code, tmp_path):
    """In a fused matrix: of which tensor, and which row of it."""
    gguf = open_gguf(WIDE)
    name = next(n for n in gguf.tensors if n.startswith("blk.0.ffn_up"))
    info, blocks = gguf.tensors[name], gguf.data(name).copy()
    blocks[5, 0:2] = np.frombuffer(np.float16("inf").tobytes(), np.uint8)
    file = rewrite(tmp_path / "m.gguf", set_tensors={name: (info.shape, info.type, blocks)})
    result = run(code, "--tokens", TOKENS, "--weights", file)
    assert result.returncode == 1 and f"(row 5 of tensor {name})" in result.stderr, result.stderr
    assert "are not finite" in result.stderr and "'blk.0.ffn_gate_up.halves' has a number that is not finite" in result.stderr


def test_limits_of_keys_come_with_float16_caches(copied, tmp_path):
    """A norm beyond what float16 holds: export refuses it, and so does the runner for another file."""
    name = "blk.0.attn_k_norm.weight"
    artifact = code_only(copied, WIDE, tmp_path / "artifact", limits={name: 100.0})
    info = open_gguf(WIDE).tensors[name]
    file = rewrite(tmp_path / "m.gguf", set_tensors={name: (info.shape, "F32", np.full(info.shape, 101, np.float32))})
    fails(f"tensor {name}, element 0: 101, the artifact's caches hold what at most 100 makes", artifact, "--tokens", 5, "--weights", file)
    assert run(artifact, "--tokens", 5, "--max-new-tokens", 2, "--weights", WIDE).returncode == 0


def test_inspect_and_verify(code, copied):
    assert verify(code) == [] and verify(copied) == []
    assert f"in a GGUF file as {WIDE.name} (85 tensors)" in show.text(show.artifact(code, verify=False))
    size = sum(f.stat().st_size for f in code.iterdir())
    assert size < sum(f.stat().st_size for f in copied.iterdir()) - 1_500_000


def test_what_the_manifest_says(code):
    manifest, gguf = json.loads((code / "manifest.json").read_text()), open_gguf(WIDE)
    found = manifest["weights"]["gguf"]
    assert found["directory"] == directory_sha256(gguf) and all("sha256" in t for t in found["tensors"])
    assert [t["name"] for t in found["tensors"] if t.get("fixed")] == ["rope_freqs.weight"]
    equal = found["metadata"]["equal"]
    assert equal["gemma4.block_count"] == value_sha256(gguf, "gemma4.block_count") and equal["tokenizer.ggml.pre"] is None
    assert "general.name" not in equal
    made = {source for c in manifest["constants"] for source in c.get("source", {}).get("tensors", ())}
    assert made | {"rope_freqs.weight"} == set(gguf.tensors)


def test_rebind(code, copied, tmp_path):
    """The same code for a file with another tokenizer and name: its own artifact, in the time of a copy."""
    file = rewrite(
        tmp_path / "m.gguf",
        set_keys={"general.name": (GGUFValueType.STRING, "other"), "tokenizer.ggml.eot_token_id": (GGUFValueType.UINT32, 9)},
    )
    fails("metadata key tokenizer.ggml.eot_token_id is there", code, "--tokens", 5, "--weights", file)
    rebind(code, read_plan(file), tmp_path / "own")
    assert rows(tmp_path / "own", tmp_path / "got", "--weights", file) == rows(copied, tmp_path / "want")
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert manifest["source"]["name"] == "other" and 9 in manifest["tokenizer"]["eog"] and verify(tmp_path / "own") == []
    with pytest.raises(KilnError, match="the code at .* is of another model: .* differs"):
        rebind(code, read_plan(WIDE.with_name("gemma4-tiny-dense-wide-Q6_K.gguf")), tmp_path / "none")
    with pytest.raises(KilnError, match="holds weights, not code alone"):
        rebind(copied, read_plan(file), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_usage():
    from tests.conftest import kiln

    command = ("export", "--gguf", WIDE, "--out", "x", "--hash-weights", "--weights", "copy")
    result: subprocess.CompletedProcess = kiln(*command, check=False)
    assert result.returncode == 2 and "it does not go with --weights copy" in result.stderr
