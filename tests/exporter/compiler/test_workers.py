"""Processes that wait for a task."""

from __future__ import annotations

import math
import os

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


def test_failures_are_told() -> None:
    raising, dying = workers.Worker(), workers.Worker()
    raising.start(math.sqrt, -1)
    dying.start(os._exit, 3)
    with pytest.raises(ValueError, match="math domain error|nonnegative"):
        raising.result()
    with pytest.raises(KilnError, match="died with exit code 3"):
        dying.result()
