"""Processes that wait for a task."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kiln.exporter.compiler import workers
from kiln.exporter.errors import KilnError

AT_IMPORT = """
import os
SEEN = os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()

def seen():
    return *SEEN, os.environ["CUDA_VISIBLE_DEVICES"], os.getpid(), os.environ["KILN_TEST"], os.getcwd()
"""


@pytest.fixture(autouse=True)
def none_before_and_after() -> Iterator[None]:
    workers._kill_all()
    with workers.none_left():
        yield


def alive(worker: workers.Worker) -> bool:
    return Path(f"/proc/{worker._pid}").exists()


def test_what_is_imported_once_is_there_for_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is seen from the first import on: CUDA's driver looks once, at the first module that asks it. A task finds the environment
    and the folder of its start."""
    (tmp_path / "asks_at_import.py").write_text(AT_IMPORT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(workers, "_IMPORTS", ("asks_at_import",))
    import asks_at_import

    workers.prepare()
    monkeypatch.chdir(tmp_path)
    found = []
    for value in "ab":
        monkeypatch.setenv("KILN_TEST", value)
        worker = workers.Worker()
        worker.start(asks_at_import.seen)
        found.append(worker.result())
        assert not alive(worker), "a process is good for one task"
    (gpu, nursery, later, first, *rest), (*_, second, _, _) = found
    assert gpu == later == "" and rest == ["a", str(tmp_path)] and found[1][4] == "b"
    assert found[1][1] == nursery and len({os.getpid(), nursery, first, second}) == 4


def test_what_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_IMPORTS", ("no_such_module_of_any_kind",))
    with pytest.raises(KilnError, match="died with exit code 1"):
        workers.Worker()


def test_failures_are_told() -> None:
    raising, dying = workers.Worker(), workers.Worker()
    raising.start(math.sqrt, -1)
    dying.start(os._exit, 3)
    with pytest.raises(ValueError, match="math domain error|nonnegative"):
        raising.result()
    with pytest.raises(KilnError, match="died with exit code 3"):
        dying.result()


def test_results_come_in_order_and_a_failure_at_once() -> None:
    some = [workers.Worker() for _ in range(2)]
    for worker, numbers in zip(some, ((3, 4), (5, 12)), strict=True):
        worker.start(math.hypot, *numbers)
    assert list(workers.results(some)) == [5, 13]
    working, raising = workers.Worker(), workers.Worker()
    working.start(time.sleep, 600)
    raising.start(math.sqrt, -1)
    with workers.none_left(), pytest.raises(ValueError, match="math domain error|nonnegative"):
        list(workers.results([working, raising]))
    assert not alive(working)
