"""Links in the folder of an artifact of code alone to the GGUF file of its weights, by the names under which a runner looks for it there.

No torch here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kiln.exporter.source.gguf import GGUFFile, same_model


def is_weights(manifest: dict[str, Any], name: str) -> bool:
    """Whether `name`, in the folder of that manifest, is what it calls the GGUF file of the weights, or a part of that. Whatever the
    manifest holds."""
    weights = manifest.get("weights")
    gguf = weights.get("gguf") if isinstance(weights, dict) else None
    file = gguf.get("file") if isinstance(gguf, dict) else None
    return isinstance(file, str) and same_model(name, file)


def link_weights(folder: Path, gguf: GGUFFile) -> None:
    """Makes a link to the file, or to each part of a split one: absolute and to the file itself, for the folder may be moved. OSError where
    there can be none, or something else has the name; then no link stays."""
    files = {file.name: file for file in (*gguf.files, gguf.path) if same_model(file.name, gguf.path.name)}
    made: list[Path] = []
    try:
        for name, file in files.items():
            link = folder / name.encode("utf-8", "replace").decode()  # as the manifest has it
            link.symlink_to(file.resolve(strict=True))
            made.append(link)
    except OSError:
        for link in made:
            link.unlink()
        raise


def dangling(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Targets of links to weights that are gone, by the links' names."""
    links = (entry for entry in sorted(folder.iterdir()) if entry.is_symlink() and not entry.exists())
    return {link.name: os.readlink(link) for link in links if is_weights(manifest, link.name)}
