"""What `kiln eval` listens to: a GGUF file played eagerly, its fp32 reference, and an artifact in the runner, all as `Player`s.

A GGUF file is played by the lowered prefill graph, with a row of logits for every token. The reference is the plain decoder in float32
over the dequantized values of a GGUF file, its caches exact. An artifact is played by the runner's Python module.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kiln.custom_ops.dtypes import dtype_name
from kiln.exporter.artifact.load import load_weights
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.compiler.trace import GraphSpec, lower, make_kv, runnable
from kiln.exporter.errors import KilnError
from kiln.exporter.measure.runner import runtime
from kiln.exporter.model.decoder import SAMPLING_INPUTS, Decoder
from kiln.exporter.model.records import ModelConfig
from kiln.exporter.progress import size_text
from kiln.exporter.source.finite import describe
from kiln.exporter.source.plan import ModelPlan
from kiln.exporter.source.weights import WeightPlan
from kiln.exporter.text.encoder import Encoder
from kiln.passes.records import KINDS, PassOptions

KV_CACHES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "tq4": "tq4"}  # option -> the manifest's name
PIECE_TOKENS = 2048  # fed at once
PIECE_BYTES = 256 << 20  # of the logits of a piece


# ---- text ----


class Text:
    """Token ids of text, and of one user turn in the model's chat template."""

    def __init__(self, encoder: Encoder, prefix: str, suffix: str):
        self._encoder = encoder
        self.bos = [] if encoder.bos is None else [encoder.bos]
        self.prefix, self.suffix = self.markup(prefix), self.markup(suffix)

    def markup(self, text: str) -> list[int]:
        """Control tokens are parsed."""
        return self._encoder.encode(text, parse_special=True, add_bos=False)

    def __call__(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_bos=False)


def gguf_text(plan: ModelPlan) -> Text:
    """The file's tokenizer and template; without a template a prompt is BOS and the text."""
    tokenizer, chat = plan.tokenizer, plan.chat
    if tokenizer is None:
        raise KilnError(f"{plan.gguf.path}: the file has no tokenizer; evaluate a file that has one")
    prefix, suffix = (chat.prefix, chat.suffix) if chat else (tokenizer.text(tokenizer.first), "\n")
    return Text(Encoder(tokenizer.document()), prefix, suffix)


def artifact_text(directory: Path, manifest: dict[str, Any]) -> Text:
    if manifest["tokenizer"] is None:
        raise KilnError(f"{directory}: the artifact has no tokenizer; export a GGUF file that has one")
    chat = manifest["chat"] or {"prefix": "", "suffix": "\n"}
    text = Text(Encoder.load(directory / manifest["tokenizer"]["file"]), chat["prefix"], chat["suffix"])
    if not manifest["chat"]:
        text.prefix = text.bos
    return text


# ---- players ----


class Player(Protocol):
    """One timeline over a model; tokens are appended."""

    max_seq_len: int
    vocab_size: int

    def reset(self) -> None: ...
    def read(self, tokens: Sequence[int]) -> None: ...
    def score(self, tokens: Sequence[int], piece: int) -> Iterator[Tensor]:
        """float32 [n, V] for pieces of the tokens: the logits after each token."""
        ...

    def mark(self) -> Any:
        """What `rewind` needs to come back to this position."""
        ...

    def rewind(self, mark: Any) -> None: ...


def pieces(tokens: Sequence[int], size: int) -> list[list[int]]:
    """Nearly equal pieces of at most `size` >= 3 tokens, none of a single token unless there is but one."""
    return [part.tolist() for part in np.array_split(np.asarray(tokens, np.int64), max(1, math.ceil(len(tokens) / size)))]


def finite(rows: Tensor, first: int) -> Tensor:
    """The logits [n, V] after tokens `first`, `first` + 1, ... of a context. KilnError where one is not finite."""
    good = torch.isfinite(rows).all(-1)
    if not good.all():
        at = first + int((~good).nonzero()[0])
        raise KilnError(f"the logits after token {at} are not finite; kiln inspect of the GGUF file names weights that are not finite")
    return rows


def piece_tokens(vocab_size: int) -> int:
    return max(16, min(PIECE_TOKENS, PIECE_BYTES // (4 * vocab_size)))


class AllPositions(Decoder):
    """The decoder with logits for every token of the chunk: float32 [T, V]."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, pos: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor
    ) -> Tensor:
        return self.logits(self.hidden(tokens, pos))


@dataclass(frozen=True)
class AllPositionsSpec(GraphSpec):
    def model(self, entry: str = "prefill") -> AllPositions:
        return AllPositions(self.config, list(self.plan), self.max_seq_len, self.model_dtype, self.cache_dtype, self.options)


class GraphPlayer:
    """A graph with the inputs of `prefill` whose output is [T, V]; `caches` are the tensors it writes, by the names of buffers."""

    def __init__(self, graph: torch.nn.Module, caches: dict[str, Tensor], config: ModelConfig, max_seq_len: int, device: str):
        self.graph, self.device, self.max_seq_len, self.vocab_size = graph, device, max_seq_len, config.vocab_size
        self._rings = [tensor for name, tensor in caches.items() if KINDS[name.rpartition("_")[2]] != "global"]
        self._sampling = [torch.zeros(1, dtype=dtype, device=device) for _, dtype in SAMPLING_INPUTS]
        self.position = 0

    def reset(self) -> None:
        self.position = 0

    def read(self, tokens: Sequence[int]) -> None:
        for _ in self.score(tokens, piece_tokens(self.vocab_size)):
            pass

    @torch.no_grad()
    def score(self, tokens: Sequence[int], piece: int) -> Iterator[Tensor]:
        for part in pieces(tokens, piece):
            ids = torch.tensor(part, device=self.device)
            pos = torch.arange(self.position, self.position + len(part), device=self.device)
            self.position += len(part)
            yield finite(self.graph(ids, pos, *self._sampling), self.position - len(part))

    def mark(self) -> tuple[int, list[Tensor]]:
        return self.position, [ring.clone() for ring in self._rings]  # global slots past the position are never read

    def rewind(self, mark: tuple[int, list[Tensor]]) -> None:
        self.position = mark[0]
        for ring, kept in zip(self._rings, mark[1], strict=True):
            ring.copy_(kept)


def graph_player(
    plan: ModelPlan,
    kv_cache: str,
    max_seq_len: int,
    device: str,
    activation_dtype: str | None = None,
    residual_length: int = PassOptions.residual_length,
    key_center: bool = PassOptions.key_center,
) -> GraphPlayer:
    """The lowered graph of a GGUF file over its packed weights. kv_cache: a key of KV_CACHES.

    Without `activation_dtype` a cache that is not quantized names the activations, float32 or bfloat16; with TQ4 they are float32 on a CPU
    and bfloat16 on a GPU.
    """
    config = checked_config(plan, max_seq_len)
    wide = device == "cpu" if kv_cache == "tq4" else kv_cache == "f32"
    dtype = activation_dtype or ("float32" if wide else "bfloat16")
    options = PassOptions(turboquant=kv_cache == "tq4", residual_length=residual_length, key_center=key_center,
                          materializes_head=device == "cpu")
    cache = "bfloat16" if kv_cache == "bf16" else "float16"
    spec = AllPositionsSpec(config, plan.weights, max_seq_len, min(PIECE_TOKENS, max_seq_len), dtype, options, cache)
    if kv_cache != "tq4" and dtype_name(spec.cache_dtype) != KV_CACHES[kv_cache]:
        raise KilnError(f"a {KV_CACHES[kv_cache]} cache does not go with {dtype} activations")
    lowered = lower(spec, "prefill", device)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights.safetensors"
        write_weights(path, plan)
        weights = {name: tensor.to(device) for name, tensor in load_weights(path).items()}  # a mapped file outlives its name
    caches = make_kv(lowered.kv, device)
    return GraphPlayer(runnable(lowered.program, weights | caches), caches, config, max_seq_len, device)


def reference_player(plan: ModelPlan, max_seq_len: int, device: str) -> GraphPlayer:
    """The plain decoder in float32, no pass applied, over the file's dequantized values."""
    from kiln.exporter.tools.quantize import to_float

    config, gguf = checked_config(plan, max_seq_len), plan.gguf
    weights = [replace(p, block_type="F32") for p in plan.weights]
    need = 4 * sum(p.N * max(p.K, 1) for p in weights)
    if device == "cuda" and need > (free := torch.cuda.mem_get_info()[0]):
        raise KilnError(f"the fp32 reference needs {size_text(need)}, the GPU has {size_text(free)} free; give --device cpu")

    def tensor(p: WeightPlan) -> Tensor:
        parts = {name: to_float(gguf, name) for name in p.sources}
        for name, part in parts.items():
            if not np.isfinite(part).all():
                raise KilnError(describe(gguf, name, int(np.argwhere(~np.isfinite(part))[0][0])))
        return torch.from_numpy(np.concatenate(list(parts.values())))

    with torch.device("meta"):
        model = AllPositions(config, weights, max_seq_len, torch.float32).eval().requires_grad_(False)
    state = {f"{p.name}.weight": tensor(p) for p in weights}
    state |= {name: torch.from_numpy(values.copy()) for name, values in plan.derived.items()}
    caches = {name: torch.zeros(b.shape, dtype=b.dtype, device=device) for name, b in model.named_buffers()}
    model.load_state_dict({name: values.to(device) for name, values in state.items()} | caches, strict=True, assign=True)
    return GraphPlayer(model, dict(model.named_buffers()), config, max_seq_len, device)


def checked_config(plan: ModelPlan, max_seq_len: int) -> ModelConfig:
    if max_seq_len > plan.config.context_length:
        raise KilnError(f"{max_seq_len} tokens are beyond the model's context of {plan.config.context_length}; ask for at most that")
    return plan.config


class ArtifactPlayer:
    """An artifact in the runner. It cannot go back: a rewind reads everything again."""

    def __init__(self, directory: Path, device: str, weights: Path | None = None):
        kiln = runtime()
        try:
            self._model = kiln.Model(str(directory), device=device, threads=torch.get_num_threads(), weights=weights and str(weights))
            self._session = kiln.Session(self._model)
        except kiln.Error as e:
            raise KilnError(str(e)) from e
        self.max_seq_len, self.vocab_size, self.device = self._model.max_seq_len, self._model.vocab_size, self._model.device
        self._history: list[int] = []

    def reset(self) -> None:
        self._session.reset()
        self._history = []

    def read(self, tokens: Sequence[int]) -> None:
        self._session.prefill(list(tokens))
        self._history += tokens

    def score(self, tokens: Sequence[int], piece: int) -> Iterator[Tensor]:
        for part in pieces(tokens, piece):
            rows = np.empty((len(part), self.vocab_size), np.float32)
            for i, token in enumerate(part):
                if self._history:
                    self._session.decode(token)
                else:
                    self._session.prefill([token])
                self._history.append(token)
                rows[i] = self._session.logits()
            yield finite(torch.from_numpy(rows), len(self._history) - len(part))

    def mark(self) -> list[int]:
        return list(self._history)

    def rewind(self, mark: list[int]) -> None:
        self.reset()
        self.read(mark)
