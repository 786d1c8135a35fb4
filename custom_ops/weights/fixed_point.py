"""Activations in fixed point: what the GEMV multiplies integers with.

Every 32 neighbouring elements of a row share a float32 scale; an element is scale * v, v an integer of `terms` signed bytes:
1 byte (v up to 127), 2 (32,512; relative error of a product about 3e-5) or 3 (8,323,072; float32's own error). A row [K] is int32
[K / 32, 8 terms + 4]: word terms * i + t holds byte t, most significant first, of elements 4i .. 4i + 3, element 4i in its low byte; then
as float32 the scale and the sums of scale * v over elements 0 .. 15, 16 .. 31 and all 32. A group that holds NaN or Inf has NaN as its
scale: a product with it is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 32
TERMS = {torch.float32: 3, torch.bfloat16: 2}  # that lose nothing against activations of this dtype


def group_words(terms: int) -> int:
    """int32 words of a group of 32 elements."""
    return 8 * terms + 4


def largest(terms: int) -> int:
    """The largest |v|: its most significant byte is 127, the others 0."""
    return 127 << (8 * (terms - 1))


def quantize(x: torch.Tensor, terms: int) -> torch.Tensor:
    """x [T, K] -> int32 [T, K / 32, 8 terms + 4], in plain torch. Bytes are signed: what is left after one of them rounds to the next."""
    groups = x.float().unflatten(1, (-1, GROUP))  # [T, G, 32]
    high = groups.abs().amax(-1)
    inverse = torch.where(high > 0, torch.full_like(high, largest(terms)) / high, 0.0)  # of a number and a tensor torch rounds twice
    scale = high * (1.0 / largest(terms)) + high * 0.0  # NaN, too, of Inf
    v = torch.floor(groups * inverse.unsqueeze(-1) + 0.5).nan_to_num(0.0).to(torch.int32)
    parts, rest = [], v
    for _ in range(terms - 1):
        low = ((rest + 128) & 255) - 128
        parts.append(low)
        rest = (rest - low) >> 8
    parts.append(rest)
    stacked = torch.stack(parts[::-1], -1).unflatten(2, (8, 4))  # [T, G, 8, 4, terms]
    shift = 8 * torch.arange(4, dtype=torch.int32, device=x.device)
    quads = ((stacked & 255).to(torch.int64) << shift[:, None]).sum(3)  # [T, G, 8, terms]
    quads = torch.where(quads >= 1 << 31, quads - (1 << 32), quads).to(torch.int32).flatten(2)
    halves = v.unflatten(2, (2, 16)).sum(-1) * scale.unsqueeze(-1)
    tail = torch.cat((scale.unsqueeze(-1), halves, v.sum(-1, keepdim=True) * scale.unsqueeze(-1)), -1).float()
    return torch.cat((quads, tail.view(torch.int32)), -1).contiguous()


def dequantize(fixed: torch.Tensor) -> torch.Tensor:
    """int32 [T, K / 32, 8 terms + 4] -> float32 [T, K]."""
    terms = (fixed.shape[2] - 4) // 8
    shift = 8 * torch.arange(4, dtype=torch.int32, device=fixed.device)
    quads = fixed[:, :, : 8 * terms].unflatten(2, (8, terms))
    parts = ((torch.bitwise_right_shift(quads.unsqueeze(-2), shift[:, None]) & 255) ^ 128) - 128  # [T, G, 8, 4, terms]
    v = parts[..., 0]
    for t in range(1, terms):
        v = v * 256 + parts[..., t]
    scale = fixed[:, :, 8 * terms].contiguous().view(torch.float32)
    return (v.flatten(2) * scale.unsqueeze(-1)).flatten(1)


@triton.jit
def largest_size(x, axis: tl.constexpr):
    """The largest |x| over `axis`, float32, NaN if one is: as integers, the bits of NaN are above those of any number."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


@triton.jit
def store_fixed(y, out, first, end, TERMS: tl.constexpr, N: tl.constexpr):
    """Quantize y float32 [N], whole groups, to the groups `first` .. of the row `out`; groups at or past `end` are not written."""
    G: tl.constexpr = N // 32
    WORDS: tl.constexpr = 8 * TERMS + 4
    LARGEST: tl.constexpr = 127 << (8 * (TERMS - 1))
    y = tl.reshape(y, [G, 2, 4, 4])
    high = largest_size(largest_size(largest_size(y, 3), 2), 1)  # [G]
    inverse = tl.where(high > 0, LARGEST / high, 0.0)
    scale = high * (1.0 / LARGEST) + high * 0.0  # NaN, too, of Inf
    v = tl.floor(y * inverse[:, None, None, None] + 0.5).to(tl.int32)
    group = first + tl.arange(0, G)
    keep = group < end
    base = out + group * WORDS
    quad = tl.arange(0, 2)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    shift = (8 * tl.arange(0, 4))[None, None, None, :]
    last = v
    if TERMS > 1:
        last = ((v + 128) & 255) - 128
    last_word = tl.sum((last & 255) << shift, 3)  # [G, 2, 4]
    if TERMS == 1:
        tl.store(base[:, None, None] + quad, last_word, keep[:, None, None])
    elif TERMS == 2:  # neighbours in memory leave together
        word = tl.join(tl.sum((((v - last) >> 8) & 255) << shift, 3), last_word)
        pair = quad[:, :, :, None] * 2 + tl.arange(0, 2)[None, None, None, :]
        tl.store(base[:, None, None, None] + pair, word, keep[:, None, None, None])
    else:
        rest = (v - last) >> 8
        middle = ((rest + 128) & 255) - 128
        tl.store(base[:, None, None] + quad * 3, tl.sum((((rest - middle) >> 8) & 255) << shift, 3), keep[:, None, None])
        tl.store(base[:, None, None] + quad * 3 + 1, tl.sum((middle & 255) << shift, 3), keep[:, None, None])
        tl.store(base[:, None, None] + quad * 3 + 2, last_word, keep[:, None, None])
    first_half, second_half = tl.split(tl.sum(tl.sum(v, 3), 2))  # [G]
    total = (first_half + second_half).to(tl.float32) * scale
    tail = tl.join(tl.join(scale, second_half.to(tl.float32) * scale), tl.join(first_half.to(tl.float32) * scale, total))
    tail_pointer = (base + 8 * TERMS).to(tl.pointer_type(tl.float32))
    tl.store(tail_pointer[:, None] + tl.arange(0, 4)[None, :], tl.reshape(tail, [G, 4]), keep[:, None])
