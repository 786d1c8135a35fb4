"""The fused decode graph with its kernels, in Triton's interpreter, against its references: two tokens of a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import triton

from kiln.custom_ops.geometry import GEOMETRIES, Geometry
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights import gemv
from kiln.exporter.compiler.trace import lower, make_kv, runnable
from kiln.exporter.tools.synth import write_synthetic
from tests.custom_ops.interpret import interpreted
from tests.timeline import GREEDY, graph_spec, weights
from tests.timelines import sampling

# One sliding layer and a full one, V of another type than Q and K in the first, in every op of a fused step.
PAIR = dataclasses.replace(GEOMETRIES["tiny"], layers=2, full_every=2, ffn=256)
# Few, large programs, for the interpreter's time: four warps share a product, V's has two splits.
CONFIG, TARGET = gemv.GemvConfig(rows=128, warps=4, warps_per_sm=4), dataclasses.replace(gpu_targets()["sm_90"], sm_count=2)
TERMS = 2  # bytes of an activation, of which kernels and references make the same integers but where their sums' order tips a rounding
LIMIT = 3e-4
TOKENS, START = torch.tensor([2, 300]), 60  # behind the window of 16 and the exact window of 32
COMMON = {"add_norm", "fixed_glu", "fixed_linear", "fixed_linear_squares", "fixed_partials", "norm_fixed", "rope_table", "sliding_decode"}
OPS = {True: COMMON | {"tq4_decode"}, False: COMMON | {"prepare_qkv", "global_attention", "fixed_point"}}
# With experts: a dense network beside them and norms of both; gates apart from values, and experts alone.
EXPERTS = {
    "gemma4-moe-tiny": ({"layers": 1, "full_every": 1, "ffn": 96, "experts": (4, 2, 32)}, {
        "add_norm", "fixed_glu", "choose_experts_norm", "expert_glu", "expert_sum_squares", "add_norm_two", "fixed_linear_squares"}),
    "qwen3-moe-tiny": ({"layers": 1, "full_every": 1, "experts": (6, 3, 64)}, {
        "add_norm", "norm_fixed", "choose_experts", "expert_glu", "expert_sum", "prepare_qkv"}),
}  # fmt: skip
# A delta rule and gated attention of which a part of each head turns, with a gated network beside experts, and without experts.
DELTA = {"layers": 2, "full_every": 2, "delta": (2, 4, 32, 32, 4)}
HYBRID = {"add_norm", "norm_fixed", "delta_decode", "rope_table", "fixed_glu", "fixed_partials", "fixed_linear"}
HYBRIDS = {
    False: ({"experts": (4, 2, 32), "ffn": 64}, HYBRID | {
        "choose_experts", "expert_glu", "expert_sum", "prepare_qkv", "attention_gate_fixed"}),
    True: ({"family": "qwen35", "experts": None, "ffn": 64}, HYBRID | {"tq4_decode"}),
}  # fmt: skip


def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gemv.GEMV_CONFIGS, 90, CONFIG)
    for key, config in list(gemv.SUMS_CONFIGS.items()):
        monkeypatch.setitem(gemv.SUMS_CONFIGS, key, dataclasses.replace(config, narrow=config.rows))


def decode(lowered, state: dict[str, torch.Tensor]) -> tuple[list[int], torch.Tensor, dict[str, torch.Tensor]]:
    """Next tokens, logits [2, V] and the caches after two steps over a past of random keys and values: rings are full, codes are read."""
    g = torch.Generator().manual_seed(0)
    caches = make_kv(lowered.kv)
    for cache in caches.values():
        if cache.dtype == torch.int16:
            cache.random_(-(1 << 15), 1 << 15, generator=g)
        else:
            cache.copy_(torch.rand(cache.shape, generator=g) + 0.5 if cache.dim() == 2 else torch.randn(cache.shape, generator=g))
    step = runnable(lowered.program, state | caches)
    answers = [step(TOKENS[i : i + 1], torch.tensor([START + i]), *GREEDY) for i in range(2)]
    return [int(token) for token, _ in answers], torch.cat([logits for _, logits in answers]), caches


def check(directory: Path, monkeypatch: pytest.MonkeyPatch, turboquant: bool, geometry: Geometry = PAIR,
          ops: set[str] | None = None) -> None:
    monkeypatch.setitem(GEOMETRIES, "pair", geometry)
    spread(monkeypatch)
    path = directory / "pair.gguf"
    write_synthetic(path, "pair", "q4_k_m", 0)
    state = weights(path, directory)
    spec = graph_spec(path, turboquant=turboquant, residual_length=32, decode_bytes=TERMS)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        lowered = lower(spec, "decode", "cpu")
        tokens, logits, caches = decode(lowered, state)
    called = {str(node.target).removeprefix("kiln.").removesuffix(".default") for node in lowered.program.graph.nodes}
    assert called >= (ops or OPS[turboquant])
    assert triton.knobs.runtime.interpret, "kernels are interpreted by test_kernels_interpreted alone"
    with compiling_for(TARGET):
        by_kernels, kernels, written = decode(lowered, state)
    error = ((kernels - logits).norm(dim=1) / logits.norm(dim=1)).max().item()
    print(f"{geometry.name}, turboquant {turboquant}: relative difference of the logits {error:.1e}")
    assert by_kernels == tokens and error < LIMIT
    for name, cache in caches.items():
        found, expected = written[name].float(), cache.float()
        assert cache.any() and (found - expected).norm() <= LIMIT * expected.norm(), name


# (position, row) of two steps of two tokens: of one row, of two in any order. Their products are of four bytes at a time: tensor cores take
# the interpreter minutes, and test_gemv_rows has them. By day tests/exporter/model/test_rows.py has these graphs by the ops' references.
STEPS = ([(60, 0), (61, 0)], [(60, 1), (62, 0)])


def poured(lowered) -> dict[str, torch.Tensor]:
    """Caches over a past of random keys and values: rings are full, codes are read."""
    g = torch.Generator().manual_seed(0)
    caches = make_kv(lowered.kv)
    for cache in caches.values():
        if cache.dtype == torch.int16:
            cache.random_(-(1 << 15), 1 << 15, generator=g)
        else:
            cache.copy_(torch.rand(cache.shape, generator=g) + 0.5 if cache.dim() == 3 else torch.randn(cache.shape, generator=g))
    return caches


def check_rows(directory: Path, monkeypatch: pytest.MonkeyPatch, turboquant: bool, rows: int = 2) -> None:
    """Every token of a step of two has, bit for bit, the logits and the sample of a step of one, and so have the caches."""
    monkeypatch.setitem(GEOMETRIES, "pair", PAIR)
    spread(monkeypatch)
    monkeypatch.setitem(gemv.ROWS_CONFIGS, (90, 4), gemv.RowsConfig(False, 128))
    path = directory / "pair.gguf"
    write_synthetic(path, "pair", "q4_k_m", 0)
    state = weights(path, directory)
    spec = graph_spec(path, turboquant=turboquant, residual_length=32, decode_bytes=TERMS, decode_rows=(1, 2), rows=rows)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        one, two = (lower(spec, entry, "cpu") for entry in ("decode", "decode_2"))
    called = {str(node.target).removeprefix("kiln.").removesuffix(".default") for node in two.program.graph.nodes}
    assert called >= {f"{op}_rows" if op in ("sliding_decode", "tq4_decode") else {"global_attention": "global_rows"}.get(op, op)
                      for op in OPS[turboquant]}  # fmt: skip
    together = poured(two)
    apart = {name: cache.clone() for name, cache in together.items()}
    with compiling_for(TARGET):
        step = runnable(two.program, state | together)
        alone = [runnable(one.program, state | {name: cache[row] for name, cache in apart.items()}) for row in range(rows)]
        for places in STEPS:
            places = [(pos, row % rows) for pos, row in places]
            pos, row = (torch.tensor(x) for x in zip(*places, strict=True))
            tokens = (pos * 7 + row * 31) % 300
            sampled, logits = step(tokens, pos, row, *sampling(row.tolist()))
            assert logits.isfinite().all() and logits.std() > 0
            found = {}
            for at in sorted(set(places)):
                i = places.index(at)
                found[at] = alone[at[1]](tokens[[i]], pos[[i]], *sampling([at[1]]))
            for i, at in enumerate(places):
                assert torch.equal(logits[i], found[at][1][0]) and int(sampled[i]) == int(found[at][0]), (places, i)
    for name, cache in apart.items():
        assert torch.equal(together[name], cache), name


@pytest.mark.nightly
@pytest.mark.parametrize("rows", [1, 2])  # of one, its window is read together
def interpreted_rows_of_16_bit_caches(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(tmp_path, monkeypatch, False, rows)


@pytest.mark.nightly
def interpreted_rows_of_turboquant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(tmp_path, monkeypatch, turboquant=True)


@pytest.mark.nightly
def interpreted_16_bit_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, monkeypatch, turboquant=False)


def interpreted_turboquant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, monkeypatch, turboquant=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gemma4-moe-tiny", "qwen3-moe-tiny"])
def interpreted_experts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, ops = EXPERTS[name]
    check(tmp_path, monkeypatch, False, dataclasses.replace(GEOMETRIES[name], **changed), ops)


@pytest.mark.nightly
@pytest.mark.parametrize("turboquant", [False, True])
def interpreted_hybrids(turboquant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, ops = HYBRIDS[turboquant]
    check(tmp_path, monkeypatch, turboquant, dataclasses.replace(GEOMETRIES["qwen35-moe-tiny"], **DELTA, **changed), ops)


test_kernels_interpreted = interpreted(__file__)
test_more_kernels_interpreted = pytest.mark.nightly(interpreted(__file__, "nightly"))
