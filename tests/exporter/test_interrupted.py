"""`kiln export` interrupted in each of its phases: nothing stays in TMPDIR, beside --out, or among the processes.

The moments are random; `python -m tests.tools.kill_anywhere` tries many more.
"""

from __future__ import annotations

import json
import random
import signal

import pytest

from tests.tools.kill_anywhere import EXPORT_PHASES, FIXTURE, export_command, interrupt

LENGTHS = {"starting": 3.0, "packing": 0.2, "compiling": 8.0, "finishing": 0.5}  # seconds within which a moment is drawn


@pytest.mark.parametrize(
    ("phase", "number"),
    [("starting", signal.SIGINT), ("packing", signal.SIGTERM), ("compiling", signal.SIGTERM), ("finishing", signal.SIGKILL)],
)
def test_nothing_stays(tmp_path, phase, number):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text(json.dumps({"format": "kiln", "old": True}))
    delay = random.uniform(0, LENGTHS[phase])
    outcome = interrupt(export_command(FIXTURE, tmp_path), tmp_path, EXPORT_PHASES, phase, delay, number)
    told = f"{signal.Signals(number).name} {delay:.3f} s into {phase}: {outcome}"
    old = json.loads((tmp_path / "artifact" / "manifest.json").read_text()).get("old")
    assert old or outcome.whole, told
    assert not outcome.files and not outcome.processes, told
    assert outcome.code == (0 if outcome.finished else -number if number == signal.SIGKILL else 128 + number), told
