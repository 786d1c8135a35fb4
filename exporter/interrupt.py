"""SIGINT, SIGTERM and SIGHUP end a command: what it started is ended, what it made for a while is removed, exit code 128 + the signal.

The handler does that itself instead of raising: an exception may be swallowed by whatever is running, and threads would be waited for.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_undo: list[Callable[[], None]] = []
_held = 0
_pending: int | None = None


@contextlib.contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """`undo` is called when the block ends, and where a signal ends the process within it. It must stand being called twice."""
    _undo.append(undo)
    try:
        yield
    finally:
        with held():
            undo()
            _undo.remove(undo)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes within the block takes effect after it."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _pending is not None and not _held:
            _end(_pending)


def open_streams() -> None:
    """Standard streams that were closed before the command began: input is at its end, errors go nowhere, output takes nothing.

    Until they are open, whatever file is opened next would be one of them.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)
    # Without a buffer, which would fail once more at the end of the process.
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)


def end_cleanly() -> dict[signal.Signals, Any]:
    """From now on the signals end the process as said above. A signal that is ignored (nohup) stays ignored. Returns the old handlers."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    return before


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Within the block the signals end the process as said above; of a thread that is not the main one, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = end_cleanly()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _pending
    _pending = number
    if not _held:
        _end(number)


def _end(number: int) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    for undo in reversed(_undo):
        with contextlib.suppress(Exception):
            undo()
    for child in _children():  # whatever else was started: a runner that is measured
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
    with contextlib.suppress(Exception):
        cursor = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
        os.write(2, f"{cursor}kiln: ended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def _children() -> list[int]:
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children") as children:  # gone, or not told
            found += map(int, children.read().split())
    return found
