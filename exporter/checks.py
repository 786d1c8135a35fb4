"""What `kiln export` can refuse in its first second: before torch is imported, before any work, and with --dry-run too."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from exporter.artifact.output import check_output
from exporter.errors import KilnError


def check_paths(gguf: Path, out: Path, force: bool, chat_template: Path | None, dump_passes: Path | None) -> None:
    """Raises KilnError for a path that cannot be what its option says."""
    check_file(gguf, "--gguf")
    check_output(out, force, [gguf])
    if chat_template is not None:
        check_file(chat_template, "--chat-template", text=True)
    if dump_passes is not None:
        check_folder(dump_passes, "--dump-passes")
        if out.resolve() in (dump_passes.resolve(), *dump_passes.resolve().parents):
            raise KilnError(f"--dump-passes {dump_passes} is in --out {out}, which holds an artifact and nothing else; name another")


def check_file(path: Path, option: str, text: bool = False) -> None:
    """Raises KilnError unless `path` is a file that can be read; a text may also be a pipe, which is not read here."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise KilnError(f"{option} {path} is a folder; name a file")
        if not stat.S_ISREG(mode):
            if not text:
                raise KilnError(f"{option} {path} is no file but a device or a pipe; name a file")
            return
        with path.open("rb") as f:
            if text:
                f.read().decode()
    except UnicodeDecodeError as e:
        raise KilnError(f"{option} {path} is not UTF-8: {e.reason} at byte {e.start}") from e
    except OSError as e:
        raise KilnError(f"{option} {path} cannot be read: {e.strerror}") from e


def check_folder(path: Path, option: str) -> None:
    """Raises KilnError unless `path` is, or can become, a folder to write to."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise KilnError(f"{option} {path}: {there} is no folder; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise KilnError(f"{option} {path}: {there} cannot be written; name another")
