"""Triton kernels of a dense product out [T, N] = x [T, K] @ w, T known only at run time, N and K fixed.

w is [K, N], or [N, K] with TRANSPOSED. A result adds its products up in the order of K whatever T and the tiles are, so a row does not
depend on how many others there are. `kiln_matmul_tma` reads and writes tiles by tensor descriptors, one program for each multiprocessor;
`kiln_matmul` by pointers, one program for each tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import INTERPRETED


@triton.jit
def programs():
    """Those of the grid that the GPU runs at once, one on a multiprocessor: a smaller card of an architecture leaves the others out."""
    if INTERPRETED:
        return tl.num_programs(0)
    else:
        most = tl.inline_asm_elementwise("mov.u32 $0, %nsmid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        return tl.minimum(tl.num_programs(0), most)


@triton.jit
def tile_position(tile, rows, columns: tl.constexpr, GROUP: tl.constexpr):
    """(row block, column block) of a tile: GROUP rows of blocks at a time, column by column, so that neighbours share what they read."""
    first = tile // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    within = tile % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def store_tile(out_desc, m, n, acc, dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    if HALVES:  # half the shared memory
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        out_desc.store([m, n], left.to(dtype))
        out_desc.store([m, n + BLOCK_N // 2], right.to(dtype))
    else:
        out_desc.store([m, n], acc.to(dtype))


@triton.jit
def multiply_tiles(x, w, out, tokens, N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
                   HALVES: tl.constexpr, SPECIALIZE: tl.constexpr):
    """What one program does of out[:, : N] = x @ w: every tile whose number is its own modulo the programs."""
    x_desc = tl.make_tensor_descriptor(x, [tokens, K], [K, 1], [BLOCK_M, BLOCK_K])
    if TRANSPOSED:
        w_desc = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    else:
        w_desc = tl.make_tensor_descriptor(w, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    out_desc = tl.make_tensor_descriptor(out, [tokens, N], [COLUMNS, 1], [BLOCK_M, BLOCK_N // 2 if HALVES else BLOCK_N])
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows = tl.cdiv(tokens, BLOCK_M)
    tiles = rows * columns
    program, count = tl.program_id(0), programs()
    for tile in tl.range(tl.where(program < count, program, tiles), tiles, count, flatten=not SPECIALIZE, warp_specialize=SPECIALIZE):
        i, j = tile_position(tile, rows, columns, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
            a = x_desc.load([i * BLOCK_M, k * BLOCK_K])
            if TRANSPOSED:
                b = w_desc.load([j * BLOCK_N, k * BLOCK_K]).T
            else:
                b = w_desc.load([k * BLOCK_K, j * BLOCK_N])
            acc = tl.dot(a, b, acc)
        store_tile(out_desc, i * BLOCK_M, j * BLOCK_N, acc, out.dtype.element_ty, BLOCK_M, BLOCK_N, HALVES)


@triton.jit
def kiln_matmul_tma(x, w, out, tokens, first, N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
                    HALVES: tl.constexpr, SPECIALIZE: tl.constexpr, FEW_M: tl.constexpr, FEW_N: tl.constexpr, FEW_K: tl.constexpr,
                    FEW_STAGES: tl.constexpr):
    """out [T, COLUMNS] from column `first` on, for 16-bit x. FEW_M > 0: up to BLOCK_M tokens are multiplied in tiles of their own, for
    too few of the others would read w."""
    if FEW_M > 0 and tokens <= BLOCK_M:
        multiply_tiles(x, w, out + first, tokens, N, K, COLUMNS, TRANSPOSED, FEW_M, FEW_N, FEW_K, FEW_STAGES, GROUP, False, False)
    else:
        multiply_tiles(x, w, out + first, tokens, N, K, COLUMNS, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP, HALVES, SPECIALIZE)


@triton.jit
def add_products(x, w, start, end, acc, K: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + a tile of x @ w over K start .. end; x and w: pointers to the tiles' first piece of K, STEP elements of w between rows."""
    inner = tl.arange(0, BLOCK_K)
    for k in range(start, end, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x + k)
            b = tl.load(w + k * STEP)
        else:
            a = tl.load(x + k, mask=(k + inner < K)[None, :], other=0.0)
            b = tl.load(w + k * STEP, mask=(k + inner < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def kiln_matmul(x, w, out, tokens, first, N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr):
    """out [T, COLUMNS] from column `first` on; grid (tiles). SPAN > 0: K is added up in spans and those in turn, for float32's rounding."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    step: tl.constexpr = 1 if TRANSPOSED else N
    i, j = tile_position(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), columns, GROUP)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # rows and columns beyond the end are read from the last one, and not written
    x += tl.minimum(row, tokens - 1)[:, None] * K + inner[None, :]
    source = column if N % BLOCK_N == 0 else tl.minimum(column, N - 1)
    w += inner[:, None] * step + source.to(tl.int64)[None, :] * (K if TRANSPOSED else 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SPAN > 0:
        for start in tl.range(0, K, SPAN, num_stages=1):
            acc += add_products(x, w, start, tl.minimum(start + SPAN, K), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), K, step, BLOCK_K)
    else:
        acc = add_products(x, w, 0, K, acc, K, step, BLOCK_K)
    out += row.to(tl.int64)[:, None] * COLUMNS + first + column[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=(row < tokens)[:, None] & (column < N)[None, :])
