"""`kiln inspect --verify`: every byte counts, extra files are told, and nothing in a package is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from kiln.exporter.artifact.manifest import FORMAT_VERSION
from kiln.exporter.artifact.verify import check_package, verify
from kiln.exporter.cli import main
from kiln.exporter.errors import KilnError

ENTRIES = ("prefill", "decode")
GOOD = [f"{entry}.so" for entry in ENTRIES]


def package(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"content of {name}")
    return path


def record(path: Path) -> dict:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture()
def artifact(tmp_path) -> Path:
    root = tmp_path / "artifact"
    root.mkdir()
    header, one, two = b"{}".ljust(256), b"a" * 100, b"b" * 256
    weights = header + one + bytes(156) + two + bytes(256)
    (root / "weights.safetensors").write_bytes(weights)
    (root / "tokenizer.json").write_text("{}")
    constants = [
        {"name": name, "offset": at, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, at, data in (("two", 512, two), ("one", 256, one))
    ]
    manifest = {
        "format": "kiln",
        "format_version": FORMAT_VERSION,
        "targets": [record(package(root / "model.pt2", GOOD))],
        "entry_points": dict.fromkeys(ENTRIES, {}),
        "constants": constants,
        "weights": {"file": "weights.safetensors", "bytes": 1024, "header": {"bytes": 256, "sha256": hashlib.sha256(header).hexdigest()}},
        "files": [record(root / "tokenizer.json")],
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def fails(artifact: Path, match: str) -> None:
    result = CliRunner().invoke(main, ["inspect", "--verify", str(artifact)])
    assert result.exit_code == 1 and not result.stdout, result
    assert len(result.stderr.splitlines()) == 1 and match in result.stderr, result.stderr


@pytest.mark.parametrize("options", [(), ("--json", "--verify"), ("--verify",)])
def test_a_manifest_that_lacks_something(artifact: Path, options: tuple[str, ...]) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    if options:
        del manifest["weights"]["header"]["sha256"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(main, ["inspect", *options, str(artifact)])
    lacks = "'sha256'" if options else "'config'"
    assert result.exit_code == 1 and result.stderr.startswith(f"kiln: error: {artifact / 'manifest.json'} lacks {lacks}; "), result.stderr


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_good_one_and_what_else_is_there(artifact):
    assert verify(artifact) == []
    (artifact / "notes.txt").touch()
    (artifact / "more").mkdir()
    assert verify(artifact) == ["more", "notes.txt"]


@pytest.mark.parametrize(
    ("at", "what"),
    [(0, "the header"), (255, "the header"), (256, "one differs"), (355, "one differs"), (356, "before two"), (511, "before two"),
     (512, "two differs"), (767, "two differs"), (768, "after the last constant"), (1023, "after the last constant")],
)  # fmt: skip
def test_every_byte_of_the_weights(artifact, at, what):
    flip(artifact / "weights.safetensors", at)
    fails(artifact, what)


@pytest.mark.parametrize("name", ["model.pt2", "tokenizer.json"])
def test_the_other_files(artifact, name):
    flip(artifact / name, 1)
    fails(artifact, f"{name} differs from its checksum")
    (artifact / name).write_bytes(b"")
    fails(artifact, f"{name} differs from its checksum")
    (artifact / name).unlink()
    fails(artifact, f"{name} is missing")


def test_the_size_of_the_weights(artifact):
    os.truncate(artifact / "weights.safetensors", 1000)
    fails(artifact, "weights.safetensors has 1000 bytes, the manifest says 1024")


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_that_names_files_elsewhere(artifact, name):
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][0]["file"] = name
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    fails(artifact, f"names the file {name!r}, which is not in its folder")


@pytest.mark.parametrize("lost", ["targets", "constants", "weights", "entry_points"])
def test_a_manifest_with_something_missing(artifact, lost):
    manifest = json.loads((artifact / "manifest.json").read_text())
    for value in (None, 3, [3], {"file": 3}):
        (artifact / "manifest.json").write_text(json.dumps(manifest | {lost: value}))
        fails(artifact, "manifest.json" if lost != "entry_points" else str(artifact))
    del manifest[lost]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    fails(artifact, f"manifest.json lacks '{lost}'")


@pytest.mark.parametrize(
    "name",
    ["../../.bashrc", "/etc/cron.d/x", "lib/prefill.so", "lib/../decode.so",
     "prefill\\x.so", "verify.so", "prefill.sh", "prefill.so/", "x.json"],
)  # fmt: skip
def test_names_that_no_export_writes(tmp_path, name):
    check_package(package(tmp_path / "good.pt2", GOOD), ENTRIES)
    with pytest.raises(KilnError, match="no part of a package; do not load it"):
        check_package(package(tmp_path / "bad.pt2", [*GOOD, name]), ENTRIES)


def test_libraries_that_are_missing_or_there_twice(tmp_path):
    with pytest.raises(KilnError, match=r"bad.pt2 holds decode.so, not one each of decode.so, prefill.so; do not load it"):
        check_package(package(tmp_path / "bad.pt2", GOOD[1:]), ENTRIES)
    with pytest.raises(KilnError, match="holds nothing, not one each"):
        check_package(package(tmp_path / "bad.pt2", []), ENTRIES)
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = package(tmp_path / "bad.pt2", [*GOOD, GOOD[1]])
    with pytest.raises(KilnError, match="holds decode.so, decode.so, prefill.so, not one each"):
        check_package(twice, ENTRIES)
    (tmp_path / "bad.pt2").write_bytes(b"no zip")
    with pytest.raises(KilnError, match="is not a package"):
        check_package(tmp_path / "bad.pt2", ENTRIES)


@pytest.mark.parametrize("text", ["[]", "3", '{"format": "esm"}', "{", "[" * 100_000, "\xff"])
def test_a_manifest_of_something_else(artifact, text):
    (artifact / "manifest.json").write_text(text, encoding="latin-1")
    fails(artifact, "manifest.json")
