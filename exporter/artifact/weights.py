"""The way of a model's constants from GGUF blocks to `weights.safetensors`, in pieces: no tensor is ever whole in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kiln.custom_ops.dtypes import DTYPES, FLOATS
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.layouts import pack
from kiln.exporter.errors import KilnError
from kiln.exporter.files import replacing
from kiln.exporter.source.finite import bad_halves, bad_position, bad_row, describe
from kiln.exporter.source.gguf import GGUFFile
from kiln.exporter.source.plan import ModelPlan
from kiln.exporter.source.weights import DRAFT, ConstantSpec, WeightPlan, constants, derived_specs, plan_constants, vector

ALIGN = 256  # of every tensor's data in the file
SLAB_BYTES = 384 << 20  # packed or copied at once; a larger tensor is read once for each slab
CHUNK_ROWS, CHUNK_BYTES = 512, 256 << 10  # of one pack call: what stays in the L2 cache
MAX_WORKERS = 8

Progress = Callable[[str, int, int], None]
T = TypeVar("T")


def _packed_slabs(gguf: GGUFFile, plan: WeightPlan, halves: np.ndarray, pool: ThreadPoolExecutor, check: bool) -> Iterator[np.ndarray]:
    """Words of the weight, int32 [g, W, N] for consecutive runs of g; fills `halves` [G, H, N] on the way.

    Slabs run along G, so that the file is written front to back although N is innermost.
    """
    layout = LAYOUTS[plan.block_type]
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

        def rows(
            name: str, blocks: np.ndarray, row: int, start: int, first: int = first, last: int = last, words: np.ndarray = words
        ) -> None:
            stop = min(start + CHUNK_ROWS, len(blocks))
            at = slice(row + start, row + stop)
            for g0 in range(first, last, inner):
                g1 = min(g0 + inner, last)
                pack(plan.block_type, blocks[start:stop, g0:g1], out=(words[g0 - first : g1 - first, :, at], halves[g0:g1, :, at]))
                if check and bad_halves(plan.block_type, halves[g0:g1, :, at]):
                    bad = bad_row(plan.block_type, blocks[start:stop].reshape(stop - start, -1))
                    raise KilnError(describe(gguf, name, start + (bad or 0)))
            row_bytes = groups * layout.block_bytes
            gguf.release(name, start * row_bytes, stop * row_bytes)

        jobs = [pool.submit(rows, name, blocks, row, start) for name, blocks, row in sources for start in range(0, len(blocks), CHUNK_ROWS)]
        for job in jobs:
            job.result()
        yield words


def _copied_slabs(gguf: GGUFFile, plan: WeightPlan, check: bool) -> Iterator[np.ndarray]:
    """The bytes of a float matrix as they are in the GGUF file."""
    for name in plan.sources:
        data = gguf.data(name)
        flat = data.reshape(-1)
        for start in range(0, len(flat), SLAB_BYTES):
            piece = flat[start : start + SLAB_BYTES].copy()  # a view would be paged in again after the release
            gguf.release(name, start, start + len(piece))
            if check and (bad := bad_position(plan.block_type, piece)):
                raise KilnError(describe(gguf, name, (start + bad[0] * FLOATS[plan.block_type].size) // data.shape[1]))
            yield piece


def _pieces(plan: ModelPlan, pool: ThreadPoolExecutor, check: bool) -> Iterator[tuple[ConstantSpec, np.ndarray]]:
    """Every constant's data in pieces, in the order of `constants`."""
    gguf = plan.gguf
    for p in plan.weights:
        first, *second = plan_constants(p)
        if p.block_type in LAYOUTS:
            halves = np.empty(second[0].shape, second[0].dtype)
            for words in _packed_slabs(gguf, p, halves, pool, check):
                yield first, words
            yield second[0], halves
        elif p.K:
            for piece in _copied_slabs(gguf, p, check):
                yield first, piece
        else:
            for name in p.sources:
                values = vector(gguf, name)
                if check and (bad := bad_position("F32", values)):
                    raise KilnError(describe(gguf, name, bad[0]))
                yield first, values
    for spec in derived_specs(plan.config):
        yield spec, plan.derived[spec.name]


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
    path: str | Path,
    plan: ModelPlan,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
    drafter: ModelPlan | None = None,
    ple: str = "device",
) -> list[dict[str, Any]]:
    """Writes the weights file of `docs/ARTIFACT.md` and returns its records {name, dtype, shape, offset, bytes, sha256}. Constants of
    which only rows are read come first, and their records have `gathered`: `ple`; a drafter's constants come behind its model's.

    The file appears under its name only when it is complete. `progress(constant name, bytes done, bytes in all)` is called after each
    piece. At most two slabs of 384 MiB are in memory, whatever the size of a tensor. Raises KilnError when the disk is too small, or a
    block scale or a value is not finite and not `allow_nonfinite`.
    """
    path = Path(path)
    plan = replace(plan, weights=tuple(sorted(plan.weights, key=lambda p: not p.gathered)))
    gathered = {c.name: {"gathered": ple} for p in plan.weights if p.gathered for c in plan_constants(p)}
    parts = {"": plan} | ({DRAFT: drafter} if drafter else {})
    specs = [replace(spec, name=under + spec.name) for under, part in parts.items() for spec in constants(part.config, part.weights)]
    header, offsets, size = _layout(specs)
    total, done = sum(spec.nbytes for spec in specs), 0
    digests: dict[str, Any] = {}
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    with replacing(path, "the weights") as f, ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as background:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise KilnError(f"{path}: {size / 2**30:.1f} GiB are needed for the weights, {free / 2**30:.1f} GiB are free; make room")
        f.write(header)
        pieces = (
            (replace(spec, name=under + spec.name), piece)
            for under, part in parts.items()
            for spec, piece in _pieces(part, pool, not allow_nonfinite)
        )
        for spec, piece in _ahead(pieces, background):
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
         "sha256": digests[spec.name].hexdigest()} | gathered.get(spec.name, {})
        for spec in specs
    ]  # fmt: skip
