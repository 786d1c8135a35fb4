"""The measurement of two artifacts: what it counts, without an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
import torch

from kiln.exporter.errors import KilnError
from kiln.exporter.source.gguf import open_gguf
from tests.nano import artifact_study as study
from tests.nano import data, vocabulary

GGUF = Path(__file__).parent / "gemma4-nano-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> data.Maker:
    return data.Maker(vocabulary.save(open_gguf(GGUF).metadata, tmp_path_factory.mktemp("nano") / "tokenizer.json"))


class Oracle:
    """Knows the whole timeline beforehand, but for the tokens in `forgotten`."""

    def __init__(self, timeline: list[int], forgotten: set[int]):
        self.timeline, self.forgotten, self.at = timeline, forgotten, 0

    def reset(self) -> None:
        self.at = 0

    def read(self, tokens: Sequence[int]) -> None:
        assert self.timeline[self.at : self.at + len(tokens)] == list(tokens)
        self.at += len(tokens)

    def score(self, tokens: Sequence[int], piece: int) -> Iterator[torch.Tensor]:
        rows = torch.zeros(len(tokens), 4096)
        for i, token in enumerate(tokens):
            self.read([token])
            if self.at < len(self.timeline) and self.at not in self.forgotten:
                rows[i, self.timeline[self.at]] = 1
        yield rows


def test_windows() -> None:
    assert study.windows([128, 2048, 131072], 256, 131072) == [128, 2048, 130816]
    assert study.windows([128, 512], 64, 2048) == [128, 512]
    with pytest.raises(KilnError, match="windows of 256 tokens at 1700 and 1792 overlap"):
        study.windows([128, 1700, 2048], 256, 2048)


def test_window_rows_are_in_place() -> None:
    timeline = list(range(100))
    rows = study.window_rows(Oracle(timeline, set()), timeline, [10, 40], 5)
    assert rows.shape == (2, 5, 4096) and rows.argmax(-1).tolist() == [[11, 12, 13, 14, 15], [41, 42, 43, 44, 45]]


def test_keys(maker: data.Maker) -> None:
    context, keys = study.key_context(maker, Random(3), 1500, 6)
    tail = [token for lead, value in keys for token in lead + value]
    assert 1350 < len(context) + len(tail) <= 1500
    text = maker.tokenizer.decode(context)
    values = [maker.tokenizer.decode(value).strip() for _, value in keys]
    assert len(set(values)) == 6 and all(value in text for value in values) and all(len(value) == 5 for value in values)
    at = [text.index(value) for value in values]
    assert at != sorted(at), "asked for in the order in which they were hidden"
    assert study.answers(Oracle(context + tail, set()), context, keys) == [True] * 6
    last_digit = len(context) + sum(len(lead) + len(value) for lead, value in keys[:3]) - 1
    assert study.answers(Oracle(context + tail, {last_digit}), context, keys) == [True, True, False, True, True, True]
    with pytest.raises(KilnError, match="keys do not fit"):
        study.key_context(maker, Random(3), 300, 6)


def test_divergence() -> None:
    """Against distributions written down, see tests/exporter/measure/test_eval.py; both directions differ."""
    half, quarter = torch.tensor([[[0.5, 0.5]] * 2]).log(), torch.tensor([[[0.25, 0.75]] * 2]).log()
    found = study.divergence(half, quarter, torch.tensor([[0, 1]]))
    assert found["kl_exact_tq4"] == pytest.approx(0.143841, abs=1e-5) and found["kl_tq4_exact"] == pytest.approx(0.130812, abs=1e-5)
    assert found["below"] == 2 and found["tokens"] == 2


def test_cosine_of_a_position() -> None:
    """Two contexts, three positions, cosines 1 but for 0 and 0.6 of different positions, then of the same one."""
    exact, away, near = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.6, 0.8])
    targets = torch.zeros(2, 3, dtype=torch.int64)
    for rows, lowest in ([[away, exact, exact], [exact, near, exact]], 0.5), ([[exact, away, exact], [exact, near, exact]], 0.3):
        found = study.divergence(exact.expand(2, 3, 2), torch.stack([torch.stack(row) for row in rows]), targets)
        assert found["cosine_position_min"] == pytest.approx(lowest) and found["cosine_min"] == 0 and found["below"] == 2
