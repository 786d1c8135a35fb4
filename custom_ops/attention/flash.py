"""What the attention ops share: the plain attention their references end in, and the flash-attention kernels over 16- and 32-bit keys.

Both kernels walk positions in order; a ring (RING > 0) turns a position into a slot modulo RING, a cache (RING = 0) uses it as it is.
Masked or absent keys and values are loaded as zeros, so garbage in the cache, NaN included, reaches no result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import Heads
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, vector_warps
from kiln.custom_ops.gpu.tables import pick
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights.fixed_point import extent_of, row_words, store_fixed


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: keys and rows of queries (prefill) of a block; for decode, how many splits a multiprocessor gets."""

    keys: int
    warps: int
    stages: int
    rows: int = 16
    splits_per_sm: int = 2


# By (architecture, largest head dimension), see `gpu/tables.py`; measured on sm_90, elsewhere what fits. 16-bit keys and values.
DECODE_TILES = {
    (80, 512): Tile(keys=32, warps=4, stages=2),
    (86, 256): Tile(keys=32, warps=4, stages=2),
    (86, 512): Tile(keys=16, warps=4, stages=2),
    (90, 256): Tile(keys=64, warps=4, stages=1),
    (90, 512): Tile(keys=32, warps=4, stages=2),
    (100, 512): Tile(keys=32, warps=4, stages=2),
}
PREFILL_TILES = {
    (80, 256): Tile(rows=64, keys=64, warps=8, stages=2),
    (80, 512): Tile(rows=32, keys=64, warps=8, stages=1),
    (86, 256): Tile(rows=64, keys=64, warps=8, stages=1),
    (86, 512): Tile(rows=16, keys=32, warps=4, stages=1),
    (90, 256): Tile(rows=128, keys=64, warps=8, stages=2),
    (90, 512): Tile(rows=64, keys=32, warps=8, stages=2),
    (100, 256): Tile(rows=128, keys=64, warps=8, stages=2),
    (100, 512): Tile(rows=32, keys=64, warps=8, stages=1),
}
DECODE_FLOAT32 = Tile(keys=16, warps=8, stages=1, splits_per_sm=1)  # float32 products run on the CUDA cores, out of registers
PREFILL_FLOAT32 = Tile(rows=16, keys=16, warps=4, stages=1)
MERGE_WARPS = 8  # at most

LOG2E = tl.constexpr(1.4426950408889634)


def check_heads(op: str, q: torch.Tensor, kv_heads: int, head_dim: int) -> None:
    """`q` is [T, H, D] with D the cache's head dimension and H a multiple of its heads; ValueError otherwise."""
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % kv_heads:
        raise ValueError(f"{op}: q is {tuple(q.shape)}; expected [T, a multiple of {kv_heads} heads, {head_dim}]")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Plain grouped-query attention with scale 1: q [T, H, D], k and v [N, KV, D], mask [T, N] (True: attend) -> [T, H, D] in q's dtype.

    Head j uses KV head j // (H / KV). Computed in float32 (float64 for float64 q). Keys that no query attends to may hold anything,
    NaN included.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    used = mask.any(0)[:, None, None]
    k = torch.where(used, k, 0).to(compute)
    v = torch.where(used, v, 0).to(compute)  # 0 * NaN is NaN: a masked value must be zeroed, not only weighted by 0
    group = heads // kv_heads
    grouped = q.to(compute).unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).reshape(kv_heads, group * tokens, dim)
    scores = torch.bmm(grouped, k.permute(1, 2, 0)).unflatten(1, (group, tokens))  # [KV, G, T, N]
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    out = torch.bmm(weights.flatten(1, 2), v.transpose(0, 1)).unflatten(1, (group, tokens))  # [KV, G, T, D]
    return out.to(q.dtype).permute(2, 0, 1, 3).reshape(tokens, heads, dim).contiguous()


@triton.jit
def softmax_step(scores, m, axis: tl.constexpr):
    """One step of the online softmax over `axis`, base 2: weights, the new maximum, and the factor of what was summed before."""
    new = tl.maximum(m, tl.max(scores, axis))
    safe = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN: rows that have seen no key yet
    return tl.exp2(scores - tl.expand_dims(safe, axis)), new, tl.exp2(m - safe)


@triton.jit
def decode_range(pos_ptr, len_ptr, HAS_LEN: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr = False):
    """Positions [start, end) of the stored keys that one query attends to; OWN: its own is stored in the ring."""
    if WINDOW > 0:
        end = tl.load(pos_ptr).to(tl.int32)
        start = tl.maximum(end - WINDOW + 1, 0)
        if OWN:
            end += 1
    else:
        start = 0
        if HAS_LEN:
            end = tl.load(len_ptr).to(tl.int32)
        else:
            end = tl.load(pos_ptr).to(tl.int32) + 1
    return start, end


@triton.jit
def split_size(start, end, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of one split: whole blocks, so that few keys make few splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(end - start, SPLITS), BLOCK_N), 1) * BLOCK_N


@triton.jit
def decode_keys(q_ptr, k_ptr, v_ptr, o_ptr, ml_ptr, head, split, low, high, RING: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr,
                PAD: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr = None):
    """One query token, one KV head, keys [low, high), into row `split` of o_ptr and ml_ptr as `kiln_flash_decode` describes them.

    STAGES: of this loop; None: the launch's.
    """
    group = tl.arange(0, PAD)
    dim = tl.arange(0, D)
    heads = head * GROUP + group
    q = tl.load(q_ptr + heads[None, :] * D + dim[:, None], mask=group[None, :] < GROUP, other=0.0)
    m = tl.full([PAD], float("-inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    acc = tl.zeros([D, PAD], tl.float32)
    for n in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        p = n + tl.arange(0, BLOCK_N)
        row = p % RING if RING > 0 else p
        offset = row[:, None] * (KV * D) + head * D + dim[None, :]
        k = tl.load(k_ptr + offset, mask=(p < high)[:, None], other=0.0)
        v = tl.load(v_ptr + offset, mask=(p < high)[:, None], other=0.0)
        scores = tl.dot(k, q, input_precision="ieee") * LOG2E
        scores = tl.where((p < high)[:, None], scores, float("-inf"))
        weights, m, scale = softmax_step(scores, m, 0)
        total = total * scale + tl.sum(weights, 0)
        acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc * scale[None, :], input_precision="ieee")
    part = split * (KV * GROUP) + heads
    tl.store(o_ptr + part[None, :] * D + dim[:, None], acc, mask=group[None, :] < GROUP)
    tl.store(ml_ptr + part * 2, m, mask=group < GROUP)
    tl.store(ml_ptr + part * 2 + 1, total, mask=group < GROUP)


@waits()
@triton.jit
def kiln_flash_decode(q_ptr, k_ptr, v_ptr, pos_ptr, len_ptr, o_ptr, ml_ptr, HAS_LEN: tl.constexpr, WINDOW: tl.constexpr,
                        RING: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr,
                        SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr, ROW: tl.constexpr):
    """One query token, one KV head, one split of the keys: o_ptr float32 [SPLITS, H, D] unnormalized, ml_ptr float32 [SPLITS, H, 2].

    Products are transposed, S^T = K Q^T and O^T = V^T P^T, because a group of 8 heads fills the N of a tensor-core tile, but half its M.
    ROW > 0, without HAS_LEN: grid (KV, SPLITS, tokens), caches of several rows of ROW elements; len_ptr, int64, is the row of each token.
    """
    wait_for_earlier_kernels(EARLY)
    head = tl.program_id(0)
    split = tl.program_id(1)
    if ROW > 0:
        token = tl.program_id(2)
        row = tl.load(len_ptr + token) * ROW
        k_ptr += row
        v_ptr += row
        pos_ptr += token
        q_ptr += token * (KV * GROUP * D)
        o_ptr += token * (SPLITS * KV * GROUP * D)
        ml_ptr += token * (SPLITS * KV * GROUP * 2)
    start, end = decode_range(pos_ptr, len_ptr, HAS_LEN, WINDOW)
    size = split_size(start, end, SPLITS, BLOCK_N)
    low = start + split * size
    if low >= end:
        return  # the merge computes the same split size and does not read this one
    high = tl.minimum(low + size, end)
    decode_keys(q_ptr, k_ptr, v_ptr, o_ptr, ml_ptr, head, split, low, high, RING, KV, GROUP, PAD, D, BLOCK_N)


@triton.jit
def merge_splits(o_ptr, ml_ptr, head, active, HEADS: tl.constexpr, D: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """Sum the `active` splits of a head: maximum, total weight, unnormalized output [D]."""
    CHUNK: tl.constexpr = 32 if SPLITS_PAD > 32 else SPLITS_PAD
    dim = tl.arange(0, D)
    every = tl.arange(0, SPLITS_PAD)
    maxima = tl.load(ml_ptr + (every * HEADS + head) * 2, mask=every < active, other=float("-inf"))
    totals = tl.load(ml_ptr + (every * HEADS + head) * 2 + 1, mask=every < active, other=0.0)
    m = tl.max(maxima, 0)
    safe = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(totals * tl.exp2(maxima - safe), 0)
    acc = tl.zeros([CHUNK, D], tl.float32)
    for s in tl.range(0, active, CHUNK):
        split = s + tl.arange(0, CHUNK)
        part = split * HEADS + head
        scale = tl.exp2(tl.load(ml_ptr + part * 2, mask=split < active, other=float("-inf")) - safe)
        acc += tl.load(o_ptr + part[:, None] * D + dim[None, :], mask=(split < active)[:, None], other=0.0) * scale[:, None]
    return m, total, tl.sum(acc, 0)


@waits()
@triton.jit
def kiln_flash_merge(o_ptr, ml_ptr, pos_ptr, len_ptr, q_ptr, k_ptr, v_ptr, out_ptr, HAS_LEN: tl.constexpr, WINDOW: tl.constexpr,
                       HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
                       BLOCK_N: tl.constexpr, OWN: tl.constexpr, TERMS: tl.constexpr, EARLY: tl.constexpr, MANY: tl.constexpr,
                       SLOTS: tl.constexpr):
    """Merge one head's splits and, for a ring (WINDOW > 0), the query's own key and value unless a split has them already (OWN).

    TERMS > 0: out_ptr is a row of H * D elements in fixed point. MANY, where no own key is merged: grid (heads, tokens). SLOTS > 0: the
    splits are of a ring's slots, so many, instead of positions (`sliding_together`).
    """
    wait_for_earlier_kernels(EARLY)
    head = tl.program_id(0)
    if MANY:
        token = tl.program_id(1)
        pos_ptr += token
        o_ptr += token * (SPLITS * HEADS * D)
        ml_ptr += token * (SPLITS * HEADS * 2)
        out_ptr += token * (row_words(HEADS * D, TERMS, extent_of(HEADS * D, D)) if TERMS > 0 else HEADS * D)
    dim = tl.arange(0, D)
    start, end = decode_range(pos_ptr, len_ptr, HAS_LEN, WINDOW, OWN)
    if SLOTS > 0:
        active = tl.cdiv(tl.cdiv(tl.minimum(end, SLOTS), BLOCK_N) * SPLITS, tl.cdiv(SLOTS, BLOCK_N))
    else:
        active = tl.cdiv(end - start, split_size(start, end, SPLITS, BLOCK_N))
    m, total, acc = merge_splits(o_ptr, ml_ptr, head, active, HEADS, D, SPLITS_PAD)
    if WINDOW > 0 and not OWN:
        own = (head // GROUP) * D + dim
        q = tl.load(q_ptr + head * D + dim).to(tl.float32)
        score = tl.sum(q * tl.load(k_ptr + own).to(tl.float32), 0) * LOG2E
        new = tl.maximum(m, score)
        scale = tl.exp2(m - new)
        weight = tl.exp2(score - new)
        total = total * scale + weight
        acc = acc * scale + tl.load(v_ptr + own).to(tl.float32) * weight
    if TERMS > 0:
        store_fixed(acc / total, out_ptr, head * (D // 32), HEADS * (D // 32), TERMS, D, extent_of(HEADS * D, D))
    else:
        tl.store(out_ptr + head * D + dim, acc / total)


@triton.jit
def kiln_flash_prefill(q_ptr, k_ptr, v_ptr, k_ring_ptr, v_ring_ptr, pos_ptr, out_ptr, lse_ptr, tokens, WINDOW: tl.constexpr,
                         RING: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, LSE: tl.constexpr):
    """BLOCK_M rows of one KV head against its keys, a row being a (token, head of the group) pair, tokens major.

    RING = 0: k_ptr, v_ptr are a cache that holds the chunk. RING > 0: they are the chunk's own, and the past is in the ring.
    LSE: the base-2 logarithm of every row's total weight goes to lse_ptr, float32 [KV, T * GROUP].
    """
    head = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest sweeps start first
    dim = tl.arange(0, D)
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = r // GROUP
    first = (block * BLOCK_M) // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    pos = tl.load(pos_ptr).to(tl.int32)
    in_out = token[:, None] * (KV * GROUP * D) + (head * GROUP + r % GROUP)[:, None] * D + dim[None, :]
    q = tl.load(q_ptr + in_out, mask=(token < tokens)[:, None], other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)

    # blocks of the past, then blocks of the chunk, in one loop: two loops would keep q in registers across both
    if RING > 0:
        past_low = tl.maximum(pos + first - WINDOW + 1, 0)
        past_blocks = tl.cdiv(tl.maximum(pos - past_low, 0), BLOCK_N)
        low = pos + tl.maximum(first - WINDOW + 1, 0)
    else:
        past_low = 0
        past_blocks = 0
        low = 0
    end = pos + last + 1
    for b in tl.range(0, past_blocks + tl.cdiv(end - low, BLOCK_N)):
        if RING > 0:
            past = b < past_blocks
            p = tl.where(past, past_low + b * BLOCK_N, low + (b - past_blocks) * BLOCK_N) + tl.arange(0, BLOCK_N)
            row = tl.where(past, p % RING, p - pos)
            held = p < tl.where(past, pos, end)
            k_base = tl.where(past, k_ring_ptr, k_ptr)
            v_base = tl.where(past, v_ring_ptr, v_ptr)
        else:
            p = b * BLOCK_N + tl.arange(0, BLOCK_N)
            row = p
            held = p < end
            k_base = k_ptr
            v_base = v_ptr
        offset = row[:, None] * (KV * D) + head * D + dim[None, :]
        k = tl.load(k_base + offset, mask=held[:, None], other=0.0)
        v = tl.load(v_base + offset, mask=held[:, None], other=0.0)
        distance = pos + token[:, None] - p[None, :]
        mask = distance >= 0  # bounds the cache and the chunk as well; the ring's blocks end before the chunk
        if RING > 0:
            mask &= (distance < WINDOW) & held[None, :]
        scores = tl.where(mask, tl.dot(q, tl.trans(k), input_precision="ieee") * LOG2E, float("-inf"))
        weights, m, scale = softmax_step(scores, m, 1)
        total = total * scale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * scale[:, None], input_precision="ieee")
    tl.store(out_ptr + in_out, acc / total[:, None], mask=(token < tokens)[:, None])
    if LSE:
        tl.store(lse_ptr + head * tokens * GROUP + r, m + tl.log2(total), mask=token < tokens)


def split_count(target: GpuTarget, tile: Tile, kv_heads: int, keys: int) -> int:
    """Splits of a decode step over at most `keys` keys: enough programs to fill the target, no more than there are blocks."""
    return max(1, min(target.sm_count * tile.splits_per_sm // kv_heads, triton.cdiv(keys, tile.keys)))


def padded_group(heads: int, kv_heads: int) -> int:
    """Query heads of one KV head, rounded up to what a tensor-core tile takes."""
    return max(8, triton.next_power_of_2(heads // kv_heads))


def merge_warps(dim: int) -> int:
    return vector_warps(dim, MERGE_WARPS)


def decode_tile(dtype: torch.dtype, target: GpuTarget, dim: int) -> Tile:
    return DECODE_FLOAT32 if dtype == torch.float32 else pick(DECODE_TILES, target, dim)


def prefill_tile(dtype: torch.dtype, target: GpuTarget, dim: int) -> Tile:
    return PREFILL_FLOAT32 if dtype == torch.float32 else pick(PREFILL_TILES, target, dim)


def decode_constants(tile: Tile, target: GpuTarget, heads: int, kv_heads: int, dim: int, slots: int, window: int,
                     has_len: bool, own: bool = False, terms: int = 0) -> tuple[dict, dict]:
    """The constants of `kiln_flash_decode` and of `kiln_flash_merge`; own, terms: the latter's OWN and TERMS."""
    group = heads // kv_heads
    splits = split_count(target, tile, kv_heads, min(slots, window) if window else slots)  # of a ring's spare slots none is attended to
    shared = {"HAS_LEN": has_len, "WINDOW": window, "GROUP": group, "D": dim, "SPLITS": splits, "BLOCK_N": tile.keys,
              "EARLY": early(target)}
    return (shared | {"RING": slots if window else 0, "KV": kv_heads, "PAD": padded_group(heads, kv_heads), "ROW": 0},
            shared | {"HEADS": heads, "SPLITS_PAD": triton.next_power_of_2(splits), "OWN": own, "TERMS": terms, "MANY": False,
                      "SLOTS": 0})


def prefill_constants(tile: Tile, heads: int, kv_heads: int, dim: int, slots: int, window: int, lse: bool = False) -> dict:
    """The constants of `kiln_flash_prefill`."""
    return {"WINDOW": window, "RING": slots if window else 0, "KV": kv_heads, "GROUP": heads // kv_heads, "D": dim, "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys, "LSE": lse}


def check_kernel_shapes(op: str, dim: int, *caches: torch.Tensor) -> None:
    """ValueError for what the kernels cannot index."""
    if dim < 16 or dim > 512 or dim & (dim - 1):
        raise ValueError(f"{op}: head dimension {dim}; the GPU kernels take powers of two from 16 to 512")
    for cache in caches:
        if cache.numel() >= 1 << 31:
            raise ValueError(f"{op}: a cache of shape {tuple(cache.shape)} has 2^31 elements or more; export with a smaller maximum length")


def flash_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_stored: torch.Tensor, v_stored: torch.Tensor, pos: torch.Tensor,
                  window: int, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Launch `kiln_flash_prefill`: out [T, H, D], lse float32 [KV, T * H / KV] if given; the rest as `flash_attention`, contiguous."""
    (tokens, heads, dim), (slots, kv_heads, _) = q.shape, k_stored.shape
    tile = prefill_tile(q.dtype, current_target(), dim)
    constants = prefill_constants(tile, heads, kv_heads, dim, slots, window, lse is not None)
    blocks = (tokens * constants["GROUP"] + tile.rows - 1) // tile.rows
    kernel(kiln_flash_prefill)[(blocks, kv_heads)](q, k, v, k_stored, v_stored, pos, out, pos if lse is None else lse, tokens,
                                                     **constants, num_warps=tile.warps, num_stages=tile.stages)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_stored: torch.Tensor, v_stored: torch.Tensor, pos: torch.Tensor,
                    kv_len: torch.Tensor | None, window: int) -> torch.Tensor:
    """Launch the kernels. window > 0: k, v [T, KV, D] are the chunk's own and k_stored, v_stored a ring; 0: both are the same cache."""
    tokens, heads, dim = q.shape
    slots, kv_heads, _ = k_stored.shape
    check_kernel_shapes("attention", dim, k_stored)
    q, k, v, k_stored, v_stored = (x.contiguous() for x in (q, k, v, k_stored, v_stored))
    out = torch.empty_like(q)
    if tokens == 1:
        target = current_target()
        tile = decode_tile(q.dtype, target, dim)
        split, merge = decode_constants(tile, target, heads, kv_heads, dim, slots, window, kv_len is not None)
        length = pos if kv_len is None else kv_len
        part = torch.empty(split["SPLITS"], heads, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(split["SPLITS"], heads, 2, dtype=torch.float32, device=q.device)
        kernel(kiln_flash_decode)[(kv_heads, split["SPLITS"])](q, k_stored, v_stored, pos, length, part, sums, **split,
                                                                 num_warps=tile.warps, num_stages=tile.stages)
        kernel(kiln_flash_merge)[(heads,)](part, sums, pos, length, q, k, v, out, **merge, num_warps=merge_warps(dim))
    else:
        flash_prefill(q, k, v, k_stored, v_stored, pos, window, out)
    return out


def flash_rows(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pos: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Causal attention of each query, [T, H, D], to the cache of its row, which holds its own key: `flash_attention` of that query alone.

    k_cache, v_cache [B, S, KV, D]; pos, row int64 [T]. Returns [T, H, D].
    """
    (tokens, heads, dim), (_, slots, kv_heads, _), target = q.shape, k_cache.shape, current_target()
    check_kernel_shapes("attention", dim, k_cache[0])
    tile = decode_tile(q.dtype, target, dim)
    split, merge = decode_constants(tile, target, heads, kv_heads, dim, slots, 0, False)
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    part = torch.empty(tokens, split["SPLITS"], heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens, split["SPLITS"], heads, 2, dtype=torch.float32, device=q.device)
    kernel(kiln_flash_decode)[(kv_heads, split["SPLITS"], tokens)](q.contiguous(), k_cache, v_cache, pos, row, part, sums,
                                                                   **split | {"ROW": slots * kv_heads * dim}, num_warps=tile.warps,
                                                                   num_stages=tile.stages)
    kernel(kiln_flash_merge)[(heads, tokens)](part, sums, pos, pos, q, q, q, out, **merge | {"MANY": True}, num_warps=merge_warps(dim))
    return out


def prefill_case(name: str, dtype: torch.dtype, pointer: str, target: GpuTarget, heads: int, kv_heads: int, dim: int, slots: int,
                 window: int, lse: bool = False) -> KernelCase:
    """The compilation behind `flash_prefill`; pointer: of one to dtype."""
    tile = prefill_tile(dtype, target, dim)
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "k_ring_ptr", "v_ring_ptr", "out_ptr"), pointer)
    signature |= {"pos_ptr": "*i64", "lse_ptr": "*fp32" if lse else "*i64", "tokens": "i32"}
    return KernelCase(name, kiln_flash_prefill, signature, prefill_constants(tile, heads, kv_heads, dim, slots, window, lse),
                      {"num_warps": tile.warps, "num_stages": tile.stages})


def flash_cases(name: str, target: GpuTarget, shape: Heads, slots: int, window: int) -> list[KernelCase]:
    """The compilations behind `flash_attention`, in bfloat16 and float32."""
    heads, kv_heads, dim, cases = shape.queries, shape.kv, shape.dim, []
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        label = f"{name} {pointer[1:]} {shape.label}"
        inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), pointer)
        position = {"pos_ptr": "*i64", "len_ptr": "*i64" if window else "*i32"}
        parts = {"o_ptr": "*fp32", "ml_ptr": "*fp32"}
        tile = decode_tile(dtype, target, dim)
        split, merge = decode_constants(tile, target, heads, kv_heads, dim, slots, window, not window)
        cases.append(KernelCase(f"{label} decode", kiln_flash_decode, inputs | position | parts, split,
                                {"num_warps": tile.warps, "num_stages": tile.stages}))
        if not window:
            split, rows = decode_constants(tile, target, heads, kv_heads, dim, slots, 0, False)
            at = {"pos_ptr": "*i64", "len_ptr": "*i64"}
            cases.append(KernelCase(f"{label} decode rows", kiln_flash_decode, inputs | at | parts,
                                    split | {"ROW": slots * kv_heads * dim}, {"num_warps": tile.warps, "num_stages": tile.stages}))
            cases.append(KernelCase(f"{label} merge rows", kiln_flash_merge, parts | at | inputs | {"out_ptr": pointer},
                                    rows | {"MANY": True}, {"num_warps": merge_warps(dim)}))
        cases.append(KernelCase(f"{label} merge", kiln_flash_merge, parts | position | inputs | {"out_ptr": pointer}, merge,
                                {"num_warps": merge_warps(dim)}))
        cases.append(prefill_case(f"{label} prefill", dtype, pointer, target, heads, kv_heads, dim, slots, window))
    return cases
