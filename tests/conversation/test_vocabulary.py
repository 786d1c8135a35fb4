"""Ids of texts that come again."""

from __future__ import annotations

from kiln.exporter.conversation.vocabulary import Encoded, Vocabulary


class Counting:
    """A tokenizer of characters that counts what it is asked."""

    bos = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, parse_special: bool = False, add_bos: bool = True) -> list[int]:
        assert not parse_special and not add_bos
        self.asked.append(text)
        return [ord(c) for c in text]

    def piece(self, id: int, skip_special: bool = True) -> bytes:
        return chr(id).encode()


def test_a_long_text_is_encoded_once() -> None:
    pieces = Counting()
    vocabulary = Vocabulary(pieces, {}, frozenset())
    long, short = "a" * Encoded.LEAST, "b" * (Encoded.LEAST - 1)
    for _ in range(3):
        for text in (long, short):
            ids = vocabulary.ids(text)
            assert ids == [ord(text[0])] * len(text)
            ids.clear()  # is the caller's
    assert pieces.asked == [long, short, short, short]
    assert vocabulary.ids(7) == [7]


def test_what_is_kept_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(Encoded, "MOST", 3 * Encoded.LEAST)
    pieces, encoded = Counting(), Encoded()
    texts = [c * Encoded.LEAST for c in "abc"]
    for text in (*texts, texts[0], "d" * Encoded.LEAST):  # b is the one used least recently
        encoded.of(pieces, text)
    pieces.asked.clear()
    for text in (texts[0], texts[2], texts[1]):
        encoded.of(pieces, text)
    assert pieces.asked == [texts[1]]
    huge = "x" * (3 * Encoded.LEAST + 1)
    encoded.of(pieces, huge)
    encoded.of(pieces, huge)
    assert pieces.asked[1:] == [huge, huge]
