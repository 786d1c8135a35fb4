"""The one exception of the exporter."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 2000  # of a line, in characters; a GGUF name may have 65,535 bytes


def printable(text: str) -> str:
    """Names come from files of strangers: line ends and what would steer a terminal are escaped, a long text loses its middle."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 5 :]}"


def one_line(error: object, limit: int = 300) -> str:
    """The text of a foreign error without line ends, at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


class KilnError(Exception):
    """Bad input or an impossible request: one line saying what, where and what to do. The CLI prints it and exits with 1."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class UsageProblem(KilnError):
    """Options that are wrong whatever the files hold: exit code 2."""


class Problems(KilnError):
    """Everything that is wrong with one input; as text the first and how many there are."""

    def __init__(self, found: Sequence[str], see: str):
        more = f" (1 of {len(found)} problems; {see} shows all)" if len(found) > 1 else ""
        super().__init__(found[0] + more)
        self.found = tuple(found)
