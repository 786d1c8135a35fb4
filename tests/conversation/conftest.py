from __future__ import annotations

import json

import pytest

import kiln
from kiln.exporter.conversation.template import Template
from kiln.exporter.conversation.vocabulary import Vocabulary, vocabulary
from tests.conftest import gemma4_vocabulary
from tests.timeline import FIXTURES

TEMPLATES = tuple(json.loads((FIXTURES / "chat_cases.json").read_text())["templates"])
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """The real vocabulary, by the runner's tokenizer."""
    path, ends = gemma4_vocabulary(tmp_path_factory)
    return vocabulary(kiln.Tokenizer(str(path)), path, ends)


@pytest.fixture(scope="session")
def templates(words: Vocabulary):
    found = [Template((FIXTURES / name).read_text(), TOKENS, words) for name in TEMPLATES]
    yield found
    for template in found:
        template.close()
