"""Every family's fixtures against logits of other implementations: eager, exported, after every pass, compiled and played."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import passes.edit as edit
from custom_ops.gpu.target import compiling_for, gpu_targets
from custom_ops.weights.mixes import MIXES, block_types
from exporter.compiler.trace import ENTRIES, lower, make_kv, runnable, trace
from exporter.errors import KilnError
from exporter.model.caches import kv_plan
from exporter.source.gguf import open_gguf
from exporter.tools.synth import write_synthetic
from tests.conftest import kiln, shared
from tests.gguf_files import rewrite
from tests.timeline import FIXTURES, GREEDY, feed, fixture_logits, fixture_tokens, graph_spec, weights, worst

KILN = torch.ops.kiln


@dataclass(frozen=True)
class Model:
    """A fixture: how far from its reference float32 may be, over random logits of standard deviation 1 to 3."""

    name: str
    tolerance: float
    window: int | None = None


MODELS = (Model("qwen3-tiny", 5e-4), Model("qwen3-tiny-tied", 5e-4), Model("qwen3-tiny-wide-Q4_K_M", 1e-3),
          Model("qwen3moe-tiny", 5e-4), Model("gemma4-tiny-moe", 5e-4, 16), Model("gemma4-tiny-moe-wide-Q4_K_M", 1e-3, 16))  # fmt: skip
models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def without_tokenizer(model: Model, directory: Path) -> Path:
    """A copy that is driven by token ids alone."""
    source = FIXTURES / f"{model.name}.gguf"
    path = directory / source.name
    return path if path.exists() else rewrite(path, source, drop=[k for k in open_gguf(source).metadata if k.startswith("tokenizer.")])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


def check(model: Model, start) -> None:
    """One batch, chunks of 7, token by token."""
    tokens, reference = fixture_tokens(model.name), fixture_logits(model.name)
    for chunk in (len(tokens), 40, 7, 1):
        rows = feed(*start(), tokens, chunk)
        error = worst(rows, reference)
        print(f"{model.name}, chunks of {chunk}: {len(rows)} positions, max |dlogit| {error:.2e}")
        assert error <= model.tolerance, chunk


@models
def test_eager(model: Model, files: Path) -> None:
    path = without_tokenizer(model, files)
    spec, state = graph_spec(path), weights(path, files)

    def start():
        decoder = spec.model()
        missing = decoder.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and all(".cache." in k for k in missing.missing_keys)
        return decoder, decoder

    with torch.inference_mode():
        check(model, start)


def programs(spec, state, make):
    """`start` over the graphs that `make(entry)` gives; caches are fresh at each start and shared by the two graphs."""
    graphs = {entry: make(entry) for entry in ENTRIES}

    def start():
        kv = make_kv(kv_plan(spec.config, spec.max_seq_len, spec.model_dtype, spec.options))
        with torch.no_grad():
            return tuple(runnable(graphs[entry], {**state, **kv}) for entry in ENTRIES)

    return start


@models
def test_exported_and_after_every_pass(model: Model, files: Path) -> None:
    """All passes of the CPU target, the head cut in small pieces; then those of a GPU's decode with three bytes an activation."""
    path = without_tokenizer(model, files)
    state = weights(path, files)
    cpu = graph_spec(path, materialized_head_budget=64 << 10)
    gpu = graph_spec(path, decode_bytes=3, materializes_head=False, allow_unfused="moe" in model.name)
    with torch.no_grad():
        check(model, programs(cpu, state, lambda entry: trace(cpu, entry, "cpu")))
        check(model, programs(cpu, state, lambda entry: lower(cpu, entry, "cpu").program))
        check(model, programs(gpu, state, lambda entry: lower(gpu, entry, "cpu").program))
