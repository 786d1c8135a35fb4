"""Attention of one token over a TQ4 cache from its raw projections: norms, rotary embedding, cache write, attention, fixed point."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.attention.flash import LOG2E, check_kernel_shapes
from kiln.custom_ops.attention.prepare import (
    check_projections,
    form_constants,
    head_dim,
    prepare_reference,
    prepare_warps,
    prepared_head,
    queries_of,
    query_reference,
)
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import CONTEXT, EPS, EXACT_WINDOW, GEMMA4_31B, GEOMETRIES, Geometry
from kiln.custom_ops.gpu.early import early, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.tq4 import attention, codec
from kiln.custom_ops.tq4.center import check_center, late_key, one_or_none
from kiln.custom_ops.tq4.codec import encode_rows
from kiln.custom_ops.tq4.rotation import rotated_query
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import extent_of


@waits("q_weight_ptr", "k_weight_ptr", "pos_ptr", "k_ring_ptr", "center_ptr")
@triton.jit
def kiln_tq4_prepare(q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, pos_ptr, x_ptr, q_out_ptr, q_scale_ptr,
                       k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr, center_ptr, shift_ptr, splits, stride,
                       v_splits, v_stride, EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
                       QK_NORM: tl.constexpr, V_NORM: tl.constexpr, SCALE: tl.constexpr, NEIGHBOURS: tl.constexpr, GATED: tl.constexpr,
                       TURNED: tl.constexpr, SLOTS: tl.constexpr, RING: tl.constexpr, EXACT_WINDOW: tl.constexpr, EARLY: tl.constexpr):
    """`prepared_head` of one token. Queries as they are to x_ptr, and rotated; keys and values to slot pos % RING of a ring [RING, KV, D],
    and encoded to slot pos. Grid (HEADS + 2 KV).

    EXACT_WINDOW > 0: keys are coded less the center [KV, D], each when it is the oldest in the window of this query, and shift_ptr, float32
    [HEADS], gets what the center adds to base-2 scores.
    """
    head = tl.program_id(0)
    prepare_token(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, pos_ptr, x_ptr, q_out_ptr, q_scale_ptr,
                  k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr, center_ptr, shift_ptr, splits, stride,
                  v_splits, v_stride, EPS, HEADS, KV, D, QK_NORM, V_NORM, SCALE, NEIGHBOURS, GATED, TURNED, SLOTS, RING, EXACT_WINDOW,
                  EARLY)


@triton.jit
def prepare_token(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, pos_ptr, x_ptr, q_out_ptr, q_scale_ptr,
                  k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr, center_ptr, shift_ptr, splits, stride,
                  v_splits, v_stride, EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr,
                  V_NORM: tl.constexpr, SCALE: tl.constexpr, NEIGHBOURS: tl.constexpr, GATED: tl.constexpr, TURNED: tl.constexpr,
                  SLOTS: tl.constexpr, RING: tl.constexpr, EXACT_WINDOW: tl.constexpr, EARLY: tl.constexpr):
    """The head that a program of `kiln_tq4_prepare` prepares."""
    dim = tl.arange(0, D // 2)
    if EXACT_WINDOW > 0:  # of earlier steps: read before this one's are there
        is_key = (head >= HEADS) & (head < HEADS + KV)
        kv_head = tl.where(head < HEADS, head // (HEADS // KV), head - HEADS)
        center_a = tl.load(center_ptr + kv_head * D + dim, head < HEADS + KV, other=0.0)
        center_b = tl.load(center_ptr + kv_head * D + D // 2 + dim, head < HEADS + KV, other=0.0)
        late = late_key(tl.load(pos_ptr).to(tl.int32), EXACT_WINDOW)
        oldest = k_ring_ptr + (late % RING * KV + kv_head) * D + dim
        oldest_a = tl.load(oldest, is_key & (late >= 0), other=0.0).to(tl.float32) - center_a
        oldest_b = tl.load(oldest + D // 2, is_key & (late >= 0), other=0.0).to(tl.float32) - center_b
    a, b = prepared_head(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride,
                         EPS, HEADS, KV, D, QK_NORM, V_NORM, SCALE, NEIGHBOURS, EARLY, GATED, TURNED)
    pos = tl.load(pos_ptr).to(tl.int32)
    row = pos % RING * KV
    if head < HEADS:
        plain = x_ptr + head * D
    elif head < HEADS + KV:
        plain = k_ring_ptr + (row + head - HEADS) * D
    else:
        plain = v_ring_ptr + (row + head - HEADS - KV) * D
    tl.store(plain + dim, a)
    tl.store(plain + D // 2 + dim, b)
    keep = tl.full([1], True, tl.int1)
    if EXACT_WINDOW > 0:
        if head < HEADS:
            tl.store(shift_ptr + head, (tl.sum(a * center_a, 0) + tl.sum(b * center_b, 0)) * LOG2E)
        a = tl.where(is_key, oldest_a, a)
        b = tl.where(is_key, oldest_b, b)
        pos = tl.where(is_key, late, pos)
        keep = keep & (pos >= 0)
    x = tl.reshape(tl.permute(tl.join(a, b), [1, 0]), [1, D])
    if head < HEADS:
        y, scale = rotated_query(x, D)
        tl.store(q_out_ptr + head * D + tl.arange(0, D)[None, :], y)
        tl.store(q_scale_ptr + head, scale)
    else:
        key = head < HEADS + KV
        slot = (head - HEADS) % KV * SLOTS + pos + tl.arange(0, 1)
        encode_rows(x, tl.where(key, k_codes_ptr, v_codes_ptr), tl.where(key, k_scales_ptr, v_scales_ptr), slot, keep, 1, D)


@kernel_op("kiln::tq4_decode", mutates_args=("k_codes", "k_scales", "v_codes", "v_scales", "k_exact", "v_exact", "center"))
def tq4_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
               cos: torch.Tensor, sin: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor,
               v_scales: torch.Tensor, k_exact: torch.Tensor, v_exact: torch.Tensor, pos: torch.Tensor, eps: float, terms: int,
               center: list[torch.Tensor], scale: float = 1.0, v_norm: bool = True, neighbours: bool = False, exact_window: int = 0,
               gated: bool = False) -> torch.Tensor:
    """`prepare_qkv`, the token's key and value into the codes as `tq4_write` and into the exact window, then `tq4_attention`.

    Projections, weights, cos, sin as `prepare_qkv` takes them, caches and exact window as `tq4_attention`; pos [1] int64. Products with
    codes are in float16, in float32 where that is the exact window's dtype. exact_window: keys that are read exactly, of a ring that has
    spare slots; 0: as many as it has. gated: the output is multiplied by the sigmoid of the gates in q. center: as
    `tq4_write` takes and makes it. Returns the output in fixed point of `terms` bytes, a row of H * D. ValueError when a shape does not
    fit.
    """
    check_projections("tq4_decode", q, k, v, q_weight, k_weight, cos, part=not neighbours, gated=gated)
    dim, (kv_heads, slots, _) = head_dim(q_weight, cos), k_codes.shape
    codec.check_dim(dim)
    heads = q.shape[1] // (2 * dim if gated else dim)
    if k.shape[1] != kv_heads * dim or 4 * k_codes.shape[2] != dim:
        raise ValueError(f"tq4_decode: k has {k.shape[1]} elements, k_codes is {tuple(k_codes.shape)}; expected [KV, S, D/4], D {dim}")
    attention.check_exact_window("tq4_decode", k_exact, v_exact, kv_heads, dim)
    caches, rings, dtype, ring_slots = (k_codes, k_scales, v_codes, v_scales), (k_exact, v_exact), k_exact.dtype, k_exact.shape[0]
    window = exact_window or ring_slots
    k_center = one_or_none("tq4_decode", center)
    check_center("tq4_decode", k_center, k_codes, window, k_exact)
    if not use_triton(q):
        q, gate = queries_of(q, dim, gated)
        query, *own = prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, torch.float32, scale, v_norm, neighbours)
        stored = [x.to(dtype) for x in own]
        codec.reference_write(*caches, own[0] if k_center is None else stored[0], own[1], pos, k_center, k_exact, window)
        own = stored
        out = attention.reference(query, *own, *caches, *rings, pos, None, exact_window, k_center)
        for ring, x in zip(rings, own, strict=True):
            ring.index_copy_(0, pos % ring_slots, x)
        out = out.flatten(1)
        return fixed_point.quantize(out if gate is None else out * gate.sum(0).sigmoid(), terms, dim)
    check_kernel_shapes("tq4_decode", dim, k_codes)
    plain = torch.empty((1, heads, dim), dtype=dtype, device=q.device)
    rotated = torch.empty((1, heads, dim), dtype=torch.float32 if dtype == torch.float32 else torch.float16, device=q.device)
    q_scale, shift = (torch.empty((1, heads), dtype=torch.float32, device=q.device) for _ in range(2))  # parts of one would be copied
    weights = (cos if w is None else w for w in (q_weight, k_weight))  # what is not read is any pointer
    kernel(kiln_tq4_prepare)[(heads + 2 * kv_heads,)](
        q, k, v, *weights, cos, sin, pos, plain, rotated, q_scale, *caches, *rings, cos if k_center is None else k_center, shift,
        q.shape[0], q.stride(0), v.shape[0], v.stride(0), EPS=eps, HEADS=heads, KV=kv_heads, D=dim,
        **form_constants(q_weight, v_norm, scale, neighbours, cos, gated), SLOTS=slots, RING=ring_slots,
        EXACT_WINDOW=0 if k_center is None else window, EARLY=early(), num_warps=prepare_warps(dim))  # fmt: skip
    out = fixed_point.empty(1, heads * dim, terms, extent_of(heads * dim, dim), q)
    attention.decode(plain, rotated, q_scale, caches, rings, pos, out, terms, exact_window, q if gated else None,
                     None if k_center is None else shift, k_center)
    return out


@kernel_op("kiln::tq4_read", mutates_args=())
def tq4_read(q: torch.Tensor, q_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, k_codes: torch.Tensor,
             k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k_exact: torch.Tensor, v_exact: torch.Tensor,
             pos: torch.Tensor, eps: float, terms: int, scale: float = 1.0, neighbours: bool = False,
             exact_window: int = 0, k_center: torch.Tensor | None = None) -> torch.Tensor:
    """`tq4_decode` of a layer that reads another's keys and values: the caches hold those of the token already."""
    check_projections("tq4_read", q, q, q, q_weight, q_weight, cos)
    dim, (kv_heads, slots, _) = head_dim(q_weight, cos), k_codes.shape
    codec.check_dim(dim)
    heads = q.shape[1] // dim
    if heads % kv_heads or 4 * k_codes.shape[2] != dim:
        given = f"q has {q.shape[1]} elements, k_codes is {tuple(k_codes.shape)}"
        raise ValueError(f"tq4_read: {given}; expected [KV, S, D/4], D {dim}, a multiple of KV heads")
    attention.check_exact_window("tq4_read", k_exact, v_exact, kv_heads, dim)
    caches, rings, dtype, ring_slots = (k_codes, k_scales, v_codes, v_scales), (k_exact, v_exact), k_exact.dtype, k_exact.shape[0]
    window = exact_window or ring_slots
    check_center("tq4_read", k_center, k_codes, window, k_exact)
    if not use_triton(q):
        query, slot = query_reference(q, q_weight, cos, sin, eps, torch.float32, scale, neighbours), pos % ring_slots
        out = attention.reference(query, k_exact[slot], v_exact[slot], *caches, *rings, pos, None, exact_window,
                                  k_center)
        return fixed_point.quantize(out.flatten(1), terms, dim)
    check_kernel_shapes("tq4_read", dim, k_codes)
    plain = torch.empty((1, heads, dim), dtype=dtype, device=q.device)
    rotated = torch.empty((1, heads, dim), dtype=torch.float32 if dtype == torch.float32 else torch.float16, device=q.device)
    q_scale, shift = (torch.empty((1, heads), dtype=torch.float32, device=q.device) for _ in range(2))  # parts of one would be copied
    weight = cos if q_weight is None else q_weight
    # what the programs of keys and values would write, none of which runs: not the caches, which this op leaves alone
    unused = [torch.empty(1, dtype=t.dtype, device=q.device) for t in (*caches, *rings)]
    kernel(kiln_tq4_prepare)[(heads,)](
        q, q, q, weight, weight, cos, sin, pos, plain, rotated, q_scale, *unused, cos if k_center is None else k_center, shift, q.shape[0],
        q.stride(0), q.shape[0], q.stride(0), EPS=eps, HEADS=heads, KV=kv_heads, D=dim,
        **form_constants(q_weight, True, scale, neighbours), SLOTS=slots, RING=ring_slots,
        EXACT_WINDOW=0 if k_center is None else window, EARLY=early(), num_warps=prepare_warps(dim))  # fmt: skip
    out = fixed_point.empty(1, heads * dim, terms, extent_of(heads * dim, dim), q)
    attention.decode(plain, rotated, q_scale, caches, rings, pos, out, terms, exact_window, shift=None if k_center is None else shift)
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernel at the model's shapes, and attention over a float16 exact window; the merge is among `tq4_attention`'s."""
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "q_scale_ptr"), "*fp32")
    types |= {"center_ptr": "*fp32", "shift_ptr": "*fp32"}
    types |= {"pos_ptr": "*i64", "k_codes_ptr": "*i16", "k_scales_ptr": "*fp16", "v_codes_ptr": "*i16", "v_scales_ptr": "*fp16"}
    types |= dict.fromkeys(("splits", "stride", "v_splits", "v_stride"), "i32")
    h, cases = model.full, []
    constants = {"EPS": EPS, "HEADS": h.queries, "KV": h.kv, "D": h.dim, "SLOTS": CONTEXT, "RING": EXACT_WINDOW,
                 "EXACT_WINDOW": EXACT_WINDOW, "EARLY": early(target)}
    for exact_window in ("*fp16", "*bf16", "*fp32"):
        signature = types | {"q_out_ptr": "*fp32" if exact_window == "*fp32" else "*fp16"}
        signature |= dict.fromkeys(("x_ptr", "k_ring_ptr", "v_ring_ptr"), exact_window)
        forms = [("", model.form)]
        if model is GEMMA4_31B:
            forms += [(", gated, turned in part", GEOMETRIES["qwen35-27b"].form), (", no center", model.form | {"EXACT_WINDOW": 0})]
        cases += [KernelCase(f"tq4_prepare {exact_window[1:]} {h.label}{name}", kiln_tq4_prepare, signature, constants | form,
                             {"num_warps": prepare_warps(h.dim)}, (90,) if name else None, ("stride", "v_stride")) for name, form in forms]
    return cases
