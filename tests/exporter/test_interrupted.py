"""`kiln export` interrupted in each of its phases: nothing stays in TMPDIR, beside --out, or among the processes.

The moments are random; `python -m tests.tools.kill_anywhere` tries many more.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import WAIT
from tests.tools.kill_anywhere import EXPORT_PHASES, FIXTURE, ROOT, begin_another, export_command, interrupt

LENGTHS = {"starting": 3.0, "weights": 0.2, "compiling": 8.0}  # seconds within which a moment is drawn


@pytest.mark.parametrize(
    ("phase", "number", "weights"),
    [
        ("starting", signal.SIGINT, "gguf"),
        ("weights", signal.SIGHUP, "copy"),
        ("compiling", signal.SIGTERM, "gguf"),
        ("compiling", signal.SIGKILL, "gguf"),
    ],
)
def test_nothing_stays(tmp_path, phase, number, weights):
    (tmp_path / "tmp").mkdir()
    delay = random.uniform(0, LENGTHS[phase])
    outcome = interrupt(export_command(FIXTURE, tmp_path, weights), tmp_path, EXPORT_PHASES, phase, delay, number)
    told = f"{signal.Signals(number).name} {delay:.3f} s into {phase}: {outcome}"
    assert outcome.clean(number), told
    if not outcome.finished:
        assert not (tmp_path / "artifact").exists(), told
        assert "Traceback" not in outcome.output and "Warning" not in outcome.output, told


@pytest.mark.parametrize("start", ["exporter", "kiln.exporter"])
def test_signals_come_first(start):
    """The handlers stand before anything is loaded that takes time."""
    code = f"""
import runpy, signal, sys
def told(number, handler, set_signal=signal.signal):
    set_signal(number, handler)
    seen.update(sys.modules)
    if number == signal.SIGHUP:
        print(*sorted(seen))
        sys.exit()
seen, signal.signal = set(), told
runpy.run_module({start!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "kiln.exporter.interrupt" in loaded
    assert not {"click", "numpy", "torch", "kiln.exporter.cli"} & loaded


# Puts a new artifact into the place of the old one again and again; each has its number in both of its files.
REPLACING = """
import itertools, json, sys
from pathlib import Path
from kiln.exporter.artifact import output
from kiln.exporter.interrupt import ending_cleanly
from kiln.exporter.temporary import working_folder
if sys.argv[2] == "rename":
    output._exchange = lambda a, b: False
with ending_cleanly():
    print("ready", flush=True)
    for number in itertools.count():
        with working_folder(), output.staged(output.check_output(Path(sys.argv[1]), force=True)) as stage:
            for i in range(20):
                (stage / f"weights{i}").write_text(str(number))
            (stage / "manifest.json").write_text(json.dumps({"format": "kiln", "number": number}))
"""


@pytest.mark.parametrize("way", ["exchange", "rename"])
def test_the_artifact_is_the_old_one_or_the_new_one(tmp_path, way):
    """Killed while it is put into its place."""
    out, temporary = tmp_path / "art", tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REPLACING, str(out), way]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGHUP) * 2:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.02, 0.1))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=WAIT)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), stderr
        if number == signal.SIGKILL:
            begin_another(out, temporary)
        left = {entry.name for entry in tmp_path.iterdir()} | {entry.name for entry in temporary.iterdir()}
        assert left - {"art"} == {"tmp"}, f"{signal.Signals(number).name}: {left}"
        if "art" in left:
            numbers = {(out / f"weights{i}").read_text() for i in range(20)}
            assert numbers == {str(json.loads((out / "manifest.json").read_text())["number"])}
    assert out.exists() and Path(out, "manifest.json").exists()
