"""Gemma 4 E2B and E4B on tiny models: per-layer embeddings, keys and values that later layers share, and mistakes in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kiln.custom_ops.geometry import GEOMETRIES
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights.mixes import MIXES, block_types
from kiln.exporter.artifact.cost import cost
from kiln.exporter.artifact.mapping import constant_records
from kiln.exporter.artifact.memory import memory_plan
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.compiler.trace import ENTRIES, lower, trace
from kiln.exporter.errors import KilnError
from kiln.exporter.measure.players import AllPositionsSpec
from kiln.exporter.model import decoder
from kiln.exporter.model.records import ModelConfig, cache_specs
from kiln.exporter.source.config import check_tensors, expected_tensors, from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.source.weights import derived_constants
from kiln.exporter.tools.synth import synth_plan, write_synthetic
from kiln.passes import edit
from kiln.passes.records import Lowered, PassOptions
from tests.gguf_files import rewrite
from tests.timeline import CHUNK, FIXTURES, GREEDY, feed, fixture_logits, fixture_tokens, graph_spec, lowered_to, programs, weights, worst

KILN = torch.ops.kiln
TINY, WIDE = "gemma4-tiny-edge", "gemma4-tiny-edge-wide-Q4_K_M"
TOLERANCE = {TINY: 5e-4, WIDE: 1e-3}  # the second against the same model of its dequantized values
WRONG = 1e-2  # max |dlogit| of a mistake at least
names = pytest.mark.parametrize("name", [TINY, WIDE])


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    return {name: weights(FIXTURES / f"{name}.gguf", tmp_path_factory.mktemp("weights")) for name in (TINY, WIDE)}


def check(name: str, start: Callable, chunks: tuple[int, ...] = (80, CHUNK, 7, 1), length: int = 80) -> None:
    """One batch, chunks longer than the window, of 7, token by token."""
    tokens, reference = fixture_tokens(name)[:length], fixture_logits(name)
    for chunk in chunks:
        error = worst(feed(*start(), tokens, chunk), reference)
        print(f"{name}, chunks of {chunk}: max |dlogit| {error:.2e}")
        assert error <= TOLERANCE[name], chunk


@names
def test_eager(name: str, states) -> None:
    spec = graph_spec(FIXTURES / f"{name}.gguf")

    def start():
        model = spec.model()
        missing = model.load_state_dict(states[name], strict=False)
        assert not missing.unexpected_keys and all(".cache." in k for k in missing.missing_keys)
        return model, model

    with torch.inference_mode():
        check(name, start)


@functools.cache
def lowered(name: str, entry: str, **options: Any) -> Lowered:
    """After all passes of the CPU."""
    return lower(graph_spec(FIXTURES / f"{name}.gguf", **options), entry, "cpu")


SMALL_HEAD, FUSED = {"materialized_head_budget": 64 << 10}, {"decode_bytes": 3, "materializes_head": False}


@pytest.mark.parametrize("last", ["", "all", *(pytest.param(p, marks=pytest.mark.nightly) for p in ("index_copy", "kv_len",
                                                                                                    "chunked_lm_head"))])  # fmt: skip
def test_exported_and_after_passes(last: str, states) -> None:
    """As it is traced, and after passes of the CPU with the head in small pieces."""
    spec = graph_spec(FIXTURES / f"{TINY}.gguf", **SMALL_HEAD)

    def make(entry: str):
        if last == "all":
            return lowered(TINY, entry, **SMALL_HEAD).program
        return lowered_to(spec, entry, last) if last else trace(spec, entry, "cpu")

    with torch.no_grad():
        check(TINY, programs(spec, states[TINY], make), (CHUNK, 7, 1), 40)


def test_fused(states) -> None:
    """As a GPU decodes, three bytes an activation."""
    with torch.no_grad():
        spec = graph_spec(FIXTURES / f"{WIDE}.gguf", **FUSED)
        check(WIDE, programs(spec, states[WIDE], lambda e: lowered(WIDE, e, **FUSED).program), (7, 1), 24)


@pytest.mark.nightly
def test_fused_tq4_reads_what_the_source_wrote(states) -> None:
    """TQ4 where global layers share keys and values, across the exact window: fused as not fused, and its codes are not far off."""
    rows, options = {}, {"turboquant": True, "residual_length": 8, "materializes_head": False}
    for terms in (0, 3):
        spec = graph_spec(FIXTURES / f"{WIDE}.gguf", **options)
        decode = {"decode": {"decode_bytes": terms}, "prefill": {}}  # prefill is never fused
        with torch.no_grad():
            start = programs(spec, states[WIDE], lambda e, decode=decode: lowered(WIDE, e, **options, **decode[e]).program)
            rows[terms] = feed(*start(), fixture_tokens(WIDE)[:24], 1) | feed(*start(), fixture_tokens(WIDE)[:21], 20)
    reference = fixture_logits(WIDE)
    scale = float(reference.std())
    between = max(float((rows[3][i] - rows[0][i]).abs().max()) for i in rows[0])
    codes = worst(rows[0], reference)
    print(f"TQ4: fused and not {between:.1e} apart, codes {codes:.1e} off, logits' deviation {scale:.1e}")
    assert between < 2e-2 * scale and codes < scale


@pytest.mark.parametrize("turboquant", [False, True])
def test_the_whole_decode_is_fused_for_a_gpu(turboquant: bool) -> None:
    """Nothing of the plain decoder's layers is left, every place is rewritten, the stream is float32 from the embedding to the head."""
    path = FIXTURES / f"{WIDE}.gguf"
    options = {"decode_bytes": 2, "materializes_head": False, "matmul": "kiln", "turboquant": turboquant, "residual_length": 32}
    with compiling_for(gpu_targets()["sm_90"]):
        whole = lower(graph_spec(path, dtype="bfloat16", **options), "decode", "cuda")
    calls = [n for n in whole.program.graph.nodes if n.op == "call_function"]
    plain = (KILN.quantized_linear, KILN.rope, KILN.gelu_mul, KILN.sliding_attention, KILN.tq4_attention)
    assert not [n.name for n in calls if edit.is_call(n, *(op.default for op in plain))]
    assert all(not report.missed and report.matches == report.expected for report in whole.reports)
    fused = next(r for r in whole.reports if r.name == "fuse_decode")
    counts = f"26 matmuls, 9 norms, 4 gated, 1 sliding, 1 global, {0 if turboquant else 2} conversions, 4 per-layer, 2 shared"
    assert fused.note == f"2 bytes an activation; {counts}"
    expected = {"add_norm": 12, "gate_fixed": 4, "sliding_decode": 1, "sliding_read": 1, "quantized_embedding": 2,
                "rms_norm": 1, "matmul": 1}  # fmt: skip
    expected |= {"tq4_decode": 1, "tq4_read": 1} if turboquant else {"prepare_qkv": 1, "prepare_q": 1, "global_attention": 2}
    assert {name: sum(edit.is_call(n, getattr(KILN, name).default) for n in calls) for name in expected} == expected
    # the one matmul whose weight a file keeps in bfloat16 takes and gives it; nothing else does
    rounded = {n for n in calls if isinstance(n.meta["val"], Tensor) and n.meta["val"].dtype == torch.bfloat16}
    near = {n for n in calls if edit.is_call(n, KILN.matmul.default)}
    while more := {m for n in near for m in (*n.all_input_nodes, *n.users) if m in rounded} - near:
        near |= more
    assert near == rounded and len(rounded) <= 6, rounded - near


def test_caches_are_the_sources_alone() -> None:
    config = graph_spec(FIXTURES / f"{TINY}.gguf").config
    assert [(c.layer, c.kind, c.readers) for c in cache_specs(config)] == [
        (0, "ring", (0,)), (1, "ring", (1,)), (2, "ring", (2, 4, 5, 6)), (3, "global", (3, 7))]  # fmt: skip
    assert [layer.ffn.size for layer in config.layers] == [128] * 4 + [256] * 4
    spec = graph_spec(FIXTURES / f"{WIDE}.gguf")
    assert cost(spec.config, spec.plan)["readers"] == {"blk.0.cache": 2, "blk.1.cache": 2}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_ring_is_written_after_its_last_reader(entry: str) -> None:
    """And a global cache before its first: in the graph of any number of tokens, after all passes."""
    program = lowered(TINY, entry, **SMALL_HEAD).program
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    named = edit.buffers(program)
    for op, cache, readers in ((KILN.sliding_attention, "blk.2.cache.k_ring", 4), (KILN.global_attention, "blk.3.cache.k_cache", 2)):
        node = next(n for n, name in named.items() if name == cache)
        calls = [n for n in order if edit.is_call(n, op.default) and any(edit.resolve(a) is node for a in n.args)]
        (write,) = (n for n in order if edit.is_call(n, torch.ops.aten.index_copy_.default) and edit.resolve(n.args[0]) is node)
        assert len(calls) == readers
        assert all((order[write] > order[call]) == ("ring" in cache) for call in calls)


def test_the_table_is_read_by_rows(states) -> None:
    """No node of a graph is as large as the table but the table: its rows are never dequantized as a whole, or copied."""
    rows = 512 * 1024  # tokens of the vocabulary by layers * values
    for entry in ENTRIES:
        for node in lowered(WIDE, entry, **FUSED).program.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor) and all(isinstance(d, int) for d in value.shape):
                assert value.numel() < rows, node.name
    spec = graph_spec(FIXTURES / f"{WIDE}.gguf")
    table = next(p for p in spec.plan if p.name == "per_layer_token_embd")
    whole = sum(t.numel() * t.element_size() for name, t in states[WIDE].items())
    row = table.bits_per_weight * table.K / 8
    assert cost(spec.config, spec.plan)["weight_bytes"] == whole - table.N * row + row
    planned, on_host = memory_plan(spec), memory_plan(spec, "host")
    assert (planned.weights, planned.host_weights) == (whole, 0)
    assert (on_host.weights, on_host.host_weights) == (whole - table.N * row, table.N * row)


def test_a_table_on_the_host_comes_first_in_the_file_and_is_marked(tmp_path: Path) -> None:
    plan = read_plan(FIXTURES / f"{WIDE}.gguf")
    records = write_weights(tmp_path / "w", plan, ple="host")
    marked = [r for r in records if "gathered" in r]
    assert marked and all(r["gathered"] == "host" and r["name"].startswith("per_layer_token_embd.") for r in marked)
    assert max(r["offset"] for r in marked) < min(r["offset"] for r in records if "gathered" not in r)
    mapped = {r["name"]: r["gathered"] for r in constant_records(plan, {}, "host") if "gathered" in r}
    assert mapped == {r["name"]: "host" for r in marked}
    assert {r["gathered"] for r in write_weights(tmp_path / "d", plan) if "gathered" in r} == {"device"}


# ---- what a file may hold ----


def test_shared_layers_do_not_use_keys_of_their_own(states, tmp_path: Path) -> None:
    """Files of April 2026 hold them; whatever they are, the constants are the same, and so are the logits."""
    source = open_gguf(FIXTURES / f"{TINY}.gguf")
    g = torch.Generator().manual_seed(0)
    shapes = {"attn_k.weight": (64, 72), "attn_v.weight": (64, 72), "attn_k_norm.weight": (32,)}
    added = {f"blk.{i}.{n}": (s, "F32", torch.randn(s, generator=g).numpy()) for i in (4, 5, 6) for n, s in shapes.items()}
    path = rewrite(tmp_path / "april.gguf", FIXTURES / f"{TINY}.gguf", set_tensors=added)
    assert sorted(check_tensors(from_gguf(open_gguf(path)), open_gguf(path))) == sorted(added)
    assert from_gguf(open_gguf(path)) == from_gguf(source)
    found = weights(path, tmp_path)
    assert found.keys() == states[TINY].keys() and all(torch.equal(found[k], v) for k, v in states[TINY].items())


@pytest.mark.parametrize("name", ["blk.2.attn_k.weight", "blk.0.inp_gate.weight", "per_layer_token_embd.weight", "blk.7.post_norm.weight"])
def test_what_is_missing_is_named(name: str, tmp_path: Path) -> None:
    path = rewrite(tmp_path / "m.gguf", FIXTURES / f"{TINY}.gguf", drop=[name])
    with pytest.raises(KilnError, match=f"tensor {name} is missing"):
        read_plan(path)


# ---- presets ----


def test_the_fixture_has_the_types_of_its_mix() -> None:
    file = open_gguf(FIXTURES / f"{WIDE}.gguf")
    found = {name: file.tensors[name].type for name in expected_tensors(from_gguf(file), file.tensors)}
    assert block_types(MIXES["q4_k_m"], {name: file.tensors[name].shape for name in found}) == found


@pytest.mark.parametrize(
    ("preset", "parameters", "sources", "tensors"),
    [("gemma4-e2b", 4_647_449_891 - 18_880_512, {13: 16, 14: 4}, 541), ("gemma4-e4b", 7_518_069_034 - 55_055_616, {22: 15, 23: 3}, 666)],
)
def test_presets_are_the_models(preset: str, parameters: int, sources: dict, tensors: int, tmp_path: Path) -> None:
    """Parameters and tensors as counted from real files, without the unused K and V; which layers' keys the later ones read."""
    plan = synth_plan(preset, "q4_k_m")
    count = sum(torch.Size(shape).numel() for name, shape, _ in plan if name != "rope_freqs.weight")
    assert (count, len(plan)) == (parameters, tensors)
    types = {name: block_type for name, _, block_type in plan}
    assert types["token_embd.weight"] == types["per_layer_token_embd.weight"] == "Q6_K"
    assert [name for name, block_type in types.items() if block_type == "BF16"] == ["per_layer_model_proj.weight"]
    write_synthetic(tmp_path / "m.gguf", preset, "q4_k_m", sparse=True)
    config = from_gguf(open_gguf(tmp_path / "m.gguf"))
    assert {c.layer: len(c.readers) - 1 for c in cache_specs(config) if len(c.readers) > 1} == sources
    model = GEOMETRIES[preset]
    assert [layer.ffn.size for layer in config.layers] == [model.ffn_of(i) for i in range(model.layers)]


# ---- mistakes that still give fluent text ----


def ple(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, per_layer_embedding=replace(config.per_layer_embedding, **changes))


def sources(of: Callable[[int, int], int | None]) -> Callable[[ModelConfig], ModelConfig]:
    """of: layer and its source -> another source."""

    def change(config: ModelConfig) -> ModelConfig:
        def mixer(layer):
            m = layer.mixer
            return m if m.kv_from is None else replace(m, kv_from=of(layer.index, m.kv_from))

        return replace(config, layers=tuple(replace(layer, mixer=mixer(layer)) for layer in config.layers))

    return change


def without_scale(config: ModelConfig) -> ModelConfig:
    return replace(config, layers=tuple(replace(layer, scaled=False) for layer in config.layers))


RECORDS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "rows not scaled by the root of their size": ple(scale=1.0),
    "gate with SiLU": ple(activation="silu"),
    "the wrong source layer": sources(lambda layer, source: source - 1 if source == 2 else source),
    "the stream's scale skipped": without_scale,
    "first embedding not scaled": lambda config: replace(config, embedding_scale=1.0),
}


def axes_swapped(state: dict[str, Tensor], patch: pytest.MonkeyPatch) -> None:
    """Values before layers in a row of the table."""
    table = state["per_layer_token_embd.weight"]
    state["per_layer_token_embd.weight"] = table.unflatten(1, (24, 8)).transpose(1, 2).flatten(1)




def projection_of_the_unscaled(state: dict[str, Tensor], patch: pytest.MonkeyPatch) -> None:
    original = decoder.Decoder.per_layer
    patch.setattr(decoder.Decoder, "per_layer", lambda self, tokens, x: original(self, tokens, x / 72**0.5))


def branch_after_the_scale(state: dict[str, Tensor], patch: pytest.MonkeyPatch) -> None:
    """The third branch is added after the layer's scale: the same as its norm's weight over the scale."""
    for i in range(8):
        state[f"blk.{i}.post_norm.weight"] = state[f"blk.{i}.post_norm.weight"] / state[f"blk.{i}.layer_output_scale.weight"]


def ring_written_by_its_source(state: dict[str, Tensor], patch: pytest.MonkeyPatch) -> None:
    """Before the other layers that read it: they miss the keys that the chunk overwrote."""
    attend = decoder.SlidingCache.attend
    patch.setattr(decoder.SlidingCache, "attend", lambda self, *args: attend(self, *args[:-1], args[-2] or args[-1]))


def gate_without_gelu(state: dict[str, Tensor], patch: pytest.MonkeyPatch) -> None:
    made = decoder.Block.__init__

    def init(self, *args) -> None:
        made(self, *args)
        self.gated = lambda gate, value: gate * value

    patch.setattr(decoder.Block, "__init__", init)


def projection_not_normed(state: dict[str, Tensor], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoder.Norm, "forward", lambda self, x, dtype=None: x if x.shape[-1] == 24 else KILN.rms_norm(
        x, self.weight, self.eps, dtype or x.dtype))  # fmt: skip


STEPS = {f.__name__: f for f in (
    axes_swapped, gate_without_gelu, projection_of_the_unscaled, branch_after_the_scale, projection_not_normed)}  # fmt: skip


def miss(states, records=None, step=None, patch=None, chunk: int = 80) -> float:
    """The largest error of a logit of 80 tokens, the model's records or its steps changed so."""
    path, state = FIXTURES / f"{TINY}.gguf", dict(states[TINY])
    spec = graph_spec(path)
    config = records(spec.config) if records else spec.config
    state |= {name: torch.from_numpy(values) for name, values in derived_constants(config, open_gguf(path)).items()}
    if step:
        step(state, patch)
    plain = AllPositionsSpec(config, spec.plan, 96, 96, "float32", PassOptions()).model()
    plain.load_state_dict(state, strict=False)
    tokens, found = fixture_tokens(TINY), []
    with torch.inference_mode():
        for at in range(0, 80, chunk):
            piece = tokens[at : at + chunk]
            found.append(plain(piece, torch.arange(at, at + len(piece)), *GREEDY))
    return float((torch.cat(found) - fixture_logits(TINY)).abs().max())


def test_a_right_pass(states) -> None:
    assert miss(states) < TOLERANCE[TINY] and miss(states, chunk=20) < TOLERANCE[TINY]


@pytest.mark.parametrize("name", RECORDS)
def test_mistakes_in_records(name: str, states) -> None:
    error = miss(states, RECORDS[name])
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


@pytest.mark.parametrize("name", STEPS)
def test_mistakes_in_steps(name: str, states, monkeypatch: pytest.MonkeyPatch) -> None:
    error = miss(states, step=STEPS[name], patch=monkeypatch)
    print(f"{name}: max |dlogit| {error:.2e}")
    assert error > WRONG


def test_mistake_in_the_order_of_a_ring(states, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows only from the second chunk on, and not in a batch."""
    assert miss(states, step=ring_written_by_its_source, patch=monkeypatch, chunk=7) > WRONG


def test_a_cache_that_does_not_fit_is_refused() -> None:
    spec = graph_spec(FIXTURES / f"{TINY}.gguf")
    config = sources(lambda layer, source: 3)(spec.config)
    with pytest.raises(KilnError, match="layer 4 has attention over the keys and values of layer 3, whose heads or window are others"):
        decoder.check_supported(config)
