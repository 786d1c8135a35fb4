"""The artifact directory: written under a temporary name, renamed when complete; read and verified without torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from exporter.errors import KilnError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


@contextlib.contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends without an error, and vanishes otherwise."""
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise KilnError(f"{out} exists; remove it, name another --out, or say --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        stage.rename(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def read_manifest(directory: Path) -> dict:
    """The manifest of an artifact; raises KilnError when it is not one of this format version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise KilnError(f"{directory} is not an artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as e:
        raise KilnError(f"{path} is not valid JSON: {e}") from e
    if manifest.get("format") != "kiln" or manifest.get("format_version") != FORMAT_VERSION:
        raise KilnError(
            f"{directory} has format version {manifest.get('format_version')}, this Kiln reads {FORMAT_VERSION}; export it again"
        )
    return manifest


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(directory: Path) -> None:
    """Recompute every checksum; raises KilnError naming the first file or tensor that differs."""
    manifest = read_manifest(directory)
    for target in manifest["targets"]:
        path = directory / target["file"]
        if not path.is_file() or file_sha256(path) != target["sha256"]:
            raise KilnError(f"{path} is missing or differs from the manifest; copy the artifact again")
    path = directory / manifest["weights"]["file"]
    size = path.stat().st_size if path.is_file() else 0
    if size != manifest["weights"]["bytes"]:
        raise KilnError(f"{path} has {size} bytes, the manifest says {manifest['weights']['bytes']}; copy the artifact again")
    with path.open("rb") as f:
        for constant in manifest["constants"]:
            f.seek(constant["offset"])
            digest, left = hashlib.sha256(), constant["bytes"]
            while left:
                block = f.read(min(left, 1 << 24))
                digest.update(block)
                left -= len(block)
            if digest.hexdigest() != constant["sha256"]:
                raise KilnError(f"{path}: {constant['name']} differs from its checksum; copy the artifact again")
