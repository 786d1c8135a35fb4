"""Feeding tokens to a decoder in one batch, in chunks, or one by one; shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kiln.exporter.artifact.load import load_weights
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.compiler.trace import ENTRIES, GraphSpec, lower, make_kv, runnable
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.source.weights import plan_weights
from kiln.passes.records import PassOptions

FIXTURES = Path(__file__).parent / "fixtures"
WINDOW = 16
CHUNK = 24  # longer than the window
GREEDY = (torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1, dtype=torch.int64))
TOLERANCE = 3e-4  # of fixture logits, which reach 30


def fixture_tokens(name: str = "gemma4-tiny-dense") -> torch.Tensor:
    return torch.from_numpy(np.fromfile(FIXTURES / f"{name}.tokens.i32", np.int32)).long()


def fixture_logits(name: str = "gemma4-tiny-dense") -> torch.Tensor:
    return torch.from_numpy(np.fromfile(FIXTURES / f"{name}.logits.f32", np.float32)).view(80, -1)


def graph_spec(path: Path, max_seq_len: int = 96, chunk: int = 96, dtype: str = "float32", **options) -> GraphSpec:
    gguf = open_gguf(path)
    config = from_gguf(gguf)
    return GraphSpec(config, tuple(plan_weights(config, gguf)), max_seq_len, chunk, dtype, PassOptions(**options))


def weights(path: Path, directory: Path) -> dict[str, torch.Tensor]:
    file = directory / f"{path.stem}.safetensors"
    write_weights(file, read_plan(path))
    return {k: v for k, v in load_weights(file).items() if not k.startswith("__pad")}


def feed(prefill: Callable, decode: Callable, tokens: torch.Tensor, chunk: int) -> dict[int, torch.Tensor]:
    """Position -> logits [V] of the last token of every chunk."""
    rows = {}
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        run = decode if len(piece) == 1 else prefill
        _, logits = run(piece, torch.arange(start, start + len(piece)), *GREEDY)
        rows[start + len(piece) - 1] = logits[0].float().clone()
    return rows


def all_ways(start: Callable[[], tuple[Callable, Callable]], tokens: torch.Tensor) -> dict[str, dict[int, torch.Tensor]]:
    """One batch (of several lengths), chunks longer than the window, token by token; `start` gives fresh caches each time."""
    batch = {}
    for length in (2, WINDOW, WINDOW + 1, 3 * WINDOW + 5, len(tokens)):
        batch |= feed(*start(), tokens[:length], length)
    return {"one batch": batch, "chunks": feed(*start(), tokens, CHUNK), "token by token": feed(*start(), tokens, 1)}


def worst(rows: dict[int, torch.Tensor], reference: torch.Tensor) -> float:
    return max((logits - reference[position]).abs().max().item() for position, logits in rows.items())


def programs(spec: GraphSpec, state: dict[str, torch.Tensor], make: Callable) -> Callable:
    """`start` over the graphs that `make(entry)` gives; caches are fresh at each start and shared by the two graphs."""
    graphs = {entry: make(entry) for entry in ENTRIES}

    def start():
        kv = make_kv(kv_plan(spec.config, spec.max_seq_len, spec.cache_dtype, spec.options))
        with torch.no_grad():
            return tuple(runnable(graphs[entry], {**state, **kv}) for entry in ENTRIES)

    return start


class _Stop(Exception):
    pass


def lowered_to(spec: GraphSpec, entry: str, last: str):
    """The graph for the CPU right after pass `last`."""
    kept = {}

    def after(name, program):
        if name == last:
            kept["program"] = program
            raise _Stop

    with pytest.raises(_Stop):
        lower(spec, entry, "cpu", after=after)
    return kept["program"]
