"""Files of drafters of the real architecture, in any size: four layers over a model's last layers of both kinds."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from kiln.exporter.model.records import Dense, DraftConfig, Layer, ModelConfig
from kiln.exporter.source.config import expected_tensors
from kiln.exporter.tools import synth

PATTERN = (True, True, True, False)  # sliding
ARCHITECTURE = "gemma4-assistant"


def draft_config(name: str, target: ModelConfig, hidden: int, ffn: int, heads: int) -> DraftConfig:
    layers = []
    for i, sliding in enumerate(PATTERN):
        source, theirs = max((j, m) for j, m in target.attentions.items() if (m.window is not None) == sliding)
        mixer = replace(theirs, heads=heads, kv_from=source, k_norm=None, v_norm=None, value="own")
        layers.append(Layer(i, mixer, Dense(ffn, "gelu_tanh"), post_norms=True, scaled=True))
    return DraftConfig(
        architecture=ARCHITECTURE, name=name, vocab_size=target.vocab_size, hidden_size=hidden, rms_norm_eps=target.rms_norm_eps,
        context_length=target.context_length, layers=tuple(layers), tied_head=True, target_hidden=target.hidden_size,
    )  # fmt: skip


def write_drafter(config: DraftConfig, path: Path, kind: str, data: Callable[[str, tuple[int, ...], str], np.ndarray]) -> None:
    """Matrices as `kind`, vectors as F32; data(name, shape, type): a tensor's bytes."""
    sliding, full = (next(m for m in config.attentions.values() if (m.window is not None) == s) for s in (True, False))
    assert sliding.window is not None
    kv_heads = [m.kv_heads for m in config.attentions.values()]
    ints: dict[str, int] = {
        "block_count": len(config.layers), "context_length": config.context_length, "embedding_length": config.hidden_size,
        "embedding_length_out": config.target_hidden, "feed_forward_length": config.layers[0].ffn.width, "nextn_predict_layers": 4,
        "attention.head_count": full.heads, "attention.sliding_window": sliding.window, "attention.shared_kv_layers": len(config.layers),
        "attention.key_length": full.head_dim, "attention.value_length": full.head_dim, "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim, "rope.dimension_count": full.head_dim, "rope.dimension_count_swa": sliding.head_dim,
    }  # fmt: skip
    floats = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": full.rope.base,
              "rope.freq_base_swa": sliding.rope.base}  # fmt: skip
    names = {"architecture": ARCHITECTURE, "name": config.name}
    metadata = [synth.key_value(f"general.{key}", GGUFValueType.STRING, value) for key, value in names.items()]
    metadata += [synth.key_value(f"{ARCHITECTURE}.{key}", GGUFValueType.UINT32, value) for key, value in ints.items()]
    metadata += [synth.key_value(f"{ARCHITECTURE}.{key}", GGUFValueType.FLOAT32, value) for key, value in floats.items()]
    metadata.append(synth.key_value(f"{ARCHITECTURE}.attention.head_count_kv", GGUFValueType.INT32, kv_heads))
    metadata.append(synth.key_value(f"{ARCHITECTURE}.attention.sliding_window_pattern", GGUFValueType.BOOL, list(PATTERN)))
    plan = [(name, shape, kind if len(shape) == 2 else "F32") for name, shape in expected_tensors(config).items()]
    header, offsets, size = synth.gguf_header(metadata, plan)
    with path.open("wb") as f:
        f.truncate(size)
        f.write(header)
        for (name, shape, block_type), offset in zip(plan, offsets, strict=True):
            f.seek(offset)
            f.write(np.ascontiguousarray(data(name, shape, block_type)).tobytes())


def random_tensor(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """For `write_drafter`: matrices in Q8_0 that keep their input's scale, vectors of ones. Seeded by the name."""
    if kind != "Q8_0":
        values = np.ones(shape, np.float32)
        if name == "rope_freqs.weight":
            values[len(values) // 4 :] = 1e30
        return values
    blocks = np.empty((shape[0] * shape[1] // 32, 34), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(shape[1] ** -0.5 / 74).tobytes(), np.uint8)  # bytes have a standard deviation of 74
    blocks[:, 2:] = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (len(blocks), 32), np.uint8)
    return blocks
