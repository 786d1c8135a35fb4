"""Every test of the runner runs on the CPU and, marked gpu, on a GPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import kiln as command
from tests.conftest import shared
from tests.gguf_files import two_layers
from tests.runtime.toy import write_artifact


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


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
def three_rows(tmp_path_factory) -> Path:
    """Steps of 1, 2 and 4 tokens over 3 timelines of 64 positions, read in chunks of 32. A layer with a ring of 16 + 6 slots and one with
    TQ4 and an exact window of 32 + 6: both are passed. KILN_TEST_BATCH names a folder that has it as cpu/.
    """

    def make(path: Path) -> None:
        gguf = two_layers(tmp_path_factory.mktemp("model") / "two.gguf")
        command("export", "--gguf", gguf, "--out", path, "--target", "cpu", "--max-seq-len", 64, "--prefill-chunk", 32,
                "--turboquant", "--residual-length", 32, "--decode-rows", "1,2,4", "--rows", 3)  # fmt: skip

    kept = os.environ.get("KILN_TEST_BATCH")
    return Path(kept) / "cpu" if kept else shared(tmp_path_factory, "artifact-batch", make)


@pytest.fixture
def copy(toy, tmp_path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "artifact"))
