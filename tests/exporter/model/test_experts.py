"""Models with experts: what their files say, what they cost, what is synthetic, and what a GPU's passes make of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.exporter.artifact.cost import cost
from kiln.exporter.compiler.trace import lower, make_kv, runnable
from kiln.exporter.errors import KilnError
from kiln.exporter.model.records import Dense, Experts
from kiln.exporter.source.config import check_tensors, from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.weights import plan_weights
from kiln.exporter.tools import synth
from kiln.exporter.tools.synth import synth_plan, write_synthetic
from kiln.passes import edit
from tests.exporter.model.test_families import MODELS, check
from tests.gguf_files import rewrite
from tests.timeline import FIXTURES, feed, graph_spec, weights

KILN = torch.ops.kiln
GEMMA, WIDE, QWEN = (f"{name}.gguf" for name in ("gemma4-tiny-moe", "gemma4-tiny-moe-wide-Q4_K_M", "qwen3moe-tiny"))
U32, F32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32


def test_records() -> None:
    gemma, qwen = (from_gguf(open_gguf(FIXTURES / name)) for name in (GEMMA, QWEN))
    shared = Dense(112, "gelu_tanh")
    assert {layer.ffn for layer in gemma.layers} == {
        Experts(8, 3, 32, "gelu_tanh", shared=shared, branch_norms=True, own_input=True, scaled=True)
    }
    assert {layer.ffn for layer in qwen.layers} == {Experts(16, 4, 24, "silu")}


def test_experts_are_rows_of_one_matrix() -> None:
    """A tensor of rank 3 is a stack of its experts' rows, as they lie in the file."""
    file = open_gguf(FIXTURES / WIDE)
    plan = {p.name: p for p in plan_weights(from_gguf(file), file)}
    together, down = plan["blk.0.ffn_gate_up_exps"], plan["blk.0.ffn_down_exps"]
    assert (together.N, together.K, together.stack, together.block_type) == (6 * 192, 256, 6, "Q4_K")
    assert (down.N, down.K, down.stack, down.block_type) == (6 * 256, 96, 6, "Q5_0")
    assert {p.stack for p in plan.values() if "exps" not in p.name} == {1}


def test_gate_and_up_apart_are_the_same_model(tmp_path: Path) -> None:
    """What a converter may write in two tensors: same logits. An expert's gates come before its values."""
    source = open_gguf(FIXTURES / GEMMA)
    apart, drop = {}, []
    for i in range(6):
        name = f"blk.{i}.ffn_gate_up_exps.weight"
        drop.append(name)
        both = np.array(source.data(name)).view(np.float32).reshape(8, 2, 32, 72)
        for j, part in enumerate(("gate", "up")):
            apart[f"blk.{i}.ffn_{part}_exps.weight"] = ((8, 32, 72), "F32", np.ascontiguousarray(both[:, j]))
    path = rewrite(tmp_path / "apart.gguf", FIXTURES / GEMMA, drop=drop, set_tensors=apart)
    check_tensors(from_gguf(open_gguf(path)), open_gguf(path))
    spec, state = graph_spec(path), weights(path, tmp_path)
    assert "blk.0.ffn_gate_exps.weight" in state

    def start():
        decoder = spec.model()
        decoder.load_state_dict(state, strict=False)
        return decoder, decoder

    with torch.inference_mode():
        check(next(m for m in MODELS if m.name == "gemma4-tiny-moe"), path, start, 29)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (QWEN, {"qwen3moe.expert_used_count": (U32, 17)}, "expert_used_count is 17, but there are 16 experts"),
        (QWEN, {"qwen3moe.expert_count": (U32, 0)}, "expert_count is 0, a positive integer was expected"),
        (QWEN, {"qwen3moe.expert_shared_count": (U32, 1)}, "expert_shared_count is 1: other options of experts than their number"),
        (QWEN, {"qwen3moe.expert_weights_scale": (F32, 2.5)}, "expert_weights_scale is 2.5: other options of experts"),
        (GEMMA, {"gemma4.expert_gating_func": (U32, 2)}, "expert_gating_func is 2: other options of experts"),
        (GEMMA, {"gemma4.expert_used_count": (U32, 0)}, "expert_used_count is 0, a positive integer was expected"),
    ],
)
def test_what_is_not_applied_is_named(name: str, keys: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(KilnError, match=message):
        from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", FIXTURES / name, set_keys=keys)))


def test_experts_of_another_size_are_refused(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "m.gguf", FIXTURES / GEMMA, set_keys={"gemma4.expert_count": (U32, 16)})
    with pytest.raises(KilnError, match=r"ffn_gate_inp.weight has shape \[8, 72\], expected \[16, 72\]"):
        check_tensors(from_gguf(open_gguf(path)), open_gguf(path))


def test_a_decode_step_reads_the_chosen_experts_alone() -> None:
    """Counted from the file's own tensors: 2 of 6 experts."""
    file = open_gguf(FIXTURES / WIDE)
    config = from_gguf(file)
    read = sum(t.nbytes // (3 if "exps.weight" in t.name else 1) for t in file.tensors.values() if t.name != "rope_freqs.weight")
    found = cost(config, plan_weights(config, file))
    assert found["weight_bytes"] == read + 4 * (32 + 64)  # and the frequencies
    per_layer = 3 * 256 * 288 + 6 * 256 + 2 * 3 * 256 * 96 + 2 * 256 * 256 + 256 * 128
    assert found["token_flops"] == 2 * (3 * per_layer + 2 * 128 * 256 + 2 * 256 * 256)


def test_types_of_gemma4_26b_are_those_of_a_real_file() -> None:
    """Rows of 704 and 2,112 are no multiples of 256."""
    plan = synth_plan("gemma4-26b-a4b", "q4_k_m")
    assert Counter(t for *_, t in plan) == {"F32": 392, "Q4_K": 192, "Q5_0": 32, "Q8_0": 28, "Q6_K": 14}
    assert {(shape, t) for name, shape, t in plan if "exps.weight" in name} == {
        ((128, 1408, 2816), "Q4_K"), ((128, 2816, 704), "Q5_0"), ((128, 2816, 704), "Q8_0")
    }  # fmt: skip


PLAIN = (KILN.quantized_linear, KILN.expert_linear, KILN.route, KILN.rms_norm, KILN.rope, KILN.gelu_mul, KILN.silu_mul,
         torch.ops.aten.linear, torch.ops.aten.add.Tensor)  # fmt: skip


@pytest.mark.parametrize(("name", "turboquant"), [(WIDE, False), ("gemma4-moe-tiny", True), ("qwen3-moe-tiny", False)])
def test_the_whole_decode_is_fused_for_a_gpu(name: str, turboquant: bool, tmp_path: Path) -> None:
    """Nothing of the plain decoder is left, the stream is float32, and a layer's experts are three kernels beside its norms'."""
    path = FIXTURES / name
    if name != WIDE:
        path = tmp_path / "model.gguf"
        write_synthetic(path, name, "q4_k_m", 0)
    check_tensors(from_gguf(open_gguf(path)), open_gguf(path))
    options = {"decode_bytes": 2, "materializes_head": False, "matmul": "kiln", "turboquant": turboquant, "residual_length": 32}
    with compiling_for(gpu_targets()["sm_90"]):
        lowered = lower(graph_spec(path, dtype="bfloat16", **options), "decode", "cuda")
    report, layers = next(r for r in lowered.reports if r.name == "fuse_decode"), len(graph_spec(path).config.layers)
    assert report.matches == report.expected > 0 and not report.missed
    calls = [n for n in lowered.program.graph.nodes if n.op == "call_function"]
    assert not [n.name for n in calls if edit.is_call(n, *(getattr(op, "default", op) for op in PLAIN))]
    assert {n.meta["val"].dtype for n in calls if isinstance(n.meta["val"], torch.Tensor)}.isdisjoint({torch.bfloat16})
    alone = name == "qwen3-moe-tiny"
    count = Counter(str(n.target).split(".")[1] for n in calls if str(n.target).startswith("kiln."))
    once = {"expert_glu", "choose_experts", "expert_sum"} if alone else {
        "expert_glu", "choose_experts_norm", "expert_sum_squares", "add_norm_two", "fixed_glu"}  # fmt: skip
    assert {op: count[op] for op in once} == dict.fromkeys(once, layers)
    assert (count["add_norm"], count["norm_fixed"]) == ((2 if alone else 1) * layers, 1)
    assert sum(count[op] for op in ("expert_sum", "expert_sum_squares", "choose_experts", "choose_experts_norm")) == 2 * layers


VARIATIONS = {  # types by tensor; what is missed in layer 0, and why; of Qwen, which has nothing beside the experts
    "gates apart": ({"ffn_up_exps": "Q6_K"}, ("ffn_norm", "experts"), "gate is Q4_K, up Q6_K"),
    "down in F32": ({"ffn_down_exps": "F32"}, ("ffn_norm", "experts"), "blk.0.ffn_down_exps is F32"),
    "router in bfloat16": ({"ffn_gate_inp": "BF16"}, (), ""),
    "router packed": ({"ffn_gate_inp": "Q8_0"}, ("ffn_norm", "experts"), "blk.0.ffn_gate_inp is Q8_0"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly) if i % 2 else n for i, n in enumerate(VARIATIONS)])
def test_what_keeps_experts_from_their_kernels_is_named(name: str, tmp_path: Path, monkeypatch) -> None:
    """A bfloat16 router is none: then the fused graph computes the same."""
    kinds, missed, why = VARIATIONS[name]
    plan = synth.synth_plan
    monkeypatch.setattr(synth, "synth_plan",
                        lambda *a: [(n, shape, kinds.get(n.split(".")[-2], kind)) for n, shape, kind in plan(*a)])  # fmt: skip
    path = tmp_path / "model.gguf"
    write_synthetic(path, "qwen3-moe-tiny", "q4_k_m", 0)
    fused = lower(graph_spec(path, decode_bytes=3, allow_unfused=True), "decode", "cpu")
    found = next(r for r in fused.reports if r.name == "fuse_decode").missed
    layers = range(len(graph_spec(path).config.layers))
    assert list(found) == [f"blk.{i}.{part} ({why.replace('blk.0', f'blk.{i}')})" for i in layers for part in missed]
    assert missed or difference(path, tmp_path) < 2e-5


def difference(path: Path, directory: Path) -> float:
    """Of the logits of the fused graph, three bytes an activation, which have float32's own error, from the unfused graph's, relative."""
    state, tokens = weights(path, directory), torch.randint(0, 256, (5,), generator=torch.Generator().manual_seed(0))
    rows = []
    for terms in (0, 3):
        lowered = lower(graph_spec(path, decode_bytes=terms), "decode", "cpu")
        rows.append(feed(None, runnable(lowered.program, {**state, **make_kv(lowered.kv)}), tokens, 1))
    return max(((rows[1][i] - rows[0][i]).norm() / rows[0][i].norm()).item() for i in range(len(tokens)))


@pytest.mark.parametrize("name", [WIDE, "qwen3-moe-tiny"])
def test_references_equal_the_unfused_graph(name: str, tmp_path: Path) -> None:
    path = FIXTURES / name
    if name != WIDE:
        path = tmp_path / "model.gguf"
        write_synthetic(path, name, "q4_k_m", 0)
    assert difference(path, tmp_path) < 2e-5
