"""Attention of a chunk of queries to the codes of a TQ4 cache, which are decompressed once for all queries, not once for each tile of them.

The cache is walked in pieces. Two kernels for each piece: one writes its keys, as the 8-bit integers that their levels are, and its values,
scales included, to a scratch; one continues every query's softmax over them. A piece that lies past the queries ends at its first
instructions, so the launches depend on the number of slots alone and the host never reads a position.

Queries are 16-bit integers, 256 a + b of signed bytes, so that a product with keys is two of 8 bits, exact: they cost a tensor core what
one of 16 bits does, and keys are half the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """How the kernels cut their work: rows of queries and keys of a block, slots of a piece."""

    rows: int
    keys: int
    warps: int
    stages: int
    piece: int = 16384


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
def kiln_tq4_piece(q_ptr, q_scale_ptr, k_ptr, k_scales_ptr, v_ptr, pos_ptr, state_ptr, lse_ptr, out_ptr, tokens, start,
                     EXACT_WINDOW: tl.constexpr, SLOTS: tl.constexpr, PIECE: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr,
                     D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M rows of one KV head against one piece of the keys; the output stays rotated, rows that read no code are undefined.

    q_ptr int8 [T, H, 2, D]: high bytes, low bytes; q_scale_ptr: of products of those integers with levels times LEVEL_UNIT. A row is a
    (token, head of the group) pair, tokens major. Between pieces its state is the output so far, as the sum of two float16 (state_ptr
    [KV, blocks, 2, BLOCK_M, D]), and the base-2 logarithm of its total weight (lse_ptr float32 [KV, T * GROUP], a result, too).
    """
    blocks = tl.num_programs(0)
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
    k_scale = scales_of(k_scales_ptr, 0, start, SLOTS, PIECE, BLOCK_N)
    for n in tl.range(-BLOCK_N, tl.minimum(end, PIECE), BLOCK_N):
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
    else:
        out = out_ptr + query[:, None] * D + dim[None, :]
        tl.store(out, acc * (1.0 / SHRINK), mask=keep[:, None])


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
            shared | {"KV": kv_heads, "GROUP": heads // kv_heads, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys})


def attend_in_pieces(tile: PrefillTile, q: torch.Tensor, q_scale: torch.Tensor, caches: tuple[torch.Tensor, ...], pos: torch.Tensor,
                     exact_window: int, out: torch.Tensor, lse: torch.Tensor, asm: bool) -> None:
    """Launch the kernels: q int8 [T, H, 2, D] and q_scale float32 [T, H] as `kiln_tq4_rotate` leaves them; a query at p reads codes up to
    p - exact window. out [T, H, D], still rotated; lse float32 [KV, T * H / KV].

    Scratch: 3 * KV * D * piece bytes, and with more than one piece 4 bytes for each element of q.
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
    for start in range(0, slots - exact_window, piece):
        kernel(kiln_tq4_decompress)[(piece // DECOMPRESS_ROWS, kv_heads, 2)](k_codes, v_codes, v_scales, pos, k, v, tokens, start,
                                                                               **decompress, num_warps=DECOMPRESS_WARPS)
        kernel(kiln_tq4_piece)[(blocks, kv_heads)](q, q_scale, k, k_scales, v, pos, state, lse, out, tokens, start, **attend,
                                                     num_warps=tile.warps, num_stages=tile.stages)


def piece_cases(name: str, tile: PrefillTile, heads: int, kv_heads: int, dim: int, slots: int, exact_window: int) -> list[KernelCase]:
    """The compilations behind `attend_in_pieces`, for bfloat16 activations."""
    decompress, attend = constants(tile, heads, kv_heads, dim, slots, exact_window, True)
    scratch = {"k_ptr": "*i8", "v_ptr": "*fp16", "pos_ptr": "*i64"}
    caches = {"k_codes_ptr": "*i16", "v_codes_ptr": "*i16", "v_scales_ptr": "*fp16"}
    inputs = {"q_ptr": "*i8", "q_scale_ptr": "*fp32", "k_scales_ptr": "*fp16"}
    integers = {"tokens": "i32", "start": "i32"}
    return [
        KernelCase(f"{name} decompress {kv_heads}x{dim}", kiln_tq4_decompress, caches | scratch | integers, decompress,
                   {"num_warps": DECOMPRESS_WARPS}, aligned=("start",)),
        KernelCase(f"{name} piece {heads}:{kv_heads}x{dim}", kiln_tq4_piece,
                   inputs | scratch | {"state_ptr": "*fp16", "lse_ptr": "*fp32", "out_ptr": "*bf16"} | integers, attend,
                   {"num_warps": tile.warps, "num_stages": tile.stages}, aligned=("start",)),
    ]
