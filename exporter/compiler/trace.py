"""The plain decoder as graphs, `prefill`, `decode` and `decode_M` for steps of M tokens, a drafter's as `draft`, from shapes; then the
passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from kiln.custom_ops.dtypes import DTYPES
from kiln.exporter.compiler.torch_private import fake_export
from kiln.exporter.errors import KilnError
from kiln.exporter.model.assistant import DRAFT_INPUTS, DraftStep, read_layers
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.model.decoder import SAMPLING_INPUTS, Decoder, RowDecoder
from kiln.exporter.model.places import draft_places, expected_places
from kiln.exporter.model.records import DraftConfig, ModelConfig
from kiln.exporter.source.weights import WeightPlan
from kiln.passes.edit import PassError
from kiln.passes.pipeline import run_pipeline
from kiln.passes.records import Expected, KVBuffer, Lowered, PassOptions

ENTRIES = ("prefill", "decode")  # of every artifact
DRAFT_ENTRY = "draft"


def entry_rows(entry: str) -> int:
    """M of `decode_M`, whose tokens name their timelines; 0 for the entries of one timeline."""
    return int(entry.removeprefix("decode_")) if entry.startswith("decode_") else 0


@dataclass(frozen=True)
class DrafterSpec:
    """A model that drafts for the one beside it."""

    config: DraftConfig
    plan: tuple[WeightPlan, ...]


@dataclass(frozen=True)
class GraphSpec:
    """Everything a graph depends on; the weights are not among it."""

    config: ModelConfig
    plan: tuple[WeightPlan, ...]
    max_seq_len: int
    prefill_chunk: int  # longest prefill, in tokens
    activation_dtype: str  # float32 or bfloat16
    options: PassOptions
    cache: str = "float16"  # of keys and values that are not quantized, where activations have 16 bits: float16 or bfloat16
    drafter: DrafterSpec | None = None

    @property
    def cache_dtype(self) -> torch.dtype:
        """Keys and values are normalized, so float16 holds them, with eight times bfloat16's precision."""
        return torch.float32 if self.activation_dtype == "float32" else getattr(torch, self.cache)

    @property
    def model_dtype(self) -> torch.dtype:
        return DTYPES[self.activation_dtype].torch

    @property
    def entries(self) -> tuple[str, ...]:
        steps = (f"decode_{rows}" for rows in self.options.decode_rows if rows > 1)
        return (*ENTRIES, *steps, *((DRAFT_ENTRY,) if self.drafter else ()))

    def model(self, entry: str = "decode") -> Decoder | DraftStep:
        sizes = self.max_seq_len, self.model_dtype, self.cache_dtype, self.options
        if entry == DRAFT_ENTRY:
            assert self.drafter is not None
            return DraftStep(self.config, self.plan, self.drafter.config, self.drafter.plan, *sizes)
        kind = RowDecoder if entry_rows(entry) else Decoder
        model = kind(self.config, list(self.plan), *sizes)
        model.gives_hidden = self.drafter is not None
        return model

    def caches(self, entry: str) -> list[KVBuffer]:
        """Those of one timeline that the graph of `entry` has."""
        planned = kv_plan(self.config, self.max_seq_len, self.cache_dtype, self.options)
        if entry != DRAFT_ENTRY:
            return planned
        assert self.drafter is not None
        read = read_layers(self.drafter.config)
        return [b for b in planned if b.layer in read]

    def cache_lead(self, entry: str) -> tuple[int, ...]:
        """What comes before one timeline's shape: the rows of an entry that takes tokens of any."""
        return (self.options.rows,) if entry == DRAFT_ENTRY or entry_rows(entry) else ()

    def places(self, entry: str) -> Expected:
        """What the passes should rewrite in the graph of `entry`."""
        if entry != DRAFT_ENTRY:
            return expected_places(self.config, self.plan, self.caches(entry), self.options, entry)
        assert self.drafter is not None
        return draft_places(self.drafter.config, self.drafter.plan, self.caches(entry), self.options)


def trace_length(spec: GraphSpec) -> int:
    """Tokens of the example prefill: the largest prime in a chunk.

    Near the chunk, because the compiler judges memory by it; prime, because a length that equals some other size would be specialized.
    """
    return max(n for n in range(2, spec.prefill_chunk + 1) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def trace(spec: GraphSpec, entry: str, device: str) -> ExportedProgram:
    """The graph of `entry` on `device` ("cpu" or "cuda"; none need be present), before any pass."""
    rows = entry_rows(entry)
    length = trace_length(spec) if entry == "prefill" else rows or 1
    drafts = entry == DRAFT_ENTRY

    def inputs() -> tuple[torch.Tensor, ...]:
        places = [torch.empty(length, dtype=torch.int64) for _ in range(len(DRAFT_INPUTS) if drafts else 3 if rows else 2)]
        hidden = [torch.empty(1, spec.config.hidden_size)] if drafts else []
        return (*places, *hidden, *(torch.empty(rows or 1, dtype=dtype) for _, dtype in SAMPLING_INPUTS))

    dynamic = None
    if entry == "prefill":
        chunk = {0: Dim("T", min=2, max=spec.prefill_chunk)}
        dynamic = {"tokens": chunk, "pos": chunk} | {name: None for name, _ in SAMPLING_INPUTS}
    return fake_export(lambda: spec.model(entry), inputs, dynamic, device)


def lower(
    spec: GraphSpec, entry: str, device: str, dump: Path | None = None, after: Callable[[str, ExportedProgram], None] | None = None
) -> Lowered:
    """The graph of `entry` after the passes; see `kiln.passes.pipeline.run_pipeline` for `dump`, `after`. KilnError where a pass fails."""
    program = trace(spec, entry, device)
    try:
        return run_pipeline(program, spec.options, dump and dump / entry, after, spec.places(entry))
    except PassError as e:
        raise KilnError(str(e)) from e


def make_kv(kv: list[KVBuffer], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Zeroed caches, as the runner makes them."""
    return {b.name: torch.zeros(b.shape, dtype=b.dtype, device=device) for b in kv}


def runnable(program: ExportedProgram, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The graph as an eager module over real tensors; `state` maps every parameter and buffer name to its tensor, shared and not copied."""
    module = program.module(check_guards=False)
    missing = set(program.state_dict) - set(state)
    if missing:
        raise KeyError(f"no tensor for {sorted(missing)}")
    module.load_state_dict({name: state[name] for name in program.state_dict}, strict=True, assign=True)
    return module
