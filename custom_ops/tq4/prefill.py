"""Attention of a chunk of queries to the codes of a TQ4 cache, which are decompressed once for all queries, not once for each tile of them.

The cache is walked in pieces. Two kernels for each piece: one writes its keys, as the 8-bit integers that their levels are, and its values,
scales included, to a scratch; one continues every query's softmax over them. A piece that lies past the queries ends at its first
instructions, so the launches depend on the number of slots alone and the host never reads a position.

Few queries are few programs. Where they are no more than a tile's `few`, the keys of a piece are split between `splits` programs each, and
a last kernel joins what they found. It is off in every tile until it is measured.

Queries are 16-bit integers, 256 a + b of signed bytes, so that a product with keys is two of 8 bits, exact: they cost a tensor core what
one of 16 bits does, and keys are half the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.gpu.launch import kernel
from kiln.custom_ops.gpu.tables import pick
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.tq4.codec import LEVEL_UNIT, plane_pair


@dataclass(frozen=True)
class PrefillTile:
    """How the kernels cut their work: rows of queries and keys of a block, slots of a piece; splits of its keys where no more than `few`
    programs have all the rows."""

    rows: int
    keys: int
    warps: int
    stages: int
    piece: int = 16384
    splits: int = 1
    few: int = 0


# By (architecture, largest head dimension), see `configs`; measured on sm_90, elsewhere what fits. 16-bit activations; float32 ones
# decompress tile by tile (`custom_ops/tq4/attention.py`).
PIECE_TILES = {
    (80, 512): PrefillTile(rows=32, keys=32, warps=8, stages=3),  # of 64 rows and more the accumulators take all registers
    (86, 512): PrefillTile(rows=32, keys=32, warps=8, stages=2),
    (89, 512): PrefillTile(rows=32, keys=32, warps=8, stages=2),
    (90, 512): PrefillTile(rows=64, keys=32, warps=8, stages=3),
    (100, 512): PrefillTile(rows=64, keys=32, warps=8, stages=3),
    (120, 512): PrefillTile(rows=32, keys=32, warps=8, stages=2),
}
DECOMPRESS_ROWS, DECOMPRESS_WARPS = 64, 8  # a multiple of every tile's keys: whole blocks are defined

JOIN_WARPS, JOINED = 4, ("KV", "GROUP", "D", "BLOCK_M", "SPLITS", "FEW")

SHRINK = tl.constexpr(0.25)  # of values in the scratch: the largest level times the largest scale would not fit float16
RESTORED = tl.constexpr(16)  # rows of the state in one step


@triton.jit
def kiln_tq4_decompress(k_codes_ptr, v_codes_ptr, v_scales_ptr, pos_ptr, k_ptr, v_ptr, tokens, start,
                          EXACT_WINDOW: tl.constexpr, SLOTS: tl.constexpr, PIECE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                          ASM: tl.constexpr):
    """ROWS slots of one KV head, of the piece from slot `start`, still rotated: k_ptr int8 [KV, PIECE, D], levels times LEVEL_UNIT; v_ptr
    float16 [KV, PIECE, D], shrunk.

    Program axes: block of slots, KV head, keys (0) or values (1). Slots past those that the last query reads become finite.
    """
    Q: tl.constexpr = D // 4
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    filled = tl.load(pos_ptr).to(tl.int32) + tokens - EXACT_WINDOW - start
    if first >= filled:
        return
    row = first + tl.arange(0, ROWS)
    held = row < filled
    word = tl.arange(0, Q)
    slot = head * SLOTS + start + row
    codes_at = slot[:, None] * Q + word[None, :]
    out = (head * PIECE + row[:, None]) * D + word[None, :]
    if tl.program_id(2) == 0:
        codes = tl.load(k_codes_ptr + codes_at, mask=held[:, None], other=0)
        for pair in tl.static_range(2):
            a, b = plane_pair(codes, pair, tl.float16, ASM)
            tl.store(k_ptr + out + 2 * pair * Q, (a * LEVEL_UNIT).to(tl.int8))
            tl.store(k_ptr + out + 2 * pair * Q + Q, (b * LEVEL_UNIT).to(tl.int8))
    else:
        codes = tl.load(v_codes_ptr + codes_at, mask=held[:, None], other=0)
        scale = tl.load(v_scales_ptr + slot, mask=held, other=0.0)
        scale = (scale.to(tl.float32) * SHRINK).to(tl.float16)[:, None]
        for pair in tl.static_range(2):
            a, b = plane_pair(codes, pair, tl.float16, ASM)
            tl.store(v_ptr + out + 2 * pair * Q, a * scale)
            tl.store(v_ptr + out + 2 * pair * Q + Q, b * scale)


@triton.jit
def scales_of(k_scales_ptr, n, start, SLOTS: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scales of the keys n .. of a piece, of its last block where n lies past it."""
    WHOLE: tl.constexpr = SLOTS % PIECE == 0  # then every piece lies in the cache
    p = tl.minimum(n, PIECE - BLOCK_N) + tl.arange(0, BLOCK_N)
    return tl.load(k_scales_ptr + p, mask=None if WHOLE else start + p < SLOTS, other=None if WHOLE else 0.0)


@triton.jit
def kiln_tq4_piece(q_ptr, q_scale_ptr, k_ptr, k_scales_ptr, v_ptr, pos_ptr, state_ptr, lse_ptr, out_ptr, tokens, start, split_state_ptr,
                     split_lse_ptr, split_out_ptr, EXACT_WINDOW: tl.constexpr, SLOTS: tl.constexpr, PIECE: tl.constexpr,
                     KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     SPLITS: tl.constexpr, FEW: tl.constexpr):
    """BLOCK_M rows of one KV head against one piece of the keys; the output stays rotated, rows that read no code are undefined.

    q_ptr int8 [T, H, 2, D]: high bytes, low bytes; q_scale_ptr: of products of those integers with levels times LEVEL_UNIT. A row is a
    (token, head of the group) pair, tokens major. Between pieces its state is the output so far, as the sum of two float16 (state_ptr
    [KV, blocks, 2, BLOCK_M, D]), and the base-2 logarithm of its total weight (lse_ptr float32 [KV, T * GROUP], a result, too).

    SPLITS > 1, with no more than FEW programs for all rows: each of so many takes its share of the piece's keys; its state, logarithms and
    output are in split_*_ptr, each with a leading [SPLITS], the output float32 [T, H, D]. Otherwise the first does all.
    """
    blocks = tl.num_programs(0)
    split = 0
    if SPLITS > 1:
        split = tl.program_id(2)
        if (split > 0) & (blocks * KV > FEW):
            return
    block = blocks - 1 - tl.program_id(0)  # the longest sweeps start first
    head = tl.program_id(1)
    pos = tl.load(pos_ptr).to(tl.int32) - EXACT_WINDOW - start  # the first query reads codes up to here
    end = pos + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1) + 1
    if end <= 0:
        return
    row = tl.arange(0, BLOCK_M)
    token = (block * BLOCK_M + row) // GROUP
    query = token * (KV * GROUP) + head * GROUP + (block * BLOCK_M + row) % GROUP
    keep = token < tokens
    dim = tl.arange(0, D)
    key = tl.arange(0, BLOCK_N)
    # of 16 rows of the operand, 8 queries' high bytes and the same queries' low bytes: products that one thread gets
    pair = tl.arange(0, 2 * BLOCK_M)
    byte_row = block * BLOCK_M + pair // 16 * 8 + pair % 8
    byte = (byte_row // GROUP * (KV * GROUP) + head * GROUP + byte_row % GROUP) * 2 + pair // 8 % 2
    q = tl.load(q_ptr + byte[:, None] * D + dim[None, :], mask=(byte_row // GROUP < tokens)[:, None], other=0)
    q_scale = tl.load(q_scale_ptr + query, mask=keep, other=0.0)
    begin = 0
    stop = tl.minimum(end, PIECE)
    if SPLITS > 1:
        few = blocks * KV <= FEW
        size = tl.cdiv(tl.cdiv(stop, BLOCK_N), tl.where(few, SPLITS, 1)) * BLOCK_N
        begin = split * size
        stop = tl.minimum(begin + size, stop)
        state_ptr = tl.where(few, split_state_ptr + split * (KV * blocks * 2 * BLOCK_M * D), state_ptr)
        lse_ptr = tl.where(few, split_lse_ptr + split * (KV * tokens * GROUP), lse_ptr)
    state_ptr += (head * blocks + block) * (2 * BLOCK_M * D)
    lse_ptr += head * tokens * GROUP + block * BLOCK_M
    k_ptr += head * (PIECE * D)
    v_ptr += head * (PIECE * D)
    k_scales_ptr += head * SLOTS + start
    m = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may see no key of the piece
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # added up after the loop: within it that would be an exchange between threads
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    offset = key[:, None] * D + dim[None, :]

    # each step multiplies the next block's keys while it weighs its own block's scores; the first only multiplies
    scores = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    k_scale = scales_of(k_scales_ptr, begin, start, SLOTS, PIECE, BLOCK_N)
    for n in tl.range(begin - BLOCK_N, stop, BLOCK_N):
        new = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        scale = tl.exp2(m - new)
        m = new
        total = total * scale[:, None] + weights
        weights = weights.to(tl.float16)
        products = tl.dot(q, tl.trans(tl.load(k_ptr + tl.minimum(n + BLOCK_N, PIECE - BLOCK_N) * D + offset)))
        high, low = tl.split(tl.permute(tl.reshape(products.to(tl.float32), (BLOCK_M // 8, 2, 8, BLOCK_N)), (0, 2, 3, 1)))
        products = tl.reshape(high * 256.0 + low, (BLOCK_M, BLOCK_N)) * q_scale[:, None] * k_scale.to(tl.float32)[None, :]
        # masked here, not where they are read: were the product itself carried on, ptxas would make the next step wait for both products
        scores = tl.where((n + BLOCK_N + key)[None, :] <= (pos + token)[:, None], products, float("-inf"))
        k_scale = scales_of(k_scales_ptr, n + 2 * BLOCK_N, start, SLOTS, PIECE, BLOCK_N)  # a step ahead: its latency would show
        v = tl.load(v_ptr + tl.maximum(n, 0) * D + offset)
        acc = tl.dot(weights, v, acc * scale[:, None])
    total = tl.sum(total, 1)

    if start > 0:
        before = tl.load(lse_ptr + row, mask=keep, other=0.0)
        ratio = tl.exp2(tl.minimum(m - before, 60.0))  # beyond, the state is below float32's resolution
        m = tl.maximum(before, m - 60.0)
        total = total * ratio + 1.0
        acc = acc * ratio[:, None]
        some = tl.arange(0, RESTORED)
        for r in tl.range(0, 2 * BLOCK_M, RESTORED, num_stages=2):  # + state, as a product with the identity: a plain load would spill
            identity = (row[:, None] == ((r + some) % BLOCK_M)[None, :]).to(tl.float16)
            acc = tl.dot(identity, tl.load(state_ptr + ((r + some)[:, None] * D + dim[None, :])), acc)
    acc = acc * tl.where(total > 0, 1.0 / total, 0.0)[:, None]  # a NaN would pass from row to row in the product with the identity
    tl.store(lse_ptr + row, m + tl.log2(total), mask=keep)
    if end > PIECE:
        high = acc.to(tl.float16)
        state = state_ptr + (row[:, None] * D + dim[None, :])
        tl.store(state, high)
        tl.store(state + BLOCK_M * D, (acc - high.to(tl.float32)).to(tl.float16))
    elif SPLITS > 1:
        to = query[:, None] * D + dim[None, :]
        if blocks * KV <= FEW:
            tl.store(split_out_ptr + split * (tokens * KV * GROUP * D) + to, acc * (1.0 / SHRINK), mask=keep[:, None])
        else:
            tl.store(out_ptr + to, acc * (1.0 / SHRINK), mask=keep[:, None])
    else:
        out = out_ptr + query[:, None] * D + dim[None, :]
        tl.store(out, acc * (1.0 / SHRINK), mask=keep[:, None])


@triton.jit
def kiln_tq4_join(split_lse_ptr, split_out_ptr, lse_ptr, out_ptr, tokens, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                  BLOCK_M: tl.constexpr, SPLITS: tl.constexpr, FEW: tl.constexpr):
    """One row, a query's head: what the splits of `kiln_tq4_piece` found, where it split. Grid (FEW * BLOCK_M)."""
    r = tl.program_id(0)
    token = r // (KV * GROUP)
    if (token >= tokens) | (tl.cdiv(tokens * GROUP, BLOCK_M) * KV > FEW):
        return
    head = r % (KV * GROUP)
    at = head // GROUP * tokens * GROUP + token * GROUP + head % GROUP
    dim = tl.arange(0, D)
    m = tl.load(split_lse_ptr + at)
    for i in tl.static_range(1, SPLITS):
        m = tl.maximum(m, tl.load(split_lse_ptr + i * (KV * tokens * GROUP) + at))
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for i in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(split_lse_ptr + i * (KV * tokens * GROUP) + at) - m)
        total += weight
        acc += tl.load(split_out_ptr + (i * (tokens * KV * GROUP) + r) * D + dim) * weight
    tl.store(lse_ptr + at, m + tl.log2(total))
    tl.store(out_ptr + r * D + dim, acc / total)


def piece_tile(target: GpuTarget, dim: int) -> PrefillTile:
    """The tile of this architecture and head dimension."""
    return pick(PIECE_TILES, target, dim)


def piece_slots(tile: PrefillTile, slots: int) -> int:
    """Slots of a piece: no more than the cache has, in whole blocks."""
    return min(tile.piece, triton.cdiv(slots, DECOMPRESS_ROWS) * DECOMPRESS_ROWS)


def constants(tile: PrefillTile, heads: int, kv_heads: int, dim: int, slots: int, exact_window: int, asm: bool) -> tuple[dict, dict]:
    """The constants of `kiln_tq4_decompress` and of `kiln_tq4_piece`."""
    shared = {"PIECE": piece_slots(tile, slots), "SLOTS": slots, "D": dim, "EXACT_WINDOW": exact_window}
    return (shared | {"ROWS": DECOMPRESS_ROWS, "ASM": asm},
            shared | {"KV": kv_heads, "GROUP": heads // kv_heads, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "SPLITS": tile.splits,
                      "FEW": tile.few})  # fmt: skip


def attend_in_pieces(tile: PrefillTile, q: torch.Tensor, q_scale: torch.Tensor, caches: tuple[torch.Tensor, ...], pos: torch.Tensor,
                     exact_window: int, out: torch.Tensor, lse: torch.Tensor, asm: bool) -> None:
    """Launch the kernels: q int8 [T, H, 2, D] and q_scale float32 [T, H] as `kiln_tq4_rotate` leaves them; a query at p reads codes up to
    p - exact window. out [T, H, D], still rotated; lse float32 [KV, T * H / KV].

    Scratch: 3 * KV * D * piece bytes, and with more than one piece 4 bytes for each element of q; 8 * D * splits * few * rows where few
    queries' keys are split.
    """
    tokens, heads, _, dim = q.shape
    k_codes, k_scales, v_codes, v_scales = caches
    kv_heads, slots, _ = k_codes.shape
    decompress, attend = constants(tile, heads, kv_heads, dim, slots, exact_window, asm)
    piece = decompress["PIECE"]
    blocks = (tokens * (heads // kv_heads) + tile.rows - 1) // tile.rows
    k = torch.empty(kv_heads, piece, dim, dtype=torch.int8, device=q.device)
    v = torch.empty(kv_heads, piece, dim, dtype=torch.float16, device=q.device)
    kept = kv_heads * blocks * tile.rows if slots - exact_window > piece else 1  # rows whose state passes from piece to piece
    state = torch.empty(2 * kept * dim, dtype=torch.float16, device=q.device)
    several = tile.splits > 1
    split_state, split_lse, split_out = state, lse, lse  # what is not touched is any pointer
    if several:
        rows = tile.splits * tile.few * tile.rows
        split_state = torch.empty(2 * rows * dim, dtype=torch.float16, device=q.device)
        split_lse, split_out = (torch.empty(rows * size, dtype=torch.float32, device=q.device) for size in (1, dim))
    grid = (blocks, kv_heads, tile.splits) if several else (blocks, kv_heads)
    for start in range(0, slots - exact_window, piece):
        kernel(kiln_tq4_decompress)[(piece // DECOMPRESS_ROWS, kv_heads, 2)](k_codes, v_codes, v_scales, pos, k, v, tokens, start,
                                                                               **decompress, num_warps=DECOMPRESS_WARPS)
        kernel(kiln_tq4_piece)[grid](q, q_scale, k, k_scales, v, pos, state, lse, out, tokens, start, split_state, split_lse, split_out,
                                     **attend, num_warps=tile.warps, num_stages=tile.stages)
    if several:
        joined = {name: attend[name] for name in JOINED}
        kernel(kiln_tq4_join)[(tile.few * tile.rows,)](split_lse, split_out, lse, out, tokens, **joined, num_warps=JOIN_WARPS)


def piece_cases(name: str, tile: PrefillTile, heads: int, kv_heads: int, dim: int, slots: int, exact_window: int) -> list[KernelCase]:
    """The compilations behind `attend_in_pieces`, for bfloat16 activations."""
    decompress, _ = constants(tile, heads, kv_heads, dim, slots, exact_window, True)
    scratch = {"k_ptr": "*i8", "v_ptr": "*fp16", "pos_ptr": "*i64"}
    caches = {"k_codes_ptr": "*i16", "v_codes_ptr": "*i16", "v_scales_ptr": "*fp16"}
    inputs = {"q_ptr": "*i8", "q_scale_ptr": "*fp32", "k_scales_ptr": "*fp16"}
    integers = {"tokens": "i32", "start": "i32"}
    splits = dict.fromkeys(("split_lse_ptr", "split_out_ptr"), "*fp32")
    results = {"lse_ptr": "*fp32", "out_ptr": "*bf16"}
    cases = [
        KernelCase(f"{name} decompress {kv_heads}x{dim}", kiln_tq4_decompress, caches | scratch | integers, decompress,
                   {"num_warps": DECOMPRESS_WARPS}, aligned=("start",)),
    ]
    for form in dict.fromkeys((tile, replace(tile, splits=4, few=48))):
        attend = constants(form, heads, kv_heads, dim, slots, exact_window, True)[1]
        told = f"{heads}:{kv_heads}x{dim}{', splits of few' if form.splits > 1 else ''}"
        targets = (90,) if form is not tile else None
        states = dict.fromkeys(("state_ptr", "split_state_ptr"), "*fp16")
        cases.append(KernelCase(f"{name} piece {told}", kiln_tq4_piece, inputs | scratch | states | splits | results | integers, attend,
                                {"num_warps": tile.warps, "num_stages": tile.stages}, targets, ("start",)))
        if form.splits > 1:
            cases.append(KernelCase(f"{name} join {told}", kiln_tq4_join, splits | results | {"tokens": "i32"},
                                    {key: attend[key] for key in JOINED}, {"num_warps": JOIN_WARPS}, targets))
    return cases
