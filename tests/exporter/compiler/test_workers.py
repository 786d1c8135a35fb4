"""Processes that wait for a task."""

from __future__ import annotations

import math
import os
import time

import pytest

from kiln.exporter.compiler import workers
from kiln.exporter.errors import KilnError


def test_a_prepared_worker_is_taken_once() -> None:
    workers.prepare(1)
    prepared = workers._waiting[-1]
    worker = workers.take()
    assert worker is prepared and worker not in workers._waiting
    worker.start(math.hypot, 3, 4)
    assert worker.result() == 5
    assert not worker._process.is_alive(), "a process is good for one task"


def test_no_gpu_is_seen_from_the_first_import(tmp_path, monkeypatch) -> None:
    """CUDA's driver looks once, at the first module that asks it."""
    (tmp_path / "asks_at_import.py").write_text("import os\nSEEN = os.environ.get('CUDA_VISIBLE_DEVICES')\ndef seen(): return SEEN\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(workers, "_IMPORTS", ("asks_at_import",))
    import asks_at_import

    worker = workers.Worker()
    worker.start(asks_at_import.seen)
    assert worker.result() == ""


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
    assert not working._process.is_alive()
