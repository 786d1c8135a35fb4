"""The GEMV of up to 8 tokens over blocks of 256 whose sums are integers, on int8 tensor cores.

Where a block of 256 activations has one scale, all of a block of the matrix is a sum of integers: of each byte of the activations, quants
times the group's scale; of the minima, each times the sum of its activations. It becomes a float once. So the order inside a block does not
matter, and a token has the same bits whatever the others are: blocks, warps and splits are added in one order.

A product is m16n8k32: 16 rows of the matrix, a group along K, 8 columns. The columns are 4 tokens by 2 bytes of their activations; of one
or two tokens they are tokens by places by bytes, and a place is one of 4 or 2 units that have a scale each (a group, or half of one). Each
unit of a round is multiplied with activations that are 0 in the columns of other places, onto one sum, so a thread scales one sum for all.

The kernel is written by threads: every tensor has one element for each, and what a thread has several of is a tuple. A warp has 32 rows.
Thread t of it loads octet t % 4 of rows 4 (t / 4) .. + 3, in loads of 16 bytes: the fragments of two products as they lie. The sums that it
gets are of the same four rows and of token, or place, t % 4, so it loads the scales of those rows, and no thread needs another's data until
the end of a block, where places are added up and each is left with rows of its own. Quants of a type without minima are taken as signed
numbers, at the top of their bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import after_waiting, wait_for_earlier_kernels, waits
from kiln.custom_ops.weights.fixed_point import extent_words, row_words
from kiln.custom_ops.weights.gemv_finish import finish, ordered_root
from kiln.custom_ops.weights.gemv_fragments import (
    block_halves,
    block_scales,
    fetch_quants,
    fetched_quants,
    fetches_end_here,
    four_if,
    group_operands,
    loads_of,
    own_scales,
    quants_ring,
    row_float,
    row_minima,
    row_scales,
    signed_levels,
    small_product,
    sum_of_pair,
    tile_product,
    tile_product_onto,
    two,
    unit_scale,
    wait_for_fetches,
)
from kiln.custom_ops.weights.gemv_kernels import warp_share


@triton.constexpr_function
def places_of(tokens: int) -> int:
    """Units that share a product: its 8 columns are tokens by places by two bytes of activations."""
    return 4 if tokens == 1 else 2 if tokens == 2 else 1


@triton.jit
def _is_there(step, end, thread):
    """A word for each thread, 0 past the end: what a load is given, see `four_if`."""
    return (step < end).to(tl.int32) + 0 * thread


@triton.jit
def _added_products(before, low0, high0, low1, high1, b, TERMS: tl.constexpr, FIRST: tl.constexpr, SIGNED: tl.constexpr,
                    THREADS: tl.constexpr):
    """The products of two rows with activations b and, but for the FIRST, those before them: TERMS of each row."""
    if FIRST:
        found = tile_product(low0, low1, high0, high1, b[0], b[1], THREADS, SIGNED)
        if TERMS == 3:
            found = found + tile_product(low0, low1, high0, high1, b[2], b[3], THREADS, SIGNED)
    else:
        found = tile_product_onto(low0, low1, high0, high1, b[0], b[1], before[0], before[1], before[2], before[3], THREADS, SIGNED)
        if TERMS == 3:
            found = found + tile_product_onto(low0, low1, high0, high1, b[2], b[3], before[4], before[5], before[6], before[7], THREADS,
                                              SIGNED)
    return found


@triton.jit
def _scaled(sums, products, scale0, scale1, TERMS: tl.constexpr):
    """The sums of two rows, TERMS each, and scales times products."""
    if TERMS == 1:
        return sums[0] + scale0 * products[0], sums[1] + scale1 * products[2]
    elif TERMS == 2:
        return (sums[0] + scale0 * products[0], sums[1] + scale0 * products[1], sums[2] + scale1 * products[2],
                sums[3] + scale1 * products[3])
    else:
        return (sums[0] + scale0 * products[0], sums[1] + scale0 * products[1], sums[2] + scale0 * products[4],
                sums[3] + scale1 * products[2], sums[4] + scale1 * products[3], sums[5] + scale1 * products[6])


@triton.jit
def _value(sums, at: tl.constexpr, TERMS: tl.constexpr):
    """A block's sums with each byte as one float32."""
    value = sums[at].to(tl.float32)
    for t in tl.static_range(1, TERMS):
        value = tl.fma(value, 256.0, sums[at + t].to(tl.float32))
    return value


@triton.jit
def _of_tiles(x, four_tokens, columns, g: tl.constexpr, even, TERMS: tl.constexpr, TILES: tl.constexpr):
    """Of each four tokens a thread's words of its column's group, `g` of a round's first: of one of two bytes, and of the third."""
    found = ()
    for c in tl.static_range(TILES):
        at = x + c * four_tokens + columns[c] + g * (8 * TERMS)
        b = two(at)
        if TERMS == 1:  # the second byte is 0
            found = found + (tl.where(even, b[0], 0), tl.where(even, b[1], 0))
        elif TERMS == 3:
            e = two(at + 4 - 2 * tl.where(even, 0, 1))
            found = found + (b[0], b[1], tl.where(even, e[0], 0), tl.where(even, e[1], 0))
        else:
            found = found + b
    return found


@triton.jit
def _tails(x, four_tokens, scales_at, sums_at, MINIMUM: tl.constexpr, TILES: tl.constexpr):
    """Of each four tokens the scale of a thread's token in a block, and its column's words of sums."""
    found = ()
    for c in tl.static_range(TILES):
        at = x + c * four_tokens
        found = found + (tl.load((at + scales_at[c]).to(tl.pointer_type(tl.float32))),)
        found = found + (two(at + sums_at[c]) if MINIMUM else (),)
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


@triton.jit
def _own_rows(values, place, EACH: tl.constexpr, PLACES: tl.constexpr):
    """Of EACH values of four rows those of the rows 4 / PLACES * place .. that a thread ends with."""
    own = values
    if PLACES > 1:
        own = ()
        for v in tl.static_range(2 * EACH):
            own = own + (tl.where(place // (PLACES // 2) == 1, values[2 * EACH + v], values[v]),)
    if PLACES == 4:
        pair = own
        own = ()
        for v in tl.static_range(EACH):
            own = own + (tl.where(place % 2 == 1, pair[EACH + v], pair[v]),)
    return own


@triton.jit
def _sums_of_own_rows(sums, place, TERMS: tl.constexpr, PLACES: tl.constexpr, THREADS: tl.constexpr):
    """The sums over all places, of a thread's own rows, see `_own_rows`: each sends what the others' are."""
    own = sums
    if PLACES > 1:
        own = ()
        for v in tl.static_range(2 * TERMS):
            own = own + (sum_of_pair(sums[v], sums[2 * TERMS + v], place // (PLACES // 2) == 1, PLACES // 2, THREADS),)
    if PLACES == 4:
        pair = own
        own = ()
        for v in tl.static_range(TERMS):
            own = own + (sum_of_pair(pair[v], pair[TERMS + v], place % 2 == 1, 1, THREADS),)
    return own


@waits("words", "halves")
@triton.jit
def kiln_gemv_sums(x, words, halves, partials, counters, out, squares, squares_out, n, k, splits, stride: tl.constexpr,
                   halves_stride: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, WORDS: tl.constexpr,
                   HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr,
                   EXTENT: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr,
                   SHARES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, REGISTERS: tl.constexpr, COUNT: tl.constexpr,
                   PAD: tl.constexpr, EPS: tl.constexpr, SQUARES: tl.constexpr, M: tl.constexpr):
    """`kiln_gemv` of T tokens, M of them a program, 8 at most. Grid (row blocks, splits, T / M).

    As there but for: x of extent 256; n and where a row of words or of halves lies are multiples of 4; ROWS is a multiple of 32, a warp has
    32 of them and one of SHARES shares of the program's part of K; RING: groups of 32 whose quants are under way, a multiple of 8.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    first_token = tl.program_id(2) * M
    tokens = tl.num_programs(2) * M
    THREADS: tl.constexpr = ROWS * SHARES
    TILES: tl.constexpr = (M + 3) // 4  # columns of a product are of four tokens
    PLACES: tl.constexpr = places_of(M)
    R: tl.constexpr = 4 // PLACES  # rows that a thread ends with
    PARTS: tl.constexpr = 2 if SCALES == "int8" or SCALES == "six" or SCALES == "four" else 1
    ROUND: tl.constexpr = PLACES // PARTS if PLACES > PARTS else 1  # groups whose products are one sum
    PRODUCTS: tl.constexpr = 1 if PLACES >= PARTS else PARTS  # halves apart: each takes the octets of the other half as 0
    SIGNED: tl.constexpr = not MINIMUM
    TABLE: tl.constexpr = signed_levels(LEVELS, ZERO)
    XB: tl.constexpr = extent_words(TERMS, EXTENT)
    thread = tl.arange(0, THREADS)
    octet = thread % 4
    column = thread % 32 // 4
    even = column % 2 == 0
    place = octet % PLACES  # of a thread's sums
    column_place = column // 2 % PLACES
    row = block * ROWS + thread % ROWS // 4 * 4
    if not EVEN:
        row = tl.minimum(row, n - 4)  # of rows past the end others are computed, and not stored
    half_rows = row if SCALES == "split" else row + place * R  # those of `split` have bits of scales of four rows
    steps = k // 256
    each = tl.cdiv(steps, splits * SHARES)
    begin = split * (SHARES * each)
    if SHARES > 1:
        begin += warp_share(thread, 32) // (ROWS // 32) * each
    end = tl.minimum(begin + each, steps)
    H: tl.constexpr = 4 if SCALES == "split" else R
    HALF_WORDS: tl.constexpr = 2 if H == 4 else 1
    at = words + tl.cast(begin, tl.int64) * (WORDS * stride) + row  # of a scalar and a small offset: fewer registers stay in use
    halves_at = halves + tl.cast(begin, tl.int64) * (HALVES * halves_stride) + half_rows
    FETCHED: tl.constexpr = 4 // loads_of(BITS)  # groups whose quants are fetched together
    PAIR: tl.constexpr = 1 if PARTS == 2 or loads_of(BITS) == 2 else 2  # groups whose activations are read together, at least
    BLOCK_BYTES: tl.constexpr = 8 * 512 * loads_of(BITS)  # of a warp's ring
    ring = quants_ring(thread, RING, BITS, THREADS)
    for d in tl.static_range(RING // 8):
        for g in tl.static_range(8):
            fetch_quants(ring, at + d * (WORDS * stride), octet, d * BLOCK_BYTES, g, _is_there(begin + d, end, thread), stride, BITS)
            if g % FETCHED == FETCHED - 1:
                fetches_end_here(thread)
    scales = block_scales(at, octet, _is_there(begin, end, thread), stride, BITS, SCALES)
    factors = block_halves(halves_at, _is_there(begin, end, thread), halves_stride, HALVES, H)
    wait_for_earlier_kernels(EARLY)
    x += after_waiting(0, EARLY)
    X = row_words(k, TERMS, EXTENT)
    x += first_token.to(tl.int64) * X
    roots = ()
    if COUNT > 0 and END == "split" and M <= 4:  # of more tokens they would take registers
        roots = (ordered_root(squares + tl.minimum(octet // PLACES, M - 1) * COUNT, k, EPS, COUNT),)
    columns = ()  # of four tokens, from a row's block on: where a thread's words of its column lie, its token's scale, its words of sums
    scales_at = ()
    sums_at = ()
    for c in tl.static_range(TILES):
        most = 3 if 4 * c + 4 <= M else M - 4 * c - 1
        own_token = tl.minimum(column // 2 // PLACES, most) * X
        columns = columns + (own_token + (octet * TERMS + (0 if TERMS == 1 else column % 2)) * 2 + column_place // PARTS * (8 * TERMS),)
        scales_at = scales_at + (tl.minimum(octet // PLACES, most) * X + 64 * TERMS,)
        sums_at = sums_at + (own_token + 64 * TERMS + 32 + octet * 4 + 2 * (column % 2),)
    acc = ()
    for _ in tl.static_range(R * TILES):
        acc = acc + (tl.zeros((THREADS,), tl.float32),)
    EACH: tl.constexpr = 4 * loads_of(BITS)  # words of a group's quants
    XW: tl.constexpr = 4 if TERMS == 3 else 2  # words of activations of a thread, group and four tokens
    PW: tl.constexpr = 8 if TERMS == 3 else 4  # of a product
    READ: tl.constexpr = ROUND if ROUND > PAIR else PAIR
    # Registers are left for what is read before its block: x of the first groups, and tails.
    EAGER: tl.constexpr = M <= 4
    coming = ()
    for g in tl.static_range(0, READ if EAGER else 0, ROUND):
        coming = coming + _of_tiles(x + tl.minimum(begin, steps - 1) * XB, 4 * X, columns, g, even, TERMS, TILES)
    for i in tl.range(0, each):
        active = begin + i < end
        step = tl.minimum(begin + i, steps - 1)
        at = words + tl.cast(step, tl.int64) * (WORDS * stride) + row
        halves_at = halves + tl.cast(step + 1, tl.int64) * (HALVES * halves_stride) + half_rows
        more = _is_there(begin + i + 1, end, thread)
        slot = i % (RING // 8) * BLOCK_BYTES
        last = _is_there(begin + i + RING // 8, end, thread)
        by = ()  # words of scales of each row
        for r in tl.static_range(4):
            by = by + (own_scales(row_scales(scales, factors[HALF_WORDS * (HALVES - 1) :], r, SCALES), place, SCALES, PARTS, PLACES),)
        minima = ()
        if MINIMUM:
            for r in tl.static_range(4):
                minima = minima + (row_minima(scales, octet, r, SCALES),)
        scales = ()
        if SCALES != "int8":
            scales = block_scales(at + WORDS * stride, octet, more, stride, BITS, SCALES)
        sums = ()
        for _ in tl.static_range(4 * TILES * TERMS):
            sums = sums + (tl.zeros((THREADS,), tl.int32),)
        x_at = x + step * XB
        x_next = x + tl.minimum(begin + i + 1, steps - 1) * XB
        tails = ()
        if EAGER:
            tails = _tails(x_at, 4 * X, scales_at, sums_at, MINIMUM, TILES)
        else:
            for g in tl.static_range(0, READ, ROUND):
                coming = coming + _of_tiles(x_at, 4 * X, columns, g, even, TERMS, TILES)
        for g in tl.static_range(8):
            if g % READ == 0:
                values = coming
                coming = ()
                for f in tl.static_range(g + READ, g + 2 * READ if EAGER or g + READ < 8 else g + READ, ROUND):
                    coming = coming + _of_tiles(x_at if f < 8 else x_next, 4 * X, columns, f % 8, even, TERMS, TILES)
            if g % ROUND == 0:
                products = ()
            if g % FETCHED == 0:
                wait_for_fetches(thread, RING // FETCHED - 1)
            now = fetched_quants(ring, at, octet, slot, g, stride, BITS)
            added = ()
            for pair in tl.static_range(2):
                low0, high0 = group_operands(now[2 * pair], now[EACH - 4 + 2 * pair], octet, BITS, TABLE, MINIMUM)
                low1, high1 = group_operands(now[2 * pair + 1], now[EACH - 3 + 2 * pair], octet, BITS, TABLE, MINIMUM)
                for c in tl.static_range(TILES):
                    b = values[(g % READ // ROUND * TILES + c) * XW : (g % READ // ROUND * TILES + c + 1) * XW]
                    for part in tl.static_range(PRODUCTS):
                        mine = b
                        if PLACES > 1 or PARTS == 2:  # what is of another unit is 0
                            taken = column_place // PARTS == g % ROUND
                            if PARTS == 2:
                                taken = taken & (octet // 2 == (column_place % 2 if PLACES > 1 else part))
                            mine = ()
                            for w in tl.static_range(XW):
                                mine = mine + (tl.where(taken, b[w], 0),)
                        before = products[((pair * TILES + c) * PRODUCTS + part) * PW :]  # of none at the first of a round
                        added = added + _added_products(before, low0, high0, low1, high1, mine, TERMS, g % ROUND == 0, SIGNED, THREADS)
            products = added
            if g % ROUND == ROUND - 1:
                added = ()
                for pair in tl.static_range(2):
                    for c in tl.static_range(TILES):
                        own = sums[(pair * TILES + c) * 2 * TERMS : (pair * TILES + c + 1) * 2 * TERMS]
                        for part in tl.static_range(PRODUCTS):
                            own = _scaled(own, products[((pair * TILES + c) * PRODUCTS + part) * PW :],
                                          unit_scale(by[2 * pair], g // ROUND, part, SCALES, PARTS, PLACES),
                                          unit_scale(by[2 * pair + 1], g // ROUND, part, SCALES, PARTS, PLACES), TERMS)
                        added = added + own
                sums = added
            if g % FETCHED == FETCHED - 1:
                ahead_at = words + tl.cast(step + RING // 8, tl.int64) * (WORDS * stride) + row
                for f in tl.static_range(g + 1 - FETCHED, g + 1):
                    fetch_quants(ring, ahead_at, octet, slot, f, last, stride, BITS)
                fetches_end_here(thread)
            if SCALES == "int8" and g % 2 == 1:  # those of these groups, of the next block
                scales = scales + four_if(at + (WORDS + 8 * BITS + g // 2) * stride, more)
        sums = _sums_of_own_rows(sums, place, TERMS, PLACES, THREADS)
        if not EAGER:
            tails = _tails(x_at, 4 * X, scales_at, sums_at, MINIMUM, TILES)
        kept = ()
        for c in tl.static_range(TILES):
            scale = tails[2 * c]
            bytes = ()
            if MINIMUM:
                b = tails[2 * c + 1]
                for pair in tl.static_range(2):
                    c0, c1, d0, d1 = small_product(minima[2 * pair], minima[2 * pair + 1], b[0], THREADS)
                    if TERMS > 1:
                        c2, c3, d2, d3 = small_product(minima[2 * pair], minima[2 * pair + 1], b[1], THREADS)
                        bytes = bytes + (c0, c1, c2, c3, d0, d1, d2, d3)
                    else:
                        bytes = bytes + (c0, c1, c0, c1, d0, d1, d0, d1)
                bytes = _own_rows(bytes, place, 4, PLACES)
            if SIGNED and not LEVELS:
                scale *= 1.0 / (1 << (8 - BITS))
            for r in tl.static_range(R):
                value = _value(sums, ((r // 2 * TILES + c) * 2 + r % 2) * TERMS, TERMS)
                add = tl.fma(value, row_float(factors, r, place, H, R) * scale, acc[R * c + r])
                if MINIMUM:
                    total = _minima_total(bytes[4 * r], bytes[4 * r + 1], bytes[4 * r + 2], bytes[4 * r + 3], TERMS)
                    add = tl.fma(total, -(row_float(factors[HALF_WORDS:], r, place, H, R) * scale), add)
                kept = kept + (tl.where(active, add, acc[R * c + r]),)
        acc = kept
        factors = block_halves(halves_at, more, halves_stride, HALVES, H)

    quad = tl.arange(0, ROWS)
    for c in tl.static_range(TILES):
        if R == 4:
            whole = tl.join(tl.join(acc[4 * c], acc[4 * c + 2]), tl.join(acc[4 * c + 1], acc[4 * c + 3]))
        elif R == 2:
            whole = tl.join(acc[0], acc[1])
        else:
            whole = acc[0]
        whole = tl.reshape(whole, [THREADS, R])
        if COUNT > 0 and END == "split":
            if M > 4:
                roots = (ordered_root(squares + tl.minimum(octet + 4 * c, M - 1) * COUNT, k, EPS, COUNT),)
            whole *= roots[0][:, None]
        whole = tl.sum(tl.reshape(whole, [SHARES, ROWS, R]), 0)
        token = quad % 4 // PLACES + 4 * c
        rows = (block * ROWS + quad // 4 * 4 + quad % PLACES * R)[:, None] + tl.arange(0, R)[None, :]
        stored = (token < M)[:, None] & (rows < n)
        tl.store(partials + (split * tokens + first_token + token).to(tl.int64)[:, None] * n + rows, whole, stored, cache_modifier=".cg")
    if END != "split":
        finish(partials, counters, out, squares, squares_out, n, k, splits, block, first_token, tokens, TERMS, END, ROWS,
               ROWS * SHARES // 32, COUNT, EPS, SQUARES, M, OUT)
