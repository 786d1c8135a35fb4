"""Our quantizers against the gguf package: blocks bit for bit where it has a quantizer, else the error of its dequantized values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.errors import KilnError
from kiln.exporter.source.config import check_tensors, from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.tools.quantize import quantize, quantized_plan, to_float, write_quantized
from kiln.exporter.tools.synth import synth_plan, write_synthetic
from tests.gguf_files import rewrite

TYPES = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K")
# Largest relative error (root mean square) on normal values: a uniform quantizer of that many levels, and a little slack.
BOUND = {"Q4_0": 0.090, "Q5_0": 0.045, "Q8_0": 0.006, "Q4_K": 0.075, "Q5_K": 0.038, "Q6_K": 0.020,
         "IQ4_NL": 0.080, "IQ4_XS": 0.080, "Q3_K": 0.170, "Q2_K": 0.34}  # fmt: skip


def values(rows: int = 24, columns: int = 1024, seed: int = 0) -> np.ndarray:
    """Normal rows, each with a scale of its own, some of them long-tailed."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * np.exp(rng.uniform(-6, 2, (rows, 1)))
    x[::4] *= np.exp(rng.standard_normal((len(x[::4]), columns)) * 0.5)
    return x.astype(np.float32)


def restored(block_type: str, blocks: np.ndarray) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[block_type])


@pytest.mark.parametrize("block_type", ["Q4_0", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16"])
def test_bits_equal_the_gguf_package(block_type: str) -> None:
    x = values(seed=1)
    x[3, :64] = 0  # a whole block of zeros has the scale 0
    x[5, 7] = 1e-8
    np.testing.assert_array_equal(quantize(block_type, x), quants.quantize(x, GGMLQuantizationType[block_type]))


@pytest.mark.parametrize("block_type", TYPES)
def test_error_bound(block_type: str) -> None:
    x = np.random.default_rng(2).standard_normal((64, 1024)).astype(np.float32) * np.float32(0.02)
    error = restored(block_type, quantize(block_type, x)) - x
    assert np.sqrt(np.square(error).mean()) / x.std() < BOUND[block_type]


@pytest.mark.parametrize("block_type", ["Q4_K", "Q5_K", "Q6_K"])
def test_search_beats_plain_rounding(block_type: str) -> None:
    """The search must pay: less error than the largest value as the scale, in every matrix of a few shapes of distribution."""
    plain = {"Q4_K": "Q4_0", "Q5_K": "Q5_0", "Q6_K": None}[block_type]
    for seed in range(3):
        x = values(seed=seed)
        error = np.square(restored(block_type, quantize(block_type, x)) - x).mean(1)
        if plain:
            reference = np.square(restored(plain, quantize(plain, x)) - x).mean(1)
        else:  # 6 bits with the group's largest magnitude at -32
            groups = x.reshape(len(x), -1, 16)
            d = np.abs(groups).max(-1, keepdims=True) / 32
            reference = np.square(np.rint(groups / d).clip(-32, 31) * d - groups).mean((1, 2))
        assert error.mean() < reference.mean()
        assert (error < reference * 1.05).all()


@pytest.mark.parametrize("block_type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_edges(block_type: str) -> None:
    """Zeros stay zeros, a constant and one-sided values are kept within a step, one outlier does not hurt its neighbours' groups."""
    x = np.zeros((6, 256), np.float32)
    x[1] = 0.75
    x[2] = -0.75
    x[3] = np.linspace(1, 2, 256)  # no negative value: the stored minimum is of no use
    x[4] = np.linspace(-2, -1, 256)
    x[5] = np.random.default_rng(0).standard_normal(256) * 0.01
    x[5, 0] = 5
    y = restored(block_type, quantize(block_type, x))
    levels = {"Q2_K": 3, "Q3_K": 4, "Q4_K": 15, "Q5_K": 31, "Q6_K": 32}[block_type]
    assert (y[0] == 0).all()
    assert np.abs(y[1:3] - x[1:3]).max() < 0.75 / levels
    assert np.abs(y[3:5] - x[3:5]).max() < 2 / levels
    assert abs(y[5, 0] - 5) < 5 / levels
    assert np.abs(y[5, 32:] - x[5, 32:]).max() < 0.08  # the shared scale of scales is coarse, but not blind


def test_refusals() -> None:
    with pytest.raises(KilnError, match="no multiple of the 256 of a Q4_K block"):
        quantize("Q4_K", np.zeros((2, 320), np.float32))
    with pytest.raises(KilnError, match="no quantizer for block type IQ3_S"):
        quantize("IQ3_S", np.zeros((2, 256), np.float32))
    with pytest.raises(KilnError, match="not finite"):
        quantize("Q8_0", np.full((1, 32), np.nan, np.float32))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(rows=5, columns=768)
    whole = quantize("Q4_K", x)
    monkeypatch.setattr("kiln.exporter.tools.quantize.CHUNK", 512)
    np.testing.assert_array_equal(quantize("Q4_K", x), whole)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "tiny-F32.gguf"
    write_synthetic(path, "tiny", "f32", seed=5)
    return path


@pytest.mark.parametrize("mix", ["q4_k_m", "q6_k", "q4_0", "q8_0", "iq4_nl", "iq4_xs", "q3_k_m", "q2_k"])
def test_write_quantized(source: Path, tmp_path: Path, mix: str) -> None:
    """The types of the synthetic files (which equal llama-quantize's), the metadata kept, every value near its original."""
    out = tmp_path / "out.gguf"
    plan = write_quantized(source, out, mix, workers=2)
    assert plan == synth_plan("tiny", mix)
    before, after = open_gguf(source), open_gguf(out)
    assert check_tensors(from_gguf(after), after) == []
    assert [(t.name, t.shape, t.type) for t in after.tensors.values()] == plan
    kept = [key for key in before.metadata if key not in ("general.file_type", "general.quantization_version")]
    assert all(before.metadata.raw(key) == after.metadata.raw(key) for key in kept)
    for name, _, block_type in plan:
        x, y = to_float(before, name), to_float(after, name)
        if block_type == "F32":
            np.testing.assert_array_equal(x, y)
        else:
            assert np.sqrt(np.square(x - y).mean()) / x.std() < 1.1 * BOUND[block_type], name


def test_fallback_where_rows_are_odd(source: Path, tmp_path: Path) -> None:
    x = values(rows=512, columns=96)
    path = rewrite(tmp_path / "odd.gguf", source, set_tensors={"blk.0.ffn_gate.weight": ((512, 96), "F32", x.view(np.uint8))})
    block_types = {name: block_type for name, _, block_type in quantized_plan(open_gguf(path), "q4_k_m")}
    assert block_types["blk.0.ffn_gate.weight"] == LAYOUTS["Q4_K"].fallback == "Q5_0"
    out = tmp_path / "out.gguf"
    write_quantized(path, out, "q4_k_m", workers=2)
    y = to_float(open_gguf(out), "blk.0.ffn_gate.weight")
    assert np.sqrt(np.square(x - y).mean()) / x.std() < 0.1


def test_no_second_quantization(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    write_quantized(source, out, "q8_0", workers=2)
    with pytest.raises(KilnError, match="is Q8_0 already"):
        write_quantized(out, tmp_path / "again.gguf", "q4_0")
    assert not (tmp_path / "again.gguf").exists()
