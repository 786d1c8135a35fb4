"""Each pass: the pattern is there before, gone after, outputs are equal, a near-miss is untouched, no match is an error."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.attention.flash import attend
from kiln.custom_ops.tq4 import codec
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.compiler.torch_private import fake_export
from kiln.exporter.compiler.trace import lower, make_kv, runnable, trace
from kiln.exporter.errors import KilnError
from kiln.exporter.model.caches import kv_plan
from kiln.passes import chunked_lm_head, edit, free_kv_buffers, index_copy, kv_len, own_matmul, turboquant
from kiln.passes.edit import PassError
from kiln.passes.pipeline import PIPELINE, run_pipeline
from kiln.passes.records import Lowered, PassOptions, PassReport
from kiln.passes.verifier import verify
from tests.custom_ops.tq4 import tq4_cache
from tests.timeline import FIXTURES, GREEDY, graph_spec, weights

aten, kiln = torch.ops.aten, torch.ops.kiln
WIDE = FIXTURES / "gemma4-tiny-dense-wide-Q4_K_M.gguf"  # 2 global layers of head size 128


def count(program, *targets) -> int:
    return sum(edit.is_call(n, *targets) for n in program.graph.nodes)


def export(module, *inputs):
    return fake_export(module, lambda: tuple(torch.empty(shape, dtype=dtype) for shape, dtype in inputs), None, "cpu")


def run(pass_, program, **options):
    lowered = Lowered(program)
    report = pass_.run(lowered, PassOptions(**options))
    edit.finish(program)
    verify(program, "test")
    return lowered, report


class Cache(nn.Module):
    """A cache [8, 2, 64] written in the way `write` does it."""

    def __init__(self, write, head_dim=64):
        super().__init__()
        self.write = write
        self.register_buffer("k", torch.zeros(8, 2, head_dim))

    def forward(self, x, pos):
        self.write(self.k, x, pos)
        return self.k.sum(0) + 0


def put(cache, x, pos):
    cache[pos] = x


def put_slice(cache, x, pos):
    cache[2:5] = x


def put_middle(cache, x, pos):
    cache[:, pos] = x


CACHE_INPUTS = (((3, 2, 64), torch.float32), ((3,), torch.int64))


@pytest.mark.parametrize("write", [put, put_slice])
def test_index_copy(write):
    program = export(lambda: Cache(write), *CACHE_INPUTS)
    pattern = (aten.index_put_.default,) if write is put else (aten.copy_.default,)
    assert count(program, *pattern) == 1
    x, pos = torch.randn(3, 2, 64), torch.tensor([4, 0, 6])
    before = runnable(program, {"k": torch.zeros(8, 2, 64)})(x, pos)
    _, report = run(index_copy, program)
    assert report.matches == 1 and count(program, *pattern) == 0 and count(program, aten.index_copy_.default) == 1
    assert torch.equal(runnable(program, {"k": torch.zeros(8, 2, 64)})(x, pos), before)


def test_index_copy_of_one_token():
    program = export(lambda: Cache(put), ((1, 2, 64), torch.float32), ((1,), torch.int64))  # Python strips the 1 off the value
    x = torch.randn(1, 2, 64)
    _, report = run(index_copy, program)
    assert report.matches == 1
    assert torch.equal(runnable(program, {"k": torch.zeros(8, 2, 64)})(x, torch.tensor([5])), x[0])


def test_index_copy_of_rows():
    """A step of several tokens writes by row and position, here 8 rows of 2 slots."""
    program = export(lambda: Cache(lambda cache, x, pos: cache.index_put_((pos, pos % 2), x[:, 0])), *CACHE_INPUTS)
    x, pos = torch.randn(3, 2, 64), torch.tensor([4, 0, 7])
    before = runnable(program, {"k": torch.zeros(8, 2, 64)})(x, pos)
    _, report = run(index_copy, program)
    assert report.places == ("k",)
    cache = torch.zeros(8, 2, 64)
    assert torch.equal(runnable(program, {"k": cache})(x, pos), before) and torch.equal(cache[pos, pos % 2], x[:, 0])


def test_index_copy_along_another_dimension():
    program = export(lambda: Cache(put_middle), ((8, 1, 64), torch.float32), ((1,), torch.int64))
    _, report = run(index_copy, program)
    assert report.matches == 1
    (node,) = (n for n in program.graph.nodes if edit.is_call(n, aten.index_copy_.default))
    assert node.args[1] == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda cache, x, pos: cache.index_put_((pos,), x, accumulate=True),
        lambda cache, x, pos: cache.index_put_((pos,), x[:1]),  # broadcast
        lambda cache, x, pos: cache.index_put_((pos, torch.zeros_like(pos)), x[:, 0], accumulate=True),
        lambda cache, x, pos: cache.index_put_((pos, torch.zeros_like(pos)), x[:1, 0]),  # broadcast
    ],
)
def test_index_copy_near_miss(write):
    def both(cache, x, pos):
        write(cache, x, pos)
        cache[pos] = x

    program = export(lambda: Cache(both), *CACHE_INPUTS)
    assert count(program, aten.index_put_.default) == 2
    _, report = run(index_copy, program)
    assert report.matches == 1 and count(program, aten.index_put_.default) == 1


def test_index_copy_without_a_cache_write_is_an_error():
    program = export(lambda: Cache(lambda cache, x, pos: cache.add_(1.0)), *CACHE_INPUTS)
    with pytest.raises(PassError, match="index_copy: no cache write"):
        run(index_copy, program)


class Attention(nn.Module):
    def __init__(self, head_dim=64, also_read=False, shift=0):
        super().__init__()
        self.also_read, self.shift = also_read, shift
        self.cache = nn.Module()
        self.cache.register_buffer("k_cache", torch.zeros(32, 2, head_dim))
        self.cache.register_buffer("v_cache", torch.zeros(32, 2, head_dim))

    def forward(self, q, k, v, pos):
        slot = pos + self.shift if self.shift else pos
        self.cache.k_cache.index_copy_(0, slot, k)
        self.cache.v_cache.index_copy_(0, slot, v)
        out = kiln.global_attention(q, self.cache.k_cache, self.cache.v_cache, pos, None)
        return out + self.cache.k_cache.sum() if self.also_read else out + 0


def attention_inputs(head_dim=64, tokens=3):
    shapes = ((tokens, heads, head_dim) for heads in (4, 2, 2))
    return *((shape, torch.float32) for shape in shapes), ((tokens,), torch.int64)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_turboquant(tokens, center):
    """Chunks shorter than the exact window of 4, as long, and longer, over which it wraps: the newest 4 keys are exact, others coded."""
    program = export(Attention, *attention_inputs(tokens=tokens))
    _, report = run(turboquant, program, turboquant=True, residual_length=4, key_center=center)
    note = "keys less the mean of the first 3" if center else "keys as they are"
    assert (report.matches, report.note) == (1, f"residual length 4, {note}")
    assert count(program, kiln.global_attention.default) == 0
    order = [n.target for n in program.graph.nodes if edit.written_args(n) or edit.is_call(n, kiln.tq4_attention.default)]
    assert order == [kiln.tq4_write.default, kiln.tq4_attention.default] + [aten.index_copy_.default] * 2
    state = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in program.state_dict.items()}
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == {
        f"cache.{side}_{what}": found
        for side in "kv"
        for what, found in {
            "codes": ((2, 32, 16), torch.int16), "scales": ((2, 32), torch.float16), "exact": ((4, 2, 64), torch.float32)
        }.items()
    } | ({"cache.k_center": ((2, 64), torch.float32)} if center else {})  # fmt: skip
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(18, heads, 64, generator=g) for heads in (4, 2, 2))
    layer = runnable(program, state)
    outs = [layer(q[pos], k[pos], v[pos], pos).clone() for pos in torch.arange(18).split(tokens) if len(pos) == tokens]
    end = len(outs) * tokens
    mean = tq4_cache.center_of(k, 4) if center else None
    torch.testing.assert_close(torch.cat(outs).double(), tq4_cache.exact(q[:end], k[:end], v[:end], 0, 4, mean), rtol=1e-5, atol=1e-5)
    newest = torch.arange(end - 4, end)
    for side, x in (("k", k), ("v", v)):
        assert torch.equal(state[f"cache.{side}_exact"][newest % 4], x[newest])


def test_turboquant_near_miss_and_errors():
    program = export(lambda: Attention(also_read=True), *attention_inputs())  # someone else reads the cache
    with pytest.raises(PassError, match="no global attention"):
        run(turboquant, program, turboquant=True)
    assert count(program, kiln.global_attention.default) == 1
    program = export(lambda: Attention(shift=1), *attention_inputs())  # written elsewhere than where it is read
    with pytest.raises(PassError, match="no global attention"):
        run(turboquant, program, turboquant=True)
    with pytest.raises(PassError, match="head size 96"):
        run(turboquant, export(lambda: Attention(96), *attention_inputs(96)), turboquant=True)
    with pytest.raises(PassError, match="residual length 0; expected at least 1"):
        run(turboquant, export(Attention, *attention_inputs()), turboquant=True, residual_length=0, key_center=False)
    with pytest.raises(PassError, match="residual length 28; expected at least 32"):
        run(turboquant, export(Attention, *attention_inputs()), turboquant=True, residual_length=28, decode_rows=(1, 8))
    _, report = run(turboquant, export(Attention, *attention_inputs()))
    assert report.status == "off"


def test_kv_len():
    program = export(Attention, *attention_inputs())
    args = torch.randn(3, 4, 64), torch.randn(3, 2, 64), torch.randn(3, 2, 64), torch.arange(3)
    fresh = lambda: {k: torch.full((32, 2, 64), 7.0) for k in program.state_dict}  # noqa: E731
    before = runnable(program, fresh())(*args)
    _, report = run(kv_len, program)
    (call,) = (n for n in program.graph.nodes if edit.is_call(n, kiln.global_attention.default))
    length = call.args[-1].meta["val"]
    assert report.matches == 1 and length.dtype == torch.int32 and length.shape == (1,)
    assert torch.equal(runnable(program, fresh())(*args), before)
    with pytest.raises(PassError, match="kv_len: no global attention without"):
        run(kv_len, program)  # every attention has one now


class Head(nn.Module):
    def __init__(self, name, dtype, n=300, k=256):
        super().__init__()
        self.name = name
        self.register_buffer("k", torch.zeros(4))
        holder = nn.Module()
        setattr(self, name, holder)
        if dtype == "Q6_K":
            holder.words = nn.Parameter(torch.zeros(k // 256, 52, n, dtype=torch.int32), requires_grad=False)
            holder.halves = nn.Parameter(torch.zeros(k // 256, 1, n, dtype=torch.float16), requires_grad=False)
        else:
            holder.weight = nn.Parameter(torch.zeros(n, k, dtype=dtype), requires_grad=False)

    def forward(self, x):
        self.k.add_(1.0)
        holder = getattr(self, self.name)
        if hasattr(holder, "words"):
            return kiln.quantized_linear(x, holder.words, holder.halves, "Q6_K")
        return nn.functional.linear(x, holder.weight.float())


@pytest.mark.parametrize("dtype", ["Q6_K", torch.bfloat16])
def test_chunked_lm_head(dtype):
    program = export(lambda: Head("token_embd", dtype), ((1, 256), torch.float32))
    torch.manual_seed(0)
    state = {
        n: torch.randint(0, 1 << 30, t.shape, dtype=t.dtype) if t.dtype == torch.int32 else torch.randn(t.shape).to(t.dtype)
        for n, t in program.state_dict.items()
    }
    x = torch.randn(1, 256)
    before = runnable(program, state)(x)
    op = kiln.quantized_linear.default if dtype == "Q6_K" else aten.linear.default
    _, report = run(chunked_lm_head, program, materialized_head_budget=128 * 256 * 4)
    assert (report.status, report.matches) == ("applied", 1)
    calls = [n for n in program.graph.nodes if edit.is_call(n, op)]
    assert [c.meta["val"].shape[-1] for c in calls] == [128, 128, 44]
    assert torch.allclose(runnable(program, state)(x), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())


def test_chunked_lm_head_near_miss():
    program = export(lambda: Head("ffn_down", "Q6_K"), ((1, 256), torch.float32))  # not a head
    with pytest.raises(PassError, match="no head found"):
        run(chunked_lm_head, program, materialized_head_budget=1024)
    program = export(lambda: Head("token_embd", torch.float32), ((1, 256), torch.float32))  # float32 is used as it is
    _, report = run(chunked_lm_head, program, materialized_head_budget=1024)
    assert report.status == "not needed" and count(program, aten.linear.default) == 1
    _, report = run(chunked_lm_head, program, materializes_head=False)
    assert report.status == "not needed"


class Floats(nn.Module):
    """Two matmuls with float weights, and one that is no plain matmul."""

    def __init__(self):
        super().__init__()
        for name, n, k in (("first", 24, 16), ("second", 8, 24), ("third", 8, 8)):
            setattr(self, name, nn.Parameter(torch.zeros(n, k), requires_grad=False))
        self.bias = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x):
        x = nn.functional.linear(torch.tanh(nn.functional.linear(x, self.first)), self.second)
        return nn.functional.linear(x, self.third, self.bias)


def test_own_matmul():
    program = export(Floats, ((5, 16), torch.float32))
    torch.manual_seed(0)
    state, x = {n: torch.randn(t.shape) for n, t in program.state_dict.items()}, torch.randn(5, 16)
    before = runnable(program, state)(x)
    _, report = run(own_matmul, program, matmul="blas")
    assert report.status == "off" and count(program, aten.linear.default) == 3
    _, report = run(own_matmul, program, matmul="kiln")
    assert (report.status, report.matches) == ("applied", 2)
    assert count(program, kiln.matmul.default) == 2 and count(program, aten.linear.default) == 1
    assert torch.allclose(runnable(program, state)(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_linear(dtype, tmp_path):
    """Every packed weight is multiplied where it lies, the head in one piece whatever its budget; the outputs are what they were."""
    state, tokens = weights(WIDE, tmp_path), torch.arange(3)
    outputs = []
    for reads_packed in (False, True):
        budget = {"materialized_head_budget": 64 << 10} if reads_packed else {}
        spec = graph_spec(WIDE, dtype=dtype, reads_packed=reads_packed, **budget)
        lowered = lower(spec, "prefill", "cpu")
        (report,) = (r for r in lowered.reports if r.name == "packed_linear")
        packed = [p.name for p in spec.plan if p.block_type in LAYOUTS and p.K]
        assert (report.status, sorted(report.places)) == (("applied", sorted(packed)) if reads_packed else ("off", []))
        assert report.expected == report.matches and not report.missed
        assert (count(lowered.program, kiln.quantized_linear.default) == 0) == reads_packed
        assert count(lowered.program, kiln.packed_linear.default) == (len(packed) if reads_packed else 0)
        module = runnable(lowered.program, {**state, **make_kv(lowered.kv)})
        outputs.append(module(tokens, torch.arange(3), *GREEDY)[1])
    assert torch.equal(*outputs)


def test_packed_linear_of_what_does_not_fit():
    words, halves = torch.zeros(1, 35, 4, dtype=torch.int32), torch.zeros(1, 2, 4, dtype=torch.float16)
    for x in (torch.zeros(2, 255), torch.zeros(256), torch.zeros(2, 256, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"packed_linear: x is .*; expected float32 \[T, 256\]"):
            kiln.packed_linear(x, words, halves, "Q4_K")


def test_what_is_missed_is_an_error_or_told(monkeypatch):
    """A pass that takes one layer of two, and one that takes what the model does not have."""
    take = {"places": ("blk.1.attention",)}

    def part(lowered, options):
        return PassReport("part", "applied", take["places"])

    monkeypatch.setattr("kiln.passes.pipeline.PIPELINE", (("part", part),))
    program, expected = trace(graph_spec(WIDE), "decode", "cpu"), {"part": {"blk.1.attention": "", "blk.5.attention": "V is F16"}}
    missed = "pass part rewrote 1 of 2 places; not blk.5.attention (V is F16)"
    with pytest.raises(PassError, match=re.escape(missed + "; --allow-unfused exports the model as it is, slower")):
        run_pipeline(program, PassOptions(), expected=expected)
    (report,) = run_pipeline(program, PassOptions(allow_unfused=True), expected=expected).reports
    assert report.shortfall == missed and report.to_dict() == {
        "name": "part", "status": "applied", "expected": 2, "matches": 1, "missed": ["blk.5.attention (V is F16)"], "note": ""
    }  # fmt: skip
    take["places"] = ("blk.1.attention", "blk.5.attention", "blk.2.attention")
    with pytest.raises(PassError, match="pass part rewrote blk.2.attention, which the model is not expected to have"):
        run_pipeline(program, PassOptions(allow_unfused=True), expected=expected)
    take["places"] = take["places"][:2]
    assert run_pipeline(program, PassOptions(), expected=expected).reports[0].shortfall == ""


class Tokens(nn.Module):
    def forward(self, tokens):
        return tokens + 1


def test_a_narrowed_length_is_seen():
    dynamic = {"tokens": {0: torch.export.Dim("T", min=2, max=24)}}
    program = fake_export(Tokens, lambda: (torch.empty(23, dtype=torch.int64),), dynamic, "cpu")
    length = edit.user_input(program, "tokens").meta["val"].shape[0]
    assert edit.symbolic(length) and edit.bounds(length) == (2, 24)
    assert bool(length > 10)  # a guard, which nobody checks at run time
    assert edit.symbolic(length) and edit.bounds(length) == (11, 24)


def test_free_kv_buffers():
    program = torch.export.export(Cached(), (torch.zeros(1),))  # an export with real tensors
    size = program.state_dict["blk.3.cache.k_ring"].nbytes
    lowered, report = run(free_kv_buffers, program)
    assert report.note == f"{size} bytes freed"
    assert type(program.state_dict["blk.3.cache.k_ring"]).__name__ == "FakeTensor"
    (kv,) = lowered.kv
    assert (kv.name, kv.layer, kv.kind, kv.dtype, kv.shape, kv.nbytes) == ("blk.3.cache.k_ring", 3, "ring", torch.float32, (1000,), size)
    assert torch.equal(runnable(program, make_kv(lowered.kv))(torch.ones(1)), torch.ones(1))


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.blk = nn.ModuleDict({"3": nn.ModuleDict({"cache": nn.Module()})})
        self.blk["3"]["cache"].register_buffer("k_ring", torch.zeros(1000))

    def forward(self, x):
        self.blk["3"]["cache"].k_ring.add_(x)
        return self.blk["3"]["cache"].k_ring.max() * x


class Coded(torch.fx.Interpreter):
    """The graph without TurboQuant, its global attention over keys (less their center) and values as the codec leaves them, the newest 8
    exact."""

    def call_function(self, target, args, kwargs):
        if target is not kiln.global_attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v, pos, _ = args
        distance = pos[:, None] - torch.arange(len(pos))
        mask = torch.cat([distance >= 8, (distance >= 0) & (distance < 8)], 1)
        sides = []
        for x, center in ((k[: len(pos)], k[:6].mean(0)), (v[: len(pos)], torch.zeros(1))):
            sides.append(torch.cat([codec.decode(*codec.encode(x - center)) + center, x]))
        return attend(q, *sides, mask)


def test_pipeline_on_the_decoder(tmp_path):
    """Every pass on a quantized decoder: counts, the KV plan, the dumps, and TurboQuant's outputs close to the exact ones."""
    state = weights(WIDE, tmp_path)
    outputs = {}
    for tq in (False, True):
        spec = graph_spec(WIDE, turboquant=tq, residual_length=8, materialized_head_budget=64 << 10)
        for entry in ("decode", "prefill"):
            lowered = lower(spec, entry, "cpu", dump=tmp_path / str(tq))
            assert [r.name for r in lowered.reports] == [n for n, _ in PIPELINE]
            assert [r.matches for r in lowered.reports] == [12, 2 * tq, 2, 1, 0, 0, 0, 0, 22 if tq else 12]
            assert all(r.expected == r.matches and not r.missed for r in lowered.reports)
        plan = kv_plan(spec.config, spec.max_seq_len, spec.model_dtype, spec.options)
        assert sorted(map(str, plan)) == sorted(map(str, lowered.kv))
        assert len(list((tmp_path / str(tq) / "prefill").iterdir())) == 1 + len(PIPELINE)
        tokens = torch.arange(40) % 512
        module = runnable(lowered.program, {**state, **make_kv(lowered.kv)})
        _, outputs[tq] = module(tokens, torch.arange(40), *GREEDY)
        if not tq:
            module = runnable(lowered.program, {**state, **make_kv(lowered.kv)})
            _, expected = Coded(module).run(tokens, torch.arange(40), *GREEDY)
    assert (outputs[True] - expected).norm() < 1e-4 * expected.norm() < 0.1 * (outputs[False] - expected).norm()
    assert count(lowered.program, kiln.sliding_attention.default) == 4


class TestVerifier:
    def test_rejects_a_wrong_shape(self):
        program = export(lambda: Cache(put), *CACHE_INPUTS)
        node = next(n for n in program.graph.nodes if edit.is_call(n, aten.sum.dim_IntList))
        node.meta["val"] = node.meta["val"][0]
        with pytest.raises(PassError, match="sum"):
            verify(program, "test")

    def test_rejects_a_host_read(self):
        program = export(lambda: Cache(put), *CACHE_INPUTS)
        pos = edit.user_input(program, "pos")
        with program.graph.inserting_after(pos):
            program.graph.call_function(aten._local_scalar_dense.default, (pos,))
        with pytest.raises(PassError, match="on the host"):
            verify(program, "test")

    def test_rejects_a_cache_never_written(self):
        program = export(lambda: Cache(put), *CACHE_INPUTS)
        write = next(n for n in program.graph.nodes if edit.is_call(n, aten.index_put_.default))
        edit.replace(program, write, write.args[0])
        with pytest.raises(PassError, match=r"never written: \['k'\]"):
            verify(program, "test")

    def test_rejects_an_output_that_is_a_cache(self):
        program = export(lambda: Cache(put), *CACHE_INPUTS)
        output = next(n for n in program.graph.nodes if n.op == "output")
        write = next(n for n in program.graph.nodes if edit.is_call(n, aten.index_put_.default))
        output.args = ((write,),)
        with pytest.raises(PassError, match="is memory of b_k"):
            verify(program, "test")

    def test_rejects_a_foreign_operator(self):
        program = export(lambda: Cache(put), *CACHE_INPUTS)
        node = next(n for n in program.graph.nodes if edit.is_call(n, aten.sum.dim_IntList))
        node.target = torch.relu
        with pytest.raises(PassError, match="no operator"):
            verify(program, "test")


def its_value(graph, node):
    node.meta["val"] = node.meta["val"].new_empty(3)


def its_argument(graph, node):
    node.update_arg(0, next(n for n in graph.nodes if n.name == "tokens"))


def its_inputs_value(graph, node):
    logits = node.args[0]
    logits.meta["val"] = logits.meta["val"].to(torch.float64)


def its_operator(graph, node):
    node.target = aten.cat.default


@pytest.mark.parametrize("change, named", [(its_value, "sample"), (its_argument, "sample"), (its_inputs_value, ""), (its_operator, "")])
def test_a_broken_pass_is_named(monkeypatch, change, named):
    """Whatever of a node it changed: what was verified before it is computed again."""
    from kiln.passes import pipeline

    def broken(lowered, options):
        graph = lowered.program.graph
        change(graph, next(n for n in graph.nodes if edit.is_call(n, kiln.sample.default)))

    monkeypatch.setattr(pipeline, "PIPELINE", (("broken", broken),))
    with pytest.raises(KilnError, match=f"after pass broken: broken: {named}"):  # the error that the command knows
        lower(graph_spec(WIDE), "decode", "cpu")
