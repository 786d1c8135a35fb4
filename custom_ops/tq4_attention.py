"""Causal attention over a TQ4 cache (`custom_ops/tq4.py`): queries and output are rotated once, cached vectors never."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from custom_ops import tq4
from custom_ops.configs import pick
from custom_ops.early import early, wait_for_earlier_kernels
from custom_ops.fixed_point import store_fixed
from custom_ops.flash import (
    LOG2E,
    Tile,
    attend,
    check_heads,
    check_kernel_shapes,
    decode_range,
    merge_splits,
    merge_warps,
    padded_group,
    softmax_step,
    split_count,
    split_size,
)
from custom_ops.global_attention import causal_mask
from custom_ops.launch import kernel, use_triton
from custom_ops.registry import KernelCase
from custom_ops.target import GpuTarget, current_target
from custom_ops.tq4 import hadamard_rows, plane_pair, sign_of
from custom_ops.tq4_prefill import attend_in_pieces, piece_cases, piece_tile

# By (architecture, largest head dimension), see `configs`; measured on sm_90, elsewhere what fits. 16-bit activations.
DECODE_TILES = {(86, 512): Tile(keys=64, warps=4, stages=2), (90, 512): Tile(keys=64, warps=4, stages=3)}
WIDE_DECODE_TILE = Tile(keys=64, warps=8, stages=2, splits_per_sm=1)  # more than 8 query heads of a KV head: twice the accumulators
PREFILL_TILES = {
    (86, 512): Tile(rows=32, keys=64, warps=8, stages=2),
    (90, 512): Tile(rows=64, keys=32, warps=8, stages=2),  # 64 rows: what wgmma takes
    (100, 512): Tile(rows=32, keys=64, warps=8, stages=2),  # of 64 rows the compiler makes an empty kernel
}
DECODE_FLOAT32 = Tile(keys=16, warps=8, stages=1, splits_per_sm=1)
PREFILL_FLOAT32 = Tile(rows=16, keys=16, warps=8, stages=1)
ROTATE_WARPS = 4


def reference(q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
              pos: torch.Tensor, kv_len: torch.Tensor | None) -> torch.Tensor:
    """The op in plain torch; arguments as `tq4_attention`."""
    k = tq4.decode_rotated(k_codes, k_scales).transpose(0, 1)
    v = tq4.decode_rotated(v_codes, v_scales).transpose(0, 1)
    out = attend(tq4.rotate(q.to(torch.float32)), k, v, causal_mask(k_codes.shape[1], pos, kv_len))
    return tq4.unrotate(out).to(q.dtype)


@triton.jit
def rotated_query(x, D: tl.constexpr):
    """sqrt(D) R x / |x| of x, float32 [1, D], whose coordinates fit float16 whatever |x|, and the scale log2(e) |x| / sqrt(D)."""
    norm = tl.sqrt(tl.sum(tl.sum(x * x, 1), 0))
    y = hadamard_rows(x * sign_of(tl.arange(0, D))[None, :], 1, D) * tl.where(norm > 0, 1.0 / norm, 0.0)
    return y, norm * (LOG2E * D**-0.5)


@triton.jit
def rotate_kernel(x_ptr, out_ptr, scale_ptr, D: tl.constexpr, EARLY: tl.constexpr):
    """`rotated_query` of one query."""
    wait_for_earlier_kernels(EARLY)
    r = tl.program_id(0)
    dim = tl.arange(0, D)[None, :]
    y, scale = rotated_query(tl.load(x_ptr + r * D + dim).to(tl.float32), D)
    tl.store(out_ptr + r * D + dim, y)
    tl.store(scale_ptr + r, scale)


@triton.jit
def unrotate_kernel(x_ptr, out_ptr, D: tl.constexpr):
    """One vector: out = R^T x."""
    r = tl.program_id(0)
    dim = tl.arange(0, D)
    x = tl.load(x_ptr + r * D + dim).to(tl.float32)
    y = hadamard_rows(x[None, :], 1, D) * (sign_of(dim) * D**-0.5)[None, :]
    tl.store(out_ptr + r * D + dim[None, :], y)


@triton.jit
def tq4_decode_kernel(q_ptr, q_scale_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, pos_ptr, len_ptr, o_ptr, ml_ptr,
                      HAS_LEN: tl.constexpr, SLOTS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, PAD: tl.constexpr,
                      D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr):
    """One rotated query token, one KV head, one split of the keys: o_ptr float32 [SPLITS, H, D] rotated and unnormalized, ml_ptr
    float32 [SPLITS, H, 2]. Products are transposed, S^T = K Q^T and O^T = V^T P^T, as in `flash_decode_kernel`, one for each plane.
    """
    wait_for_earlier_kernels(EARLY)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    Q: tl.constexpr = D // 4
    head = tl.program_id(0)
    split = tl.program_id(1)
    start, end = decode_range(pos_ptr, len_ptr, HAS_LEN, 0)
    size = split_size(start, end, SPLITS, BLOCK_N)
    low = start + split * size
    if low >= end:
        return  # the merge computes the same split size and does not read this one
    high = tl.minimum(low + size, end)
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
        kw = tl.load(k_codes_ptr + row[:, None] * Q + word[None, :], mask=held[:, None], other=0)
        k_scale = tl.load(k_scales_ptr + row, mask=held, other=0.0).to(tl.float32)
        vw = tl.load(v_codes_ptr + row[None, :] * Q + word[:, None], mask=held[None, :], other=0)
        v_scale = tl.load(v_scales_ptr + row, mask=held, other=0.0).to(tl.float32)
        k0, k1 = plane_pair(kw, 0, DTYPE, ASM)
        scores = tl.dot(k0, q0, input_precision="ieee")
        scores = tl.dot(k1, q1, scores, input_precision="ieee")
        k2, k3 = plane_pair(kw, 1, DTYPE, ASM)
        scores = tl.dot(k2, q2, scores, input_precision="ieee")
        scores = tl.dot(k3, q3, scores, input_precision="ieee")
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


@triton.jit
def tq4_merge_kernel(o_ptr, ml_ptr, pos_ptr, len_ptr, out_ptr, HAS_LEN: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                     SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, BLOCK_N: tl.constexpr, TERMS: tl.constexpr, EARLY: tl.constexpr):
    """Merge one head's splits and rotate the sum back. TERMS > 0: out_ptr is a row of H * D elements in fixed point."""
    wait_for_earlier_kernels(EARLY)
    head = tl.program_id(0)
    dim = tl.arange(0, D)
    start, end = decode_range(pos_ptr, len_ptr, HAS_LEN, 0)
    active = tl.cdiv(end - start, split_size(start, end, SPLITS, BLOCK_N))
    m, total, acc = merge_splits(o_ptr, ml_ptr, head, active, HEADS, D, SPLITS_PAD)
    y = hadamard_rows((acc / total)[None, :], 1, D) * (sign_of(dim) * D**-0.5)[None, :]
    if TERMS > 0:
        store_fixed(tl.reshape(y, [D]), out_ptr, head * (D // 32), HEADS * (D // 32), TERMS, D)
    else:
        tl.store(out_ptr + head * D + dim[None, :], y)


@triton.jit
def tq4_prefill_kernel(q_ptr, q_scale_ptr, k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, pos_ptr, out_ptr, tokens,
                       SLOTS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, ASM: tl.constexpr):
    """BLOCK_M rows of one KV head, a row being a (token, head of the group) pair, tokens major; the output stays rotated."""
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
    pos = tl.load(pos_ptr).to(tl.int32)
    end = pos + last + 1
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
    inverse = (1.0 / total)[:, None]
    tl.store(out_ptr + in_out, o0 * inverse, mask=keep[:, None])
    tl.store(out_ptr + in_out + Q, o1 * inverse, mask=keep[:, None])
    tl.store(out_ptr + in_out + 2 * Q, o2 * inverse, mask=keep[:, None])
    tl.store(out_ptr + in_out + 3 * Q, o3 * inverse, mask=keep[:, None])


def decode_launch(float32: bool, asm: bool, target: GpuTarget, heads: int, kv_heads: int, dim: int, slots: int,
                  has_len: bool, terms: int = 0) -> tuple[Tile, dict, dict]:
    """The tile and the constants of `tq4_decode_kernel` and of `tq4_merge_kernel`."""
    pad = padded_group(heads, kv_heads)
    tile = DECODE_FLOAT32 if float32 else WIDE_DECODE_TILE if pad > 8 else pick(DECODE_TILES, target, dim)
    splits = split_count(target, tile, kv_heads, slots)
    shared = {"HAS_LEN": has_len, "D": dim, "SPLITS": splits, "BLOCK_N": tile.keys, "EARLY": early(target)}
    split = shared | {"SLOTS": slots, "KV": kv_heads, "GROUP": heads // kv_heads, "PAD": pad, "ASM": asm}
    return tile, split, shared | {"HEADS": heads, "SPLITS_PAD": triton.next_power_of_2(splits), "TERMS": terms}


def prefill_launch(float32: bool, asm: bool, target: GpuTarget, heads: int, kv_heads: int, dim: int, slots: int) -> tuple[Tile, dict]:
    """The tile and the constants of `tq4_prefill_kernel`."""
    tile = PREFILL_FLOAT32 if float32 else pick(PREFILL_TILES, target, dim)
    return tile, {"SLOTS": slots, "KV": kv_heads, "GROUP": heads // kv_heads, "D": dim, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys,
                  "ASM": asm}


def decode(rotated: torch.Tensor, scale: torch.Tensor, caches: tuple[torch.Tensor, ...], pos: torch.Tensor, kv_len: torch.Tensor | None,
           out: torch.Tensor, terms: int = 0) -> None:
    """Attention of one query, rotated [1, H, D] and scaled as `rotated_query` does, into `out`: [1, H, D], or a row in fixed point."""
    (k_codes, *_), (_, heads, dim), target = caches, rotated.shape, current_target()
    kv_heads, slots, _ = k_codes.shape
    float32 = rotated.dtype == torch.float32
    asm, has_len = rotated.is_cuda and not float32, kv_len is not None
    tile, split, merge = decode_launch(float32, asm, target, heads, kv_heads, dim, slots, has_len, terms)
    length = pos if kv_len is None else kv_len
    part = torch.empty(split["SPLITS"], heads, dim, dtype=torch.float32, device=out.device)
    sums = torch.empty(split["SPLITS"], heads, 2, dtype=torch.float32, device=out.device)
    kernel(tq4_decode_kernel)[(kv_heads, split["SPLITS"])](rotated, scale, *caches, pos, length, part, sums, **split, num_warps=tile.warps,
                                                           num_stages=tile.stages)
    kernel(tq4_merge_kernel)[(heads,)](part, sums, pos, length, out, **merge, num_warps=merge_warps(dim))


@triton_op("kiln::tq4_attention", mutates_args=())
def tq4_attention(q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
                  pos: torch.Tensor, kv_len: torch.Tensor | None) -> torch.Tensor:
    """Causal attention with scale 1 over a TQ4 cache: slot j is attended to iff j <= pos of the query.

    q [T, H, D]; k_codes, v_codes int16 [KV, S, D/4] and k_scales, v_scales float16 [KV, S], holding the chunk already; pos [T] int64,
    consecutive; kv_len int32 [1], pos[-1] + 1 on the device, or None: it bounds the sweep and changes no result.
    Slots past pos[-1] may hold anything. Returns [T, H, D] in q's dtype. Raises ValueError when the head counts or dimensions do not fit.
    """
    kv_heads, slots, _ = k_codes.shape
    check_heads("tq4_attention", q, kv_heads, 4 * k_codes.shape[2])
    tq4.check_dim(q.shape[2])
    if not use_triton(q):
        return reference(q, k_codes, k_scales, v_codes, v_scales, pos, kv_len)
    tokens, heads, dim = q.shape
    check_kernel_shapes("tq4_attention", dim, k_codes)
    target, float32, asm = current_target(), q.dtype == torch.float32, q.is_cuda and q.dtype != torch.float32
    rotated = torch.empty(tokens, heads, dim, dtype=torch.float32 if float32 else torch.float16, device=q.device)
    scale = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    kernel(rotate_kernel)[(tokens * heads,)](q.contiguous(), rotated, scale, D=dim, EARLY=early(target), num_warps=ROTATE_WARPS)
    caches = (k_codes, k_scales, v_codes, v_scales)
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if tokens == 1:
        decode(rotated, scale, caches, pos, kv_len, out)
    else:
        still_rotated = torch.empty_like(out)
        pieces = None if float32 else piece_tile(target, dim)
        if pieces is not None:
            attend_in_pieces(pieces, rotated, scale, caches, pos, still_rotated, asm)
        else:
            tile, constants = prefill_launch(float32, asm, target, heads, kv_heads, dim, slots)
            blocks = (tokens * (heads // kv_heads) + tile.rows - 1) // tile.rows
            kernel(tq4_prefill_kernel)[(blocks, kv_heads)](rotated, scale, *caches, pos, still_rotated, tokens, **constants,
                                                           num_warps=tile.warps, num_stages=tile.stages)
        kernel(unrotate_kernel)[(tokens * heads,)](still_rotated, out, D=dim, num_warps=ROTATE_WARPS)
    return out


def kernel_cases(target: GpuTarget) -> list[KernelCase]:
    """The kernels at the shapes of the 31B, and decode at those of the 12B, whose group is wide."""
    dim, slots = 512, 131072
    caches = {"k_codes_ptr": "*i16", "k_scales_ptr": "*fp16", "v_codes_ptr": "*i16", "v_scales_ptr": "*fp16"}
    position = {"pos_ptr": "*i64", "len_ptr": "*i32"}
    parts = {"o_ptr": "*fp32", "ml_ptr": "*fp32"}

    def options(tile: Tile) -> dict[str, int]:
        return {"num_warps": tile.warps, "num_stages": tile.stages}

    cases = []
    for kind, inner in (("*bf16", "*fp16"), ("*fp32", "*fp32")):
        name, float32 = f"tq4_attention {kind[1:]}", kind == "*fp32"
        query = {"q_ptr": inner, "q_scale_ptr": "*fp32"}
        rotate = {"x_ptr": kind, "out_ptr": inner, "scale_ptr": "*fp32"}
        constants = {"D": dim, "EARLY": early(target)}
        cases.append(KernelCase(f"{name} rotate {dim}", rotate_kernel, rotate, constants, {"num_warps": ROTATE_WARPS}))
        unrotate = {"x_ptr": kind, "out_ptr": kind}
        cases.append(KernelCase(f"{name} unrotate {dim}", unrotate_kernel, unrotate, {"D": dim}, {"num_warps": ROTATE_WARPS}))
        for heads, kv_heads, terms in ((32, 4, 0), (32, 4, 2), (16, 1, 0)):
            tile, split, merge = decode_launch(float32, not float32, target, heads, kv_heads, dim, slots, True, terms)
            label = f"{heads}:{kv_heads}x{dim}"
            if not terms:
                signature = query | caches | position | parts
                cases.append(KernelCase(f"{name} decode {label}", tq4_decode_kernel, signature, split, options(tile)))
            signature = parts | position | {"out_ptr": "*i32" if terms else kind}
            cases.append(KernelCase(f"{name} merge {label} {terms} bytes", tq4_merge_kernel, signature, merge,
                                    {"num_warps": merge_warps(dim)}))
        pieces = None if float32 else piece_tile(target, dim)
        if pieces is not None:
            cases += piece_cases(name, pieces, 32, 4, dim, slots)
            continue
        tile, constants = prefill_launch(float32, not float32, target, 32, 4, dim, slots)
        signature = query | caches | {"pos_ptr": "*i64", "out_ptr": kind, "tokens": "i32"}
        cases.append(KernelCase(f"{name} prefill 32:4x{dim}", tq4_prefill_kernel, signature, constants, options(tile)))
    return cases
