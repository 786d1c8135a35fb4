"""Where kiln-run is; a module of its own, because `kiln run` should not wait for PyTorch."""

from __future__ import annotations

import shutil
from types import ModuleType

from kiln import _kiln_run
from kiln.exporter.errors import KilnError

BUILT = "pip install kiln-runtime, in a checkout `make build`"


def runner() -> str:
    """Path of kiln-run; raises KilnError where it is not built."""
    binary = _kiln_run.binary() or shutil.which("kiln-run")
    if not binary:
        raise KilnError(f"kiln-run is not built: neither in the package kiln nor on PATH; {BUILT}")
    return binary


def runtime() -> ModuleType:
    """The package kiln with the runner's names; raises KilnError where its module is not built."""
    import kiln

    try:
        kiln.Model  # noqa: B018  is loaded with its first name
    except ImportError as e:
        raise KilnError(f"the runner's Python module is not built ({e.__cause__}); {BUILT}") from e
    return kiln
