"""A family's fields, read from GGUF metadata in whatever number type and form they have; what is wrong or not applied is told."""

from __future__ import annotations

import math
from typing import Any

from kiln.exporter.model.records import Yarn
from kiln.exporter.source.gguf import GGUFFile


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}... "


def as_integer(value: Any) -> int | None:
    """An integer of any number type; None for anything else."""
    if isinstance(value, int | float) and math.isfinite(value) and value == int(value):
        return int(value)
    return None


def _as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


class Fields:
    """Reads a family's fields from the metadata in whatever number type and form they have; what is wrong is added to `problems`.

    A field that is wrong reads as 1, so that the others can be checked, too.
    """

    def __init__(self, gguf: GGUFFile, table: dict[str, Any], problems: list[str]):
        self.gguf, self.keys, self.problems = gguf, table["keys"], problems

    def fail(self, key: str, what: str, hint: str = "convert the model again") -> None:
        self.problems.append(f"{self.gguf.path}: metadata key {key} {what}; {hint}")

    def key(self, field: str) -> str:
        return self.keys[field]["key"]

    def raw(self, field: str) -> tuple[str, Any]:
        """Key and value, None where it is missing; an array of one item, or of equal ones, is that item."""
        key, metadata = self.key(field), self.gguf.metadata
        if key not in metadata:
            if "default" not in self.keys[field]:
                self.fail(key, "is missing", "it cannot be guessed, convert the model again with a current converter")
            return key, self.keys[field].get("default")
        return key, metadata[key]

    def positive(self, key: str, value: Any, number_type: type, zero: bool = False) -> Any:
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        number = None if isinstance(value, bool) else (as_integer if number_type is int else _as_number)(value)
        if number is None or number < 0 or (number == 0 and not zero) or number >= 1 << 48:
            self.fail(key, f"is {shown(value)}, a positive {'integer' if number_type is int else 'number'} was expected")
            return number_type(1)
        return number_type(number)

    def integer(self, field: str, zero: bool = False) -> int:
        key, value = self.raw(field)
        return 1 if value is None else self.positive(key, value, int, zero)

    def has(self, *tensors: str) -> bool:
        """The file holds one of them."""
        return any(name in self.gguf.tensors for name in tensors)

    def number(self, field: str, zero: bool = False) -> float:
        key, value = self.raw(field)
        return 1.0 if value is None else self.positive(key, value, float, zero)

    def rope_factor(self) -> float:
        """What linear scaling divides positions by; 1 where the file asks for none. Another kind of scaling is refused by name."""
        key, kind = self.raw("rope_type")
        key_factor, factor = self.raw("rope_factor")
        if kind in ("none", ""):
            return 1.0
        applied = ("linear", "yarn") if "rope_context" in self.keys else ("linear",)
        if kind not in applied:
            known = " and ".join(f"'{name}'" for name in applied) + (" are" if len(applied) > 1 else " is")
            self.fail(key, f"is {shown(kind)}: of the ways to scale rotary embedding only {known} applied",
                      "use the file for the model's own context, without a longer one by scaling")  # fmt: skip
            return 1.0
        return self.positive(key_factor, factor, float) if factor else 1.0

    def rope_scaling(self) -> dict[str, Any]:
        """`factor` and `yarn` of a rope whose pairs are a whole head."""
        factor, (_, kind) = self.rope_factor(), self.raw("rope_type")
        growth = self.number("rope_magnitude", zero=True) or 1.0
        if kind != "yarn" or factor == 1:
            if growth != 1:
                self.fail(self.key("rope_magnitude"), f"is {growth}: it is applied where {self.key('rope_type')} is 'yarn' alone")
            return {"factor": factor}
        if factor < 1:
            self.fail(self.key("rope_factor"), f"is {factor}, but YaRN makes a context longer")
        fast, slow = (self.number(f"rope_{name}") for name in ("fast", "slow"))
        context = self.integer("rope_context", zero=True) or self.integer("context_length")
        if fast <= slow:
            self.fail(self.key("rope_fast"), f"is {fast}, no more than {self.key('rope_slow')}, {slow}")
        return {"factor": factor, "yarn": Yarn(context, fast, slow, growth * (1 + 0.1 * math.log(max(factor, 1.0))))}

    def per_layer(self, field: str, count: int, zero: bool = False) -> list[int]:
        key, value = self.raw(field)
        if value is None:
            return [1] * count
        if not isinstance(value, list) or len(value) == 1:
            return [self.positive(key, value, int, zero)] * count
        if len(value) != count:
            self.fail(key, f"has {len(value)} entries for {count} layers")
            return [1] * count
        before = len(self.problems)
        numbers = [self.positive(key, v, int, zero) for v in value]
        del self.problems[before + 1 :]  # one line a key is enough
        return numbers

    def experts(self, count: str, used: str, size: str) -> tuple[int, int, int] | None:
        """How many experts there are, how many a token takes, and their inner size; None where there are none."""
        number = self.integer(count, zero=True)
        if not number:
            for field in (used, size):
                if "default" in self.keys[field] and (value := self.integer(field, zero=True)):
                    self.fail(self.keys[field]["key"], f"is {value}, but there are no experts")
            return None
        taken = self.integer(used)
        if taken > number:
            self.fail(self.keys[used]["key"], f"is {taken}, but there are {number} experts")
        return number, taken, self.integer(size)

    def pattern(self, field: str, count: int) -> list[bool]:
        """One truth value a layer, as bools or as 0 and 1; or one bool for all; or a period of n layers, the last of them False."""
        key, value = self.raw(field)
        if value is None:
            return [False] * count
        if isinstance(value, bool):
            return [value] * count
        period = as_integer(value)
        if period is not None and period >= 2:
            return [(i + 1) % period != 0 for i in range(count)]
        if not isinstance(value, list) or len(value) != count or any(as_integer(v) not in (0, 1) for v in value):
            self.fail(key, f"is {shown(value)}, it must be {count} booleans, one for each layer")
            return [False] * count
        return [bool(v) for v in value]


def check_keys(gguf: GGUFFile, table: dict[str, Any], fields: Fields) -> None:
    """Adds a problem for every metadata key of the architecture that changes the computation and is not applied."""
    known = {spec["key"] for spec in table["keys"].values()} | set(table["same"])
    prefix, harmless = f"{table['architecture']}.", tuple(table["harmless"]["prefixes"])
    refused: set[str] = set()
    for key in gguf.metadata:
        if not key.startswith(prefix) or key in known or key.startswith(harmless):
            continue
        part = next((start for start in table["unsupported"] if key.startswith(start)), None)
        many = gguf.metadata.length(key) or 0
        value = f"an array of {many}" if many > 4096 else gguf.metadata[key]
        items = value if isinstance(value, list) else [value]
        if part:
            if any(v != 0 for v in items) and part not in refused:
                refused.add(part)
                instead = table.get("instead", "use another model of the family")
                fields.fail(key, f"is {shown(value)}: {table['unsupported'][part]} are not supported yet", instead)
        elif key == f"{prefix}vocab_size":
            rows = gguf.metadata.length("tokenizer.ggml.tokens")
            if rows is not None and as_integer(value) != rows:
                fields.fail(key, f"is {shown(value)}, but tokenizer.ggml.tokens has {rows} tokens")
        elif key not in table["neutral"]:
            fields.fail(key, f"is {shown(value)}: it is not known to Kiln and may change the computation", "convert the model without it")
        elif not items or any(v not in table["neutral"][key] for v in items):
            fields.fail(key, f"is {shown(value)}: it changes the computation and is not applied", "convert the model without it")
