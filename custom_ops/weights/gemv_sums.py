"""The GEMV of up to 8 tokens over blocks of 256 whose sums are integers, on int8 tensor cores.

Where a block of 256 activations has one scale, all of a block of the matrix is a sum of integers: of each byte of the activations, quants
times the group's scale; of the minima, each times the sum of its activations. It becomes a float once. So the order inside a block does not
matter, and a token has the same bits whatever the others are: blocks, warps and splits are added in one order.

A product is m16n8k32: 16 rows of the matrix, a group along K, 8 columns which are 4 tokens by 2 bytes of their activations. The kernel is
written by threads: every tensor has one element for each, and what a thread has several of is a tuple. A warp has 32 rows. Thread t of it
loads octet t % 4 of rows 4 (t / 4) .. + 3, in loads of 16 bytes: the fragments of two products as they lie. The sums that it gets are of
the same four rows and of token t % 4, so it loads the scales of those rows, and no thread needs another's data until the end. Quants of a
type without minima are taken as signed numbers, at the top of their bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import after_waiting, wait_for_earlier_kernels, waits
from kiln.custom_ops.weights.fixed_point import extent_words, row_words
from kiln.custom_ops.weights.gemv_finish import finish, ordered_root
from kiln.custom_ops.weights.gemv_fragments import (
    GROUPS,
    block_halves,
    block_scales,
    four_if,
    group_operands,
    group_quants,
    group_scale,
    loads_of,
    no_load_earlier,
    row_float,
    row_minima,
    row_scales,
    signed_levels,
    small_product,
    sum_of_pair,
    tile_product,
    two,
)
from kiln.custom_ops.weights.gemv_kernels import warp_share


@triton.jit
def _add_products(sums, low0, high0, low1, high1, b, scale0, scale1, TERMS: tl.constexpr, SIGNED: tl.constexpr, THREADS: tl.constexpr):
    """The sums of two rows, TERMS each, and scale times the products with activations b."""
    c0, c1, d0, d1 = tile_product(low0, low1, high0, high1, b[0], b[1], THREADS, SIGNED)
    if TERMS == 1:
        return sums[0] + scale0 * c0, sums[1] + scale1 * d0
    elif TERMS == 2:
        return sums[0] + scale0 * c0, sums[1] + scale0 * c1, sums[2] + scale1 * d0, sums[3] + scale1 * d1
    else:
        c2, _c, d2, _d = tile_product(low0, low1, high0, high1, b[2], b[3], THREADS, SIGNED)
        return (sums[0] + scale0 * c0, sums[1] + scale0 * c1, sums[2] + scale0 * c2, sums[3] + scale1 * d0,
                sums[4] + scale1 * d1, sums[5] + scale1 * d2)


@triton.jit
def _value(sums, at: tl.constexpr, TERMS: tl.constexpr):
    """A block's sums with each byte as one float32."""
    value = sums[at].to(tl.float32)
    for t in tl.static_range(1, TERMS):
        value = tl.fma(value, 256.0, sums[at + t].to(tl.float32))
    return value


@triton.jit
def _activations(x, g: tl.constexpr, even, TERMS: tl.constexpr):
    """A thread's words of group g of its column's token: of one of two bytes, and of the third."""
    b = two(x + g * (8 * TERMS))
    if TERMS == 1:  # the second byte is 0
        return tl.where(even, b[0], 0), tl.where(even, b[1], 0)
    elif TERMS == 3:
        c = two(x + g * (8 * TERMS) + 4 - 2 * tl.where(even, 0, 1))
        return b[0], b[1], tl.where(even, c[0], 0), tl.where(even, c[1], 0)
    else:
        return b


@triton.jit
def _of_tiles(x, four_tokens, columns, g: tl.constexpr, even, TERMS: tl.constexpr, TILES: tl.constexpr):
    """`_activations` of each four tokens."""
    found = ()
    for c in tl.static_range(TILES):
        found = found + _activations(x + c * four_tokens + columns[2 * c], g, even, TERMS)
    return found


@triton.jit
def _tails(x, four_tokens, columns, to_sums, MINIMUM: tl.constexpr, TILES: tl.constexpr):
    """Of each four tokens the scale of a thread's token in a block, and its column's words of sums."""
    found = ()
    for c in tl.static_range(TILES):
        at = x + c * four_tokens
        found = found + (tl.load((at + columns[2 * c + 1]).to(tl.pointer_type(tl.float32))),)
        found = found + (two(at + (columns[2 * c] + to_sums)) if MINIMUM else (),)
    return found


@triton.jit
def _minima_total(c0, c1, c2, c3, TERMS: tl.constexpr):
    """The sum of minima times sums of activations, of whose bytes c0 .. are the products, float32."""
    if TERMS == 1:
        return (c0 + (c1 << 8)).to(tl.float32)
    elif TERMS == 2:
        return (c0 + (c1 << 8) + (c2 << 16)).to(tl.float32)
    else:
        high = tl.fma(c3.to(tl.float32), 256.0, c2.to(tl.float32))
        return tl.fma(tl.fma(high, 256.0, c1.to(tl.float32)), 256.0, c0.to(tl.float32))


@waits("words", "halves")
@triton.jit
def kiln_gemv_sums(x, words, halves, partials, counters, out, squares, squares_out, n, k, splits, stride: tl.constexpr,
                   halves_stride: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, WORDS: tl.constexpr,
                   HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr,
                   EXTENT: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr,
                   SHARES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, REGISTERS: tl.constexpr, COUNT: tl.constexpr,
                   PAD: tl.constexpr, EPS: tl.constexpr, SQUARES: tl.constexpr, M: tl.constexpr):
    """`kiln_gemv` of T tokens, M of them a program, 8 at most. Grid (row blocks, splits, T / M).

    As there but for: x of extent 256; n and where a row of words or of halves lies are multiples of 4; ROWS is a multiple of 32, a warp has
    32 of them and one of SHARES shares of the program's part of K; AHEAD: groups of 32 whose quants are under way, 8 at most.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    first_token = tl.program_id(2) * M
    tokens = tl.num_programs(2) * M
    THREADS: tl.constexpr = ROWS * SHARES
    TILES: tl.constexpr = (M + 3) // 4  # columns of a product are of four tokens
    PARTS: tl.constexpr = 2 if SCALES == "int8" or SCALES == "six" or SCALES == "four" else 1
    # Halves of a group with a scale each are two products, of which each takes the octets of the other half as 0. Of two tokens they fit
    # into one: its columns are 2 tokens by 2 halves by 2 bytes, and threads 2 i and 2 i + 1 have the halves of a token.
    HALVED: tl.constexpr = PARTS == 2 and M <= 2 and TERMS <= 2
    PRODUCTS: tl.constexpr = 1 if HALVED else PARTS
    SIGNED: tl.constexpr = not MINIMUM
    TABLE: tl.constexpr = signed_levels(LEVELS, ZERO)
    XB: tl.constexpr = extent_words(TERMS, EXTENT)
    thread = tl.arange(0, THREADS)
    octet = thread % 4
    column = thread % 32 // 4
    even = column % 2 == 0
    token_of_column = column // 4 if HALVED else column // 2
    token_of_thread = octet // 2 if HALVED else octet
    half = column // 2 % 2  # that a column is of
    row = block * ROWS + thread % ROWS // 4 * 4
    if not EVEN:
        row = tl.minimum(row, n - 4)  # of rows past the end others are computed, and not stored
    steps = k // 256
    each = tl.cdiv(steps, splits * SHARES)
    begin = split * (SHARES * each)
    if SHARES > 1:
        begin += warp_share(thread, 32) // (ROWS // 32) * each
    end = tl.minimum(begin + each, steps)
    keep = (begin < end).to(tl.int32) + 0 * thread
    at = words + tl.cast(begin, tl.int64) * (WORDS * stride) + row  # of a scalar and a small offset: fewer registers stay in use
    halves_at = halves + tl.cast(begin, tl.int64) * (HALVES * halves_stride) + row
    now = ()
    for g in tl.static_range(AHEAD):
        now = now + group_quants(at, octet, g, keep, stride, BITS)
    scales_now = block_scales(at, octet, keep, stride, BITS, SCALES)
    halves_now = block_halves(halves_at, keep, halves_stride, HALVES)
    wait_for_earlier_kernels(EARLY)
    x += after_waiting(0, EARLY)
    X = row_words(k, TERMS, EXTENT)
    x += first_token.to(tl.int64) * X
    roots = ()
    if COUNT > 0 and END == "split" and M <= 4:  # of more tokens they would take registers
        roots = (ordered_root(squares + tl.minimum(token_of_thread, M - 1) * COUNT, k, EPS, COUNT),)
    columns = ()  # of four tokens, where a thread's column of x begins, and the scale of its token
    for c in tl.static_range(TILES):
        last = 3 if 4 * c + 4 <= M else M - 4 * c - 1
        columns = columns + (tl.minimum(token_of_column, last) * X + (octet * TERMS + (0 if TERMS == 1 else column % 2)) * 2,
                             tl.minimum(token_of_thread, last) * X + 64 * TERMS)
    to_sums = 64 * TERMS + 32 + (octet * (4 - 2 * TERMS) + (2 * (column % 2) if TERMS == 1 else 0))  # from there to its words of sums
    acc = ()
    for _ in tl.static_range(4 * TILES):
        acc = acc + (tl.zeros((THREADS,), tl.float32),)
    EACH: tl.constexpr = 4 * loads_of(BITS)
    XW: tl.constexpr = 4 if TERMS == 3 else 2  # words of activations of a thread, group and four tokens
    PAIR: tl.constexpr = 1 if PARTS == 2 or loads_of(BITS) == 2 else 2  # groups whose quants are loaded together
    # Registers are left for what is read before its block: x of the first groups, and tails.
    EAGER: tl.constexpr = M <= 4 or END != "split" or loads_of(BITS) == 2
    coming = ()
    for g in tl.static_range(PAIR if EAGER else 0):
        coming = coming + _of_tiles(x + tl.minimum(begin, steps - 1) * XB, 4 * X, columns, g, even, TERMS, TILES)
    for i in tl.range(0, each):
        active = begin + i < end
        keep = active.to(tl.int32) + 0 * thread
        more = (begin + i + 1 < end).to(tl.int32) + 0 * thread
        step = tl.minimum(begin + i, steps - 1)
        at = words + tl.cast(step, tl.int64) * (WORDS * stride) + row
        halves_at = halves + tl.cast(step + 1, tl.int64) * (HALVES * halves_stride) + row
        by = ()  # words of scales of each row
        for r in tl.static_range(4):
            by = by + (row_scales(scales_now, halves_now[2 * HALVES - 2 :], r, SCALES),)
        minima = ()
        if MINIMUM:
            for r in tl.static_range(4):
                minima = minima + (row_minima(scales_now, octet, r, SCALES),)
        scales_now = ()
        if SCALES != "int8":
            scales_now = block_scales(at + WORDS * stride, octet, more, stride, BITS, SCALES)
        sums = ()
        for _ in tl.static_range(4 * TILES * TERMS):
            sums = sums + (tl.zeros((THREADS,), tl.int32),)
        x_at = x + step * XB
        x_next = x + tl.minimum(begin + i + 1, steps - 1) * XB
        tails = ()
        if EAGER:
            tails = _tails(x_at, 4 * X, columns, to_sums, MINIMUM, TILES)
        else:
            for g in tl.static_range(PAIR):
                coming = coming + _of_tiles(x_at, 4 * X, columns, g, even, TERMS, TILES)
        for g in tl.static_range(GROUPS):
            if g % PAIR == 0:
                values = coming
                coming = ()
                for f in tl.static_range(g + PAIR, g + 2 * PAIR if EAGER or g + PAIR < GROUPS else g + PAIR):
                    coming = coming + _of_tiles(x_at if f < GROUPS else x_next, 4 * X, columns, f if f < GROUPS else f - GROUPS, even,
                                                TERMS, TILES)
            added = ()
            for pair in tl.static_range(2):
                low0, high0 = group_operands(now[2 * pair], now[EACH - 4 + 2 * pair], octet, BITS, TABLE, MINIMUM)
                low1, high1 = group_operands(now[2 * pair + 1], now[EACH - 3 + 2 * pair], octet, BITS, TABLE, MINIMUM)
                for c in tl.static_range(TILES):
                    own = sums[(pair * TILES + c) * 2 * TERMS : (pair * TILES + c + 1) * 2 * TERMS]
                    b = values[(g % PAIR * TILES + c) * XW : (g % PAIR * TILES + c + 1) * XW]
                    for part in tl.static_range(PRODUCTS):
                        mine = b
                        if PARTS == 2:
                            mine = ()
                            for w in tl.static_range(XW):
                                mine = mine + (tl.where(octet // 2 == (half if HALVED else part), b[w], 0),)
                        own = _add_products(own, low0, high0, low1, high1, mine, group_scale(by[2 * pair], g, part, octet, SCALES, HALVED),
                                            group_scale(by[2 * pair + 1], g, part, octet, SCALES, HALVED), TERMS, SIGNED, THREADS)
                    added = added + own
            sums = added
            now = now[EACH:]
            if g % PAIR == PAIR - 1:
                no_load_earlier(thread)
                if SCALES == "int8" and g % 2 == 1:  # those of these groups, of the next block
                    scales_now = scales_now + four_if(at + (WORDS + 8 * BITS + g // 2) * stride, more)
                for f in tl.static_range(g + 1 - PAIR + AHEAD, g + 1 + AHEAD):
                    if f < GROUPS:
                        now = now + group_quants(at, octet, f, keep, stride, BITS)
                    else:
                        now = now + group_quants(at + WORDS * stride, octet, f - GROUPS, more, stride, BITS)
        if HALVED:
            whole = ()
            for i_sum in tl.static_range(4 * TERMS):
                whole = whole + (sum_of_pair(sums[i_sum], THREADS),)
            sums = whole
        if not EAGER:
            tails = _tails(x_at, 4 * X, columns, to_sums, MINIMUM, TILES)
        kept = ()
        for c in tl.static_range(TILES):
            scale = tails[2 * c]
            totals = ()
            if MINIMUM:
                b = tails[2 * c + 1]
                for pair in tl.static_range(2):
                    c0, c1, d0, d1 = small_product(minima[2 * pair], minima[2 * pair + 1], b[0], THREADS)
                    c2 = c0
                    c3 = c0
                    d2 = d0
                    d3 = d0
                    if TERMS > 1:
                        c2, c3, d2, d3 = small_product(minima[2 * pair], minima[2 * pair + 1], b[1], THREADS)
                    totals = totals + (_minima_total(c0, c1, c2, c3, TERMS), _minima_total(d0, d1, d2, d3, TERMS))
            if SIGNED and not LEVELS:
                scale *= 1.0 / (1 << (8 - BITS))
            for r in tl.static_range(4):
                value = _value(sums, ((r // 2 * TILES + c) * 2 + r % 2) * TERMS, TERMS)
                add = tl.fma(value, row_float(halves_now, r) * scale, acc[4 * c + r])
                if MINIMUM:
                    add = tl.fma(totals[r], -(row_float(halves_now[2:], r) * scale), add)
                kept = kept + (tl.where(active, add, acc[4 * c + r]),)
        acc = kept
        halves_now = block_halves(halves_at, more, halves_stride, HALVES)

    quad = tl.arange(0, ROWS)
    for c in tl.static_range(TILES):
        whole = tl.join(tl.join(acc[4 * c], acc[4 * c + 2]), tl.join(acc[4 * c + 1], acc[4 * c + 3]))
        if COUNT > 0 and END == "split":
            if M > 4:
                roots = (ordered_root(squares + tl.minimum(octet + 4 * c, M - 1) * COUNT, k, EPS, COUNT),)
            whole *= roots[0][:, None, None]
        whole = tl.sum(tl.reshape(whole, [SHARES, ROWS, 4]), 0)
        token = quad % 4 // 2 if HALVED else quad % 4 + 4 * c
        rows = (block * ROWS + quad // 4 * 4)[:, None] + tl.arange(0, 4)[None, :]
        stored = (token < M)[:, None] & (rows < n)
        if HALVED:
            stored = stored & (quad % 2 == 0)[:, None]
        tl.store(partials + (split * tokens + first_token + token).to(tl.int64)[:, None] * n + rows, whole, stored, cache_modifier=".cg")
    if END != "split":
        finish(partials, counters, out, squares, squares_out, n, k, splits, block, first_token, tokens, TERMS, END, ROWS,
               ROWS * SHARES // 32, COUNT, EPS, SQUARES, M, OUT)
