"""A model file read once: what is refused is named, by `kiln inspect`, `--dry-run` and `export` alike; every form of a fact is read."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf.constants
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType, GGUFValueType

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.artifact.load import load_weights
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.cli import main
from kiln.exporter.errors import KilnError, Problems
from kiln.exporter.source import gguf as reader
from kiln.exporter.source.config import families, from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import ReadOptions, read_plan, survey
from tests.exporter.source.test_gguf import split
from tests.gguf_files import FIXTURES, WIDE, rewrite

TINY = FIXTURES / "gemma4-tiny-dense.gguf"
BOOL, F32, F64, I32, I64, STRING, U8, U32, U64 = (
    GGUFValueType[name] for name in ("BOOL", "FLOAT32", "FLOAT64", "INT32", "INT64", "STRING", "UINT8", "UINT32", "UINT64")
)


def inspect(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["inspect", str(path), *options], catch_exceptions=False)


def export(path: Path, out: Path, *options: str) -> Result:
    arguments = ["export", "--gguf", str(path), "--out", str(out), "--target", "cpu", *options]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def refused(path: Path, match: str) -> None:
    """`inspect`, `--dry-run` and `export` say the same one line first and nothing is written."""
    out = path.parent / "refused" / "out"
    results = [inspect(path), export(path, out, "--dry-run")]
    lines = [[line for line in r.stderr.splitlines() if "rror" in line] for r in results]
    assert [r.exit_code for r in results] == [1, 1] and len(lines[0]) == len(lines[1]) == 1, lines
    assert lines[0] == lines[1] and re.search(match, lines[0][0]), lines
    with pytest.raises(KilnError) as error:  # without a dry run only packing sees every number
        write_weights(path.parent / "w", read_plan(path))
    assert lines[0][0] == f"kiln: error: {error.value}" and "\n" not in str(error.value)
    assert not (path.parent / "w").exists()
    assert not out.parent.exists() or not any(out.parent.iterdir())


# ---- what a file is ----


def safetensors(size: int = 64) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def zipped(tmp_path: Path) -> bytes:
    with zipfile.ZipFile(tmp_path / "z", "w") as z:
        z.write(WIDE, "m.gguf")
    return (tmp_path / "z").read_bytes()


FOREIGN = [
    ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n", "Git LFS pointer.*git lfs pull"),
    ("gzip", gzip.compress(b"GGUF" * 100), "compressed with gzip"),
    ("html", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    ("html with a BOM", b"\xef\xbb\xbf<html>", "web page"),
    ("json", b'{"error":"Repository not found"}', "JSON text"),
    ("safetensors", safetensors(), "safetensors file; convert"),
    ("pickle", b"\x80\x02}q\x00.", "Python pickle"),
    ("ggjt", b"tjgg\x03\0\0\0" + bytes(64), "older than GGUF"),
    ("zeros", bytes(4096), "begins with zeros: an unfinished"),
    ("swapped", b"FUGG" + bytes(64), "bytes swapped"),
    ("text", b"Entry not found", "text that begins with 'Entry not found'"),
    ("imatrix.dat", struct.pack("<ii", 60, 19) + b"blk.0.ffn_up.weight" + bytes(64), "importance matrix"),
    ("empty", b"", "the file is empty"),
    ("binary", bytes(range(128, 256)), r"it starts with b'\\x80\\x81\\x82\\x83' instead of b'GGUF'"),
]


@pytest.mark.parametrize(("data", "match"), [row[1:] for row in FOREIGN], ids=[row[0] for row in FOREIGN])
def test_a_file_that_is_no_gguf_is_called_what_it_is(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    refused(tmp_path / "model.gguf", f"model.gguf: .*{match}")


def test_more_files_that_are_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(zipped(tmp_path))
    with pytest.raises(KilnError, match="zip archive"):
        open_gguf(tmp_path / "m.gguf")
    for name in ("m.gguf.part", "m.gguf.crdownload"):
        (tmp_path / name).write_bytes(b"\0\1\2")
        with pytest.raises(KilnError, match="unfinished download"):
            open_gguf(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KilnError, match="a pipe or device"):
        open_gguf(tmp_path / "pipe")
    there = f"but there is {WIDE}:"
    for path, match in ((f"{WIDE}\r", there), (f"'{WIDE}'", there), (f"{WIDE.parent}/*.gguf", "a pattern"), ("https://a/m", "a URL")):
        with pytest.raises(KilnError, match=match):
            open_gguf(path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    with pytest.raises(KilnError, match="it holds safetensors files: convert"):
        open_gguf(tmp_path / "hf")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(KilnError, match="a link to a file that is gone"):
        open_gguf(tmp_path / "link")
    for path in ("x" * 5000, "a\0b", ""):
        with pytest.raises(KilnError):
            open_gguf(path)


@pytest.mark.parametrize(
    ("drop", "keys", "match"),
    [
        ([], {"general.type": (STRING, "adapter")}, "a LoRA adapter, not a language model"),
        ([], {"general.type": (STRING, "mmproj")}, "projector"),
        ([], {"general.architecture": (STRING, "clip")}, "a vision or audio projector"),
        ([], {"general.architecture": (STRING, "whisper")}, "a Whisper speech model"),
        ([], {"general.architecture": (STRING, "gemma4-assistant")}, "a drafter"),
        ([], {"general.architecture": (STRING, "nomic-bert-moe")}, "text embedding model"),
        ([], {"general.type": (STRING, "imatrix")}, "an importance matrix"),
        (["general.architecture"], {"imatrix.chunk_count": (U32, 4)}, "an importance matrix"),
        (["general.architecture"], {"adapter.type": (STRING, "lora")}, "a LoRA adapter"),
        (["general.architecture"], {}, "general.architecture is missing; supported: gemma3, gemma4, llama, qwen3"),
        ([], {"general.architecture": (U32, 4)}, "architecture 4 is not supported"),
    ],
)
def test_a_gguf_file_of_something_else(tmp_path: Path, drop: list[str], keys: dict, match: str) -> None:
    refused(rewrite(tmp_path / "m.gguf", drop=drop, set_keys=keys), match)


def test_directories_name_the_models_inside(tmp_path: Path) -> None:
    paths = split(tmp_path, WIDE, 3)
    refused(tmp_path, f"a directory, not a GGUF file; it holds {paths[0]}: give one of them")


def test_links_and_names(tmp_path: Path) -> None:
    """A blob without an extension, a link to it, a link to one part of a split model, read-only, a name in another script."""
    blob = tmp_path / "sha256-1f3a"
    blob.write_bytes(WIDE.read_bytes())
    blob.chmod(0o400)
    (tmp_path / "模型 é '\".gguf").symlink_to(blob)
    parts = split(tmp_path, WIDE, 2)
    (tmp_path / "model.gguf").symlink_to(parts[0])
    expected = from_gguf(open_gguf(WIDE))
    for path in (blob, tmp_path / "模型 é '\".gguf", tmp_path / "model.gguf"):
        plan = read_plan(path)
        assert plan.config == expected and inspect(path).exit_code == 0


def test_split_counts_of_any_type(tmp_path: Path) -> None:
    for value in ((U8, 1), (F32, 1.0), (I64, 1), (U32, 0)):
        assert read_plan(rewrite(tmp_path / "m.gguf", set_keys={"split.count": value})).config == from_gguf(open_gguf(WIDE))
    for bad in ((STRING, "two"), (I64, 1 << 40), (F32, float("nan"))):
        with pytest.raises(KilnError, match="split.count is"):
            open_gguf(rewrite(tmp_path / "m.gguf", set_keys={"split.count": bad}))


# ---- keys and tensors that are not applied ----


def gemma_keys() -> list[str]:
    """Every key of llama.cpp's list, as it would stand in a gemma4 file."""

    def walk(node: type) -> list[str]:
        values = [v for k, v in vars(node).items() if not k.startswith("_")]
        return [v for v in values if isinstance(v, str)] + [key for v in values if isinstance(v, type) for key in walk(v)]

    keys = [key for key in walk(gguf.constants.Keys) if key.startswith("{arch}.") and "{dense}" not in key]
    return sorted({key.replace("{arch}", "gemma4") for key in keys})


def test_every_key_of_the_list_is_applied_harmless_or_refused(tmp_path: Path) -> None:
    table = families()["gemma4"]
    applied = {spec["key"] for spec in table["keys"].values()} | set(table["same"]) | {"gemma4.vocab_size"}
    keys = [k for k in gemma_keys() if k not in applied and not k.startswith(tuple(table["harmless"]["prefixes"]))]
    assert len(gemma_keys()) > 100 and len(keys) > 70
    path = rewrite(tmp_path / "m.gguf", set_keys={key: (F32, 7.5) for key in keys})
    found = survey(path)
    experts = [k for k in keys if k.startswith("gemma4.expert_")]
    for key in keys:  # of the experts one line is enough
        assert key in experts[1:] or any(f"metadata key {key} is 7.5" in problem for problem in found.problems), key
    assert found.plan is None and len(found.problems) >= len(keys) - len(experts) + 1


@pytest.mark.parametrize(
    ("key", "refuse", "accept"),
    [
        ("gemma4.rope.scaling.type", [(STRING, "yarn"), (STRING, "longrope")], [(STRING, "none"), (STRING, "linear")]),
        ("gemma4.rope.scaling.factor", [(F32, 4.0), (U32, 2)], [(F32, 1.0), (U32, 1), (F64, 0.0)]),
        ("gemma4.attention.scale", [(F32, 0.0625)], [(F32, 1.0)]),
        ("gemma4.attn_logit_softcapping", [(F32, 50.0)], [(F32, 0.0)]),
        ("gemma4.logit_scale", [(F32, 0.5)], [(F32, 1.0)]),
        ("gemma4.attention.causal", [(BOOL, False), (U8, 0)], [(BOOL, True), (U8, 1)]),
        ("gemma4.expert_used_count", [(U32, 8)], [(U32, 0)]),
        ("gemma4.vocab_size", [(U32, 500)], [(U32, 512), (I64, 512)]),
        ("gemma4.rope.dimension_sections", [(I32, [16, 24, 24])], []),
        ("gemma4.nobody.knows", [(U32, 0)], []),
        ("gemma4.vision.block_count", [], [(U32, 27)]),
        ("general.sampling.top_k", [], [(I32, 64)]),
        ("quantize.imatrix.file", [], [(STRING, "i.dat")]),
        ("tokenizer.ggml.add_space_prefix", [(BOOL, True)], [(BOOL, False), (U8, 0)]),
        ("tokenizer.ggml.add_eos_token", [(BOOL, True)], [(BOOL, False)]),
        ("tokenizer.ggml.remove_extra_whitespaces", [(BOOL, True)], [(BOOL, False)]),
        ("tokenizer.ggml.precompiled_charsmap", [(U8, [1, 2])], []),
        ("tokenizer.ggml.fim_pre_token_id", [], [(U32, 9)]),
        ("tokenizer.chat_template.tool_use", [], [(STRING, "{{")]),
    ],
)
def test_keys_that_change_the_computation(tmp_path: Path, key: str, refuse: list, accept: list) -> None:
    for value in refuse:
        with pytest.raises(KilnError, match=f"metadata key {re.escape(key)} "):
            read_plan(rewrite(tmp_path / "m.gguf", set_keys={key: value}))
    for value in accept:
        assert read_plan(rewrite(tmp_path / "m.gguf", set_keys={key: value})).config == from_gguf(open_gguf(WIDE))


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q.bias", "blk.1.attn_sinks.weight", "blk.0.ffn_gate_inp.weight", "output.bias", "blk.2.attn_q.scale",
     "blk.9.attn_q.weight", "token_types.weight", "per_layer_token_embd.weight", "cls.output.weight"],
)  # fmt: skip
def test_tensors_that_change_the_computation(tmp_path: Path, name: str) -> None:
    path = rewrite(tmp_path / "m.gguf", set_tensors={name: ((32,), "F32", np.zeros(32, np.float32))})
    refused(path, f"tensor {re.escape(name)} is not part of a gemma4 model")


def test_every_problem_is_shown_and_the_rest_too(tmp_path: Path) -> None:
    tensors = {f"blk.{i}.ffn_gate.weight": ((512, 256), "IQ2_S", np.zeros(512 * 82, np.uint8)) for i in range(3)}
    tensors |= {"blk.0.ffn_up.weight": ((512, 256), "IQ3_S", np.zeros(512 * 110, np.uint8))}
    tensors |= {"blk.1.attn_q.bias": ((256,), "F32", np.zeros(256, np.float32))}
    path = rewrite(tmp_path / "m.gguf", set_tensors=tensors, set_keys={"tokenizer.ggml.add_eos_token": (BOOL, True)})
    result = inspect(path)
    assert result.exit_code == 1
    assert "gemma4-tiny-dense-wide (gemma4), 6 layers (4 sliding)" in result.stdout and "3 IQ2_S" in result.stdout
    expected = (
        "blk.0.ffn_gate.weight has the unsupported type IQ2_S and 2 more of this type",
        "without IQ2_S tensors",
        "blk.0.ffn_up.weight has the unsupported type IQ3_S",
        "blk.1.attn_q.bias is not part",
        "add_eos_token is True",
    )
    for words in expected:
        assert len([line for line in result.stderr.splitlines() if words in line]) == 1, words
    record = json.loads(inspect(path, "--json").stdout)
    assert len(record["problems"]) == 4 and record["config"]["hidden_size"] == 256
    with pytest.raises(Problems, match="1 of 4 problems; kiln inspect .*m.gguf shows all"):
        read_plan(path)


@pytest.mark.parametrize("kind", sorted(t.name for t in GGMLQuantizationType if t.name not in (*LAYOUTS, "F32", "F16", "BF16")))
def test_types_that_cannot_be_loaded_are_named(tmp_path: Path, kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    changed = {"blk.1.ffn_up.weight": ((512, 256), kind, np.zeros(512 * 256 // block * size, np.uint8))}
    found = survey(rewrite(tmp_path / "m.gguf", set_tensors=changed))
    assert found.config and found.tokenizer and len(found.problems) == 1
    assert f"blk.1.ffn_up.weight has the unsupported type {kind};" in found.problems[0] and "download a " in found.problems[0]


def test_mxfp4_rows_of_an_odd_number_of_blocks_are_named(tmp_path: Path) -> None:
    changed = {}
    for i in range(6):
        changed |= {f"blk.{i}.ffn_{name}.weight": ((480, 256), "F32", np.zeros(480 * 1024, np.uint8)) for name in ("gate", "up")}
        changed |= {f"blk.{i}.ffn_down.weight": ((256, 480), "F32", np.zeros(480 * 1024, np.uint8))}
    changed["blk.2.ffn_down.weight"] = ((256, 480), "MXFP4", np.zeros(256 * 15 * 17, np.uint8))
    found = survey(rewrite(tmp_path / "m.gguf", set_tensors=changed, set_keys={"gemma4.feed_forward_length": (U32, 480)}))
    assert len(found.problems) == 1
    assert "blk.2.ffn_down.weight has rows of 480 elements; 2 MXFP4 blocks are packed as one, so that 64 must divide" in found.problems[0]


# ---- the same fact in another form ----

PATTERN = [True, True, False] * 2


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("gemma4.block_count", [(U8, 6), (I64, 6), (F32, 6.0), (F64, 6.0), (U32, [6])]),
        ("gemma4.embedding_length", [(U64, 256), (F32, 256.0), (I32, [256]), (I32, [256] * 6)]),
        ("gemma4.attention.head_count", [(F32, 4.0), (I32, [4]), (I64, [4] * 6), (F32, [4.0] * 6)]),
        ("gemma4.attention.head_count_kv", [(U8, [2, 2, 1] * 2), (F32, [2.0, 2.0, 1.0] * 2)]),
        ("gemma4.attention.key_length", [(F32, 128.0), (I32, [128] * 6)]),
        ("gemma4.attention.value_length_swa", [(F32, 64.0), (U32, [64])]),
        ("gemma4.attention.sliding_window_pattern", [(U8, list(map(int, PATTERN))), (I32, list(map(int, PATTERN))), (U32, 3), (F32, 3.0)]),
        ("gemma4.rope.freq_base", [(F64, 1e6), (U32, 1000000), (F32, [1e6])]),
        ("gemma4.final_logit_softcapping", [(U32, 30), (F64, 30.0)]),
        ("gemma4.attention.shared_kv_layers", [(F32, 0.0), (U32, [0] * 6)]),
        ("general.alignment", [(U64, 32), (U8, 32)]),
    ],
)
def test_another_form_of_the_same_fact(tmp_path: Path, key: str, values: list) -> None:
    for value in values:
        config = read_plan(rewrite(tmp_path / "m.gguf", set_keys={key: value})).config
        assert config == from_gguf(open_gguf(WIDE)), value


def test_forms_that_say_nothing(tmp_path: Path) -> None:
    for key, value in {
        "gemma4.block_count": (STRING, "6"), "gemma4.embedding_length": (F32, 256.5), "gemma4.attention.key_length": (I32, [128, 64] * 3),
        "gemma4.attention.head_count": (BOOL, True), "gemma4.attention.sliding_window_pattern": (I32, [2] * 6),
        "gemma4.context_length": (I64, -1), "gemma4.attention.sliding_window": (U64, 1 << 60), "gemma4.rope.freq_base": (F32, float("inf")),
    }.items():  # fmt: skip
        with pytest.raises(KilnError, match=f"metadata key {key} is "):
            read_plan(rewrite(tmp_path / "m.gguf", set_keys={key: value}))


def test_names_do_not_steer_a_terminal(tmp_path: Path) -> None:
    name = "blk.0.\x1b[2Jattn\n_q.bias\u202e"
    path = rewrite(tmp_path / "m.gguf", set_tensors={name: ((32,), "F32", np.zeros(32, np.float32))})
    refused(path, re.escape(r"tensor blk.0.\x1b[2Jattn\n_q.bias\u202e is not part"))
    result = inspect(rewrite(tmp_path / "n.gguf", set_keys={"general.name": (STRING, "a\x1b]0;b\r\nc")}))
    assert result.exit_code == 0 and r"a\x1b]0;b\r\nc (gemma4)" in result.stdout


def test_no_soft_cap_and_odd_names(tmp_path: Path) -> None:
    config = read_plan(rewrite(tmp_path / "m.gguf", set_keys={"gemma4.final_logit_softcapping": (F32, 0.0)})).config
    assert config.final_logit_softcapping == 0
    for name in ((U32, 7), (STRING, "  ")):
        assert read_plan(rewrite(tmp_path / "m.gguf", set_keys={"general.name": name})).config.name == "m"
    for value in ((I32, 7), (U8, [7]), (F32, [7.0, 7.0])):
        config = read_plan(rewrite(tmp_path / "m.gguf", set_keys={"tokenizer.ggml.suppress_tokens": value})).config
        assert config.suppress_tokens == (7,)


# ---- numbers that are not finite ----


def broken(path: Path, source: Path, name: str, row: int, value: float = float("nan")) -> Path:
    """A copy of `source` whose tensor `name` has one scale (or value) in row `row` that is not finite."""
    file = open_gguf(source)
    info, raw = file.tensors[name], file.data(name).copy()
    if len(info.shape) == 1:
        raw = raw.reshape(info.shape[0], -1)
    if info.type in LAYOUTS:
        layout = LAYOUTS[info.type]
        at = (info.shape[1] // layout.block - 1) * layout.block_bytes + layout.half_fields[-1]
        raw[row, at : at + 2] = np.array([value], np.float16).view(np.uint8)
    elif info.type == "F32":
        raw[row, -4:] = np.array([value], np.float32).view(np.uint8)
    else:
        raw[row, -2:] = np.array([0x7FC0], np.uint16).view(np.uint8)
    return rewrite(path, source, set_tensors={name: (info.shape, info.type, raw)})


@pytest.mark.parametrize(
    ("source", "name", "row"),
    [
        ("gemma4-tiny-dense-wide-Q4_K_M", "token_embd.weight", 17),  # Q6_K
        ("gemma4-tiny-dense-wide-Q4_K_M", "blk.4.attn_k.weight", 127),
        ("gemma4-tiny-dense-wide-Q5_K_M", "blk.0.ffn_up.weight", 0),
        ("gemma4-tiny-dense-wide-Q4_0", "blk.2.ffn_down.weight", 5),
        ("gemma4-tiny-dense-wide-Q8_0", "token_embd.weight", 511),
        ("gemma4-tiny-dense-wide-Q8_0", "blk.3.attn_q_norm.weight", 3),
        ("gemma4-tiny-dense", "token_embd.weight", 9),  # F32
    ],
)
def test_numbers_that_are_not_finite(tmp_path: Path, source: str, name: str, row: int) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        path = broken(tmp_path / "m.gguf", FIXTURES / f"{source}.gguf", name, row, value)
        where = f"tensor {name}, {'element' if 'norm' in name else 'row'} {row}: .* not finite"
        with pytest.raises(KilnError, match=where):
            read_plan(path, ReadOptions(scan=True))
        with pytest.raises(KilnError, match=where):
            write_weights(tmp_path / "w", read_plan(path))
        assert not (tmp_path / "w").exists()
    write_weights(tmp_path / "w", read_plan(path), allow_nonfinite=True)
    assert any(not t.isfinite().all() for t in load_weights(tmp_path / "w").values() if t.is_floating_point())


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_float_matrices_that_are_not_finite(tmp_path: Path, kind: str) -> None:
    raw = np.zeros((512, 256), np.uint16)
    raw[77, 3] = {"BF16": 0xFF80, "F16": 0xFC00}[kind]  # minus infinity
    path = rewrite(tmp_path / "m.gguf", set_tensors={"blk.1.ffn_up.weight": ((512, 256), kind, raw)})
    for read in (lambda: read_plan(path, ReadOptions(scan=True)), lambda: write_weights(tmp_path / "w", read_plan(path))):
        with pytest.raises(KilnError, match="blk.1.ffn_up.weight, row 77: a value is not finite"):
            read()


def test_numbers_that_are_not_finite_are_refused_by_every_command(tmp_path: Path) -> None:
    path = broken(tmp_path / "m.gguf", WIDE, "token_embd.weight", 17)
    refused(path, "tensor token_embd.weight, row 17: .*--allow-nonfinite")
    assert export(path, tmp_path / "out", "--dry-run", "--allow-nonfinite").exit_code == 0
    assert inspect(path, "--no-scan").exit_code == 0


# ---- one reading ----


def test_an_export_reads_each_list_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, decoded = [], []
    parse, decode = reader._Part.__init__, reader._Part.decode
    monkeypatch.setattr(reader._Part, "__init__", lambda self, path, i: (opened.append(path), parse(self, path, i))[1])
    monkeypatch.setattr(reader._Part, "decode", lambda self, key: (decoded.append(key), decode(self, key))[1])
    assert export(WIDE, tmp_path / "out", "--dry-run").exit_code == 0
    assert opened == [WIDE]
    lists = ("tokens", "merges", "token_type")
    assert [decoded.count(f"tokenizer.ggml.{name}") for name in lists] == [1, 1, 1]
    assert decoded.count("tokenizer.ggml.scores") == 0  # stays raw


# ---- shells and locales ----


def test_output_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "模型.gguf", set_keys={"general.name": (STRING, "Gemma – ä▁")})
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "exporter", "inspect", str(path)]
    result = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert "Gemma – ä▁ (gemma4)" in result.stdout.decode()


def test_files_are_refused_and_shown_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    (tmp_path / "bad.gguf").write_bytes(b"PK\x03\x04")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[3]}"}
    for arguments, code in ((("inspect", WIDE), 0), (("export", "--gguf", tmp_path / "bad.gguf", "--out", tmp_path / "out"), 1)):
        command = [sys.executable, "-m", "exporter", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert result.returncode == code, result


def test_a_tilde_and_odd_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(WIDE.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inspect(Path("~/m.gguf")).exit_code == 0
    assert export(Path("~/m.gguf"), Path("~/out"), "--dry-run").exit_code == 0
    result = inspect(Path("~nobody-at-all/m.gguf"))
    assert result.exit_code == 1 and "no such file" in result.stderr
