"""Activations in fixed point: what the GEMV multiplies integers with.

`extent` neighbouring elements of a row share a float32 scale: 256 where the row is a multiple of that and who makes it has as many at once,
else a group of 32. An element is scale * v, v an integer of `terms` signed bytes: 1 byte (v up to 127), 2 (32,512; relative error of a
product about 4e-5) or 3 (8,323,072; float32's own error). A group has 8 terms words of quads: word 2 (terms * j + t) + h holds byte t, most
significant first, of elements 8j + 4h .. + 3, the first in its low byte. Its tail is four float32: the scale and the sums of scale * v over
elements 0 .. 15, 16 .. 31 and all 32.

A row [K] of extent 32 is int32 [K / 32, 8 terms + 4]: a group's quads, then its tail. Of extent 256 it is int32 [K / 256, 64 terms + 48]:
the quads of 8 groups, their tails, and 16 words of sums, the operand of a product of integers with the minima of a block. Those are the
sums of v over each 16 elements in four signed bytes, least significant first: byte b of word 4q + 2 (p % 2) + p / 2 is byte p of the sum
over elements 64q + 16b .. + 15.

So the shape tells terms and extent. What holds NaN or Inf has NaN as its scale: a product with it is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 32
WIDE = 256  # the other extent: the blocks of the types whose sums are integers
SUM_BYTES = 4  # of a sum over 16 elements
TERMS = {torch.float32: 3, torch.bfloat16: 2}  # that lose nothing against activations of this dtype


@triton.constexpr_function
def extent_of(k: int, at_once: int | None = None) -> int:
    """Neighbours that share a scale, in a row of k elements whose maker has `at_once` together, by default all."""
    return WIDE if k % WIDE == 0 and (at_once or k) % WIDE == 0 else GROUP


@triton.constexpr_function
def extent_words(terms: int, extent: int) -> int:
    """int32 words of `extent` elements."""
    return extent // GROUP * (8 * terms + 4) + (16 if extent == WIDE else 0)


FORMS = {extent_words(terms, extent): (terms, extent) for extent in (GROUP, WIDE) for terms in (1, 2, 3)}


def empty(tokens: int, k: int, terms: int, extent: int, like: torch.Tensor) -> torch.Tensor:
    """Memory of `tokens` rows [k], on the device of `like`."""
    return torch.empty((tokens, k // extent, extent_words(terms, extent)), dtype=torch.int32, device=like.device)


def form(x: torch.Tensor) -> tuple[int, int]:
    """(terms, extent) of rows in fixed point."""
    return FORMS[x.shape[2]]


def elements(x: torch.Tensor) -> int:
    """K of rows in fixed point."""
    return x.shape[1] * form(x)[1]


def check(op: str, x: torch.Tensor, k: int, rows: int | str = "T") -> None:
    """ValueError unless x is rows [k] in fixed point."""
    fits = x.dtype == torch.int32 and x.dim() == 3 and x.shape[2] in FORMS and elements(x) == k and rows in ("T", x.shape[0])
    if not fits:
        words = {extent: [extent_words(terms, extent) for terms in (1, 2, 3)] for extent in (GROUP, WIDE) if k % extent == 0}
        shapes = " or ".join(f"[{rows}, {k // extent}, {a}, {b} or {c}]" for extent, (a, b, c) in words.items())
        raise ValueError(f"{op}: x is {x.dtype} {tuple(x.shape)}; expected int32 {shapes}")


def largest(terms: int) -> int:
    """The largest |v|: its most significant byte is 127, the others 0."""
    return 127 << (8 * (terms - 1))


def _bytes(v: torch.Tensor, count: int) -> list[torch.Tensor]:
    """v in `count` signed bytes, least significant first: what is left after one of them rounds to the next."""
    parts = []
    for _ in range(count - 1):
        parts.append(((v + 128) & 255) - 128)
        v = (v - parts[-1]) >> 8
    return [*parts, v]


def _word(parts: torch.Tensor) -> torch.Tensor:
    """Four signed bytes, the last axis, as int32."""
    word = ((parts & 255).to(torch.int64) << 8 * torch.arange(4, device=parts.device)).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def quantize(x: torch.Tensor, terms: int, at_once: int | None = None) -> torch.Tensor:
    """x [T, K] -> rows in fixed point, in plain torch; at_once as in `extent_of`."""
    extent = extent_of(x.shape[1], at_once)
    cut = x.float().unflatten(1, (-1, extent))  # [T, E, extent]
    high = cut.abs().amax(-1)
    inverse = torch.where(high > 0, torch.full_like(high, largest(terms)) / high, 0.0)  # of a number and a tensor torch rounds twice
    scale = (high * (1.0 / largest(terms)) + high * 0.0).unsqueeze(-1)  # NaN, too, of Inf
    v = torch.floor(cut * inverse.unsqueeze(-1) + 0.5).nan_to_num(0.0).to(torch.int32)
    quads = _word(torch.stack(_bytes(v, terms)[::-1], 2).unflatten(3, (-1, 2, 4)).transpose(2, 3))  # [T, E, octets, terms, 2]
    parts = v.unflatten(2, (-1, 16)).sum(-1)  # [T, E, extent / 16]
    halves = parts.unflatten(2, (-1, 2))
    tail = torch.cat((torch.ones_like(halves[..., :1]), halves, halves.sum(-1, keepdim=True)), -1).float() * scale.unsqueeze(-1)
    tail[..., 0] = scale
    words = [quads.flatten(2), tail.flatten(2).view(torch.int32)]
    if extent == WIDE:
        planes = torch.stack([_word(plane.unflatten(2, (4, 4))) for plane in _bytes(parts.to(torch.int32), SUM_BYTES)], 2)  # [T, E, p, q]
        words.append(planes.unflatten(2, (2, 2)).permute(0, 1, 4, 3, 2).flatten(2))  # by q, p % 2, p / 2
    return torch.cat(words, -1).contiguous()


def dequantize(fixed: torch.Tensor) -> torch.Tensor:
    """Rows in fixed point -> float32 [T, K]."""
    terms, extent = form(fixed)
    end = extent // GROUP * 8 * terms
    shift = 8 * torch.arange(4, dtype=torch.int32, device=fixed.device)
    quads = fixed[:, :, :end].unflatten(2, (-1, terms, 2)).transpose(3, 4)  # [T, E, octets, 2, terms]
    parts = ((torch.bitwise_right_shift(quads.unsqueeze(-2), shift[:, None]) & 255) ^ 128) - 128  # [T, E, octets, 2, 4, terms]
    v = parts[..., 0]
    for t in range(1, terms):
        v = v * 256 + parts[..., t]
    scale = fixed[:, :, end].contiguous().view(torch.float32)
    return (v.flatten(2) * scale.unsqueeze(-1)).flatten(1)


@triton.jit
def row_words(k, TERMS: tl.constexpr, EXTENT: tl.constexpr):
    """int32 words of a row of k elements."""
    return k // EXTENT * extent_words(TERMS, EXTENT)


@triton.jit
def quads_at(g, TERMS: tl.constexpr, EXTENT: tl.constexpr):
    """Where in a row the quads of group g begin."""
    if EXTENT == 32:
        return g * (8 * TERMS + 4)
    return g // 8 * extent_words(TERMS, EXTENT) + g % 8 * (8 * TERMS)


@triton.jit
def tail_at(g, TERMS: tl.constexpr, EXTENT: tl.constexpr):
    """Where in a row the tail of group g begins."""
    if EXTENT == 32:
        return g * (8 * TERMS + 4) + 8 * TERMS
    return g // 8 * extent_words(TERMS, EXTENT) + 64 * TERMS + g % 8 * 4


@triton.jit
def largest_size(x, axis: tl.constexpr):
    """The largest |x| over `axis`, float32, NaN if one is: as integers, the bits of NaN are above those of any number."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


@triton.jit
def _low_byte(v):
    """The last of the signed bytes that v is."""
    return ((v + 128) & 255) - 128


@triton.jit
def _four_bytes(v, AXIS: tl.constexpr):
    """Four signed bytes, along the last axis, as a word."""
    shift = 8 * tl.arange(0, 4)
    return tl.sum((v & 255) << (shift[None, None, None, :] if AXIS == 3 else shift[None, None, :]), AXIS)


@triton.jit
def store_fixed(y, out, first, end, TERMS: tl.constexpr, N: tl.constexpr, EXTENT: tl.constexpr):
    """Quantize y float32 [N], whole extents, to the groups `first` .. of the row `out`; groups at or past `end` are not written."""
    S: tl.constexpr = EXTENT // 32
    extent = first // S + tl.arange(0, N // EXTENT)
    store_extents(y, out + extent * extent_words(TERMS, EXTENT), extent < end // S, TERMS, N, EXTENT)


@triton.jit
def store_extents(y, base, keep, TERMS: tl.constexpr, N: tl.constexpr, EXTENT: tl.constexpr):
    """Quantize y float32 [N] to the extents that begin at base [N / EXTENT], where they are kept."""
    E: tl.constexpr = N // EXTENT
    S: tl.constexpr = EXTENT // 32  # groups of an extent
    LARGEST: tl.constexpr = 127 << (8 * (TERMS - 1))
    high = largest_size(tl.reshape(y, [E, EXTENT]), 1)  # [E]
    inverse = tl.where(high > 0, LARGEST / high, 0.0)
    scale = high * (1.0 / LARGEST) + high * 0.0  # NaN, too, of Inf
    y = tl.reshape(y, [E, S * 4, 2, 4])
    v = tl.floor(y * inverse[:, None, None, None] + 0.5).to(tl.int32)
    quad = base[:, None, None] + tl.arange(0, S * 4)[None, :, None] * (2 * TERMS) + tl.arange(0, 2)[None, None, :]
    kept = keep[:, None, None]
    if TERMS == 1:
        tl.store(quad, _four_bytes(v, 3), kept)
    else:
        last = _low_byte(v)
        tl.store(quad + 2 * (TERMS - 1), _four_bytes(last, 3), kept)
        rest = (v - last) >> 8
        if TERMS == 3:
            middle = _low_byte(rest)
            tl.store(quad + 2, _four_bytes(middle, 3), kept)
            rest = (rest - middle) >> 8
        tl.store(quad, _four_bytes(rest, 3), kept)
    sums = tl.sum(tl.sum(v, 3), 2)  # [E, S * 4], of octets
    parts = tl.sum(tl.reshape(sums, [E, S, 2, 2]), 3)  # [E, S, 2], of 16 elements
    first_half, second_half = tl.split(parts)
    by = scale[:, None]
    total = (first_half + second_half).to(tl.float32) * by
    tail = tl.join(tl.join(tl.broadcast_to(by, [E, S]), second_half.to(tl.float32) * by), tl.join(first_half.to(tl.float32) * by, total))
    tail_pointer = (base + 8 * S * TERMS).to(tl.pointer_type(tl.float32))
    at = tail_pointer[:, None, None] + tl.arange(0, S)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(at, tl.reshape(tail, [E, S, 4]), kept)
    if EXTENT == 256:
        rest = tl.reshape(parts, [E, 4, 4])
        q = base[:, None] + S * (8 * TERMS + 4) + 4 * tl.arange(0, 4)[None, :]
        for p in tl.static_range(3):
            low = _low_byte(rest)
            tl.store(q + 2 * (p % 2) + p // 2, _four_bytes(low, 2), keep[:, None])
            rest = (rest - low) >> 8
        tl.store(q + 3, _four_bytes(rest, 2), keep[:, None])
