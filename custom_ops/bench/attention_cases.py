"""Benchmark cases of the ops that read or write caches; see `cases.py`."""

from __future__ import annotations

import torch

from kiln.custom_ops.attention import prepare
from kiln.custom_ops.attention.flash import attend
from kiln.custom_ops.bench.cases import (
    PLAIN_STEP,
    ROUNDED,
    STEP,
    TERMS,
    Case,
    Tensors,
    Workload,
    clone,
    fixed_bytes,
    kiln,
    normal,
    of_tokens,
)
from kiln.custom_ops.geometry import EPS, Heads, keys_attended
from kiln.custom_ops.tq4 import codec
from kiln.custom_ops.weights import fixed_point

SPREAD = 0.3  # of random queries, keys and values: scores of a few units, as after the norms of a real model
PARTS = 4  # in which matmuls leave what attention adds up
LEAST_SLOTS = 8192  # of a cache, however little of it is filled: a decode kernel has as many splits as for a long one


def positions(g: torch.Generator, start: int, end: int) -> torch.Tensor:
    return torch.arange(start, end, device=g.device)


def _some(tokens: int, device: torch.device) -> torch.Tensor:
    """The queries of a chunk that are compared: a reference of all would not fit into memory."""
    return torch.linspace(0, tokens - 1, min(tokens, 16), device=device).long().unique()


def attention_flops(heads: Heads, keys: int) -> int:
    return 4 * heads.queries * heads.dim * keys


def sliding_case(heads: Heads, window: int, tokens: int) -> Case:
    start = 4 * window  # the ring is full

    def arguments(g: torch.Generator) -> Tensors:
        q = normal(g, tokens, heads.queries, heads.dim, scale=SPREAD)
        k, v = (normal(g, tokens, heads.kv, heads.dim, scale=SPREAD) for _ in range(2))
        rings = (normal(g, window, heads.kv, heads.dim, scale=SPREAD) for _ in range(2))
        return (q, k, v, *rings, positions(g, start, start + tokens))

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
        copy=clone(3, 4),
        result=lambda out, arguments: out[_some(tokens, out.device)],
        group=PLAIN_STEP if tokens == 1 else "",
        count=heads.layers,
    )


def projections(g: torch.Generator, heads: Heads, tokens: int = 1) -> Tensors:
    """q, k, v of each token in parts, weights of the norms, cos and sin."""
    parts = (PARTS,) if tokens == 1 else (PARTS, tokens)
    qk = normal(g, *parts, (heads.queries + heads.kv) * heads.dim, dtype=torch.float32)
    v = normal(g, *parts, heads.kv * heads.dim, dtype=torch.float32)
    weights = (normal(g, heads.dim, dtype=torch.float32, scale=SPREAD) for _ in range(2))
    angle = normal(g, tokens, heads.dim // 2, dtype=torch.float32)
    columns = heads.queries * heads.dim
    return (qk[..., :columns], qk[..., columns:], v, *weights, angle.cos(), angle.sin())


def around_bytes(heads: Heads) -> int:
    """What attention from projections reads and writes beside the cache."""
    return 4 * PARTS * (heads.queries + 2 * heads.kv) * heads.dim + fixed_bytes(heads.queries * heads.dim)


def sliding_decode_case(heads: Heads, window: int, tokens: int = 1) -> Case:
    """From the projections, in as many parts as their matmuls leave them, to the next matmul's activations; several tokens of one row."""
    start, slots = 4 * window, window + tokens - 1

    def arguments(g: torch.Generator) -> Tensors:
        shape = (slots, heads.kv, heads.dim) if tokens == 1 else (1, slots, heads.kv, heads.dim)
        rings = (normal(g, *shape, scale=SPREAD) for _ in range(2))
        row = () if tokens == 1 else (torch.zeros(tokens, dtype=torch.int64, device=g.device),)
        return (*projections(g, heads, tokens), *rings, positions(g, start, start + tokens), *row)

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, *_ = arguments
        prepared = prepare.prepare_reference(q, k, v, q_weight, k_weight, cos, sin, EPS, k_ring.dtype)
        past = torch.arange(start - window + 1, start, device=pos.device)
        sides = ((k_ring.flatten(0, -3), prepared[1]), (v_ring.flatten(0, -3), prepared[2]))
        keys, values = (torch.cat([ring[past % slots], own]) for ring, own in sides)
        distance = pos[:, None] - torch.cat([past, pos])
        return attend(prepared[0].float(), keys, values, (distance >= 0) & (distance < window)).flatten(1)

    op, how = (kiln.sliding_decode, {}) if tokens == 1 else (kiln.sliding_decode_rows, {"slots": True})  # the tokens are of one row
    return Case(
        op="sliding_decode",
        shape=f"{tokens} over {window}",
        bytes=2 * 2 * heads.kv * heads.dim * slots + tokens * around_bytes(heads),
        flops=attention_flops(heads, tokens * window),
        limit=ROUNDED,
        arguments=arguments,
        call=lambda *a: op(*a, window, EPS, TERMS, **how),
        reference=reference,
        copy=clone(7, 8),
        result=lambda out, arguments: fixed_point.dequantize(out),
        group=STEP if tokens == 1 else f"sliding attention of a fused decode step{of_tokens(tokens)}",
        count=heads.layers,
    )


def _kv_len(pos: torch.Tensor) -> torch.Tensor:
    return pos[-1:].to(torch.int32) + 1


def global_case(heads: Heads, tokens: int, depth: int) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        q = normal(g, tokens, heads.queries, heads.dim, scale=SPREAD)
        slots = max(depth, LEAST_SLOTS)
        caches = []
        for _ in range(2):
            cache = torch.empty(slots, heads.kv, heads.dim, dtype=torch.bfloat16, device=g.device)
            cache[:depth] = normal(g, depth, heads.kv, heads.dim, scale=SPREAD)
            cache[depth:] = torch.nan
            caches.append(cache)
        pos = positions(g, depth - tokens, depth)
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
        copy=clone(1, 2),
        result=lambda out, arguments: out[_some(tokens, out.device)],
    )


def tq4_row_bytes(heads: Heads) -> int:
    """Bytes of one token's key, or value, in a TQ4 cache."""
    return heads.kv * (heads.dim // 2 + 2)


def tq4_caches(g: torch.Generator, heads: Heads, depth: int) -> list[torch.Tensor]:
    """k_codes, k_scales, v_codes, v_scales with `depth` vectors, and no numbers behind them."""
    slots = max(depth, LEAST_SLOTS)
    caches: list[torch.Tensor] = []
    for _ in range(2):
        shape = (heads.kv, depth, heads.dim // 4)
        codes = torch.empty(heads.kv, slots, heads.dim // 4, dtype=torch.int16, device=g.device)
        codes[:, :depth] = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=g, device=g.device)
        scales = torch.full((heads.kv, slots), torch.nan, dtype=torch.float16, device=g.device)
        scales[:, :depth].uniform_(0.5 * SPREAD, 1.5 * SPREAD, generator=g)
        caches += [codes, scales]
    return caches


def tq4_rings(g: torch.Generator, work: Workload, end: int, spare: int = 0) -> list[torch.Tensor]:
    """The exact window before position `end`, in a ring of `spare` more slots: no numbers in those that a query there does not read."""
    heads, rings, slots = work.full, [], work.exact_window + spare
    for _ in range(2):
        ring = torch.full((slots, heads.kv, heads.dim), torch.nan, dtype=torch.bfloat16, device=g.device)
        past = torch.arange(max(end - work.exact_window + 1, 0), end, device=g.device)
        ring[past % slots] = normal(g, len(past), heads.kv, heads.dim, scale=SPREAD)
        rings.append(ring)
    return rings


def tq4_bytes(work: Workload, tokens: int, depth: int) -> int:
    """Bytes of the keys and values that `tokens` queries up to `depth` read: in code, and of the newest ones exactly."""
    heads, exact_window = work.full, work.exact_window
    return 2 * max(depth - exact_window, 0) * tq4_row_bytes(heads) + 2 * min(depth, exact_window - 1 + tokens) * heads.kv * heads.dim * 2


def tq4_center(g: torch.Generator, heads: Heads, centered: bool) -> list[torch.Tensor]:
    """The key center, or none."""
    return [normal(g, heads.kv, heads.dim, dtype=torch.float32, scale=SPREAD)] if centered else []


def tq4_expected(q: torch.Tensor, own: Tensors, codes: Tensors, rings: Tensors, pos: torch.Tensor, start: int, exact_window: int,
                 center: Tensors = ()) -> torch.Tensor:
    """Attention of q at positions pos of a chunk from `start` on: over decoded vectors, and over the newest ones as they are."""
    end = start + own[0].shape[0]
    newest = torch.arange(max(start - exact_window + 1, 0), end, device=q.device)
    past = newest[newest < start]

    def side(i: int) -> torch.Tensor:
        coded = codec.decode(codes[2 * i][:, :end], codes[2 * i + 1][:, :end]).transpose(0, 1)
        if center and i == 0:
            coded = coded + center[0]
        return torch.cat([coded, rings[i][past % rings[i].shape[0]].float(), own[i].float()])

    distance = pos[:, None] - newest
    old = torch.arange(end, device=q.device) <= pos[:, None] - exact_window
    return attend(q.float(), side(0), side(1), torch.cat([old, (distance >= 0) & (distance < exact_window)], 1))


def tq4_case(work: Workload, tokens: int, depth: int, centered: bool = True) -> Case:
    heads, start = work.full, depth - tokens

    def arguments(g: torch.Generator) -> Tensors:
        q = normal(g, tokens, heads.queries, heads.dim, scale=SPREAD)
        own = (normal(g, tokens, heads.kv, heads.dim, scale=SPREAD) for _ in range(2))
        pos = positions(g, start, depth)
        caches = (*tq4_caches(g, heads, depth), *tq4_rings(g, work, start))
        return (q, *own, *caches, pos, _kv_len(pos), *tq4_center(g, heads, centered))

    def reference(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        some = _some(tokens, q.device)
        return tq4_expected(q[some], rest[:2], rest[2:6], rest[6:8], rest[8][some], start, work.exact_window, rest[10:])

    return Case(
        op="tq4 decode" if tokens == 1 else "tq4 prefill",
        shape=f"{tokens} at {depth}",
        bytes=tq4_bytes(work, tokens, depth) + 4 * tokens * heads.queries * heads.dim,
        flops=attention_flops(heads, keys_attended(start, tokens)),
        limit=ROUNDED,
        arguments=arguments,
        call=lambda *a: kiln.tq4_attention(*a[:11], 0, *a[11:]),
        reference=reference,
        copy=clone(*range(3, 9)),
        result=lambda out, arguments: out[_some(tokens, out.device)],
        group=f"attention of a decode step at {depth}, global layers (TQ4)" if tokens == 1 else f"attention of {tokens} at {depth} (TQ4)",
        count=heads.layers,
    )


def tq4_decode_case(work: Workload, depth: int, tokens: int = 1, centered: bool = True) -> Case:
    """From the projections to the next matmul's activations; the tokens are the last of `depth`, several are of one row."""
    heads, start = work.full, depth - tokens

    def arguments(g: torch.Generator) -> Tensors:
        caches = [*tq4_caches(g, heads, depth), *tq4_rings(g, work, start, tokens - 1), *tq4_center(g, heads, centered)]
        row = () if tokens == 1 else (torch.zeros(tokens, dtype=torch.int64, device=g.device),)
        return (*projections(g, heads, tokens), *(c if tokens == 1 else c[None] for c in caches), positions(g, start, depth), *row)

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        q, k, v, q_weight, k_weight, cos, sin, *caches = arguments[: 13 + centered]
        prepared = prepare.prepare_reference(q, k, v, q_weight, k_weight, cos, sin, EPS, torch.float32)
        caches = caches if tokens == 1 else [c[0] for c in caches]
        if centered and depth >= work.exact_window:  # what a step codes its later tokens read
            late = torch.arange(max(start - work.exact_window + 1, 0), max(depth - work.exact_window + 1, 0), device=q.device)
            keys = caches[4][late % caches[4].shape[0]].float() - caches[6]
            for i, coded in enumerate(codec.encode(keys.transpose(0, 1))):
                caches[i] = caches[i].index_copy(1, late, coded)
        given = (tuple(caches[:4]), tuple(caches[4:6]), arguments[13 + centered], start, work.exact_window, tuple(caches[6:]))
        return tq4_expected(prepared[0], prepared[1:], *given).flatten(1)

    def call(*a: torch.Tensor) -> torch.Tensor:
        center, (pos, *row) = [*a[13 : 13 + centered]], a[13 + centered :]
        if tokens == 1:
            return kiln.tq4_decode(*a[:13], pos, EPS, TERMS, center)
        return kiln.tq4_decode_rows(*a[:13], pos, *row, work.exact_window, EPS, TERMS, center)

    return Case(
        op="tq4_decode",
        shape=f"{tokens} at {depth}",
        bytes=tq4_bytes(work, tokens, depth) + tokens * around_bytes(heads),
        flops=attention_flops(heads, tokens * depth),
        limit=ROUNDED,
        arguments=arguments,
        call=call,
        reference=reference,
        copy=clone(*range(7, 13 + centered)),
        result=lambda out, arguments: fixed_point.dequantize(out),
        group=f"global layers of a fused decode step at {depth} (TQ4){of_tokens(tokens)}",
        count=heads.layers,
    )


def tq4_write_case(heads: Heads, tokens: int) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        slots = max(tokens, LEAST_SLOTS)
        codes = [torch.zeros(heads.kv, slots, heads.dim // 4, dtype=torch.int16, device=g.device) for _ in range(2)]
        scales = [torch.full((heads.kv, slots), torch.nan, dtype=torch.float16, device=g.device) for _ in range(2)]
        k, v = (normal(g, tokens, heads.kv, heads.dim) for _ in range(2))
        return (codes[0], scales[0], codes[1], scales[1], k, v, positions(g, slots - tokens, slots))

    def result(out: None, arguments: Tensors) -> torch.Tensor:
        k_codes, k_scales, v_codes, v_scales, _, _, pos = arguments
        sides = (k_codes, k_scales), (v_codes, v_scales)
        return torch.stack([codec.decode_rotated(codes[:, pos], scales[:, pos]) for codes, scales in sides])

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        return torch.stack([codec.decode_rotated(*codec.encode(x.transpose(0, 1))) for x in arguments[4:6]])

    return Case(
        op="tq4 write",
        shape=f"{tokens} tokens",
        bytes=2 * tokens * (2 * heads.kv * heads.dim + tq4_row_bytes(heads)),
        flops=0,
        limit=5e-3,  # a coordinate on a boundary may go either way
        arguments=arguments,
        call=lambda *a: kiln.tq4_write(*a, []),
        reference=reference,
        copy=clone(4, 5),
        result=result,
        group=PLAIN_STEP if tokens == 1 else "",
        count=heads.layers,
    )


def decode_attention_cases(work: Workload) -> list[Case]:
    cases, sliding = [], work.sliding
    if sliding:
        cases = [sliding_case(sliding, work.window, 1)]
        cases += [sliding_decode_case(sliding, work.window, tokens) for tokens in (1, *work.together)]
    for depth in work.depths:
        cases += [tq4_decode_case(work, depth), tq4_case(work, 1, depth)]
    for tokens in work.together:
        cases += [tq4_decode_case(work, depth, tokens) for depth in work.depths[::2]]
    return cases + [global_case(work.full, 1, depth) for depth in work.depths]


def prefill_attention_cases(work: Workload) -> list[Case]:
    chunk = work.chunks[-1]
    depths = [depth for depth in work.depths if depth >= chunk]
    return [
        *([sliding_case(work.sliding, work.window, chunk)] if work.sliding else []),
        *(tq4_case(work, chunk, depth) for depth in depths),
        *(global_case(work.full, chunk, depth) for depth in depths),
    ]
