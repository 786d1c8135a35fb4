"""Steps of several tokens, each of one of several rows of caches: each token has the bits that it has in steps of one token, and so do the
caches; what else the step holds changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import triton

from kiln.custom_ops.attention import flash, sliding_cut
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.tq4 import attention
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.step import test_sample

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)

H200 = gpu_targets()["sm_90"]
EPS, SPARE = 1e-6, 3
kiln = torch.ops.kiln
# (position, row) of a step's tokens: of one row and of two, in any order, one twice; short, as long as a ring, wrapped
STEPS = {
    "begin": [(0, 1), (1, 1), (0, 0), (1, 1)],
    "wrapped": [(41, 0), (15, 1), (40, 0), (42, 0)],
    "two": [(16, 0), (40, 1)],
}
CENTERS = {  # about a window of 32: the last key of a center, amid a step; the first key that is coded, the first code that is read
    "center": [(23, 0), (22, 0), (24, 0), (45, 1)],
    "first": [(30, 1), (31, 1), (32, 1), (33, 1), (7, 0)],
}
STEPS_OF_TQ4 = STEPS | CENTERS


@dataclasses.dataclass
class Step:
    """Projections in parts of the tokens of a step, as fused matmuls leave them: q and k columns of one tensor."""

    qk: torch.Tensor
    v: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor
    pos: torch.Tensor
    row: torch.Tensor
    heads: int
    dim: int

    @classmethod
    def random(cls, name: str, heads: int, kv_heads: int, dim: int, parts: int = 3, v_parts: int = 5) -> Step:
        g = torch.Generator().manual_seed(len(name))
        tokens = STEPS_OF_TQ4[name]
        token = [tokens.index(t) for t in tokens]  # those of one row and position are the same
        qk = torch.randn(parts, len(tokens), (heads + kv_heads) * dim, generator=g)[:, token]
        v = torch.randn(v_parts, len(tokens), kv_heads * dim, generator=g)[:, token]
        angle = (torch.rand(len(tokens), dim // 2, generator=g) * 6)[token]
        weights = [torch.rand(dim, generator=g) * dim**-0.25 * 2 for _ in range(2)]
        pos, row = torch.tensor(tokens).unbind(1)
        return cls(qk, v, (weights[0], weights[1]), angle.cos(), angle.sin(), pos.contiguous(), row.contiguous(), heads, dim)

    def projections(self, i: int | None = None) -> tuple[torch.Tensor, ...]:
        """Of all tokens, or of one alone: q, k, v, their weights, cos, sin."""
        qk, v, cos, sin = self.qk, self.v, self.cos, self.sin
        if i is not None:
            qk, v, cos, sin = qk[:, i].contiguous(), v[:, i].contiguous(), cos[[i]], sin[[i]]
        size = self.heads * self.dim
        return qk[..., :size], qk[..., size:], v, *self.weights, cos, sin

    def in_order(self) -> list[int]:
        """Each token once, a row's by position."""
        tokens = list(zip(self.pos.tolist(), self.row.tolist(), strict=True))
        return sorted({tokens.index(t) for t in tokens}, key=lambda i: tokens[i])

    def check(self, together: torch.Tensor, alone: dict[int, torch.Tensor]) -> None:
        tokens = list(zip(self.pos.tolist(), self.row.tolist(), strict=True))
        for i, token in enumerate(tokens):
            assert torch.equal(together[i : i + 1], alone[tokens.index(token)]), (i, token)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also where both are NaN."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def rings(step: Step, kv_heads: int, slots: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """[2, slots, KV, D] of keys and of values: what each row held before its first token of the step, NaN where nothing was written."""
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        ring = torch.full((2, slots, kv_heads, step.dim), float("nan"), dtype=dtype)
        for row in range(2):
            first = min([p for p, r in zip(step.pos.tolist(), step.row.tolist(), strict=True) if r == row], default=0)
            past = torch.arange(max(0, first - slots), first)
            ring[row, past % slots] = (torch.randn(len(past), kv_heads, step.dim, generator=g) * step.dim**-0.25).to(dtype)
        found.append(ring)
    return found


def check_sliding(name: str, dtype: torch.dtype, window: int = 16, **form) -> None:
    step = Step.random(name, 4, 2, 32)
    together = rings(step, 2, window + SPARE, dtype)
    apart = [ring.clone() for ring in together]
    out = kiln.sliding_decode_rows(*step.projections(), *together, step.pos, step.row, window, EPS, 3, **form)
    alone = {i: kiln.sliding_decode(*step.projections(i), *(ring[step.row[i]] for ring in apart), step.pos[[i]], window, EPS, 3, **form)
             for i in step.in_order()}  # fmt: skip
    step.check(out, alone)
    assert all(same(a, b) for a, b in zip(together, apart, strict=True))
    q, _, _, q_weight, _, cos, sin = step.projections()
    scale = form.get("scale", 1.0)
    read = kiln.sliding_read_rows(q, q_weight, cos, sin, *together, step.pos, step.row, window, EPS, 3, scale)
    assert torch.equal(read, out) and all(same(a, b) for a, b in zip(together, apart, strict=True))


def check_together(name: str, dtype: torch.dtype, window: int, **form) -> None:
    """One read of a window for several tokens: each has the bits that it has in steps of it alone, and the values of other cuts."""
    step = Step.random(name, 4, 2, 32)
    together = rings(step, 2, window + SPARE, dtype)
    apart, otherwise = ([ring.clone() for ring in together] for _ in range(2))
    expected = kiln.sliding_decode_rows(*step.projections(), *otherwise, step.pos, step.row, window, EPS, 3, **form)
    out = kiln.sliding_decode_rows(*step.projections(), *together, step.pos, step.row, window, EPS, 3, **form, slots=True)
    alone = {}
    for i in step.in_order():
        own = [ring[step.row[i]] for ring in apart]
        alone[i] = kiln.sliding_decode(*step.projections(i), *own, step.pos[[i]], window, EPS, 3, **form, slots=True)
    step.check(out, alone)
    assert all(same(a, b) for a, b in zip(together, apart, strict=True))
    q, _, _, q_weight, _, cos, sin = step.projections()
    scale = form.get("scale", 1.0)
    read = kiln.sliding_read_rows(q, q_weight, cos, sin, *together, step.pos, step.row, window, EPS, 3, scale, slots=True)
    assert torch.equal(read, out) and all(same(a, b) for a, b in zip(together, apart, strict=True))
    i = step.in_order()[-1]  # no other of its row has been written behind it
    q, _, _, q_weight, _, cos, sin = step.projections(i)
    own = [ring[step.row[i]] for ring in apart]
    assert torch.equal(kiln.sliding_read(q, q_weight, cos, sin, *own, step.pos[[i]], window, EPS, 3, scale, slots=True), alone[i])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(fixed_point.dequantize(out), fixed_point.dequantize(expected), rtol=tolerance, atol=tolerance)


def check_tq4(name: str, dtype: torch.dtype, exact_window: int = 16, centered: bool = False) -> None:
    """centered: where no ring slot of an older position is there a key that is coded late is no number, here as there."""
    step = Step.random(name, 4, 2, 64)
    g = torch.Generator().manual_seed(2)
    caches = [torch.randint(-(1 << 15), 1 << 15, (2, 2, 48, 16), generator=g, dtype=torch.int16) if i % 2 == 0
              else torch.rand(2, 2, 48, generator=g).half() for i in range(4)]  # fmt: skip
    together = [*caches, *rings(step, 2, exact_window + SPARE, dtype)]
    center = [torch.randn(2, 2, 64, generator=g)] if centered else []
    before, apart = [t.clone() for t in center], [t.clone() for t in (*together, *center)]
    out = kiln.tq4_decode_rows(*step.projections(), *together, step.pos, step.row, exact_window, EPS, 3, center)
    alone = {i: kiln.tq4_decode(*step.projections(i), *(t[step.row[i]] for t in apart[:6]), step.pos[[i]], EPS, 3,
                                [t[step.row[i]] for t in apart[6:]], exact_window=exact_window) for i in step.in_order()}  # fmt: skip
    step.check(out, alone)
    written = [*together, *center]
    if not triton.knobs.runtime.interpret:  # where there is no key to code: a kernel writes nothing, the reference what nobody reads
        for t in (*together[:2], *apart[:2]) if centered else ():
            t[:, :, 48 - exact_window :] = 0
    assert all(same(a, b) for a, b in zip(written, apart, strict=True))
    for old, new in zip(before, center, strict=True):
        made = {r for p, r in zip(step.pos.tolist(), step.row.tolist(), strict=True) if p == exact_window * 3 // 4 - 1}
        assert [not torch.equal(old[r], new[r]) for r in range(2)] == [r in made for r in range(2)]
        center = {"k_center": old} if made else {"k_center": new}  # type: ignore[assignment]
    q, _, _, q_weight, _, cos, sin = step.projections()
    read = kiln.tq4_read_rows(q, q_weight, cos, sin, *together, step.pos, step.row, exact_window, EPS, 3, **dict(center))
    assert torch.equal(read, out) and all(same(a, b) for a, b in zip(written, apart, strict=True))


def check_global(name: str, dtype: torch.dtype) -> None:
    """Caches of one slot a position, which hold the step's keys already, NaN behind a row's last."""
    step, g = Step.random(name, 4, 2, 32), torch.Generator().manual_seed(3)
    q = torch.randn(len(step.pos), 4, 32, generator=g).to(dtype)
    caches = [torch.randn(2, 48, 2, 32, generator=g).to(dtype) for _ in range(2)]
    for row in range(2):
        for cache in caches:
            cache[row, max([-1, *step.pos[step.row == row].tolist()]) + 1 :] = float("nan")
    out = flash.flash_rows(q, *caches, step.pos, step.row)
    for i, (p, r) in enumerate(zip(step.pos, step.row, strict=True)):
        assert torch.equal(out[[i]], kiln.global_attention(q[[i]], *(c[r] for c in caches), p[None], None)), i


def check_the_rest() -> None:
    """Rotary tables, prepared heads, gates, sampling."""
    step = Step.random("wrapped", 4, 2, 32)
    tokens = range(len(step.pos))
    inv_freq = torch.rand(16)
    tables = kiln.rope_table(step.pos, inv_freq)
    for dtype in (torch.float32, torch.float16):
        made = kiln.prepare_qkv(*step.projections(), EPS, dtype)
        q, _, _, q_weight, _, cos, sin = step.projections()
        assert torch.equal(kiln.prepare_q(q, q_weight, cos, sin, EPS, dtype), made[0])
        for i in tokens:
            assert all(torch.equal(a[[i]], b) for a, b in zip(made, kiln.prepare_qkv(*step.projections(i), EPS, dtype), strict=True))
            assert all(torch.equal(a[[i]], b) for a, b in zip(tables, kiln.rope_table(step.pos[[i]], inv_freq), strict=True))
    gate, value = torch.randn(5, 3, 96), torch.randn(3, 96)
    gated = kiln.gate_fixed(gate, value, 2)
    assert all(torch.equal(gated[[i]], kiln.gate_fixed(gate[:, i].contiguous(), value[[i]], 2)) for i in range(3))
    settings = [(0.0, 0, 1.0, 1, 5), (0.7, 5, 1.0, 2, 5), (1.3, 0, 0.9, 1 << 40, 9), (1.0, 20, 0.8, -3, 0)]
    given = [test_sample.arguments(test_sample.random_logits(300, 3, i), *s) for i, s in enumerate(settings)]
    chosen = kiln.sample(*(torch.cat(x) for x in zip(*given, strict=True)))
    assert torch.equal(chosen, torch.cat([kiln.sample(*one) for one in given]))


@pytest.mark.parametrize("name", STEPS)
def test_references(name: str) -> None:
    check_sliding(name, torch.float32)
    check_sliding(name, torch.float16, scale=0.3, v_norm=False)
    check_tq4(name, torch.float32)
    check_tq4(name, torch.float16)


@pytest.mark.parametrize("name", [*CENTERS, "wrapped"])
def test_references_with_a_center(name: str) -> None:
    check_tq4(name, torch.float32, 32, centered=True)
    check_tq4(name, torch.float16, 32, centered=True)


def test_the_rest_of_the_references() -> None:
    check_the_rest()


def test_wrong_arguments_are_named() -> None:
    step = Step.random("two", 4, 2, 32)
    ring = torch.zeros(2, 19, 2, 32)
    for bad, message in (({"pos": step.pos[:1]}, "pos torch.int64 \\(1,\\)"), ({"row": step.row.int()}, "row torch.int32"),
                         ({"k_ring": ring[0]}, "rings \\(19, 2, 32\\)"), ({"window": 0}, "window 0")):  # fmt: skip
        given = {"k_ring": ring, "v_ring": ring, "pos": step.pos, "row": step.row, "window": 16} | bad
        with pytest.raises(ValueError, match=f"sliding_decode_rows: .*{message}"):
            kiln.sliding_decode_rows(*step.projections(), **given, eps=EPS, terms=2)
    with pytest.raises(ValueError, match=r"sliding_decode: cos .*; expected|sliding_decode: .* expected \[2, 16\]"):
        q, k, v, *rest = step.projections()
        kiln.sliding_decode(q, k, v, *rest[:2], rest[2][:1], rest[3][:1], ring[0], ring[0], step.pos[:1], 16, EPS, 2)
    step = Step.random("two", 4, 2, 64)
    codes = [torch.zeros(2, 2, 48, 16, dtype=torch.int16), torch.zeros(2, 2, 48).half()] * 2
    for bad_ring, window in ((torch.zeros(2, 16, 2, 64), 17), (torch.zeros(1, 16, 2, 64), 16)):
        with pytest.raises(ValueError, match="tq4_decode_rows: exact windows"):
            kiln.tq4_decode_rows(*step.projections(), *codes, bad_ring, bad_ring, step.pos, step.row, window, EPS, 2, [])


@pytest.mark.parametrize(("check", "several"), [(check_sliding, 8), (check_together, 2)])
@pytest.mark.parametrize("name", STEPS)
def interpreted_sliding(name: str, check: Callable, several: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one split and several, whose sizes follow from a token's own position; together of slots, one of the two with two blocks, and a
    tile of 8 columns holds 4 tokens of 2 queries."""
    monkeypatch.setitem(sliding_cut.SLIDING_TILES, (90, 256), flash.Tile(keys=16, warps=4, stages=1))
    for sms, dtype, window in ((1, torch.float32, 16), (several, torch.float16, 40)):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check(name, dtype, window)


@pytest.mark.parametrize("name", STEPS)
def interpreted_tq4(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.DECODE_TILES, (90, 512), flash.Tile(keys=16, warps=4, stages=2))
    with compiling_for(dataclasses.replace(H200, sm_count=4)):
        check_tq4(name, torch.float32 if name == "two" else torch.float16)


@pytest.mark.parametrize("name", CENTERS)
def interpreted_tq4_with_a_center(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.DECODE_TILES, (90, 512), flash.Tile(keys=16, warps=4, stages=2))
    with compiling_for(dataclasses.replace(H200, sm_count=4)):
        check_tq4(name, torch.float16, 32, centered=True)


@pytest.mark.parametrize("name", ["wrapped", "two"])
def interpreted_global(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flash.DECODE_TILES, (90, 256), flash.Tile(keys=16, warps=4, stages=1))
    for sms, dtype in ((1, torch.float16), (4, torch.float32)):
        with compiling_for(dataclasses.replace(H200, sm_count=sms)):
            check_global(name, dtype)


def interpreted_the_rest() -> None:
    with compiling_for(H200):
        check_the_rest()
