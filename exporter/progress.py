"""Progress on stderr: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields `update(name, done_bytes, total_bytes)`."""
    start = time.monotonic()
    state = (0, 0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(label, total=None)

        def update(name: str, done: int, total: int) -> None:
            nonlocal state
            state = (done, total)
            progress.update(task, description=f"{label} {name}", completed=done, total=total)

        yield update
    seconds = time.monotonic() - start
    done = state[0]
    say(f"{label}: {size_text(done)} in {seconds:.1f} s ({done / max(seconds, 1e-9) / 1e9:.2f} GB/s)")


def size_text(size: int) -> str:
    """Bytes in the largest binary unit that keeps a digit before the point."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale / 10:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 2**10:.2f} KiB"


def say(message: str) -> None:
    """One line for the user."""
    console.print(message, markup=False, soft_wrap=True)
