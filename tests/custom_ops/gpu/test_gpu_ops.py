"""The kernels on a GPU, at the shapes of the 31B and of the 12B, every configuration, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.attention import flash, prepare, sliding_cut
from kiln.custom_ops.bench.cases import packed
from kiln.custom_ops.geometry import EXACT_WINDOW, GEMMA4_12B, GEMMA4_31B, MEASURED, Heads
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.step import add_norm
from kiln.custom_ops.tq4 import attention, codec, prefill
from kiln.custom_ops.weights import fixed_point, matmul
from kiln.custom_ops.weights.gemv import COUNTERS, glu_fits
from kiln.custom_ops.weights.layouts import LAYOUTS, dequantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
kiln = torch.ops.kiln

LENGTHS = (1, 15, 16, 17, 1023, 1024, 1025, 4096, 131072)
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 2e-5}  # relative error: rounding of the output and of the weights p
WINDOW = GEMMA4_31B.window
both_models = pytest.mark.parametrize("model", MEASURED, ids=lambda model: model.name)


def configured(*tables: dict) -> pytest.MarkDecorator:
    """model, target: the 31B with every distinct configuration, listed or the default; the 12B with two."""
    listed = {sm for table in tables for sm, *_ in table if sm}
    targets = [name for name, t in gpu_targets().items() if t.sm in listed] + ["sm_120"]
    cases = [(GEMMA4_31B, name) for name in dict.fromkeys(targets)] + [(GEMMA4_12B, name) for name in ("sm_90", "sm_120")]
    return pytest.mark.parametrize("model, target", cases, ids=[f"{model.name}-{name}" for model, name in cases])


def exact(q, k, v, mask):
    """Attention in float64, one KV head at a time. q [T, H, D], k, v [N, KV, D], mask [T, N]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for h in range(k.shape[1]):
        keys, values = k[:, h].double(), v[:, h].double()
        for g in range(group):
            j = h * group + g
            scores = (q[:, j].double() @ keys.T).masked_fill(~mask, float("-inf"))
            out[:, j] = scores.softmax(-1) @ values
    return out


def relative(out, expected) -> float:
    assert out.isfinite().all()
    return ((out.double() - expected).norm() / expected.norm()).item()


def tensors(heads: Heads, dtype, *sizes, scale=1.0):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = [(n, heads.queries if i == 0 else heads.kv, heads.dim) for i, n in enumerate(sizes)]
    return [torch.randn(shape, generator=g, device="cuda", dtype=torch.float32).mul_(scale).to(dtype) for shape in shapes]


def poisoned(cache, filled: int):
    """Garbage a thousand times as large beyond what is filled, NaN among it."""
    cache[filled:] *= 1000
    cache[filled + 1 :: 7] = float("nan")
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@configured(flash.DECODE_TILES)
def test_global_decode(target, dtype, model):
    slots = max(LENGTHS) + 100
    q, k, v = tensors(model.full, dtype, 1, slots, slots, scale=0.3)
    for length in LENGTHS:
        k_, v_ = poisoned(k.clone(), length), poisoned(v.clone(), length)
        pos = torch.tensor([length - 1], device="cuda")
        with compiling_for(gpu_targets()[target]):
            out = kiln.global_attention(q, k_, v_, pos, pos.to(torch.int32) + 1)
            whole = kiln.global_attention(q, k_, v_, pos, None)
        error = relative(out, exact(q, k[:length], v[:length], torch.ones(1, length, dtype=torch.bool, device="cuda")))
        print(f"global decode {target} {dtype} length {length}: {error:.1e}")
        assert error < LIMIT[dtype] and torch.equal(out, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@configured(flash.PREFILL_TILES)
def test_global_prefill(target, dtype, model):
    slots = max(LENGTHS) + 100
    q, k, v = tensors(model.full, dtype, 70, slots, slots, scale=0.3)
    for end in (2, 17, 70, 1023, 1025, 4096, *((131072,) if dtype == torch.bfloat16 else ())):
        tokens = min(70, end)
        pos = torch.arange(end - tokens, end, device="cuda")
        k_, v_ = poisoned(k.clone(), end), poisoned(v.clone(), end)
        with compiling_for(gpu_targets()[target]):
            out = kiln.global_attention(q[:tokens], k_, v_, pos, pos[-1:].to(torch.int32) + 1)
        mask = torch.arange(end, device="cuda")[None] <= pos[:, None]
        error = relative(out, exact(q[:tokens], k[:end], v[:end], mask))
        print(f"global prefill {target} {dtype} of {tokens} up to {end}: {error:.1e}")
        assert error < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@configured(flash.DECODE_TILES, flash.PREFILL_TILES)
@pytest.mark.parametrize("tokens", [1, 2, 70, 2500])
def test_sliding(target, dtype, tokens, model):
    """The ring against the tail of a full cache; chunks longer than the window included."""
    if tokens == 2500 and dtype == torch.float32:
        tokens = 1100
    for first in (0, 1, 15, 16, 17, 1023, 1024, 1025, 4096):
        q, k, v = tensors(model.sliding, dtype, tokens, first + tokens, first + tokens, scale=0.3)
        k_ring, v_ring = (torch.full((WINDOW, *k.shape[1:]), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
        past = torch.arange(max(0, first - WINDOW), first, device="cuda")
        k_ring[past % WINDOW], v_ring[past % WINDOW] = k[past], v[past]
        pos = torch.arange(first, first + tokens, device="cuda")
        with compiling_for(gpu_targets()[target]):
            out = kiln.sliding_attention(q, k[first:].contiguous(), v[first:].contiguous(), k_ring, v_ring, pos, WINDOW)
        low = max(0, first - WINDOW + 1)
        distance = pos[:, None] - torch.arange(low, first + tokens, device="cuda")[None]
        error = relative(out, exact(q, k[low:], v[low:], (distance >= 0) & (distance < WINDOW)))
        if first in (0, 4096):
            print(f"sliding {target} {dtype} of {tokens} from {first}: {error:.1e}")
        assert error < LIMIT[dtype], first


def tq4_codes(x, slots: int, used: int):
    """codes and scales of x [N, KV, D], garbage from slot `used` on."""
    codes, scales = codec.encode(x[:used].transpose(0, 1))  # [KV, used, D/4], [KV, used]
    kv_heads = x.shape[1]
    all_codes = torch.randint(-(1 << 15), 1 << 15, (kv_heads, slots, x.shape[2] // 4), device=x.device).to(torch.int16)
    all_scales = torch.full((kv_heads, slots), float("nan"), device=x.device, dtype=torch.float16)
    all_codes[:, :used], all_scales[:, :used] = codes, scales
    return [all_codes, all_scales]


def slots_for(length: int) -> int:
    """Of a cache that holds `length` positions: one of four, for each of which kernels compile anew, whole blocks of any kernel or not."""
    whole = 5120 if length <= 5120 else 131072
    return whole if length % 2 else whole + 77


def tq4_rings(k, v, first: int, exact_window: int):
    """The exact window before position `first`, NaN in every slot that a query there does not read."""
    rings = [torch.full((exact_window, *x.shape[1:]), float("nan"), device=x.device, dtype=x.dtype) for x in (k, v)]
    past = torch.arange(max(first - exact_window + 1, 0), first, device=k.device)
    for ring, x in zip(rings, (k, v), strict=True):
        ring[past % exact_window] = x[past]
    return rings


def tq4_state(k, v, slots: int, first: int, exact_window: int):
    """What `tq4_attention` takes between q and pos for the positions from `first` on of k, v [N, KV, D]."""
    codes = [t for x in (k, v) for t in tq4_codes(x, slots, max(k.shape[0] - exact_window, 0))]
    return k[first:].contiguous(), v[first:].contiguous(), *codes, *tq4_rings(k, v, first, exact_window)


def tq4_exact(q, k, v, first: int, exact_window: int):
    """Over what the codec makes of older keys and values, and over the newest as they are."""
    distance = torch.arange(first, k.shape[0], device=q.device)[:, None] - torch.arange(k.shape[0], device=q.device)
    mask = torch.cat([distance >= exact_window, (distance >= 0) & (distance < exact_window)], 1)
    return exact(q, *(torch.cat([codec.decode(*codec.encode(x)), x.float()]) for x in (k, v)), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@configured(attention.DECODE_TILES)
@pytest.mark.parametrize("tokens", [1, 70, 700])
def test_tq4_attention(target, dtype, tokens, model):
    """Within the exact window, from its end on, and far beyond; chunks longer than it included."""
    if tokens == 1:
        lengths = (*LENGTHS, 255, 256, 257, 258)
    elif tokens == 70:
        lengths = (70, 256, 257, 326, 1023, 1025, 4096, *((131072,) if dtype == torch.bfloat16 else ()))
    else:
        lengths = (700, 955, 2000)
    for length in lengths:
        q, k, v = tensors(model.full, dtype, tokens, length, length, scale=0.3)
        pos = torch.arange(length - tokens, length, device="cuda")
        with compiling_for(gpu_targets()[target]):
            state = tq4_state(k, v, slots_for(length), length - tokens, EXACT_WINDOW)
            out = kiln.tq4_attention(q, *state, pos, pos[-1:].to(torch.int32) + 1)
        error = relative(out, tq4_exact(q, k, v, length - tokens, EXACT_WINDOW))
        print(f"tq4 {target} {dtype} of {tokens} up to {length}: {error:.1e}")
        assert error < LIMIT[dtype], length


@pytest.mark.parametrize("exact_window", [32, 96, 1024])
@pytest.mark.parametrize("tokens", [1, 70])
@both_models
def test_tq4_attention_other_exact_windows(tokens, exact_window, model):
    for length in (70, 96, 97, 1024, 1025, 3000):
        q, k, v = tensors(model.full, torch.float16, tokens, length, length, scale=0.3)
        pos = torch.arange(length - tokens, length, device="cuda")
        out = kiln.tq4_attention(q, *tq4_state(k, v, slots_for(length), length - tokens, exact_window), pos, None)
        error = relative(out, tq4_exact(q, k, v, length - tokens, exact_window))
        print(f"tq4 exact window {exact_window}, {tokens} up to {length}: {error:.1e}")
        assert error < LIMIT[torch.float16], length


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@both_models
def test_tq4_center(dtype, model):
    """Keys that share most of their length, read in chunks and one by one, across the center's last key, the first code and the first read:
    centers and codes are the reference's, outputs those of attention to decoded keys."""
    heads, window, count = model.full, EXACT_WINDOW, EXACT_WINDOW * 3 // 4
    q, k, v = tensors(heads, dtype, 900, 900, 900, scale=0.3)
    k = k + k[:1] * 3
    fresh = [t for x in (k, v) for t in tq4_codes(x, 1000, 0)] + [torch.full((heads.kv, heads.dim), float("nan"), device="cuda")]
    held, wanted = ([t.clone() for t in fresh] for _ in range(2))
    rings = [torch.full((window, heads.kv, heads.dim), float("nan"), device="cuda", dtype=dtype) for _ in range(2)]
    starts = [0, 150, 190, *range(191, 195), 250, *range(254, 260), 700, 899]
    for first, end in zip(starts, [*starts[1:], 900], strict=True):
        pos, own = torch.arange(first, end, device="cuda"), (k[first:end].contiguous(), v[first:end].contiguous())
        kiln.tq4_write(*held[:4], *own, pos, [held[4]], rings[0], window)
        codec.reference_write(*wanted[:4], *own, pos, wanted[4], rings[0], window)
        out = kiln.tq4_attention(q[first:end], *own, *held[:4], *rings, pos, None, window, held[4])
        if end >= count:
            torch.testing.assert_close(held[4], k[:count].double().mean(0).float(), rtol=1e-5, atol=1e-5)
        center, kept = held[4].nan_to_num(0.0), torch.arange(max(end - window, 0), end, device="cuda")
        keys, values = (codec.decode(held[i][:, :end], held[i + 1][:, :end]).transpose(0, 1).nan_to_num(0.0) for i in (0, 2))
        distance = pos[:, None] - torch.arange(end, device="cuda")
        mask = torch.cat([distance >= window, (distance >= 0) & (distance < window)], 1)
        expected = exact(q[first:end], torch.cat([keys + center, k[:end].float()]), torch.cat([values, v[:end].float()]), mask)
        assert relative(out, expected) < LIMIT[dtype], first
        for ring, x in zip(rings, (k, v), strict=True):
            ring[kept % window] = x[kept]
    for i, coded in ((0, slice(0, 900 - window + 1)), (2, slice(0, 900))):  # a coordinate beside a boundary may go either way
        assert (held[i][:, coded] != wanted[i][:, coded]).float().mean() < 1e-3
        assert relative(*(codec.decode(x[i][:, coded], x[i + 1][:, coded]) for x in (held, wanted))) < 5e-3
    g = torch.Generator("cuda").manual_seed(7)
    for last in (count - 2, count - 1, count, window - 1, 700):  # the fused step: its center and its code
        qk = torch.randn(6, (heads.queries + heads.kv) * heads.dim, generator=g, device="cuda")
        angle = torch.rand(1, heads.dim // 2, generator=g, device="cuda") * 6
        weights = [torch.rand(heads.dim, generator=g, device="cuda") * 0.5 for _ in range(2)]
        columns = heads.queries * heads.dim
        raw = (qk[:, :columns], qk[:, columns:], qk[:3, columns:].contiguous(), *weights, angle.cos(), angle.sin())
        rings, pos = tq4_rings(k, v, last, window), torch.tensor([last], device="cuda")
        caches, center = [t.clone() for t in held[:4]], held[4].clone() if last >= count else torch.full_like(held[4], float("nan"))
        before = [t.clone() for t in (*caches, *rings)]
        out = fixed_point.dequantize(kiln.tq4_decode(*raw, *caches, *rings, pos, 1e-6, 2, [center]))
        own = [ring[pos % window] for ring in rings]
        query = prepare.prepare_reference(*raw, 1e-6, torch.float32)[0]
        expected = attention.reference(query.double(), *own, *caches, *before[4:], pos, None, window, center).flatten(1)
        assert relative(out, expected) < {torch.float16: 2e-3, torch.float32: 1e-4}[dtype], last
        if last == count - 1:
            torch.testing.assert_close(center, rings[0][:count].double().mean(0).float(), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(center.nan_to_num(7.0), (held[4] if last >= count else torch.full_like(center, 7.0)))
        if last >= window - 1:
            late = last - window + 1
            written = codec.decode(caches[0][:, late], caches[1][:, late])
            assert relative(written, codec.decode(*codec.encode(k[late].float() - center)).double()) < 5e-3
            for t, old in zip(caches[:2], before[:2], strict=True):
                t[:, late] = old[:, late]
        assert all(torch.equal(t.view(torch.int16), old.view(torch.int16)) for t, old in zip(caches[:2], before[:2], strict=True))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_tq4_of_every_head_size(dim, centered):
    """44 steps from nothing, of which the last read codes, then a chunk over them: as the same ops on the CPU, gated and turned in part."""
    window, slots, steps, heads, kv = 32, 128, 44, 4, 2
    g = torch.Generator().manual_seed(0)
    weights, angle = [torch.rand(dim, generator=g) + 0.5 for _ in range(2)], torch.rand(steps, dim // 8, generator=g) * 6
    q = torch.randn(steps, 2, heads * 2 * dim, generator=g)
    k, v = (torch.randn(steps, 2, kv * dim, generator=g) + torch.randn(kv * dim, generator=g) for _ in range(2))
    chunk = [torch.randn(20, n, dim, generator=g) * 0.3 for n in (heads, kv, kv)]
    found = {}
    for device in ("cpu", "cuda"):
        caches = [torch.zeros(kv, slots, dim // 4, dtype=torch.int16), torch.zeros(kv, slots, dtype=torch.float16)]
        caches = [*caches, *(t.clone() for t in caches)]
        caches += [torch.zeros(window, kv, dim, dtype=torch.float16) for _ in range(2)]
        caches, center = [t.to(device) for t in caches], [torch.full((kv, dim), float("nan"), device=device)] * centered
        outs = []
        for t in range(steps):
            qk = torch.cat([q[t], k[t]], 1).to(device)
            given = (qk[:, : q.shape[2]], qk[:, q.shape[2] :], v[t].to(device), *(w.to(device) for w in weights))
            turned = (angle[t : t + 1].cos().to(device), angle[t : t + 1].sin().to(device))
            out = kiln.tq4_decode(*given, *turned, *caches, torch.tensor([t], device=device), 1e-6, 2, center, 0.1, False, False, 0, True)
            outs.append(fixed_point.dequantize(out).double().cpu())
        own, pos = [x.half().to(device) for x in chunk], torch.arange(steps, steps + 20, device=device)
        kiln.tq4_write(*caches[:4], *own[1:], pos, center, caches[4] if centered else None, window if centered else 0)
        outs.append(kiln.tq4_attention(*own, *caches, pos, None, window, *center).double().cpu().flatten(1))
        found[device] = torch.cat(outs), [codec.decode(caches[i].cpu(), caches[i + 1].cpu()) for i in (0, 2)]
    assert relative(found["cuda"][0], found["cpu"][0]) < 2e-3
    for ours, right in zip(found["cuda"][1], found["cpu"][1], strict=True):  # a coordinate beside a boundary may go either way
        assert relative(ours[:, :44], right[:, :44].double()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 70])
@both_models
def test_tq4_write(dtype, tokens, model):
    """Codes may differ from the reference only where a coordinate lies on a boundary."""
    _, k, v = tensors(model.full, dtype, 1, tokens, tokens)
    pos = torch.arange(5, 5 + tokens, device="cuda")
    heads = model.full
    caches = [torch.zeros(heads.kv, 100, heads.dim // 4, dtype=torch.int16, device="cuda"),
              torch.zeros(heads.kv, 100, dtype=torch.float16, device="cuda")] * 2  # fmt: skip
    caches = [c.clone() for c in caches]
    want = [c.clone() for c in caches]
    kiln.tq4_write(*caches, k, v, pos, [])
    codec.reference_write(*want, k, v, pos)
    assert (caches[0] != want[0]).float().mean() < 1e-3 and (caches[2] != want[2]).float().mean() < 1e-3
    for side in (0, 2):
        got, ref = (codec.decode_rotated(c[side], c[side + 1]) for c in (caches, want))
        assert ((got - ref).norm() / ref.norm()).item() < 5e-3
    untouched = torch.cat([torch.arange(5), torch.arange(5 + tokens, 100)]).cuda()
    assert not any(c[:, untouched].any() for c in caches)


def float32_limit(block_type: str) -> float:
    """Of a product's relative error: what is added for the quants and taken away for the minima is larger than the result."""
    return 5e-6 if LAYOUTS[block_type].minimum else 2e-6


@pytest.mark.parametrize("block_type", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantized_linear(block_type, dtype):
    g = torch.Generator("cuda").manual_seed(1)
    names = ("attn_qkv", "attn_output", "ffn_down")
    for n, k in [(m.n, m.k) for m in GEMMA4_31B.matrices() if m.name in names] + [(300, 512)]:
        words, halves = packed(block_type, n, k, g)
        weight = dequantize(block_type, words, halves)
        for target in ("sm_90", "sm_120") if n > 8192 else ("sm_90",):
            for tokens in (1, 3, 33):
                x = torch.randn(tokens, k, generator=g, device="cuda").to(dtype)
                with compiling_for(gpu_targets()[target]):
                    out = kiln.quantized_linear(x, words, halves, block_type)
                error = relative(out, x.double() @ weight.double())
                print(f"{block_type} {dtype} {target} [{tokens}, {k}] x [{n}]: {error:.1e}")
                assert error < (5e-3 if dtype == torch.bfloat16 else float32_limit(block_type))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul(dtype, transposed):
    """Against float64; a row has the same bits however many there are; what lies behind the last row is not read or written."""
    g = torch.Generator("cuda").manual_seed(2)
    for n, k in ((5376, 8192), (16384, 5376), (300, 100), (5376, 21504)):
        w = torch.randn(k, n, generator=g, device="cuda").mul_(0.02).to(dtype)
        memory = torch.full((1300, k), torch.nan, dtype=dtype, device="cuda")
        memory[:1025] = torch.randn(1025, k, generator=g, device="cuda").to(dtype)
        exact, rows = memory[:1025].double() @ w.double(), []
        for tokens in (1025, 2, 64, 77, 128, 129, 512):
            out = torch.full((tokens + 1, n + 8), torch.nan, dtype=dtype, device="cuda")
            x = memory[:1025] if tokens == 1025 else torch.cat([memory[:tokens], memory[1025:]])[:tokens]
            matmul.multiply_into(x, w.T.contiguous() if transposed else w, out, 8, transposed)
            assert out[:, :8].isnan().all() and out[tokens:].isnan().all()
            rows.append(out[:tokens, 8:])
            assert relative(rows[-1], exact[:tokens]) < (3e-3 if dtype == torch.bfloat16 else 2e-6)
            assert torch.equal(rows[-1], rows[0][:tokens]), (n, k, tokens)


def product(x, words, halves, block_type, rows=8192):
    """float64, some rows at a time: the head would not fit."""
    parts = ((words[:, :, i : i + rows], halves[:, :, i : i + rows]) for i in range(0, words.shape[2], rows))
    return torch.cat([x.double() @ dequantize(block_type, *part).double() for part in parts], 1)


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("block_type", ["Q4_K", "Q6_K", "Q4_0", "Q5_K", "Q8_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K", "MXFP4"])
def test_gemv(block_type, terms):
    """Every matrix of the 31B, each end, against the activations as they are in fixed point; repeats are the same bits."""
    g = torch.Generator("cuda").manual_seed(3)
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")
    *layers, head = [(m.n, m.k) for m in GEMMA4_31B.matrices()]
    for n, k in [*layers, (300, 512)] + [head] * (block_type == "Q6_K"):
        words, halves = packed(block_type, n, k, g)
        x = torch.randn(1, k, generator=g, device="cuda")
        fixed = kiln.fixed_point(x, terms)
        assert relative(fixed_point.dequantize(fixed), x.double()) < {1: 1e-2, 2: 4e-5, 3: 2e-7}[terms]
        roots = torch.rand(21, generator=g, device="cuda")
        expected = product(fixed_point.dequantize(fixed), words, halves, block_type)
        for target in ("sm_90", "sm_120") if block_type in ("Q4_K", "Q6_K") else ("sm_90",):  # other cuts of the same kernel
            with compiling_for(gpu_targets()[target]):
                calls = [lambda: kiln.fixed_linear(fixed, words, halves, block_type, counters),  # noqa: B023
                         lambda: kiln.fixed_partials(fixed, words, halves, block_type),  # noqa: B023
                         lambda: kiln.fixed_linear_squares(fixed, words, halves, block_type, counters, roots, 1e-6)]  # noqa: B023
                first, *others = [calls[0]() for _ in range(20)]
                parts = calls[1]()
                assert all(torch.equal(first, other) for other in others) and torch.equal(parts, calls[1]())
                error = relative(first, expected)
                print(f"gemv {block_type} {terms} bytes {target} {k} x {n}: {error:.1e}")
                assert error < float32_limit(block_type) and relative(parts.sum(0, keepdim=True), expected) < float32_limit(block_type)
                scaled, squares = calls[2]()
                assert torch.equal(scaled, calls[2]()[0]) and torch.equal(squares, calls[2]()[1])
                assert relative(scaled, expected * add_norm.root(roots.double(), k, 1e-6)) < float32_limit(block_type)
                assert relative(squares.sum(), scaled.double().square().sum()) < 1e-6
                if glu_fits(n):
                    gate, value = expected.chunk(2, -1)
                    gated = torch.nn.functional.gelu(gate, approximate="tanh") * value
                    first, *others = [kiln.fixed_glu(fixed, words, halves, block_type, counters) for _ in range(20)]
                    assert all(torch.equal(first, other) for other in others)
                    assert relative(fixed_point.dequantize(first), gated) < {1: 2e-2, 2: 8e-5, 3: 3e-6}[terms]
        assert not counters.any()


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("scaled", [True, False])
def test_add_norm(terms, scaled):
    g = torch.Generator("cuda").manual_seed(4)
    for d in (*(model.hidden for model in MEASURED), 160):
        x, branch = (torch.randn(1, d, generator=g, device="cuda") * size for size in (20, 0.03))
        post_weight, weight = (torch.rand(d, generator=g, device="cuda") + 0.1 for _ in range(2))
        scale = torch.tensor([0.37], device="cuda") if scaled else None
        stream = x.double() + branch.double() / (branch.double().square().mean() + 1e-6).sqrt() * post_weight.double()
        stream = stream * scale.double() if scaled else stream
        normed = stream / (stream.square().mean() + 1e-6).sqrt() * weight.double()
        squares = branch.square().unflatten(1, (-1, 32)).sum((0, 2))
        x_out, out, left = kiln.add_norm(x, branch, squares, post_weight, scale, weight, 1e-6, terms)
        assert relative(x_out, stream) < 3e-7
        for found, sums in ((out, left), kiln.norm_fixed(x_out, weight, terms)):
            rooted = fixed_point.dequantize(found).double() * add_norm.root(sums.double(), d, 1e-6)
            assert relative(rooted, normed) < {1: 1.5e-2, 2: 6e-5, 3: 6e-7}[terms]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@configured(sliding_cut.SLIDING_TILES)
def test_sliding_decode(target, dtype, model):
    """From projections in parts, before, at and past the wrap of the ring, NaN in every slot that no query may see."""
    heads, kv_heads, dim = model.sliding.queries, model.sliding.kv, model.sliding.dim
    g = torch.Generator("cuda").manual_seed(5)
    weights = [torch.rand(dim, generator=g, device="cuda") * 0.5 for _ in range(2)]
    for pos in (0, 1, 15, 16, 17, 1022, 1023, 1024, 1025, 4096, 131071):
        qk = torch.randn(6, (heads + kv_heads) * dim, generator=g, device="cuda")
        v = torch.randn(3, kv_heads * dim, generator=g, device="cuda")
        angle = torch.rand(1, dim // 2, generator=g, device="cuda") * 6
        raw = (qk[:, : heads * dim], qk[:, heads * dim :], v, *weights, angle.cos(), angle.sin())
        rings = [torch.full((WINDOW, kv_heads, dim), float("nan"), device="cuda", dtype=dtype) for _ in range(2)]
        past = torch.arange(max(0, pos - WINDOW + 1), pos, device="cuda")
        for ring in rings:
            ring[past % WINDOW] = torch.randn(len(past), kv_heads, dim, generator=g, device="cuda").mul_(0.3).to(dtype)
        kept = [ring.clone() for ring in rings]
        with compiling_for(gpu_targets()[target]):
            out = kiln.sliding_decode(*raw, *rings, torch.tensor([pos], device="cuda"), WINDOW, 1e-6, 2)
        prepared = [t.double() for t in prepare.prepare_reference(*raw, 1e-6, torch.float32)]
        keys, values = (torch.cat((ring[past % WINDOW].double(), own)) for ring, own in zip(kept, prepared[1:], strict=True))
        mask = torch.ones(1, len(keys), dtype=torch.bool, device="cuda")
        error = relative(fixed_point.dequantize(out), exact(prepared[0], keys, values, mask).flatten(1))
        print(f"sliding_decode {target} {dtype} at {pos}: {error:.1e}")
        assert error < {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-4}[dtype], pos
        slot = pos % WINDOW
        for ring, old, own in zip(rings, kept, prepared[1:], strict=True):
            assert relative(ring[slot], own[0]) < {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}[dtype]
            ring[slot] = old[slot]
            assert torch.equal(ring.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@configured(attention.DECODE_TILES)
def test_tq4_decode(target, dtype, model):
    """From projections in parts, over the codes and the exact window of `dtype` that were written, garbage behind them."""
    heads, kv_heads, dim = model.full.queries, model.full.kv, model.full.dim
    g = torch.Generator("cuda").manual_seed(6)
    weights = [torch.rand(dim, generator=g, device="cuda") * 0.5 for _ in range(2)]
    for length in (*LENGTHS, 255, 256, 257, 258):
        qk = torch.randn(6, (heads + kv_heads) * dim, generator=g, device="cuda")
        v = torch.randn(3, kv_heads * dim, generator=g, device="cuda")
        angle = torch.rand(1, dim // 2, generator=g, device="cuda") * 6
        raw = (qk[:, : heads * dim], qk[:, heads * dim :], v, *weights, angle.cos(), angle.sin())
        last = length - 1
        past = [(torch.randn(last, kv_heads, dim, generator=g, device="cuda") * 0.3).to(dtype) for _ in range(2)]
        codes = [t for x in past for t in tq4_codes(x, slots_for(length), last)]
        rings = tq4_rings(*past, last, EXACT_WINDOW)
        kept, pos = [t.clone() for t in (*codes, *rings)], torch.tensor([last], device="cuda")
        with compiling_for(gpu_targets()[target]):
            out = kiln.tq4_decode(*raw, *codes, *rings, pos, 1e-6, 2, [])
        prepared = prepare.prepare_reference(*raw, 1e-6, torch.float32)
        keys, values = (torch.cat([x, own.to(dtype)]) for x, own in zip(past, prepared[1:], strict=True))
        error = relative(fixed_point.dequantize(out), tq4_exact(prepared[0], keys, values, last, EXACT_WINDOW).flatten(1))
        print(f"tq4_decode {target} {dtype} at {length}: {error:.1e}")
        assert error < {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-4}[dtype], length
        for i, x in ((0, prepared[1]), (2, prepared[2])):
            written = codec.decode(codes[i][:, last], codes[i + 1][:, last])
            assert relative(written, codec.decode(*codec.encode(x[0])).double()) < 5e-3  # a coordinate on a boundary may go either way
            for t in (i, i + 1):
                codes[t][:, last] = kept[t][:, last]
                assert torch.equal(codes[t].view(torch.int16), kept[t].view(torch.int16))
        slot = last % EXACT_WINDOW
        for ring, old, own in zip(rings, kept[4:], prepared[1:], strict=True):
            assert relative(ring[slot], own[0]) < {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}[dtype]
            ring[slot] = old[slot]
            assert torch.equal(ring.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sm, dim", list({tile: key for key, tile in prefill.PIECE_TILES.items()}.values()))
@both_models
def test_tq4_prefill_in_pieces(sm, dim, dtype, model):
    """Chunks without codes, within a piece of codes, up to its end, across it, and after several."""
    piece = prefill.PIECE_TILES[sm, dim].piece
    for slots, end, tokens in ((4096, 200, 200), (4096, 300, 300), (piece, piece, 70), (131072, piece + EXACT_WINDOW, 70),
                               (131072, piece + EXACT_WINDOW + 5, 70), (131072, piece + EXACT_WINDOW + 70, 70),
                               (131072, 2 * piece + EXACT_WINDOW + 1, 33), (131072, 131072, 70)):  # fmt: skip
        q, k, v = tensors(dataclasses.replace(model.full, dim=dim), dtype, tokens, end, end, scale=0.3)
        pos, state = torch.arange(end - tokens, end, device="cuda"), tq4_state(k, v, slots, end - tokens, EXACT_WINDOW)
        with compiling_for(gpu_targets()[f"sm_{sm}"]):
            out, again = (kiln.tq4_attention(q, *state, pos, None) for _ in range(2))
        error = relative(out, tq4_exact(q, k, v, end - tokens, EXACT_WINDOW))
        print(f"tq4 prefill of {tokens} up to {end} of {slots}, {dtype}: {error:.1e}")
        assert error < LIMIT[dtype] and torch.equal(out, again)


@pytest.mark.parametrize("block_type", list(LAYOUTS))
def test_quantized_embedding(block_type):
    words, halves = packed(block_type, 1000, 4 * LAYOUTS[block_type].block, torch.Generator("cuda").manual_seed(1))
    ids = torch.randint(0, 1000, (37,), device="cuda")
    assert torch.equal(kiln.quantized_embedding(ids, words, halves, block_type), dequantize(block_type, words, halves).T[ids])


@pytest.mark.parametrize("vocab", [512, GEMMA4_31B.vocab])
def test_sample(vocab):
    """The same token as the reference for every setting."""
    from kiln.custom_ops.step.sample import reference

    one = lambda value, dtype: torch.tensor([value], dtype=dtype, device="cuda")  # noqa: E731
    g = torch.Generator("cuda").manual_seed(2)
    same = total = 0
    for pos in range(20):
        logits = torch.randn(1, vocab, generator=g, device="cuda") * 3
        for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 64, 0.95), (0.7, 0, 0.9), (1.3, 40, 1.0), (1.0, 0, 1.0)):
            args = (logits, one(temperature, torch.float32), one(top_k, torch.int32), one(top_p, torch.float32), one(7, torch.int64),
                    one(pos, torch.int64))
            got, want = kiln.sample(*args), reference(*args)
            assert got.shape == (1,) and (temperature > 0 or torch.equal(got, want))
            same, total = same + int(got == want), total + 1
    assert same >= total - 1  # exp and log may differ in the last bit between the two
