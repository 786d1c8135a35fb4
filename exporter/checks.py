"""Paths that `kiln export` writes to, checked in its first second: before torch is imported, before any work, and with --dry-run too."""

from __future__ import annotations

import os
from pathlib import Path

from kiln.exporter.artifact.output import check_output
from kiln.exporter.errors import KilnError


def check_paths(out: Path, force: bool, gguf: Path, dump_passes: Path | None) -> None:
    """Raises KilnError for a path that cannot be what its option says."""
    check_output(out, force, [gguf])
    if dump_passes is None:
        return
    there = next(p for p in (dump_passes.absolute(), *dump_passes.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise KilnError(f"--dump-passes {dump_passes}: {there} is no folder; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise KilnError(f"--dump-passes {dump_passes}: {there} cannot be written; name another")
    if out.resolve() in (dump_passes.resolve(), *dump_passes.resolve().parents):
        raise KilnError(f"--dump-passes {dump_passes} is in --out {out}, which holds an artifact and nothing else; name another")
