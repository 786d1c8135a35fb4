"""The pass fuse_decode: what it takes and what it leaves, and that the fused graph computes the same, step after step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.gemv import GemvConfig
from kiln.exporter import build
from kiln.exporter.build import check_places
from kiln.exporter.compiler.torch_private import fake_export
from kiln.exporter.compiler.trace import lower, make_kv, runnable
from kiln.exporter.errors import KilnError
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools import synth
from kiln.passes import edit, fuse_decode
from kiln.passes.records import Lowered, PassOptions
from kiln.passes.verifier import verify
from tests.custom_ops.interpret import at_night
from tests.custom_ops.weights.test_linear import random_weight
from tests.timeline import FIXTURES, GREEDY, WINDOW, fixture_tokens, graph_spec, weights

aten, kiln = torch.ops.aten, torch.ops.kiln
NAME = "gemma4-tiny-dense-wide-Q4_K_M"  # 4 sliding layers, 2 global; V of another type than Q and K in some
STEPS = 2 * WINDOW + 4  # the ring wraps twice
EXACT_WINDOW = 8
ROUNDING = {3: 1e-5, 2: 5e-4, 1: 7e-2}  # relative error of logits, by the bytes of an activation, after 27 matmuls
TOKENS = fixture_tokens("gemma4-tiny-dense-wide")[:STEPS]
PLAIN = (kiln.quantized_linear.default, kiln.rms_norm.default, kiln.rope.default, kiln.gelu_mul.default, kiln.sliding_attention.default)


def count(program, *targets) -> int:
    return sum(edit.is_call(n, *targets) for n in program.graph.nodes)


def report(lowered: Lowered):
    return next(r for r in lowered.reports if r.name == "fuse_decode")


def stepped(step: Callable, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([step(tokens[i : i + 1], torch.tensor([i]), *GREEDY)[1] for i in range(len(tokens))]).float()


def decoded(lowered: Lowered, state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The logits [len(tokens), V] of decoding token by token from an empty cache."""
    return stepped(runnable(lowered.program, {**state, **make_kv(lowered.kv)}), tokens)


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a step."""
    return float(((logits - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, torch.Tensor]:
    return weights(FIXTURES / f"{NAME}.gguf", tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def unfused() -> dict[bool, Lowered]:
    """The graph that is not fused, in float32; with and without TurboQuant."""
    specs = {tq: graph_spec(FIXTURES / f"{NAME}.gguf", turboquant=tq, residual_length=EXACT_WINDOW) for tq in (False, True)}
    return {tq: lower(spec, "decode", "cpu") for tq, spec in specs.items()}


@pytest.fixture(scope="module")
def plain(state, unfused) -> dict[bool, torch.Tensor]:
    """Its logits."""
    return {tq: decoded(lowered, state, TOKENS) for tq, lowered in unfused.items()}


def options_of_matmuls(lowered: Lowered) -> list[dict]:
    matmuls = {getattr(kiln, name).default for name in ("fixed_linear", "fixed_linear_squares", "fixed_partials", "fixed_glu")}
    return [dict(n.kwargs) for n in lowered.program.graph.nodes if n.target in matmuls]


def test_the_pattern_is_gone() -> None:
    for tq in (False, True):
        before = lower(graph_spec(FIXTURES / f"{NAME}.gguf", turboquant=tq, residual_length=EXACT_WINDOW), "decode", "cpu")
        assert [count(before.program, target) for target in PLAIN] == [27, 43, 12, 6, 4]
        assert report(before).status == "off"
        after = lower(graph_spec(FIXTURES / f"{NAME}.gguf", turboquant=tq, residual_length=EXACT_WINDOW, decode_bytes=2), "decode", "cpu")
        assert [count(after.program, target) for target in PLAIN] == [0] * 5
        found = report(after)  # matmuls, norms, residual additions, GELUs, attentions
        assert (found.status, found.matches, found.expected, found.missed) == ("applied", 27 + 13 + 12 + 6 + 6, 64, ())
        assert found.note == f"2 bytes an activation; 27 matmuls, 13 norms, 6 gated, 4 sliding, 2 global, {0 if tq else 2} conversions"
        # the projections of 6 layers, V apart in 2 of them, leave their sums to the attention
        expected = {"norm_fixed": 1, "add_norm": 12, "fixed_glu": 6, "fixed_linear": 1, "fixed_linear_squares": 12, "fixed_partials": 8,
                    "sliding_decode": 4, "rope_table": 2, "tq4_decode": 2 if tq else 0, "tq4_attention": 0, "tq4_write": 0} | dict.fromkeys(
                        ("prepare_qkv", "global_attention", "fixed_point"), 0 if tq else 2)  # fmt: skip
        assert {name: count(after.program, getattr(kiln, name).default) for name in expected} == expected
        assert count(after.program, aten.index_copy_.default) == (0 if tq else 4)  # the caches of the global layers, which TQ4 has none of
        assert not count(after.program, aten.cos.default, aten.sin.default)
        assert options_of_matmuls(after) == [{"alone": True}] * 27
        assert [n.kwargs for n in after.program.graph.nodes if n.target == kiln.sliding_decode.default] == [{}] * 4
        assert [b.name for b in after.kv] == [b.name for b in before.kv]


def test_steps_of_several_tokens() -> None:
    """The ops of one token, but for attention; what the compiler would add up in an order of its own is refused."""
    rows = {"decode_bytes": 2, "decode_rows": (1, 2), "rows": 2}
    spec = graph_spec(FIXTURES / f"{NAME}.gguf", turboquant=True, residual_length=EXACT_WINDOW, **rows)
    beside = lower(spec, "decode", "cpu")  # of one token
    assert [n.kwargs for n in beside.program.graph.nodes if n.target == kiln.sliding_decode.default] == [{}] * 4
    assert options_of_matmuls(beside) == [{}] * 27
    for entry, op in (("decode", kiln.sliding_decode.default), ("decode_2", kiln.sliding_decode_rows.default)):  # of one row, read together
        given = rows | {"rows": 1}
        of_one_row = lower(graph_spec(FIXTURES / f"{NAME}.gguf", turboquant=True, residual_length=EXACT_WINDOW, **given), entry, "cpu")
        assert [n.kwargs for n in of_one_row.program.graph.nodes if n.target == op] == [{"slots": True}] * 4
    after = lower(spec, "decode_2", "cpu")
    found = report(after)
    assert (found.status, found.matches, found.expected, found.missed) == ("applied", 27 + 13 + 12 + 6 + 6, 64, ())
    expected = {"norm_fixed": 1, "add_norm": 12, "fixed_glu": 6, "fixed_linear": 1, "fixed_linear_squares": 12, "fixed_partials": 8,
                "sliding_decode_rows": 4, "tq4_decode_rows": 2, "rope_table": 2, "sample": 1, "tq4_write_rows": 0}  # fmt: skip
    assert {name: count(after.program, getattr(kiln, name).default) for name in expected} == expected
    assert not count(after.program, aten.index_put_.default, *fuse_decode.IN_ANY_ORDER)
    with pytest.raises(KilnError, match=r"of several tokens may add up in another order than of one"):
        lower(graph_spec(FIXTURES / "gemma4-tiny-edge-wide-Q4_K_M.gguf", allow_unfused=True, **rows), "decode_2", "cpu")
    for name, what in (("moe", r"blk.0.experts \(a choice of experts"), ("edge", r"per_layer_model_proj \(a per-layer embedding")):
        with pytest.raises(KilnError, match=f"decode_2: .* {what} of several tokens has no kernels yet.*; leave --decode-rows away"):
            check_places(graph_spec(FIXTURES / f"gemma4-tiny-{name}-wide-Q4_K_M.gguf", **rows))
    path = FIXTURES / f"{NAME}.gguf"
    plan = read_plan(path)
    for other, option in (("no-fuse-decode", {"fuse_decode": False}), ("allow-unfused", {"allow_unfused": True})):
        with pytest.raises(KilnError, match=f"keep a token's bits among others'; it does not go with --{other}"):
            build.graph_spec(build.ExportOptions(path, path, decode_rows=(1, 2), rows=2, **option), plan, ("sm_90",))


class Rounded(torch.fx.Interpreter):
    """The graph that is not fused, the activations of its matmuls rounded to fixed point as the fused one's are."""

    def __init__(self, module: nn.Module, terms: int):
        super().__init__(module)
        self.terms = terms

    def call_function(self, target, args, kwargs):
        if target is kiln.quantized_linear.default:
            x, *weight = args
            args = (fixed_point.dequantize(fixed_point.quantize(x.float(), self.terms)), *weight)
        return super().call_function(target, args, kwargs)


# What the pass may change is the order in which a root and a weight are multiplied. An activation on a boundary between two integers may
# then round the other way, and after it others do: so a byte's limit is about what its rounding loses. TQ4 turns it into other codes.
LIMITS = [(3, False, 1e-5), (2, False, 5e-4), (1, False, 7e-2), (3, True, 2e-2), (2, True, 2e-2), (1, True, 1e-1)]


@pytest.mark.parametrize("terms, tq, limit", [each if each[0] == 3 else pytest.param(*each, marks=pytest.mark.nightly) for each in LIMITS])
def test_outputs(terms: int, tq: bool, limit: float, state, unfused, plain) -> None:
    module = runnable(unfused[tq].program, {**state, **make_kv(unfused[tq].kv)})
    expected = stepped(Rounded(module, terms).run, TOKENS)
    spec = graph_spec(FIXTURES / f"{NAME}.gguf", turboquant=tq, residual_length=EXACT_WINDOW, decode_bytes=terms)
    found = decoded(lower(spec, "decode", "cpu"), state, TOKENS)
    rounding = error(expected, plain[tq])
    print(f"{terms} bytes, TurboQuant {tq}: {error(found, expected):.1e} off the rounded graph, which is {rounding:.1e} off the exact one")
    assert error(found, expected) < limit
    assert rounding < ROUNDING[terms] or tq


@pytest.mark.nightly
def test_bfloat16_is_closer_than_unfused(state, plain) -> None:
    """The residual stream stays float32 and two bytes lose less than bfloat16 does."""
    errors = []
    for terms in (0, 2):
        spec = graph_spec(FIXTURES / f"{NAME}.gguf", dtype="bfloat16", decode_bytes=terms)
        errors.append(error(decoded(lower(spec, "decode", "cpu"), state, TOKENS), plain[False]))
    print("bfloat16, unfused and fused: {:.1e} {:.1e}".format(*errors))
    assert errors[1] < errors[0] < 0.2


def test_prefill_is_left_alone() -> None:
    graphs = []
    for terms in (0, 2):
        lowered = lower(graph_spec(FIXTURES / f"{NAME}.gguf", decode_bytes=terms), "prefill", "cpu")
        graphs.append([(n.op, str(n.target), n.name) for n in lowered.program.graph.nodes])
    assert graphs[0] == graphs[1] and (report(lowered).status, report(lowered).note) == ("not needed", "many tokens")


def test_a_model_of_float_weights_is_left_alone() -> None:
    lowered = lower(graph_spec(FIXTURES / "gemma4-tiny-dense.gguf", decode_bytes=2), "decode", "cpu")
    assert (report(lowered).status, report(lowered).note) == ("not needed", "no weight is packed")
    assert count(lowered.program, kiln.rope.default) and not count(lowered.program, aten.zeros.default)


# Tensors of another type; what the report counts: matmuls, norms, GELUs, attentions, conversions; matmuls with float weights; what else
# stays; the places that are missed, and one of them as it is told.
VARIATIONS = {
    "output and down in F32": ({"attn_output": "F32", "ffn_down": "F32"}, (15, 13, 0, 0, 0, 0), 12, {"sliding_attention": 5, "gelu_mul": 6},
                               {"attn_output": 6, "ffn_down": 6, "attention": 6, "glu": 6}, "blk.0.glu (blk.0.ffn_down is F32)"),
    # the residual stream is rounded before a norm that is not fused: five of them follow a layer
    "projections in F32": ({"attn_q": "F32", "attn_k": "F32", "attn_v": "F32"}, (19, 7, 6, 5, 1, 1), 6, {"rms_norm": 11, "rope": 0},
                           {"attn_qkv": 5, "attn_qk": 1, "attn_norm": 6, "post_ffw_norm": 5}, "blk.1.attn_qkv (its weight is F32)"),
    "gate apart from up": ({"ffn_gate": "Q6_K"}, (33, 13, 0, 5, 1, 7), 0, {"gelu_mul": 6, "rms_norm": 0}, {"glu": 6},
                           "blk.2.glu (gate is Q6_K, up Q4_K)"),
    "value apart": ({"attn_v": "Q6_K"}, (30, 13, 6, 5, 1, 1), 0, {"rms_norm": 0}, {}, None),
    "query, key and value apart": ({"attn_q": "Q6_K", "attn_v": "Q8_0"}, (36, 13, 6, 5, 1, 1), 0, {"rms_norm": 0}, {}, None),
}  # fmt: skip


def varied(tmp_path, monkeypatch, kinds: dict[str, str]):
    """A small model of random weights, its tensors `kinds` of other types."""
    plan = synth.synth_plan

    def changed(*arguments):
        return [(name, shape, kinds.get(name.split(".")[-2], kind)) for name, shape, kind in plan(*arguments)]

    monkeypatch.setattr(synth, "synth_plan", changed)
    synth.write_synthetic(tmp_path / "model.gguf", "tiny", "q4_k_m", 0)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", ["projections in F32", *at_night(*(name for name in VARIATIONS if name != "projections in F32"))])
def test_variations(name: str, tmp_path, monkeypatch) -> None:
    kinds, counts, linear, left, missed, told = VARIATIONS[name]
    path = varied(tmp_path, monkeypatch, kinds)
    state = weights(path, tmp_path)
    plain, fused = (lower(graph_spec(path, decode_bytes=terms, allow_unfused=True), "decode", "cpu") for terms in (0, 3))
    matmuls, norms, gated, sliding, full, conversions = counts
    expected = f"{matmuls} matmuls, {norms} norms, {gated} gated, {sliding} sliding, {full} global, {conversions} conversions"
    assert report(fused).note == f"3 bytes an activation; {expected}"
    assert Counter(place.split(" ")[0].split(".")[-1] for place in report(fused).missed) == missed
    assert report(fused).expected == report(fused).matches + len(report(fused).missed)
    if told:
        assert told in report(fused).missed
        counted = f"pass fuse_decode rewrote {report(fused).matches} of {report(fused).expected} places; not"
        with pytest.raises(KilnError, match=counted):
            lower(graph_spec(path, decode_bytes=3), "decode", "cpu")
    with pytest.raises(KilnError, match="decode: pass fuse_decode does not rewrite blk") if told else nullcontext():
        check_places(graph_spec(path, decode_bytes=3))  # before anything is traced
    check_places(graph_spec(path, decode_bytes=3, allow_unfused=True))
    assert count(fused.program, kiln.quantized_linear.default) == 0
    for op, number in left.items():
        assert count(fused.program, getattr(kiln, op).default) == number
    assert count(fused.program, aten.linear.default) == count(plain.program, aten.linear.default) == linear
    assert error(decoded(fused, state, TOKENS[:6]), decoded(plain, state, TOKENS[:6])) < 2e-5


def test_for_a_gpu_projections_come_in_parts(tmp_path, monkeypatch) -> None:
    """q and k of one matmul share its parts; matmuls of their own may be split differently and are added up first."""
    monkeypatch.setitem(gemv.GEMV_CONFIGS, 90, GemvConfig(warps=1))  # the warps of a program would share the little there is
    monkeypatch.setattr(gemv, "sums_fit", lambda *_: False)  # which splits no block of 256, and a row here is one
    paths = FIXTURES / f"{NAME}.gguf", varied(tmp_path, monkeypatch, {"attn_q": "Q6_K", "attn_v": "Q8_0"})
    for path, apart in zip(paths, (False, True), strict=True):
        with compiling_for(gpu_targets()["sm_90"]):
            lowered = lower(graph_spec(path, dtype="bfloat16", decode_bytes=2, materializes_head=False), "decode", "cuda")
        calls = [n for n in lowered.program.graph.nodes if edit.is_call(n, kiln.sliding_decode.default, kiln.prepare_qkv.default)]
        assert len(calls) == 6
        for call in calls:
            q, k, v = (a.meta["val"] for a in call.args[:3])
            assert q.shape[0] == k.shape[0] == 1 if apart else q.shape[0] == k.shape[0] > 1
            assert v.shape[0] > 1 or (apart and call.target is kiln.prepare_qkv.default)


class Stream(nn.Module):
    """A branch whose norm has another epsilon than the norm after it, then a product."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        words, halves, _ = random_weight("Q4_K", 64, 256)
        self.words, self.halves = (nn.Parameter(torch.zeros_like(t), requires_grad=False) for t in (words, halves))
        self.first, self.second = (nn.Parameter(torch.ones(256), requires_grad=False) for _ in range(2))

    def forward(self, tokens, x, branch):
        y = x + kiln.rms_norm(branch, self.first, self.eps, torch.float32)
        out = kiln.quantized_linear(kiln.rms_norm(y, self.second, 1e-6, torch.float32), self.words, self.halves, "Q4_K")
        return out + tokens, y


@pytest.mark.parametrize("eps, fused", [(1e-6, True), (1e-1, False)])
def test_epsilons_must_agree(eps: float, fused: bool) -> None:
    shapes = ((1,), torch.int64), ((1, 256), torch.float32), ((1, 256), torch.float32)
    program = fake_export(lambda: Stream(eps), lambda: tuple(torch.empty(s, dtype=d) for s, d in shapes), None, "cpu")
    words, halves, _ = random_weight("Q4_K", 64, 256)
    g = torch.Generator().manual_seed(0)
    state = {"words": words, "halves": halves} | {n: torch.rand(256, generator=g) for n in ("first", "second")}
    inputs = torch.zeros(1, dtype=torch.int64), torch.randn(1, 256, generator=g), torch.randn(1, 256, generator=g)
    before = [t.clone() for t in runnable(program, state)(*inputs)]
    fuse_decode.run(Lowered(program), PassOptions(decode_bytes=3))
    edit.finish(program)
    verify(program, "test")
    assert (count(program, kiln.add_norm.default), count(program, kiln.norm_fixed.default)) == ((1, 0) if fused else (0, 1))
    for found, expected in zip(runnable(program, state)(*inputs), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)
