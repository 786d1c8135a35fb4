"""TQ4, TurboQuant at 4 bits: the codec of a KV cache, and the op that writes into one.

A vector x of D elements (a power of two, 64..512) becomes D nibbles and one float16:
  z = sqrt(D) R x / |x|, R = H_D diag(s) / sqrt(D), the randomized Hadamard rotation: every coordinate of z is nearly a standard normal
  nibble = the nearest of the 16 Lloyd-Max levels of N(0, 1): bit 3 the sign, bits 0..2 the magnitude LEVELS[i]
  scale = |x| / |c|, c the chosen levels, so that the decoded vector R^T (scale c) has exactly the length of x
Nibble j (bits 4j..4j+3) of the int16 word w belongs to rotated coordinate j * D/4 + w.
Scales of 2^-14..65504 keep float16's full precision, which is |x| of about 2^-14 sqrt(D) .. 65504 sqrt(D); longer vectors are clamped
to 65504, shorter ones lose precision and end at 0. A zero vector has scale 0.
"""

from __future__ import annotations

import torch
from torch.library import triton_op

from custom_ops.launch import use_triton

LEVELS = (0.1283950, 0.3880483, 0.6567589, 0.9423402, 1.2562309, 1.6180460, 2.0690172, 2.7326357)
BOUNDARIES = tuple((a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:], strict=False))
MAX_SCALE = 65504.0


def check_dim(dim: int) -> None:
    """ValueError unless the codec has a rotation for vectors of `dim` elements."""
    if dim not in (64, 128, 256, 512):
        raise ValueError(f"tq4: head dimension {dim}; expected 64, 128, 256 or 512")


def signs(dim: int, device: torch.device | None = None) -> torch.Tensor:
    """The rotation's fixed signs, [dim] int64 of +-1: the low bit of an integer hash of the index, not a generator that may change."""
    x = torch.arange(dim, device=device) + 1
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return 1 - 2 * ((x ^ (x >> 15)) & 1)


def hadamard(dim: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """The Hadamard matrix of Sylvester's construction, [dim, dim] of +-1, entry (i, j) the parity of i & j; dim <= 256."""
    i = torch.arange(dim, device=device)
    x = i[:, None] & i[None, :]
    for shift in (4, 2, 1):
        x = x ^ (x >> shift)
    return (1 - 2 * (x & 1)).to(dtype)


def _transform(x: torch.Tensor) -> torch.Tensor:
    """H_D x over the last dimension, unscaled, as the two factors of H_D = H_a (x) H_b: two small matmuls instead of log2 D butterflies."""
    dim = x.shape[-1]
    a = 1 << ((dim.bit_length() - 1) // 2)
    y = x.reshape(-1, a, dim // a) @ hadamard(dim // a, x.dtype, x.device)
    y = y.transpose(1, 2) @ hadamard(a, x.dtype, x.device)
    return y.transpose(1, 2).reshape(x.shape)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """R x over the last dimension, in x's dtype (give float32 or float64)."""
    dim = x.shape[-1]
    return _transform(x * signs(dim, x.device).to(x.dtype)) * dim**-0.5


def unrotate(x: torch.Tensor) -> torch.Tensor:
    """R^T x, the inverse of `rotate`."""
    dim = x.shape[-1]
    return _transform(x) * (signs(dim, x.device).to(x.dtype) * dim**-0.5)


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] of any float dtype -> codes int16 [..., D/4], scale float16 [...]."""
    dim = x.shape[-1]
    check_dim(dim)
    x = x.to(torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    z = rotate(x) * torch.where(norm > 0, dim**0.5 / norm, 0.0)
    size = z.abs()
    nibble = (z < 0).to(torch.int32) * 8
    for b in BOUNDARIES:
        nibble = nibble + (size > b).to(torch.int32)
    scale = norm / torch.linalg.vector_norm(levels(nibble), dim=-1, keepdim=True)
    quarter = nibble.unflatten(-1, (4, dim // 4))
    word = quarter[..., 0, :] | quarter[..., 1, :] << 4 | quarter[..., 2, :] << 8 | quarter[..., 3, :] << 12
    word = word - ((word & 0x8000) << 1)  # into int16's range: what a narrowing cast does outside it is not fixed
    return word.to(torch.int16), scale.squeeze(-1).clamp(max=MAX_SCALE).to(torch.float16)


def levels(nibble: torch.Tensor) -> torch.Tensor:
    """The float32 level of each nibble. A chain of selects: a table would be one more constant of the compiled graph."""
    size = nibble & 7
    out = torch.full_like(size, LEVELS[0], dtype=torch.float32)
    for i, level in enumerate(LEVELS[1:], 1):
        out = torch.where(size == i, level, out)
    return torch.where(nibble > 7, -out, out)


def decode_rotated(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes int16 [..., D/4], scale [...] -> scale * c float32 [..., D], still rotated."""
    word = codes.to(torch.int32)
    nibbles = torch.cat([(word >> shift) & 15 for shift in (0, 4, 8, 12)], dim=-1)
    return levels(nibbles) * scale.to(torch.float32).unsqueeze(-1)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes int16 [..., D/4], scale [...] -> x float32 [..., D]."""
    return unrotate(decode_rotated(codes, scale))


def reference_write(k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k: torch.Tensor,
                    v: torch.Tensor, pos: torch.Tensor) -> None:
    """The op in plain torch; arguments as `tq4_write`."""
    for codes, scales, x in ((k_codes, k_scales, k), (v_codes, v_scales, v)):
        new_codes, new_scales = encode(x.transpose(0, 1))
        codes.index_copy_(1, pos, new_codes)
        scales.index_copy_(1, pos, new_scales)


@triton_op("kiln::tq4_write", mutates_args={"k_codes", "k_scales", "v_codes", "v_scales"})
def tq4_write(k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k: torch.Tensor,
              v: torch.Tensor, pos: torch.Tensor) -> None:
    """Encode a chunk's keys and values into the cache, in place, at their positions.

    k_codes, v_codes int16 [KV, S, D/4]; k_scales, v_scales float16 [KV, S]; k, v [T, KV, D]; pos [T] int64, below S.
    Raises ValueError when the dimensions do not fit.
    """
    check_dim(k.shape[2])
    if k.shape[2] != 4 * k_codes.shape[2] or k.shape[1] != k_codes.shape[0]:
        raise ValueError(f"tq4_write: k is {tuple(k.shape)}, k_codes {tuple(k_codes.shape)}; expected [T, KV, D] and [KV, S, D/4]")
    if not use_triton(k):
        return reference_write(k_codes, k_scales, v_codes, v_scales, k, v, pos)
    raise NotImplementedError("tq4_write has no kernel for this device yet")
