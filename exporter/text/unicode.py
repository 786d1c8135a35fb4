"""Classes of code points: letters, numbers and marks by general category, white space by property. The runner has the same table.

It is that of Unicode 16, which the `tokenizers` library has. `python -m kiln.exporter.text.unicode` writes it anew, with the package
unicodedata2 of that version; what is white space has not changed since Unicode 6.3.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import ModuleType

TABLE = Path(__file__).with_name("unicode.def")
VERSION = "16.0.0"
CLASSES = {"L": "LETTER", "N": "NUMBER", "M": "MARK"}  # first letter of the general category -> name in the table
SPACE = (0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)


def ranges(points: list[int]) -> list[tuple[int, int]]:
    """Sorted code points as (first, last)."""
    found: list[tuple[int, int]] = []
    for c in points:
        if found and found[-1][1] == c - 1:
            found[-1] = (found[-1][0], c)
        else:
            found.append((c, c))
    return found


def generate(database: ModuleType) -> str:
    """The table's text, of a module like `unicodedata`."""
    found: dict[str, list[int]] = {name: [] for name in CLASSES.values()}
    for c in range(0x110000):
        if name := CLASSES.get(database.category(chr(c))[0]):
            found[name].append(c)
    lines = [
        f"// Unicode {database.unidata_version}: RANGE(class, first, last).",
        "// Written by exporter/text/unicode.py, read by it and by runtime_cpp/src/text.",
    ]
    for name, points in (found | {"SPACE": list(SPACE)}).items():
        cells = [f"RANGE({name}, 0x{first:X}, 0x{last:X})" for first, last in ranges(points)]
        lines += [" ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    return "\n".join(lines) + "\n"


@cache
def table() -> dict[str, list[tuple[int, int]]]:
    """Class -> ranges of code points, first and last."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, first, last in re.findall(r"RANGE\((\w+), 0x(\w+), 0x(\w+)\)", TABLE.read_text(encoding="utf-8")):
        found.setdefault(name, []).append((int(first, 16), int(last, 16)))
    return found


if __name__ == "__main__":
    import unicodedata2

    assert unicodedata2.unidata_version == VERSION
    TABLE.write_text(generate(unicodedata2))
