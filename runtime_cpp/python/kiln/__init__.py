"""Kiln: plays compiled artifacts (`Model`, `Session`, `Tokenizer`); with the distribution kiln-export, `kiln.exporter` makes them.

Nothing is loaded before it is used: the runner's module with its first name, numpy with the first logits, torch never by this package.
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# Two distributions fill this package, and a checkout stands beside an installed runner.
__path__ = extend_path(__path__, __name__)

if TYPE_CHECKING:
    from kiln._runtime import (
        Acceptance,
        Batch,
        BatchRow,
        Error,
        Model,
        NgramDrafter,
        ScriptedDrafter,
        Session,
        Snapshot,
        SnapshotStore,
        StepCosts,
        StreamDecoder,
        Tokenizer,
        __version__,
        set_threads,
        share_drafts,
    )

__all__ = [
    "Acceptance",
    "Batch",
    "BatchRow",
    "Error",
    "Model",
    "NgramDrafter",
    "Resumable",
    "ScriptedDrafter",
    "Session",
    "Snapshot",
    "SnapshotStore",
    "StepCosts",
    "StreamDecoder",
    "Tokenizer",
    "__version__",
    "set_threads",
    "share_drafts",
]


def __getattr__(name: str) -> Any:
    """The runner's names. ImportError, with what to do, where its module is not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        _runtime = import_module("kiln._runtime")
    except ImportError as e:
        raise ImportError(f"kiln.{name} needs the runner ({e}): pip install kiln-runtime, or `make build` in a checkout") from e
    globals().update({each: getattr(_runtime, each) for each in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
