"""Ops of several tokens on a GPU, at the shapes of the 31B: each token has the bits that it has alone."""

from __future__ import annotations

import pytest
import torch

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.attention.flash import flash_rows
from kiln.custom_ops.bench.attention_cases import projections
from kiln.custom_ops.bench.cases import packed
from kiln.custom_ops.geometry import EXACT_WINDOW, GEMMA4_31B, Heads
from kiln.custom_ops.gpu.target import current_target
from kiln.custom_ops.step.add_norm import PIECE
from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.gemv import COUNTERS, GLU_ENDS, RowsConfig, glu_fits
from kiln.custom_ops.weights.layouts import LAYOUTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
kiln = torch.ops.kiln
SPARE = 14  # slots of a ring beyond its window, for 8 tokens
MATRICES = {(m.n, m.k, m.end): m for m in GEMMA4_31B.matrices()}.values()
TOGETHER = (2, 3, 4, 8)
HEAD_ROWS = 65536


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def ends_of(n: int) -> list[str]:
    """Those that a matrix of n rows may have, but for the activations of a GLU."""
    return ["squares", "sum", "split", *["glu"] * glu_fits(n)]


def products(
    x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, squares: torch.Tensor, end: str
) -> list[torch.Tensor]:
    """What the ops of an end make of x, its tokens first."""
    given, zeros = (x, words, halves, block_type), torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")
    if end == "squares":
        y, left = kiln.fixed_linear_squares(*given, zeros)
        found = [y, left.view(len(x), -1)]
    elif end == "sum":
        found = [kiln.fixed_linear(*given, zeros, squares, 1e-6)]
    elif end == "split":
        found = [kiln.fixed_partials(*given, squares, 1e-6).view(-1, len(x), words.shape[2]).transpose(0, 1)]
    else:
        found = [kiln.fixed_glu(*given, zeros, squares, 1e-6, activation) for activation in GLU_ENDS]
    assert not zeros.any()
    return found


def check_gemv(
    block_type: str, n: int, k: int, tokens: int, terms: int, g: torch.Generator, at_once: int | None = None, ends: list[str] | None = None
) -> None:
    words, halves = packed(block_type, n, k, g)
    x = torch.randn(tokens, k, generator=g, device="cuda") * torch.logspace(-2, 2, tokens, device="cuda")[:, None]
    x, squares = fixed_point.quantize(x, terms, at_once), torch.rand(tokens, -(-k // PIECE), generator=g, device="cuda") * 300
    for end in ends or ends_of(n):
        together = products(x, words, halves, block_type, squares, end)
        for i in range(tokens):
            alone = products(x[i : i + 1].contiguous(), words, halves, block_type, squares[i].contiguous(), end)
            apart = [int((a[i] != b[0]).sum()) for a, b in zip(together, alone, strict=True) if not same(a[i], b[0])]
            assert not apart, f"{block_type} {n} x {k} {end}, {tokens} tokens of {terms} bytes: token {i} has {apart} other values"


@pytest.mark.parametrize("block_type", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("matrix", MATRICES, ids=lambda m: f"{m.name} {m.n}x{m.k}")
def test_gemv_of_the_31b(matrix, block_type):
    """Of the ends the one that it has there: nearly all of the time is the compiler's."""
    for tokens in TOGETHER:  # of the head a part: in float32 the whole takes 6 GB, and several workers test at once
        g = torch.Generator("cuda").manual_seed(tokens)
        check_gemv(block_type, min(matrix.n, HEAD_ROWS), matrix.k, tokens, 2, g, ends=[matrix.end])


@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "rows"])
@pytest.mark.parametrize("block_type", list(LAYOUTS))
def test_gemv_of_every_type_and_form(block_type, tiles, monkeypatch):
    sm = current_target().sm
    for most in (2, 4, 8):
        monkeypatch.setitem(gemv.ROWS_CONFIGS, (sm, most), RowsConfig(tiles, 160 if tiles else 128))
    g = torch.Generator("cuda").manual_seed(0)
    wide = LAYOUTS[block_type].block == 256  # `kiln_gemv_sums` takes these, but of activations with a scale for each 32
    # Nearly all of the time is the compiler's, so a shape has few forms; the last has a masked block of rows.
    for (n, k), forms in (((1024, 5376), ((2, 2),)), ((5376, 2048), ((3, 3),)), ((260, 1280), ((4, 1), (8, 2)))):
        for tokens, terms in forms if tiles else forms[:1]:
            if tiles or not wide:
                check_gemv(block_type, n, k, tokens, terms, g)
            if wide and (not tiles or n == 260):
                check_gemv(block_type, n, k, tokens, terms, g, 32)


def steps(heads: Heads, first: int, g: torch.Generator) -> list[tuple]:
    """(projections, pos, row) of steps from position `first` on: tokens of one row, of two in any order, one of them twice."""
    found = []
    for places in ([(first, 1), (first + 1, 1)], [(first + 1, 0), (7, 1), (first, 0), (first + 1, 0)],
                   [(first + i, 0) for i in range(8)]):  # fmt: skip
        q, k, v, *weights, cos, sin = projections(g, heads, len(places))
        token = [places.index(p) for p in places]
        qk = torch.cat([q, k], -1)[:, token].contiguous()
        pos, row = torch.tensor(places, device="cuda").unbind(1)
        columns = heads.queries * heads.dim
        given = (qk[..., :columns], qk[..., columns:], v[:, token].contiguous(), *weights, cos[token], sin[token])
        found.append((given, pos.contiguous(), row.contiguous()))
    return found


def one(given: tuple, i: int) -> tuple:
    q, k, v, q_weight, k_weight, cos, sin = given
    q, k = torch.cat((q[:, i], k[:, i]), -1).split((q.shape[-1], k.shape[-1]), -1)  # of one matmul, as they are of several tokens
    return q, k, v[:, i].contiguous(), q_weight, k_weight, cos[[i]], sin[[i]]


def check_attention(together, alone, caches: list[torch.Tensor], given: tuple, pos: torch.Tensor, row: torch.Tensor) -> None:
    """together, alone: the ops of a step and of a token, of projections and caches."""
    apart = [t.clone() for t in caches]
    out = together(given, caches, pos, row)
    places = list(zip(pos.tolist(), row.tolist(), strict=True))
    for p, r in sorted(set(places)):
        i = places.index((p, r))
        found = alone(one(given, i), [t[r] for t in apart], pos[[i]])
        for j, place in enumerate(places):
            assert place != (p, r) or same(out[j], found[0]), (place, j)
    assert all(same(a, b) for a, b in zip(caches, apart, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sliding_rows(dtype):
    heads, window = GEMMA4_31B.sliding, GEMMA4_31B.window
    g = torch.Generator("cuda").manual_seed(1)
    for first in (0, 15, 62, 1022, 1024, 4095, 131000):
        for given, pos, row in steps(heads, first, g):
            rings = [(torch.randn(2, window + SPARE, heads.kv, heads.dim, generator=g, device="cuda") * 0.3).to(dtype) for _ in range(2)]
            check_attention(lambda x, c, p, r: kiln.sliding_decode_rows(*x, *c, p, r, window, 1e-6, 2),
                            lambda x, c, p: kiln.sliding_decode(*x, *c, p, window, 1e-6, 2), rings, given, pos, row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sliding_together(dtype):
    """Tokens of a row read its window together: each has the bits of a step of it alone, and the values of `sliding_decode`."""
    heads, window = GEMMA4_31B.sliding, GEMMA4_31B.window
    g = torch.Generator("cuda").manual_seed(1)
    for first in (0, 15, 62, 1022, 1024, 4095, 131000):
        for given, pos, row in steps(heads, first, g):
            rings = [(torch.randn(2, window + SPARE, heads.kv, heads.dim, generator=g, device="cuda") * 0.3).to(dtype) for _ in range(2)]

            def alone(x, caches, p):
                copies = [t.clone() for t in caches]
                made = kiln.sliding_decode(*x, *caches, p, window, 1e-6, 2, slots=True)
                expected = kiln.sliding_decode(*x, *copies, p, window, 1e-6, 2)
                bound = 1e-4 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close(fixed_point.dequantize(made), fixed_point.dequantize(expected), rtol=bound, atol=bound)
                return made

            check_attention(lambda x, c, p, r: kiln.sliding_decode_rows(*x, *c, p, r, window, 1e-6, 2, slots=True),
                            alone, rings, given, pos, row)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tq4_rows(dtype):
    heads, slots = GEMMA4_31B.full, 40960
    g = torch.Generator("cuda").manual_seed(2)
    for first in (0, 186, 200, 250, 255, 320, 2048, 32768):
        for given, pos, row in steps(heads, first, g):
            codes = [torch.randint(-(1 << 15), 1 << 15, (2, heads.kv, slots, heads.dim // 4), dtype=torch.int16, generator=g, device="cuda")
                     if i % 2 == 0 else torch.rand(2, heads.kv, slots, generator=g, device="cuda").half() for i in range(4)]
            shape = (2, EXACT_WINDOW + SPARE, heads.kv, heads.dim)
            rings = [(torch.randn(shape, generator=g, device="cuda") * 0.3).to(dtype) for _ in range(2)]
            center = [torch.randn(2, heads.kv, heads.dim, generator=g, device="cuda")]
            for more in ([], center):
                check_attention(lambda x, c, p, r: kiln.tq4_decode_rows(*x, *c[:6], p, r, EXACT_WINDOW, 1e-6, 2, c[6:]),
                                lambda x, c, p: kiln.tq4_decode(*x, *c[:6], p, 1e-6, 2, c[6:], exact_window=EXACT_WINDOW),
                                [*codes, *rings, *more], given, pos, row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_global_rows(dtype):
    heads, slots, g = GEMMA4_31B.full, 8192, torch.Generator("cuda").manual_seed(4)
    caches = [(torch.randn(2, slots, heads.kv, heads.dim, generator=g, device="cuda") * 0.3).to(dtype) for _ in range(2)]
    q = (torch.randn(8, heads.queries, heads.dim, generator=g, device="cuda") * 0.3).to(dtype)
    pos, row = torch.tensor([0, 31, 32, 33, 1023, 4000, 4001, 8191], device="cuda"), torch.tensor([0, 1] * 4, device="cuda")
    out = flash_rows(q, *caches, pos, row)
    for i in range(8):
        assert same(out[[i]], kiln.global_attention(q[[i]], *(c[row[i]] for c in caches), pos[[i]], None)), i


@pytest.mark.parametrize("tokens", TOGETHER)
def test_what_lies_between(tokens):
    """Norms, rotary tables, prepared heads, gates, sampling, rows of the embedding."""
    g, d = torch.Generator("cuda").manual_seed(3), GEMMA4_31B.hidden
    x, branch = (torch.randn(tokens, d, generator=g, device="cuda") for _ in range(2))
    squares, weights = torch.rand(tokens, 84, generator=g, device="cuda") * 60, torch.rand(2, d, generator=g, device="cuda")
    scale = torch.full((1,), 0.37, device="cuda")
    normed = kiln.add_norm(x, branch, squares, weights[0], scale, weights[1], 1e-6, 2)
    gate, value = torch.randn(5, tokens, 256, generator=g, device="cuda"), torch.randn(tokens, 256, generator=g, device="cuda")
    gated = kiln.gate_fixed(gate, value, 2)
    pos, inv_freq = torch.arange(tokens, device="cuda") * 9999, torch.rand(128, generator=g, device="cuda")
    table = kiln.rope_table(pos, inv_freq)
    given = projections(g, GEMMA4_31B.full, tokens)
    made = kiln.prepare_qkv(*given, 1e-6, torch.float16)
    logits = torch.randn(tokens, GEMMA4_31B.vocab, generator=g, device="cuda") * 3
    settings = [torch.tensor(s * 3, device="cuda")[:tokens] for s in ([0.0, 1.0, 0.7], [0, 64, 0], [1.0, 0.95, 0.9], [7, 1 << 40, 3])]
    sampling = (settings[0], settings[1].int(), settings[2], settings[3], pos)
    chosen = kiln.sample(logits, *sampling)
    words, halves = packed("Q6_K", 1000, 512, g)
    ids = torch.arange(tokens, device="cuda") * 37
    rows = kiln.quantized_embedding(ids, words, halves, "Q6_K")
    for i in range(tokens):
        alone = kiln.add_norm(x[[i]], branch[[i]], squares[i], weights[0], scale, weights[1], 1e-6, 2)
        assert all(same(a[i].view(-1), b.view(-1)) for a, b in zip(normed, alone, strict=True))
        assert same(gated[i], kiln.gate_fixed(gate[:, i].contiguous(), value[[i]], 2)[0])
        assert all(same(a[[i]], b) for a, b in zip(table, kiln.rope_table(pos[[i]], inv_freq), strict=True))
        assert all(same(a[[i]], b) for a, b in zip(made, kiln.prepare_qkv(*one(given, i), 1e-6, torch.float16), strict=True))
        assert same(chosen[[i]], kiln.sample(logits[[i]], *(s[[i]] for s in sampling)))
        assert same(rows[[i]], kiln.quantized_embedding(ids[[i]], words, halves, "Q6_K"))
