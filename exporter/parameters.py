"""Types of the command's parameters."""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path
from typing import Any

import click


class UserPath(click.Path):
    """A path as a shell hands it over: `--out=~/model` arrives with its tilde."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # nobody's home; no path at all, which is told where it is opened
            return path.expanduser() if str(path).startswith("~") and not path.exists() else path
        return path


PATH = UserPath(path_type=Path)


class Float(click.FloatRange):
    """A number within a range, none of which is infinite or none at all."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        return found if math.isfinite(found) else self.fail(f"{value} is not a finite number", param, ctx)


class Device(click.ParamType):
    """Where an artifact is played."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", value, re.ASCII):
            self.fail(f"{value!r} is none of auto, cpu, cuda and cuda:N", param, ctx)
        return value


DEVICE = click.option("--device", type=Device(), metavar="NAME", default="auto", show_default=True, help="cpu, cuda or cuda:N.")


class Numbers(click.ParamType):
    """`1,4,8`: numbers above 0, separated by commas."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]):
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        try:
            found = [self.kind(part) for part in value.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < number < float("inf") for number in found):
            self.fail(f"{value!r} is not a list of {'whole ' if self.kind is int else ''}numbers above 0 like 1,4,8", param, ctx)
        return found


def is_model_file(path: str | Path) -> bool:
    return str(path).lower().endswith(".gguf") or Path(path).is_file()


def of_what_is_played(command: Any) -> Any:
    """The options of chat and serve that say which weights are played, and what is compiled for a model file."""
    length = click.option(
        "--max-seq-len", type=click.IntRange(16), metavar="N",
        help="Of a model file: the context that is compiled.  [default: 8192, or the model's]",
    )  # fmt: skip
    cache = click.option("--kv-cache", type=click.Choice(["f16", "bf16", "tq4"]), help="The same: keys and values.  [default: f16]")
    return WEIGHTS(length(cache(command)))


WEIGHTS = click.option(
    "--weights", type=PATH, metavar="GGUF",
    help="Weights that the artifact does not hold.  [default: the file it was made of, by its link to it or if it lies beside]",
)  # fmt: skip
