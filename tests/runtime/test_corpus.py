"""Every input in tests/corpus through its fuzz target, with the sanitizers: seeds, and what once broke something."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.builds

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "corpus"


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> Path:
    """KILN_TEST_FUZZ names the folder where `make fuzz` builds the same."""
    build = Path(os.environ.get("KILN_TEST_FUZZ") or tmp_path_factory.mktemp("fuzz"))
    configure = ["cmake", "-S", ROOT / "runtime_cpp" / "fuzz", "-B", build, "-G", "Ninja", "-DCMAKE_CXX_COMPILER=c++"]
    tools = os.environ | {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}  # CMake builds all anew for another CMake
    for command in (configure, ["cmake", "--build", build]):
        result = subprocess.run(command, capture_output=True, text=True, env=tools)
        assert result.returncode == 0, result.stdout + result.stderr
    return build


@pytest.mark.parametrize("target", sorted(p.name for p in CORPUS.iterdir() if (ROOT / "runtime_cpp" / "fuzz" / f"{p.name}.cpp").exists()))
def test_corpus(targets, target):
    result = subprocess.run([targets / f"fuzz_{target}", f"-artifact_prefix={targets}/", CORPUS / target], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{len(list((CORPUS / target).iterdir()))} inputs given" in result.stderr


def test_the_driver_finds_a_planted_fault_and_keeps_the_input(targets, tmp_path):
    command = [targets / "fuzz_planted", "-max_total_time=60", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    result = subprocess.run(command, capture_output=True, text=True)
    (found,) = tmp_path.iterdir()
    assert result.returncode != 0 and found.read_bytes().startswith(b"kiln")
    assert "heap-buffer-overflow" in result.stderr or "insufficient space" in result.stderr  # whichever sanitizer is first
    assert subprocess.run([targets / "fuzz_planted", found], capture_output=True, cwd=tmp_path).returncode != 0
