"""`python -m tests.measure.measure_serve` on the CPU: each load once, small, of an artifact and of a server that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.measure import measure_serve
from tests.runtime.batches import NANO


def test_loads() -> None:
    whole, small = measure_serve.loads(1), measure_serve.loads(64)
    assert whole["8,192 shared"].shared_prefix == 8192 and small["8,192 shared"].shared_prefix == 128
    assert whole["turns behind 32,000"].prompt_tokens == 32000 and small["turns behind 32,000"].turns == 3
    assert all(load.output_tokens >= 4 for load in small.values())


@pytest.mark.nightly  # an export of a minute, for a tool
def test_every_load(tmp_path: Path, capsys) -> None:
    from tests.conftest import kiln

    artifact, out = tmp_path / "nano", tmp_path / "found.json"
    kiln("export", "--gguf", NANO, "--out", artifact, "--max-seq-len", 1024, "--prefill-chunk", 128, "--rows", 2, "--decode-rows", "1,2",
         "--target", "cpu")  # fmt: skip
    assert measure_serve.main([str(artifact), "--device", "cpu", "--users", "1,2", "--scale", "64", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found) == ["without HTTP", *measure_serve.loads(1), "gaps"]
    for name in measure_serve.loads(1):
        assert all(level["completed"] == level["requests"] for level in found[name]["levels"])
    turns = found["turns behind 32,000"]["levels"][0]["turns"]
    assert turns[0]["cached_tokens"] == 0 < turns[1]["cached_tokens"]
    assert found["8,192 shared"]["levels"][1]["cached_tokens"] > 0
    before = out.read_text()
    capsys.readouterr()
    assert measure_serve.main([str(artifact), "--device", "cpu", "--users", "1,2", "--scale", "64", "--out", str(out)]) == 0
    assert out.read_text() == before  # nothing is done twice


def test_one_or_the_other(tmp_path: Path, capsys) -> None:
    for wrong in ([], ["artifact", "--url", "http://127.0.0.1:1"]):
        with pytest.raises(SystemExit):
            measure_serve.main([*wrong, "--out", str(tmp_path / "f.json")])
        assert "one of them" in capsys.readouterr().err
