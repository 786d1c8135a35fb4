"""Artifacts that are damaged, of another version or for another machine: one line says what, where and what to do."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import kiln
from tests.runtime.toy import MAX_SEQ, PROMPT, VOCAB, WIDTH, change, fails, ids, run


def test_not_an_artifact(toy, tmp_path):
    fails("no such directory", tmp_path / "missing", "--tokens", "1")
    fails("it has no manifest.json", tmp_path, "--tokens", "1")
    fails("has no tokenizer", toy, "--prompt", "hello")
    fails("30 tokens, the artifact holds 24", toy, "--tokens", ids([1] * 30))
    fails("token 61 is outside", toy, "--tokens", "61")


def test_other_format_version(copy):
    change(copy, lambda m: m.update(format_version=1))
    fails("the artifact has format version 1, this runner reads 2; export the model again", copy, "--tokens", "1")
    change(copy, lambda m: m.update(format_version=3))
    fails("the artifact has format version 3, this runner reads 2; use a newer runner", copy, "--tokens", "1")
    change(copy, lambda m: m.update(format="other"))
    fails("not a kiln artifact", copy, "--tokens", "1")
    (copy / "manifest.json").write_text("{")
    fails("not valid JSON", copy, "--tokens", "1")


def test_the_torch_that_compiled_it_does_not_matter(copy):
    change(copy, lambda m: m["producer"].update(torch="99.0.0"))
    assert run(copy, "--tokens", "1").returncode == 0


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
    fails("model.pt2: damaged: SHA-256 is", copy, "--tokens", "1")  # code is always checked


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
    change(copy, lambda m: m["kv"][0].update(behind=3))
    fails("kv 'ring': a ring that is 3 positions behind", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][1].update(behind=-1))
    fails("'behind' must be an integer >= 0", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(layer=-1))
    fails("'layer' must be an integer >= 0", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(dtype="float16"))
    fails("wants 'ring' as bfloat16, the manifest has float16", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(shape=[1 << 40, WIDTH], bytes=(1 << 40) * WIDTH * 2))
    fails("bytes) free; export with a smaller --max-seq-len", copy, "--tokens", "1")


def test_targets(copy, device):
    if device == "cuda":
        change(copy, lambda m: m["targets"][0].update(target="sm_10", compute_capability=[1, 0]))
        fails("the artifact has: sm_10. Export with --target sm_", copy, "--tokens", "1")
        fails("this machine has", copy, "--tokens", "1", "--device", "cuda:99")
        return
    with pytest.raises(kiln.Error, match="unknown device 'tpu'"):
        kiln.Model(str(copy), device="tpu")
    change(copy, lambda m: m["targets"][0].update(target="sm_90", device="cuda", compute_capability=[9, 0]))
    fails("no CPU target; the artifact has: sm_90. Export with --target cpu", copy, "--tokens", "1", "--device", "cpu")
    change(copy, lambda m: m["targets"][0].update(target="sm_10", compute_capability=[1, 0]))
    fails("the artifact has: sm_10" if torch.cuda.is_available() else "has targets sm_10, but no usable GPU", copy, "--tokens", "1")


def test_package_cut_short(copy):
    package = copy / "model.pt2"
    package.write_bytes(package.read_bytes()[:-10])
    fails("model.pt2", copy, "--tokens", "1")


def repack(artifact: Path, data: bytes) -> None:
    """`data` as the code package, with a manifest that agrees."""
    (artifact / "model.pt2").write_bytes(data)
    change(artifact, lambda m: m["targets"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def archive(files: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two files with one name
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, data in files:
                archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def test_packages_with_other_files(copy):
    with zipfile.ZipFile(copy / "model.pt2") as package:
        good = [(name, package.read(name)) for name in package.namelist()]
    assert [name for name, _ in good] == ["prefill.so", "decode.so"]
    prefill, decode = good
    for files, message in (
        ([*good, ("../evil.so", b"x")], "has '../evil.so', which the manifest does not name"),
        ([*good, ("/etc/evil.so", b"x")], "has '/etc/evil.so', which the manifest does not name"),
        ([*good, decode], "two files have one name"),
        ([prefill], "has no decode.so, which the manifest names"),
        ([("prefill.cpp", b"int main() {}"), ("decode.cpp", b"int main() {}")], "has no decode.so, which the manifest names"),
        ([prefill, ("decode.so", b"int main() {}")], "cannot open the compiled model"),
        ([prefill, ("decode.so", b"")], "cannot open the compiled model"),
        ([], "has no decode.so"),
    ):
        repack(copy, archive(files))
        fails(message, copy, "--tokens", "1")
    repack(copy, archive(good))
    assert run(copy, "--tokens", "1").returncode == 0


def test_archives_of_other_kinds(copy):
    with zipfile.ZipFile(copy / "model.pt2") as package:
        good = [(name, package.read(name)) for name in package.namelist()]
    plain = archive(good)
    for data, message in (
        (archive(good, zipfile.ZIP_DEFLATED), "a file in it is compressed or encrypted"),
        (b"#!/bin/sh\n" + plain, "its directory is not where it should be"),
        (plain + b"\0", "no zip archive"),
        (b"", "no zip archive"),
        (plain[:-22] + plain[-22:].replace(b"\2\0\2\0", b"\3\0\3\0"), "its directory is damaged"),
        (plain[-22:], "its directory is not where it should be"),
        (plain.replace(b"decode.so", b"decode.sx", 1), "another name in the directory"),
    ):
        repack(copy, data) if data else (copy / "model.pt2").write_bytes(data)
        if not data:
            change(copy, lambda m: m["targets"][0].update(bytes=1, sha256=hashlib.sha256(b"").hexdigest()))
            message = "model.pt2: 0 bytes, the manifest says 1"
        fails(message, copy, "--tokens", "1")


def test_a_library_that_was_not_made_for_this_runner(copy, tmp_path):
    library = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", library], input=b"int f(void) { return 1; }", check=True)
    repack(copy, archive([("prefill.so", library.read_bytes()), ("decode.so", library.read_bytes())]))
    fails("decode: not compiled for this runner; export the model again", copy, "--tokens", "1")


def test_a_manifest_beside_another_models_package(copy):
    """Names and dtypes agree, shapes do not: what the code was compiled for decides."""
    change(copy, lambda m: m["kv"][1].update(shape=[WIDTH, MAX_SEQ]))
    fails(f"wants 'cache' as [{MAX_SEQ}, {WIDTH}], the manifest has [{WIDTH}, {MAX_SEQ}]", copy, "--tokens", "1")


def test_entry_points(copy):
    original = (copy / "manifest.json").read_text()
    for edit, message in (
        (lambda e: e.pop("decode"), "'entry_points': has no 'decode'"),
        (lambda e: e.update({"../x": e["decode"]}), "'../x' is not a name of lower-case letters, digits and _"),
        (lambda e: e.update(verify=e["decode"]), "has no verify.so, which the manifest names"),
        (lambda e: e["decode"]["inputs"].pop(), "takes 6 inputs and gives 2, the manifest says 5 and 2"),
    ):
        change(copy, lambda m, edit=edit: edit(m["entry_points"]))
        fails(message, copy, "--tokens", "1")
        (copy / "manifest.json").write_text(original)


def test_folders_for_code_without_memory_files(copy, tmp_path):
    """KILN_TMPDIR serves where the kernel has no memory files; nothing stays in it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = run(copy, "--tokens", "1", env={"KILN_NO_MEMFD": "1", "KILN_TMPDIR": str(scratch)})
    assert result.returncode == 0, result.stderr
    assert not list(scratch.iterdir())
    fails("cannot make a folder in", copy, "--tokens", "1", env={"KILN_NO_MEMFD": "1", "KILN_TMPDIR": str(tmp_path / "missing")})
