"""Processes for one task each, that may be started before there is a task: importing PyTorch takes seconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from exporter.errors import KilnError

AT_ONCE = min(2, os.cpu_count() or 1)  # compilations: a target has two graphs
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit a parent's threads and its GPU
_IMPORTS = ("torch._inductor.compile_fx", "exporter.compiler.compile")
_waiting: list[Worker] = []


class Worker:
    """A process that imports what a compilation needs, runs one function, and ends. It ends with its parent, too."""

    def __init__(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, function: Callable, *arguments: Any) -> None:
        """`function` is one of a module; it, its arguments, its result and its exceptions are pickled."""
        try:
            self._connection.send((function, arguments))
        except BrokenPipeError:
            raise self._died() from None

    def result(self) -> Any:
        """Waits. Raises what the function raised, or KilnError where the process died."""
        try:
            value, error = self._connection.recv()
        except EOFError:
            raise self._died() from None
        self._process.join()
        if error:
            raise error
        return value

    def _died(self) -> KilnError:
        self._process.join()
        return KilnError(f"a compiling process died with exit code {self._process.exitcode}; is there enough memory?")


def prepare(count: int) -> None:
    """Start `count` workers for `take`."""
    _waiting.extend(Worker() for _ in range(count))


def take() -> Worker:
    """A prepared worker, or a new one."""
    return _waiting.pop() if _waiting else Worker()


def _serve(connection: Connection) -> None:
    try:
        for name in _IMPORTS:
            importlib.import_module(name)
        function, arguments = connection.recv()
    except (EOFError, KeyboardInterrupt):  # there was nothing to do
        return
    try:
        connection.send((function(*arguments), None))
    except Exception as e:
        connection.send((None, e))
