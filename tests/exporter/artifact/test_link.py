"""Weights that stay in their file: an artifact's link to it, from `kiln export` to what plays, moves, replaces or looks at the folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFValueType

import kiln
from kiln.exporter import build
from kiln.exporter.artifact import output
from kiln.exporter.artifact.link import is_weights, link_weights
from kiln.exporter.artifact.manifest import weights_record
from kiln.exporter.artifact.output import check_output, staged
from kiln.exporter.artifact.verify import verify
from kiln.exporter.cli import main
from kiln.exporter.compiler import host, workers
from kiln.exporter.errors import KilnError
from kiln.exporter.progress import size_text
from kiln.exporter.source.gguf import open_gguf, same_model
from tests.conftest import kiln as command
from tests.exporter.source.test_gguf import split
from tests.gguf_files import FIXTURES, rewrite
from tests.runtime.toy import change, fails, run

ROOT = Path(__file__).parents[3]
TINY = FIXTURES / "gemma4-tiny-dense.gguf"
NEITHER = "which is neither in this folder nor beside it"
GONE = "to which this folder's link leads no more"
PLAY = ("--tokens", "2,5,9,11", "--max-new-tokens", 4, "--no-eog", "--json", "--device", "cpu")

Export = Callable[..., Result]


@pytest.fixture
def export(artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Export:
    """`kiln export` of a file like TINY, but for the compiler: its code is that of an artifact that is there."""
    plain = artifacts["plain"]

    def compile_target(spec, target, path, *others, **more):
        shutil.copy(plain / "model.pt2", path)
        return SimpleNamespace(entries=[SimpleNamespace(kv=spec.caches("prefill"), peak_rss=0)])

    def write_manifest(stage, spec, source, compiled, records, tokenizer, chat, waits, gguf, drafter):
        weights = weights_record(stage / "weights.safetensors", records) | ({"gguf": gguf} if gguf else {})
        manifest = json.loads((plain / "manifest.json").read_text()) | {"constants": records, "weights": weights}
        (stage / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8", errors="replace")

    monkeypatch.setattr(build, "compile_target", compile_target)
    monkeypatch.setattr(build, "write_manifest", write_manifest)
    monkeypatch.setattr(workers, "prepare", lambda: None)
    monkeypatch.setattr(host, "check_compiler", lambda folder: None)
    common = ("--target", "cpu", "--max-seq-len", "96", "--prefill-chunk", "96")

    def run_it(gguf: Path, out: Path, *options: str) -> Result:
        return CliRunner().invoke(main, ["export", "--gguf", str(gguf), "--out", str(out), *common, *options])

    return run_it


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return Path(shutil.copy(TINY, folder / "m.gguf"))


@pytest.fixture
def made(export: Export, gguf: Path, tmp_path: Path) -> Path:
    """The artifact of `gguf`, far from it."""
    out = tmp_path / "far" / "away" / "art"
    result = export(gguf, out)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def want(artifacts: dict[str, Path]) -> bytes:
    return logits(artifacts["plain"], "--weights", TINY)


def logits(artifact: Path, *arguments: object) -> bytes:
    """Of each step that kiln-run makes."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(artifact, *PLAY, "--logits", Path(folder, "rows"), *arguments)
        assert result.returncode == 0, result.stderr
        return Path(folder, "rows").read_bytes()


def others(export_result: Result) -> list[str]:
    """What an export says at its end, behind its size."""
    lines = export_result.stderr.splitlines()
    return lines[next(i for i, line in enumerate(lines) if "peak memory of one process" in line) + 1 :]


# ---- made, and played ----


def test_everything_plays_without_another_option(artifacts, want):
    """The whole command, not only its link: `plain` was compiled by it. The C interface, bench, chat and serve play it in their tests."""
    plain = artifacts["plain"]
    assert os.readlink(plain / TINY.name) == str(TINY.resolve())
    assert logits(plain) == want
    played = json.loads(command("run", plain, *PLAY).stdout)["tokens"]
    session = kiln.Session(kiln.Model(str(plain), device="cpu"))
    session.prefill([2, 5, 9, 11])
    assert session.generate(4, stop_at_eog=False)[0] == played
    assert json.loads(command("bench", plain, "--depths", 8, "--steps", 2, "--json", "--device", "cpu").stdout)["depths"]


def test_the_end_of_an_export_says_where_they_are(export, gguf, tmp_path):
    result = export(gguf, tmp_path / "art")
    assert result.exit_code == 0 and others(result) == [f"weights stay in {gguf}"]
    assert sorted(f.name for f in (tmp_path / "art").iterdir()) == [
        "m.gguf", "manifest.json", "model.pt2", "tokenizer.json", "weights.safetensors"
    ]  # fmt: skip
    size = sum(f.lstat().st_size for f in (tmp_path / "art").iterdir())
    assert f"{tmp_path / 'art'}: {size_text(size)} in " in result.stderr
    copied = export(gguf, tmp_path / "copied", "--weights", "copy")
    assert copied.exit_code == 0 and others(copied) == [] and not (tmp_path / "copied" / "m.gguf").exists()


def test_the_link_is_to_the_file_itself(export, gguf, want, tmp_path, monkeypatch):
    """However the file was named: from the current directory, by a link, through a linked folder."""
    (tmp_path / "named.gguf").symlink_to("models/m.gguf")
    (tmp_path / "folder").symlink_to("models")
    monkeypatch.chdir(gguf.parent)
    for i, name in enumerate((Path("m.gguf"), Path("../named.gguf"), tmp_path / "folder" / "m.gguf")):
        out = tmp_path / f"art{i}"
        assert export(name, out).exit_code == 0
        assert os.readlink(out / name.name) == str(gguf) and logits(out) == want
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export(gguf, Path(".")).exit_code == 0 and logits(Path(".")) == want  # files are moved there one by one
    assert os.readlink("m.gguf") == str(gguf)


def test_a_split_model(export, want, tmp_path):
    """Any part is given; parts may be links to files of other names, as a downloader's cache has them."""
    (tmp_path / "parts").mkdir()
    parts = split(tmp_path / "parts", TINY, 3)
    for i, given in enumerate((parts[0], parts[2])):
        out = tmp_path / f"art{i}"
        result = export(given, out)
        assert others(result) == [f"weights stay in {given} and the other 2 parts"]
        assert {f.name: os.readlink(f) for f in out.iterdir() if f.is_symlink()} == {part.name: str(part) for part in parts}
        assert logits(out) == want and verify(out) == []
    (tmp_path / "snapshot").mkdir()
    for i, part in enumerate(parts):
        blob = part.rename(tmp_path / f"blob{i}")
        (tmp_path / "snapshot" / part.name).symlink_to(blob)
    assert export(tmp_path / "snapshot" / parts[1].name, tmp_path / "art").exit_code == 0
    assert os.readlink(tmp_path / "art" / parts[2].name) == str(tmp_path / "blob2") and logits(tmp_path / "art") == want
    fails(GONE, tmp_path / "art0", *PLAY)
    (tmp_path / "blob1").unlink()
    for part in parts:
        part.symlink_to(tmp_path / "snapshot" / part.name)
    fails(f"{tmp_path / 'art0' / parts[1].name}: missing part 2 of 3", tmp_path / "art0", *PLAY)


def test_a_split_model_by_another_name(export, want, tmp_path):
    (tmp_path / "parts").mkdir()
    parts = split(tmp_path / "parts", TINY, 2)
    (tmp_path / "model.gguf").symlink_to(parts[0])
    result = export(tmp_path / "model.gguf", tmp_path / "art")
    assert others(result) == [f"weights stay in {parts[0]} and the other 1 part"]
    assert [f.name for f in (tmp_path / "art").iterdir() if f.is_symlink()] == ["model.gguf"] and logits(tmp_path / "art") == want


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "tokenizer.json", "model.pt2"])
def test_a_file_with_a_name_that_the_artifact_needs(export, gguf, want, tmp_path, name):
    """It is not written to, and is told as any link that cannot be made."""
    odd = gguf.rename(gguf.with_name(name))
    before = odd.read_bytes()
    result = export(odd, tmp_path / "art")
    assert result.exit_code == 0 and odd.read_bytes() == before
    told = f"weights stay in {odd}; {tmp_path / 'art'} cannot hold a link to it (File exists): play it with --weights {odd}"
    assert others(result) == [told] and not (tmp_path / "art" / name).is_symlink()
    assert logits(tmp_path / "art", "--weights", odd) == want and verify(tmp_path / "art") == []


@pytest.mark.parametrize("name", [b"\xff\xfe.gguf", "窯 'ä\".gguf".encode(), b"new\nline", b"n" * 255], ids=range(4))
def test_any_name(export, gguf, want, tmp_path, name):
    odd = gguf.rename(gguf.with_name(os.fsdecode(name)))
    result = export(odd, tmp_path / "art")
    assert result.exit_code == 0 and len(others(result)) == 1 and logits(tmp_path / "art") == want
    assert verify(tmp_path / "art") == []
    assert export(odd, tmp_path / "art", "--force").exit_code == 0 and odd.exists()


def test_a_file_system_without_links(export, gguf, want, tmp_path, monkeypatch):
    def refused(self, *arguments, **more):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(self))

    monkeypatch.setattr(Path, "symlink_to", refused)
    out = tmp_path / "art"
    result = export(gguf, out)
    assert result.exit_code == 0
    told = f"weights stay in {gguf}; {out} cannot hold a link to it (Operation not permitted): play it with --weights {gguf}"
    assert others(result) == [told] and not (out / "m.gguf").is_symlink()
    fails(NEITHER, out, *PLAY)
    assert logits(out, "--weights", gguf) == want


def test_all_links_or_none(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    parts = split(tmp_path / "parts", TINY, 3)
    model = open_gguf(parts[0])
    parts[2].unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        link_weights(tmp_path / "out", model)
    assert not list((tmp_path / "out").iterdir())


def test_numbers_that_are_not_finite_are_refused_as_in_a_copy(export, tmp_path):
    norm = open_gguf(TINY).tensors["blk.1.attn_norm.weight"]
    values = np.ones(norm.shape, np.float32)
    values[3] = np.nan
    file = rewrite(tmp_path / "m.gguf", TINY, set_tensors={norm.name: (norm.shape, "F32", values)})
    for form in ("gguf", "copy"):
        result = export(file, tmp_path / "art", "--weights", form)
        told = f"kiln: error: {file}: tensor {norm.name}, element 3: a value is not finite"
        assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(told), result.stderr
        assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
    assert export(file, tmp_path / "art", "--allow-nonfinite").exit_code == 0


# ---- moved, copied, gone, replaced ----


def test_the_folder_is_moved_and_copied(made, gguf, want, tmp_path):
    for symlinks in (True, False):
        copy = Path(shutil.copytree(made, tmp_path / f"copy{symlinks}", symlinks=symlinks))
        assert (copy / "m.gguf").is_symlink() is symlinks and logits(copy) == want and verify(copy) == []
    moved = made.rename(tmp_path / "moved")
    assert logits(moved) == want
    (tmp_path / "link").symlink_to(moved)
    assert logits(tmp_path / "link") == want
    gguf.rename(tmp_path / "gone")
    fails(GONE, moved, *PLAY)
    assert logits(tmp_path / "copyFalse") == want  # it has the file


def test_the_file_is_moved(made, gguf, want, tmp_path):
    """The dangling link is passed over: then beside the folder, then the error that asks for --weights."""
    elsewhere = gguf.rename(tmp_path / "elsewhere.gguf")
    asked = f"holds code only; give the GGUF file of the weights with --weights (it was made of m.gguf, {GONE})"
    fails(asked, made, *PLAY)
    with pytest.raises(kiln.Error, match="give the GGUF file of the weights with --weights"):
        kiln.Model(str(made), device="cpu")
    assert logits(made, "--weights", elsewhere) == want
    gguf.mkdir()
    fails(asked, made, *PLAY)
    gguf.rmdir()
    (made / "m.gguf").unlink()
    (made / "m.gguf").symlink_to("m.gguf")
    fails(asked, made, *PLAY)
    elsewhere.rename(made.parent / "m.gguf")
    assert logits(made) == want
    (made.parent / "m.gguf").rename(gguf)
    (made / "m.gguf").unlink()
    fails(asked.replace(GONE, NEITHER), made, *PLAY)


def test_the_file_is_replaced(made, export, gguf, want, tmp_path):
    """By one of the same architecture: what it may not have otherwise is named; other values of the same tensors are another model's."""
    layer = open_gguf(TINY).tensors["blk.1.ffn_down.weight"]
    rewrite(gguf, TINY, drop=[layer.name])
    fails(f"tensor {layer.name} is missing", made, *PLAY)
    half = np.zeros(layer.shape, np.float16)
    rewrite(gguf, TINY, set_tensors={layer.name: (layer.shape, "F16", half)})
    fails(f"tensor {layer.name} is of type F16, the artifact was made for F32", made, *PLAY)
    rewrite(gguf, TINY, set_keys={"gemma4.rope.freq_base": (GGUFValueType.FLOAT32, 5e5)})
    fails("metadata key gemma4.rope.freq_base has another value", made, *PLAY)
    gguf.write_bytes(TINY.read_bytes()[:-1000])
    fails("truncated", made, *PLAY)
    shutil.copy(TINY, gguf)
    assert logits(made) == want
    hashed = tmp_path / "hashed"
    assert export(gguf, hashed, "--hash-weights").exit_code == 0
    rewrite(gguf, TINY, set_tensors={layer.name: (layer.shape, "F32", np.zeros(layer.shape, np.float32))})
    fails(f"tensor {layer.name} has other values than in the file that the artifact was made of", hashed, *PLAY, "--verify")
    assert logits(hashed) == logits(hashed, "--weights", gguf) != want


# ---- --force ----


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", ["link", "dangling", "parts"])
def test_force_removes_the_link_and_never_its_target(export, gguf, want, tmp_path, monkeypatch, exchange, old):
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    out, before = tmp_path / "art", gguf.read_bytes()
    (tmp_path / "parts").mkdir()
    files = split(tmp_path / "parts", TINY, 2) if old == "parts" else [gguf]
    assert export(files[0], out).exit_code == 0
    if old == "dangling":
        gguf = gguf.rename(tmp_path / "other.gguf")
    kept = [(f, f.read_bytes()) for f in files if f.exists()]
    with pytest.raises(ValueError), staged(check_output(out, force=True)):
        raise ValueError
    assert all((out / f.name).is_symlink() for f in files)
    result = export(gguf, out, "--force")
    assert result.exit_code == 0, result.stderr
    assert gguf.read_bytes() == before and all(f.read_bytes() == data for f, data in kept)
    assert [os.readlink(f) for f in out.iterdir() if f.is_symlink()] == [str(gguf)] and logits(out) == want
    assert not [f for f in tmp_path.iterdir() if f.name.endswith(".partial")]
    result = export(gguf, out, "--force", "--weights", "copy")
    assert result.exit_code == 0 and gguf.read_bytes() == before and not any(f.is_symlink() for f in out.iterdir())
    assert logits(out) == want


def test_force_by_the_link_of_the_old_artifact(made, export, gguf, want):
    """The file is named by the very link that goes."""
    before = gguf.read_bytes()
    assert export(made / "m.gguf", made, "--force").exit_code == 0
    assert os.readlink(made / "m.gguf") == str(gguf) and gguf.read_bytes() == before and logits(made) == want


def test_force_keeps_what_is_no_link_to_weights_elsewhere(made, export, gguf, want, tmp_path):
    def refused(artifact: Path, name: str) -> None:
        with pytest.raises(KilnError, match=f"holds {name}, which is no part of an artifact"):
            check_output(artifact, force=True)

    copied = Path(shutil.copytree(made, tmp_path / "copied"))
    refused(copied, "m.gguf")  # the only copy, for all that is known
    for name in ("weights", "M.GGUF"):
        other = Path(shutil.copytree(made, tmp_path / name))
        (other / "m.gguf").rename(other / name)
        change(other, lambda m, name=name: m["weights"]["gguf"].update(file=name))
        refused(other, name)
    linked = Path(shutil.copytree(made, tmp_path / "linked", symlinks=True))
    (linked / "other.gguf").symlink_to(gguf)
    refused(linked, "other.gguf")
    (linked / "other.gguf").unlink()
    (linked / "m.gguf").unlink()
    (linked / "m.gguf").symlink_to("inner")
    gguf.rename(linked / "inner")
    refused(linked, "m.gguf")  # its target would go with the folder
    assert logits(linked) == want


@pytest.mark.parametrize("weights", [None, [], {}, {"gguf": None}, {"gguf": {}}, {"gguf": {"file": 3}}, {"gguf": {"file": "n.gguf"}}])
def test_any_manifest(made, weights):
    change(made, lambda m: m.update(weights=weights))
    with pytest.raises(KilnError, match="holds m.gguf, which is no part"):
        check_output(made, force=True)


def test_killed_half_way(gguf, tmp_path):
    """With the link made already: nothing stays but the file."""
    script = f"""
import os, signal
from pathlib import Path
from kiln.exporter.artifact.link import link_weights
from kiln.exporter.artifact.output import check_output, staged
from kiln.exporter.interrupt import ending_cleanly
from kiln.exporter.source.gguf import open_gguf
with ending_cleanly(), staged(check_output(Path({str(tmp_path / "art")!r}))) as stage:
    link_weights(stage, open_gguf({str(gguf)!r}))
    assert (stage / "m.gguf").is_symlink()
    os.kill(os.getpid(), signal.SIGNAL)
    signal.pause()
"""
    before = gguf.read_bytes()
    for name in ("SIGTERM", "SIGKILL"):
        line = [sys.executable, "-c", script.replace("SIGNAL", name)]
        done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "runtime_cpp" / "python")})
        assert done.returncode in (128 + signal.SIGTERM, -signal.SIGKILL), done.stderr
        if name == "SIGKILL":
            with pytest.raises(ValueError), staged(check_output(tmp_path / "art")):
                raise ValueError
        assert [f.name for f in tmp_path.iterdir()] == ["models"] and gguf.read_bytes() == before


# ---- inspect ----


def test_inspect(made, gguf):
    """The link is no unknown file, and what it leads to is not opened: a pipe would block."""
    result = CliRunner().invoke(main, ["inspect", "--verify", str(made)])
    assert result.exit_code == 0 and result.stderr == "" and "in a GGUF file as m.gguf" in result.stdout
    gguf.unlink()
    os.mkfifo(gguf)
    assert verify(made) == []
    gguf.unlink()
    for options in ((), ("--verify",)):
        result = CliRunner().invoke(main, ["inspect", *options, str(made)])
        told = f"note: {made / 'm.gguf'} is a link to {gguf}, which is gone; put the file there again, or give it with --weights"
        assert result.exit_code == 0 and result.stderr.splitlines() == [told]
    (made / "other.gguf").symlink_to(TINY)
    assert verify(made) == ["other.gguf"]


def test_names():
    for name, other, same in (
        ("m.gguf", "m.gguf", True),
        ("m.gguf", "n.gguf", False),
        ("m-00001-of-00003.gguf", "m-00003-of-00003.gguf", True),
        ("m-00001-of-00003.gguf", "m-00001-of-00004.gguf", False),
        ("m-00001-of-00003.gguf", "n-00001-of-00003.gguf", False),
        ("m-00001-of-00003.gguf", "m.gguf", False),
        ("m-00001-of-00003", "m-00002-of-00003", True),
    ):
        assert same_model(name, other) is same
        assert is_weights({"weights": {"gguf": {"file": other}}}, name) is same
