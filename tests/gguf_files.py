"""Test helper: GGUF files made from another one by dropping, changing or adding things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from kiln.exporter.model.records import ModelConfig
from kiln.exporter.source.gguf import GGUFFile, TensorInfo, open_gguf
from kiln.exporter.tools.synth import KeyValue, gguf_header, key_value

FIXTURES = Path(__file__).parent / "fixtures"
WIDE = FIXTURES / "gemma4-tiny-dense-wide-Q4_K_M.gguf"
Changed = tuple[tuple[int, ...], str, np.ndarray]  # shape, type, bytes


def draft_tensors(config: ModelConfig, file: GGUFFile) -> list[str]:
    """Of the blocks behind the layers, which draft and are no part of the decoder."""
    first = len(config.layers)
    return [name for name in file.tensors if name.startswith(tuple(f"blk.{first + i}." for i in range(config.draft_blocks)))]


def entries(source: GGUFFile) -> list[KeyValue]:
    """All metadata of a file, still encoded."""
    return [(key, *source.metadata.raw(key)) for key in source.metadata]


def write(path: Path, metadata: Sequence[KeyValue], tensors: Sequence[tuple[str, tuple[int, ...], str, np.ndarray]]) -> Path:
    """A GGUF file of tensors (name, shape, type, bytes)."""
    header, offsets, size = gguf_header(metadata, [tensor[:3] for tensor in tensors])
    data = bytearray(size)
    data[: len(header)] = header
    for offset, (*_, raw) in zip(offsets, tensors, strict=True):
        data[offset : offset + raw.nbytes] = raw.tobytes()
    path.write_bytes(data)
    return path


def rewrite(
    path: Path,
    source: Path = WIDE,
    drop: Sequence[str] = (),
    set_tensors: Mapping[str, Changed] | None = None,
    set_keys: Mapping[str, tuple[GGUFValueType, object]] | None = None,
) -> Path:
    """`source` without the tensors and keys named in `drop`, with others replaced or added."""
    file = open_gguf(source)
    set_tensors, set_keys = set_tensors or {}, set_keys or {}
    metadata = [entry for entry in entries(file) if entry[0] not in drop and entry[0] not in set_keys]
    metadata += [key_value(key, *value) for key, value in set_keys.items()]
    kept: list[TensorInfo] = [t for t in file.tensors.values() if t.name not in drop and t.name not in set_tensors]
    tensors = [(t.name, t.shape, t.type, file.data(t.name)) for t in kept]
    tensors += [(name, *changed) for name, changed in set_tensors.items()]
    return write(path, metadata, tensors)


def two_layers(path: Path) -> Path:
    """The small fixture's first layer, with a window of 16, and its third, with none: what is compiled in a test."""
    source = FIXTURES / "gemma4-tiny-dense.gguf"
    file = open_gguf(source)
    moved = {"blk.1." + name.removeprefix("blk.2."): t for name, t in file.tensors.items() if name.startswith("blk.2.")}
    gone = [name for name in file.tensors if name.startswith("blk.") and not name.startswith("blk.0.")]
    keys: dict[str, tuple[GGUFValueType, object]] = {
        "gemma4.block_count": (GGUFValueType.UINT32, 2),
        "gemma4.attention.sliding_window_pattern": (GGUFValueType.BOOL, [True, False]),
        "gemma4.attention.head_count_kv": (GGUFValueType.INT32, [2, 1]),
    }
    return rewrite(path, source, gone, {name: (t.shape, t.type, file.data(t.name)) for name, t in moved.items()}, keys)
