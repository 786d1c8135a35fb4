"""An artifact with steps of several tokens over several timelines, for each device, on the CPU with a drafter: for tests of batches and of
drafts."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

import kiln
from tests.conftest import kiln as command
from tests.conftest import shared

CHUNK, ROWS = 32, 3
# By device: the longest M, slots, slots of a ring beside its window, weights. Both kinds of ring are passed: within 64 positions a sliding
# layer's of 16 + 6 slots and an exact window of 32 + 6, within 192 of 128 + 14 and 32 + 14.
FORMS = {"cpu": ((2, 4), 64, {"ring": (22, 16), "exact": (38, 32)}), "cuda": ((2, 4, 8), 192, {"ring": (142, 128), "exact": (46, 32)})}
FIXTURES = Path(__file__).parents[1] / "fixtures"
NANO = Path(__file__).parents[1] / "nano" / "gemma4-nano-Q4_K_M.gguf"


def batch_artifact(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the CPU a fixture of three layers and its drafter, weights copied, on a GPU the small trained model, whose weights are quantized.

    KILN_TEST_BATCH names a directory that may have them, by device; of a GPU's the code alone, the weights left in their file.
    """
    longest, slots, _ = FORMS[device]
    options = ("--max-seq-len", slots, "--prefill-chunk", CHUNK, "--turboquant", "--residual-length", 32, "--rows", ROWS,
               "--decode-rows", ",".join(map(str, (1, *longest))))  # fmt: skip

    def make(path: Path) -> None:
        gguf = FIXTURES / "gemma4-tiny-mtp.gguf" if device == "cpu" else NANO
        drafter = ("--draft-gguf", FIXTURES / "gemma4-assistant-tiny-mtp.gguf")
        more = ("--target", "cpu", *drafter, "--weights", "copy") if device == "cpu" else ("--target", "native")
        command("export", "--gguf", gguf, "--out", path, *options, *more)

    kept = os.environ.get("KILN_TEST_BATCH")
    if kept and (Path(kept) / device).is_dir():
        return Path(kept) / device
    return shared(tmp_path_factory, f"artifact-batch-{device}", make)


def load(artifact: Path, device: str) -> kiln.Model:
    return kiln.Model(str(artifact), device, **({} if device == "cpu" else {"weights": str(NANO)}))


def spoil(address: int, size: int, device: str) -> None:
    """Fills memory of caches with NaN."""
    if device == "cpu":
        ctypes.memset(address, 0xFF, size)
    else:
        torch.cuda.synchronize()  # makes the GPU's context current
        assert ctypes.CDLL("libcuda.so.1").cuMemsetD8_v2(ctypes.c_uint64(address), ctypes.c_ubyte(0xFF), ctypes.c_size_t(size)) == 0
        torch.cuda.synchronize()
