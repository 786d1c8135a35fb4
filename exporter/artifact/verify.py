"""`kiln inspect --verify`: every byte of an artifact against its manifest. Nothing is loaded or executed."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kiln.exporter.artifact.link import is_weights
from kiln.exporter.artifact.manifest import file_sha256, read_manifest
from kiln.exporter.artifact.output import MANIFEST
from kiln.exporter.errors import KilnError

BLOCK = 1 << 24  # bytes read at once
AGAIN = "copy the artifact again, or export it again"


def verify(directory: Path) -> list[str]:
    """Names in the folder that are no part of the artifact. Raises KilnError naming the first file or constant that differs. The GGUF file
    of the weights, or a link to it, is not opened."""
    manifest = read_manifest(directory)
    try:
        for target in manifest["targets"]:
            _check_file(directory, target)
            kernels = tuple(kernel["file"] for kernel in (target.get("packing") or {}).values())
            check_package(directory / target["file"], tuple(manifest["entry_points"]), kernels)
        for record in manifest.get("files", ()):
            _check_file(directory, record)
        _check_weights(directory, manifest)
        named = {MANIFEST, manifest["weights"]["file"], *(r["file"] for r in (*manifest["targets"], *manifest.get("files", ())))}
    except (KeyError, TypeError, AttributeError) as e:
        raise KilnError(f"{directory / MANIFEST} lacks {e} or has another type there; {AGAIN}") from e
    return sorted(entry.name for entry in directory.iterdir() if entry.name not in named and not is_weights(manifest, entry.name))


def check_package(path: Path, entries: tuple[str, ...], kernels: tuple[str, ...] = ()) -> None:
    """Raises KilnError unless a package holds one library for each entry point, under the name that an export writes, the kernels that the
    manifest names, and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError) as e:
        raise KilnError(f"{path} is not a package: {e}; {AGAIN}") from e
    libraries = {*(f"{entry}.so" for entry in entries), *kernels}
    if extra := next((name for name in names if name not in libraries), None):
        raise KilnError(f"{path} holds {extra!r}, which is no part of a package; do not load it")
    if sorted(names) != sorted(libraries):
        has = ", ".join(sorted(names)) or "nothing"
        raise KilnError(f"{path} holds {has}, not one each of {', '.join(sorted(libraries))}; do not load it")


def _path(directory: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".", ".."):
        raise KilnError(f"{directory / MANIFEST} names the file {name!r}, which is not in its folder; do not load it")
    return directory / name


def _check_file(directory: Path, record: dict) -> None:
    path = _path(directory, record["file"])
    if not path.is_file():
        raise KilnError(f"{path} is missing; {AGAIN}")
    if path.stat().st_size != record["bytes"] or file_sha256(path) != record["sha256"]:
        raise KilnError(f"{path} differs from its checksum; {AGAIN}")


def _check_weights(directory: Path, manifest: dict) -> None:
    weights = manifest["weights"]
    path = _path(directory, weights["file"])
    size = path.stat().st_size if path.is_file() else 0
    if size != weights["bytes"]:
        raise KilnError(f"{path} has {size} bytes, the manifest says {weights['bytes']}; {AGAIN}")
    with path.open("rb") as f:
        at = 0
        if header := weights.get("header"):
            if _digest(f, header["bytes"]) != header["sha256"]:
                raise KilnError(f"{path}: the header differs from its checksum; {AGAIN}")
            at = header["bytes"]
        for constant in sorted((c for c in manifest["constants"] if "source" not in c), key=lambda c: c["offset"]):
            if constant["offset"] < at or any(any(block) for block in _blocks(f, constant["offset"] - at)):
                raise KilnError(f"{path}: what stands before {constant['name']} is no filler; {AGAIN}")
            if _digest(f, constant["bytes"]) != constant["sha256"]:
                raise KilnError(f"{path}: {constant['name']} differs from its checksum; {AGAIN}")
            at = constant["offset"] + constant["bytes"]
        if any(any(block) for block in _blocks(f, size - at)):
            raise KilnError(f"{path}: what stands after the last constant is no filler; {AGAIN}")


def _blocks(f: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0:
        block = f.read(min(size, BLOCK))
        if not block:
            return
        size -= len(block)
        yield block


def _digest(f: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    for block in _blocks(f, size):
        digest.update(block)
    return digest.hexdigest()
