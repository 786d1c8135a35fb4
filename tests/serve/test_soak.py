"""Seconds of what `tests/tools/soak_serve.py` does for hours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import kiln
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.settings import Settings
from kiln.exporter.serve.steps.together import Together
from tests.serve.conftest import Running, running
from tests.tools.soak_serve import Part, grown, soak


def test_some_seconds(real: Running, talking: Path) -> None:
    found = soak(real.url, kiln.Model(str(talking), "cpu"), real.served.settings.chunk, 4.0, 10)
    assert found["completed"] > 10 and found["left"] and found["wrong"] and found["huge"] and found["refused"], found
    assert real.idle()


def test_some_seconds_of_shared_steps(three_rows: Path, settings: Settings) -> None:
    """Over the rows of a batch: joins, ends and clients that leave between its steps change no text."""
    given = dataclasses.replace(settings, sessions=0, chunk=8, hosts=None)
    with running(Served.load(three_rows, "cpu", 1, given)) as server:
        assert isinstance(server.served.engine, Together)
        found = soak(server.url, kiln.Model(str(three_rows), "cpu"), 8, 4.0, 12, salted=True)
        assert found["completed"] > 3 and found["left"] and found["refused"] and not found["cached"], found
        assert server.idle()


def test_what_counts_as_growth() -> None:
    """What comes with the warm-up does not; what each answer leaves behind does, from its first byte."""
    steady = [Part(100 * i, 70_000_000 + 10_000 * i, 60_000_000 + (0 if i else -9_000_000)) for i in range(20)]
    assert grown(steady) == (0.0, 0.0)
    leaking = [Part(100 * i, 0, 60_000_000 + 5_000 * 100 * i) for i in range(20)]
    share, slope = grown(leaking)
    assert share == pytest.approx(7_500_000 / 62_000_000) and slope == pytest.approx(5_000)
