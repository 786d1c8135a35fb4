"""Kernels of the gated delta rule: one token; many tokens in four launches (heads, blocks, states, outputs).

All loads of a state are of the slot that a step does not write, or lie in a launch before the one that writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLOTS = tl.constexpr(2)  # rule.STATE_SLOTS


@triton.jit
def _channel(u_ptr, conv_ptr, past_ptr, channel, first, C: tl.constexpr, TAPS: tl.constexpr):
    """The convolution's output at one token for some channels, behind its SiLU. past: the inputs before it; u: its own."""
    total = tl.load(u_ptr + channel).to(tl.float32) * tl.load(conv_ptr + channel * TAPS + TAPS - 1)
    for j in tl.static_range(TAPS - 1):
        total += tl.load(past_ptr + j * C + channel, mask=(channel >= 0) & (first == 0), other=0.0) * tl.load(conv_ptr + channel * TAPS + j)
    return total / (1 + tl.exp(-total))


@triton.jit
def _shift(u_ptr, past_ptr, next_ptr, channel, first, C: tl.constexpr, TAPS: tl.constexpr):
    """The inputs that the next token's convolution needs. Programs that share channels write the same."""
    for j in tl.static_range(TAPS - 2):
        kept = tl.load(past_ptr + (j + 1) * C + channel, mask=(channel >= 0) & (first == 0), other=0.0)
        tl.store(next_ptr + j * C + channel, kept)
    tl.store(next_ptr + (TAPS - 2) * C + channel, tl.load(u_ptr + channel).to(tl.float32))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def kiln_delta_step(u_ptr, alpha_ptr, beta_ptr, conv_ptr, a_ptr, bias_ptr, conv_state_ptr, delta_state_ptr, pos_ptr, out_ptr,
                    EPS: tl.constexpr, KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                    TAPS: tl.constexpr, BV: tl.constexpr):
    """One token. Grid (VALUE_HEADS, DV / BV): a program has BV columns of a head's state, read once and written once."""
    head, column = tl.program_id(0), tl.program_id(1) * BV + tl.arange(0, BV)
    C: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    pos = tl.load(pos_ptr)
    first = (pos == 0).to(tl.int32)
    past = conv_state_ptr + (pos % SLOTS) * ((TAPS - 1) * C)
    following = conv_state_ptr + ((pos + 1) % SLOTS) * ((TAPS - 1) * C)
    row = tl.arange(0, DK)
    size: tl.constexpr = VALUE_HEADS * DK * DV
    cell = head * (DK * DV) + row[:, None] * DV + column[None, :]
    held = (row[:, None] >= 0) & (column[None, :] >= 0) & (first == 0)
    state = tl.load(delta_state_ptr + (pos % SLOTS) * size + cell, mask=held, other=0.0)
    q_channel = (head % KEY_HEADS) * DK + row
    k_channel = q_channel + KEY_HEADS * DK
    v_channel = 2 * KEY_HEADS * DK + head * DV + column
    q = _channel(u_ptr, conv_ptr, past, q_channel, first, C, TAPS)
    k = _channel(u_ptr, conv_ptr, past, k_channel, first, C, TAPS)
    v = _channel(u_ptr, conv_ptr, past, v_channel, first, C, TAPS)
    _shift(u_ptr, past, following, q_channel, first, C, TAPS)
    _shift(u_ptr, past, following, k_channel, first, C, TAPS)
    _shift(u_ptr, past, following, v_channel, first, C, TAPS)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * (DK**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    g = tl.load(a_ptr + head) * softplus(tl.load(alpha_ptr + head).to(tl.float32) + tl.load(bias_ptr + head))
    b = 1 / (1 + tl.exp(-tl.load(beta_ptr + head).to(tl.float32)))
    state *= tl.exp(g)
    change = b * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * change[None, :]
    tl.store(delta_state_ptr + ((pos + 1) % SLOTS) * size + cell, state)
    tl.store(out_ptr + head * DV + column, tl.sum(state * q[:, None], 0))


@triton.jit
def kiln_delta_heads(u_ptr, conv_ptr, conv_state_ptr, pos_ptr, q_ptr, k_ptr, v_ptr, kept_ptr, tokens, EPS: tl.constexpr,
                     KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TAPS: tl.constexpr,
                     WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Convolution, SiLU and norms. Grid (tiles of ROWS tokens, 2 KEY_HEADS + VALUE_HEADS): heads of q, then of k, then of v.

    WIDE is the larger of DK and DV.
    q, k [T, KEY_HEADS, DK], v [T, VALUE_HEADS, DV] float32; kept [TAPS - 1, C] float32: the last inputs, for the state.
    """
    token, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    C: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    pos = tl.load(pos_ptr)
    past = conv_state_ptr + (pos % SLOTS) * ((TAPS - 1) * C)
    dim = tl.arange(0, WIDE)
    is_value = head >= 2 * KEY_HEADS
    size = tl.where(is_value, DV, DK)
    channel = tl.where(is_value, 2 * KEY_HEADS * DK + (head - 2 * KEY_HEADS) * DV, head * DK) + dim
    whole = (token[:, None] < tokens) & (dim[None, :] < size)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for j in tl.static_range(TAPS):
        at = token - (TAPS - 1) + j
        x = tl.load(u_ptr + at[:, None].to(tl.int64) * C + channel[None, :], mask=whole & (at[:, None] >= 0), other=0.0).to(tl.float32)
        early = whole & (at[:, None] < 0) & (pos > 0)
        x += tl.load(past + (at[:, None] + TAPS - 1) * C + channel[None, :], mask=early, other=0.0)
        total += x * tl.load(conv_ptr + channel * TAPS + j, mask=dim < size, other=0.0)[None, :]
        if j > 0:  # the inputs of the last TAPS - 1 positions, by the program that has the last token
            tail = (token[:, None] == tokens - 1) & (dim[None, :] < size)
            tl.store(kept_ptr + (j - 1) * C + channel[None, :] + token[:, None] * 0, x, mask=tail)
    c = total / (1 + tl.exp(-total))
    if is_value:
        value_at = token[:, None].to(tl.int64) * (VALUE_HEADS * DV) + (head - 2 * KEY_HEADS) * DV + dim[None, :]
        tl.store(v_ptr + value_at, c, mask=whole)
    else:
        norm = tl.rsqrt(tl.sum(tl.where(whole, c * c, 0.0), 1) + EPS)[:, None]
        key_at = token[:, None].to(tl.int64) * (KEY_HEADS * DK) + (head % KEY_HEADS) * DK + dim[None, :]
        tl.store(q_ptr + key_at, c * norm * (DK**-0.5), mask=whole & (head < KEY_HEADS))
        tl.store(k_ptr + key_at, c * norm, mask=whole & (head >= KEY_HEADS))


@triton.jit
def kiln_delta_blocks(q_ptr, k_ptr, v_ptr, alpha_ptr, beta_ptr, a_ptr, bias_ptr, given_ptr, seen_ptr, mixed_ptr, total_ptr, tokens,
                      KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
                      PIECE: tl.constexpr, PRECISION: tl.constexpr):
    """What of a block does not depend on the state before it. Grid (blocks, VALUE_HEADS).

    given [n, V, BLOCK, DV] is U, seen [.., DK] is W, mixed [.., BLOCK] is q k^T with decays, total [n, V, BLOCK] is G (see chunk.py).
    """
    n, head = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    token = n * BLOCK + i
    held = token < tokens
    dim = tl.arange(0, PIECE)
    key_at = token[:, None].to(tl.int64) * (KEY_HEADS * DK) + (head % KEY_HEADS) * DK + dim[None, :]
    alpha = tl.load(alpha_ptr + token.to(tl.int64) * VALUE_HEADS + head, mask=held, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + token.to(tl.int64) * VALUE_HEADS + head, mask=held, other=0.0).to(tl.float32)
    g = tl.where(held, tl.load(a_ptr + head) * softplus(alpha + tl.load(bias_ptr + head)), 0.0)
    b = tl.where(held, 1 / (1 + tl.exp(-beta)), 0.0)
    total = tl.cumsum(g, 0)
    decay = tl.where(i[:, None] >= j[None, :], tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0)), 0.0)
    at = n * VALUE_HEADS + head
    tl.store(total_ptr + at * BLOCK + i, total)
    square = at.to(tl.int64) * (BLOCK * BLOCK) + i[:, None] * BLOCK + j[None, :]
    mixed = tl.zeros((BLOCK, BLOCK), tl.float32)
    for piece in range(0, DK, PIECE):
        q = tl.load(q_ptr + key_at + piece, mask=held[:, None], other=0.0)
        k = tl.load(k_ptr + key_at + piece, mask=held[:, None], other=0.0)
        mixed = tl.dot(q, tl.trans(k), mixed, input_precision=PRECISION)
    tl.store(mixed_ptr + square, mixed * decay)
    lower = tl.zeros((BLOCK, BLOCK), tl.float32)
    for piece in range(0, DK, PIECE):
        k = tl.load(k_ptr + key_at + piece, mask=held[:, None], other=0.0)
        lower = tl.dot(k, tl.trans(k), lower, input_precision=PRECISION)
    lower = tl.where(i[:, None] > j[None, :], lower * decay * b[:, None], 0.0)
    solved = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
    size = 1
    while size < BLOCK:  # by halves, see chunk.inverse
        below = (i[:, None] // size % 2 == 1) & (i[:, None] // size == j[None, :] // size + 1)
        part = tl.dot(tl.where(below, lower, 0.0), solved, input_precision=PRECISION)
        solved -= tl.dot(solved, part, input_precision=PRECISION)
        size *= 2
    value_at = token[:, None].to(tl.int64) * (VALUE_HEADS * DV) + head * DV + dim[None, :]
    for piece in range(0, DV, PIECE):
        v = tl.load(v_ptr + value_at + piece, mask=held[:, None], other=0.0)
        given = tl.dot(solved, v * b[:, None], input_precision=PRECISION)
        tl.store(given_ptr + at.to(tl.int64) * (BLOCK * DV) + i[:, None] * DV + dim[None, :] + piece, given)
    for piece in range(0, DK, PIECE):
        k = tl.load(k_ptr + key_at + piece, mask=held[:, None], other=0.0)
        seen = tl.dot(solved, k * (b * tl.exp(total))[:, None], input_precision=PRECISION)
        tl.store(seen_ptr + at.to(tl.int64) * (BLOCK * DK) + i[:, None] * DK + dim[None, :] + piece, seen)


@triton.jit
def kiln_delta_states(k_ptr, given_ptr, seen_ptr, total_ptr, kept_ptr, states_ptr, conv_state_ptr, delta_state_ptr, pos_ptr, tokens,
                      KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TAPS: tl.constexpr,
                      BLOCK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """The state from block to block, in registers. Grid (VALUE_HEADS, DV / BV).

    states [n, V, DK, DV] float32: those before the blocks; given becomes U - W S. Rows of the state are in two halves, for a product of
    three terms takes that many registers.
    """
    head, column = tl.program_id(0), tl.program_id(1) * BV + tl.arange(0, BV)
    C: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    H: tl.constexpr = DK // 2
    half, i = tl.arange(0, H), tl.arange(0, BLOCK)
    pos = tl.load(pos_ptr)
    end = pos + tokens
    size: tl.constexpr = VALUE_HEADS * DK * DV
    cell = half[:, None] * DV + column[None, :]
    own = delta_state_ptr + head * (DK * DV)
    held = (cell >= 0) & (pos > 0)
    state0 = tl.load(own + (pos % SLOTS) * size + cell, mask=held, other=0.0)
    state1 = tl.load(own + (pos % SLOTS) * size + H * DV + cell, mask=held, other=0.0)
    for n in tl.range(0, tl.cdiv(tokens, BLOCK), num_stages=1):
        inside = (i < tokens - n * BLOCK)[:, None]
        at = (n * VALUE_HEADS + head).to(tl.int64)
        key_at = i[:, None] * (KEY_HEADS * DK) + half[None, :]
        k_from = k_ptr + at // VALUE_HEADS * (BLOCK * KEY_HEADS * DK) + (head % KEY_HEADS) * DK
        seen_from, seen_at = seen_ptr + at * (BLOCK * DK), i[:, None] * DK + half[None, :]
        given_from, given_at = given_ptr + at * (BLOCK * DV), i[:, None] * DV + column[None, :]
        tl.store(states_ptr + at * (DK * DV) + cell, state0)
        tl.store(states_ptr + at * (DK * DV) + H * DV + cell, state1)
        total = tl.load(total_ptr + at * BLOCK + i)
        last = tl.load(total_ptr + at * BLOCK + BLOCK - 1)
        change = tl.load(given_from + given_at)
        change -= tl.dot(tl.load(seen_from + seen_at), state0, input_precision=PRECISION)
        change -= tl.dot(tl.load(seen_from + H + seen_at), state1, input_precision=PRECISION)
        tl.store(given_from + given_at, change)
        change *= tl.exp(last - total)[:, None]
        kept = tl.exp(last)
        k = tl.load(k_from + key_at, mask=inside, other=0.0)
        state0 = tl.dot(tl.trans(k), change, state0 * kept, input_precision=PRECISION)
        k = tl.load(k_from + H + key_at, mask=inside, other=0.0)
        state1 = tl.dot(tl.trans(k), change, state1 * kept, input_precision=PRECISION)
    tl.store(own + (end % SLOTS) * size + cell, state0)
    tl.store(own + (end % SLOTS) * size + H * DV + cell, state1)
    dk = tl.arange(0, DK)
    following = conv_state_ptr + (end % SLOTS) * ((TAPS - 1) * C)
    v_channel = 2 * KEY_HEADS * DK + head * DV + column
    for j in tl.static_range(TAPS - 1):  # programs that share a key head write the same
        for part in tl.static_range(2):
            channel = part * (KEY_HEADS * DK) + (head % KEY_HEADS) * DK + dk
            tl.store(following + j * C + channel, tl.load(kept_ptr + j * C + channel))
        tl.store(following + j * C + v_channel, tl.load(kept_ptr + j * C + v_channel))


@triton.jit
def kiln_delta_outputs(q_ptr, change_ptr, mixed_ptr, total_ptr, states_ptr, out_ptr, tokens, KEY_HEADS: tl.constexpr,
                       VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, BV: tl.constexpr,
                       PIECE: tl.constexpr, PRECISION: tl.constexpr):
    """What the queries read: of the state before their block, and of its changes within. Grid (blocks, VALUE_HEADS, DV / BV)."""
    n, head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV + tl.arange(0, BV)
    i, dim = tl.arange(0, BLOCK), tl.arange(0, PIECE)
    inside = (i < tokens - n * BLOCK)[:, None]
    at, begin = (n * VALUE_HEADS + head).to(tl.int64), (n * BLOCK).to(tl.int64)
    q_from = q_ptr + begin * (KEY_HEADS * DK) + (head % KEY_HEADS) * DK
    out = tl.zeros((BLOCK, BV), tl.float32)
    for piece in tl.range(0, DK, PIECE, num_stages=1):
        q = tl.load(q_from + i[:, None] * (KEY_HEADS * DK) + dim[None, :] + piece, mask=inside, other=0.0)
        state = tl.load(states_ptr + at * (DK * DV) + (dim + piece)[:, None] * DV + column[None, :])
        out = tl.dot(q, state, out, input_precision=PRECISION)
    out *= tl.exp(tl.load(total_ptr + at * BLOCK + i))[:, None]
    for piece in tl.range(0, BLOCK, PIECE, num_stages=1):
        mixed = tl.load(mixed_ptr + at * (BLOCK * BLOCK) + i[:, None] * BLOCK + dim[None, :] + piece)
        change = tl.load(change_ptr + at * (BLOCK * DV) + (dim + piece)[:, None] * DV + column[None, :])
        out = tl.dot(mixed, change, out, input_precision=PRECISION)
    out_from = out_ptr + begin * (VALUE_HEADS * DV) + head * DV
    tl.store(out_from + i[:, None] * (VALUE_HEADS * DV) + column[None, :], out, mask=inside)
