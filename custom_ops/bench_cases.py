"""What `custom_ops/bench.py` times: the ops at the shapes of a model, each with its reference and what it must move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import custom_ops.ops  # noqa: F401
from custom_ops import decode_attention, fixed_point, norm, quantized_embedding, quantized_linear, sample, tq4, tq4_attention
from custom_ops.flash import attend
from custom_ops.gemv import COUNTERS
from custom_ops.layouts import LAYOUTS, dequantize

Tensors = tuple[torch.Tensor, ...]
kiln = torch.ops.kiln

SPREAD = 0.3  # of random queries, keys and values: scores of a few units, as after the norms of a real model
REFERENCE_ROWS = 8192  # of a matrix dequantized at a time
ROUNDED = 6e-3  # relative error that rounding to bfloat16 on the way allows
FIXED = 1e-4  # that two bytes an activation do
TERMS = 2  # bytes of an activation of a decode step
EPS = 1e-6
EXACT = 0.0


@dataclass(frozen=True)
class Case:
    """One call of one op. `arguments` draws its tensors on the generator's device, `call` is what is timed.

    `result` takes what `call` returned, and the arguments, to the tensor that is compared with `reference(*arguments)`.
    `copy` makes the arguments of another call that finds nothing of this one in the cache.
    """

    op: str
    shape: str
    bytes: int  # that must cross memory, each once
    flops: int
    limit: float  # relative error allowed
    arguments: Callable[[torch.Generator], Tensors]
    call: Callable[..., Any]
    reference: Callable[..., torch.Tensor]
    copy: Callable[[Tensors, torch.Generator], Tensors]
    result: Callable[[Any, Tensors], torch.Tensor] = lambda out, arguments: out
    group: str = ""  # sums are shown for each group, `count` calls of each case
    count: int = 0

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


@dataclass(frozen=True)
class Matrix:
    name: str
    kind: str
    n: int
    k: int
    count: int  # of them in the model


@dataclass(frozen=True)
class Heads:
    queries: int
    kv: int
    dim: int
    layers: int


@dataclass(frozen=True)
class Geometry:
    matrices: tuple[Matrix, ...]
    head: Matrix
    sliding: Heads
    window: int
    full: Heads  # the global layers
    depths: tuple[int, ...]  # of decode; every second one, and the last, of prefill
    chunks: tuple[int, ...]  # tokens of a prefill call; the last one is used for attention


# Gemma 4 31B as the Q4_K_M mix has it: where V is Q6_K it stands apart from Q and K.
GEMMA4_31B = Geometry(
    matrices=(
        Matrix("attn_qkv", "Q4_K", 16384, 5376, 25),
        Matrix("attn_qk", "Q4_K", 12288, 5376, 25),
        Matrix("attn_v", "Q6_K", 4096, 5376, 25),
        Matrix("attn_qk", "Q4_K", 18432, 5376, 10),
        Matrix("attn_output", "Q4_K", 5376, 8192, 50),
        Matrix("attn_output", "Q4_K", 5376, 16384, 10),
        Matrix("ffn_gate_up", "Q4_K", 43008, 5376, 60),
        Matrix("ffn_down", "Q4_K", 5376, 21504, 30),
        Matrix("ffn_down", "Q6_K", 5376, 21504, 30),
    ),
    head=Matrix("token_embd", "Q6_K", 262144, 5376, 1),
    sliding=Heads(32, 16, 256, 50),
    window=1024,
    full=Heads(32, 4, 512, 10),
    depths=(128, 512, 2048, 8192, 32768, 131072),
    chunks=(512, 2048),
)
STEP = "norms and sliding attention of a fused decode step"
LEAST_SLOTS = 8192  # of a cache, however little of it is filled: a decode kernel has as many splits as for a long one


def _clone(*which: int) -> Callable[[Tensors, torch.Generator], Tensors]:
    """A copy that shares all arguments but these."""
    return lambda arguments, g: tuple(t.clone() if i in which else t for i, t in enumerate(arguments))


def _normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=g.device).normal_(0, scale, generator=g)


def _positions(g: torch.Generator, start: int, end: int) -> torch.Tensor:
    return torch.arange(start, end, device=g.device)


def packed(kind: str, n: int, k: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words and halves of a matrix [n, k]: any bits are a valid block."""
    layout = LAYOUTS[kind]
    blocks = k // layout.block
    words = torch.randint(-(1 << 31), 1 << 31, (blocks, layout.words, n), generator=g, device=g.device, dtype=torch.int32)
    halves = torch.empty((blocks, layout.halves, n), dtype=torch.float16, device=g.device).uniform_(0, 1e-2, generator=g)
    return words, halves


# ---- products and rows of packed matrices ----


def product_case(op: str, m: Matrix, tokens: int, dtype: torch.dtype, limit: float, group: str) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        return (_normal(g, tokens, m.k, dtype=dtype), *packed(m.kind, m.n, m.k, g))

    def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        parts = ((words[:, :, i : i + REFERENCE_ROWS], halves[:, :, i : i + REFERENCE_ROWS]) for i in range(0, m.n, REFERENCE_ROWS))
        return torch.cat([x.float() @ dequantize(m.kind, *part) for part in parts], 1)

    return Case(
        op=f"{op} {m.kind}",
        shape=f"[{tokens}, {m.k}] x {m.n}",
        bytes=quantized_linear.bytes_moved(m.kind, tokens, m.n, m.k, dtype.itemsize),
        flops=quantized_linear.flops(tokens, m.n, m.k),
        limit=limit,
        arguments=arguments,
        call=lambda x, words, halves: kiln.quantized_linear(x, words, halves, m.kind),
        reference=reference,
        copy=_clone(1, 2),
        group=group,
        count=m.count,
    )


def _fixed_bytes(count: int) -> int:
    """Bytes of `count` activations in fixed point."""
    return 4 * (count // fixed_point.GROUP) * fixed_point.group_words(TERMS)


def fixed_case(m: Matrix) -> Case:
    """The product as a fused decode step does it: summed by the kernel, gated, or left in parts to attention."""
    end = "fixed_glu" if m.name == "ffn_gate_up" else "fixed_partials" if m.name in ("attn_qkv", "attn_qk", "attn_v") else "fixed_linear"

    def arguments(g: torch.Generator) -> Tensors:
        x = fixed_point.quantize(_normal(g, 1, m.k, dtype=torch.float32), TERMS)
        return (x, *packed(m.kind, m.n, m.k, g), torch.zeros(COUNTERS, dtype=torch.int32, device=g.device))

    def call(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
        if end == "fixed_partials":
            return kiln.fixed_partials(x, words, halves, m.kind)
        return getattr(kiln, end)(x, words, halves, m.kind, counters)

    def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
        parts = ((words[:, :, i : i + REFERENCE_ROWS], halves[:, :, i : i + REFERENCE_ROWS]) for i in range(0, m.n, REFERENCE_ROWS))
        y = torch.cat([fixed_point.dequantize(x) @ dequantize(m.kind, *part) for part in parts], 1)
        if end != "fixed_glu":
            return y
        gate, value = y.chunk(2, -1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * value

    def result(out: torch.Tensor, arguments: Tensors) -> torch.Tensor:
        return fixed_point.dequantize(out) if end == "fixed_glu" else out.sum(0, keepdim=True) if end == "fixed_partials" else out

    written = _fixed_bytes(m.n // 2) if end == "fixed_glu" else 4 * m.n
    return Case(
        op=f"{end} {m.kind}",
        shape=f"{m.k} x {m.n}",
        bytes=quantized_linear.bytes_moved(m.kind, 0, m.n, m.k) + _fixed_bytes(m.k) + written,
        flops=quantized_linear.flops(1, m.n, m.k),
        limit=FIXED if end == "fixed_glu" else 1e-5,
        arguments=arguments,
        call=call,
        reference=reference,
        copy=_clone(1, 2),
        result=result,
        group="matrix products of a fused decode step",
        count=m.count,
    )


def fixed_cases(geometry: Geometry) -> list[Case]:
    return [fixed_case(m) for m in (*geometry.matrices, geometry.head)]


def add_norm_case(geometry: Geometry) -> Case:
    d = geometry.head.k

    def arguments(g: torch.Generator) -> Tensors:
        vectors = (_normal(g, *shape, dtype=torch.float32) for shape in ((1, d), (1, d), (d,), (d,)))
        return (*vectors, torch.full((1,), 0.5, device=g.device))

    def reference(x: torch.Tensor, branch: torch.Tensor, post_weight: torch.Tensor, weight: torch.Tensor,
                  scale: torch.Tensor) -> torch.Tensor:
        stream = (x.double() + norm.rms(branch, EPS).double() * post_weight) * scale
        return torch.cat((stream, norm.rms(stream, EPS).double() * weight))

    return Case(
        op="add_norm",
        shape=f"{d}",
        bytes=4 * 5 * d + _fixed_bytes(d),
        flops=0,
        limit=FIXED,
        arguments=arguments,
        call=lambda x, branch, post_weight, weight, scale: kiln.add_norm(x, branch, post_weight, scale, weight, EPS, TERMS),
        reference=reference,
        copy=_clone(0, 1, 2, 3),
        result=lambda out, arguments: torch.cat((out[0], fixed_point.dequantize(out[1]))),
        group=STEP,
        count=2 * (geometry.sliding.layers + geometry.full.layers),
    )


def gemv_cases(geometry: Geometry) -> list[Case]:
    """Every matrix times one token, not fused; the head's activations are float32."""
    group = "matrix products of a decode step"
    cases = [product_case("gemv", m, 1, torch.bfloat16, ROUNDED, group) for m in geometry.matrices]
    return [*cases, product_case("gemv", geometry.head, 1, torch.float32, 1e-5, group)]


def linear_cases(geometry: Geometry) -> list[Case]:
    return [
        product_case("linear", m, tokens, torch.bfloat16, ROUNDED, f"matrix products of {tokens} tokens, the head apart")
        for tokens in geometry.chunks
        for m in geometry.matrices
    ]


def embedding_case(m: Matrix, tokens: int) -> Case:
    def ids(g: torch.Generator) -> torch.Tensor:
        return torch.randint(m.n, (tokens,), generator=g, device=g.device)

    return Case(
        op=f"embedding {m.kind}",
        shape=f"{tokens} of {m.n}, {m.k}",
        bytes=tokens * (m.k // LAYOUTS[m.kind].block * LAYOUTS[m.kind].block_bytes + 4 * m.k),
        flops=0,
        limit=EXACT,
        arguments=lambda g: (ids(g), *packed(m.kind, m.n, m.k, g)),
        call=lambda rows, words, halves: kiln.quantized_embedding(rows, words, halves, m.kind),
        reference=lambda rows, words, halves: quantized_embedding.reference(rows, words, halves, m.kind),
        copy=lambda arguments, g: (ids(g), *arguments[1:]),  # other rows of the same table
    )


# ---- attention ----


def _some(tokens: int, device: torch.device) -> torch.Tensor:
    """The queries of a chunk that are compared: a reference of all would not fit into memory."""
    return torch.linspace(0, tokens - 1, min(tokens, 16), device=device).long().unique()


def keys_attended(start: int, tokens: int, window: int | None = None) -> int:
    return sum(min(p + 1, window or p + 1) for p in range(start, start + tokens))


def attention_flops(heads: Heads, keys: int) -> int:
    return 4 * heads.queries * heads.dim * keys


def sliding_case(geometry: Geometry, tokens: int) -> Case:
    heads, window = geometry.sliding, geometry.window
    start = 4 * window  # the ring is full

    def arguments(g: torch.Generator) -> Tensors:
        q = _normal(g, tokens, heads.queries, heads.dim, scale=SPREAD)
        k, v = (_normal(g, tokens, heads.kv, heads.dim, scale=SPREAD) for _ in range(2))
        rings = (_normal(g, window, heads.kv, heads.dim, scale=SPREAD) for _ in range(2))
        return (q, k, v, *rings, _positions(g, start, start + tokens))

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor,
                  pos: torch.Tensor) -> torch.Tensor:
        some = _some(tokens, q.device)
        past = torch.arange(start - window, start, device=q.device)
        distance = pos[some][:, None] - torch.cat([past, pos])[None, :]
        keys, values = torch.cat([k_ring[past % window], k]), torch.cat([v_ring[past % window], v])
        return attend(q[some].float(), keys, values, (distance >= 0) & (distance < window))

    row = heads.kv * heads.dim * 2
    return Case(
        op="sliding decode" if tokens == 1 else "sliding prefill",
        shape=f"{tokens} over {window}",
        bytes=2 * row * (window - 1 + tokens) + 4 * tokens * heads.queries * heads.dim,
        flops=attention_flops(heads, keys_attended(start, tokens, window)),
        limit=ROUNDED,
        arguments=arguments,
        call=lambda *a: kiln.sliding_attention(*a, window),
        reference=reference,
        copy=_clone(3, 4),
        result=lambda out, arguments: out[_some(tokens, out.device)],
        group="attention and cache writes of a decode step, global layers apart" if tokens == 1 else "",
        count=heads.layers,
    )


def sliding_decode_case(geometry: Geometry) -> Case:
    """From the projections, in as many parts as their products leave them, to the next product's activations."""
    heads, window, parts = geometry.sliding, geometry.window, 4
    start = 4 * window

    def arguments(g: torch.Generator) -> Tensors:
        qk = _normal(g, parts, (heads.queries + heads.kv) * heads.dim, dtype=torch.float32)
        v = _normal(g, parts, heads.kv * heads.dim, dtype=torch.float32)
        weights = (_normal(g, heads.dim, dtype=torch.float32, scale=SPREAD) for _ in range(2))
        angle = _normal(g, 1, heads.dim // 2, dtype=torch.float32)
        rings = (_normal(g, window, heads.kv, heads.dim, scale=SPREAD) for _ in range(2))
        columns = heads.queries * heads.dim
        return (qk[:, :columns], qk[:, columns:], v, *weights, angle.cos(), angle.sin(), *rings, _positions(g, start, start + 1))

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        *raw, k_ring, v_ring, pos = arguments
        prepared = decode_attention.prepare_reference(*raw, EPS, k_ring.dtype)
        past = torch.arange(start - window + 1, start, device=pos.device) % window
        keys, values = (torch.cat([ring[past], own]) for ring, own in zip((k_ring, v_ring), prepared[1:], strict=True))
        mask = torch.ones(1, window, dtype=torch.bool, device=pos.device)
        return attend(prepared[0].float(), keys, values, mask).flatten(1)

    row = heads.kv * heads.dim
    return Case(
        op="sliding_decode",
        shape=f"1 over {window}",
        bytes=2 * 2 * row * window + 4 * parts * (heads.queries * heads.dim + 2 * row) + _fixed_bytes(heads.queries * heads.dim),
        flops=attention_flops(heads, window),
        limit=ROUNDED,
        arguments=arguments,
        call=lambda *a: kiln.sliding_decode(*a, window, EPS, TERMS),
        reference=reference,
        copy=_clone(7, 8),
        result=lambda out, arguments: fixed_point.dequantize(out),
        group=STEP,
        count=heads.layers,
    )


def _kv_len(pos: torch.Tensor) -> torch.Tensor:
    return pos[-1:].to(torch.int32) + 1


def global_case(heads: Heads, tokens: int, depth: int) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        q = _normal(g, tokens, heads.queries, heads.dim, scale=SPREAD)
        slots = max(depth, LEAST_SLOTS)
        caches = []
        for _ in range(2):
            cache = torch.empty(slots, heads.kv, heads.dim, dtype=torch.bfloat16, device=g.device)
            cache[:depth] = _normal(g, depth, heads.kv, heads.dim, scale=SPREAD)
            cache[depth:] = torch.nan
            caches.append(cache)
        pos = _positions(g, depth - tokens, depth)
        return (q, *caches, pos, _kv_len(pos))

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, kv_len: torch.Tensor) -> torch.Tensor:
        some = _some(tokens, q.device)
        mask = torch.arange(depth, device=q.device)[None, :] <= pos[some][:, None]
        return attend(q[some].float(), k[:depth], v[:depth], mask)

    return Case(
        op="global decode" if tokens == 1 else "global prefill",
        shape=f"{tokens} at {depth}",
        bytes=2 * depth * heads.kv * heads.dim * 2 + 4 * tokens * heads.queries * heads.dim,
        flops=attention_flops(heads, keys_attended(depth - tokens, tokens)),
        limit=ROUNDED,
        arguments=arguments,
        call=kiln.global_attention,
        reference=reference,
        copy=_clone(1, 2),
        result=lambda out, arguments: out[_some(tokens, out.device)],
    )


def tq4_row_bytes(heads: Heads) -> int:
    """Bytes of one token's key, or value, in a TQ4 cache."""
    return heads.kv * (heads.dim // 2 + 2)


def tq4_case(heads: Heads, tokens: int, depth: int) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        q = _normal(g, tokens, heads.queries, heads.dim, scale=SPREAD)
        slots = max(depth, LEAST_SLOTS)
        caches: list[torch.Tensor] = []
        for _ in range(2):
            shape = (heads.kv, depth, heads.dim // 4)
            codes = torch.empty(heads.kv, slots, heads.dim // 4, dtype=torch.int16, device=g.device)
            codes[:, :depth] = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=g, device=g.device)
            scales = torch.full((heads.kv, slots), torch.nan, dtype=torch.float16, device=g.device)
            scales[:, :depth].uniform_(0.5 * SPREAD, 1.5 * SPREAD, generator=g)
            caches += [codes, scales]
        pos = _positions(g, depth - tokens, depth)
        return (q, *caches, pos, _kv_len(pos))

    def reference(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        caches, pos = rest[:4], rest[4]
        some = _some(tokens, q.device)
        return tq4_attention.reference(q[some].float(), *(c[:, :depth] for c in caches), pos[some], None)

    return Case(
        op="tq4 decode" if tokens == 1 else "tq4 prefill",
        shape=f"{tokens} at {depth}",
        bytes=2 * depth * tq4_row_bytes(heads) + 4 * tokens * heads.queries * heads.dim,
        flops=attention_flops(heads, keys_attended(depth - tokens, tokens)),
        limit=ROUNDED,
        arguments=arguments,
        call=kiln.tq4_attention,
        reference=reference,
        copy=_clone(1, 2, 3, 4),
        result=lambda out, arguments: out[_some(tokens, out.device)],
        group=f"attention of a decode step at {depth}, global layers (TQ4)" if tokens == 1 else f"attention of {tokens} at {depth} (TQ4)",
        count=heads.layers,
    )


def tq4_write_case(heads: Heads, tokens: int) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        slots = max(tokens, LEAST_SLOTS)
        codes = [torch.zeros(heads.kv, slots, heads.dim // 4, dtype=torch.int16, device=g.device) for _ in range(2)]
        scales = [torch.full((heads.kv, slots), torch.nan, dtype=torch.float16, device=g.device) for _ in range(2)]
        k, v = (_normal(g, tokens, heads.kv, heads.dim) for _ in range(2))
        return (codes[0], scales[0], codes[1], scales[1], k, v, _positions(g, slots - tokens, slots))

    def result(out: None, arguments: Tensors) -> torch.Tensor:
        k_codes, k_scales, v_codes, v_scales, _, _, pos = arguments
        return torch.stack([tq4.decode_rotated(k_codes[:, pos], k_scales[:, pos]), tq4.decode_rotated(v_codes[:, pos], v_scales[:, pos])])

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        return torch.stack([tq4.decode_rotated(*tq4.encode(x.transpose(0, 1))) for x in arguments[4:6]])

    return Case(
        op="tq4 write",
        shape=f"{tokens} tokens",
        bytes=2 * tokens * (2 * heads.kv * heads.dim + tq4_row_bytes(heads)),
        flops=0,
        limit=5e-3,  # a coordinate on a boundary may go either way
        arguments=arguments,
        call=kiln.tq4_write,
        reference=reference,
        copy=_clone(4, 5),
        result=result,
        group="attention and cache writes of a decode step, global layers apart" if tokens == 1 else "",
        count=heads.layers,
    )


def sample_case(vocab: int, label: str, temperature: float, top_k: int, top_p: float) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        values = ((temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32), (7, torch.int64), (100, torch.int64))
        limits = (torch.tensor([value], dtype=dtype, device=g.device) for value, dtype in values)
        return (_normal(g, 1, vocab, dtype=torch.float32, scale=3.0), *limits)

    return Case(
        op="sample",
        shape=f"{label} of {vocab}",
        bytes=4 * vocab,
        flops=0,
        limit=EXACT,
        arguments=arguments,
        call=kiln.sample,
        reference=sample.reference,
        copy=_clone(0),
        group="attention and cache writes of a decode step, global layers apart" if label == "greedy" else "",
        count=1,
    )


def decode_attention_cases(geometry: Geometry) -> list[Case]:
    cases = [sliding_case(geometry, 1), sliding_decode_case(geometry)]
    cases += [tq4_case(geometry.full, 1, depth) for depth in geometry.depths]
    return cases + [global_case(geometry.full, 1, depth) for depth in geometry.depths]


def prefill_attention_cases(geometry: Geometry) -> list[Case]:
    chunk = geometry.chunks[-1]
    depths = [depth for depth in geometry.depths if depth >= chunk]
    return [
        sliding_case(geometry, chunk),
        *(tq4_case(geometry.full, chunk, depth) for depth in depths),
        *(global_case(geometry.full, chunk, depth) for depth in depths),
    ]


def all_cases(geometry: Geometry = GEMMA4_31B) -> list[Case]:
    chunk, vocab = geometry.chunks[-1], geometry.head.n
    return [
        *fixed_cases(geometry),
        add_norm_case(geometry),
        *gemv_cases(geometry),
        *linear_cases(geometry),
        embedding_case(geometry.head, 1),
        embedding_case(geometry.head, chunk),
        *decode_attention_cases(geometry),
        *prefill_attention_cases(geometry),
        tq4_write_case(geometry.full, 1),
        tq4_write_case(geometry.full, chunk),
        sample_case(vocab, "greedy", 0.0, 0, 1.0),
        sample_case(vocab, "top-k 64, top-p 0.95", 1.0, 64, 0.95),
        sample_case(vocab, "no limits", 1.0, 0, 1.0),
    ]
