"""Synthetic Gemma 4 files: real geometry and block types, random but well-scaled weights, written at disk speed.

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
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from exporter.errors import KilnError
from exporter.files import replacing
from exporter.source.config import LayerConfig, ModelConfig, expected_tensors
from exporter.source.gguf import open_gguf

ALIGN = 32
SLAB_BYTES = 1 << 20
MAX_WORKERS = 8
FULL_EVERY = 6  # five sliding layers, one full
THETA_FULL, THETA_SLIDING = 1e6, 1e4
EPS, SOFTCAP = 1e-6, 30.0

Progress = Callable[[str, int, int], None]
KeyValue = tuple[str, int, bytes]  # key, value type number, encoded value
Tensor = tuple[str, tuple[int, ...], str]  # name, shape in PyTorch order, GGML type name


@dataclass(frozen=True)
class Preset:
    """Geometry of a model. kv heads and head sizes are (sliding layers, full layers)."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: tuple[int, int]
    head_dims: tuple[int, int]
    window: int
    context: int
    vocab: int
    layers: int
    suppress_tokens: tuple[int, ...] = ()


PRESETS = {
    "gemma4-31b": Preset(5376, 21504, 32, (16, 4), (256, 512), 1024, 262144, 262144, 60),
    "gemma4-12b": Preset(3840, 15360, 16, (8, 1), (256, 512), 1024, 262144, 262144, 48, (258883, 258882)),
    "tiny": Preset(256, 512, 4, (2, 1), (64, 128), 16, 4096, 512, 6),
    "tiny-cuda": Preset(1024, 2048, 32, (16, 4), (256, 512), 1024, 131072, 2048, 6),
}
# mix -> (type of most matrices, general.file_type). Every preset's rows are multiples of 256, so K-quants always fit.
MIXES = {
    "q4_k_m": ("Q4_K", LlamaFileType.MOSTLY_Q4_K_M),
    "q6_k": ("Q6_K", LlamaFileType.MOSTLY_Q6_K),
    "q4_0": ("Q4_0", LlamaFileType.MOSTLY_Q4_0),
    "q8_0": ("Q8_0", LlamaFileType.MOSTLY_Q8_0),
    "f32": ("F32", LlamaFileType.ALL_F32),
}

# Root mean square of a random block's integers, by type: what 1 / d has to be for unit weights.
_RMS = {
    "Q4_0": sqrt(21.5),  # -8 .. 7
    "Q8_0": sqrt(5461.5),  # -128 .. 127
    "Q4_K": sqrt(21.25 * 2341.5),  # (q - 7.5) * scale, scale 32 .. 63
    "Q6_K": sqrt(341.5 * 5461.5),  # (-32 .. 31) * (-128 .. 127)
}
_JITTER = 0.25  # block scales are uniform in d * (1 - j) .. d * (1 + j)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise KilnError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def _config(name: str, layers: int | None) -> ModelConfig:
    preset = _preset(name)
    count = preset.layers if layers is None else layers
    if not 1 <= count <= preset.layers:
        raise KilnError(f"preset {name} has 1 to {preset.layers} layers, {count} asked for")
    return ModelConfig(
        architecture="gemma4",
        name=f"synthetic-{name}" + (f"-{count}-layers" if count != preset.layers else ""),
        vocab_size=preset.vocab,
        hidden_size=preset.hidden,
        rms_norm_eps=EPS,
        final_logit_softcapping=SOFTCAP,
        sliding_window=preset.window,
        context_length=preset.context,
        layers=tuple(
            LayerConfig(i, not full, preset.head_dims[full], preset.heads, preset.kv_heads[full], preset.ffn,
                        THETA_FULL if full else THETA_SLIDING, has_v=not full)
            for i, full in enumerate(i % FULL_EVERY == FULL_EVERY - 1 for i in range(count))
        ),
        tied_head=True,
        has_layer_scale=True,
        suppress_tokens=preset.suppress_tokens,
    )


def _more_bits(i: int, n: int) -> bool:
    """Which of n like tensors the Q4_K_M mix gives more bits: the first and last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def synth_plan(preset: str, mix: str, layers: int | None = None) -> list[Tensor]:
    """Every tensor of the file as (name, shape in PyTorch order, type). `layers` keeps the first layers only."""
    if mix not in MIXES:
        raise KilnError(f"unknown mix {mix!r}; known: {', '.join(MIXES)}")
    base = MIXES[mix][0]
    expected = expected_tensors(_config(preset, layers))
    like = {stem: [n for n in expected if n.endswith(f".{stem}.weight")] for stem in ("attn_v", "ffn_down")}
    plan = []
    for name, shape in expected.items():
        kind = base if len(shape) == 2 else "F32"
        if kind != "F32" and mix != "q8_0" and name == "token_embd.weight":
            kind = "Q6_K"
        if mix == "q4_k_m":
            for names in like.values():
                if name in names and _more_bits(names.index(name), len(names)):
                    kind = "Q6_K"
        plan.append((name, shape, kind))
    return plan


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor's data in the file."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return prod(shape) // block * size


# ---- the container ----


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


_CODES = {GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?"}


def key_value(key: str, kind: GGUFValueType, value: Any) -> KeyValue:
    """One metadata entry; a list makes an array of `kind`."""
    if kind == GGUFValueType.STRING:
        data = b"".join(map(_text, value)) if isinstance(value, list) else _text(value)
    else:
        items = value if isinstance(value, list) else [value]
        data = struct.pack(f"<{len(items)}{_CODES[kind]}", *items)
    if isinstance(value, list):
        return key, int(GGUFValueType.ARRAY), struct.pack("<IQ", kind, len(value)) + data
    return key, int(kind), data


def gguf_header(metadata: Iterable[KeyValue], tensors: Iterable[Tensor]) -> tuple[bytes, list[int], int]:
    """A GGUF v3 header up to the tensor data, each tensor's offset from the file's start, and the file's size."""
    metadata, tensors = list(metadata), list(tensors)
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    out += [_text(key) + struct.pack("<I", kind) + data for key, kind, data in metadata]
    offsets, at = [], 0
    for name, shape, kind in tensors:
        out.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], GGMLQuantizationType[kind], at))
        offsets.append(at)
        at += -(-tensor_bytes(shape, kind) // ALIGN) * ALIGN
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
    types = [kind for _, kind in _SPECIAL]
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


def _metadata(config: ModelConfig, preset: Preset, mix: str, vocab_from: str | Path | None) -> list[KeyValue]:
    u32, i32, f32 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32
    text, boolean = GGUFValueType.STRING, GGUFValueType.BOOL
    sliding_dim, full_dim = preset.head_dims
    entries: list[tuple[str, GGUFValueType, Any]] = [
        ("general.architecture", text, "gemma4"),
        ("general.type", text, "model"),
        ("general.name", text, config.name),
        ("general.file_type", u32, int(MIXES[mix][1])),
        ("general.quantization_version", u32, 2),
        ("gemma4.block_count", u32, len(config.layers)),
        ("gemma4.context_length", u32, preset.context),
        ("gemma4.embedding_length", u32, preset.hidden),
        ("gemma4.feed_forward_length", u32, preset.ffn),
        ("gemma4.attention.head_count", u32, preset.heads),
        ("gemma4.attention.head_count_kv", i32, [layer.num_kv_heads for layer in config.layers]),
        ("gemma4.attention.layer_norm_rms_epsilon", f32, EPS),
        ("gemma4.attention.key_length", u32, full_dim),
        ("gemma4.attention.value_length", u32, full_dim),
        ("gemma4.attention.key_length_swa", u32, sliding_dim),
        ("gemma4.attention.value_length_swa", u32, sliding_dim),
        ("gemma4.attention.sliding_window", u32, preset.window),
        ("gemma4.attention.sliding_window_pattern", boolean, [layer.sliding for layer in config.layers]),
        ("gemma4.attention.shared_kv_layers", u32, 0),
        ("gemma4.embedding_length_per_layer_input", u32, 0),
        ("gemma4.final_logit_softcapping", f32, SOFTCAP),
        ("gemma4.rope.freq_base", f32, THETA_FULL),
        ("gemma4.rope.freq_base_swa", f32, THETA_SLIDING),
        ("gemma4.rope.dimension_count", u32, full_dim),
        ("gemma4.rope.dimension_count_swa", u32, sliding_dim),
    ]
    if preset.suppress_tokens:
        entries.append(("tokenizer.ggml.suppress_tokens", i32, list(preset.suppress_tokens)))
    tokenizer = _copied_tokenizer(vocab_from, preset.vocab) if vocab_from is not None else _tokenizer(preset.vocab)
    return [key_value(*entry) for entry in entries] + tokenizer


# ---- tensor data ----


def _fill_blocks(kind: str, blocks: np.ndarray, std: float) -> None:
    """Random bytes [blocks, block bytes] -> blocks of mean 0 and the given standard deviation, in place."""
    at = 208 if kind == "Q6_K" else 0
    field = blocks[:, at : at + 2].view("<u2")[:, 0]
    jitter = 1 - _JITTER + field * np.float32(2 * _JITTER / 65536)
    d = jitter * np.float32(std / (_RMS[kind] * sqrt(1 + _JITTER**2 / 3)))
    if kind in ("Q4_0", "Q8_0"):
        d[field & 1 == 1] *= -1  # the integers have mean -1/2
    field[:] = d.astype(np.float16).view("<u2")
    if kind == "Q4_K":
        blocks[:, 2:4].view("<u2")[:, 0] = (d * np.float32(7.5)).astype(np.float16).view("<u2")
        blocks[:, 4:8] |= 0xA0  # 6-bit scales in 32 .. 63; the minima are the same, so every group is d * scale * (q - 7.5)
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17


def _vector_mean(name: str, size: int) -> tuple[float, float]:
    """(mean, relative spread) of a norm weight or layer scale."""
    stem = name.split(".")[-2]
    if stem == "layer_output_scale":
        return 0.95, 0.05
    means = {
        "output_norm": 2.5,  # the logits' standard deviation
        "attn_q_norm": sqrt(2 / sqrt(size)),  # scores q . k of standard deviation 2
        "attn_k_norm": sqrt(2 / sqrt(size)),
        "post_attention_norm": 16.0,  # layers outweigh the embedding: else the tied head just repeats the input token
        "post_ffw_norm": 16.0,
    }
    return means.get(stem, 1.0), 0.1


def _pieces(name: str, shape: tuple[int, ...], kind: str, seed: int, slab_bytes: int) -> Iterator[np.ndarray]:
    """A tensor's data, uint8, in runs of whole rows. The runs' length does not change the bytes."""
    if name == "rope_freqs.weight":
        size = shape[0]
        yield np.where(np.arange(size) < size // 4, 1.0, 1e30).astype("<f4").view(np.uint8)
        return
    bits = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    rows, row_bytes = (shape[0], tensor_bytes(shape[1:], kind)) if len(shape) == 2 else (1, 4 * shape[0])
    step = max(8, slab_bytes // row_bytes // 8 * 8)  # a multiple of 8 rows is a whole number of the generator's 8-byte words
    for row in range(0, rows, step):
        nbytes = min(step, rows - row) * row_bytes
        raw = bits.random_raw(-(-nbytes // 8)).view(np.uint8)[:nbytes]
        if kind != "F32":
            _fill_blocks(kind, raw.reshape(-1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), 1 / sqrt(shape[1]))
            yield raw
            continue
        uniform = raw.view("<i4").astype(np.float32) * np.float32(2.0**-31)  # -1 .. 1
        if len(shape) == 1:
            mean, spread = _vector_mean(name, shape[0])
            uniform = np.float32(mean) * (1 + np.float32(spread) * uniform)
        else:
            uniform *= np.float32(sqrt(3 / shape[1]))
        yield uniform.view(np.uint8)


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

    preset: one of `PRESETS`. mix: one of `MIXES`, types per tensor as llama-quantize chooses them. layers: only the first ones.
    vocab_from: a GGUF whose tokenizer is copied; without it a small tokenizer is made and padded with unused tokens.
    progress: called as (tensor name, bytes done, bytes in all), one call at a time. sparse: leave the tensor data a hole in the file, to
    plan with and nothing else. Raises KilnError.
    """
    path = Path(path)
    tensors = synth_plan(preset, mix, layers)
    header, offsets, size = gguf_header(_metadata(_config(preset, layers), _preset(preset), mix, vocab_from), tensors)
    total, done, lock = sum(tensor_bytes(shape, kind) for _, shape, kind in tensors), 0, threading.Lock()
    with replacing(path, f"{size / 2**30:.1f} GiB") as f, ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_WORKERS)) as pool:
        f.write(header)
        f.truncate(size)
        f.flush()

        def write(tensor: Tensor, offset: int) -> None:
            nonlocal done
            for piece in _pieces(*tensor, seed, slab_bytes):
                view = memoryview(piece)
                while view:
                    written = os.pwrite(f.fileno(), view, offset)
                    view, offset = view[written:], offset + written
                with lock:
                    done += len(piece)
                    if progress:
                        progress(tensor[0], done, total)

        for _ in pool.map(write, tensors, offsets) if not sparse else ():
            pass
