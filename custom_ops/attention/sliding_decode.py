"""Sliding-window attention of one token from its raw projections: norms, rotary embedding, cache write, attention, fixed point.

Two kernels. Every program of the first prepares the queries it needs itself, from the parts that the matmul left, and reads its keys and
values before that: they are of earlier tokens, so they need not wait for the matmul. The second merges the splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.attention import sliding_attention, sliding_cut, sliding_together
from kiln.custom_ops.attention.flash import (
    LOG2E,
    check_kernel_shapes,
    decode_range,
    kiln_flash_merge,
    merge_warps,
    softmax_step,
    split_size,
)
from kiln.custom_ops.attention.prepare import check_projections, prepare_reference, query_reference
from kiln.custom_ops.attention.sliding_heads import normed, query_columns, raw_parts, rotated
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import extent_of


@triton.jit
def _keys(k_ring, v_ring, p, end, head, RING: tl.constexpr, KV: tl.constexpr, D: tl.constexpr):
    """Both halves of the keys at positions p, and the values; zeros from `end` on."""
    half = tl.arange(0, D // 2)[None, :]
    row = (p % RING)[:, None] * (KV * D) + head * D
    held = (p < end)[:, None]
    k0 = tl.load(k_ring + row + half, held, other=0.0)
    k1 = tl.load(k_ring + row + D // 2 + half, held, other=0.0)
    return k0, k1, tl.load(v_ring + row + tl.arange(0, D)[None, :], held, other=0.0)


@triton.jit
def _step(q0, q1, k0, k1, v, held, m, total, acc):
    """One block of keys of the online softmax."""
    scores = tl.dot(k1, q1, tl.dot(k0, q0, input_precision="ieee"), input_precision="ieee") * LOG2E
    weights, m, scale = softmax_step(tl.where(held[:, None], scores, float("-inf")), m, 0)
    total = total * scale + tl.sum(weights, 0)
    return m, total, tl.dot(tl.trans(v), weights.to(v.dtype), acc * scale[None, :], input_precision="ieee")


@waits("q_weight_ptr", "k_weight_ptr", "k_ring_ptr", "v_ring_ptr", "pos_ptr", idle=True)  # the last split always has its own key
@triton.jit
def kiln_sliding_decode(q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_ring_ptr, v_ring_ptr, pos_ptr, o_ptr, ml_ptr,
                          stride, v_stride, EPS: tl.constexpr, PARTS: tl.constexpr, V_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr,
                          V_PARTS_PAD: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr,
                          ROWS: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
                          AHEAD: tl.constexpr, V_NORM: tl.constexpr, SCALE: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr,
                          TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, WRITE: tl.constexpr):
    """One KV head, one split of the keys: o_ptr float32 [SPLITS, H, D] unnormalized, ml_ptr float32 [SPLITS, H, 2]. Grid (KV, SPLITS).

    q, k: the sum of PARTS rows, `stride` apart; v: of V_PARTS, `v_stride` apart. ROWS: GROUP rounded up to a power of two, PAD: to what a
    tensor-core tile takes; matmuls are transposed as in `kiln_flash_decode`. The split of the last key writes it to the rings.
    SHARED: the layer has no keys and values of its own; another's kernel of this step has written the token's to the rings.
    TOKEN > 0: there are several tokens, which begin TOKEN elements apart, those of v V_TOKEN. A first launch, WRITE, writes their keys and
    values alone, grid (KV, 1, tokens); a second, SHARED, attends, grid (KV, SPLITS, tokens). The rings are of several rows. Which row is a
    token's, int64, stands in place of the norm's weight that the launch has no use for. o_ptr and ml_ptr are of each token.
    """
    H: tl.constexpr = D // 2
    head = tl.program_id(0)
    split = tl.program_id(1)
    half = tl.arange(0, H)
    if TOKEN > 0:
        token = tl.program_id(2)
        row = tl.load((q_weight_ptr if WRITE else k_weight_ptr) + token) * (RING * KV * D)
        k_ring_ptr += row
        v_ring_ptr += row
        pos_ptr += token
        q_ptr += token * TOKEN
        k_ptr += token * TOKEN
        v_ptr += token * V_TOKEN
        cos_ptr += token * H
        sin_ptr += token * H
        o_ptr += token * (SPLITS * KV * GROUP * D)
        ml_ptr += token * (SPLITS * KV * GROUP * 2)
    if not WRITE:
        q_weight0 = tl.load(q_weight_ptr + half)
        q_weight1 = tl.load(q_weight_ptr + H + half)
    if TOKEN == 0 or WRITE:
        k_weight0 = tl.load(k_weight_ptr + half)
        k_weight1 = tl.load(k_weight_ptr + H + half)
    start, end = decode_range(pos_ptr, pos_ptr, False, WINDOW, True)  # the position was written before this step
    size = split_size(start, end, SPLITS, BLOCK_N)
    low = end - 1 if WRITE else start + split * size
    if low >= end:
        return  # the merge computes the same split size and does not read this one
    stored = tl.minimum(low + size, end - 1)  # the token's own key and value come from the matmul
    p = low + tl.arange(0, BLOCK_N)
    if AHEAD:
        k0, k1, v = _keys(k_ring_ptr, v_ring_ptr, p, stored, head, RING, KV, D)
    wait_for_earlier_kernels(EARLY)

    owner = low + size >= end
    DTYPE: tl.constexpr = k_ring_ptr.dtype.element_ty
    if not WRITE:
        q_parts = raw_parts(q_ptr + head * (GROUP * D), stride, tl.arange(0, ROWS * D)[None, :] < GROUP * D, PARTS, PARTS_PAD, ROWS * D)
    if not SHARED:
        k_parts = raw_parts(k_ptr + head * D, stride, owner, PARTS, PARTS_PAD, D)
        v_parts = raw_parts(v_ptr + head * D, v_stride, owner, V_PARTS, V_PARTS_PAD, D)
    cos = tl.load(cos_ptr + half)
    sin = tl.load(sin_ptr + half)
    if not WRITE:
        q0, q1 = rotated(normed(q_parts, EPS, ROWS, D, True), q_weight0, q_weight1, cos, sin, DTYPE, SCALE)
    if not SHARED:
        own_k0, own_k1 = rotated(normed(k_parts, EPS, 1, D, True), k_weight0, k_weight1, cos, sin, DTYPE, 1)
        v0, v1 = normed(v_parts, EPS, 1, D, V_NORM)
        own_v = tl.reshape(tl.permute(tl.join(v0, v1), [0, 2, 1]), [D]).to(DTYPE)
    dim = tl.arange(0, D)
    slot = ((end - 1) % RING) * (KV * D) + head * D
    if SHARED:
        own_k0 = tl.load(k_ring_ptr + slot + half[None, :], owner, other=0.0)
        own_k1 = tl.load(k_ring_ptr + slot + H + half[None, :], owner, other=0.0)
        own_v = tl.load(v_ring_ptr + slot + dim, owner, other=0.0)
    else:
        tl.store(k_ring_ptr + slot + half[None, :], own_k0, owner)
        tl.store(k_ring_ptr + slot + H + half[None, :], own_k1, owner)
        tl.store(v_ring_ptr + slot + dim, own_v, owner)

    if not WRITE:
        # the softmax begins with the token's own key
        score = tl.sum(q0.to(tl.float32) * own_k0.to(tl.float32) + q1.to(tl.float32) * own_k1.to(tl.float32), 1) * LOG2E
        m = tl.where(owner, tl.reshape(tl.broadcast_to(score[None, :], [PAD // ROWS, ROWS]), [PAD]), float("-inf"))
        total = tl.zeros([PAD], tl.float32) + tl.where(owner, 1.0, 0.0)
        acc = tl.zeros([D, PAD], tl.float32) + own_v.to(tl.float32)[:, None]  # of other splits zeros, the norm of no parts
        q0 = query_columns(q0, ROWS, PAD, H)
        q1 = query_columns(q1, ROWS, PAD, H)
        if AHEAD:
            m, total, acc = _step(q0, q1, k0, k1, v, p < stored, m, total, acc)
            low += BLOCK_N
        for n in tl.range(low, stored, BLOCK_N):
            p = n + tl.arange(0, BLOCK_N)
            k0, k1, v = _keys(k_ring_ptr, v_ring_ptr, p, stored, head, RING, KV, D)
            m, total, acc = _step(q0, q1, k0, k1, v, p < stored, m, total, acc)
        group = tl.arange(0, PAD)
        part = split * (KV * GROUP) + head * GROUP + group
        tl.store(o_ptr + part[None, :] * D + dim[:, None], acc, mask=group[None, :] < GROUP)
        tl.store(ml_ptr + part * 2, m, mask=group < GROUP)
        tl.store(ml_ptr + part * 2 + 1, total, mask=group < GROUP)


@kernel_op("kiln::sliding_decode", mutates_args=("k_ring", "v_ring"))
def sliding_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor,
                   sin: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, pos: torch.Tensor, window: int, eps: float,
                   terms: int, scale: float = 1.0, v_norm: bool = True, slots: bool = False) -> torch.Tensor:
    """`prepare_qkv` with norms of q and k, then sliding-window attention, the token's key and value written to the rings.

    k_ring, v_ring [R, KV, D]: slot s holds the latest position p < pos with p % R == s; R is no less than min(window, max_seq_len); pos [1]
    int64. slots: as steps of several tokens of one row add up, whose bits it so has (`sliding_together`).
    Returns the attention output in fixed point of `terms` bytes, a row of H * D.
    """
    check_projections("sliding_decode", q, k, v, q_weight, k_weight, cos)
    dim, size = q_weight.shape[0], k_ring.shape[0]
    kv_heads = k.shape[1] // dim
    if not k_ring.shape == v_ring.shape == (size, kv_heads, dim):
        raise ValueError(f"sliding_decode: rings {tuple(k_ring.shape)}, {tuple(v_ring.shape)}; expected [R, {kv_heads}, {dim}]")
    if not use_triton(q):
        prepared = prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, k_ring.dtype, scale, v_norm)
        out = sliding_attention.reference(*prepared, k_ring, v_ring, pos, window)
        slot = pos % size
        k_ring.index_copy_(0, slot, prepared[1])
        v_ring.index_copy_(0, slot, prepared[2])
        return fixed_point.quantize(out.flatten(1), terms, dim)
    return _launch(q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, window, eps, terms, scale, v_norm, slots)


@kernel_op("kiln::sliding_read", mutates_args=())
def sliding_read(q: torch.Tensor, q_weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_ring: torch.Tensor,
                 v_ring: torch.Tensor, pos: torch.Tensor, window: int, eps: float, terms: int, scale: float = 1.0,
                 slots: bool = False) -> torch.Tensor:
    """`sliding_decode` of a layer that reads another's keys and values: the rings hold those of the token already. slots as there."""
    check_projections("sliding_read", q, q, q, q_weight, q_weight, cos)
    dim, (size, kv_heads, _) = q_weight.shape[0], k_ring.shape
    if not k_ring.shape == v_ring.shape == (size, kv_heads, dim) or q.shape[1] % (kv_heads * dim):
        given = f"rings {tuple(k_ring.shape)}, {tuple(v_ring.shape)}, q of {q.shape[1]} elements"
        raise ValueError(f"sliding_read: {given}; expected [R, KV, {dim}], a multiple of KV heads")
    if not use_triton(q):
        query = query_reference(q, q_weight, cos, sin, eps, k_ring.dtype, scale)
        slot = pos % size  # as a ring's, it stands for a position out of the window
        out = sliding_attention.reference(query, k_ring[slot], v_ring[slot], k_ring, v_ring, pos, window)
        return fixed_point.quantize(out.flatten(1), terms, dim)
    return _launch(q, q, q, q_weight, q_weight, cos, sin, k_ring, v_ring, pos, window, eps, terms, scale, True, slots, shared=True)


def _launch(q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, window: int, eps: float, terms: int, scale: float, v_norm: bool,
            slots: bool, shared: bool = False) -> torch.Tensor:
    """Both kernels; arguments as `sliding_decode`, SHARED as its kernel's."""
    if slots:
        return sliding_together.launch(*(x.unsqueeze(1) for x in (q, k, v)), q_weight, k_weight, cos, sin, k_ring, v_ring, pos, None,
                                       window, eps, terms, scale, v_norm, shared)  # fmt: skip
    dim, (size, kv_heads, _) = q_weight.shape[0], k_ring.shape
    heads = q.shape[1] // dim
    check_kernel_shapes("sliding_decode", dim, k_ring)
    target = current_target()
    tile = sliding_cut.tile_of(k_ring.dtype, target, dim)
    split, merge = sliding_cut.constants(tile, target, heads, kv_heads, dim, size, window, q.shape[0], v.shape[0], terms, v_norm, scale,
                                         shared)
    part = torch.empty(split["SPLITS"], heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(split["SPLITS"], heads, 2, dtype=torch.float32, device=q.device)
    out = fixed_point.empty(1, heads * dim, terms, extent_of(heads * dim, dim), q)
    kernel(kiln_sliding_decode)[(kv_heads, split["SPLITS"])](
        q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, part, sums, q.stride(0), v.stride(0), EPS=eps, **split,
        num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
    kernel(kiln_flash_merge)[(heads,)](part, sums, pos, pos, q, q, q, out, **merge, num_warps=merge_warps(dim))
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes: V from the matmul of q and k, and from its own."""
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "o_ptr", "ml_ptr"), "*fp32")
    signature |= {"pos_ptr": "*i64", "stride": "i32", "v_stride": "i32"}
    h, cases = model.sliding, []
    if h is None:
        return []
    for element, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        rings = {"k_ring_ptr": f"*{element}", "v_ring_ptr": f"*{element}"}
        tile = sliding_cut.tile_of(dtype, target, h.dim)
        for parts, v_parts, shared in ((3, 3, False), (4, 14, False), (4, 4, True)):
            split, merge = sliding_cut.constants(tile, target, h.queries, h.kv, h.dim, model.window, model.window, parts, v_parts, 2,
                                                 shared=shared)
            name = f"{'sliding_read' if shared else 'sliding_decode'} {element} {parts} {v_parts} {h.label}"
            cases.append(KernelCase(name, kiln_sliding_decode, signature | rings,
                                    {"EPS": EPS} | split, {"num_warps": tile.warps, "num_stages": tile.stages},
                                    aligned=("stride", "v_stride")))
        inputs = dict.fromkeys(("o_ptr", "ml_ptr", "q_ptr", "k_ptr", "v_ptr"), "*fp32") | {"pos_ptr": "*i64", "len_ptr": "*i64"}
        cases.append(KernelCase(f"sliding_decode {element} merge {h.label}", kiln_flash_merge, inputs | {"out_ptr": "*i32"}, merge,
                                {"num_warps": merge_warps(h.dim)}))
    return cases
