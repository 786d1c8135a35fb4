"""Triton kernels of `sample`: four launches, whatever the settings; where the temperature is 0 the two in the middle return at once.

kiln_row_maxima   the most probable token of every chunk of the vocabulary
kiln_weigh_bins   number and mass of the tokens in each of BINS steps below the maximum
kiln_settle_bins  which steps are inside both limits: their best score is taken; which are cut by one: their tokens are listed
kiln_choose       the exact cut among the listed tokens, four bits of it at a time, and the winner

MANY: there are several rows, the second dimension of every grid; each has its own settings, position and scratch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_HEAT = tl.constexpr(1e-5)  # the reciprocal of a much lower temperature is infinite, and of the best token's no number


@triton.jit
def _ordered(value):
    """float32 -> int64 in -2^31 .. 2^31 - 1 in the same order, -0 equal to 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _unordered(key):
    """The inverse of `_ordered`."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _ranked(value, token):
    """int64 whose maximum over tokens belongs to the greatest value, of equals to the lowest id."""
    return (_ordered(value) << 32) | (0x7FFFFFFF - token)


@triton.jit
def _token(ranked):
    return 0x7FFFFFFF - (ranked & 0x7FFFFFFF)


@triton.jit
def _hash32(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _score(value, maximum, rate, token, seed, pos):
    """Log-probability up to a constant, plus Gumbel noise."""
    key = _hash32(seed.to(tl.uint32) ^ 0x1E3779B9)
    key = _hash32(key ^ (seed >> 32).to(tl.uint32))
    key = _hash32(key ^ pos.to(tl.uint32))
    bits = _hash32(_hash32(token.to(tl.uint32) ^ key) ^ key)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 2.0**-23
    return (value - maximum) * rate - tl.log(-tl.log(uniform))


@triton.jit
def _mass(value, maximum, rate):
    return (tl.exp((value - maximum) * rate) * 2.0**40).to(tl.int64)


@triton.jit
def _bin(value, maximum, rate, BINS: tl.constexpr):
    """Which of BINS equal steps below the maximum, down to where mass is 0; beyond it, BINS."""
    depth = (maximum - value) * rate
    return tl.where(depth < 27.75, depth * (BINS / 27.75), BINS).to(tl.int32)


@triton.jit
def _maximum(best, chunks, CHUNKS: tl.constexpr):
    """The greatest of the ranked values best[0 .. chunks]."""
    i = tl.arange(0, CHUNKS)
    return tl.max(tl.load(best + i, i < chunks, other=-0x7FFFFFFFFFFFFFFF))


@triton.jit
def _limits(top_k, top_p, vocab):
    """(k, p): k = vocab where top-k is off, p = 1 where top-p is off."""
    k = tl.load(top_k)
    return tl.where((k <= 0) | (k > vocab), vocab, k), tl.minimum(tl.load(top_p), 1.0)


@triton.jit
def _target(p, mass):
    return tl.maximum((p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _settle(counts, masses, k, p, vocab, BINS: tl.constexpr):
    """From the bins: steps below `sure` are inside both limits, steps sure .. last have to be looked at, the others are outside.

    Also whether top-k cuts within the bins at all, and the count and the mass of the steps below `sure`, and all mass.
    """
    j = tl.arange(0, BINS)
    count = tl.load(counts + j)
    mass = tl.load(masses + j)
    count_before = tl.cumsum(count) - count
    mass_before = tl.cumsum(mass) - mass
    cut_k = (k < vocab) & (tl.sum(count) > k)
    step_k = tl.sum((count_before < k).to(tl.int32)) - 1  # that of the k-th token
    mass_k = tl.where(cut_k, tl.sum(tl.where(j == step_k, mass_before, 0)), tl.sum(mass))  # at most the mass inside top-k
    step_p = tl.sum((mass_before < _target(p, mass_k)).to(tl.int32)) - 1
    sure = tl.minimum(tl.where(cut_k, step_k, BINS + 1), tl.where(p < 1, step_p, BINS + 1))
    last = tl.where(cut_k, step_k, tl.where(p < 1, step_p, -1))
    below = j < sure
    return sure, last, cut_k, tl.sum(tl.where(below, count, 0)), tl.sum(tl.where(below, mass, 0)), tl.sum(mass)


@triton.jit
def kiln_row_maxima(logits, best, counts, masses, listed, vocab, BINS: tl.constexpr, CHUNK: tl.constexpr, MANY: tl.constexpr):
    """best[chunk] = the ranked maximum; the sums of the next kernels to 0."""
    if MANY:
        row = tl.program_id(1)
        logits += row * vocab
        best += row * tl.num_programs(0)
        counts += row * BINS
        masses += row * BINS
        listed += row
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + token, token < vocab, other=float("-inf"))
    value = tl.where(value == value, value, float("inf"))  # a NaN may be of either sign: no token is chosen for one as for +inf
    tl.store(best + tl.program_id(0), tl.max(_ranked(value, token)))
    if tl.program_id(0) == 0:
        j = tl.arange(0, BINS)
        tl.store(counts + j, tl.zeros((BINS,), tl.int32))
        tl.store(masses + j, tl.zeros((BINS,), tl.int64))
        tl.store(listed, 0)


@triton.jit
def kiln_weigh_bins(logits, best, temperature, top_k, top_p, counts, masses, vocab, chunks, BINS: tl.constexpr, CHUNK: tl.constexpr,
               CHUNKS: tl.constexpr, MANY: tl.constexpr):
    """counts[bin], masses[bin] of the whole vocabulary. Integer sums: the order of the programs does not matter."""
    if MANY:
        row = tl.program_id(1)
        logits += row * vocab
        best += row * chunks
        counts += row * BINS
        masses += row * BINS
        temperature += row
        top_k += row
        top_p += row
    k, p = _limits(top_k, top_p, vocab)
    heat = tl.load(temperature)
    if (heat > 0) & ((k < vocab) | (p < 1)):
        rate = tl.div_rn(1.0, tl.maximum(heat, LEAST_HEAT))
        maximum = _unordered(_maximum(best, chunks, CHUNKS) >> 32)
        token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        value = tl.load(logits + token, token < vocab, other=float("-inf"))
        step = _bin(value, maximum, rate, BINS)
        mass = _mass(value, maximum, rate)
        WIDTH: tl.constexpr = 16
        if tl.min(step) < BINS:
            for first in tl.static_range(0, BINS, WIDTH):
                j = first + tl.arange(0, WIDTH)
                hit = step[None, :] == j[:, None]
                tl.atomic_add(counts + j, tl.sum(hit.to(tl.int32), 1))
                tl.atomic_add(masses + j, tl.sum(tl.where(hit, mass[None, :], 0), 1))


@triton.jit
def kiln_settle_bins(logits, best, temperature, top_k, top_p, seed, pos, counts, masses, sampled, listed, keys, tokens, vocab, chunks,
                BINS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, MANY: tl.constexpr):
    """sampled[chunk] = the ranked best score among the tokens surely kept; keys, tokens [listed]: the tokens to look at, in any order."""
    if MANY:
        row = tl.program_id(1)
        logits += row * vocab
        best += row * chunks
        sampled += row * chunks
        counts += row * BINS
        masses += row * BINS
        listed += row
        keys += row * vocab
        tokens += row * vocab
        temperature += row
        top_k += row
        top_p += row
        seed += row
        pos += row
    heat = tl.load(temperature)
    if heat > 0:
        rate = tl.div_rn(1.0, tl.maximum(heat, LEAST_HEAT))
        k, p = _limits(top_k, top_p, vocab)
        maximum = _unordered(_maximum(best, chunks, CHUNKS) >> 32)
        token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        value = tl.load(logits + token, token < vocab, other=float("-inf"))
        step = _bin(value, maximum, rate, BINS)
        sure, last, _, _, _, _ = _settle(counts, masses, k, p, vocab, BINS)
        score = tl.where(step < sure, _score(value, maximum, rate, token, tl.load(seed), tl.load(pos)), float("-inf"))
        tl.store(sampled + tl.program_id(0), tl.max(_ranked(score, token)))
        look = (step >= sure) & (step <= last)
        number = tl.sum(look.to(tl.int32))
        if number > 0:
            place = tl.atomic_add(listed, number) + tl.cumsum(look.to(tl.int32)) - 1
            tl.store(keys + place, _ordered(value), look)
            tl.store(tokens + place, token, look)


@triton.jit
def _cut(keys, listed, base, target, maximum, rate, MASS: tl.constexpr, TILE: tl.constexpr):
    """The greatest key such that base and the number, or the mass, of the listed tokens with that key or a greater one reach the target."""
    cut = tl.full((), -0x80000000, tl.int64)
    for level in range(8):
        shift = 28 - 4 * level
        pivot = cut + (tl.arange(0, 16).to(tl.int64) << shift)
        total = tl.zeros((16,), tl.int64)
        for start in range(0, listed, TILE):
            i = start + tl.arange(0, TILE)
            key = tl.load(keys + i, i < listed, other=0)
            weight = _mass(_unordered(key), maximum, rate) if MASS else tl.full((TILE,), 1, tl.int64)
            weight = tl.where(i < listed, weight, 0)
            total += tl.sum(tl.where(key[None, :] >= pivot[:, None], weight[None, :], 0), 1)
        reached = tl.sum((base + total >= target).to(tl.int64))
        cut += tl.maximum(reached - 1, 0) << shift
    return cut


@triton.jit
def kiln_choose(best, temperature, top_k, top_p, seed, pos, counts, masses, sampled, listed, keys, tokens, out, vocab, chunks,
           BINS: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, MANY: tl.constexpr):
    """out[0] = the token, or -1 where the maximum is no number."""
    if MANY:
        row = tl.program_id(1)
        best += row * chunks
        sampled += row * chunks
        counts += row * BINS
        masses += row * BINS
        listed += row
        keys += row * vocab
        tokens += row * vocab
        temperature += row
        top_k += row
        top_p += row
        seed += row
        pos += row
        out += row
    heat = tl.load(temperature)
    first = _maximum(best, chunks, CHUNKS)
    winner = first
    if heat > 0:
        winner = _maximum(sampled, chunks, CHUNKS)
        number = tl.load(listed)
        if number > 0:
            rate = tl.div_rn(1.0, tl.maximum(heat, LEAST_HEAT))
            maximum = _unordered(first >> 32)
            k, p = _limits(top_k, top_p, vocab)
            _, _, cut_k, count, mass, total = _settle(counts, masses, k, p, vocab, BINS)
            cut = tl.full((), -0x80000000, tl.int64)
            if cut_k:
                cut = _cut(keys, number, count, k, maximum, rate, False, TILE)
                total = mass
                for start in range(0, number, TILE):
                    i = start + tl.arange(0, TILE)
                    key = tl.load(keys + i, i < number, other=0)
                    total += tl.sum(tl.where((i < number) & (key >= cut), _mass(_unordered(key), maximum, rate), 0))
            if p < 1:
                cut = _cut(keys, number, mass, _target(p, total), maximum, rate, True, TILE)
            for start in range(0, number, TILE):
                i = start + tl.arange(0, TILE)
                key = tl.load(keys + i, i < number, other=0)
                token = tl.load(tokens + i, i < number, other=0)
                score = _score(_unordered(key), maximum, rate, token, tl.load(seed), tl.load(pos))
                winner = tl.maximum(winner, tl.max(tl.where((i < number) & (key >= cut), _ranked(score, token), winner)))
    is_number = tl.abs(_unordered(first >> 32)) < float("inf")
    tl.store(out, tl.where(is_number, _token(winner), -1))
