"""The fields of a JSON body by type and range: null is as absent, unknown fields are passed over, a wrong type is a `Problem`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kiln.exporter.conversation.request import is_halved
from kiln.exporter.serve.problem import Problem, unsupported, wrong

INT64 = (-(1 << 63), (1 << 63) - 1)


def read_json(raw: bytes | bytearray, depth: int, brackets: int) -> dict[str, Any]:
    """A JSON object nested at most so deep, with so many lists and objects. Raises Problem."""

    def constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    def number(text: str) -> float:
        """Where it is beyond float64, what repeats it would write no JSON."""
        value = float(text)
        return value if math.isfinite(value) else constant(text[:40])

    if raw.count(b"[") + raw.count(b"{") > brackets:  # those in texts as well: to tell them apart would be to read it
        raise Problem(413, f"the body has more than {brackets} opening brackets", None, "request_too_large")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=constant, parse_float=number)
    except UnicodeDecodeError as e:
        raise Problem(400, f"the body is not UTF-8: {e.reason} at byte {e.start}", None, "invalid_json") from None
    except RecursionError:
        raise Problem(400, f"the body is nested more than {depth} deep", None, "invalid_json") from None
    except ValueError as e:
        raise Problem(400, f"the body is not JSON: {str(e)[:200]}", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise Problem(400, f"the body is a JSON {type(value).__name__}, an object was expected", None, "invalid_json")
    level: list[Any] = [value]
    for _ in range(depth):
        level = [x for item in level if isinstance(item, dict | list) for x in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return value
    raise Problem(400, f"the body is nested more than {depth} deep", None, "invalid_json")


def shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]


class Fields:
    """body: an object; part: what stands before a field's name in messages."""

    def __init__(self, body: Mapping[str, Any], part: str = ""):
        self.body, self.part = body, part

    def name(self, name: str) -> str:
        return f"{self.part}.{name}" if self.part and name else self.part or name

    def has(self, name: str) -> bool:
        return self.body.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong(self.name(name), f"a text was expected, not {shown(value)}")
        if is_halved(value):
            raise wrong(self.name(name), "is no Unicode text: it has half of a surrogate pair")
        return value

    def needed(self, name: str) -> str:
        """A text that may neither lack nor be empty."""
        value = self.text(name)
        if not value:
            raise wrong(self.name(name), "is missing" if value is None else "is empty")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(self.name(name), f"true or false was expected, not {shown(value)}")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(self.name(name), f"a whole number was expected, not {shown(value)}")
        if not low <= value <= high:
            raise wrong(self.name(name), f"{str(value)[:40]} is outside of {low} .. {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(self.name(name), f"a number was expected, not {shown(value)}")
        if not low <= value <= high or (isinstance(value, float) and not math.isfinite(value)):
            raise wrong(self.name(name), f"{str(value)[:40]} is outside of {low:g} .. {high:g}")
        return float(value)

    def choice(self, name: str, options: Sequence[str], default: str | None = None) -> str | None:
        value = self.text(name, default)
        if value is not None and value not in options:
            raise wrong(self.name(name), f"{value[:40]!r} is none of {', '.join(options)}")
        return value

    def items(self, name: str, most: int) -> list[Any] | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise wrong(self.name(name), f"a list was expected, not {shown(value)}")
        if len(value) > most:
            raise wrong(self.name(name), f"has {len(value)} entries, {most} are taken at most")
        return value

    def object(self, name: str) -> Fields | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong(self.name(name), f"an object was expected, not {shown(value)}")
        return Fields(value, self.name(name))

    def refuse(self, name: str, why: str, *neutral: Any) -> None:
        """A field that would change the answer and cannot be honoured: anything but absent or neutral is a Problem."""
        value = self.body.get(name)
        if value is not None and not any(type(value) is type(x) and value == x for x in neutral):
            raise unsupported(self.name(name), why)
