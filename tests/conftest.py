from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.timeline import FIXTURES

torch.set_num_threads(2)


def kiln(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """The command as a user runs it."""
    result = subprocess.run([sys.executable, "-m", "exporter", *map(str, arguments)], capture_output=True, text=True)
    if check and result.returncode:
        raise AssertionError(f"kiln {' '.join(map(str, arguments))} gave {result.returncode}:\n{result.stderr}")
    return result


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> dict[str, Path]:
    """CPU artifacts of the fixtures, exported by the command: `plain` (F32, no TurboQuant) and `tq4` (Q4_K_M, TurboQuant, with a residual
    shorter than the context).

    KILN_TEST_ARTIFACTS names a directory that keeps them from run to run.
    """
    kept = os.environ.get("KILN_TEST_ARTIFACTS")
    root = Path(kept) if kept else tmp_path_factory.mktemp("artifacts")
    common = ("--target", "cpu", "--max-seq-len", 96, "--prefill-chunk", 96)
    models = {"plain": ("gemma4-tiny-dense.gguf",), "tq4": ("gemma4-tiny-dense-wide-Q4_K_M.gguf", "--turboquant", "--residual-length", 32)}
    for name, (gguf, *options) in models.items():
        if not (root / name).exists():
            kiln("export", "--gguf", FIXTURES / gguf, "--out", root / name, *options, *common)
    return {name: root / name for name in models}
