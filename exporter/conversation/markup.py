"""How models write thoughts and calls: one table, in which a template and its vocabulary find their row by the markers they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Thoughts:
    """open and close: the texts of special tokens. header: text that may follow `open` and is no thought.

    loose: newlines after `close` are no answer. In histories, a thought left in an assistant's text is taken out before the template runs;
    kept: it becomes the message's reasoning, as the templates of this row do it.
    """

    open: str
    close: str
    header: str
    loose: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Calls:
    """open and close: the texts of special tokens. quote: of the token around strings. syntax: a reader of `calls.py`.

    hint: a text that the template has.
    """

    open: str
    close: str
    syntax: str
    quote: str | None = None
    hint: str = ""


THOUGHTS = (
    Thoughts("<|channel>", "<channel|>", "thought\n"),
    Thoughts("<think>", "</think>", "\n", loose=True, kept=True),
)
CALLS = (
    Calls("<|tool_call>", "<tool_call|>", "fields", quote='<|"|>'),
    Calls("<tool_call>", "</tool_call>", "tags", hint="<function="),
    Calls("<tool_call>", "</tool_call>", "json"),
)


@dataclass(frozen=True)
class Markup:
    """The markers of one model; None: it has none."""

    thoughts: Thoughts | None = None
    calls: Calls | None = None

    @classmethod
    def of(cls, template: str, special: Mapping[str, int]) -> Markup:
        """The first rows whose markers are special tokens that the template writes."""

        def has(*texts: str) -> bool:
            return all(text in special and text in template for text in texts)

        thoughts = next((row for row in THOUGHTS if has(row.open, row.close)), None)
        calls = next((row for row in CALLS if has(row.open, row.close, *([row.quote] if row.quote else [])) and row.hint in template), None)
        return cls(thoughts, calls)


def without_thoughts(thoughts: Thoughts | None, text: str) -> tuple[str, str]:
    """A text of a history -> (thoughts in it, the rest). Where nothing closes a thought, it goes to the end."""
    if thoughts is None or (thoughts.open not in text and thoughts.close not in text):
        return "", text
    if thoughts.kept:
        if thoughts.close not in text:
            return "", text
        thought, _, rest = text.partition(thoughts.close)
        return thought.rpartition(thoughts.open)[2].strip("\n"), rest.rpartition(thoughts.close)[2].lstrip("\n")
    rest = "".join(part.partition(thoughts.open)[0] for part in text.split(thoughts.close))
    return "", rest
