"""The GGUF reader against the gguf package's, its errors, and the configuration read from it."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType

from kiln.exporter.errors import KilnError
from kiln.exporter.model.records import Dense
from kiln.exporter.source.config import check_tensors, expected_tensors, from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.synth import key_value
from tests.gguf_files import FIXTURES, WIDE, draft_tensors, entries, rewrite, write

MODELS = sorted(p for p in FIXTURES.glob("*.gguf") if "vocab" not in p.name and "assistant" not in p.name)  # a drafter is no model


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_agrees_with_the_gguf_package(path: Path) -> None:
    oracle, file = gguf.GGUFReader(path), open_gguf(path)
    keys = [key for key in oracle.fields if not key.startswith("GGUF.")]
    assert list(file.metadata) == keys
    for key in keys:
        assert file.metadata[key] == oracle.fields[key].contents(), key
    assert list(file.tensors) == [t.name for t in oracle.tensors]
    for tensor in oracle.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (info.type, info.ggml_type, info.nbytes) == (tensor.tensor_type.name, tensor.tensor_type, tensor.n_bytes)
        assert file.data(tensor.name).tobytes() == tensor.data.tobytes()
        assert file.data(tensor.name).shape[0] == int(np.prod(tensor.shape[1:]))


def test_big_vocabulary_stays_raw() -> None:
    tracemalloc.start()
    file = open_gguf(FIXTURES / "gemma4-vocab.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert file.metadata.length("tokenizer.ggml.tokens") == 262144
    assert file.metadata.length("tokenizer.ggml.merges") == 514906
    assert file.metadata.length("general.name") is None
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert (tokens[2], tokens[106], tokens[236743]) == ("<bos>", "<turn|>", "\u2581")


def test_data_is_a_view_and_survives_release() -> None:
    file = open_gguf(WIDE)
    data = file.data("token_embd.weight")
    assert not data.flags.owndata and not data.flags.writeable
    before = data.tobytes()
    file.release("token_embd.weight")
    assert data.tobytes() == before


def split(directory: Path, source: Path, count: int) -> list[Path]:
    """The parts of `source`, as llama-gguf-split names and marks them; the first holds the metadata."""
    file = open_gguf(source)
    names = list(file.tensors)
    paths = []
    for i in range(count):
        part = names[len(names) * i // count : len(names) * (i + 1) // count]
        marks = [
            key_value("split.no", GGUFValueType.UINT32, i),
            key_value("split.count", GGUFValueType.UINT32, count),
            key_value("split.tensors.count", GGUFValueType.INT32, len(names)),
        ]
        tensors = [(n, file.tensors[n].shape, file.tensors[n].type, file.data(n)) for n in part]
        paths.append(write(directory / f"m-{i + 1:05d}-of-{count:05d}.gguf", (entries(file) if i == 0 else []) + marks, tensors))
    return paths


@pytest.mark.parametrize("given", [0, 2])
def test_split_files(tmp_path: Path, given: int) -> None:
    paths = split(tmp_path, WIDE, 3)
    whole, merged = open_gguf(WIDE), open_gguf(paths[given])
    assert list(merged.tensors) == list(whole.tensors)
    assert {t.file for t in merged.tensors.values()} == {0, 1, 2}
    for name in whole.tensors:
        assert merged.data(name).tobytes() == whole.data(name).tobytes()
    assert from_gguf(merged) == from_gguf(whole)


def test_split_errors(tmp_path: Path) -> None:
    paths = split(tmp_path, WIDE, 3)
    third = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(KilnError, match="m-00003-of-00003.gguf: missing part 3 of 3"):
        open_gguf(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(KilnError, match="says it is part 1 of 3"):
        open_gguf(paths[0])
    paths[2].write_bytes(third)
    renamed = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(KilnError, match="split into 3 files"):
        open_gguf(renamed)


def first_tensor_info(data: bytes) -> int:
    """Position of the first tensor info: its name is the first thing after the metadata."""
    name = next(iter(open_gguf(WIDE).tensors)).encode()
    return data.index(struct.pack("<Q", len(name)) + name)


def patch_offset(data: bytearray, value: int) -> None:
    """Overwrites the data offset of the first tensor (one dimension)."""
    at = first_tensor_info(bytes(data))
    (length,) = struct.unpack_from("<Q", data, at)
    struct.pack_into("<Q", data, at + 8 + length + 4 + 8 + 4, value)


def duplicate_name(data: bytearray) -> None:
    data[:] = data.replace(b"blk.0.attn_k_norm.weight", b"blk.0.attn_q_norm.weight")


DAMAGE: list[tuple[str, Callable[[bytearray], None], str]] = [
    ("empty", lambda d: d.clear(), "empty"),
    ("magic", lambda d: d.__setitem__(slice(0, 4), b"PK\x03\x04"), "not a GGUF file"),
    ("version", lambda d: struct.pack_into("<I", d, 4, 2), "version is 2"),
    ("big-endian", lambda d: struct.pack_into(">I", d, 4, 3), "big-endian"),
    ("header cut", lambda d: d.__delitem__(slice(100, None)), "truncated at .*metadata"),
    ("infos cut", lambda d: d.__delitem__(slice(first_tensor_info(bytes(d)) + 40, None)), "truncated at tensor info 0"),
    ("data cut", lambda d: d.__delitem__(slice(len(d) - 4096, None)), r"truncated: tensor blk\.\S+ ends at byte \d+, the file has"),
    ("too many tensors", lambda d: struct.pack_into("<Q", d, 8, 1 << 60), "has 0 dimensions"),
    ("huge string", lambda d: struct.pack_into("<Q", d, 24, 1 << 63), "truncated at metadata entry 0"),
    ("offset past the end", lambda d: patch_offset(d, 1 << 40), "truncated: tensor output_norm.weight ends at byte"),
    ("misaligned offset", lambda d: patch_offset(d, 4), "output_norm.weight is misaligned: offset 4"),
    ("duplicate tensor", duplicate_name, "blk.0.attn_q_norm.weight appears twice"),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_file(tmp_path: Path, damage: Callable[[bytearray], None], message: str) -> None:
    data = bytearray(WIDE.read_bytes())
    damage(data)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(KilnError, match=message) as error:
        open_gguf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_cut_is_one_clear_error(tmp_path: Path) -> None:
    data = WIDE.read_bytes()
    end = open_gguf(WIDE).tensors["output_norm.weight"].offset
    for size in range(1, end, 997):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:size])
        with pytest.raises(KilnError):
            open_gguf(path)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(KilnError, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(KilnError, match="a directory"):
        open_gguf(tmp_path)


# ---- configuration ----


def test_config_of_the_fixture() -> None:
    config = from_gguf(open_gguf(WIDE))
    assert (config.architecture, config.name, config.vocab_size, config.hidden_size) == ("gemma4", "gemma4-tiny-dense-wide", 512, 256)
    assert (config.embedding_scale, config.context_length, config.final_logit_softcapping) == (16, 4096, 30.0)
    assert config.tied_head and all(layer.scaled and layer.post_norms for layer in config.layers) and config.suppress_tokens == ()
    assert config.rms_norm_eps == pytest.approx(1e-6)
    assert [layer.mixer.window for layer in config.layers] == [16, 16, None, 16, 16, None]
    full, sliding = config.layers[2].mixer, config.layers[0].mixer
    assert (full.head_dim, full.heads, full.kv_heads, full.rope.base, full.value) == (128, 4, 1, 1e6, "key")
    assert (sliding.head_dim, sliding.heads, sliding.kv_heads, sliding.rope.base, sliding.value) == (64, 4, 2, 1e4, "own")
    assert {layer.ffn for layer in config.layers} == {Dense(512, "gelu_tanh")}
    assert config.to_dict()["layers"][2]["mixer"]["head_dim"] == 128


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_fixture_has_exactly_the_expected_tensors(path: Path) -> None:
    file = open_gguf(path)
    config = from_gguf(file)
    drafting = set(draft_tensors(config, file))
    assert len(drafting) > 10 if config.draft_blocks else not drafting
    assert set(check_tensors(config, file)) == drafting
    assert set(expected_tensors(config, file.tensors)) == set(file.tensors) - drafting


U32, I32, BOOL, F32 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.BOOL, GGUFValueType.FLOAT32


@pytest.mark.parametrize(
    ("drop", "keys", "message"),
    [
        ([], {"general.architecture": (GGUFValueType.STRING, "mamba")}, "mamba.* supported: gemma3, gemma4, llama, qwen3"),
        (["gemma4.attention.sliding_window_pattern"], {}, "sliding_window_pattern is missing"),
        (["gemma4.rope.freq_base"], {}, "gemma4.rope.freq_base is missing"),
        ([], {"gemma4.attention.sliding_window_pattern": (BOOL, [True] * 5)}, "must be 6 booleans"),
        ([], {"gemma4.expert_count": (U32, 128)}, "expert_used_count is 0, a positive integer was expected"),
        ([], {"gemma4.attention.shared_kv_layers": (U32, 4)}, "shared_kv_layers is 4 of 6 layers: no earlier layer has"),
        ([], {"gemma4.attention.shared_kv_layers": (U32, 7)}, "shared_kv_layers is 7 of 6 layers"),
        ([], {"gemma4.attention.shared_kv_layers": (U32, 2), "gemma4.attention.head_count_kv": (I32, [2, 2, 1, 2, 1, 1])},
         "head_count_kv is 1 in layer 4 and another number in layer 3, whose keys it reads"),
        ([], {"gemma4.attention.head_count_kv": (I32, [2, 2, 1])}, "3 entries for 6 layers"),
        ([], {"gemma4.attention.head_count_kv": (I32, [2, 2, 3, 2, 2, 1])}, "layer 2 has 4 heads"),
        ([], {"gemma4.attention.value_length": (U32, 64)}, "value_length is 64, but gemma4.attention.key_length is 128"),
        ([], {"gemma4.block_count": (U32, 0)}, "block_count is 0, a positive integer"),
        ([], {"gemma4.attention.layer_norm_rms_epsilon": (F32, float("nan"))}, "positive number"),
        ([], {"tokenizer.ggml.suppress_tokens": (I32, [512])}, "outside the vocabulary of 512"),
    ],
)
def test_bad_metadata(tmp_path: Path, drop: list[str], keys: dict, message: str) -> None:
    with pytest.raises(KilnError, match=message):
        from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", drop=drop, set_keys=keys)))


def test_scalars_and_arrays_are_interchangeable(tmp_path: Path) -> None:
    keys = {"gemma4.feed_forward_length": (I32, [512] * 6), "gemma4.attention.head_count": (I32, [4] * 6)}
    path = rewrite(tmp_path / "m.gguf", set_keys=keys)
    assert from_gguf(open_gguf(path)) == from_gguf(open_gguf(WIDE))
    path = rewrite(tmp_path / "n.gguf", set_keys={"gemma4.attention.head_count_kv": (U32, 2)})
    assert {layer.mixer.kv_heads for layer in from_gguf(open_gguf(path)).layers} == {2}


def zeros(*shape: int) -> tuple[tuple[int, ...], str, np.ndarray]:
    return shape, "F32", np.zeros(shape, np.float32)


IQ = ((512, 256), "IQ3_S", np.zeros(512 * 110, np.uint8))


@pytest.mark.parametrize(
    ("drop", "tensors", "message"),
    [
        (["blk.3.ffn_up.weight"], {}, r"tensor blk.3.ffn_up.weight is missing, expected with shape \[512, 256\]"),
        (["blk.3.attn_v.weight"], {}, "tensor blk.3.attn_v.weight is missing"),
        (["rope_freqs.weight"], {}, r"tensor rope_freqs.weight is missing, expected with shape \[64\]"),
        (["blk.1.layer_output_scale.weight"], {}, "blk.1.layer_output_scale.weight is missing"),
        ([], {"blk.2.attn_q.weight": zeros(256, 256)}, r"blk.2.attn_q.weight has shape \[256, 256\], expected \[512, 256\]"),
        ([], {"blk.1.ffn_gate.weight": IQ}, "tensor blk.1.ffn_gate.weight has the unsupported type IQ3_S"),
        ([], {"output_norm.weight": ((256,), "Q8_0", np.zeros(8 * 34, np.uint8))}, "output_norm.weight has the unsupported type Q8_0"),
    ],
)
def test_bad_tensors(tmp_path: Path, drop: list[str], tensors: dict, message: str) -> None:
    file = open_gguf(rewrite(tmp_path / "m.gguf", drop=drop, set_tensors=tensors))
    with pytest.raises(KilnError, match=message):
        check_tensors(from_gguf(file), file)


def test_unknown_tensor_type(tmp_path: Path) -> None:
    data = bytearray(WIDE.read_bytes())
    at = first_tensor_info(bytes(data))
    (length,) = struct.unpack_from("<Q", data, at)
    struct.pack_into("<I", data, at + 8 + length + 4 + 8, 77)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    file = open_gguf(path)  # only a tensor the model uses is refused, and only when it is asked for
    with pytest.raises(KilnError, match="tensor output_norm.weight has the unsupported type type 77"):
        check_tensors(from_gguf(file), file)


def test_tensors_of_a_vision_tower_are_named_once(tmp_path: Path) -> None:
    plan = read_plan(rewrite(tmp_path / "m.gguf", set_tensors={"v.blk.0.weight": zeros(4, 4), "mm.weight": IQ}))
    assert plan.unused == ("v.blk.0.weight", "mm.weight") == tuple(check_tensors(plan.config, plan.gguf))
    assert len(plan.notes) == 1 and "v.blk.0.weight" in plan.notes[0] and "mm.weight" in plan.notes[0]


def test_variants(tmp_path: Path) -> None:
    """An untied head, no layer scales, and V on a full-attention layer."""
    scales = [f"blk.{i}.layer_output_scale.weight" for i in range(6)]
    added = {"output.weight": zeros(512, 256), "blk.2.attn_v.weight": zeros(128, 256)}
    file = open_gguf(rewrite(tmp_path / "m.gguf", drop=scales, set_tensors=added))
    config = from_gguf(file)
    assert check_tensors(config, file) == []
    assert not config.tied_head and not any(layer.scaled for layer in config.layers)
    assert (config.layers[2].mixer.value, config.layers[5].mixer.value) == ("own", "key")


@pytest.mark.parametrize("end", ["key", "tensor"])
def test_long_names_are_cut_in_what_is_said(tmp_path: Path, end: str) -> None:
    """The path before them and what to do after them stay."""
    long = "gemma4." + "\x01" * 30000
    entry = key_value(long if end == "key" else "general.name", GGUFValueType.STRING, "x")
    tensor = (long, (1,), "F32", np.zeros(1, np.float32))
    path = write(tmp_path / "m.gguf", [entry, entry] if end == "key" else [entry], [tensor, tensor] if end == "tensor" else [])
    with pytest.raises(KilnError) as error:
        read_plan(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and len(text) < 2200 and text.isprintable()
    assert text.endswith("appears twice; the file is damaged, convert it again")
