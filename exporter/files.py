"""Large files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from exporter.errors import KilnError


@contextlib.contextmanager
def replacing(path: Path, what: str) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block has ended well. KilnError, with `what`, when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
        os.replace(temporary, path)
    except OSError as e:
        raise KilnError(f"{path}: cannot write {what}: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str, what: str) -> None:
    """Writes UTF-8 whatever the locale says. KilnError, with `what`, when the file cannot be written."""
    try:
        path.write_bytes(text.encode("utf-8"))
    except OSError as e:
        raise KilnError(f"{path}: cannot write {what}: {e.strerror}") from e
