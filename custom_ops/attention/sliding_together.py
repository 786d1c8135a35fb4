"""`sliding_decode_rows` where the tokens of a row read its window together: one load of a key for as many as fit a tensor-core tile.

`sliding_decode` cuts the positions of a window into splits, so each of M neighbouring tokens has other splits, and reads its window itself.
Here the slots of the ring are cut, which are the same for all. Two kernels and the merge: the first prepares queries, keys and values and
writes the keys and values to the rings; of the second, a program has one KV head, one split and up to PAD / ROWS tokens of one row. Of one
token the first kernel does both: as in `sliding_decode` each program prepares its queries itself, behind the keys that it has asked for.

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
from kiln.custom_ops.attention.prepare import token_strides
from kiln.custom_ops.attention.sliding_heads import normed, query_columns, raw_parts, rotated
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import extent_of

FLOAT32 = dataclasses.replace(DECODE_FLOAT32, warps=4)  # with 8 the compiler spills


@triton.jit
def _held(slot, high, last, reach, RING: tl.constexpr):
    """Which slots hold a key that one of the tokens attends to, [N, 1]."""
    back = last % RING - slot
    back = tl.where(back < 0, back + RING, back)
    return ((slot < high) & (back < reach) & (back <= last))[:, None]


@triton.jit
def _keys(k_ring, v_ring, slot, held, STRIDE: tl.constexpr, D: tl.constexpr):
    """Both halves of the keys, and the values, in slots that are held; elsewhere zeros."""
    half = tl.arange(0, D // 2)[None, :]
    row = slot[:, None] * STRIDE
    return (tl.load(k_ring + row + half, held, other=0.0), tl.load(k_ring + row + D // 2 + half, held, other=0.0),
            tl.load(v_ring + row + tl.arange(0, D)[None, :], held, other=0.0))


@triton.jit
def _step(q0, q1, k0, k1, v, slot, held, own, pos, m, total, acc, RING: tl.constexpr, WINDOW: tl.constexpr):
    """One block of slots of the online softmax, but for a token's own."""
    distance = own[None, :] - slot[:, None]
    distance = tl.where(distance < 0, distance + RING, distance)
    scores = tl.dot(k1, q1, tl.dot(k0, q0, input_precision="ieee"), input_precision="ieee") * LOG2E
    scores = tl.where(held & (distance > 0) & (distance < WINDOW) & (distance <= pos[None, :]), scores, float("-inf"))
    weights, m, scale = softmax_step(scores, m, 0)
    total = total * scale + tl.sum(weights, 0)
    return m, total, tl.dot(tl.trans(v), weights.to(v.dtype), acc * scale[None, :], input_precision="ieee")


@waits("q_weight_ptr", "k_weight_ptr", "k_ring_ptr", "v_ring_ptr", "pos_ptr", "row_ptr", idle=True)  # the split of a token's slot is not
@triton.jit
def kiln_sliding_slots(q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_ring_ptr, v_ring_ptr, pos_ptr, row_ptr,
                         q_out_ptr, score_ptr, o_ptr, ml_ptr, stride, v_stride, EPS: tl.constexpr, PARTS: tl.constexpr,
                         V_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, V_PARTS_PAD: tl.constexpr, WINDOW: tl.constexpr,
                         RING: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr,
                         SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr, V_NORM: tl.constexpr, SCALE: tl.constexpr,
                         SHARED: tl.constexpr, EARLY: tl.constexpr, TOKEN: tl.constexpr, V_TOKEN: tl.constexpr):
    """Arguments as `kiln_sliding_decode` and `kiln_sliding_together`. Of one token, TOKEN 0, one KV head and one split of the slots, as the
    latter; the split of the token's slot writes its key and value to the rings. Grid (KV, SPLITS). Of several, TOKEN elements apart, the
    queries of one KV head go to q_out_ptr [tokens, H, D], their products with the token's own key to score_ptr float32 [tokens, H], its key
    and value to the rings, and `kiln_sliding_together` attends. Grid (KV, 1, tokens). SHARED: the rings hold the keys and values already.
    """
    H: tl.constexpr = D // 2
    head = tl.program_id(0)
    split = tl.program_id(1)
    half = tl.arange(0, H)
    dim = tl.arange(0, D)
    if TOKEN > 0:
        token = tl.program_id(2)
        row = tl.load(row_ptr + token) * (RING * KV * D)
        k_ring_ptr += row
        v_ring_ptr += row
        pos_ptr += token
        q_ptr += token * TOKEN
        k_ptr += token * TOKEN
        v_ptr += token * V_TOKEN
        cos_ptr += token * H
        sin_ptr += token * H
        q_out_ptr += token * (KV * GROUP * D)
        score_ptr += token * (KV * GROUP)
    k_ring_ptr += head * D
    v_ring_ptr += head * D
    q_weight0 = tl.load(q_weight_ptr + half)
    q_weight1 = tl.load(q_weight_ptr + H + half)
    k_weight0 = tl.load(k_weight_ptr + half)
    k_weight1 = tl.load(k_weight_ptr + H + half)
    last = tl.load(pos_ptr).to(tl.int32)
    own = last % RING
    owner = last >= 0
    if TOKEN == 0:
        blocks: tl.constexpr = (RING + BLOCK_N - 1) // BLOCK_N
        low = split * blocks // SPLITS * BLOCK_N
        high = tl.minimum((split + 1) * blocks // SPLITS * BLOCK_N, tl.minimum(last + 1, RING))
        if low >= high:
            return  # the merge knows which splits have slots, and does not read this one
        owner = (own >= low) & (own < high)
        if AHEAD:
            slot = low + tl.arange(0, BLOCK_N)
            held = _held(slot, high, last, WINDOW, RING) & (slot != own)[:, None]
            k0, k1, v = _keys(k_ring_ptr, v_ring_ptr, slot, held, KV * D, D)
    wait_for_earlier_kernels(EARLY)

    DTYPE: tl.constexpr = k_ring_ptr.dtype.element_ty
    q_parts = raw_parts(q_ptr + head * (GROUP * D), stride, tl.arange(0, ROWS * D)[None, :] < GROUP * D, PARTS, PARTS_PAD, ROWS * D)
    if not SHARED:
        k_parts = raw_parts(k_ptr + head * D, stride, owner, PARTS, PARTS_PAD, D)
        v_parts = raw_parts(v_ptr + head * D, v_stride, owner, V_PARTS, V_PARTS_PAD, D)
    cos = tl.load(cos_ptr + half)
    sin = tl.load(sin_ptr + half)
    q0, q1 = rotated(normed(q_parts, EPS, ROWS, D, True), q_weight0, q_weight1, cos, sin, DTYPE, SCALE)
    slot_of_own = own * (KV * D)
    if SHARED:
        own_k0 = tl.load(k_ring_ptr + slot_of_own + half[None, :], owner, other=0.0)
        own_k1 = tl.load(k_ring_ptr + slot_of_own + H + half[None, :], owner, other=0.0)
        own_v = tl.load(v_ring_ptr + slot_of_own + dim, owner, other=0.0)
    else:
        own_k0, own_k1 = rotated(normed(k_parts, EPS, 1, D, True), k_weight0, k_weight1, cos, sin, DTYPE, 1)
        v0, v1 = normed(v_parts, EPS, 1, D, V_NORM)
        own_v = tl.reshape(tl.permute(tl.join(v0, v1), [0, 2, 1]), [D]).to(DTYPE)
        tl.store(k_ring_ptr + slot_of_own + half[None, :], own_k0, owner)
        tl.store(k_ring_ptr + slot_of_own + H + half[None, :], own_k1, owner)
        tl.store(v_ring_ptr + slot_of_own + dim, own_v, owner)
    score = tl.sum(q0.to(tl.float32) * own_k0.to(tl.float32) + q1.to(tl.float32) * own_k1.to(tl.float32), 1) * LOG2E
    if TOKEN > 0:
        query = tl.arange(0, ROWS)
        place = (head * GROUP + query)[:, None] * D + half[None, :]
        tl.store(q_out_ptr + place, q0, (query < GROUP)[:, None])
        tl.store(q_out_ptr + place + H, q1, (query < GROUP)[:, None])
        tl.store(score_ptr + head * GROUP + query, score, query < GROUP)
    else:
        # the softmax begins with the token's own key
        group = tl.arange(0, PAD)
        m = tl.where(owner, tl.reshape(tl.broadcast_to(score[None, :], [PAD // ROWS, ROWS]), [PAD]), float("-inf"))
        total = tl.zeros([PAD], tl.float32) + tl.where(owner, 1.0, 0.0)
        acc = tl.zeros([D, PAD], tl.float32) + own_v.to(tl.float32)[:, None]  # of other splits zeros, the norm of no parts
        q0 = query_columns(q0, ROWS, PAD, H)
        q1 = query_columns(q1, ROWS, PAD, H)
        pos = last + 0 * group
        if AHEAD:
            m, total, acc = _step(q0, q1, k0, k1, v, slot, held, pos % RING, pos, m, total, acc, RING, WINDOW)
            low += BLOCK_N
        if not AHEAD or SPLITS < blocks:
            for n in tl.range(low, high, BLOCK_N):
                slot = n + tl.arange(0, BLOCK_N)
                held = _held(slot, high, last, WINDOW, RING) & (slot != own)[:, None]
                k0, k1, v = _keys(k_ring_ptr, v_ring_ptr, slot, held, KV * D, D)
                m, total, acc = _step(q0, q1, k0, k1, v, slot, held, pos % RING, pos, m, total, acc, RING, WINDOW)
        part = split * (KV * GROUP) + head * GROUP + group
        tl.store(o_ptr + part[None, :] * D + dim[:, None], acc, mask=group[None, :] < GROUP)
        tl.store(ml_ptr + part * 2, m, mask=group < GROUP)
        tl.store(ml_ptr + part * 2 + 1, total, mask=group < GROUP)


@waits("k_ring_ptr", "v_ring_ptr", "pos_ptr", "row_ptr", idle=True)  # the split of a token's own slot is never idle
@triton.jit
def kiln_sliding_together(q_ptr, score_ptr, k_ring_ptr, v_ring_ptr, pos_ptr, row_ptr, o_ptr, ml_ptr, WINDOW: tl.constexpr,
                            RING: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr,
                            D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr):
    """One KV head, one split of the slots, the tokens of one row among PAD / ROWS neighbours: o_ptr float32 [tokens, SPLITS, H, D]
    unnormalized, ml_ptr float32 [tokens, SPLITS, H, 2]. Grid (KV, SPLITS, tokens): the first of a row among its neighbours does the work.

    A slot's position, seen from a token, is the last one not behind the token that has the slot; a later token's key is so as far away as
    the ring is long, and out of the window.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    first = tl.program_id(2)
    SOME: tl.constexpr = PAD // ROWS
    group = first // SOME * SOME
    column = tl.arange(0, PAD)
    token = group + column // ROWS
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
    half = tl.arange(0, D // 2)
    query = column % ROWS
    used = theirs & (query < GROUP)
    k_ring_ptr += row * (RING * KV * D) + head * D
    v_ring_ptr += row * (RING * KV * D) + head * D
    own = pos % RING
    wait_for_earlier_kernels(EARLY)

    heads = (token * KV + head) * GROUP + query
    place = heads[None, :] * D + half[:, None]
    q0 = tl.load(q_ptr + place, used[None, :], other=0.0)
    q1 = tl.load(q_ptr + place + D // 2, used[None, :], other=0.0)
    mine = used & (own >= low) & (own < high)
    m = tl.load(score_ptr + heads, mine, other=float("-inf"))
    total = tl.where(mine, 1.0, 0.0)
    acc = tl.load(v_ring_ptr + own[None, :] * (KV * D) + dim[:, None], mine[None, :], other=0.0).to(tl.float32)
    for n in tl.range(low, high, BLOCK_N):
        slot = n + tl.arange(0, BLOCK_N)
        held = _held(slot, high, last, reach, RING)
        k0, k1, v = _keys(k_ring_ptr, v_ring_ptr, slot, held, KV * D, D)
        m, total, acc = _step(q0, q1, k0, k1, v, slot, held, own, pos, m, total, acc, RING, WINDOW)
    part = (token * SPLITS + split) * (KV * GROUP) + head * GROUP + query
    tl.store(o_ptr + part[None, :] * D + dim[:, None], acc, used[None, :])
    tl.store(ml_ptr + part * 2, m, used)
    tl.store(ml_ptr + part * 2 + 1, total, used)


def tile_of(dtype: torch.dtype, target: GpuTarget, dim: int) -> Tile:
    return FLOAT32 if dtype == torch.float32 else sliding_cut.tile_of(dtype, target, dim)


def slot_splits(slots: int, keys: int, splits: int) -> int:
    """Splits of a ring's slots, of whole blocks of keys: a split for each block, where that is not many more than `splits`."""
    blocks = triton.cdiv(slots, keys)
    return blocks if 2 * blocks <= 3 * splits else min(splits, blocks)


def together_constants(target: GpuTarget, tile: Tile, heads: int, kv_heads: int, dim: int, slots: int, window: int, tokens: int,
                       parts: int, v_parts: int, terms: int, v_norm: bool, scale: float, shared: bool) -> tuple[dict, dict, dict]:
    """The constants of `kiln_sliding_slots`, but for the strides of tokens, of `kiln_sliding_together` and of `kiln_flash_merge`."""
    split, merge = sliding_cut.constants(tile, target, heads, kv_heads, dim, slots, window, parts, v_parts, terms, v_norm, scale, shared)
    split["SPLITS"] = merge["SPLITS"] = slot_splits(slots, tile.keys, split["SPLITS"])
    both = ("WINDOW", "RING", "KV", "GROUP", "ROWS", "PAD", "D", "SPLITS", "BLOCK_N", "EARLY")
    own = ("PARTS", "V_PARTS", "PARTS_PAD", "V_PARTS_PAD", "V_NORM", "SCALE", "SHARED")
    ahead = tile is not FLOAT32  # its matmuls, out of registers, leave none for keys ahead
    return ({name: split[name] for name in (*both, *own)} | {"AHEAD": ahead}, {name: split[name] for name in both} | {"TOKENS": tokens},
            merge | {"MANY": True, "SLOTS": slots, "SPLITS_PAD": triton.next_power_of_2(merge["SPLITS"])})


def launch(q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, row, window: int, eps: float, terms: int, scale: float,
           v_norm: bool, shared: bool = False) -> torch.Tensor:
    """The kernels; arguments as `sliding_decode_rows`, row None with the rings of one row. shared: the rings hold the keys and values of
    the tokens already."""
    dim, (slots, kv_heads, _), one = q_weight.shape[0], k_ring.shape[-3:], row is None
    tokens, heads, target = q.shape[1], q.shape[2] // dim, current_target()
    check_kernel_shapes("sliding_decode_rows", dim, k_ring if one else k_ring[0])
    tile = tile_of(k_ring.dtype, target, dim)
    own, split, merge = together_constants(target, tile, heads, kv_heads, dim, slots, window, tokens, q.shape[0], v.shape[0], terms,
                                           v_norm, scale, shared)
    query = pos if one else torch.empty(tokens, heads, dim, dtype=k_ring.dtype, device=q.device)
    score = pos if one else torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    part = torch.empty(tokens, split["SPLITS"], heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens, split["SPLITS"], heads, 2, dtype=torch.float32, device=q.device)
    out = fixed_point.empty(tokens, heads * dim, terms, extent_of(heads * dim, dim), q)
    strides = {"TOKEN": 0, "V_TOKEN": 0} if one else token_strides(q, v)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel(kiln_sliding_slots)[(kv_heads, split["SPLITS"] if one else 1, tokens)](
        q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, pos if one else row, query, score, part, sums, q.stride(0), v.stride(0),
        EPS=eps, **own, **strides, **options)  # fmt: skip
    if not one:
        kernel(kiln_sliding_together)[(kv_heads, split["SPLITS"], tokens)](query, score, k_ring, v_ring, pos, row, part, sums, **split,
                                                                           **options)
    kernel(kiln_flash_merge)[(heads, tokens)](part, sums, pos, pos, q, q, q, out, **merge, num_warps=merge_warps(dim))
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes, its rings with spare slots for 8 tokens."""
    h, cases = model.sliding, []
    if h is None:
        return []
    size, slots = (h.queries + 2 * h.kv) * h.dim, model.window + 14
    for element, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        tile = tile_of(dtype, target, h.dim)
        rings = dict.fromkeys(("k_ring_ptr", "v_ring_ptr"), f"*{element}") | dict.fromkeys(("pos_ptr", "row_ptr"), "*i64")
        raw = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr"), "*fp32")
        sums, options = dict.fromkeys(("o_ptr", "ml_ptr"), "*fp32"), {"num_warps": tile.warps, "num_stages": tile.stages}
        for tokens, parts, v_parts, shared in ((1, 3, 3, False), (1, 4, 14, False), (1, 4, 4, True), (8, 3, 3, False)):
            own, split, merge = together_constants(target, tile, h.queries, h.kv, h.dim, slots, model.window, tokens, parts, v_parts, 2,
                                                   True, 1.0, shared)
            name = f"{element} {h.label} of {tokens}"
            strides = {"TOKEN": 0, "V_TOKEN": 0} if tokens == 1 else {"TOKEN": size, "V_TOKEN": size}
            query = dict.fromkeys(("q_out_ptr", "score_ptr"), "*i64") if tokens == 1 else {"q_out_ptr": f"*{element}", "score_ptr": "*fp32"}
            cases.append(KernelCase(f"sliding_together slots {name} {parts} {v_parts}{' shared' if shared else ''}", kiln_sliding_slots,
                                    raw | rings | query | sums | {"stride": "i32", "v_stride": "i32"},
                                    {"EPS": EPS} | own | strides, options, aligned=("stride", "v_stride")))
        cases.append(KernelCase(f"sliding_together attend {name}", kiln_sliding_together,
                                {"q_ptr": f"*{element}", "score_ptr": "*fp32"} | rings | sums, split,
                                options))
        inputs = dict.fromkeys(("o_ptr", "ml_ptr", "q_ptr", "k_ptr", "v_ptr"), "*fp32") | {"pos_ptr": "*i64", "len_ptr": "*i64"}
        cases.append(KernelCase(f"sliding_together merge {name}", kiln_flash_merge, inputs | {"out_ptr": "*i32"}, merge,
                                {"num_warps": merge_warps(h.dim)}))
    return cases
