"""`manifest.json` of an artifact: what its files are, read without torch; `record.py` writes it. `docs/ARTIFACT.md` is its format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kiln.exporter.artifact.output import MANIFEST
from kiln.exporter.errors import KilnError

FORMAT_VERSION = 2
OTHER_FILES = ("tokenizer.json", "chat_template.jinja")  # beside the packages and the weights


def weights_record(path: Path, records: list[dict]) -> dict:
    """The weights file: its size, and the checksum of what stands before the first constant, whose checksums are in `records`."""
    header = min((r["offset"] for r in records if "offset" in r), default=path.stat().st_size)
    with path.open("rb") as f:
        digest = hashlib.sha256(f.read(header)).hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "header": {"bytes": header, "sha256": digest}}


def file_records(directory: Path) -> list[dict]:
    """The files beside the packages and the weights."""
    paths = [path for name in OTHER_FILES if (path := directory / name).is_file()]
    return [{"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths]


def read_manifest(directory: Path) -> dict:
    """The manifest of an artifact; raises KilnError when it is not one of this format version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise KilnError(f"{directory} is not an artifact: it has no {MANIFEST}")

    class Record(dict[str, Any]):
        """An object of the file, wherever it stands in it: what it lacks is told as such."""

        def __missing__(self, key: str) -> Any:
            raise KilnError(f"{path} lacks {key!r}; copy the artifact again, or export it again")

    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), object_hook=Record)
    except (ValueError, RecursionError) as e:
        raise KilnError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(manifest, dict) or manifest.get("format") != "kiln":
        raise KilnError(f"{directory} is not an artifact: its {MANIFEST} is of something else")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise KilnError(
            f"{directory} has format version {manifest.get('format_version')}, this Kiln reads {FORMAT_VERSION}; export it again"
        )
    return manifest


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
