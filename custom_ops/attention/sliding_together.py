"""`sliding_decode_rows` where the tokens of a row read its window together: one load of a key for as many as fit a tensor-core tile.

`sliding_decode` cuts the positions of a window into splits, so each of M neighbouring tokens has other splits, and reads its window itself.
Here the slots of the ring are cut, which are the same for all. Two kernels and the merge: the first prepares queries, keys and values and
writes the keys and values to the rings; of the second, a program has one KV head, one split and up to PAD / ROWS tokens of one row.

A token has the same bits whatever else the step holds, but not those of `sliding_decode`, which adds up in another order.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from kiln.custom_ops.attention import sliding_cut
from kiln.custom_ops.attention.flash import (
    DECODE_FLOAT32,
    LOG2E,
    Tile,
    check_kernel_shapes,
    kiln_flash_merge,
    merge_warps,
    softmax_step,
)
from kiln.custom_ops.attention.prepare import form_constants, prepare_warps, prepared_head, token_strides
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import extent_of

FLOAT32 = dataclasses.replace(DECODE_FLOAT32, warps=4)  # with 8 the compiler spills


@waits("q_weight_ptr", "k_weight_ptr")
@triton.jit
def kiln_sliding_prepare(q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_ring_ptr, v_ring_ptr, pos_ptr, row_ptr,
                           q_out_ptr, splits, stride, v_splits, v_stride, EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr,
                           D: tl.constexpr, RING: tl.constexpr, V_NORM: tl.constexpr, SCALE: tl.constexpr, QK_NORM: tl.constexpr,
                           NEIGHBOURS: tl.constexpr, GATED: tl.constexpr, TURNED: tl.constexpr, EARLY: tl.constexpr, TOKEN: tl.constexpr,
                           V_TOKEN: tl.constexpr, ONE: tl.constexpr):
    """`prepared_head` of each token: queries to q_out_ptr [tokens, HEADS, D], keys and values to their slots. Grid (HEADS + 2 KV, tokens),
    (HEADS, tokens) where the rings hold the keys and values already."""
    head = tl.program_id(0)
    token = tl.program_id(1)
    a, b = prepared_head(head, q_ptr + token * TOKEN, k_ptr + token * TOKEN, v_ptr + token * V_TOKEN, q_weight_ptr, k_weight_ptr,
                         cos_ptr + token * (D // 2), sin_ptr + token * (D // 2), splits, stride, v_splits, v_stride, EPS, HEADS, KV, D,
                         QK_NORM, V_NORM, SCALE, NEIGHBOURS, EARLY, GATED, TURNED)
    slot = tl.load(pos_ptr + token) % RING * (KV * D)
    if not ONE:  # the rings are of one row
        slot += tl.load(row_ptr + token) * (RING * KV * D)
    if head < HEADS:
        target = q_out_ptr + (token * HEADS + head) * D
    elif head < HEADS + KV:
        target = k_ring_ptr + slot + (head - HEADS) * D
    else:
        target = v_ring_ptr + slot + (head - HEADS - KV) * D
    dim = tl.arange(0, D // 2)
    tl.store(target + dim, a.to(q_out_ptr.dtype.element_ty))
    tl.store(target + D // 2 + dim, b.to(q_out_ptr.dtype.element_ty))


@triton.jit
def _held(slot, high, last, reach, RING: tl.constexpr):
    """Which slots hold a key that one of the tokens attends to, [N, 1]."""
    back = last % RING - slot
    back = tl.where(back < 0, back + RING, back)
    return ((slot < high) & (back < reach) & (back <= last))[:, None]


@triton.jit
def _step(q, k, v, slot, held, own, pos, m, total, acc, RING: tl.constexpr, WINDOW: tl.constexpr):
    """One block of slots of the online softmax."""
    distance = own[None, :] - slot[:, None]
    distance = tl.where(distance < 0, distance + RING, distance)
    scores = tl.dot(k, q, input_precision="ieee") * LOG2E
    scores = tl.where(held & (distance < WINDOW) & (distance <= pos[None, :]), scores, float("-inf"))
    weights, m, scale = softmax_step(scores, m, 0)
    total = total * scale + tl.sum(weights, 0)
    return m, total, tl.dot(tl.trans(v), weights.to(v.dtype), acc * scale[None, :], input_precision="ieee")


@waits("k_ring_ptr", "v_ring_ptr", "pos_ptr", "row_ptr", idle=True)  # the split of a token's own slot is never idle
@triton.jit
def kiln_sliding_together(q_ptr, k_ring_ptr, v_ring_ptr, pos_ptr, row_ptr, o_ptr, ml_ptr, WINDOW: tl.constexpr, RING: tl.constexpr,
                            KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr,
                            SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
                            ONE: tl.constexpr):
    """One KV head, one split of the slots, the tokens of one row among PAD / ROWS neighbours: o_ptr float32 [tokens, SPLITS, H, D]
    unnormalized, ml_ptr float32 [tokens, SPLITS, H, 2]. Grid (KV, SPLITS, tokens): the first of a row among its neighbours does the work.

    A slot's position, seen from a token, is the last one not behind the token that has the slot; a later token's key is so as far away as
    the ring is long, and out of the window. AHEAD: the first block of keys is read before earlier kernels have ended, the tokens' own again
    after that.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    first = tl.program_id(2)
    SOME: tl.constexpr = PAD // ROWS
    group = first // SOME * SOME
    column = tl.arange(0, PAD)
    token = group + column // ROWS
    if ONE:
        row = 0
        theirs = token < TOKENS
    else:
        row = tl.load(row_ptr + first)
        theirs = tl.load(row_ptr + token, token < TOKENS, other=-1) == row
    if tl.max((theirs & (token < first)).to(tl.int32), 0) > 0:
        return  # an earlier one's program has this one, too
    pos = tl.load(pos_ptr + token, theirs, other=0).to(tl.int32)
    last = tl.max(pos, 0)
    reach = WINDOW + last - tl.min(tl.where(theirs, pos, last), 0)  # slots that any of them attends to, back from the last
    blocks: tl.constexpr = (RING + BLOCK_N - 1) // BLOCK_N
    low = split * blocks // SPLITS * BLOCK_N
    high = tl.minimum((split + 1) * blocks // SPLITS * BLOCK_N, tl.minimum(last + 1, RING))
    if low >= high:
        return  # the merge knows which splits have slots, and does not read this one
    dim = tl.arange(0, D)
    query = column % ROWS
    used = theirs & (query < GROUP)
    k_ring_ptr += row * (RING * KV * D) + head * D
    v_ring_ptr += row * (RING * KV * D) + head * D
    own = pos % RING
    if AHEAD:
        slot = low + tl.arange(0, BLOCK_N)
        held = _held(slot, high, last, reach, RING)
        place = slot[:, None] * (KV * D) + dim[None, :]
        k = tl.load(k_ring_ptr + place, held, other=0.0)
        v = tl.load(v_ring_ptr + place, held, other=0.0)
    wait_for_earlier_kernels(EARLY)

    q = tl.load(q_ptr + ((token * KV + head) * GROUP + query)[None, :] * D + dim[:, None], used[None, :], other=0.0)
    m = tl.full([PAD], float("-inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    acc = tl.zeros([D, PAD], tl.float32)
    if AHEAD:
        new = held & (tl.max((theirs[None, :] & (slot[:, None] == own[None, :])).to(tl.int32), 1) > 0)[:, None]
        k = tl.load(k_ring_ptr + place, new, other=k)
        v = tl.load(v_ring_ptr + place, new, other=v)
        m, total, acc = _step(q, k, v, slot, held, own, pos, m, total, acc, RING, WINDOW)
        low += BLOCK_N
    for n in tl.range(low, high, BLOCK_N):
        slot = n + tl.arange(0, BLOCK_N)
        held = _held(slot, high, last, reach, RING)
        place = slot[:, None] * (KV * D) + dim[None, :]
        k = tl.load(k_ring_ptr + place, held, other=0.0)
        v = tl.load(v_ring_ptr + place, held, other=0.0)
        m, total, acc = _step(q, k, v, slot, held, own, pos, m, total, acc, RING, WINDOW)
    part = (token * SPLITS + split) * (KV * GROUP) + head * GROUP + query
    tl.store(o_ptr + part[None, :] * D + dim[:, None], acc, used[None, :])
    tl.store(ml_ptr + part * 2, m, used)
    tl.store(ml_ptr + part * 2 + 1, total, used)


def tile_of(dtype: torch.dtype, target: GpuTarget, dim: int) -> Tile:
    return FLOAT32 if dtype == torch.float32 else sliding_cut.tile_of(dtype, target, dim)


def together_constants(target: GpuTarget, tile: Tile, heads: int, kv_heads: int, dim: int, slots: int, window: int, tokens: int,
                       terms: int) -> tuple[dict, dict]:
    """The constants of `kiln_sliding_together` and of `kiln_flash_merge`."""
    split, merge = sliding_cut.constants(tile, target, heads, kv_heads, dim, slots, window, 1, 1, terms)
    names = ("WINDOW", "RING", "KV", "GROUP", "ROWS", "PAD", "D", "SPLITS", "BLOCK_N", "AHEAD", "EARLY")
    return {name: split[name] for name in names} | {"TOKENS": tokens}, merge | {"MANY": True, "SLOTS": slots}


def launch(q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, row, window: int, eps: float, terms: int, scale: float,
           v_norm: bool, shared: bool = False) -> torch.Tensor:
    """The three kernels; arguments as `sliding_decode_rows`, row None with the rings of one row. shared: the rings hold the keys and values
    of the tokens already."""
    dim, (slots, kv_heads, _), one = q_weight.shape[0], k_ring.shape[-3:], row is None
    tokens, heads, target = q.shape[1], q.shape[2] // dim, current_target()
    check_kernel_shapes("sliding_decode_rows", dim, k_ring if one else k_ring[0])
    tile = tile_of(k_ring.dtype, target, dim)
    split, merge = together_constants(target, tile, heads, kv_heads, dim, slots, window, tokens, terms)
    query = torch.empty(tokens, heads, dim, dtype=k_ring.dtype, device=q.device)
    part = torch.empty(tokens, split["SPLITS"], heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens, split["SPLITS"], heads, 2, dtype=torch.float32, device=q.device)
    out = fixed_point.empty(tokens, heads * dim, terms, extent_of(heads * dim, dim), q)
    parts = (q.shape[0], q.stride(0), v.shape[0], v.stride(0))
    rows = pos if one else row
    kernel(kiln_sliding_prepare)[(heads + (0 if shared else 2 * kv_heads), tokens)](
        q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, rows, query, *parts, EPS=eps, HEADS=heads, KV=kv_heads, D=dim,
        RING=slots, **form_constants(q_weight, v_norm, scale), EARLY=split["EARLY"], **token_strides(q, v),
        ONE=one, num_warps=prepare_warps(dim))  # fmt: skip
    kernel(kiln_sliding_together)[(kv_heads, split["SPLITS"], tokens)](query, k_ring, v_ring, pos, rows, part, sums, **split,
                                                                       ONE=one, num_warps=tile.warps, num_stages=tile.stages)
    kernel(kiln_flash_merge)[(heads, tokens)](part, sums, pos, pos, q, q, q, out, **merge, num_warps=merge_warps(dim))
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes, its rings with spare slots for 8 tokens."""
    h, cases = model.sliding, []
    if h is None:
        return []
    size, slots = (h.queries + 2 * h.kv) * h.dim, model.window + 14
    for element, dtype, tokens in (("fp16", torch.float16, 8), ("fp32", torch.float32, 8), ("fp16", torch.float16, 1)):
        tile = tile_of(dtype, target, h.dim)
        split, merge = together_constants(target, tile, h.queries, h.kv, h.dim, slots, model.window, tokens, 2)
        rings = dict.fromkeys(("k_ring_ptr", "v_ring_ptr"), f"*{element}") | dict.fromkeys(("pos_ptr", "row_ptr"), "*i64")
        raw = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr"), "*fp32")
        numbers = dict.fromkeys(("splits", "stride", "v_splits", "v_stride"), "i32")
        form = {"EPS": EPS, "HEADS": h.queries, "KV": h.kv, "D": h.dim, "RING": slots, "EARLY": early(target)}
        form |= {"TOKEN": size, "V_TOKEN": size, "QK_NORM": True, "V_NORM": True, "SCALE": 1.0, "NEIGHBOURS": False, "GATED": False}
        form |= {"TURNED": 0, "ONE": tokens == 1}
        own = f"{element} {h.label}{' of one' if tokens == 1 else ''}"
        cases.append(KernelCase(f"sliding_together prepare {own}", kiln_sliding_prepare,
                                raw | rings | {"q_out_ptr": f"*{element}"} | numbers, form, {"num_warps": prepare_warps(h.dim)},
                                aligned=("stride", "v_stride")))
        cases.append(KernelCase(f"sliding_together attend {own}", kiln_sliding_together,
                                {"q_ptr": f"*{element}"} | rings | {"o_ptr": "*fp32", "ml_ptr": "*fp32"}, split | {"ONE": tokens == 1},
                                {"num_warps": tile.warps, "num_stages": tile.stages}))
        inputs = dict.fromkeys(("o_ptr", "ml_ptr", "q_ptr", "k_ptr", "v_ptr"), "*fp32") | {"pos_ptr": "*i64", "len_ptr": "*i64"}
        cases.append(KernelCase(f"sliding_together merge {own}", kiln_flash_merge, inputs | {"out_ptr": "*i32"}, merge,
                                {"num_warps": merge_warps(h.dim)}))
    return cases
