from __future__ import annotations

import json
from pathlib import Path

import pytest

import kiln
from kiln.exporter.conversation.template import Template
from kiln.exporter.conversation.vocabulary import Vocabulary, vocabulary
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.tokenizer import read_tokenizer
from tests.conftest import shared
from tests.timeline import FIXTURES

TEMPLATES = tuple(json.loads((FIXTURES / "chat_cases.json").read_text())["templates"])
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """The real vocabulary, by the runner's tokenizer."""
    read = read_tokenizer(open_gguf(FIXTURES / "gemma4-vocab.gguf").metadata)
    assert read

    def write(path: Path) -> None:
        path.mkdir()
        read.write(path / "tokenizer.json")

    path = shared(tmp_path_factory, "gemma4-vocabulary", write) / "tokenizer.json"
    return vocabulary(kiln.Tokenizer(str(path)), path, read.ends)


@pytest.fixture(scope="session")
def templates(words: Vocabulary):
    found = [Template((FIXTURES / name).read_text(), TOKENS, words) for name in TEMPLATES]
    yield found
    for template in found:
        template.close()
