"""Every test of the runner runs on the CPU and, marked gpu, on a GPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.runtime.toy import write_artifact


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def toy(device, tmp_path_factory) -> Path:
    """KILN_TEST_TOY names a directory that keeps it from run to run, and is believed to be of this code."""
    kept = os.environ.get("KILN_TEST_TOY")
    root = (Path(kept) if kept else tmp_path_factory.mktemp("toy")) / device
    if root.exists():
        return root
    root.mkdir(parents=True)
    write_artifact(root, device)
    return root


@pytest.fixture
def copy(toy, tmp_path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "artifact"))
