"""Large files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kiln.exporter.errors import KilnError
from kiln.exporter.interrupt import undoing


@contextlib.contextmanager
def replacing(path: Path, what: str) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block has ended well. KilnError, with `what`, when it cannot be written."""
    temporary = path.with_name(f".{short(path.name)}.{os.getpid()}.tmp")

    def remove() -> None:
        with contextlib.suppress(OSError):
            temporary.unlink()

    with undoing(remove):
        try:
            with open(temporary, "wb") as f:
                yield f
            os.replace(temporary, path)
        except OSError as e:
            raise KilnError(f"{path}: cannot write {what}: {e.strerror}") from e


def short(name: str, limit: int = 200) -> str:
    """The beginning of a file's name, at most `limit` bytes of it, so that more can be added."""
    while len(os.fsencode(name)) > limit:
        name = name[:-1]
    return name


def write_text(path: Path, text: str, what: str) -> None:
    """Writes UTF-8 whatever the locale says. KilnError, with `what`, when the file cannot be written."""
    try:
        path.write_bytes(text.encode("utf-8"))
    except OSError as e:
        raise KilnError(f"{path}: cannot write {what}: {e.strerror}") from e
