"""The pass chain: which layers it takes and which it leaves, and that nothing changes by a bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.geometry import GEOMETRIES, Heads
from kiln.exporter import build
from kiln.exporter.build import check_places
from kiln.exporter.compiler.trace import GraphSpec, entry_rows, lower, make_kv, runnable
from kiln.exporter.errors import KilnError
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.synth import write_synthetic
from kiln.passes import chain, edit
from kiln.passes.records import Lowered, PassOptions
from kiln.passes.verifier import verify
from tests.by_rows import by_rows
from tests.timeline import FIXTURES, graph_spec, lowered_to, weights

aten, kiln = torch.ops.aten, torch.ops.kiln
# Heads of the 31B's sizes, whose attention leaves extents of 256; V is apart from Q and K where it is of another type.
GEMMA = dataclasses.replace(GEOMETRIES["tiny"], layers=3, full_every=3, sliding=Heads(2, 1, 256, 2), full=Heads(2, 1, 512, 1))
QWEN = dataclasses.replace(GEOMETRIES["qwen3-tiny"], ffn=512)
LAYERS = 3  # of both
FUSED = ("fixed_linear", "fixed_linear_squares", "fixed_glu", "add_norm", "fixed_partials")
SAMPLING = (torch.float32, torch.int32, torch.float32, torch.int64)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        for name, geometry in (("gemma", GEMMA), ("qwen", QWEN)):
            patch.setitem(GEOMETRIES, name, geometry)
            write_synthetic(folder / f"{name}.gguf", name, "q4_k_m", 0)
    return {name: folder / f"{name}.gguf" for name in ("gemma", "qwen")}


def spec_of(path: Path, kernel: str = "chain", rows: bool = False, **options) -> GraphSpec:
    several = {"decode_rows": (1, 2), "rows": 2} if rows else {}
    return graph_spec(path, residual_length=32, decode_bytes=2, decode_kernel=kernel, **several | options)


def calls(program, *names: str) -> list[int]:
    return [sum(edit.is_call(n, getattr(kiln, name).default) for n in program.graph.nodes) for name in names]


def report(lowered: Lowered):
    return next(r for r in lowered.reports if r.name == "chain")


def stepped(lowered: Lowered, entry: str, state: dict[str, torch.Tensor], steps: int) -> list[torch.Tensor]:
    """Logits of some steps from empty caches, and the caches."""
    rows = entry_rows(entry)
    tokens = torch.arange(rows or 1)
    caches = make_kv(lowered.kv)
    step, found = runnable(lowered.program, state | caches), []
    for i in range(steps):
        place = (torch.full_like(tokens, i), *((tokens % 2,) if rows else ()))
        found.append(step((tokens * 31 + i * 7) % 300, *place, *(torch.zeros(len(tokens), dtype=d) for d in SAMPLING))[1].clone())
    return [*found, *caches.values()]


@pytest.mark.parametrize("name", ["gemma", "qwen"])
@pytest.mark.parametrize("entry", ["decode", "decode_2"])
def test_outputs(name: str, entry: str, models, tmp_path) -> None:
    """The pattern is gone but for the first layer's projections and the last layer; logits and caches are equal."""
    state, gemma = weights(models[name], tmp_path), name == "gemma"
    before, after = (lower(spec_of(models[name], kernel, rows=entry != "decode", turboquant=gemma), entry, "cpu")
                     for kernel in ("graph", "chain"))  # fmt: skip
    assert (report(before).status, calls(before.program, "matmul_chain")) == ("off", [0])
    assert calls(before.program, *FUSED)[1:4] == [2 * LAYERS if gemma else 0, LAYERS, 2 * LAYERS]
    found = report(after)
    assert (found.status, found.places, found.expected) == ("applied", ("blk.0.chain", "blk.1.chain"), 2)
    assert calls(after.program, "matmul_chain", *FUSED)[:5] == [2, *((1, 2) if gemma else (3, 0)), 1, 2]
    matmuls = [len(n.args[2]) for n in after.program.graph.nodes if edit.is_call(n, kiln.matmul_chain.default)]
    assert found.note == f"{sum(matmuls)} matmuls in 2 kernels" and calls(before.program, "fixed_partials")[0] - sum(
        m - 3 for m in matmuls) == calls(after.program, "fixed_partials")[0]  # fmt: skip
    assert set(matmuls) == {4, 5}, "V apart and not"
    with by_rows():
        pairs = zip(*(stepped(lowered, entry, state, 5) for lowered in (before, after)), strict=True)
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)


def first(program, name: str):
    return next(n for n in program.graph.nodes if edit.is_call(n, getattr(kiln, name).default))


def other_reader(program, index: int) -> None:
    """Of a result of the first `add_norm`."""
    edit.emit(program, next(n for n in program.graph.nodes if n.op == "output"), aten.relu.default,
              chain.outputs(first(program, "add_norm"))[index])  # fmt: skip


def changed(program, name: str, at: int, value) -> None:
    node = first(program, name)
    node.args = (*node.args[:at], value, *node.args[at + 1 :])


NEAR = {
    "another reader of the stream inside": lambda p: other_reader(p, 0),
    "another reader of its sums": lambda p: other_reader(p, 2),
    "another eps inside": lambda p: changed(p, "add_norm", 6, 1e-3),
    "another eps of gates": lambda p: changed(p, "fixed_glu", 6, 1e-3),
    "no weight": lambda p: changed(p, "add_norm", 5, None),
    "a root before the first": lambda p: setattr(first(p, "fixed_linear_squares"), "args",
                                                 (*first(p, "fixed_linear_squares").args, first(p, "norm_fixed").next.next, 1e-6)),
}  # fmt: skip


@pytest.fixture(scope="module")
def fused(models):
    return lambda: lowered_to(spec_of(models["gemma"], "graph", turboquant=True), "decode", "fuse_decode")


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_left(name: str, fused) -> None:
    program = fused()
    NEAR[name](program)
    found = chain.run(Lowered(program), PassOptions(decode_kernel="chain"))
    edit.finish(program)
    assert found.places == ("blk.1.chain",) and calls(program, "matmul_chain", "fixed_glu") == [1, 2]


def test_what_is_read_afterwards_may_be(fused) -> None:
    """The stream behind a chain is anybody's."""
    program = fused()
    after = chain.outputs([n for n in program.graph.nodes if edit.is_call(n, kiln.add_norm.default)][1])[0]
    out = next(n for n in program.graph.nodes if n.op == "output")
    edit.emit(program, out, aten.relu.default, after)
    found = chain.run(Lowered(program), PassOptions(decode_kernel="chain"))
    edit.finish(program)
    verify(program, "test")
    assert found.places == ("blk.0.chain", "blk.1.chain") and found.status == "applied"


def test_where_it_is_not_needed(models) -> None:
    for entry, kernel, expected in (("prefill", "chain", "not needed"), ("decode", "graph", "off")):
        lowered = lower(spec_of(models["qwen"], kernel), entry, "cpu")
        assert (report(lowered).status, report(lowered).matches, report(lowered).expected) == (expected, 0, 0)
        assert calls(lowered.program, "matmul_chain") == [0]
    program = lowered_to(spec_of(FIXTURES / "gemma4-tiny-dense-wide-Q8_0.gguf", "graph"), "decode", "fuse_decode")
    before = [str(n.target) for n in program.graph.nodes]
    found = chain.run(Lowered(program), PassOptions(decode_kernel="chain"))
    assert (found.status, found.note) == ("not needed", "no layer has the form") and [str(n.target) for n in program.graph.nodes] == before


REASONS = {
    "gemma4-tiny-dense-wide-Q4_K_M": (5, r"blk.0.chain \(a head of 64 gives activations by extents of 32\)"),
    "gemma4-tiny-dense-wide-Q8_0": (5, r"blk.0.attn_output is Q8_0, blk.0.ffn_gate_up is Q8_0"),
    "gemma4-tiny-edge-wide-Q4_K_M": (None, "a per-layer embedding comes between"),
    "gemma4-tiny-moe-wide-Q4_K_M": (None, "it has a choice of experts"),
    "qwen35moe-tiny-wide-Q4_K_M": (None, "it has a choice of experts"),
    "qwen35-tiny-mtp": (None, "has a gated delta rule"),
    "gemma4-tiny-dense": (5, "blk.0.attn_output is F32"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_not(name: str) -> None:
    """Before anything is packed; the last layer is not expected."""
    number, reason = REASONS[name]
    spec = spec_of(FIXTURES / f"{name}.gguf")
    places = spec.places("decode")["chain"]
    assert len(places) == len(spec.config.layers) - 1 and f"blk.{len(places)}.chain" not in places
    assert number is None or sum(bool(why) for why in places.values()) >= number - 1
    assert spec.places("prefill")["chain"] == spec_of(FIXTURES / f"{name}.gguf", "graph").places("decode")["chain"] == {}
    with pytest.raises(KilnError, match=f"pass chain does not rewrite .*{reason}.*; give --decode-kernel graph"):
        check_places(dataclasses.replace(spec, options=dataclasses.replace(spec.options, decode_bytes=0)))  # of this pass alone


def test_places_by_rows_and_types(models) -> None:
    """What no model at hand has: as the plan says it."""
    spec = spec_of(models["gemma"])
    assert spec.places("decode")["chain"] == {"blk.0.chain": "", "blk.1.chain": ""}
    check_places(spec)

    def reasons(**changes: dict) -> list[str]:
        plan = tuple(dataclasses.replace(p, **changes.get(p.name.replace(".", "_"), {})) for p in spec.plan)
        return list(dataclasses.replace(spec, plan=plan).places("decode")["chain"].values())

    assert reasons(blk_1_ffn_down={"block_type": "Q5_K"}) == ["", "blk.1.ffn_down is Q5_K"]
    assert reasons(blk_2_attn_qk={"block_type": "Q5_K"}) == ["", "blk.2.attn_qk is Q5_K"]
    assert reasons(blk_0_attn_output={"N": 272}) == ["blk.0.attn_output has 272 rows, no multiple of 32", ""]
    apart = [dataclasses.replace(p, name="blk.2.attn_k") for p in spec.plan if p.name == "blk.2.attn_qk"]
    v = [dataclasses.replace(p, name="blk.2.attn_v") for p in apart]
    found = dataclasses.replace(spec, plan=(*spec.plan, *apart, *v)).places("decode")["chain"]["blk.1.chain"]
    assert found == "blk.2.attn_qk, blk.2.attn_k, blk.2.attn_v are 3 matmuls"
    for name in ("ffn_gate", "ffn_up"):
        gates = [dataclasses.replace(p, name=f"blk.0.{name}") for p in spec.plan if p.name == "blk.0.ffn_gate_up"]
        spec = dataclasses.replace(spec, plan=(*spec.plan, *gates))
    spec = dataclasses.replace(spec, plan=tuple(p for p in spec.plan if p.name != "blk.0.ffn_gate_up"))
    assert spec.places("decode")["chain"]["blk.0.chain"] == "gate is Q4_K, up Q4_K"


@pytest.mark.parametrize("option, message", [
    ({"fuse_decode": False}, "does not go with --no-fuse-decode"),
    ({"decode_activations": "int8"}, "multiplies activations of 2 bytes; it does not go with --decode-activations int8"),
    ({"activation_dtype": "float32"}, "does not go with --activation-dtype float32"),
])  # fmt: skip
def test_options_that_do_not_go_together(option: dict, message: str, models) -> None:
    options = build.ExportOptions(models["qwen"], models["qwen"], decode_kernel="chain")
    plan = read_plan(models["qwen"])
    assert build.graph_spec(options, plan, ("sm_90",)).options.decode_kernel == "chain"
    assert build.graph_spec(options, plan, ("cpu",)).options.decode_kernel == "graph"
    with pytest.raises(KilnError, match=f"--decode-kernel chain .*{message}"):
        build.graph_spec(dataclasses.replace(options, **option), plan, ("sm_90",))
