"""Answers that are led: a call that must come, calls of some tools only, a thought that may not grow, tokens before which none may end.

Where the next ids are known they take the place of the token that was sampled, which needs no logits. Where one of several texts must come
(`OneOf`), the tokens that may be next are told to `Rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kiln.exporter.conversation.calls import opening
from kiln.exporter.conversation.markup import Markup
from kiln.exporter.conversation.parser import CONTENT, REASONING, Parser
from kiln.exporter.conversation.vocabulary import Vocabulary


class Lexicon:
    """bytes -> id of every ordinary token, made when it is asked for first. size: of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, size: int):
        self.vocabulary, self.size = vocabulary, size

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        special, piece = set(self.vocabulary.special.values()), self.vocabulary.pieces.piece
        found: dict[bytes, int] = {}
        for i in range(self.size):
            if i not in special and (text := piece(i, False)):
                found.setdefault(text, i)
        return found


class OneOf:
    """One of several texts, token by token, however it is cut into tokens."""

    def __init__(self, lexicon: Lexicon, texts: Sequence[str]):
        self._lexicon, self._left = lexicon, [text.encode() for text in texts]

    @property
    def over(self) -> bool:
        return any(not text for text in self._left)

    def allowed(self) -> set[int]:
        ids = self._lexicon.ids
        return {ids[text[:k]] for text in self._left for k in range(1, len(text) + 1) if text[:k] in ids}

    def take(self, token: int) -> None:
        piece = self._lexicon.vocabulary.pieces.piece(token, False)
        self._left = [text[len(piece) :] for text in self._left if text.startswith(piece)]


@dataclass(frozen=True)
class Calling:
    """tool_choice. must: the answer is a call; names: of the tools that may be called, None: all."""

    must: bool = False
    names: tuple[str, ...] | None = None


class Steer:
    """One answer's. `replacement` and `taken` are called for each token in turn; `allowed` before it is chosen.

    budget: ids of the thoughts, None: no limit. calling: None where there are no tools. grammar: a `Grammar` of the content, or None; with
    one, may_think says whether a thought may come before it.
    """

    def __init__(
        self,
        parser: Parser,
        vocabulary: Vocabulary,
        markup: Markup,
        lexicon: Lexicon,
        tools: Sequence[str] = (),
        calling: Calling | None = None,
        budget: int | None = None,
        grammar: Any = None,
        may_think: bool = False,
    ):
        self._parser, self._vocabulary, self._markup, self._lexicon = parser, vocabulary, markup, lexicon
        self._budget, self._thought, self._grammar, self._may_think = budget, 0, grammar, may_think
        special = vocabulary.special
        self._open = special[markup.calls.open] if markup.calls else -1
        self._thoughts = (special[markup.thoughts.open], special[markup.thoughts.close]) if markup.thoughts else (-1, -1)
        self._must = bool(calling and calling.must)
        narrow = calling is not None and calling.names is not None
        self._names = tuple(calling.names if calling and calling.names is not None else tools) if self._must or narrow else ()
        self._begun = False  # the content or the call that must come
        self._one: OneOf | None = None  # a call's name, which comes now

    @property
    def needs_rows(self) -> bool:
        return len(self._names) > 1 or (bool(self._names) and not self._must) or self._grammar is not None

    def allowed(self) -> Any:
        """Ids that may be next, or bool [V]; None: all."""
        if self._one:
            return self._one.allowed()
        if self._grammar is not None and self._parser.within == CONTENT:
            return self._grammar.allowed(() if self._begun or not self._may_think else self._thoughts[:1])
        if self._grammar is not None and self._parser.within == REASONING:
            return self._grammar.within_a_thought(self._thoughts[1])
        return None

    def replacement(self, token: int) -> tuple[int, ...]:
        """What must come in the token's place; nothing: it may come."""
        within, (opens, closes) = self._parser.within, self._thoughts
        ends = token in self._vocabulary.ends
        if within == REASONING:
            if self._budget is not None and self._thought >= self._budget and token != closes:
                return (closes,)
            return (closes, *self._opening()) if self._must and not self._begun and (ends or token == self._open) else ()
        if not self._begun and self._budget == 0 and token == opens:
            return (opens, closes)
        if self._must and not self._begun and token != opens and within == CONTENT:
            return self._opening()
        return ()

    def taken(self, token: int) -> None:
        """A token that counts; the parser has had it."""
        if self._parser.within == REASONING:
            self._thought += token != self._thoughts[0]
            return
        if self._one:
            self._one.take(token)
            if self._one.over:
                self._one = None
        elif token == self._open and self._names:
            self._one = None if self._must and len(self._names) == 1 else OneOf(self._lexicon, self._texts())
        if token in self._thoughts:
            return
        if self._grammar is not None and self._parser.within == CONTENT:
            self._grammar.take(token)
        self._begun = True

    def _texts(self) -> list[str]:
        assert self._markup.calls
        return [opening(self._markup.calls.syntax, name) for name in self._names]

    def _opening(self) -> tuple[int, ...]:
        """The marker, and the name where there is one only."""
        name = self._vocabulary.ids(self._texts()[0]) if len(self._names) == 1 else []
        return (self._open, *name)


def bars(ends: Sequence[int], least: int) -> Callable[[int], Sequence[int]]:
    """No end token before `least` tokens."""
    return lambda count: ends if count < least else ()
