"""`python -m tests.measure.measure_31b` on the CPU: a small artifact, and beside it another checkout's, in a run that may be cut short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kiln.exporter.measure.runner import runner
from tests.measure import measure_31b
from tests.timeline import FIXTURES

GGUF = FIXTURES / "gemma4-tiny-dense-wide-Q4_K_M.gguf"
ROOMS = ("configs", "custom_ops", "exporter", "kiln", "passes", "tests")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This commit as if it were another, with a runner of its own."""
    path = tmp_path / "old"
    (path / "build" / "cpp").mkdir(parents=True)
    for room in ROOMS:
        (path / room).symlink_to(measure_31b.ROOT / room)
    (path / "build" / "cpp" / "kiln-run").symlink_to(Path(runner()).resolve())
    return path


@pytest.mark.nightly  # a hundred seconds, for a tool
def test_a_run_that_is_cut_short_goes_on(artifacts, checkout: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "work").mkdir()
    shutil.copy(GGUF, tmp_path / "work" / "model.gguf")
    out = tmp_path / "found.json"
    command = ["--compiled", artifacts["tq4"], "--baseline", artifacts["tq4"], "--baseline-checkout", checkout, "--work", tmp_path / "work",
               "--out", out, "--depths", "16,48", "--steps", 4, "--prompt", 20, "--rounds", 1]  # fmt: skip
    command = list(map(str, command))
    assert measure_31b.main([*command, "--budget", "85"]) == 3  # enough to complete the artifacts, not for speeds
    cut = json.loads(out.read_text())
    assert "completed" in cut["new"] and "speeds 1" not in cut["new"]
    assert "left out, 85 s were over: new: speeds 1" in capsys.readouterr().err
    assert measure_31b.main([*command, "--budget", "100000"]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["new"]["completed"] == {"weights": "packed"} and found["baseline"]["completed"] == {"weights": "those of new"}
    for name in ("new", "baseline"):
        assert [row["position"] for row in found[name]["speeds 1"]["depths"]] == [16, 48]
        assert len(found[name]["repeats"]["runs"]) == 3 and len(found[name]["repeats"]["tokens"]) == 64
        assert f"{name}: repeats: yes" in text and f"{name}: graph equals direct calls: yes" in text
    assert found["new"]["repeats"]["tokens"] == found["baseline"]["repeats"]["tokens"]
    assert found["new"]["interleaved sessions equal solo"] == {"equal": True}
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| 16 ") or line.startswith("| 48 ")]
    assert len(rows) == 2 and all(float(row[5]) > 0 and float(row[9]) > 0 for row in rows)  # ratios to the baseline


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    record = {"new": {"repeats": {"equal": False}, "graph equals direct calls": {"equal": True, "finite": False}}}
    assert measure_31b.wrong(record) == ["new: repeats (equal)", "new: graph equals direct calls (finite)"]
    with pytest.raises(SystemExit) as stop:
        measure_31b.main(["--compiled", str(tmp_path), "--work", str(tmp_path), "--out", str(tmp_path / "x.json")])
    assert stop.value.code == 2


def test_another_commits_runner_is_never_taken(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no kiln-run in"):
        measure_31b.side("baseline", tmp_path, tmp_path, tmp_path)
