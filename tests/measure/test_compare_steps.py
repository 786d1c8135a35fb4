"""`python -m tests.measure.compare_steps` on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import kiln
from tests.measure import compare_steps


def test_ratios_are_to_the_first() -> None:
    lines = compare_steps.table({"a": {128: [100.0, 101.0, 99.0]}, "b": {128: [90.0, 91.0, 89.0]}})
    assert "128: 100.0 us" in lines[0] and lines[0].endswith("1.0000")
    assert "128: 90.0 us (89.2 - 90.8)" in lines[1] and lines[1].endswith("0.9000")


def test_names_are_not_taken_for_others(tmp_path: Path, capsys) -> None:
    """Two checkouts' artifacts of one name, or what an earlier run left, would be measured as what they are not."""
    more = ["--gguf", "m.gguf", "--work", str(tmp_path)]
    (tmp_path / "old").mkdir()
    for given, said in ((["a/x", "b/x"], "two folders have one name"), (["a/old"], "exist already")):
        with pytest.raises(SystemExit) as error:
            compare_steps.main([*given, *more])
        assert error.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.nightly  # an export, for a tool
def test_two_artifacts_in_turns(tmp_path: Path, capsys) -> None:
    kiln("synth", "--preset", "tiny", "--out", tmp_path / "m.gguf")
    for name in "ab":
        kiln("export", "--gguf", tmp_path / "m.gguf", "--out", tmp_path / name, "--target", "cpu", "--max-seq-len", 64)
    compare_steps.main([*(str(tmp_path / name) for name in "ab"), "--gguf", str(tmp_path / "m.gguf"), "--work", str(tmp_path / "w"),
                        "--depths", "8", "--steps", "8", "--device", "cpu"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"] and all("8: " in line for line in lines)
