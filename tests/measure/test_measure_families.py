"""`python -m tests.measure.measure_families` on the CPU: a tiny model from its geometry to its row, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.measure import measure_families


@pytest.mark.nightly  # a minute, for a tool
def test_a_model_from_its_geometry_to_its_row(tmp_path: Path, capsys) -> None:
    out = tmp_path / "found.json"
    command = ["--work", str(tmp_path / "work"), "--out", str(out), "--presets", "qwen3-tiny", "--target", "cpu", "--depths", "128",
               "--steps", "4", "--context", "256", "--budget", "100000", "--", "--kv-cache", "f16"]  # fmt: skip
    assert measure_families.main(command) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert row[1].strip() == "qwen3-tiny" and row[2].strip() == "128" and float(row[3].split("(")[0]) > 0
    found = json.loads(out.read_text())["qwen3-tiny"]
    assert found["exported"]["seconds"] > 0 and found["exported"]["peak_gib"] > 0 and found["speeds"]["depths"][0]["position"] == 128
    assert not (tmp_path / "work" / "model.gguf").exists()
    before = out.read_text()
    assert measure_families.main(command) == 0 and out.read_text() == before  # nothing is done twice


def test_contexts() -> None:
    presets = ("gemma4-e4b", "qwen3-30b-a3b", "qwen35-27b", "qwen3-tiny")
    assert [measure_families.context(p) for p in presets] == [131072, 40960, 131072, 4096]


def test_what_is_left_is_said(tmp_path: Path, capsys) -> None:
    command = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "f.json"), "--presets", "qwen3-tiny", "--target", "cpu"]
    command += ["--budget", "1"]
    assert measure_families.main(command) == 3
    assert "left out, 1 s were over: qwen3-tiny: exported; the same command goes on" in capsys.readouterr().err
