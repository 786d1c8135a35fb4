"""`tq4_decode` of several tokens, each of one of B rows of caches: all their keys and values are written, then each attends.

As in `sliding_rows`, each token has the bits that it has alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.attention.flash import check_kernel_shapes, merge_warps
from kiln.custom_ops.attention.prepare import (
    check_projections,
    form_constants,
    head_dim,
    prepare_reference,
    prepare_warps,
    query_reference,
    token_strides,
)
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import CONTEXT, EPS, EXACT_WINDOW, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.tq4 import attention, codec
from kiln.custom_ops.tq4.attention import decode_launch, decode_split, kiln_tq4_merge
from kiln.custom_ops.tq4.center import check_center, one_or_none
from kiln.custom_ops.tq4.decode import prepare_token
from kiln.custom_ops.tq4.rows import write_rows
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import extent_of

Caches = tuple[torch.Tensor, ...]  # codes and scales of keys, of values


@waits("q_weight_ptr", "k_weight_ptr", "row_ptr", "pos_ptr", "k_ring_ptr", "center_ptr")
@triton.jit
def kiln_tq4_prepare_rows(q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, pos_ptr, x_ptr, q_out_ptr, q_scale_ptr,
                       k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr, center_ptr, shift_ptr, row_ptr, splits,
                       stride, v_splits, v_stride, EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
                       QK_NORM: tl.constexpr, V_NORM: tl.constexpr, SCALE: tl.constexpr, NEIGHBOURS: tl.constexpr, GATED: tl.constexpr,
                       TURNED: tl.constexpr, SLOTS: tl.constexpr, RING: tl.constexpr, EXACT_WINDOW: tl.constexpr, EARLY: tl.constexpr,
                       TOKEN: tl.constexpr, V_TOKEN: tl.constexpr):
    """`kiln_tq4_prepare` of each of several tokens, TOKEN elements apart, of v V_TOKEN, into the caches of its row.

    Grid (HEADS + 2 KV, tokens).
    """
    token = tl.program_id(1)
    row = tl.load(row_ptr + token)
    codes = row * (KV * SLOTS)
    keys = row * (RING * KV * D)
    heads = token * HEADS
    prepare_token(tl.program_id(0), q_ptr + token * TOKEN, k_ptr + token * TOKEN, v_ptr + token * V_TOKEN, q_weight_ptr, k_weight_ptr,
             cos_ptr + token * (D // 2), sin_ptr + token * (D // 2), pos_ptr + token, x_ptr + heads * D, q_out_ptr + heads * D,
             q_scale_ptr + heads, k_codes_ptr + codes * (D // 4), k_scales_ptr + codes, v_codes_ptr + codes * (D // 4),
             v_scales_ptr + codes, k_ring_ptr + keys, v_ring_ptr + keys, center_ptr + row * (KV * D), shift_ptr + heads, splits, stride,
             v_splits, v_stride, EPS, HEADS, KV, D, QK_NORM, V_NORM, SCALE, NEIGHBOURS, GATED, TURNED, SLOTS, RING, EXACT_WINDOW, EARLY)


@waits("row_ptr")
@triton.jit
def kiln_tq4_decode_rows(q_ptr, q_scale_ptr, x_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr,
                      center_ptr, pos_ptr, o_ptr, ml_ptr, row_ptr, EXACT_WINDOW: tl.constexpr, SLOTS: tl.constexpr, KV: tl.constexpr,
                      GROUP: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr, SPLITS: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr, RING: tl.constexpr,
                      CENTER: tl.constexpr):
    """`kiln_tq4_decode` of each of several tokens over the caches of its row. Grid (KV, SPLITS + EXACT, tokens)."""
    token = tl.program_id(2)
    row = tl.load(row_ptr + token)
    wait_for_earlier_kernels(EARLY)
    codes = row * (KV * SLOTS)
    keys = row * (RING * KV * D)
    heads = token * (KV * GROUP)
    parts = heads * (SPLITS + EXACT)
    decode_split(q_ptr + heads * D, q_scale_ptr + heads, x_ptr + heads * D, k_codes_ptr + codes * (D // 4), k_scales_ptr + codes,
                  v_codes_ptr + codes * (D // 4), v_scales_ptr + codes, k_ring_ptr + keys, v_ring_ptr + keys, center_ptr + row * (KV * D),
                  pos_ptr + token, o_ptr + parts * D, ml_ptr + parts * 2, EXACT_WINDOW, SLOTS, KV, GROUP, PAD, D, EXACT, SPLITS, BLOCK_N,
                  BLOCK_R, ASM, RING, CENTER)


def _check(op: str, q: torch.Tensor, kv_elements: int | None, dim: int, caches: Caches, rings: Caches, pos: torch.Tensor, row: torch.Tensor,
           exact_window: int, k_center: torch.Tensor | None) -> None:
    codec.check_dim(dim)
    codes = caches[0]
    if q.dim() != 3 or any(x.dtype != torch.int64 or x.shape != q.shape[1:2] for x in (pos, row)):
        given = f"q {tuple(q.shape)}, pos {pos.dtype} {tuple(pos.shape)}, row {row.dtype} {tuple(row.shape)}"
        raise ValueError(f"{op}: {given}; expected [S, T, heads * D], int64 [T] twice")
    fits = codes.dim() == 4 and 4 * codes.shape[3] == dim and q.shape[2] % (codes.shape[1] * dim) == 0
    if not fits or kv_elements not in (None, codes.shape[1] * dim):
        given = f"q has {q.shape[2]} elements, k {kv_elements}, k_codes is {tuple(codes.shape)}"
        raise ValueError(f"{op}: {given}; expected [B, KV, S, D/4], D {dim}")
    shape = (codes.shape[0], rings[0].shape[1] if rings[0].dim() == 4 else 0, codes.shape[1], dim)
    if any(ring.shape != shape for ring in rings) or not 0 < exact_window <= shape[1]:
        given = ", ".join(str(tuple(ring.shape)) for ring in rings)
        raise ValueError(f"{op}: exact windows {given} of {exact_window}; expected [{shape[0]}, R, {shape[2]}, {dim}], R no less")
    check_center(op, k_center, codes, exact_window, rings[0], q.shape[1])


def _attended(query: torch.Tensor, caches: Caches, rings: Caches, pos: torch.Tensor, row: torch.Tensor, exact_window: int,
              terms: int, k_center: torch.Tensor | None) -> torch.Tensor:
    """The reference of the second half: a token at a time, its own key and value in the caches."""
    out = []
    for x, p, r in zip(query.split(1), pos.split(1), row.split(1), strict=True):
        mine = [ring[r][0] for ring in rings]
        own = [ring[p % ring.shape[0]] for ring in mine]
        out.append(attention.reference(x, *own, *(c[r][0] for c in caches), *mine, p, None, exact_window,
                                       None if k_center is None else k_center[r][0]))
    return fixed_point.quantize(torch.cat(out).flatten(1), terms, query.shape[-1])


@kernel_op("kiln::tq4_decode_rows", mutates_args=("k_codes", "k_scales", "v_codes", "v_scales", "k_exact", "v_exact", "center"))
def tq4_decode_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
                    cos: torch.Tensor, sin: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor,
                    v_scales: torch.Tensor, k_exact: torch.Tensor, v_exact: torch.Tensor, pos: torch.Tensor, row: torch.Tensor,
                    exact_window: int, eps: float, terms: int, center: list[torch.Tensor], scale: float = 1.0,
                    v_norm: bool = True, neighbours: bool = False) -> torch.Tensor:
    """`tq4_decode` of T tokens: q, k, v float32 [S, T, heads * D]; cos, sin [T, D / 2]; pos, row [T] int64, a row below B.

    k_codes, v_codes int16 [B, KV, S, D/4]; k_scales, v_scales float16 [B, KV, S]; k_exact, v_exact [B, R, KV, D], R no less than
    exact_window + T - 1, or than every position + 1; center one of float32 [B, KV, D] or none. Returns T rows of H * D in fixed point.
    ValueError when a shape does not fit.
    """
    check_projections("tq4_decode_rows", q, k, v, q_weight, k_weight, cos)
    dim, caches, rings = head_dim(q_weight, cos), (k_codes, k_scales, v_codes, v_scales), (k_exact, v_exact)
    k_center = one_or_none("tq4_decode_rows", center)
    _check("tq4_decode_rows", q, k.shape[-1], dim, caches, rings, pos, row, exact_window, k_center)
    if use_triton(q):
        weights = [cos if w is None else w for w in (q_weight, k_weight)]  # what is not read is any pointer
        return _launch((q, k, v), weights, cos, sin, caches, rings, caches, rings, pos, row, exact_window, eps, terms,
                       form_constants(q_weight, v_norm, scale, neighbours), k_center)
    query, *own = prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, torch.float32, scale, v_norm, neighbours)
    for ring, x in zip(rings, own, strict=True):
        ring[row, pos % ring.shape[1]] = x.to(ring.dtype)
    write_rows(caches, own[0], own[1], pos, row, k_center, k_exact, exact_window, alone=True)
    return _attended(query, caches, rings, pos, row, exact_window, terms, k_center)


@kernel_op("kiln::tq4_read_rows", mutates_args=())
def tq4_read_rows(q: torch.Tensor, q_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, k_codes: torch.Tensor,
                  k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k_exact: torch.Tensor, v_exact: torch.Tensor,
                  pos: torch.Tensor, row: torch.Tensor, exact_window: int, eps: float, terms: int, scale: float = 1.0,
                  neighbours: bool = False, k_center: torch.Tensor | None = None) -> torch.Tensor:
    """`tq4_decode_rows` of a layer that reads another's keys and values: the caches hold those of the tokens already."""
    check_projections("tq4_read_rows", q, q, q, q_weight, q_weight, cos)
    dim, caches, rings = head_dim(q_weight, cos), (k_codes, k_scales, v_codes, v_scales), (k_exact, v_exact)
    _check("tq4_read_rows", q, None, dim, caches, rings, pos, row, exact_window, k_center)
    if use_triton(q):
        # what the programs of keys and values would write, none of which runs: not the caches, which this op leaves alone
        unused = [torch.empty(1, dtype=t.dtype, device=q.device) for t in (*caches, *rings)]
        weight = cos if q_weight is None else q_weight
        return _launch((q, q, q), [weight, weight], cos, sin, caches, rings, tuple(unused[:4]), tuple(unused[4:]), pos, row, exact_window,
                       eps, terms, form_constants(q_weight, True, scale, neighbours), k_center, queries_alone=True)
    query = query_reference(q, q_weight, cos, sin, eps, torch.float32, scale, neighbours)
    return _attended(query, caches, rings, pos, row, exact_window, terms, k_center)


def _launch(projections: tuple[torch.Tensor, ...], weights: list[torch.Tensor], cos, sin, caches: Caches, rings: Caches,
            written_caches: Caches, written_rings: Caches, pos, row, exact_window: int, eps: float, terms: int, form: dict,
            k_center: torch.Tensor | None, queries_alone: bool = False) -> torch.Tensor:
    """The three kernels. written_...: what the first writes to, the caches or nothing that is read."""
    q, k, v = projections
    _, kv_heads, slots, words = caches[0].shape
    tokens, dim, dtype = q.shape[1], 4 * words, rings[0].dtype
    heads = q.shape[2] // dim
    check_kernel_shapes("tq4_decode_rows", dim, caches[0][0], rings[0][0])
    plain = torch.empty((tokens, heads, dim), dtype=dtype, device=q.device)
    rotated = torch.empty((tokens, heads, dim), dtype=torch.float32 if dtype == torch.float32 else torch.float16, device=q.device)
    q_scale, shift = (torch.empty((tokens, heads), dtype=torch.float32, device=q.device) for _ in range(2))  # parts of one would be copied
    center = q_scale if k_center is None else k_center  # what is not read is any pointer
    kernel(kiln_tq4_prepare_rows)[(heads if queries_alone else heads + 2 * kv_heads, tokens)](
        q, k, v, *weights, cos, sin, pos, plain, rotated, q_scale, *written_caches, *written_rings, center, shift, row, q.shape[0],
        q.stride(0), v.shape[0], v.stride(0), EPS=eps, HEADS=heads, KV=kv_heads, D=dim, **form, SLOTS=slots, RING=rings[0].shape[1],
        EXACT_WINDOW=0 if k_center is None else exact_window, EARLY=early(), **token_strides(q, v),
        num_warps=prepare_warps(dim))  # fmt: skip
    out = fixed_point.empty(tokens, heads * dim, terms, extent_of(heads * dim, dim), q)
    asm = q.is_cuda and dtype != torch.float32
    tile, split, merge = decode_launch(dtype, asm, current_target(), heads, kv_heads, dim, slots, exact_window, terms, rings[0].shape[1],
                                       k_center is not None, k_center is not None and not queries_alone)
    splits = split["SPLITS"] + split["EXACT"]
    part = torch.empty(tokens, splits, heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens, splits, heads, 2, dtype=torch.float32, device=q.device)
    kernel(kiln_tq4_decode_rows)[(kv_heads, splits, tokens)](rotated, q_scale, plain, *caches, *rings, center, pos, part, sums, row,
                                                             **split, num_warps=tile.warps, num_stages=tile.stages)
    limited = kernel(kiln_tq4_merge, attention.MERGE_REGISTERS, part)
    limited[(heads, tokens)](part, sums, pos, out, shift, part, 0, 0, **merge | {"MANY": True}, num_warps=merge_warps(dim))
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes, the exact window's ring with spare slots for 8 tokens."""
    h, cases, ring = model.full, [], EXACT_WINDOW + 14
    raw = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "q_scale_ptr", "shift_ptr"),
                        "*fp32")
    caches = {"pos_ptr": "*i64", "row_ptr": "*i64", "k_codes_ptr": "*i16", "k_scales_ptr": "*fp16", "v_codes_ptr": "*i16",
              "v_scales_ptr": "*fp16", "center_ptr": "*fp32"}
    numbers = dict.fromkeys(("splits", "stride", "v_splits", "v_stride"), "i32")
    parts = {"o_ptr": "*fp32", "ml_ptr": "*fp32"}
    size = (h.queries + h.kv) * h.dim
    for dtype, pointer in ((torch.float16, "*fp16"), (torch.float32, "*fp32")):
        rings = dict.fromkeys(("x_ptr", "k_ring_ptr", "v_ring_ptr"), pointer)
        constants = {"EPS": EPS, "HEADS": h.queries, "KV": h.kv, "D": h.dim, "SLOTS": CONTEXT, "RING": ring, "EXACT_WINDOW": EXACT_WINDOW,
                     "EARLY": early(target), "TOKEN": size, "V_TOKEN": size}
        cases.append(KernelCase(f"tq4_prepare_rows {pointer[1:]} {h.label}", kiln_tq4_prepare_rows,
                                raw | caches | rings | numbers | {"q_out_ptr": pointer}, constants | model.form,
                                {"num_warps": prepare_warps(h.dim)}, aligned=("stride", "v_stride")))
        tile, split, merge = decode_launch(dtype, pointer != "*fp32", target, h.queries, h.kv, h.dim, CONTEXT, EXACT_WINDOW, 2, ring,
                                           True, True)
        cases.append(KernelCase(f"tq4_decode_rows {pointer[1:]} {h.label}", kiln_tq4_decode_rows,
                                {"q_ptr": pointer, "q_scale_ptr": "*fp32"} | rings | caches | parts, split,
                                {"num_warps": tile.warps, "num_stages": tile.stages}))
        types = parts | {"pos_ptr": "*i64", "out_ptr": "*i32", "gate_ptr": "*fp32", "gate_splits": "i32", "gate_stride": "i32"}
        types |= {"shift_ptr": "*fp32"}
        cases.append(KernelCase(f"tq4_decode_rows merge {pointer[1:]} {h.label}", kiln_tq4_merge, types, merge | {"MANY": True},
                                {"num_warps": merge_warps(h.dim), "maxnreg": attention.MERGE_REGISTERS}))
    return cases
