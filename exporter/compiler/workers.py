"""Processes for one task each. Importing PyTorch takes seconds: one process, the nursery, imports it, and workers are forks of that.

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
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from kiln.exporter.errors import KilnError
from kiln.exporter.interrupt import SIGNALS, held, undoing

AT_ONCE = min(2, os.cpu_count() or 1)  # compilations: a target has two graphs
PR_SET_PDEATHSIG = 1  # of prctl(2)
_CONTEXT = multiprocessing.get_context("spawn")  # a fork of this process would inherit its threads and its GPU
_IMPORTS = ("torch._inductor.compile_fx", "kiln.exporter.compiler.compile")
_nursery: _Nursery | None = None
_started: list[Worker] = []


class _Nursery:
    """The process that has imported what a compilation needs. It ends with its parent."""

    def __init__(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_nurse, args=(theirs, os.getpid(), _IMPORTS), daemon=True)
        # What is blocked here is blocked there, until the process has its own group and handlers.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            _start_tracker()
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()

    def fork(self, connection: Connection) -> int:
        """The process id of a new worker at the other end of `connection`. Waits until everything is imported."""
        try:
            self._connection.send(None)
            send_handle(self._connection, connection.fileno(), self._process.pid)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise _died(self._process.exitcode) from None

    def exit_code(self, pid: int) -> int:
        """Waits for the worker's end. As that of multiprocessing.Process: negative for a signal."""
        try:
            self._connection.send(pid)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            return -signal.SIGKILL  # workers end with their nursery

    def kill(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


class Worker:
    """A process that runs one function, and ends. It ends with its parent, too."""

    def __init__(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        prepare()
        assert _nursery
        self._nursery = _nursery
        self._pid = self._nursery.fork(theirs)
        _started.append(self)
        theirs.close()

    def start(self, function: Callable, *arguments: Any) -> None:
        """`function` is one of a module; it, its arguments, its result and its exceptions are pickled. It finds the environment, the
        folder and the module path that this process has now."""
        try:
            self._connection.send((dict(os.environ), os.getcwd(), sys.path))
            self._connection.send((function, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def result(self) -> Any:
        """Waits. Raises what the function raised, or KilnError where the process died."""
        try:
            value, error = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        self.kill()
        if error:
            raise error
        return value

    def kill(self) -> int | None:
        """End the process and what it started. Its exit code, at the first call."""
        with held():
            if self not in _started:
                return None
            _started.remove(self)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            return self._nursery.exit_code(self._pid)

    def _died(self) -> KilnError:
        return _died(self.kill())


def _died(code: int | None) -> KilnError:
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


def prepare() -> None:
    """Have everything imported for the workers to come, while this process does something else."""
    global _nursery
    with held():
        if _nursery is None:
            _nursery = _Nursery()


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
    global _nursery
    for worker in list(_started):
        worker.kill()
    if _nursery:
        _nursery.kill()
        _nursery = None


def _ends_with(parent: int) -> bool:
    """Make this process a group of its own that ends with its parent. False: the parent died before it could be watched."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent's affair
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_group)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return os.getppid() == parent


def _nurse(connection: Connection, parent: int, imports: tuple[str, ...]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a present GPU must not change what is compiled; its driver reads this once
    if not _ends_with(parent):
        return
    for name in imports:
        importlib.import_module(name)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            if (pid := connection.recv()) is None:
                connection.send(_fork(connection))
            else:
                connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _fork(nursery: Connection) -> int:
    handle, parent = recv_handle(nursery), os.getpid()
    if pid := os.fork():
        os.close(handle)
        os.setpgid(pid, pid)  # whoever is told of it may kill the group
        return pid
    code = 1
    try:
        nursery.close()
        if _ends_with(parent):
            _serve(Connection(handle))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(connection: Connection) -> None:
    try:
        environment, folder, sys.path[:] = connection.recv()
        os.environ.clear()
        os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
        tempfile.tempdir = None  # asked for anew
        os.chdir(folder)
        function, arguments = connection.recv()
    except EOFError:  # there was nothing to do
        return
    try:
        connection.send((function(*arguments), None))
    except Exception as e:
        connection.send((None, e))
    sys.stdout.flush()
    sys.stderr.flush()


def _end_group(number: int, frame: object) -> None:
    os.killpg(0, signal.SIGKILL)
