"""Minutes of what `tests/tools/many_steps.py` does: eight timelines that join and leave a batch at random."""

from __future__ import annotations

from pathlib import Path

import pytest

import kiln
from tests.conftest import kiln as command
from tests.conftest import shared
from tests.tools.many_steps import run

FIXTURE = Path(__file__).parents[2] / "fixtures" / "gemma4-tiny-dense.gguf"
ROWS = 8


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    def make(path: Path) -> None:
        command("export", "--gguf", FIXTURE, "--out", path, "--target", "cpu", "--max-seq-len", 64, "--prefill-chunk", 16, "--rows", ROWS,
                "--decode-rows", "1,2,4,8")  # fmt: skip

    return shared(tmp_path_factory, "artifact-eight-rows", make)


@pytest.mark.nightly
@pytest.mark.parametrize("run_ahead", [False, True])
def test_ten_thousand_steps(eight: Path, run_ahead: bool) -> None:
    found = run(kiln.Model(str(eight)), 10_000, run_ahead=run_ahead)
    assert found["full"] > 5_000 and found["left"] > 100 and found["ended"] > 1_000, found
