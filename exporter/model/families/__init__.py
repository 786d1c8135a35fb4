"""The families: one file each, beside `configs/NAME.toml`. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kiln.custom_ops.geometry import Geometry
from kiln.exporter.model.records import ModelConfig

if TYPE_CHECKING:
    from kiln.exporter.source.fields import Fields


@dataclass(frozen=True)
class Family:
    """What a family's file says. Each module here has one, as FAMILY, but for those of drafters, which have `read_layers`.

    read: the fields of a file with so many layers -> what of `ModelConfig` is the family's own, `layers` among them.
    synthetic: the same of a geometry's first layers, for files of random weights.
    write: a model -> the fields of its file beside those that all families have, by their names in the family's table, or whole keys.
    """

    read: Callable[[Fields, int], dict[str, Any]]
    synthetic: Callable[[Geometry, int], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
