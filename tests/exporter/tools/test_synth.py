"""Synthetic files: llama-quantize's types, determinism, scale of the weights, and that our reader and the gguf package's accept them."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from kiln.custom_ops.geometry import GEOMETRIES
from kiln.custom_ops.weights.mixes import MIXES, SYNTHETIC
from kiln.exporter.errors import KilnError
from kiln.exporter.source.config import check_tensors, from_gguf
from kiln.exporter.source.gguf import GGUFFile, open_gguf
from kiln.exporter.source.tokenizer import read_tokenizer
from kiln.exporter.tools import synth
from kiln.exporter.tools.synth import synth_plan, tensor_bytes, write_synthetic
from tests.gguf_files import FIXTURES

VOCAB = FIXTURES / "gemma4-vocab.gguf"


@pytest.mark.parametrize(
    ("mix", "tally", "mib"),
    [
        ("q3_k_m", {"F32": 422, "Q3_K": 240, "Q4_K": 165, "Q5_K": 5, "Q6_K": 1}, 14564),
        ("q4_k_m", {"F32": 422, "Q4_K": 355, "Q6_K": 56}, 17806),
        ("q6_k", {"F32": 422, "Q6_K": 411}, 24019),
        ("q4_0", {"F32": 422, "Q4_0": 410, "Q6_K": 1}, 16818),
        ("iq4_nl", {"F32": 422, "IQ4_NL": 403, "Q5_K": 7, "Q6_K": 1}, 16915),
        ("iq4_xs", {"F32": 422, "IQ4_XS": 403, "Q5_K": 7, "Q6_K": 1}, 16066),
        ("q8_0", {"F32": 422, "Q8_0": 411}, 31109),
        ("f32", {"F32": 833}, 117101),
    ],
)
def test_31b_types_and_size(mix: str, tally: dict[str, int], mib: int) -> None:
    """Against llama-quantize's own dry run on the full-size model."""
    plan = synth_plan("gemma4-31b", mix)
    assert Counter(kind for *_, kind in plan) == tally
    assert round(sum(tensor_bytes(shape, kind) for _, shape, kind in plan) / 2**20) == mib


def test_31b_q4_k_m_layers_with_more_bits() -> None:
    types = {name: kind for name, _, kind in synth_plan("gemma4-31b", "q4_k_m")}
    v = [i for i in range(60) if types.get(f"blk.{i}.attn_v.weight") == "Q6_K"]
    down = [i for i in range(60) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert v == [0, 1, 2, 3, 4, 6, 9, 13, 16, 20, 24, 27, 31, 34, 38, 42, 45, 49, 51, 52, 54, 55, 56, 57, 58]
    assert down == [*range(7), *range(9, 49, 3), 51, *range(52, 60)]


@pytest.mark.parametrize(("preset", "tensors", "parameters"), [("gemma4-31b", 833, 30_697_345_340), ("gemma4-12b", 667, 11_907_350_320)])
def test_real_geometry(preset: str, tensors: int, parameters: int) -> None:
    plan = synth_plan(preset, "q4_0")
    assert len(plan) == tensors
    assert sum(prod(shape) for name, shape, _ in plan if name != "rope_freqs.weight") == parameters


def dequantized(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return gguf.quants.dequantize(file.data(name), GGMLQuantizationType[info.type]).reshape(info.shape)


@pytest.mark.parametrize("mix", SYNTHETIC)
def test_file_reads_back_with_well_scaled_weights(tmp_path: Path, mix: str) -> None:
    path = tmp_path / "m.gguf"
    seen: list[tuple[str, int, int]] = []
    write_synthetic(path, "tiny", mix, progress=lambda *call: seen.append(call))
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    file, plan = open_gguf(path), synth_plan("tiny", mix)
    config = from_gguf(file)
    assert check_tensors(config, file) == []
    assert [(t.name, t.shape, t.type) for t in file.tensors.values()] == plan
    assert [(t.name, int(t.n_elements)) for t in gguf.GGUFReader(path).tensors] == [(name, prod(shape)) for name, shape, _ in plan]
    total = sum(tensor_bytes(shape, kind) for _, shape, kind in plan)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen) and seen[-1][1:] == (total, total)
    assert file.metadata["general.file_type"] == gguf.LlamaFileType[MIXES[mix].file_type]
    assert [layer.mixer.window is not None for layer in config.layers] == [True] * 5 + [False]
    for name, shape, _ in plan:
        values = dequantized(file, name).astype(np.float64)
        if len(shape) == 2:
            assert abs(values.std() * shape[1] ** 0.5 - 1) < 0.04, name
            assert abs(values.mean()) * shape[1] ** 0.5 < 0.02, name
            assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 0.35, name
        elif name == "rope_freqs.weight":
            assert values[:16].tolist() == [1.0] * 16 and (values[16:] == np.float32(1e30)).all()
        else:
            assert np.isfinite(values).all() and values.min() > 0
    assert dequantized(file, "blk.5.layer_output_scale.weight")[0] == pytest.approx(0.95, abs=0.05)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    def made(name: str, **arguments) -> bytes:
        write_synthetic(tmp_path / name, "tiny", arguments.pop("mix", "q4_k_m"), **arguments)
        return (tmp_path / name).read_bytes()

    for mix in ("q4_k_m", "q4_0", "f32"):
        assert made("a", seed=3, mix=mix) == made("b", seed=3, mix=mix, slab_bytes=5000)
    assert made("a", seed=3) != made("b", seed=4)
    made("three", seed=3, layers=3)
    whole, part = open_gguf(tmp_path / "a"), open_gguf(tmp_path / "three")
    assert [layer.mixer.window is not None for layer in from_gguf(part).layers] == [True] * 3
    for name in ("token_embd.weight", "blk.2.attn_q.weight", "blk.1.attn_norm.weight"):
        assert whole.data(name).tobytes() == part.data(name).tobytes()


def test_tiny_cuda_has_the_real_head_geometry() -> None:
    config = synth._config("tiny-cuda", None)
    mixers = [layer.mixer for layer in config.layers[4:]]
    assert [(x.window, x.head_dim, x.heads, x.kv_heads) for x in mixers] == [(1024, 256, 32, 16), (None, 512, 32, 4)]
    assert (config.hidden_size, config.layers[0].ffn.size) == (1024, 2048)


def header_only(path: Path, preset: str, vocab_from: Path | None) -> GGUFFile:
    """A file with the preset's metadata and no tensors: the big vocabularies without their embedding."""
    metadata = synth.metadata(synth._config(preset, 1), "q4_0", vocab_from)
    path.write_bytes(synth.gguf_header(metadata, [])[0])
    return open_gguf(path)


def test_copied_tokenizer(tmp_path: Path) -> None:
    source, copy = open_gguf(VOCAB), header_only(tmp_path / "m.gguf", "gemma4-12b", VOCAB)
    keys = [key for key in source.metadata if key.startswith("tokenizer.")]
    assert keys and all(copy.metadata.raw(key) == source.metadata.raw(key) for key in keys)
    assert copy.metadata["tokenizer.ggml.suppress_tokens"] == [258883, 258882]


@pytest.mark.parametrize("preset", ["tiny", "gemma4-31b"])
def test_generated_tokenizer(tmp_path: Path, preset: str) -> None:
    from tokenizers import Tokenizer

    file = header_only(tmp_path / "m.gguf", preset, None)
    assert file.metadata.length("tokenizer.ggml.tokens") == GEOMETRIES[preset].vocab
    read = read_tokenizer(file.metadata)
    assert read and read.record() == {"bos": 2, "eog": [1, 6, 7]}
    read.write(tmp_path / "tokenizer.json")
    tokens = file.metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoded = tokenizer.encode("hello the World\n\u00e9").ids
    assert [tokens[i] for i in encoded] == ["<bos>", "hello", "\u2581the", "\u2581", "W", "o", "r", "l", "d", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded) == "hello the World\n\u00e9"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "gemma5"}, "unknown preset 'gemma5'; known: gemma4-31b"),
        ({"mix": "q3_k"}, "unknown mix 'q3_k'; known: q2_k, q3_k_m"),
        ({"layers": 7}, "preset tiny has 1 to 6 layers, 7 asked for"),
        ({"layers": 0}, "0 asked for"),
        ({"vocab_from": VOCAB}, "has a vocabulary of 262144 tokens, the preset needs 512"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(KilnError, match=message):
        write_synthetic(tmp_path / "m.gguf", **{"preset": "tiny", "mix": "q4_0", **arguments})
    assert not list(tmp_path.iterdir())


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def stop(*_call: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "m.gguf", "tiny", "q4_0", progress=stop)
    with pytest.raises(KilnError, match="absent/m.gguf: cannot write 0.0 GiB: No such file"):
        write_synthetic(tmp_path / "absent" / "m.gguf", "tiny", "q4_0")
    assert not list(tmp_path.iterdir())
