"""Packed weight layouts: how the blocks of a GGUF matrix [N, K] become int32 words [G, W, N] and 16-bit halves [G, H, N].

G = K / block elements. A block keeps its bytes, 4 * W + 2 * H of them; only their order changes. N is innermost.

A group is 32 consecutive elements y[32g] .. y[32g + 31] of a block, in dequantized order. Inside a word, byte b is bits 8b .. 8b + 7:

- nibble words, 4 per group: word j holds elements 8j .. 8j + 7; element 8j + b (b < 4) in the low nibble of byte b, element 8j + 4 + b
  in its high nibble. `word & 0x0F0F0F0F` and `(word >> 4) & 0x0F0F0F0F` are each four neighbouring elements, one per byte.
- one-bit word, 1 per group: byte b, bit t (t = 0 .. 7) is the highest bit of element 4t + b.
- two-bit words, 2 per group: word h covers elements 16h .. 16h + 15; byte b, bits 2t .. 2t + 1 (t = 0 .. 3) are two bits of element
  16h + 4t + b: above its nibble, else its lowest.
- byte words (Q8_0), 8 per group: word i holds elements 4i .. 4i + 3, signed bytes.

Halves are float16, or int16 of the same bits where not all of them are float16 values (`PackLayout.byte_fields`).

Words of a block, in order, and halves of a block:

| block_type | words | halves |
|---|---|---|
| Q4_0 | 4 nibble | d |
| Q4_1 | 4 nibble | d, m |
| Q5_0 | 4 nibble, 1 one-bit | d |
| Q5_1 | 4 nibble, 1 one-bit | d, m |
| Q8_0 | 8 byte | d |
| IQ4_NL | 4 nibble, each the number of one of 16 levels (`PackLayout.levels`) | d |
| MXFP4 (two blocks together) | 8 nibble (block i: 4i .. 4i + 3), each the number of a level | scales: of block 0 low, of block 1 high |
| Q2_K | 16 two-bit, 4 scale (the 16 scale bytes as they are) | d, dmin |
| Q3_K | 16 two-bit (group g: 2g, 2g + 1), 8 one-bit (one per group), 3 scale (the 12 scale bytes as they are) | d |
| Q4_K | 32 nibble (group g: 4g .. 4g + 3), 3 scale (the 12 scale bytes as they are) | d, dmin |
| Q5_K | 32 nibble, 8 one-bit, 3 scale | d, dmin |
| Q6_K | 32 nibble, 16 two-bit, 4 scale (16 int8 as they are) | d |
| IQ4_XS | 32 nibble, each the number of one of 16 levels, 1 scale (the 4 bytes scales_l as they are) | d, scales_h |
"""

from __future__ import annotations

import numpy as np
import torch

from kiln.custom_ops.weights.block_types import LAYOUTS, PackLayout

_LOW = np.uint32(0x0F0F0F0F)


# ---- packing: numpy, words as uint32 [G, fields, N] ----


def _to_nibbles(src: np.ndarray, out: np.ndarray) -> None:
    """GGUF runs of nibbles (low ones a run of elements, high ones a later run) -> nibble words.

    `src` [..., run words, N], `out` [..., 2, run words / 2, N].
    """
    even, odd = src[..., 0::2, :], src[..., 1::2, :]
    low, high = out[..., 0, :, :], out[..., 1, :, :]
    np.bitwise_and(odd, _LOW, out=low)
    low <<= 4
    low |= even & _LOW
    np.right_shift(even, 4, out=high)
    high &= _LOW
    high |= odd & ~_LOW


def _from_nibbles(words: np.ndarray, out: np.ndarray) -> None:
    """The inverse of `_to_nibbles`: `words` [..., 2, run words / 2, N], `out` [..., run words, N]."""
    low, high = words[..., 0, :, :], words[..., 1, :, :]
    out[..., 0::2, :] = (low & _LOW) | ((high & _LOW) << 4)
    out[..., 1::2, :] = ((low >> 4) & _LOW) | (high & ~_LOW)


def _nibble_runs(block_type: str, words: np.ndarray) -> np.ndarray:
    """Nibble words [G, words, N] of a block seen as [G, runs.., 2, run words / 2, N]; 2 is low and high nibbles of a GGUF run."""
    g, n = words.shape[0], words.shape[2]
    if block_type in ("Q4_K", "Q5_K"):  # 4 runs of 32 bytes: group 2c low, group 2c + 1 high
        return words.reshape(g, 4, 2, 4, n)
    if block_type == "Q6_K":  # 2 halves of 2 runs: run r has group r low, group r + 2 high
        return words.reshape(g, 2, 2, 2, 4, n).swapaxes(2, 3)
    return words.reshape(g, -1, 2, 2, n)  # runs of 16 bytes, one a group: first half of the group low, second half high


def _transpose_bits(x: np.ndarray, width: int) -> None:
    """In place: x [..., S, N], S = 8 / width words; item i (`width` bits) of a byte of word s <-> item s of that byte of word i."""
    size = 8 // width
    mask = {4: 0x0F0F0F0F, 2: 0x33333333, 1: 0x55555555}
    step = size // 2
    while step:
        shift = step * width
        pairs = x.reshape(*x.shape[:-2], size // (2 * step), 2, step, x.shape[-1])
        a, b = pairs[..., 0, :, :], pairs[..., 1, :, :]
        swap = a >> shift
        swap ^= b
        swap &= np.uint32(mask[shift])
        b ^= swap
        swap <<= shift
        a ^= swap
        step //= 2


def _spread_bits(x: np.ndarray) -> np.ndarray:
    """Bit 4t + b -> bit 8b + t of every word (a 32-bit field of fifth bits -> the one-bit word)."""
    out = np.zeros_like(x)
    for t in range(8):
        out |= ((((x >> (4 * t)) & 15) * np.uint32(0x00204081)) & np.uint32(0x01010101)) << t
    return out


def _gather_bits(x: np.ndarray) -> np.ndarray:
    """Bit 8b + t -> bit 4t + b of every word: the inverse of `_spread_bits`."""
    out = np.zeros_like(x)
    for t in range(8):
        y = (x >> t) & np.uint32(0x01010101)
        out |= ((y | (y >> 7) | (y >> 14) | (y >> 21)) & 15) << (4 * t)
    return out


def _check(block_type: str) -> PackLayout:
    if block_type not in LAYOUTS:
        raise ValueError(f"no packed layout for block type {block_type}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[block_type]


def pack(block_type: str, blocks: np.ndarray, out: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """GGUF blocks uint8 [N, G, block bytes] -> (words int32 [G, W, N], halves [G, H, N]).

    The last axis of `blocks` must be contiguous. `out` takes the results instead of new arrays; packing rows n0:n1 into
    `(words[:, :, n0:n1], halves[:, :, n0:n1])` chunk by chunk gives the whole, whatever the chunks. Chunks of a few hundred rows and about
    256 KB stay in the L2 cache and are the fastest, above 1 GB/s per core.
    """
    layout = _check(block_type)
    n, g, size = blocks.shape
    if size != layout.block_bytes:
        raise ValueError(f"{block_type} blocks have {layout.block_bytes} bytes, got {size}")
    if out is None:
        out = np.empty((g, layout.words, n), np.int32), np.empty((g, layout.halves, n), layout.halves_dtype)
    words, halves = out
    bits = halves.view(np.uint16)
    for h, offset in enumerate(layout.half_fields):
        bits[:, h] = blocks[:, :, offset : offset + 2].view("<u2")[:, :, 0].T
    for h, (first, second) in enumerate(layout.byte_fields, len(layout.half_fields)):
        bits[:, h] = blocks[:, :, first].T | blocks[:, :, second].T.astype(np.uint16) << 8

    dst = words.view(np.uint32)
    fields = [  # [G, words, N]; always a copy, because fields are transformed in place
        blocks[:, :, offset : offset + length].view("<u4").transpose(1, 2, 0).copy() for offset, length in layout.word_fields
    ]
    if block_type == "Q8_0":
        dst[:] = fields[0]
        return out
    left = dst
    if layout.bits >= 4:
        nibbles, left = np.split(left, [layout.block // 8], 1)
        runs = _nibble_runs(block_type, nibbles)
        nibble_field = fields.pop(0) if layout.together == 1 else np.concatenate([fields.pop(0) for _ in range(layout.together)], 1)
        _to_nibbles(nibble_field.reshape(*runs.shape[:-3], -1, n), runs)
    if layout.bits in (2, 3, 6):
        two_bits, left = np.split(left, [16], 1)
        two = fields.pop(0).reshape(g, 2, 2, 4, n)  # half, h, quarter u -> quarter t of the half
        _transpose_bits(two, 2)
        two_bits.reshape(g, 2, 4, 2, n)[:] = two.swapaxes(2, 3)
    if layout.bits in (3, 5):
        one_bits, left = np.split(left, [layout.block // 32], 1)
        one = fields.pop(0)
        if layout.block == 32:
            one = _spread_bits(one)
        else:
            _transpose_bits(one, 1)
        one_bits[:] = one
    if fields:
        left[:] = fields[0]
    return out


def unpack(block_type: str, words: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """(words int32 [G, W, N], halves [G, H, N]) -> the GGUF blocks, uint8 [N, G, block bytes]: the inverse of `pack`."""
    layout = _check(block_type)
    g, _, n = words.shape
    src = np.ascontiguousarray(words).view(np.uint32)
    blocks = np.empty((n, g, layout.block_bytes), np.uint8)
    for h, offset in enumerate(layout.half_fields):
        blocks[:, :, offset : offset + 2].view("<u2")[:, :, 0] = np.ascontiguousarray(halves[:, h]).view(np.uint16).T
    for h, (first, second) in enumerate(layout.byte_fields, len(layout.half_fields)):
        pair = np.ascontiguousarray(halves[:, h]).view(np.uint16).T
        blocks[:, :, first], blocks[:, :, second] = pair & 255, pair >> 8

    if block_type == "Q8_0":
        fields = [src]
    else:
        fields, left = [], src
        if layout.bits >= 4:
            nibbles, left = np.split(left, [layout.block // 8], 1)
            runs = _nibble_runs(block_type, nibbles)
            low = np.empty((*runs.shape[:-3], 2 * runs.shape[-2], n), np.uint32)
            _from_nibbles(runs, low)
            fields += np.split(low.reshape(g, -1, n), layout.together, 1)
        if layout.bits in (2, 3, 6):
            two_bits, left = np.split(left, [16], 1)
            two = two_bits.reshape(g, 2, 4, 2, n).swapaxes(2, 3).copy()
            _transpose_bits(two, 2)
            fields.append(two.reshape(g, 16, n))
        if layout.bits in (3, 5):
            one_bits, left = np.split(left, [layout.block // 32], 1)
            if layout.block == 32:
                one = _gather_bits(one_bits)
            else:
                one = one_bits.copy()
                _transpose_bits(one, 1)
            fields.append(one)
        if left.shape[1]:
            fields.append(left)
    for (offset, length), field in zip(layout.word_fields, fields, strict=True):
        blocks[:, :, offset : offset + length].view("<u4")[:] = field.transpose(2, 0, 1)
    return blocks


# ---- dequantizing: torch, the plain reference ----


def _items(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [..., W, N] -> their items [..., W * 32 / bits, N] as int32, bytes innermost: item i is item i >> 2 of byte i & 3.

    The shifts are made by arange, not as a tensor literal: a literal would become a constant of an exported program.
    """
    i = torch.arange(32 // bits, dtype=torch.int32, device=words.device)
    shift = ((i & 3) << 3) + (i >> 2) * bits
    items = torch.bitwise_right_shift(words.unsqueeze(-2), shift.unsqueeze(-1)) & ((1 << bits) - 1)  # >> has no meta for dynamic shapes
    return items.flatten(-3, -2)


def _signed(byte: torch.Tensor) -> torch.Tensor:
    return (byte ^ 128) - 128


def _level(q: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """levels[q], int32. A chain of selections, for a table would become a constant of an exported program."""
    found = torch.full_like(q, levels[0])
    for i, level in enumerate(levels[1:], 1):
        found = torch.where(q == i, level, found)
    return found


def _k_scales(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q4_K / Q5_K scale words [G, 3, N] -> 6-bit scales and minima, each int32 [G, 8, N]."""
    s, m, high = scale.unbind(1)
    s = torch.stack((s & 0x3F3F3F3F, (high & 0x0F0F0F0F) | ((s >> 2) & 0x30303030)), 1)
    m = torch.stack((m & 0x3F3F3F3F, ((high >> 4) & 0x0F0F0F0F) | ((m >> 2) & 0x30303030)), 1)
    return _items(s, 8), _items(m, 8)


def _float16(half: torch.Tensor) -> torch.Tensor:
    return half if half.dtype == torch.float16 else half.view(torch.float16)


def _e8m0(pair: torch.Tensor) -> torch.Tensor:
    """MXFP4: two exponents e, int16 [G, N] -> 2^(e - 128), float32 [G, 2, N]."""
    e = torch.stack((pair.int() & 255, (pair.int() >> 8) & 255), 1)
    return torch.where(e < 2, 0x00200000 * (e + 1), (e - 1) << 23).view(torch.float32)  # e < 2: below float32's normal numbers


def _six_scales(scale: torch.Tensor) -> torch.Tensor:
    """Q3_K scale words [G, 3, N] -> 6-bit scales int32 [G, 16, N]."""
    first, second, high = scale.unbind(1)
    low = (first, second, first >> 4, second >> 4)
    return _items(torch.stack([(w & 0x0F0F0F0F) | ((high >> 2 * i) & 0x03030303) << 4 for i, w in enumerate(low)], 1), 8)


def _split_scales(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """IQ4_XS: low bits, word [G, N], and high bits, int16 [G, N] -> 6-bit scales int32 [G, 8, N]."""
    g = torch.arange(8, dtype=torch.int32, device=low.device).view(1, 8, 1)
    low = torch.bitwise_right_shift(low.unsqueeze(1), 4 * g) & 15
    return low | (torch.bitwise_right_shift(high.unsqueeze(1).int(), 2 * g) & 3) << 4


def dequantize(block_type: str, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """words int32 [G, W, N], halves [G, H, N] -> the matrix transposed, float32 [K, N].

    Bit-equal to GGML's dequantization. N may be any subset of rows, taken along the last axis of both.
    """
    layout = _check(block_type)
    g, _, n = words.shape
    k = g * layout.block
    if block_type == "MXFP4":
        q = _level(_items(words, 4), layout.levels).view(g, 2, 32, n)
        return (q * _e8m0(halves[:, 0]).unsqueeze(2)).view(k, n)
    d = _float16(halves[:, 0]).float()  # [G, N]
    if block_type == "Q8_0":
        return (_signed(_items(words, 8)) * d.unsqueeze(1)).view(k, n)
    if layout.block == 32:
        q = _items(words[:, :4], 4)  # [G, 32, N]
        if layout.words == 5:
            q = q | (_items(words[:, 4:], 1) << 4)
        if layout.minimum:
            return (q * d.unsqueeze(1) + halves[:, 1:].float()).view(k, n)
        if layout.levels:
            return (_level(q, layout.levels) * d.unsqueeze(1)).view(k, n)
        return ((q - (1 << layout.bits - 1)) * d.unsqueeze(1)).view(k, n)

    if block_type == "Q2_K":
        s, m = (_items(w & 0x0F0F0F0F, 8) for w in (words[:, 16:], words[:, 16:] >> 4))
        scale, minimum = s * d.unsqueeze(1), m * halves[:, 1:].float()  # [G, 16, N]
        return (_items(words[:, :16], 2).view(g, 16, 16, n) * scale.unsqueeze(2) - minimum.unsqueeze(2)).view(k, n)
    if block_type == "Q3_K":
        q = (_items(words[:, :16], 2) | (_items(words[:, 16:24], 1) << 2)) - 4  # [G, 256, N]
        scale = (_six_scales(words[:, 24:]) - 32) * d.unsqueeze(1)  # [G, 16, N]
        return (q.view(g, 16, 16, n) * scale.unsqueeze(2)).view(k, n)
    q = _items(words[:, :32], 4)  # [G, 256, N]
    if block_type == "Q6_K":
        q = (q | (_items(words[:, 32:48], 2) << 4)) - 32
        scale = _signed(_items(words[:, 48:], 8)) * d.unsqueeze(1)  # [G, 16, N]
        return (q.view(g, 16, 16, n) * scale.unsqueeze(2)).view(k, n)
    if block_type == "IQ4_XS":
        scale = (_split_scales(words[:, 32], halves[:, 1]) - 32) * d.unsqueeze(1)  # [G, 8, N]
        return (_level(q, layout.levels).view(g, 8, 32, n) * scale.unsqueeze(2)).view(k, n)
    if block_type == "Q5_K":
        q = q | (_items(words[:, 32:40], 1) << 4)
    s, m = _k_scales(words[:, layout.words - 3 :])
    scale, minimum = s * d.unsqueeze(1), m * halves[:, 1:].float()  # [G, 8, N]
    return (q.view(g, 8, 32, n) * scale.unsqueeze(2) - minimum.unsqueeze(2)).view(k, n)
