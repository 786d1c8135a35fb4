"""Models of gated delta rules and attention: what their files may say, their states in a session, TQ4 beside states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from kiln.custom_ops.delta.rule import STATE_SLOTS
from kiln.exporter import build
from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.artifact.memory import memory_plan
from kiln.exporter.artifact.show import text
from kiln.exporter.compiler.trace import lower, make_kv, runnable
from kiln.exporter.errors import KilnError
from kiln.exporter.measure import bench
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.model.records import Attention, DeltaNet
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.synth import write_synthetic
from tests.code_only import code_only
from tests.conftest import kiln
from tests.exporter.model.test_families import MODELS, model_file
from tests.gguf_files import rewrite
from tests.timeline import GREEDY, feed, graph_spec, weights, worst

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE, MOE = (next(m for m in MODELS if m.name == name) for name in ("qwen35-tiny-mtp", "qwen35moe-tiny-mtp"))
U32, I32, BOOL, STRING = (GGUFValueType[name] for name in ("UINT32", "INT32", "BOOL", "STRING"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hybrids")


@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda m: m.name)
def test_chunks_about_a_block(model, files: Path) -> None:
    """Of 64 tokens, and of 65, whose last block has one."""
    path = model_file(model, files)
    spec, state = graph_spec(path), weights(path, files)
    tokens, reference = model.reference(path)
    for size in (64, 65):
        decoder = spec.model()
        decoder.load_state_dict(state, strict=False)
        with torch.inference_mode():
            assert worst(feed(decoder, decoder, tokens, size), reference) <= model.tolerance


# ---- what a file may say ----


def test_layers_by_the_interval_and_by_the_list(files: Path, tmp_path: Path) -> None:
    """Older files have no list of layers. The last block is no layer: it drafts, and by the interval it would be recurrent."""
    path = model_file(DENSE, files)
    config = from_gguf(open_gguf(path))
    assert [type(layer.mixer) for layer in config.layers] == [DeltaNet] * 3 + [Attention] and config.draft_blocks == 1
    older = rewrite(tmp_path / "older.gguf", path, drop=["qwen35.attention.recurrent_layers"])
    assert from_gguf(open_gguf(older)) == config
    listed = {"qwen35.full_attention_interval": (U32, 2)}
    assert from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", path, set_keys=listed))).layers == config.layers  # the list counts
    skipped = read_plan(path).unused
    assert len(skipped) == 15 and all(name.startswith("blk.4.") for name in skipped) and "blk.4.nextn.eh_proj.weight" in skipped


@pytest.mark.parametrize(
    ("drop", "keys", "message"),
    [
        (["qwen35.attention.recurrent_layers", "qwen35.full_attention_interval"], {}, "recurrent_layers and .*interval are missing"),
        ([], {"qwen35.attention.recurrent_layers": (BOOL, [True, False])}, "recurrent_layers is .* it must be 5 booleans"),
        (["qwen35.nextn_predict_layers"], {}, "nextn.eh_proj.weight is not part of a qwen35 model"),
        ([], {"qwen35.nextn_predict_layers": (U32, 5)}, "nextn_predict_layers is 5 of 5 blocks: no layer is left"),
        ([], {"qwen35.rope.dimension_sections": (I32, [2, 1, 0, 0])}, "4 pairs turn, and it must name them all"),
        (["qwen35.rope.dimension_sections"], {"qwen35.rope.dimension_count": (U32, 64)}, "turns 64 of a head's 32 dimensions"),
        ([], {"qwen35.rope.scaling.type": (STRING, "yarn")}, "rope.scaling.type is 'yarn'"),
        ([], {"qwen35.ssm.inner_size": (U32, 63)}, "inner_size is 63, no multiple of 4 value heads"),
        ([], {"qwen35.ssm.group_count": (U32, 3)}, "4 value heads, no multiple of its 3 key heads"),
        ([], {"qwen35.ssm.state_size": (U32, 8)}, r"attn_qkv.weight has shape \[128, 48\], expected \[96, 48\]"),
        ([], {"qwen35.ssm.conv_kernel": (U32, 1)}, "conv_kernel is 1"),
        (["qwen35.attention.key_length"], {}, "key_length is missing"),
        ([], {"qwen35.expert_count": (U32, 8)}, "mixture-of-experts layers are not supported yet"),
    ],
)
def test_what_is_not_applied_is_named(drop: list, keys: dict, message: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(KilnError, match=message):
        read_plan(rewrite(tmp_path / "m.gguf", model_file(DENSE, files), drop=drop, set_keys=keys))


def test_a_shared_gate_of_either_shape(files: Path, tmp_path: Path) -> None:
    """[1, D] as converters write it, [D] as some files have it; the constant is the same."""
    path = model_file(MOE, files)
    gate = "blk.0.ffn_gate_inp_shexp.weight"
    values = np.frombuffer(open_gguf(path).data(gate).tobytes(), np.float32)
    flat = rewrite(tmp_path / "flat.gguf", path, set_tensors={gate: ((48,), "F32", values)})
    assert open_gguf(flat).tensors[gate].shape == (48,) and read_plan(flat).weights == read_plan(path).weights
    wrong = rewrite(tmp_path / "wrong.gguf", path, set_tensors={gate: ((2, 24), "F32", values)})
    with pytest.raises(KilnError, match=r"ffn_gate_inp_shexp.weight has shape \[2, 24\], expected \[1, 48\]"):
        read_plan(wrong)


def test_heads_that_no_kernel_takes_are_refused_for_a_gpu(files: Path) -> None:
    path = model_file(DENSE, files)
    with pytest.raises(KilnError, match="delta rule with heads of 16 and 16: .* powers of two from 32 to 256; give --target cpu"):
        build.graph_spec(build.ExportOptions(path, files / "out"), read_plan(path), ("sm_90",))


# ---- synthetic files and TQ4 ----


def test_a_synthetic_file_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """And with TQ4: its attention, whose heads turn in part and are gated, takes codes; the states stay float32."""
    path = tmp_path / "m.gguf"
    write_synthetic(path, "qwen35-moe-tiny", "q4_k_m")
    plan = read_plan(path)
    assert [type(layer.mixer).__name__ for layer in plan.config.layers] == ["DeltaNet"] * 3 + ["Attention"]
    assert plan.config.attentions[3].rope.size == 16 and plan.config.attentions[3].gated and plan.config.layers[0].ffn.shared_gated
    types = {p.name: p.block_type for p in plan.weights}
    assert types["blk.0.ssm_in_gates"] == types["blk.2.ssm_gates"] == "Q4_K"  # joined where they are of one type
    assert types["blk.2.ssm_in"] == "Q6_K" and types["blk.0.ssm_conv1d"] == "F32"
    with pytest.raises(KilnError, match="first attention in layer 4; ask for as many layers or more"):
        write_synthetic(tmp_path / "short.gguf", "qwen35-27b", "q4_k_m", layers=3)
    state = weights(path, tmp_path)
    tokens = torch.randint(0, 512, (80,), generator=torch.Generator().manual_seed(0))
    decoder = graph_spec(path).model()
    decoder.load_state_dict(state, strict=False)
    spec = graph_spec(path, turboquant=True, residual_length=32)
    with torch.no_grad():
        right = feed(decoder, decoder, tokens, 40)
        kv = make_kv(kv_plan(spec.config, spec.max_seq_len, spec.model_dtype, spec.options))
        prefill = runnable(lower(spec, "prefill", "cpu").program, state | kv)
        found = [prefill(piece, torch.arange(at, at + len(piece)), *GREEDY)[1][0] for at, piece in ((0, tokens[:32]), (32, tokens[32:]))]
        exact = feed(decoder, decoder, tokens[:32], 32)[31]
    assert 1 < right[79].std() < 10
    errors = [(x - y).abs().max().item() for x, y in zip(found, (exact, right[79]), strict=True)]
    print(f"max |dlogit|: 32 keys, all exact, {errors[0]:.2e}; 48 of 80 in four bits {errors[1]:.2e}")
    assert errors[0] < 1e-3 < errors[1] < 0.5  # of logits that reach 10


def test_memory_of_a_state(files: Path) -> None:
    """By hand: taps - 1 inputs and a matrix for each value head, twice, float32, whatever the context."""
    spec = graph_spec(model_file(DENSE, files), max_seq_len=64)
    state = 3 * STATE_SLOTS * 4 * (3 * 128 + 4 * 16 * 16)
    assert memory_plan(spec).kv_state == state == memory_plan(graph_spec(model_file(DENSE, files), max_seq_len=4096)).kv_state
    assert memory_plan(spec).kv_global == 2 * 64 * 32 * 4 and memory_plan(spec).kv_ring == 0
    kinds = {b.name: (b.kind, b.shape[0]) for b in kv_plan(spec.config, 64, torch.float16, spec.options)}
    assert kinds["blk.0.cache.conv_state"] == kinds["blk.2.cache.delta_state"] == ("state", STATE_SLOTS)
    assert kinds["blk.3.cache.k_cache"] == ("global", 64)


# ---- compiled and played ----


@pytest.fixture(scope="module")
def artifact(files: Path) -> Path:
    kiln("export", "--gguf", model_file(MOE, files), "--out", files / "out", "--target", "cpu", "--max-seq-len", 96, "--prefill-chunk", 96)
    return files / "out"


@pytest.fixture(scope="module")
def played(artifact: Path):
    runner = pytest.importorskip("kiln")
    return runner.Model(str(artifact), device="cpu", threads=1)


@pytest.fixture
def session(played):
    runner = pytest.importorskip("kiln")
    return runner.Session(played)


def logits(session, tokens: torch.Tensor) -> torch.Tensor:
    session.prefill(tokens.tolist())
    return torch.from_numpy(np.array(session.logits()))


def test_played_in_chunks_and_token_by_token(session, files: Path) -> None:
    tokens, reference = MOE.reference(model_file(MOE, files))
    for size in (80, 65, 64, 7, 1):
        session.reset()
        rows = {min(at + size, 80) - 1: logits(session, tokens[at : at + size]) for at in range(0, 80, size)}
        assert worst(rows, reference) <= MOE.tolerance, size


def test_its_file_plays_it_too(session, artifact: Path, files: Path, tmp_path: Path) -> None:
    """Among its tensors one whose two dimensions are a vector here: the taps of the convolution."""
    runner, gguf = pytest.importorskip("kiln"), model_file(MOE, files)
    code = code_only(artifact, gguf, tmp_path / "code")
    tokens, _ = MOE.reference(gguf)
    assert torch.equal(logits(runner.Session(runner.Model(str(code), device="cpu", weights=str(gguf))), tokens), logits(session, tokens))


def test_a_session_begins_without_the_last_one(session, files: Path) -> None:
    tokens, _ = MOE.reference(model_file(MOE, files))
    first = logits(session, tokens[:20])
    logits(session, tokens[20:41])
    session.reset()
    assert torch.equal(logits(session, tokens[:20]), first)


@pytest.mark.parametrize("size", [8, 9])
def test_a_prefill_that_failed_leaves_the_state(size: int, session, played, files: Path) -> None:
    """A chunk of an even length writes its states over those that it read."""
    tokens, _ = MOE.reference(model_file(MOE, files))
    logits(session, tokens[:20])

    def full(row) -> None:
        raise RuntimeError("full")

    session.set_logits_sink(full)
    with pytest.raises(RuntimeError, match="full"):
        session.prefill(tokens[40 : 40 + size].tolist())
    session.set_logits_sink(None)
    other = pytest.importorskip("kiln").Session(played)
    logits(other, tokens[:20])
    assert session.position == 20 and torch.equal(logits(session, tokens[20:30]), logits(other, tokens[20:30]))


def test_a_generation_that_was_stopped_can_be_continued(session, played, files: Path) -> None:
    tokens, _ = MOE.reference(model_file(MOE, files))
    logits(session, tokens[:20])
    found: list[int] = []

    def until_five(token: int) -> bool:
        found.append(token)
        return len(found) < 5

    session.generate(20, until_five, stop_at_eog=False)
    other = pytest.importorskip("kiln").Session(played)
    logits(other, tokens[:20])
    for token in found[:4]:
        other.decode(token)
    last = torch.tensor([found[4], 7])
    assert session.position == other.position == 24 and torch.equal(logits(session, last), logits(other, last))


def test_snapshots_of_a_state(session, played, files: Path, tmp_path: Path) -> None:
    """At odd and even positions, after chunks and after steps; in other sessions and from a file too."""
    runner = pytest.importorskip("kiln")
    tokens, _ = MOE.reference(model_file(MOE, files))
    other = runner.Session(played)
    for cut, steps in ((1, 0), (20, 0), (21, 0), (20, 3), (20, 4), (65, 1)):
        for whole in (False, True):
            session.rewind(0)
            logits(session, tokens[:cut])
            session.generate(steps + 1, stop_at_eog=False)
            position = session.position
            assert position == cut + steps and session.earliest == position
            snapshot = session.snapshot(whole=whole)
            session.save(tmp_path / "s")
            right = logits(session, tokens[66:75])
            right_next = session.decode()
            for source in (snapshot, tmp_path / "s", snapshot):
                for taker in (other, session):
                    if taker is session and source is not snapshot:
                        continue  # it would lose what the snapshot shares
                    taker.restore(source)
                    assert torch.equal(logits(taker, tokens[66:75]), right) and taker.decode() == right_next, (cut, steps, whole)
    with pytest.raises(runner.Error, match="its rings and states have lost what lay before position"):
        session.rewind(session.position - 1)


def test_what_the_artifact_says_of_a_state(session, artifact: Path) -> None:
    manifest = read_manifest(artifact)
    states = [kv for kv in manifest["kv"] if kv["kind"] == "state"]
    assert {kv["name"] for kv in states} == {f"blk.{i}.cache.{part}_state" for i in range(3) for part in ("conv", "delta")}
    size = sum(kv["bytes"] for kv in states)
    assert session.memory()["kv_state"] == size and "KV      state" in text(manifest)
    assert bench.kv_bytes(manifest, 50) == size + 50 * 2 * 32 * 4  # a slot read, a slot written; keys and values of 50 positions


def test_a_state_in_another_form_is_refused(artifact: Path, tmp_path: Path) -> None:
    runner = pytest.importorskip("kiln")
    shutil.copytree(artifact, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    state = next(kv for kv in manifest["kv"] if kv["kind"] == "state")
    state["shape"][0], state["bytes"] = 1, state["bytes"] // 2
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="a state is kept 2 times"):
        runner.Model(str(tmp_path / "copy"), device="cpu")
