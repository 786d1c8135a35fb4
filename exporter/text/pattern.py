"""The regular expressions of pre-tokenizers, as `re` patterns over the table of unicode.py.

What one may hold, here and in the runner: alternatives `|`, none of which may match nothing; characters; `\\p{L}`, `\\p{N}`, `\\p{M}`,
`\\s`, `\\S`, `\\r`, `\\n`, `\\t`, and a backslash before punctuation; classes `[...]` and `[^...]` of those and of ranges; `?`, `*`, `+`,
`{m}`, `{m,n}`, all greedy; `(?!X)` for one such X; and an alternative that is `(?:...)` or, without regard to case, `(?i:...)` as a whole.
"""

from __future__ import annotations

import re
from functools import cache

from kiln.exporter.text.unicode import CLASSES, table

_TOKEN = re.compile(r"\\p\{(\w+)\}|\\([sS])|\\.|\[\^?|.", re.DOTALL)


@cache
def _cells(name: str) -> str:
    """The inside of a character class."""
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" if a != b else re.escape(chr(a)) for a, b in table()[name])


def compiled(pattern: str) -> re.Pattern[str]:
    out, inside = [], False
    for found in _TOKEN.finditer(pattern):
        text, category, space = found.group(), found.group(1), found.group(2)
        if category or space:
            cells = _cells(CLASSES[category] if category else "SPACE")
            if inside and space == "S":
                raise ValueError(f"{pattern!r}: \\S in a class")
            out.append(cells if inside else f"[{'^' if space == 'S' else ''}{cells}]")
            continue
        inside = text.startswith("[") or (inside and text != "]")
        out.append(text)
    made = re.compile("".join(out))
    if made.match(""):
        raise ValueError(f"{pattern!r} may match nothing")
    return made


def isolated(patterns: list[re.Pattern[str]], text: str) -> list[str]:
    """The pieces of a text: what each pattern matches and what lies between, pattern after pattern."""
    pieces = [text]
    for pattern in patterns:
        cut: list[str] = []
        for piece in pieces:
            at = 0
            for found in pattern.finditer(piece):
                start, end = found.span()
                if at < start:
                    cut.append(piece[at:start])
                cut.append(piece[start:end])
                at = end
            if at < len(piece):
                cut.append(piece[at:])
        pieces = cut
    return pieces
