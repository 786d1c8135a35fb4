"""Weight planning and the streaming weights file: every constant against the GGUF bytes and the gguf package."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from kiln.custom_ops.weights.layouts import LAYOUTS, dequantize, unpack
from kiln.exporter.artifact import weights
from kiln.exporter.artifact.load import load_weights
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.errors import KilnError
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import GGUFFile, open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.source.weights import WeightPlan, constants, weight_bytes
from kiln.exporter.tools.synth import write_synthetic
from tests.gguf_files import FIXTURES, WIDE, draft_tensors, rewrite

MODELS = sorted(p for p in FIXTURES.glob("*.gguf") if "vocab" not in p.name and "assistant" not in p.name)  # a drafter is no model


Written = tuple[GGUFFile, tuple[WeightPlan, ...], list[dict], dict[str, torch.Tensor]]


def written(directory: Path, path: Path) -> Written:
    plan = read_plan(path)
    records = write_weights(directory / "weights.safetensors", plan)
    return plan.gguf, plan.weights, records, load_weights(directory / "weights.safetensors", records)


def oracle(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor as float32, by the gguf package."""
    info = file.tensors[name]
    return gguf.quants.dequantize(file.data(name), GGMLQuantizationType[info.type]).reshape(info.shape)


def check_against_oracle(file: GGUFFile, plan: Sequence[WeightPlan], tensors: dict[str, torch.Tensor]) -> None:
    for p in plan:
        expected = np.concatenate([oracle(file, s) for s in p.sources])
        if p.block_type in LAYOUTS:
            words, halves = tensors[f"{p.name}.words"], tensors[f"{p.name}.halves"]
            got = dequantize(p.block_type, words, halves).T.contiguous()
            raw = np.concatenate([file.data(s) for s in p.sources])
            np.testing.assert_array_equal(unpack(p.block_type, words.numpy(), halves.numpy()).reshape(raw.shape), raw, err_msg=p.name)
        else:
            got = tensors[f"{p.name}.weight"].float()
        assert tuple(got.shape) == ((p.N, p.K) if p.K else (p.N,))
        expected = np.ascontiguousarray(expected).reshape(got.shape)  # a stack of matrices is one
        np.testing.assert_array_equal(got.numpy().view(np.uint32), expected.view(np.uint32), err_msg=p.name)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_fixture_bit_exact(tmp_path: Path, path: Path) -> None:
    file, plan, _, tensors = written(tmp_path, path)
    check_against_oracle(file, plan, tensors)
    used = [s for p in plan for s in p.sources]
    beside = [*({"rope_freqs.weight"} & set(file.tensors)), *draft_tensors(from_gguf(file), file)]
    assert sorted([*used, *beside]) == sorted(file.tensors)  # each tensor is in exactly one weight


def test_slabs_and_chunks_do_not_change_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (WIDE, FIXTURES / "gemma4-tiny-dense.gguf"):
        plan = read_plan(path)
        whole = write_weights(tmp_path / "a", plan)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "SLAB_BYTES", 40_000)
            patch.setattr(weights, "CHUNK_ROWS", 96)
            patch.setattr(weights, "CHUNK_BYTES", 1)
            pieces: dict[str, int] = {}
            sliced = write_weights(tmp_path / "b", plan, lambda n, _d, _t, p=pieces: p.update({n: p.get(n, 0) + 1}))
        assert max(pieces.values()) > 1
        assert sliced == whole
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_file_format(tmp_path: Path) -> None:
    """Against docs/ARTIFACT.md, without the safetensors library."""
    plan = read_plan(FIXTURES / "gemma4-tiny-dense-wide-Q5_K_M.gguf")
    path = tmp_path / "weights.safetensors"
    seen: list[tuple[str, int, int]] = []
    records = write_weights(path, plan, lambda *call: seen.append(call))
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 256 == 0 and len(data) % 256 == 0
    at = 0
    for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
        assert entry["data_offsets"][0] == at  # back to back
        at = entry["data_offsets"][1]
    assert 8 + length + at == len(data)
    specs = constants(plan.config, plan.weights)
    planned = [(s.name, s.dtype, s.shape, s.nbytes) for s in specs]
    assert [(r["name"], r["dtype"], tuple(r["shape"]), r["bytes"]) for r in records] == planned
    for record in records:
        assert record["offset"] % 256 == 0
        assert record["offset"] == 8 + length + header[record["name"]]["data_offsets"][0]
        assert hashlib.sha256(data[record["offset"] : record["offset"] + record["bytes"]]).hexdigest() == record["sha256"]
    fillers = {name: entry for name, entry in header.items() if name not in {s.name for s in specs}}
    assert fillers and all(name.startswith("__pad.") and entry["dtype"] == "U8" for name, entry in fillers.items())
    total = weight_bytes(plan.config, plan.weights)
    assert sum(r["bytes"] for r in records) == total and seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def names(plan: Sequence[WeightPlan], prefix: str) -> dict[str, tuple[str, int, int]]:
    return {p.name.removeprefix(prefix): (p.block_type, p.N, p.K) for p in plan if p.name.startswith(prefix) and p.K}


def test_fusion(tmp_path: Path) -> None:
    plan = read_plan(WIDE).weights
    common = {"attn_output": ("Q4_K", 256, 256), "ffn_gate_up": ("Q4_K", 1024, 256), "ffn_down": ("Q4_K", 256, 512)}
    assert names(plan, "blk.0.") == {"attn_qkv": ("Q4_K", 512, 256), **common}
    assert names(plan, "blk.3.") == {"attn_qk": ("Q4_K", 384, 256), "attn_v": ("Q6_K", 128, 256), **common}
    no_v = {**common, "attn_output": ("Q4_K", 256, 512), "ffn_down": ("Q6_K", 256, 512)}
    assert names(plan, "blk.2.") == {"attn_qk": ("Q4_K", 640, 256), **no_v}
    assert names(plan, "token_embd") == {"": ("Q6_K", 512, 256)}
    norm = next(p for p in plan if p.name == "blk.0.attn_norm")
    assert (norm.block_type, norm.N, norm.K, norm.sources) == ("F32", 256, 0, ("blk.0.attn_norm.weight",))

    q8 = open_gguf(FIXTURES / "gemma4-tiny-dense-wide-Q8_0.gguf")
    changed = {n: (q8.tensors[n].shape, "Q8_0", q8.data(n)) for n in ("blk.0.attn_k.weight", "blk.0.ffn_up.weight")}
    file, plan, _, tensors = written(tmp_path, rewrite(tmp_path / "m.gguf", set_tensors=changed))
    assert list(names(plan, "blk.0.")) == ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    check_against_oracle(file, plan, tensors)


def test_fused_tensor_in_the_file(tmp_path: Path) -> None:
    source = open_gguf(WIDE)
    parts = [f"blk.0.attn_{x}.weight" for x in "qkv"]
    fused = ((512, 256), "Q4_K", np.concatenate([source.data(n) for n in parts]))
    path = rewrite(tmp_path / "m.gguf", drop=parts, set_tensors={"blk.0.attn_qkv.weight": fused})
    _, plan, records, _ = written(tmp_path, path)
    assert next(p for p in plan if p.name == "blk.0.attn_qkv").sources == ("blk.0.attn_qkv.weight",)
    (tmp_path / "n").mkdir()
    _, _, separate, _ = written(tmp_path / "n", WIDE)
    assert {r["name"]: r["sha256"] for r in records} == {r["name"]: r["sha256"] for r in separate}


def test_float_types_and_untied_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((512, 256)).astype(np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
    norm = rng.standard_normal(256).astype(np.float32)
    changed = {
        "output.weight": ((512, 256), "BF16", bf16),
        "blk.0.ffn_gate.weight": ((512, 256), "F16", values.astype(np.float16)),
        "blk.0.ffn_up.weight": ((512, 256), "F16", values[::-1].astype(np.float16)),
        "blk.0.attn_norm.weight": ((256,), "F16", norm.astype(np.float16)),
        "blk.0.ffn_norm.weight": ((256,), "BF16", (norm.view(np.uint32) >> 16).astype(np.uint16)),
    }
    file, plan, _, tensors = written(tmp_path, rewrite(tmp_path / "m.gguf", set_tensors=changed))
    check_against_oracle(file, plan, tensors)
    assert tensors["output.weight"].dtype == torch.bfloat16
    assert tensors["blk.0.ffn_gate_up.weight"].dtype == torch.float16 and tensors["blk.0.ffn_gate_up.weight"].shape == (1024, 256)
    assert tensors["blk.0.attn_norm.weight"].dtype == tensors["blk.0.ffn_norm.weight"].dtype == torch.float32


def test_derived_constants(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "m.gguf", set_keys={"tokenizer.ggml.suppress_tokens": (GGUFValueType.INT32, [7, 500])})
    file, _, _, tensors = written(tmp_path, path)
    full, sliding = tensors["rope_inv_freq_full"], tensors["rope_inv_freq_sliding"]
    assert (full.dtype, full.shape, sliding.shape) == (torch.float32, (64,), (32,))
    divisor = oracle(file, "rope_freqs.weight")
    rotated = divisor == 1
    assert 0 < rotated.sum() < 64 and (divisor[~rotated] == np.float32(1e30)).all()
    for d in range(64):
        assert full[d].item() == (np.float32(1e6 ** (-2 * d / 128)) if rotated[d] else 0.0)
    for d in range(32):
        assert sliding[d].item() == np.float32(1e4 ** (-2 * d / 64))
    assert tensors["suppress_tokens"].dtype == torch.int64 and tensors["suppress_tokens"].tolist() == [7, 500]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("divisor", "told"), [(0, "has values that are not positive"), (1e-42, "makes frequencies beyond float32")])
def test_bad_rope_freqs(tmp_path: Path, divisor: float, told: str) -> None:
    changed = {"rope_freqs.weight": ((64,), "F32", np.full(64, divisor, np.float32))}
    with pytest.raises(KilnError, match=f"rope_freqs.weight {told}"):
        read_plan(rewrite(tmp_path / "m.gguf", set_tensors=changed))


@pytest.mark.filterwarnings("error")
def test_a_rotary_base_that_is_too_small(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "m.gguf", set_keys={"gemma4.rope.freq_base_swa": (GGUFValueType.FLOAT32, 1e-44)})
    with pytest.raises(KilnError, match="a rotary base of 9.8.*e-45 with a factor of 1 makes frequencies beyond float32"):
        read_plan(path)


def test_failure_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    plan = read_plan(WIDE)
    (tmp_path / "w").write_bytes(b"earlier")

    def stop(name: str, _done: int, _total: int) -> None:
        if name.startswith("blk.1."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_weights(tmp_path / "w", plan, stop)
    assert [p.name for p in tmp_path.iterdir()] == ["w"] and (tmp_path / "w").read_bytes() == b"earlier"
    with pytest.raises(KilnError, match="absent/w: cannot write the weights: No such file"):
        write_weights(tmp_path / "absent" / "w", plan)


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(WIDE)
    usage = weights.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(KilnError, match="GiB are needed for the weights, 0.0 GiB are free"):
        write_weights(tmp_path / "w", plan)


def test_loading_checks_the_records(tmp_path: Path) -> None:
    _, _, records, _ = written(tmp_path, WIDE)
    path = tmp_path / "weights.safetensors"
    with pytest.raises(KilnError, match="token_embd.words is int32 .* expected int64"):
        load_weights(path, [{**records[0], "dtype": "int64"}])
    with pytest.raises(KilnError, match="constant nothing is missing"):
        load_weights(path, [{**records[0], "name": "nothing"}])
    with pytest.raises(KilnError, match="is not in the manifest"):
        load_weights(path, records[1:])


MEMORY = """
import sys
from pathlib import Path
from kiln.exporter.source.plan import read_plan
from kiln.exporter.source.weights import weight_bytes
from kiln.exporter.artifact import weights
plan = read_plan(sys.argv[1])
weights.SLAB_BYTES = 8 << 20

def peak():  # KiB; ru_maxrss would start from the parent's
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

before = peak()
weights.write_weights(sys.argv[2], plan)
print(weight_bytes(plan.config, plan.weights) >> 20, peak() - before >> 10)
"""


def test_memory_is_bounded_by_the_slab(tmp_path: Path) -> None:
    """Neither the input's mapped pages nor the output stay in memory: the peak grows by slabs and chunks, not by the file."""
    write_synthetic(tmp_path / "m.gguf", "tiny-cuda", "q8_0")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m.gguf"), str(tmp_path / "w")]
    total, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert total > 200
    assert grown < 120, f"{grown} MiB for a file of {total} MiB"
