"""Where kiln-run is; a module of its own, because `kiln run` should not wait for PyTorch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from kiln.exporter.errors import KilnError


def runner() -> str:
    """Path of kiln-run; raises KilnError where it is not built."""
    beside = Path(sys.executable).parent / "kiln-run"
    binary = str(beside) if beside.is_file() else shutil.which("kiln-run")
    if not binary:
        raise KilnError(f"kiln-run is not built: neither {beside.name} beside Python nor on PATH; run `make build`")
    return binary
