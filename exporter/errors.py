"""The one exception of the exporter."""

from __future__ import annotations


class KilnError(Exception):
    """Bad input or an impossible request: one line saying what, where and what to do. The CLI prints it and exits with 1."""
