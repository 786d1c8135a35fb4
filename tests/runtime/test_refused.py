"""Artifacts that are damaged, of another version or for another machine: one line says what, where and what to do."""

from __future__ import annotations

import json

import torch

from tests.runtime.toy import PROMPT, VOCAB, WIDTH, change, fails, ids, run


def test_not_an_artifact(toy, tmp_path):
    fails("no such directory", tmp_path / "missing", "--tokens", "1")
    fails("it has no manifest.json", tmp_path, "--tokens", "1")
    fails("has no tokenizer", toy, "--prompt", "hello")
    fails("30 tokens, the artifact holds 24", toy, "--tokens", ids([1] * 30))
    fails("token 61 is outside", toy, "--tokens", "61")


def test_other_format_version(copy):
    change(copy, lambda m: m.update(format_version=2))
    fails("the artifact has format version 2, this runner reads 1", copy, "--tokens", "1")
    change(copy, lambda m: m.update(format="other"))
    fails("not a kiln artifact", copy, "--tokens", "1")
    (copy / "manifest.json").write_text("{")
    fails("not valid JSON", copy, "--tokens", "1")


def test_newer_torch(copy):
    change(copy, lambda m: m["producer"].update(torch="99.0.0"))
    fails("compiled with torch 99.0.0", copy, "--tokens", "1")


def test_weights_cut_short(copy):
    weights = copy / "weights.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-100])
    fails(f"{len(raw) - 100} bytes, the manifest says {len(raw)}: the file was cut short", copy, "--tokens", "1")
    weights.unlink()
    fails("weights.safetensors", copy, "--tokens", "1")


def test_flipped_bytes_are_found_by_verify(copy):
    good = run(copy, "--tokens", ids(PROMPT), "--verify", "--json")
    assert good.returncode == 0, good.stderr
    manifest = json.loads((copy / "manifest.json").read_text())
    weights = copy / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    for constant in reversed(manifest["constants"]):  # each time an earlier one is damaged too
        raw[constant["offset"] + constant["bytes"] - 1] ^= 1
        weights.write_bytes(raw)
        fails(f"tensor '{constant['name']}' has SHA-256", copy, "--tokens", "1", "--verify")
    package = bytearray((copy / "model.pt2").read_bytes())
    package[len(package) // 2] ^= 1
    (copy / "model.pt2").write_bytes(package)
    fails("model.pt2: damaged", copy, "--tokens", "1", "--verify")


def test_weights_that_are_not_the_manifests(copy):
    original = (copy / "manifest.json").read_text()
    for edit, message in (
        (lambda c: c.update(name="embedding"), "tensor 'embedding' of the manifest is missing"),
        (lambda c: c.update(dtype="int32"), "'embed' has dtype F32, the manifest says I32"),
        (lambda c: c.update(shape=[WIDTH, VOCAB]), f"'embed' has shape [{VOCAB}, {WIDTH}], the manifest says [{WIDTH}, {VOCAB}]"),
        (lambda c: c.update(offset=c["offset"] + 256), "the manifest says"),
        (lambda c: c.update(shape=[VOCAB, WIDTH + 1]), "takes 2196 bytes, 'bytes' says 1952"),
    ):
        change(copy, lambda m, e=edit: e(m["constants"][0]))
        fails(message, copy, "--tokens", "1")
        (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["constants"].pop())
    fails("is not in the manifest", copy, "--tokens", "1")


def test_constants_that_are_not_the_models(copy):
    original = (copy / "manifest.json").read_text()
    change(copy, lambda m: m["kv"].pop())
    fails("uses the constant 'cache', which the manifest does not name", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"].append(m["kv"][0] | {"name": "spare"}))
    fails("names 'spare', which the compiled models do not use", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(kind="sponge"))
    fails("kv 'ring': unknown kind 'sponge'", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(layer=-1))
    fails("'layer' must be an integer >= 0", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(dtype="float16"))
    fails("wants 'ring' as BFloat16, the manifest has Half", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(shape=[1 << 40, WIDTH], bytes=(1 << 40) * WIDTH * 2))
    fails("bytes) free; export with a smaller --max-seq-len", copy, "--tokens", "1")


def test_targets(copy, device):
    if device == "cuda":
        change(copy, lambda m: m["targets"][0].update(target="sm_10", compute_capability=[1, 0]))
        fails("the artifact has: sm_10. Export with --target sm_", copy, "--tokens", "1")
        fails("this machine has", copy, "--tokens", "1", "--device", "cuda:99")
        return
    fails("unknown device 'tpu'", copy, "--tokens", "1", "--device", "tpu")
    change(copy, lambda m: m["targets"][0].update(target="sm_90", device="cuda", compute_capability=[9, 0]))
    fails("no CPU target; the artifact has: sm_90. Export with --target cpu", copy, "--tokens", "1", "--device", "cpu")
    change(copy, lambda m: m["targets"][0].update(target="sm_10", compute_capability=[1, 0]))
    fails("the artifact has: sm_10" if torch.cuda.is_available() else "has targets sm_10, but no usable GPU", copy, "--tokens", "1")


def test_package_cut_short(copy):
    package = copy / "model.pt2"
    package.write_bytes(package.read_bytes()[:-10])
    fails("model.pt2", copy, "--tokens", "1")
