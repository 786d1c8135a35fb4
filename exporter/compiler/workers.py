"""Processes for one task each, that may be started before there is a task: importing PyTorch takes seconds.

A worker and the compilers that it starts are a process group, killed as one when the worker is given up and when the parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from kiln.exporter.errors import KilnError
from kiln.exporter.interrupt import SIGNALS, held, undoing

AT_ONCE = min(2, os.cpu_count() or 1)  # compilations: a target has two graphs
PR_SET_PDEATHSIG = 1  # of prctl(2)
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit a parent's threads and its GPU
_IMPORTS = ("torch._inductor.compile_fx", "kiln.exporter.compiler.compile")
_waiting: list[Worker] = []
_started: list[Worker] = []


class Worker:
    """A process that imports what a compilation needs, runs one function, and ends. It ends with its parent, too."""

    def __init__(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, os.getpid(), _IMPORTS), daemon=True)
        # What is blocked here is blocked there, until the process has its own group and handlers.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with held():
                _start_tracker()
                self._process.start()
                _started.append(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
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
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        self._process.join(5)  # it takes leave of what it shares
        self.kill()
        if error:
            raise error
        return value

    def kill(self) -> None:
        """End the process and what it started."""
        with held():
            if self in _started:
                _started.remove(self)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    if self._process.pid is not None:
                        os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()  # it may not have its group yet
                self._process.join()

    def _died(self) -> KilnError:
        self._process.join()
        code = self._process.exitcode
        self.kill()
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"died with exit code {code}"
        return KilnError(f"a compiling process {how}; is there enough memory?")


def results(workers: Sequence[Worker]) -> Iterator[Any]:
    """Theirs, in their order. What one of them raises is raised at once, whatever the others are still at."""
    left = {worker._connection: worker for worker in workers}
    found: dict[Worker, Any] = {}
    for worker in workers:
        while worker not in found:
            for connection in wait(list(left)):
                answered = left.pop(connection)  # type: ignore[call-overload]
                found[answered] = answered.result()
        yield found[worker]


def prepare(count: int) -> None:
    """Start `count` workers for `take`."""
    _waiting.extend(Worker() for _ in range(count))


def take() -> Worker:
    """A prepared worker, or a new one."""
    return _waiting.pop() if _waiting else Worker()


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """No worker outlives the block, however it ends."""
    with undoing(_kill_all):
        yield


def _start_tracker() -> None:
    """The process that removes semaphores of dead workers; it should not tell the user that it does."""
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


def _kill_all() -> None:
    _waiting.clear()
    for worker in list(_started):
        worker.kill()


def _serve(connection: Connection, parent: int, imports: tuple[str, ...]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a present GPU must not change what is compiled; its driver reads this once
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent's affair
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_group)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if os.getppid() != parent:  # it died before it could be watched
        return
    try:
        for name in imports:
            importlib.import_module(name)
        function, arguments = connection.recv()
    except EOFError:  # there was nothing to do
        return
    try:
        connection.send((function(*arguments), None))
    except Exception as e:
        connection.send((None, e))


def _end_group(number: int, frame: object) -> None:
    os.killpg(0, signal.SIGKILL)
