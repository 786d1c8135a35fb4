"""Synthetic files: real geometry and block types, random but well-scaled weights, written at disk speed.

Matrices are random quantized blocks with mean 0 and standard deviation 1/sqrt(K), so that every layer keeps its input's scale. Norm
weights are chosen so that attention scores have a standard deviation of about 2 and logits one of about 2.5, far from the soft-cap.
Every byte is drawn: no slab is reused. The content of a tensor depends on the seed, its name, type and shape alone.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from kiln.custom_ops.geometry import EPS, GEOMETRIES, Geometry
from kiln.custom_ops.weights.block_types import LAYOUTS, PackLayout
from kiln.custom_ops.weights.mixes import MIXES, SYNTHETIC, block_types
from kiln.exporter.errors import KilnError
from kiln.exporter.files import replacing
from kiln.exporter.model.records import ModelConfig
from kiln.exporter.source.config import expected_tensors, families, family, tensor_spec
from kiln.exporter.source.gguf import open_gguf

ALIGN = 32
SLAB_BYTES = 1 << 20
MAX_WORKERS = 8

Progress = Callable[[str, int, int], None]
KeyValue = tuple[str, int, bytes]  # key, value type number, encoded value
Tensor = tuple[str, tuple[int, ...], str]  # name, shape in PyTorch order, GGML type name


_JITTER = 0.25  # block scales are uniform in d * (1 - j) .. d * (1 + j)


def _geometry(preset: str) -> Geometry:
    if preset not in GEOMETRIES:
        raise KilnError(f"unknown preset {preset!r}; known: {', '.join(GEOMETRIES)}")
    return GEOMETRIES[preset]


def _config(preset: str, layers: int | None) -> ModelConfig:
    model = _geometry(preset)
    count = model.layers if layers is None else layers
    if not 1 <= count <= model.layers:
        raise KilnError(f"preset {preset} has 1 to {model.layers} layers, {count} asked for")
    config = ModelConfig(
        architecture=model.family,
        name=f"synthetic-{preset}" + (f"-{count}-layers" if count != model.layers else ""),
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        rms_norm_eps=EPS,
        context_length=model.context,
        tied_head=model.tied,
        suppress_tokens=model.suppress_tokens,
        **family(model.family).synthetic(model, count),
    )
    if not config.attentions:
        raise KilnError(f"preset {preset} has its first attention in layer {model.full_every}; ask for as many layers or more")
    return config


def synth_plan(preset: str, mix: str, layers: int | None = None) -> list[Tensor]:
    """Every tensor of the file as (name, shape in PyTorch order, type). `layers` keeps the first layers only."""
    if mix not in SYNTHETIC:
        raise KilnError(f"unknown mix {mix!r}; known: {', '.join(SYNTHETIC)}")
    config = _config(preset, layers)
    usual = families()[config.architecture].get("usual", ())  # of the fused tensors, those that converters write
    shapes = expected_tensors(config, {f"blk.{i}.{name}" for i in range(len(config.layers)) for name in usual})
    types = block_types(MIXES[mix], shapes)
    return [(name, shape, types[name]) for name, shape in shapes.items()]


def tensor_bytes(shape: tuple[int, ...], block_type: str) -> int:
    """Bytes of a tensor's data in the file."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[block_type]]
    return prod(shape) // block * size


# ---- the container ----


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


_CODES = {  # value type -> how `struct` writes it
    GGUFValueType[name]: code
    for name, code in zip(
        ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "UINT64", "INT64", "FLOAT64"), "BbHhIif?Qqd", strict=True
    )
}


def key_value(key: str, value_type: GGUFValueType, value: Any) -> KeyValue:
    """One metadata entry; a list makes an array of `value_type`."""
    if value_type == GGUFValueType.STRING:
        data = b"".join(map(_text, value)) if isinstance(value, list) else _text(value)
    else:
        items = value if isinstance(value, list) else [value]
        data = struct.pack(f"<{len(items)}{_CODES[value_type]}", *items)
    if isinstance(value, list):
        return key, int(GGUFValueType.ARRAY), struct.pack("<IQ", value_type, len(value)) + data
    return key, int(value_type), data


def gguf_header(metadata: Iterable[KeyValue], tensors: Iterable[Tensor]) -> tuple[bytes, list[int], int]:
    """A GGUF v3 header up to the tensor data, each tensor's offset from the file's start, and the file's size."""
    metadata, tensors = list(metadata), list(tensors)
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    out += [_text(key) + struct.pack("<I", value_type) + data for key, value_type, data in metadata]
    offsets, at = [], 0
    for name, shape, block_type in tensors:
        out.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], GGMLQuantizationType[block_type], at))
        offsets.append(at)
        at += -(-tensor_bytes(shape, block_type) // ALIGN) * ALIGN
    header = b"".join(out)
    header += bytes(-len(header) % ALIGN)
    return header, [len(header) + offset for offset in offsets], len(header) + at


# ---- metadata ----

_SPECIAL = (  # text, GGUF token type (3 control, 4 user-defined); ids are the positions
    ("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 3), ("<mask>", 3), ("<|turn>", 3), ("<turn|>", 3), ("<|tool_response>", 4),
    ("<|think|>", 3), ("<|channel>", 4), ("<channel|>", 4), ("\n", 1), ("\u2581", 1),
)  # fmt: skip
_MERGES = (
    "t h", "th e", "\u2581 the", "i n", "a n", "an d", "\u2581 and", "e r", "o n", "r e", "\u2581 a", "\u2581 t", "o u", "in g", "\u2581 i",
    "h e", "l l", "he ll", "hell o", "\u2581 w",
)  # fmt: skip


def _tokenizer(vocab: int) -> list[KeyValue]:
    """A small byte-fallback BPE: special tokens, the 256 bytes, printable ASCII and a few merges, then unused tokens."""
    tokens = [text for text, _ in _SPECIAL]
    types = [token_type for _, token_type in _SPECIAL]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    types += [6] * 256
    tokens += [chr(c) for c in range(33, 127)] + [merge.replace(" ", "") for merge in _MERGES]
    if len(tokens) > vocab:
        raise AssertionError(f"a vocabulary of {vocab} is too small for the generated tokenizer of {len(tokens)} tokens")
    tokens += [f"<unused{i}>" for i in range(len(tokens), vocab)]
    types += [1] * (vocab - len(types))
    ids = {"eos": 1, "bos": 2, "unknown": 3, "padding": 0, "mask": 4}
    return [
        key_value("tokenizer.ggml.model", GGUFValueType.STRING, "gemma4"),
        key_value("tokenizer.ggml.tokens", GGUFValueType.STRING, tokens),
        key_value("tokenizer.ggml.scores", GGUFValueType.FLOAT32, [-1000.0] * vocab),
        key_value("tokenizer.ggml.token_type", GGUFValueType.INT32, types),
        key_value("tokenizer.ggml.merges", GGUFValueType.STRING, list(_MERGES)),
        *(key_value(f"tokenizer.ggml.{name}_token_id", GGUFValueType.UINT32, i) for name, i in ids.items()),
        key_value("tokenizer.ggml.add_space_prefix", GGUFValueType.BOOL, False),
        key_value("tokenizer.ggml.add_bos_token", GGUFValueType.BOOL, True),
    ]


def _copied_tokenizer(path: str | Path, vocab: int) -> list[KeyValue]:
    source = open_gguf(path)
    count = source.metadata.length("tokenizer.ggml.tokens")
    if count != vocab:
        raise KilnError(f"{path}: has a vocabulary of {count or 0} tokens, the preset needs {vocab}; give another file or none")
    keys = [key for key in source.metadata if key.startswith("tokenizer.") and key != "tokenizer.ggml.suppress_tokens"]
    return [(key, *source.metadata.raw(key)) for key in keys]


def _value_type(value: Any) -> GGUFValueType:
    """As llama.cpp's converter writes it: bools, floats, and integers that are signed in arrays."""
    item = value[0] if isinstance(value, list) else value
    if isinstance(item, bool | float | str):
        return GGUFValueType[{bool: "BOOL", float: "FLOAT32", str: "STRING"}[type(item)]]
    return GGUFValueType.INT32 if isinstance(value, list) else GGUFValueType.UINT32


def metadata(config: ModelConfig, mix: str, vocab_from: str | Path | None) -> list[KeyValue]:
    """Of a file of `mix`: what all families have, what the family's own file says, and a tokenizer."""
    table = families()[config.architecture]
    fields: dict[str, Any] = {
        "num_layers": len(config.layers),
        "context_length": config.context_length,
        "hidden_size": config.hidden_size,
        "rms_norm_eps": float(config.rms_norm_eps),
        **family(config.architecture).write(config),
    }
    fields |= {key: fields[name] for key, name in table["same"].items() if name in fields}
    entries: dict[str, Any] = {
        "general.architecture": config.architecture,
        "general.type": "model",
        "general.name": config.name,
        "general.file_type": int(LlamaFileType[MIXES[mix].file_type]),
        "general.quantization_version": 2,
        **{table["keys"][name]["key"] if name in table["keys"] else name: value for name, value in fields.items()},
    }
    if config.suppress_tokens:
        entries["tokenizer.ggml.suppress_tokens"] = list(config.suppress_tokens)
    tokenizer = _copied_tokenizer(vocab_from, config.vocab_size) if vocab_from is not None else _tokenizer(config.vocab_size)
    return [key_value(key, _value_type(value), value) for key, value in entries.items()] + tokenizer


# ---- tensor data ----


def _mean_square(low: int, high: int, centre: float = 0.0) -> float:
    """Of integers drawn evenly from low .. high, less `centre`."""
    return sum((i - centre) ** 2 for i in range(low, high + 1)) / (high + 1 - low)


# Lowest and highest scale of a group in random blocks.
_GROUP_SCALES = {"half": (1, 1), "k": (32, 63), "int8": (-128, 127), "four": (8, 15), "six": (-32, 31), "split": (-32, 31)}


def _rms(layout: PackLayout) -> float:
    """Root mean square of a random block's weights at scale 1, as `_fill_blocks` makes them."""
    half = 1 << layout.bits - 1
    quants = _mean_square(0, 2 * half - 1, half - 0.5) if layout.minimum else _mean_square(-half, half - 1)
    if layout.levels:
        quants = sum(level**2 for level in layout.levels) / len(layout.levels)
    return sqrt(quants * _mean_square(*_GROUP_SCALES[layout.scales]))


def _fill_blocks(block_type: str, blocks: np.ndarray, std: float) -> None:
    """Random bytes [blocks, block bytes] -> blocks of mean 0 and the given standard deviation, in place."""
    layout = LAYOUTS[block_type]
    at = layout.half_fields[0]
    field = blocks[:, at : at + 2].view("<u2")[:, 0]
    jitter = 1 - _JITTER + field * np.float32(2 * _JITTER / 65536)
    d = jitter * np.float32(std / (_rms(layout) * sqrt(1 + _JITTER**2 / 3)))
    if layout.block == 32:
        d[field & 1 == 1] *= -1  # the integers have mean -1/2, levels another
    field[:] = d.astype(np.float16).view("<u2")
    if layout.minimum and layout.block == 256:
        middle = np.float32((1 << layout.bits - 1) - 0.5)
        at = layout.half_fields[1]
        blocks[:, at : at + 2].view("<u2")[:, 0] = (d * middle).astype(np.float16).view("<u2")
    if layout.scales == "four":
        blocks[:, :16] = (blocks[:, :16] & 15 | 8) * 17  # scales in 8 .. 15, the minima the same
    if layout.scales == "k":
        blocks[:, 4:8] |= 0xA0  # 6-bit scales in 32 .. 63; the minima are the same, so every group is d * scale * (q - middle)
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17


def _vector_mean(name: str, size: int, scale: float) -> tuple[float, float]:
    """(mean, relative spread) of a norm weight or layer scale; scale: of the scores."""
    stem = name.rsplit(".", 1)[-1] if name.endswith("ssm_a") else name.split(".")[-2]
    if stem == "layer_output_scale":
        return 0.95, 0.05
    means = {
        "output_norm": 2.5,  # the logits' standard deviation
        "attn_q_norm": sqrt(2 / sqrt(size) / scale),  # scores q . k of standard deviation 2
        "attn_k_norm": sqrt(2 / sqrt(size) / scale),
        "post_attention_norm": 16.0,  # layers outweigh the embedding: else the tied head just repeats the input token
        "post_ffw_norm": 16.0,
        "ssm_a": -0.2,  # what multiplies softplus of about 1.3: a token keeps three quarters of a state
        "ffn_gate_inp": 2 * sqrt(size),  # choices of experts that no rounding changes: the router divides by the root
    }
    return means.get(stem, 1.0), 0.1


def _pieces(name: str, shape: tuple[int, ...], block_type: str, seed: int, slab_bytes: int, scale: float = 1.0,
            meaning: str | None = None) -> Iterator[np.ndarray]:  # fmt: skip
    """A tensor's data, uint8, in runs of whole rows. The runs' length does not change the bytes. scale: of the scores.

    meaning: what a norm is whose name says something else.
    """
    if name == "rope_freqs.weight":
        size = shape[0]
        yield np.where(np.arange(size) < size // 4, 1.0, 1e30).astype("<f4").view(np.uint8)
        return
    bits = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    drawn = "F32" if block_type == "BF16" else block_type  # and then cut short
    rows, row_bytes = (prod(shape[:-1]), tensor_bytes(shape[-1:], drawn)) if len(shape) > 1 else (1, 4 * shape[0])
    step = max(8, slab_bytes // row_bytes // 8 * 8)  # a multiple of 8 rows is a whole number of the generator's 8-byte words
    for row in range(0, rows, step):
        nbytes = min(step, rows - row) * row_bytes
        raw = bits.random_raw(-(-nbytes // 8)).view(np.uint8)[:nbytes]
        if drawn != "F32":
            _fill_blocks(block_type, raw.reshape(-1, GGML_QUANT_SIZES[GGMLQuantizationType[block_type]][1]), 1 / sqrt(shape[-1]))
            yield raw
            continue
        uniform = raw.view("<i4").astype(np.float32) * np.float32(2.0**-31)  # -1 .. 1
        if len(shape) == 1:
            mean, spread = _vector_mean(f"{meaning}.weight" if meaning else name, shape[0], scale)
            uniform = np.float32(mean) * (1 + np.float32(spread) * uniform)
        else:
            uniform *= np.float32(sqrt(3 / shape[-1]))
        yield uniform.view("<u2")[1::2].copy().view(np.uint8) if block_type == "BF16" else uniform.view(np.uint8)


def write_synthetic(
    path: str | Path,
    preset: str,
    mix: str,
    seed: int = 0,
    layers: int | None = None,
    vocab_from: str | Path | None = None,
    progress: Progress | None = None,
    slab_bytes: int = SLAB_BYTES,
    sparse: bool = False,
) -> None:
    """Writes a synthetic GGUF file; it appears under its name only when complete. The same arguments give the same bytes.

    preset: one of `GEOMETRIES`. mix: one of `SYNTHETIC`. layers: only the first ones.
    vocab_from: a GGUF whose tokenizer is copied; without it a small tokenizer is made and padded with unused tokens.
    progress: called as (tensor name, bytes done, bytes in all), one call at a time. sparse: leave the matrices a hole in the file, to
    plan with and nothing else. Raises KilnError.
    """
    path = Path(path)
    tensors = synth_plan(preset, mix, layers)
    config = _config(preset, layers)
    scale = next(iter(config.attentions.values())).scale
    header, offsets, size = gguf_header(metadata(config, mix, vocab_from), tensors)
    total, done, lock = sum(tensor_bytes(shape, block_type) for _, shape, block_type in tensors), 0, threading.Lock()
    with replacing(path, f"{size / 2**30:.1f} GiB") as f, ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_WORKERS)) as pool:
        f.write(header)
        f.truncate(size)
        f.flush()

        def write(tensor: Tensor, offset: int) -> None:
            nonlocal done
            for piece in _pieces(*tensor, seed, slab_bytes, scale, tensor_spec(config, tensor[0]).get("as")):
                view = memoryview(piece)  # type: ignore[arg-type]  # an array is a buffer
                while view:
                    written = os.pwrite(f.fileno(), view, offset)
                    view, offset = view[written:], offset + written
                with lock:
                    done += len(piece)
                    if progress:
                        progress(tensor[0], done, total)

        written = [pair for pair in zip(tensors, offsets, strict=True) if not sparse or len(pair[0][1]) == 1]
        for _ in pool.map(lambda pair: write(*pair), written):
            pass
