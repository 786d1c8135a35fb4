"""Causal attention over a TQ4 cache (`codec.py`): codes of every position, and an exact window, the ring of the newest keys and values.

Two attentions are merged by their total weights: one over the ring, one over the codes of what is older. The second rotates its queries
and its output once, cached vectors never.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.attention.flash import (
    Tile,
    attend,
    check_heads,
    check_kernel_shapes,
    decode_keys,
    decode_range,
    decode_tile,
    flash_prefill,
    merge_splits,
    merge_warps,
    padded_group,
    prefill_case,
    softmax_step,
    split_size,
)
from kiln.custom_ops.attention.global_attention import causal_mask
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import CONTEXT, EXACT_WINDOW, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.tables import pick
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.tq4 import codec
from kiln.custom_ops.tq4.center import center_keys, center_of, check_center
from kiln.custom_ops.tq4.codec import plane_pair
from kiln.custom_ops.tq4.prefill import attend_in_pieces, piece_cases, piece_tile
from kiln.custom_ops.tq4.rotation import merge_rotated, rotated, rotation_cases, unrotated
from kiln.custom_ops.weights.fixed_point import extent_of, row_words, store_fixed
from kiln.custom_ops.weights.gemv_kernels import sum_splits

# By (architecture, largest head dimension), see `gpu/tables.py`; measured on sm_90, elsewhere what fits. 16-bit activations.
DECODE_TILES = {(86, 512): Tile(keys=64, warps=4, stages=2), (90, 512): Tile(keys=64, warps=4, stages=3)}
WIDE_DECODE_TILE = Tile(keys=64, warps=8, stages=2, splits_per_sm=1)  # more than 8 query heads of a KV head: twice the accumulators
DECODE_FLOAT32 = Tile(keys=16, warps=8, stages=2, splits_per_sm=1)  # stages: with 1, spills
PREFILL_FLOAT32 = Tile(rows=16, keys=16, warps=8, stages=1)
MERGE_REGISTERS = 168  # of a thread, at most: left alone, the assembler stops at 128 and spills
WINDOW_KEYS = 32  # of a split of the exact window, at least


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor,
              v_scales: torch.Tensor, k_exact: torch.Tensor, v_exact: torch.Tensor, pos: torch.Tensor,
              kv_len: torch.Tensor | None, exact_window: int = 0, k_center: torch.Tensor | None = None) -> torch.Tensor:
    """The op in plain torch; arguments as `tq4_attention`. In float32, float64 for float64 q; exact keys and values are rotated as well."""
    compute = torch.promote_types(q.dtype, torch.float32)
    slots, ring_slots = k_codes.shape[1], k_exact.shape[0]
    exact_window = exact_window or ring_slots
    past = torch.arange(ring_slots, device=pos.device) - ring_slots + pos[0]  # position order
    sides = []
    for codes, scales, ring, own, center in ((k_codes, k_scales, k_exact, k, k_center), (v_codes, v_scales, v_exact, v, None)):
        coded = codec.decode_rotated(codes, scales).transpose(0, 1).to(compute)
        coded = coded if center is None else coded + codec.rotate(center.to(compute))
        sides.append(torch.cat([coded, codec.rotate(torch.cat([ring[past % ring_slots], own]).to(compute))]))
    newest = torch.cat([past, pos])
    distance = pos[:, None] - newest[None, :]
    mask = torch.cat([causal_mask(slots, pos - exact_window, kv_len), (distance >= 0) & (distance < exact_window) & (newest >= 0)], 1)
    return codec.unrotate(attend(codec.rotate(q.to(compute)), *sides, mask)).to(q.dtype)


@triton.jit
def coded_end(pos_ptr, EXACT_WINDOW: tl.constexpr):
    """The codes of positions below this are what one query attends to."""
    return tl.maximum(tl.load(pos_ptr).to(tl.int32) + 1 - EXACT_WINDOW, 0)


@waits()
@triton.jit
def kiln_tq4_decode(q_ptr, q_scale_ptr, x_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr, center_ptr,
                      pos_ptr, o_ptr, ml_ptr, EXACT_WINDOW: tl.constexpr, SLOTS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr,
                      PAD: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_R: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr, RING: tl.constexpr, CENTER: tl.constexpr):
    """One query token, one KV head, one split: o_ptr float32 [SPLITS + EXACT, H, D], unnormalized, ml_ptr float32 [SPLITS + EXACT, H, 2].

    The first SPLITS are of the codes, for the rotated query, and stay rotated; the last EXACT of the ring, which holds the query's own key,
    for the query as it is, x_ptr; it has RING slots. Products are transposed, S^T = K Q^T and O^T = V^T P^T, as in `kiln_flash_decode`, one
    for each plane. CENTER > 0: where the query's own key is the last of so many first ones, their mean goes to center_ptr, float32 [KV, D].
    """
    wait_for_earlier_kernels(EARLY)
    decode_split(q_ptr, q_scale_ptr, x_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr, center_ptr,
                 pos_ptr, o_ptr, ml_ptr, EXACT_WINDOW, SLOTS, KV, GROUP, PAD, D, EXACT, SPLITS, BLOCK_N, BLOCK_R, ASM, RING, CENTER)


@triton.jit
def decode_split(q_ptr, q_scale_ptr, x_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ring_ptr, v_ring_ptr, center_ptr,
                  pos_ptr, o_ptr, ml_ptr, EXACT_WINDOW: tl.constexpr, SLOTS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr,
                  PAD: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_R: tl.constexpr, ASM: tl.constexpr, RING: tl.constexpr, CENTER: tl.constexpr):
    """The split that a program of `kiln_tq4_decode` is."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    end = coded_end(pos_ptr, EXACT_WINDOW)
    size = split_size(0, end, SPLITS, BLOCK_N)
    if size == BLOCK_N:
        split = (split + SPLITS) % (SPLITS + EXACT)  # the exact window is the longest work: it starts first, else it fills gaps at the end
    if split < SPLITS:
        low = split * size
        if low < end:  # the merge computes the same split size and does not read the others
            decode_codes(q_ptr, q_scale_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, o_ptr, ml_ptr, head, split, low,
                         tl.minimum(low + size, end), SLOTS, KV, GROUP, PAD, D, BLOCK_N, ASM)
        elif CENTER > 0:  # no code is read yet: the program is free
            if (split == 0) & (tl.load(pos_ptr).to(tl.int32) == CENTER - 1):
                ring = k_ring_ptr + head * D
                tl.store(center_ptr + head * D + tl.arange(0, D), center_of(ring, ring, CENTER, CENTER, KV, D))
    else:
        start, end = decode_range(pos_ptr, pos_ptr, False, EXACT_WINDOW, True)
        size = split_size(start, end, EXACT, BLOCK_R)
        low = start + (split - SPLITS) * size
        if low < end:
            decode_keys(x_ptr, k_ring_ptr, v_ring_ptr, o_ptr, ml_ptr, head, split, low, tl.minimum(low + size, end), RING, KV,
                        GROUP, PAD, D, BLOCK_R, 1)


@triton.jit
def decode_codes(q_ptr, q_scale_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, o_ptr, ml_ptr, head, split, low, high,
                 SLOTS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
                 ASM: tl.constexpr):
    """One rotated query token, one KV head, the codes of positions [low, high), into row `split` of o_ptr and ml_ptr."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    WHOLE: tl.constexpr = SLOTS % BLOCK_N == 0  # then every block lies in the cache: whatever codes it holds, their levels are finite
    Q: tl.constexpr = D // 4
    word = tl.arange(0, Q)
    group = tl.arange(0, PAD)
    heads = head * GROUP + group
    keep = group < GROUP
    q = q_ptr + heads[None, :] * D + word[:, None]
    q0 = tl.load(q, mask=keep[None, :], other=0.0)
    q1 = tl.load(q + Q, mask=keep[None, :], other=0.0)
    q2 = tl.load(q + 2 * Q, mask=keep[None, :], other=0.0)
    q3 = tl.load(q + 3 * Q, mask=keep[None, :], other=0.0)
    q_scale = tl.load(q_scale_ptr + heads, mask=keep, other=0.0)
    m = tl.full([PAD], float("-inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    o0 = tl.zeros([Q, PAD], tl.float32)
    o1 = tl.zeros([Q, PAD], tl.float32)
    o2 = tl.zeros([Q, PAD], tl.float32)
    o3 = tl.zeros([Q, PAD], tl.float32)
    for n in tl.range(low, high, BLOCK_N):
        p = n + tl.arange(0, BLOCK_N)
        held = p < high
        row = head * SLOTS + p
        kw = tl.load(k_codes_ptr + row[:, None] * Q + word[None, :], mask=None if WHOLE else held[:, None], other=None if WHOLE else 0)
        k_scale = tl.load(k_scales_ptr + row, mask=held, other=0.0).to(tl.float32)
        vw = tl.load(v_codes_ptr + row[None, :] * Q + word[:, None], mask=None if WHOLE else held[None, :], other=None if WHOLE else 0)
        v_scale = tl.load(v_scales_ptr + row, mask=held, other=0.0).to(tl.float32)
        k0, k1 = plane_pair(kw, 0, DTYPE, ASM)
        k2, k3 = plane_pair(kw, 1, DTYPE, ASM)
        scores = tl.dot(k2, q2, tl.dot(k0, q0, input_precision="ieee"), input_precision="ieee")
        if DTYPE == tl.float32:
            scores = tl.dot(k1, q1, scores, input_precision="ieee")
            scores = tl.dot(k3, q3, scores, input_precision="ieee")
        else:  # a second chain of dependent products, for which float32 has no registers left
            scores += tl.dot(k3, q3, tl.dot(k1, q1, input_precision="ieee"), input_precision="ieee")
        scores = tl.where(held[:, None], scores * k_scale[:, None] * q_scale[None, :], float("-inf"))
        weights, m, scale = softmax_step(scores, m, 0)
        total = total * scale + tl.sum(weights, 0)
        weights = (weights * v_scale[:, None]).to(DTYPE)
        v0, v1 = plane_pair(vw, 0, DTYPE, ASM)
        o0 = tl.dot(v0, weights, o0 * scale[None, :], input_precision="ieee")
        o1 = tl.dot(v1, weights, o1 * scale[None, :], input_precision="ieee")
        v2, v3 = plane_pair(vw, 1, DTYPE, ASM)
        o2 = tl.dot(v2, weights, o2 * scale[None, :], input_precision="ieee")
        o3 = tl.dot(v3, weights, o3 * scale[None, :], input_precision="ieee")
    part = split * (KV * GROUP) + heads
    o = o_ptr + part[None, :] * D + word[:, None]
    tl.store(o, o0, mask=keep[None, :])
    tl.store(o + Q, o1, mask=keep[None, :])
    tl.store(o + 2 * Q, o2, mask=keep[None, :])
    tl.store(o + 3 * Q, o3, mask=keep[None, :])
    tl.store(ml_ptr + part * 2, m, mask=keep)
    tl.store(ml_ptr + part * 2 + 1, total, mask=keep)


@waits()
@triton.jit
def kiln_tq4_merge(o_ptr, ml_ptr, pos_ptr, out_ptr, shift_ptr, gate_ptr, gate_splits, gate_stride, EXACT_WINDOW: tl.constexpr,
                     HEADS: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr, EXACT_PAD: tl.constexpr, SPLITS: tl.constexpr,
                     SPLITS_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, TERMS: tl.constexpr, EARLY: tl.constexpr,
                     MANY: tl.constexpr, GATED: tl.constexpr, CENTERED: tl.constexpr, REGISTERS: tl.constexpr):
    """Merge one head's splits, the sum over codes rotated back. TERMS > 0: out_ptr is a row of H * D elements in fixed point.

    CENTERED: shift_ptr float32 [H] is what the center adds to the head's base-2 scores of codes.

    MANY, with TERMS: grid (heads, tokens), each token's parts apart. GATED: times the sigmoid of the head's gate, which is the second half
    of its 2 D elements of the sum of `gate_splits` rows, `gate_stride` apart.
    """
    wait_for_earlier_kernels(EARLY)
    head = tl.program_id(0)
    if MANY:
        token = tl.program_id(1)
        pos_ptr += token
        o_ptr += token * ((SPLITS + EXACT) * HEADS * D)
        ml_ptr += token * ((SPLITS + EXACT) * HEADS * 2)
        out_ptr += token * row_words(HEADS * D, TERMS, extent_of(HEADS * D, D))
        shift_ptr += token * HEADS
    dim = tl.arange(0, D)
    end = coded_end(pos_ptr, EXACT_WINDOW)
    active = tl.cdiv(end, split_size(0, end, SPLITS, BLOCK_N))
    m_codes, total_codes, acc_codes = merge_splits(o_ptr, ml_ptr, head, active, HEADS, D, SPLITS_PAD)
    coded = end > 0
    start, end = decode_range(pos_ptr, pos_ptr, False, EXACT_WINDOW, True)
    active = tl.cdiv(end - start, split_size(start, end, EXACT, BLOCK_R))
    m, total, acc = merge_splits(o_ptr + SPLITS * HEADS * D, ml_ptr + SPLITS * HEADS * 2, head, active, HEADS, D, EXACT_PAD)
    if CENTERED:
        m_codes += tl.load(shift_ptr + head, coded, other=0.0)  # before a code is read the center may be anything, no number too
    new = tl.maximum(m, m_codes)  # the query's own key is exact: never -inf
    scale = tl.exp2(m - new)
    scale_codes = tl.exp2(m_codes - new)
    total = total * scale + total_codes * scale_codes
    y = unrotated(acc_codes * (scale_codes / total), D) + (acc * (scale / total))[None, :]
    if GATED:
        gate = sum_splits(gate_ptr + head * (2 * D) + D + dim, gate_stride, gate_splits, None, D, TOGETHER=16)
        y *= (1.0 / (1.0 + tl.exp(-gate)))[None, :]
    if TERMS > 0:
        store_fixed(tl.reshape(y, [D]), out_ptr, head * (D // 32), HEADS * (D // 32), TERMS, D, extent_of(HEADS * D, D))
    else:
        tl.store(out_ptr + head * D + dim[None, :], y)


@triton.jit
def kiln_tq4_prefill(q_ptr, q_scale_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, pos_ptr, out_ptr, lse_ptr, tokens,
                       EXACT_WINDOW: tl.constexpr, SLOTS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr):
    """BLOCK_M rows of one KV head, a row being a (token, head of the group) pair, tokens major; the output stays rotated, and is undefined
    in rows that read no code. lse_ptr float32 [KV, T * GROUP]: the base-2 logarithm of every row's total weight.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    Q: tl.constexpr = D // 4
    head = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest sweeps start first
    word = tl.arange(0, Q)
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = r // GROUP
    query = token * (KV * GROUP) + head * GROUP + r % GROUP
    keep = token < tokens
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    pos = tl.load(pos_ptr).to(tl.int32) - EXACT_WINDOW  # the first query reads codes up to here
    end = pos + last + 1
    if end <= 0:
        return
    in_out = query[:, None] * D + word[None, :]
    q0 = tl.load(q_ptr + in_out, mask=keep[:, None], other=0.0)
    q1 = tl.load(q_ptr + in_out + Q, mask=keep[:, None], other=0.0)
    q2 = tl.load(q_ptr + in_out + 2 * Q, mask=keep[:, None], other=0.0)
    q3 = tl.load(q_ptr + in_out + 3 * Q, mask=keep[:, None], other=0.0)
    q_scale = tl.load(q_scale_ptr + query, mask=keep, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o0 = tl.zeros([BLOCK_M, Q], tl.float32)
    o1 = tl.zeros([BLOCK_M, Q], tl.float32)
    o2 = tl.zeros([BLOCK_M, Q], tl.float32)
    o3 = tl.zeros([BLOCK_M, Q], tl.float32)
    for n in tl.range(0, end, BLOCK_N):
        p = n + tl.arange(0, BLOCK_N)
        held = p < end
        row = head * SLOTS + p
        kw = tl.load(k_codes_ptr + row[None, :] * Q + word[:, None], mask=held[None, :], other=0)
        k_scale = tl.load(k_scales_ptr + row, mask=held, other=0.0).to(tl.float32)
        vw = tl.load(v_codes_ptr + row[:, None] * Q + word[None, :], mask=held[:, None], other=0)
        v_scale = tl.load(v_scales_ptr + row, mask=held, other=0.0).to(tl.float32)
        k0, k1 = plane_pair(kw, 0, DTYPE, ASM)
        scores = tl.dot(q0, k0, input_precision="ieee")
        scores = tl.dot(q1, k1, scores, input_precision="ieee")
        k2, k3 = plane_pair(kw, 1, DTYPE, ASM)
        scores = tl.dot(q2, k2, scores, input_precision="ieee")
        scores = tl.dot(q3, k3, scores, input_precision="ieee")
        scores = scores * q_scale[:, None] * k_scale[None, :]
        scores = tl.where(p[None, :] <= (pos + token)[:, None], scores, float("-inf"))
        weights, m, scale = softmax_step(scores, m, 1)
        total = total * scale + tl.sum(weights, 1)
        weights = (weights * v_scale[None, :]).to(DTYPE)
        v0, v1 = plane_pair(vw, 0, DTYPE, ASM)
        o0 = tl.dot(weights, v0, o0 * scale[:, None], input_precision="ieee")
        o1 = tl.dot(weights, v1, o1 * scale[:, None], input_precision="ieee")
        v2, v3 = plane_pair(vw, 1, DTYPE, ASM)
        o2 = tl.dot(weights, v2, o2 * scale[:, None], input_precision="ieee")
        o3 = tl.dot(weights, v3, o3 * scale[:, None], input_precision="ieee")
    inverse = tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    tl.store(out_ptr + in_out, o0 * inverse, mask=keep[:, None])
    tl.store(out_ptr + in_out + Q, o1 * inverse, mask=keep[:, None])
    tl.store(out_ptr + in_out + 2 * Q, o2 * inverse, mask=keep[:, None])
    tl.store(out_ptr + in_out + 3 * Q, o3 * inverse, mask=keep[:, None])
    tl.store(lse_ptr + head * tokens * GROUP + r, m + tl.log2(total), mask=keep)


def decode_launch(dtype: torch.dtype, asm: bool, target: GpuTarget, heads: int, kv_heads: int, dim: int, slots: int, exact_window: int,
                  terms: int = 0, ring: int = 0, centered: bool = False, made: bool = False) -> tuple[Tile, dict, dict]:
    """The tile and the constants of `kiln_tq4_decode` and of `kiln_tq4_merge`; dtype, ring: of the exact window, its slots; centered: keys
    are coded less a center; made: which the first makes.
    """
    pad = padded_group(heads, kv_heads)
    tile = DECODE_FLOAT32 if dtype == torch.float32 else WIDE_DECODE_TILE if pad > 8 else pick(DECODE_TILES, target, dim)
    block = decode_tile(dtype, target, dim).keys
    wave = target.sm_count * tile.splits_per_sm // kv_heads
    exact = max(1, min(triton.cdiv(exact_window, max(block, WINDOW_KEYS)), wave // 4))
    splits = max(1, min(wave, triton.cdiv(slots, tile.keys)))
    shared = {"EXACT_WINDOW": exact_window, "D": dim, "EXACT": exact, "SPLITS": splits, "BLOCK_N": tile.keys, "BLOCK_R": block,
              "EARLY": early(target)}
    split = shared | {"SLOTS": slots, "KV": kv_heads, "GROUP": heads // kv_heads, "PAD": pad, "ASM": asm, "RING": ring or exact_window,
                      "CENTER": center_keys(exact_window) if made else 0}
    return tile, split, shared | {"HEADS": heads, "EXACT_PAD": triton.next_power_of_2(exact),
                                  "SPLITS_PAD": triton.next_power_of_2(splits), "TERMS": terms, "MANY": False, "GATED": False,
                                  "CENTERED": centered, "REGISTERS": MERGE_REGISTERS}


def prefill_constants(heads: int, kv_heads: int, dim: int, slots: int, exact_window: int) -> dict:
    """The constants of `kiln_tq4_prefill`, which only float32 takes: of 16 bits a chunk is attended to in pieces."""
    return {"EXACT_WINDOW": exact_window, "SLOTS": slots, "KV": kv_heads, "GROUP": heads // kv_heads, "D": dim,
            "BLOCK_M": PREFILL_FLOAT32.rows, "BLOCK_N": PREFILL_FLOAT32.keys, "ASM": False}


def decode(q: torch.Tensor, q_rotated: torch.Tensor, scale: torch.Tensor, caches: tuple[torch.Tensor, ...], rings: tuple[torch.Tensor, ...],
           pos: torch.Tensor, out: torch.Tensor, terms: int = 0, exact_window: int = 0, gates: torch.Tensor | None = None,
           shift: torch.Tensor | None = None, k_center: torch.Tensor | None = None) -> None:
    """Attention of one query, [1, H, D] in the rings' dtype, and rotated and scaled as `rotated_query` does; the rings hold its own key.

    Into `out`: [1, H, D], or a row in fixed point. exact_window: 0 for the rings' slots. gates: float32 [S, H * 2 D], see `kiln_tq4_merge`.
    shift: float32 [1, H], what the center adds to scores of codes. k_center: the center, where this is to make it.
    """
    (k_codes, *_), (_, heads, dim), target = caches, q_rotated.shape, current_target()
    (kv_heads, slots, _), ring = k_codes.shape, rings[0].shape[0]
    asm = q_rotated.is_cuda and q_rotated.dtype != torch.float32
    tile, split, merge = decode_launch(q.dtype, asm, target, heads, kv_heads, dim, slots, exact_window or ring, terms, ring,
                                       shift is not None, k_center is not None)
    splits = split["SPLITS"] + split["EXACT"]
    part = torch.empty(splits, heads, dim, dtype=torch.float32, device=out.device)
    sums = torch.empty(splits, heads, 2, dtype=torch.float32, device=out.device)
    center = scale if k_center is None else k_center  # what is not touched is any pointer
    kernel(kiln_tq4_decode)[(kv_heads, splits)](q_rotated, scale, q, *caches, *rings, center, pos, part, sums, **split,
                                                num_warps=tile.warps, num_stages=tile.stages)
    merge |= {"GATED": gates is not None}
    given = (part, 0, 0) if gates is None else (gates, gates.shape[0], gates.stride(0))
    kernel(kiln_tq4_merge, MERGE_REGISTERS, part)[(heads,)](part, sums, pos, out, scale if shift is None else shift, *given, **merge,
                                                            num_warps=merge_warps(dim))


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, caches: tuple[torch.Tensor, ...], rings: tuple[torch.Tensor, ...],
            pos: torch.Tensor, out: torch.Tensor, exact_window: int = 0, k_center: torch.Tensor | None = None) -> None:
    """Attention of a chunk, arguments as `tq4_attention` and `decode`; the rings hold its past alone."""
    (tokens, heads, dim), (kv_heads, slots, _) = q.shape, caches[0].shape
    exact_window = exact_window or rings[0].shape[0]
    lse, codes_lse = (torch.empty(kv_heads, tokens * heads // kv_heads, dtype=torch.float32, device=q.device) for _ in range(2))
    flash_prefill(q, k, v, *rings, pos, exact_window, out, lse)
    still_rotated = torch.empty_like(out)
    query, scale, shift = rotated(q, k_center, q.dtype != torch.float32)
    if q.dtype == torch.float32:
        tile = PREFILL_FLOAT32
        blocks = (tokens * (heads // kv_heads) + tile.rows - 1) // tile.rows
        kernel(kiln_tq4_prefill)[(blocks, kv_heads)](query, scale, *caches, pos, still_rotated, codes_lse, tokens,
                                                     **prefill_constants(heads, kv_heads, dim, slots, exact_window), num_warps=tile.warps,
                                                     num_stages=tile.stages)
    else:
        tile = piece_tile(current_target(), dim)
        attend_in_pieces(tile, query, scale, caches, pos, exact_window, still_rotated, codes_lse, asm=q.is_cuda)
    merge_rotated(still_rotated, codes_lse, lse, shift, pos, out, exact_window)


@kernel_op("kiln::tq4_attention", mutates_args=())
def tq4_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor,
                  v_scales: torch.Tensor, k_exact: torch.Tensor, v_exact: torch.Tensor, pos: torch.Tensor,
                  kv_len: torch.Tensor | None, exact_window: int = 0, k_center: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention with scale 1 over a TQ4 cache: a query at p reads the key and value of j <= p exactly where p - j < W, else in code.

    q [T, H, D]; k, v [T, KV, D]: the chunk's own; k_codes, v_codes int16 [KV, S, D/4] and k_scales, v_scales float16 [KV, S], holding the
    chunk already; k_exact, v_exact [R, KV, D] in the dtype of q, k and v: slot s holds the latest position p < pos[0] with
    p % R == s, anything at all where there is no such p; pos [T] int64, consecutive; kv_len int32 [1], pos[-1] + 1 on the device, or None:
    it changes no result; W exact_window, at most R, 0: R; k_center float32 [KV, D], which keys were coded less, or None. Nothing is
    written. Slots of codes past pos[-1] - W may hold anything. Returns [T, H, D] in q's dtype. Raises ValueError when head counts,
    dimensions or dtypes do not fit.
    """
    kv_heads, slots, _ = k_codes.shape
    check_heads("tq4_attention", q, kv_heads, 4 * k_codes.shape[2])
    codec.check_dim(q.shape[2])
    check_exact_window("tq4_attention", k_exact, v_exact, kv_heads, q.shape[2])
    if not q.dtype == k.dtype == v.dtype == k_exact.dtype:
        raise ValueError(f"tq4_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, exact window {k_exact.dtype}; expected one dtype")
    if exact_window < 0 or exact_window > k_exact.shape[0]:
        raise ValueError(f"tq4_attention: an exact window of {exact_window} in a ring of {k_exact.shape[0]} slots")
    check_center("tq4_attention", k_center, k_codes, exact_window or k_exact.shape[0], k_exact)
    if not use_triton(q):
        return reference(q, k, v, k_codes, k_scales, v_codes, v_scales, k_exact, v_exact, pos, kv_len, exact_window, k_center)
    tokens, heads, dim = q.shape
    check_kernel_shapes("tq4_attention", dim, k_codes)
    q, k, v = (x.contiguous() for x in (q, k, v))
    caches, rings = (k_codes, k_scales, v_codes, v_scales), (k_exact, v_exact)
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if tokens == 1:
        slot = pos % k_exact.shape[0]
        rings = tuple(ring.index_copy(0, slot, own) for ring, own in zip(rings, (k, v), strict=True))
        query, scale, shift = rotated(q, k_center)
        decode(q, query, scale, caches, rings, pos, out, exact_window=exact_window, shift=shift)
    else:
        prefill(q, k, v, caches, rings, pos, out, exact_window, k_center)
    return out


def check_exact_window(op: str, k_exact: torch.Tensor, v_exact: torch.Tensor, kv_heads: int, dim: int) -> None:
    """ValueError unless both are [R, KV, D]."""
    if not k_exact.shape == v_exact.shape == (k_exact.shape[0], kv_heads, dim):
        raise ValueError(f"{op}: exact window {tuple(k_exact.shape)}, {tuple(v_exact.shape)}; expected [R, {kv_heads}, {dim}]")


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes."""
    h, dim, slots, exact_window = model.full, model.full.dim, CONTEXT, EXACT_WINDOW
    caches = {"k_codes_ptr": "*i16", "k_scales_ptr": "*fp16", "v_codes_ptr": "*i16", "v_scales_ptr": "*fp16"}
    parts = {"o_ptr": "*fp32", "ml_ptr": "*fp32", "pos_ptr": "*i64"}

    def options(tile: Tile) -> dict[str, int]:
        return {"num_warps": tile.warps, "num_stages": tile.stages}

    cases = []
    for dtype, pointer, inner in ((torch.bfloat16, "*bf16", "*fp16"), (torch.float32, "*fp32", "*fp32")):
        name, float32 = f"tq4_attention {pointer[1:]}", pointer == "*fp32"
        query = {"q_ptr": inner, "q_scale_ptr": "*fp32"}
        rings = dict.fromkeys(("x_ptr", "k_ring_ptr", "v_ring_ptr"), pointer)
        cases += rotation_cases(name, pointer, inner, target, h, exact_window)
        for terms in (0, 2):
            tile, split, merge = decode_launch(dtype, not float32, target, h.queries, h.kv, dim, slots, exact_window, terms, 0, True, True)
            for center in (split["CENTER"], 0) if not terms and model is GEMMA4_31B else () if terms else (split["CENTER"],):
                cases.append(KernelCase(f"{name} decode {h.label}{'' if center else ', no center'}", kiln_tq4_decode,
                                        query | rings | caches | parts | {"center_ptr": "*fp32"}, split | {"CENTER": center},
                                        options(tile)))
            signature = parts | {"out_ptr": "*i32" if terms else pointer, "gate_splits": "i32", "gate_stride": "i32"}
            signature |= {"shift_ptr": "*fp32", "gate_ptr": "*fp32"}
            for gated in (False, True) if terms and model is GEMMA4_31B else (False,):
                cases.append(KernelCase(f"{name} merge {h.label} {terms} bytes{', gated' if gated else ''}", kiln_tq4_merge, signature,
                                        merge | {"GATED": gated}, {"num_warps": merge_warps(dim), "maxnreg": MERGE_REGISTERS},
                                        (90,) if gated else None))
        cases.append(prefill_case(f"{name} prefill of the exact window {h.label}", dtype, pointer, target, h.queries, h.kv, dim,
                                  exact_window, exact_window, True))
        if not float32:
            cases += piece_cases(name, piece_tile(target, dim), h.queries, h.kv, dim, slots, exact_window)
            continue
        constants = prefill_constants(h.queries, h.kv, dim, slots, exact_window)
        signature = query | caches | {"pos_ptr": "*i64", "out_ptr": pointer, "lse_ptr": "*fp32", "tokens": "i32"}
        cases.append(KernelCase(f"{name} prefill {h.label}", kiln_tq4_prefill, signature, constants, options(PREFILL_FLOAT32)))
    return cases
