"""Hostile input, a little of it in every run (`python3 -m tests.tools.fuzz_python` for more), and what it once found."""

from __future__ import annotations

from pathlib import Path

import pytest

from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import survey
from tests.tools.fuzz_python import base, batch, bounded, check_gguf

CORPUS = sorted((Path(__file__).parents[1] / "corpus" / "gguf").glob("*"))


@pytest.mark.parametrize(("target", "examples"), [("gguf", 150), ("tokenizer", 60), ("template", 8), ("text", 100)])
def test_a_little_hostile_input(target: str, examples: int) -> None:
    assert batch(target, examples) >= min(examples, 8)


def test_the_unspoiled_file_is_sound(tmp_path: Path) -> None:
    """What is spoiled can be read, planned and packed before."""
    (tmp_path / "m.gguf").write_bytes(base().encode())
    assert survey(tmp_path / "m.gguf").problems == ()
    assert len(open_gguf(tmp_path / "m.gguf").tensors) == len(base().tensors)
    check_gguf(base().encode())


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.name)
def test_the_corpus(path: Path) -> None:
    bounded(check_gguf, path.read_bytes())
