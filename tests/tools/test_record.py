"""The record of a test run: every outcome once, with and without workers, the commit from git or from the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no second GPU")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no disk")
def test_error(broken): pass
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_record(tmp_path: Path, workers: int) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    options = ["-q", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider", *(["-n", str(workers)] if workers else [])]
    record_to = ["-p", "tests.record", "--record", tmp_path / "out" / "record.json"]
    command = [sys.executable, "-m", "pytest", *options, *record_to, tmp_path / "test_it.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"KILN_COMMIT": "abc123"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["commit"] == "abc123" and record["machine"]["torch"] and record["seconds"] > 0 and record["workers"] == max(workers, 1)
    assert record["counts"] == {"passed": 1, "failed": 1, "error": 1, "skipped": 1}
    found = {test["name"].split("::")[1]: (test["outcome"], test.get("reason")) for test in record["tests"]}
    assert found["test_passes"] == ("passed", None) and found["test_skipped"] == ("skipped", "no second GPU")
    assert found["test_fails"][0] == "failed" and found["test_error"][0] == "error" and "no disk" in found["test_error"][1]


def test_the_commit_is_gits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests import record

    monkeypatch.delenv("KILN_COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    (tmp_path / "f").write_text("1")
    for arguments in (["init", "-q"], ["add", "f"], ["commit", "-qm", "first"]):
        subprocess.run(git + arguments, check=True)
    first = record.commit()
    assert len(first) == 40
    (tmp_path / "f").write_text("2")
    assert record.commit() == first + "+changes"


DYING = "import os\ndef test_passes(): pass\ndef test_dies(): os._exit(9)\n"


def test_a_run_that_is_cut_short_leaves_what_had_ended(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(DYING)
    options = ["-q", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider", "-p", "tests.record"]
    command = [sys.executable, "-m", "pytest", *options, "--record", tmp_path / "record.json", tmp_path / "test_it.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"KILN_COMMIT": "abc123"}, capture_output=True, text=True)
    assert done.returncode == 9, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["exit_status"] is None and [test["outcome"] for test in record["tests"]] == ["passed"]
