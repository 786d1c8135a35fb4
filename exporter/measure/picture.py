"""`--plot`: a row of panels in one file, in a format that matplotlib writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kiln.exporter.errors import KilnError


def check_plot() -> None:
    """Raises KilnError before anything is measured for a picture that cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise KilnError("--plot needs matplotlib: pip install matplotlib") from None


@contextlib.contextmanager
def panels(path: Path, count: int, title: str = "") -> Iterator[list[Any]]:
    """`count` axes to draw on; the file is written when the block ends. Raises KilnError."""
    check_plot()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5.5 * count, 4), squeeze=False, layout="constrained")
    try:
        yield list(axes[0])
        if title:
            figure.suptitle(title)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as e:
        raise KilnError(f"--plot {path}: {e}") from e
    finally:
        pyplot.close(figure)


def log2_ticks(axes: Any, values: list[int]) -> None:
    """The x axis by powers of two, labelled at the values."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(v) for v in values], rotation=45)
