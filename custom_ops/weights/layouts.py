"""Packed weight layouts: how the blocks of a GGUF matrix [N, K] become int32 words [G, W, N] and float16 halves [G, H, N].

G = K / block elements. A block keeps its bytes, 4 * W + 2 * H of them; only their order changes. N is innermost.

A group is 32 consecutive elements y[32g] .. y[32g + 31] of a block, in dequantized order. Inside a word, byte b is bits 8b .. 8b + 7:

- nibble words, 4 per group: word j holds elements 8j .. 8j + 7; element 8j + b (b < 4) in the low nibble of byte b, element 8j + 4 + b
  in its high nibble. `word & 0x0F0F0F0F` and `(word >> 4) & 0x0F0F0F0F` are each four neighbouring elements, one per byte.
- fifth-bit word, 1 per group: byte b, bit t (t = 0 .. 7) is the fifth bit of element 4t + b.
- two-bit words, 2 per group: word h covers elements 16h .. 16h + 15; byte b, bits 2t .. 2t + 1 (t = 0 .. 3) are the upper two bits of
  element 16h + 4t + b.
- byte words (Q8_0), 8 per group: word i holds elements 4i .. 4i + 3, signed bytes.

Words of a block, in order, and halves of a block:

| block_type | words | halves |
|---|---|---|
| Q4_0 | 4 nibble | d |
| Q4_1 | 4 nibble | d, m |
| Q5_0 | 4 nibble, 1 fifth-bit | d |
| Q5_1 | 4 nibble, 1 fifth-bit | d, m |
| Q8_0 | 8 byte | d |
| Q4_K | 32 nibble (group g: 4g .. 4g + 3), 3 scale (the 12 scale bytes as they are) | d, dmin |
| Q5_K | 32 nibble, 8 fifth-bit (one per group), 3 scale | d, dmin |
| Q6_K | 32 nibble, 16 two-bit (group g: 2g, 2g + 1), 4 scale (16 int8 as they are) | d |
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
    return words.reshape(g, 1, 2, 2, n)  # 16 bytes: first half of the group low, second half high


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
    """Bit 4t + b -> bit 8b + t of every word (a 32-bit field of fifth bits -> the fifth-bit word)."""
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
    """GGUF blocks uint8 [N, G, block bytes] -> (words int32 [G, W, N], halves float16 [G, H, N]).

    The last axis of `blocks` must be contiguous. `out` takes the results instead of new arrays; packing rows n0:n1 into
    `(words[:, :, n0:n1], halves[:, :, n0:n1])` chunk by chunk gives the whole, whatever the chunks. Chunks of a few hundred rows and about
    256 KB stay in the L2 cache and are the fastest, above 1 GB/s per core.
    """
    layout = _check(block_type)
    n, g, size = blocks.shape
    if size != layout.block_bytes:
        raise ValueError(f"{block_type} blocks have {layout.block_bytes} bytes, got {size}")
    if out is None:
        out = np.empty((g, layout.words, n), np.int32), np.empty((g, layout.halves, n), np.float16)
    words, halves = out
    for h, offset in enumerate(layout.half_fields):
        halves.view(np.uint16)[:, h] = blocks[:, :, offset : offset + 2].view("<u2")[:, :, 0].T

    dst = words.view(np.uint32)
    fields = [  # [G, words, N]; always a copy, because fields are transformed in place
        blocks[:, :, offset : offset + length].view("<u4").transpose(1, 2, 0).copy() for offset, length in layout.word_fields
    ]
    if block_type == "Q8_0":
        dst[:] = fields[0]
        return out
    nibbles = 32 if layout.block == 256 else 4
    runs = _nibble_runs(block_type, dst[:, :nibbles])
    _to_nibbles(fields[0].reshape(*runs.shape[:-3], -1, n), runs)
    if block_type in ("Q5_0", "Q5_1"):
        dst[:, 4] = _spread_bits(fields[1][:, 0])
    elif block_type == "Q5_K":
        _transpose_bits(fields[1], 1)
        dst[:, 32:40] = fields[1]
    elif block_type == "Q6_K":
        two = fields[1].reshape(g, 2, 2, 4, n)  # half, h, quarter u -> quarter t of the half
        _transpose_bits(two, 2)
        dst[:, 32:48].reshape(g, 2, 4, 2, n)[:] = two.swapaxes(2, 3)
    if layout.block == 256:
        dst[:, nibbles + (0 if block_type == "Q4_K" else fields[1].shape[1]) :] = fields[-1]
    return out


def unpack(block_type: str, words: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """(words int32 [G, W, N], halves float16 [G, H, N]) -> the GGUF blocks, uint8 [N, G, block bytes]: the inverse of `pack`."""
    layout = _check(block_type)
    g, _, n = words.shape
    src = np.ascontiguousarray(words).view(np.uint32)
    blocks = np.empty((n, g, layout.block_bytes), np.uint8)
    for h, offset in enumerate(layout.half_fields):
        blocks[:, :, offset : offset + 2].view("<u2")[:, :, 0] = np.ascontiguousarray(halves[:, h]).view(np.uint16).T

    if block_type == "Q8_0":
        fields = [src]
    else:
        nibbles = 32 if layout.block == 256 else 4
        runs = _nibble_runs(block_type, src[:, :nibbles])
        low = np.empty((*runs.shape[:-3], 2 * runs.shape[-2], n), np.uint32)
        _from_nibbles(runs, low)
        fields = [low.reshape(g, nibbles, n)]
        if block_type in ("Q5_0", "Q5_1"):
            fields.append(_gather_bits(src[:, 4:5]))
        elif block_type == "Q5_K":
            fifth = src[:, 32:40].copy()
            _transpose_bits(fifth, 1)
            fields.append(fifth)
        elif block_type == "Q6_K":
            two = src[:, 32:48].reshape(g, 2, 4, 2, n).swapaxes(2, 3).copy()
            _transpose_bits(two, 2)
            fields.append(two.reshape(g, 16, n))
        if layout.block == 256:
            fields.append(src[:, sum(f.shape[1] for f in fields) :])
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


def _k_scales(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q4_K / Q5_K scale words [G, 3, N] -> 6-bit scales and minima, each int32 [G, 8, N]."""
    s, m, high = scale.unbind(1)
    s = torch.stack((s & 0x3F3F3F3F, (high & 0x0F0F0F0F) | ((s >> 2) & 0x30303030)), 1)
    m = torch.stack((m & 0x3F3F3F3F, ((high >> 4) & 0x0F0F0F0F) | ((m >> 2) & 0x30303030)), 1)
    return _items(s, 8), _items(m, 8)


def dequantize(block_type: str, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """words int32 [G, W, N], halves float16 [G, H, N] -> the matrix transposed, float32 [K, N].

    Bit-equal to GGML's dequantization. N may be any subset of rows, taken along the last axis of both.
    """
    layout = _check(block_type)
    g, _, n = words.shape
    k = g * layout.block
    d = halves[:, 0].float()  # [G, N]
    if block_type == "Q8_0":
        return (_signed(_items(words, 8)) * d.unsqueeze(1)).view(k, n)
    if layout.block == 32:
        q = _items(words[:, :4], 4)  # [G, 32, N]
        if layout.words == 5:
            q = q | (_items(words[:, 4:], 1) << 4)
        if layout.minimum:
            return (q * d.unsqueeze(1) + halves[:, 1:].float()).view(k, n)
        return ((q - (1 << layout.bits - 1)) * d.unsqueeze(1)).view(k, n)

    q = _items(words[:, :32], 4)  # [G, 256, N]
    if block_type == "Q6_K":
        q = (q | (_items(words[:, 32:48], 2) << 4)) - 32
        scale = _signed(_items(words[:, 48:], 8)) * d.unsqueeze(1)  # [G, 16, N]
        return (q.view(g, 16, 16, n) * scale.unsqueeze(2)).view(k, n)
    if block_type == "Q5_K":
        q = q | (_items(words[:, 32:40], 1) << 4)
    s, m = _k_scales(words[:, layout.words - 3 :])
    scale, minimum = s * d.unsqueeze(1), m * halves[:, 1:].float()  # [G, 8, N]
    return (q.view(g, 8, 32, n) * scale.unsqueeze(2) - minimum.unsqueeze(2)).view(k, n)
