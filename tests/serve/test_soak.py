"""Seconds of what `tests/tools/soak_serve.py` does for hours."""

from __future__ import annotations

from pathlib import Path

import kiln
from tests.serve.conftest import Running
from tests.tools.soak_serve import soak


def test_some_seconds(real: Running, talking: Path) -> None:
    found = soak(real.url, kiln.Model(str(talking), "cpu"), real.served.settings.chunk, 4.0, 10)
    assert found["completed"] > 10 and found["left"] and found["wrong"] and found["huge"] and found["refused"], found
    assert real.idle()
