"""Which constants a model has, and their way from GGUF blocks to `weights.safetensors`, in pieces: no tensor is ever whole in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from custom_ops.dtypes import DTYPES, FLOATS, dtype_name
from custom_ops.weights.block_types import LAYOUTS
from custom_ops.weights.layouts import pack
from exporter.errors import KilnError
from exporter.files import replacing
from exporter.source.config import ModelConfig, expected_tensors
from exporter.source.gguf import GGUFFile

ALIGN = 256  # of every tensor's data in the file
SLAB_BYTES = 384 << 20  # packed or copied at once; a larger tensor is read once for each slab
CHUNK_ROWS, CHUNK_BYTES = 512, 256 << 10  # of one pack call: what stays in the L2 cache
MAX_WORKERS = 8
ROPE_OFF = 1e20  # a frequency divisor this large (GGUF writes 1e30) means: this pair does not rotate

# Tensors fused along N when all are there with one type: they read the same input.
_FUSIONS = (
    ("attn_qkv", ("attn_q", "attn_k", "attn_v")),
    ("attn_qk", ("attn_q", "attn_k")),
    ("ffn_gate_up", ("ffn_gate", "ffn_up")),
)
_DERIVED_FROM = ("rope_freqs.weight",)  # not constants themselves

Progress = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class WeightPlan:
    """One weight of the model: a matrix [N, K], or a vector [N] when K is 0 (always F32).

    kind: a packed block type, F32, F16 or BF16. sources: the GGUF tensors it is made of, rows one after another.
    """

    name: str
    kind: str
    N: int
    K: int
    sources: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        if self.kind in LAYOUTS:
            return LAYOUTS[self.kind].bits_per_weight
        return 8.0 * FLOATS[self.kind].size


@dataclass(frozen=True)
class ConstantSpec:
    """One constant of the compiled model: fully qualified name, torch dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].size


def plan_weights(config: ModelConfig, gguf: GGUFFile) -> list[WeightPlan]:
    """The model's weights in file order, fused along N where types agree. The tensors must have passed `check_tensors`."""
    expected = expected_tensors(config, gguf.tensors)
    plan: list[WeightPlan] = []
    done: set[str] = set(_DERIVED_FROM)
    for name, shape in expected.items():
        if name in done:
            continue
        prefix, _, stem = name.removesuffix(".weight").rpartition(".")
        prefix += "." if prefix else ""
        target = stem
        sources: tuple[str, ...] = (name,)
        for fused, parts in _FUSIONS:
            names = tuple(f"{prefix}{part}.weight" for part in parts)
            if name == names[0] and all(n in expected for n in names) and len({gguf.tensors[n].type for n in names}) == 1:
                target, sources = fused, names
                break
        done.update(sources)
        rows = sum(expected[s][0] for s in sources)
        if len(shape) == 1:
            plan.append(WeightPlan(prefix + target, "F32", rows, 0, sources))
        else:
            plan.append(WeightPlan(prefix + target, gguf.tensors[name].type, rows, shape[1], sources))
    return plan


def _plan_constants(plan: WeightPlan) -> tuple[ConstantSpec, ...]:
    if plan.kind in LAYOUTS:
        layout = LAYOUTS[plan.kind]
        groups = plan.K // layout.block
        return (
            ConstantSpec(f"{plan.name}.words", "int32", (groups, layout.words, plan.N)),
            ConstantSpec(f"{plan.name}.halves", "float16", (groups, layout.halves, plan.N)),
        )
    shape = (plan.N, plan.K) if plan.K else (plan.N,)
    return (ConstantSpec(f"{plan.name}.weight", FLOATS[plan.kind].name, shape),)


def _rotary(config: ModelConfig) -> dict[str, tuple[int, float]]:
    """Rotary constants: name -> (head size, theta)."""
    found: dict[str, tuple[int, float]] = {}
    for layer in config.layers:
        found.setdefault("rope_inv_freq_sliding" if layer.sliding else "rope_inv_freq_full", (layer.head_dim, layer.rope_theta))
    return found


def _derived_specs(config: ModelConfig) -> list[ConstantSpec]:
    specs = [ConstantSpec(name, "float32", (head_dim // 2,)) for name, (head_dim, _) in _rotary(config).items()]
    if config.suppress_tokens:
        specs.append(ConstantSpec("suppress_tokens", "int64", (len(config.suppress_tokens),)))
    return specs


def constants(config: ModelConfig, plan: Sequence[WeightPlan]) -> list[ConstantSpec]:
    """Every constant, in the order of the weights file: those of the plan, then the derived ones."""
    return [spec for p in plan for spec in _plan_constants(p)] + _derived_specs(config)


def weight_bytes(config: ModelConfig, plan: Sequence[WeightPlan]) -> int:
    """Bytes of all constants, without the file's header and filler."""
    return sum(spec.nbytes for spec in constants(config, plan))


def _vector(gguf: GGUFFile, name: str) -> np.ndarray:
    """A float tensor of one dimension as float32."""
    raw, kind = gguf.data(name).reshape(-1), gguf.tensors[name].type
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if kind == "F32" else "<f2").astype(np.float32)


def derived_constants(config: ModelConfig, gguf: GGUFFile) -> dict[str, np.ndarray]:
    """`rope_inv_freq_*` float32 [head size / 2] and `suppress_tokens` int64, by name.

    Full-attention layers divide theta^(-2d / head size) by `rope_freqs`; a pair whose divisor says "off" gets exactly 0.
    """
    derived: dict[str, np.ndarray] = {}
    for name, (head_dim, theta) in _rotary(config).items():
        inv_freq = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if name == "rope_inv_freq_full":
            divisor = _vector(gguf, "rope_freqs.weight").astype(np.float64)
            if not (divisor > 0).all():  # also false for NaN
                raise KilnError(f"{gguf.path}: tensor rope_freqs.weight has values that are not positive; convert the model again")
            inv_freq = np.where(divisor >= ROPE_OFF, 0.0, inv_freq / divisor)
        derived[name] = inv_freq.astype(np.float32)
    if config.suppress_tokens:
        derived["suppress_tokens"] = np.array(config.suppress_tokens, dtype=np.int64)
    return derived


# ---- writing ----


def _packed_slabs(gguf: GGUFFile, plan: WeightPlan, halves: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
    """Words of the weight, int32 [g, W, N] for consecutive runs of g; fills `halves` [G, H, N] on the way.

    Slabs run along G, so that the file is written front to back although N is innermost.
    """
    layout = LAYOUTS[plan.kind]
    groups = plan.K // layout.block
    sources, row = [], 0
    for name in plan.sources:
        blocks = gguf.data(name).reshape(-1, groups, layout.block_bytes)
        sources.append((name, blocks, row))
        row += len(blocks)
    step = max(1, SLAB_BYTES // (4 * layout.words * plan.N))
    inner = max(1, CHUNK_BYTES // (CHUNK_ROWS * layout.block_bytes))
    for first in range(0, groups, step):
        last = min(first + step, groups)
        words = np.empty((last - first, layout.words, plan.N), np.int32)

        def rows(name: str, blocks: np.ndarray, row: int, start: int, first: int = first, last: int = last,
                 words: np.ndarray = words) -> None:
            stop = min(start + CHUNK_ROWS, len(blocks))
            at = slice(row + start, row + stop)
            for g0 in range(first, last, inner):
                g1 = min(g0 + inner, last)
                pack(plan.kind, blocks[start:stop, g0:g1], out=(words[g0 - first : g1 - first, :, at], halves[g0:g1, :, at]))
            row_bytes = groups * layout.block_bytes
            gguf.release(name, start * row_bytes, stop * row_bytes)

        jobs = [
            pool.submit(rows, name, blocks, row, start)
            for name, blocks, row in sources
            for start in range(0, len(blocks), CHUNK_ROWS)
        ]
        for job in jobs:
            job.result()
        yield words


def _copied_slabs(gguf: GGUFFile, plan: WeightPlan) -> Iterator[np.ndarray]:
    """The bytes of a float matrix as they are in the GGUF file."""
    for name in plan.sources:
        flat = gguf.data(name).reshape(-1)
        for start in range(0, len(flat), SLAB_BYTES):
            piece = flat[start : start + SLAB_BYTES].copy()  # a view would be paged in again after the release
            gguf.release(name, start, start + len(piece))
            yield piece


def _pieces(
    gguf: GGUFFile, config: ModelConfig, plan: Sequence[WeightPlan], pool: ThreadPoolExecutor
) -> Iterator[tuple[ConstantSpec, np.ndarray]]:
    """Every constant's data in pieces, in the order of `constants`."""
    for p in plan:
        first, *second = _plan_constants(p)
        if p.kind in LAYOUTS:
            halves = np.empty(second[0].shape, np.float16)
            for words in _packed_slabs(gguf, p, halves, pool):
                yield first, words
            yield second[0], halves
        elif p.K:
            for piece in _copied_slabs(gguf, p):
                yield first, piece
        else:
            for name in p.sources:
                yield first, _vector(gguf, name)
    derived = derived_constants(config, gguf)
    for spec in _derived_specs(config):
        yield spec, derived[spec.name]


def _ahead(items: Iterator[T], background: ThreadPoolExecutor) -> Iterator[T]:
    """The same items, the next one being made while the caller hashes and writes this one."""
    future = background.submit(next, items, None)
    while (item := future.result()) is not None:
        future = background.submit(next, items, None)
        yield item


def _layout(specs: Sequence[ConstantSpec]) -> tuple[bytes, dict[str, int], int]:
    """The safetensors header (length field included), each tensor's offset from the file's start by name, and the file's size."""
    header: dict[str, Any] = {}
    offsets, at = {}, 0
    for i, spec in enumerate(specs):
        header[spec.name] = {"dtype": DTYPES[spec.dtype].safetensors, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        offsets[spec.name] = at
        at += spec.nbytes
        if filler := -at % ALIGN:
            header[f"__pad.{i}"] = {"dtype": "U8", "shape": [filler], "data_offsets": [at, at + filler]}
            at += filler
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in offsets.items()}, start + at


def write_weights(
    path: str | Path, gguf: GGUFFile, config: ModelConfig, plan: Sequence[WeightPlan], progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Writes the weights file of `docs/ARTIFACT.md` and returns its records {name, dtype, shape, offset, bytes, sha256}.

    The file appears under its name only when it is complete. `progress(constant name, bytes done, bytes in all)` is called after each
    piece. At most two slabs of 384 MiB are in memory, whatever the size of a tensor. Raises KilnError when the disk is too small.
    """
    path = Path(path)
    specs = constants(config, plan)
    header, offsets, size = _layout(specs)
    total, done = sum(spec.nbytes for spec in specs), 0
    digests: dict[str, Any] = {}
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    with replacing(path, "the weights") as f, ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as background:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise KilnError(f"{path}: {size / 2**30:.1f} GiB are needed for the weights, {free / 2**30:.1f} GiB are free; make room")
        f.write(header)
        for spec, piece in _ahead(_pieces(gguf, config, plan, pool), background):
            if spec.name not in digests:
                digests[spec.name] = hashlib.sha256()
                f.write(bytes(offsets[spec.name] - f.tell()))
            data = memoryview(piece).cast("B")  # type: ignore[arg-type]  # an array is a buffer
            digests[spec.name].update(data)
            f.write(data)
            done += len(data)
            if progress:
                progress(spec.name, done, total)
        if done != total or list(digests) != list(offsets):
            raise AssertionError(f"{done} bytes of {len(digests)} constants written, {total} of {len(specs)} planned")
        f.write(bytes(size - f.tell()))
    return [
        {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "offset": offsets[spec.name], "bytes": spec.nbytes,
         "sha256": digests[spec.name].hexdigest()}
        for spec in specs
    ]  # fmt: skip


def load_weights(path: str | Path, records: Sequence[dict[str, Any]] | None = None) -> dict[str, torch.Tensor]:
    """The constants of a weights file by name, memory-mapped. With `records`, names, dtypes and shapes must agree."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys() if not name.startswith("__pad.")}  # noqa: SIM118
    for record in records if records is not None else ():
        name, want = record["name"], (record["dtype"], list(record["shape"]))
        if name not in tensors:
            raise KilnError(f"{path}: constant {name} is missing; export the model again")
        got = (dtype_name(tensors[name].dtype), list(tensors[name].shape))
        if got != want:
            raise KilnError(f"{path}: constant {name} is {got[0]} {got[1]}, expected {want[0]} {want[1]}; export the model again")
    if records is not None and (extra := sorted(set(tensors) - {r["name"] for r in records})):
        raise KilnError(f"{path}: constant {extra[0]} is not in the manifest; export the model again")
    return tensors
