"""JSON schemas as masks over the vocabulary, by llguidance: which tokens may be next in a content that must fit a schema.

The rest of the vocabulary's table is of the tokenizer alone and is made at the first request that needs it. Control tokens stand in no
content, whatever the schema: but for the end's, where the content may end.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from kiln.exporter.conversation.vocabulary import Vocabulary
from kiln.exporter.errors import one_line
from kiln.exporter.serve.problem import Problem, unsupported, wrong
from kiln.exporter.serve.steps.engine import JobError

UNUSED = re.compile(rb"<unused\d+>")  # tokens of vocabularies that no text has
# One space or newline between tokens: with more a model may go on with them for ever.
OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]?"}
LARGEST = 256 << 10  # characters of a schema


class Grammar:
    """One answer's. Masks are bool [V]."""

    def __init__(self, grammars: Grammars, text: str):
        from llguidance import LLMatcher

        self._grammars = grammars
        self._matcher = LLMatcher(grammars.tokenizer, text, log_level=0)

    def allowed(self, more: Collection[int] = ()) -> Any:
        """What may be next; `more` may be, too. Raises JobError where the grammar cannot go on."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():  # behind a tag stand the schema and what was written, which are nobody's
            raise JobError("the grammar failed: " + one_line(self._matcher.get_error().partition("\n<")[0]))
        mask = np.unpackbits(bits, count=self._grammars.size, bitorder="little").astype(bool) & ~self._grammars.never
        mask[list(more)] = True
        return mask

    def within_a_thought(self, close: int) -> Any:
        """Text, and the thought's end: no call and no end of the answer."""
        mask = ~(self._grammars.never | self._grammars.ends)
        mask[close] = True
        return mask

    def take(self, token: int) -> None:
        if not self._grammars.ends[token]:
            self._matcher.consume_token(token)


class Grammars:
    """Of one tokenizer.json. size: of the vocabulary. Any thread may call."""

    def __init__(self, path: Path, vocabulary: Vocabulary, size: int):
        self.path, self.size, self._vocabulary = path, size, vocabulary
        self.ends = np.zeros(size, bool)
        self.ends[sorted(vocabulary.ends)] = True
        self.never = np.zeros(size, bool)
        self.tokenizer: Any = None
        self._lock = threading.Lock()

    def check(self, schema: Any, param: str) -> str:
        """The grammar of a JSON schema. Raises Problem, which names what of it cannot be honoured."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise unsupported(param, "llguidance is not installed; pip install 'kiln-export[serve]'") from None
        self._prepare()
        text = json.dumps(schema)
        if len(text) > LARGEST:
            raise wrong(param, f"the schema has {len(text)} characters, {LARGEST} are taken at most")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
            _, said = LLMatcher.validate_grammar_with_warnings(grammar, self.tokenizer)
            if not said:
                self.make(grammar).allowed()  # a limit of the library's may be passed as it begins
        except (ValueError, JobError) as e:
            said = [str(e)]
        if said:
            raise wrong(param, f"the schema cannot be honoured: {one_line('; '.join(said))}", "unsupported_schema")
        return grammar

    def make(self, grammar: str) -> Grammar:
        return Grammar(self, grammar)

    def _prepare(self) -> None:
        from llguidance import LLTokenizer

        with self._lock:
            if self.tokenizer is not None:
                return
            never = self.never.copy()
            special = self._vocabulary.special.values()
            never[[i for i in special if i not in self._vocabulary.ends]] = True
            piece = self._vocabulary.pieces.piece
            never[[i for i in range(self.size) if UNUSED.fullmatch(piece(i, False))]] = True
            try:
                found = LLTokenizer(str(self.path), n_vocab=self.size, eos_token=sorted(self._vocabulary.ends))
            except (ValueError, RuntimeError) as e:
                raise Problem(400, f"this model's tokenizer takes no grammar: {str(e)[:200]}", None, "unsupported") from None
            self.never, self.tokenizer = never, found
