"""Attention of one token from its raw projections: norms, rotary embedding, cache write, attention, fixed point for the next product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from custom_ops import fixed_point, sliding_attention
from custom_ops.early import early, wait_for_earlier_kernels
from custom_ops.fixed_point import GROUP, group_words
from custom_ops.flash import (
    check_kernel_shapes,
    decode_constants,
    decode_tile,
    flash_decode_kernel,
    flash_merge_kernel,
    merge_warps,
)
from custom_ops.gemv_kernels import sum_splits
from custom_ops.launch import kernel, use_triton
from custom_ops.markers import rms_norm, rope
from custom_ops.registry import KernelCase
from custom_ops.target import GpuTarget, current_target

PREPARE_WARPS = 8


def prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The op in plain torch; arguments as `prepare_qkv`."""
    dim = q_weight.shape[0]
    q, k, v = (x.sum(0).view(1, -1, dim) for x in (q, k, v))
    q = rope(rms_norm(q, q_weight, eps, torch.float32), cos, sin)
    k = rope(rms_norm(k, k_weight, eps, torch.float32), cos, sin)
    return q.to(dtype), k.to(dtype), rms_norm(v, None, eps, dtype)


@triton.jit
def prepared_head(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, eps, splits, stride, v_splits, v_stride,
                  HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr):
    """Both halves, float32 [D / 2], of head `head` of queries, keys and values: RMSNorm and, but for values, weight and rotary embedding.

    A projection is the sum of `splits` parts, `stride` elements apart (q and k alike).
    """
    H: tl.constexpr = D // 2
    dim = tl.arange(0, H)
    rotated = head < HEADS + KV
    weight = tl.where(head < HEADS, q_weight_ptr, k_weight_ptr) + dim
    weight0 = tl.load(weight, rotated, other=1.0)
    weight1 = tl.load(weight + H, rotated, other=1.0)
    wait_for_earlier_kernels(EARLY)
    parts = splits
    step = stride
    if head < HEADS:
        source = q_ptr + head * D
    elif rotated:
        source = k_ptr + (head - HEADS) * D
    else:
        source = v_ptr + (head - HEADS - KV) * D
        parts = v_splits
        step = v_stride
    whole = sum_splits(source + tl.arange(0, D), step, parts, None, D, TOGETHER=16)
    a, b = tl.split(tl.permute(tl.reshape(whole, [2, H]), [1, 0]))
    cos = tl.load(cos_ptr + dim, rotated, other=1.0)
    sin = tl.load(sin_ptr + dim, rotated, other=0.0)
    norm = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
    a = a * norm * weight0
    b = b * norm * weight1
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def prepare_kernel(q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, pos_ptr, q_out_ptr, k_out_ptr, v_out_ptr, eps,
                   splits, stride, v_splits, v_stride, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, RING: tl.constexpr,
                   EARLY: tl.constexpr):
    """`prepared_head` of one token. Grid (HEADS + 2 KV).

    RING > 0: keys and values go to the slot pos % RING of a ring [RING, KV, D], else to the first row of theirs.
    """
    head = tl.program_id(0)
    a, b = prepared_head(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, eps, splits, stride, v_splits, v_stride,
                         HEADS, KV, D, EARLY)
    row = 0
    if RING > 0:
        row = (tl.load(pos_ptr).to(tl.int32) % RING) * (KV * D)
    if head < HEADS:
        target = q_out_ptr + head * D
    elif head < HEADS + KV:
        target = k_out_ptr + row + (head - HEADS) * D
    else:
        target = v_out_ptr + row + (head - HEADS - KV) * D
    dim = tl.arange(0, D // 2)
    tl.store(target + dim, a)
    tl.store(target + D // 2 + dim, b)


def check_projections(op: str, q, k, v, q_weight, cos) -> None:
    dim = q_weight.shape[0]
    sizes = [x.shape[1] for x in (q, k, v)]
    if any(x.dtype != torch.float32 or x.stride(1) != 1 for x in (q, k, v)) or any(s % dim for s in sizes) or sizes[1] != sizes[2]:
        raise ValueError(f"{op}: q, k, v have {sizes} elements; expected float32, whole heads of {dim}, as many keys as values")
    if sizes[0] % sizes[1] or cos.shape != (1, dim // 2):
        raise ValueError(f"{op}: {sizes[0] // dim} heads to {sizes[1] // dim}, cos {tuple(cos.shape)}; expected [1, {dim // 2}]")
    if q.shape[0] != k.shape[0] or (q.shape[0] > 1 and q.stride(0) != k.stride(0)):
        raise ValueError(f"{op}: q has {q.shape[0]} parts {q.stride(0)} apart, k {k.shape[0]}, {k.stride(0)}; expected the same")


def _prepare(q, k, v, q_weight, k_weight, cos, sin, pos, q_out, k_out, v_out, eps: float, ring: int) -> None:
    dim = q_weight.shape[0]
    heads, kv_heads = q.shape[1] // dim, k.shape[1] // dim
    parts = (q.shape[0], q.stride(0), v.shape[0], v.stride(0))
    kernel(prepare_kernel)[(heads + 2 * kv_heads,)](q, k, v, q_weight, k_weight, cos, sin, pos, q_out, k_out, v_out, eps, *parts,
                                                    HEADS=heads, KV=kv_heads, D=dim, RING=ring, EARLY=early(), num_warps=PREPARE_WARPS)


@triton.jit
def rope_table_kernel(pos_ptr, inv_freq_ptr, cos_ptr, sin_ptr, half, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """cos and sin of pos * inv_freq, float32 [half]."""
    i = tl.arange(0, BLOCK)
    inv_freq = tl.load(inv_freq_ptr + i, i < half, other=0.0)
    wait_for_earlier_kernels(EARLY)
    angle = tl.load(pos_ptr).to(tl.float32) * inv_freq
    tl.store(cos_ptr + i, tl.cos(angle), i < half)
    tl.store(sin_ptr + i, tl.sin(angle), i < half)


@triton_op("kiln::rope_table", mutates_args=())
def rope_table(pos: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of pos * inv_freq, computed once: pos int64 [1], inv_freq float32 [H] -> float32 [1, H] each."""
    if not use_triton(inv_freq):
        angle = pos.float()[:, None] * inv_freq
        return angle.cos(), angle.sin()
    half = inv_freq.shape[0]
    cos = torch.empty((1, half), dtype=torch.float32, device=inv_freq.device)
    sin = torch.empty_like(cos)
    kernel(rope_table_kernel)[(1,)](pos, inv_freq, cos, sin, half, BLOCK=triton.next_power_of_2(half), EARLY=early(), num_warps=1)
    return cos, sin


@triton_op("kiln::prepare_qkv", mutates_args=())
def prepare_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor,
                sin: torch.Tensor, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token's projections, float32 [S, heads * D] to be summed over S, to what attention takes: [1, heads, D] in dtype each.

    q and k: RMSNorm over D, times weight float32 [D], rotary embedding by cos, sin float32 [1, D / 2]; v: RMSNorm. ValueError when a shape
    does not fit.
    """
    check_projections("prepare_qkv", q, k, v, q_weight, cos)
    if not use_triton(q):
        return prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, dtype)
    dim = q_weight.shape[0]
    outs = [torch.empty((1, x.shape[1] // dim, dim), dtype=dtype, device=q.device) for x in (q, k, v)]
    _prepare(q, k, v, q_weight, k_weight, cos, sin, cos, *outs, eps, 0)
    return outs[0], outs[1], outs[2]


@triton_op("kiln::sliding_decode", mutates_args=("k_ring", "v_ring"))
def sliding_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, cos: torch.Tensor,
                   sin: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, pos: torch.Tensor, window: int, eps: float,
                   terms: int) -> torch.Tensor:
    """`prepare_qkv`, then sliding-window attention, the token's key and value written to the rings first.

    k_ring, v_ring [R, KV, D]: slot s holds the latest position p < pos with p % R == s; R = min(window, max_seq_len); pos [1] int64.
    Returns the attention output in fixed point of `terms` bytes, int32 [1, H * D / 32, 8 terms + 4].
    """
    check_projections("sliding_decode", q, k, v, q_weight, cos)
    dim, slots = q_weight.shape[0], k_ring.shape[0]
    heads, kv_heads = q.shape[1] // dim, k.shape[1] // dim
    if not k_ring.shape == v_ring.shape == (slots, kv_heads, dim):
        raise ValueError(f"sliding_decode: rings {tuple(k_ring.shape)}, {tuple(v_ring.shape)}; expected [R, {kv_heads}, {dim}]")
    if not use_triton(q):
        prepared = prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, k_ring.dtype)
        out = sliding_attention.reference(*prepared, k_ring, v_ring, pos, window)
        slot = pos % slots
        k_ring.index_copy_(0, slot, prepared[1])
        v_ring.index_copy_(0, slot, prepared[2])
        return fixed_point.quantize(out.flatten(1), terms)
    check_kernel_shapes("sliding_decode", dim, k_ring)
    target = current_target()
    query = torch.empty((1, heads, dim), dtype=k_ring.dtype, device=q.device)
    _prepare(q, k, v, q_weight, k_weight, cos, sin, pos, query, k_ring, v_ring, eps, slots)
    tile = decode_tile(query.dtype, target, dim)
    split, merge = decode_constants(tile, target, heads, kv_heads, dim, slots, window, False, own=True, terms=terms)
    part = torch.empty(split["SPLITS"], heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(split["SPLITS"], heads, 2, dtype=torch.float32, device=q.device)
    out = torch.empty((1, heads * dim // GROUP, group_words(terms)), dtype=torch.int32, device=q.device)
    kernel(flash_decode_kernel)[(kv_heads, split["SPLITS"])](query, k_ring, v_ring, pos, pos, part, sums, **split,
                                                             num_warps=tile.warps, num_stages=tile.stages)
    kernel(flash_merge_kernel)[(heads,)](part, sums, pos, pos, query, query, query, out, **merge, num_warps=merge_warps(dim))
    return out


def kernel_cases(target: GpuTarget) -> list[KernelCase]:
    """The kernels at the shapes of the 31B."""
    raw = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    numbers = {"eps": "fp32"} | dict.fromkeys(("splits", "stride", "v_splits", "v_stride"), "i32")
    cases = []
    for heads, kv_heads, dim, ring in ((32, 16, 256, 1024), (32, 4, 512, 0)):
        signature = raw | {"pos_ptr": "*i64" if ring else "*fp32"} | dict.fromkeys(("q_out_ptr", "k_out_ptr", "v_out_ptr"), "*fp16")
        constants = {"HEADS": heads, "KV": kv_heads, "D": dim, "RING": ring, "EARLY": early(target)}
        cases.append(KernelCase(f"prepare {heads}:{kv_heads}x{dim}", prepare_kernel, signature | numbers, constants,
                                {"num_warps": PREPARE_WARPS}, aligned=("stride", "v_stride")))
    tile = decode_tile(torch.float16, target, 256)
    split, merge = decode_constants(tile, target, 32, 16, 256, 1024, 1024, False, own=True, terms=2)
    position = {"pos_ptr": "*i64", "len_ptr": "*i64"}
    inputs, parts = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp16"), {"o_ptr": "*fp32", "ml_ptr": "*fp32"}
    cases.append(KernelCase("sliding_decode 32:16x256", flash_decode_kernel, inputs | position | parts, split,
                            {"num_warps": tile.warps, "num_stages": tile.stages}))
    cases.append(KernelCase("sliding_decode merge 32:16x256", flash_merge_kernel, parts | position | inputs | {"out_ptr": "*i32"},
                            merge, {"num_warps": merge_warps(256)}))
    return cases
