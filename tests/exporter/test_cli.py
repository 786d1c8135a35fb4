"""Bad input to `kiln export`: one clear line, exit code 1 or 2, nothing half-written. And the dry run of the 31B."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kiln.exporter import build
from kiln.exporter.artifact.memory import memory_plan
from kiln.exporter.cli import main
from kiln.exporter.compiler.trace import lower
from kiln.exporter.errors import KilnError
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.synth import write_synthetic
from tests.conftest import kiln, with_peak_memory
from tests.gguf_files import rewrite
from tests.timeline import FIXTURES

TINY = FIXTURES / "gemma4-tiny-dense.gguf"


def fails(tmp_path: Path, *arguments, match: str, code: int = 1) -> None:
    out = tmp_path / "out" / "artifact"
    result = kiln("export", "--out", out, *arguments, check=False)
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if "rror" in line]
    assert len(lines) == 1 and match in lines[0], result.stderr
    assert not out.parent.exists() or not list(out.parent.iterdir()), "something was left behind"


def edited(tmp_path: Path, old: bytes, new: bytes, source: Path = TINY) -> Path:
    """A copy of the fixture with one byte string replaced by another of the same length."""
    assert len(old) == len(new)
    data = source.read_bytes()
    assert old in data
    path = tmp_path / "edited.gguf"
    path.write_bytes(data.replace(old, new, 1))
    return path


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


@pytest.mark.parametrize("target", ["cpu"])
class TestBadModelFiles:
    def test_missing_file(self, tmp_path, target):
        fails(tmp_path, "--gguf", tmp_path / "none.gguf", "--target", target, match="none.gguf")

    def test_truncated(self, tmp_path, target):
        path = tmp_path / "cut.gguf"
        path.write_bytes(TINY.read_bytes()[:-1000])
        fails(tmp_path, "--gguf", path, "--target", target, match="cut.gguf")

    def test_wrong_magic(self, tmp_path, target):
        fails(tmp_path, "--gguf", edited(tmp_path, b"GGUF", b"GGML"), "--target", target, match="GGUF")

    def test_unknown_architecture(self, tmp_path, target):
        path = edited(
            tmp_path,
            key("general.architecture") + struct.pack("<I", 8) + key("gemma4"),
            key("general.architecture") + struct.pack("<I", 8) + key("gemmaX"),
        )
        fails(tmp_path, "--gguf", path, "--target", target, match="gemmaX")

    def test_missing_tensor(self, tmp_path, target):
        path = edited(tmp_path, key("blk.3.attn_q.weight"), key("blk.3.attn_Q.weight"))
        fails(tmp_path, "--gguf", path, "--target", target, match="blk.3.attn_q.weight")

    def test_unsupported_type(self, tmp_path, target):
        wide = FIXTURES / "gemma4-tiny-dense-wide-Q4_0.gguf"
        head = key("blk.1.ffn_up.weight") + struct.pack("<IQQ", 2, 256, 512)
        path = edited(tmp_path, head + struct.pack("<I", 2), head + struct.pack("<I", 40), wide)  # Q4_0 -> NVFP4, of the same size
        fails(tmp_path, "--gguf", path, "--target", target, match="NVFP4")

    def test_wrong_shape(self, tmp_path, target):
        head = key("blk.1.ffn_up.weight")
        path = edited(tmp_path, head + struct.pack("<IQQ", 2, 128, 320), head + struct.pack("<IQQ", 2, 320, 128))
        fails(tmp_path, "--gguf", path, "--target", target, match="blk.1.ffn_up.weight")


def test_bad_options(tmp_path):
    fails(tmp_path, "--gguf", TINY, "--target", "sm_75", match="sm_75")
    fails(tmp_path, "--gguf", TINY, "--target", "cpu", "--max-seq-len", 1 << 20, match="context")
    fails(tmp_path, "--gguf", TINY, "--target", "cpu", "--max-seq-len", 3, match="max-seq-len", code=2)
    fails(tmp_path, "--target", "cpu", match="--gguf", code=2)


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ((), "float32"),
        (("--kv-cache", "bf16"), "float32"),  # where activations have 32 bits, so have keys and values
        (("--activation-dtype", "bfloat16"), "float16"),
        (("--kv-cache", "bf16", "--activation-dtype", "bfloat16"), "bfloat16"),
        (("--no-turboquant",), "float32"),
        (("--kv-cache", "tq4"), "TQ4"),
        (("--turboquant",), "TQ4"),
        (("--kv-cache", "tq4", "--turboquant"), "TQ4"),
    ],
)
def test_kv_cache(tmp_path, options, cache):
    arguments = ["export", "--gguf", str(TINY), "--out", str(tmp_path / "out"), "--target", "cpu", "--dry-run", *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    line = next(line for line in result.stdout.splitlines() if line.startswith("KV global"))
    assert line.endswith(f"({cache})"), line


def test_keys_that_do_not_fit_float16(tmp_path):
    """Where 16 bits are asked for: a norm's weight times the root of the head size may be too large, a little less is not."""
    head_dim = min(layer.mixer.head_dim for layer in from_gguf(open_gguf(TINY)).layers)

    def export(weight, *options):
        norm = np.ones(head_dim, np.float32)
        norm[1] = -weight
        path = rewrite(tmp_path / "m.gguf", TINY, set_tensors={"blk.0.attn_k_norm.weight": ((head_dim,), "F32", norm)})
        arguments = ["export", "--gguf", str(path), "--out", str(tmp_path / "out"), "--target", "cpu", "--dry-run", *options]
        return CliRunner().invoke(main, arguments)

    large, activations = 65504 / head_dim**0.5 * 1.01, ("--activation-dtype", "bfloat16")
    for options in (activations, (*activations, "--turboquant")):
        result = export(large, *options)
        assert result.exit_code == 1 and "attn_k_norm.weight: keys or queries up to 6.62e+04 do not fit float16" in result.stderr
    assert export(1.0, *activations).exit_code == 0
    assert export(large, *activations, "--kv-cache", "bf16").exit_code == export(large).exit_code == 0  # bfloat16, float32


def test_shapes_that_no_kernel_takes_are_refused_before_anything_is_compiled(tmp_path):
    plan = read_plan(FIXTURES / "gemma4-tiny-dense-wide-Q4_K_M.gguf")

    def spec(target, head_dim=None, layers=None, **options):
        kept = plan.config.layers[:layers]
        if head_dim:
            ropes = (dataclasses.replace(x.mixer.rope, size=head_dim) for x in kept)
            mixers = (dataclasses.replace(x.mixer, head_dim=head_dim, rope=rope) for x, rope in zip(kept, ropes, strict=True))
            kept = tuple(dataclasses.replace(x, mixer=mixer) for x, mixer in zip(kept, mixers, strict=True))
        changed = dataclasses.replace(plan, config=dataclasses.replace(plan.config, layers=kept))
        return build.graph_spec(build.ExportOptions(TINY, tmp_path, **options), changed, (target,))

    with pytest.raises(KilnError, match="head dimension 96; expected 64, 128, 256 or 512"):
        spec("cpu", 96, turboquant=True)
    with pytest.raises(KilnError, match="cache.k_ring: head dimension 96; the GPU kernels take powers of two"):
        spec("sm_90", 96)
    with pytest.raises(KilnError, match="has no global layers, whose caches TQ4 is for"):
        spec("cpu", layers=2, turboquant=True)
    assert spec("cpu", 96).options.kv_len and spec("sm_90", turboquant=True)
    assert not spec("cpu", layers=2).options.kv_len


def test_a_model_without_global_layers(tmp_path):
    write_synthetic(tmp_path / "m.gguf", "tiny", "q8_0", 0, layers=2)
    spec = build.graph_spec(build.ExportOptions(TINY, tmp_path), read_plan(tmp_path / "m.gguf"), ("cpu",))
    assert {b.kind for b in lower(spec, "decode", "cpu").kv} == {"ring"}


def test_a_per_layer_embedding_that_is_not_there(tmp_path):
    fails(tmp_path, "--gguf", TINY, "--ple", "host", match="--ple host: gemma4-tiny-dense has no per-layer embedding; leave it away")


def test_kv_cache_options_that_contradict(tmp_path):
    fails(tmp_path, "--gguf", TINY, "--kv-cache", "bf16", "--turboquant", match="--kv-cache bf16 and --turboquant contradict", code=2)
    fails(tmp_path, "--gguf", TINY, "--kv-cache", "tq4", "--no-turboquant", match="--kv-cache tq4 and --no-turboquant contradict", code=2)
    fails(tmp_path, "--gguf", TINY, "--kv-cache", "fp8", match="'fp8' is not one of 'f16', 'bf16', 'tq4'", code=2)


@pytest.mark.parametrize(
    ("options", "newest"),
    [
        ((), ""),
        (("--turboquant",), " and the newest 256 of the global layers"),
        (("--kv-cache", "tq4", "--residual-length", "64"), " and the newest 64 of the global layers"),
    ],
)
def test_residual_length(tmp_path, options, newest):
    arguments = ["export", "--gguf", str(TINY), "--out", str(tmp_path / "out"), "--target", "cpu", "--dry-run", *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    line = next(line for line in result.stdout.splitlines() if line.startswith("KV ring"))
    assert line.endswith(f"(sliding layers{newest}, float32)"), line


def test_the_plan_counts_the_exact_window():
    """Keys and values of the newest positions of every global layer, in float32 on a CPU, among the rings."""
    plans = {}
    for turboquant in (False, True):
        options = build.ExportOptions(TINY, Path(), turboquant=turboquant, residual_length=64)
        spec = build.graph_spec(options, read_plan(TINY), ("cpu",))
        plans[turboquant] = memory_plan(spec)
    elements = sum(mixer.kv_dim for mixer in spec.config.attentions.values() if mixer.window is None)
    assert elements and plans[True].kv_ring == plans[False].kv_ring + 2 * 64 * elements * 4


def test_residual_lengths_that_do_not_go(tmp_path):
    alone = "--residual-length is part of the TQ4 cache; give --kv-cache tq4 with it"
    for options in ((), ("--kv-cache", "f16"), ("--no-turboquant",)):
        fails(tmp_path, "--gguf", TINY, *options, "--residual-length", "64", match=alone, code=2)
    odd = "--residual-length 100 is not a multiple of 32"
    fails(tmp_path, "--gguf", TINY, "--turboquant", "--residual-length", "100", match=odd, code=2)
    for length in ("0", "31", "-32"):
        fails(tmp_path, "--gguf", TINY, "--turboquant", "--residual-length", length, match="is not in the range x>=32", code=2)
    with pytest.raises(KilnError, match="--residual-length 100: give a multiple of 32, at least 32"):
        build.graph_spec(build.ExportOptions(TINY, tmp_path, turboquant=True, residual_length=100), read_plan(TINY), ("cpu",))


@pytest.mark.parametrize(("flag", "center"), [((), True), (("--key-center",), True), (("--no-key-center",), False)])
def test_key_center(monkeypatch, tmp_path, flag, center):
    """On with TQ4 unless it is switched off; without TQ4 the switch is refused."""
    found = []
    monkeypatch.setattr(build, "export_artifact", lambda options, *_: found.append(options))
    arguments = ["export", "--gguf", str(TINY), "--out", str(tmp_path / "out"), "--target", "cpu", "--dry-run", "--turboquant", *flag]
    CliRunner().invoke(main, arguments, catch_exceptions=False)
    spec = build.graph_spec(found[0], read_plan(TINY), ("cpu",))
    assert spec.options.key_center == center
    assert any(b.name.endswith("k_center") for b in kv_plan(spec.config, 64, spec.cache_dtype, spec.options)) == center
    if flag:
        fails(tmp_path, "--gguf", TINY, *flag, match=f"{flag[0]} is part of the TQ4 cache; give --kv-cache tq4 with it", code=2)


def test_an_existing_artifact_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("mine")
    result = kiln("export", "--gguf", TINY, "--out", tmp_path / "out", "--target", "cpu", check=False)
    assert result.returncode == 1 and "--force" in result.stderr
    assert (tmp_path / "out" / "keep").read_text() == "mine"


def test_the_cpu_target_goes_alone(tmp_path):
    fails(tmp_path, "--gguf", TINY, "--target", "sm_90", "--target", "cpu", "--turboquant", match="cpu")


def test_steps_of_several_tokens_are_refused_where_nothing_computes_them(tmp_path):
    rows = ("--decode-rows", "1,2", "--rows", "2")
    gpu = ("--target", "sm_90", *rows, "--dry-run")
    fails(tmp_path, "--gguf", TINY, *gpu, match="has no quantized weights, which a GPU's steps of several tokens multiply")
    hybrid = FIXTURES / "qwen35-tiny-mtp.gguf"
    fails(tmp_path, "--gguf", hybrid, "--target", "cpu", *rows, match="has layers with a state, which takes one token after the other")


@pytest.mark.nightly  # its scales are 17 GiB apart, and all are looked at
def test_dry_run_of_the_31b(tmp_path):
    path = tmp_path / "31b.gguf"
    sparse_31b(path)
    options = ("--gguf", path, "--out", tmp_path / "out", "--max-seq-len", 131072, "--turboquant", "--target", "sm_90", "--dry-run")
    result, peak = with_peak_memory(tmp_path, sys.executable, "-m", "exporter", "export", *options)
    print(result.stdout, f"{peak / 2**20:.0f} MiB")
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "17.3" in lines["weights"] or "17.4" in lines["weights"]
    assert float(result.stdout.split("KV global")[1].split()[0]) == pytest.approx(2.52, abs=0.03)
    assert float(result.stdout.split("KV ring")[1].split()[0]) == pytest.approx(0.80, abs=0.01)  # 0.02 of it the exact window
    assert lines["blk.0.attn_qk"].split()[1] == "Q4_K" and lines["blk.0.attn_v"].split()[1] == "Q6_K"
    assert not (tmp_path / "out").exists()
    assert 100 << 20 < peak < 1 << 30  # PyTorch alone is several hundred MiB


def test_the_peak_is_the_childs_own(tmp_path):
    """Whatever this process or an earlier child had in memory."""
    ballast = bytearray(400 << 20)
    for i in range(0, len(ballast), 4096):
        ballast[i] = 1
    subprocess.run([sys.executable, "-SEc", "bytearray(b'x') * (500 << 20)"], check=True)
    _, small = with_peak_memory(tmp_path, sys.executable, "-SEc", "pass")
    _, large = with_peak_memory(tmp_path, sys.executable, "-SEc", "bytearray(b'x') * (200 << 20)")
    assert small < 50 << 20 and 200 << 20 < large < 250 << 20


def sparse_31b(path: Path) -> None:
    """A 31B Q4_K_M file whose tensor data is a hole: the plan reads shapes alone."""
    from kiln.exporter.tools.synth import write_synthetic

    write_synthetic(path, "gemma4-31b", "q4_k_m", 0, sparse=True)
