"""Every test of the runner runs on the CPU and, marked gpu, on a GPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import kiln
from tests.conftest import shared
from tests.runtime.batches import batch_artifact
from tests.runtime.toy import write_artifact


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_runner_thread():
    """For models so small that two threads only wait for each other."""
    kiln.set_threads(1)
    yield
    kiln.set_threads(0)


@pytest.fixture(scope="session")
def toy(device, tmp_path_factory) -> Path:
    """KILN_TEST_TOY names a directory that keeps it from run to run, and is believed to be of this code."""

    def make(path: Path) -> None:
        path.mkdir(parents=True)
        write_artifact(path, device)

    if kept := os.environ.get("KILN_TEST_TOY"):
        root = Path(kept) / device
        if not root.exists():
            make(root)
        return root
    return shared(tmp_path_factory, f"toy-{device}", make)


@pytest.fixture(scope="session")
def several(device, tmp_path_factory) -> Path:
    return batch_artifact(device, tmp_path_factory)


@pytest.fixture
def copy(toy, tmp_path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "artifact"))
