"""TQ4, TurboQuant at 4 bits: the codec of a KV cache, and the op that writes into one.

A vector x of D elements (a power of two, 64..512) becomes D nibbles and one float16:
  z = SPREAD sqrt(D) R x / |x|, R = H_D diag(s) / sqrt(D), the randomized Hadamard rotation: every coordinate of z is nearly normal
  nibble = the nearest of 16 levels: bit 3 the sign, bits 0..2 the magnitude LEVELS[i]
  scale = |x| / |c|, c the chosen levels, so that the decoded vector R^T (scale c) has exactly the length of x
The int16 word w holds rotated coordinates j * D/4 + w, j = 0..3: magnitudes in bits 4j..4j+2, signs in bits 7, 15, 3, 11, where one
shift brings two of them to the tops of their bytes.
Scales of 2^-14..65504 keep float16's full precision, which is |x| of about 2^-14 sqrt(D) .. 65504 sqrt(D); longer vectors are clamped
to 65504, shorter ones lose precision and end at 0. A zero vector has scale 0, one that holds NaN or Inf the scale NaN.

The levels are the Lloyd-Max levels of N(0, SPREAD^2), rounded to multiples of 1 / LEVEL_UNIT: exact in every 16-bit format, 8-bit integers
times LEVEL_UNIT, at 0.06 % more error than the optimum.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import CONTEXT, EXACT_WINDOW, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton, vector_warps
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.tq4.center import center_keys, center_of_chunk, check_center, keys_to_code, kiln_tq4_center, late_key, one_or_none

LEVEL_UNIT = tl.constexpr(32)
LEVELS = tuple(n / LEVEL_UNIT.value for n in (5, 15, 25, 36, 48, 62, 79, 104))
SPREAD = tl.constexpr(1.19185)
BOUNDARIES = tuple((a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:], strict=False))
SIGN_BITS = (7, 15, 3, 11)
MAX_SCALE = 65504.0
WRITE_ROWS, WRITE_WARPS = 1, 4  # of a program of the write kernel, warps at most


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
    z = rotate(x) * torch.where(norm > 0, SPREAD.value * dim**0.5 / norm, 0.0)
    size = z.abs()
    nibble = (z < 0).to(torch.int32) * 8
    for b in BOUNDARIES:
        nibble = nibble + (size > b).to(torch.int32)
    scale = norm / torch.linalg.vector_norm(levels(nibble), dim=-1, keepdim=True)
    quarter = nibble.unflatten(-1, (4, dim // 4))
    word = sum((quarter[..., j, :] & 7) << 4 * j | quarter[..., j, :] >> 3 << SIGN_BITS[j] for j in range(4))  # disjoint bits
    word = word - ((word & 0x8000) << 1)  # into int16's range: what a narrowing cast does outside it is not fixed
    scale = scale.clamp(max=MAX_SCALE) + norm * 0.0  # NaN of a norm that is no number
    return word.to(torch.int16), scale.squeeze(-1).to(torch.float16)


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
    nibbles = torch.cat([(word >> 4 * j) & 7 | (word >> SIGN_BITS[j] & 1) << 3 for j in range(4)], dim=-1)
    return levels(nibbles) * scale.to(torch.float32).unsqueeze(-1)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes int16 [..., D/4], scale [...] -> x float32 [..., D]."""
    return unrotate(decode_rotated(codes, scale))


def reference_write(k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k: torch.Tensor,
                    v: torch.Tensor, pos: torch.Tensor, k_center: torch.Tensor | None = None, k_exact: torch.Tensor | None = None,
                    exact_window: int = 0) -> None:
    """The op in plain torch; arguments as `tq4_write`."""
    slot = pos
    if k_center is not None and k_exact is not None:
        k_center.copy_(center_of_chunk(k, k_exact, k_center, pos, center_keys(exact_window)))
        k, slot = keys_to_code(k, k_exact, k_center, pos, exact_window)
        slot = slot % k_codes.shape[1]  # before there is a key to code: a slot at the end, which no query reads
    for codes, scales, x, at in ((k_codes, k_scales, k, slot), (v_codes, v_scales, v, pos)):
        new_codes, new_scales = encode(x.transpose(0, 1))
        codes.index_copy_(1, at, new_codes)
        scales.index_copy_(1, at, new_scales)


LEVEL_TABLE = tl.constexpr(LEVELS)
BOUNDARY_TABLE = tl.constexpr(BOUNDARIES)
MAX_SCALE_F16 = tl.constexpr(MAX_SCALE)


def _planes_asm(pair: int) -> str:
    """PTX for two words in one register, $2, to the float16 levels of their coordinates 2 pair, $0, and 2 pair + 1, $1.

    Seven or eight instructions for 4 levels: prmt looks four magnitudes up at once, as nibbles with their sign bits cleared are its
    selectors, and 8 table bytes its two sources.
    """
    half = [struct.pack("<e", level) for level in LEVELS]
    low = [hex(int.from_bytes(bytes(h[0] for h in half[i : i + 4]), "little")) for i in (0, 4)]
    high = [hex(int.from_bytes(bytes(h[1] for h in half[i : i + 4]), "little")) for i in (0, 4)]
    lines = [".reg .b32 s, l, h, t, u;"]
    # t = 0, unknown to the assembler, which then keeps t ^ constant in a register; a constant it would fetch again for every lookup
    lines += ["mov.u32 t, %lanemask_lt;", "shr.u32 t, t, 31;", f"xor.b32 u, t, {high[0]};", f"xor.b32 t, t, {low[0]};"]
    lines += ["and.b32 s, $2, 0x77777777;", f"prmt.b32 s, s, s, {('0x20', '0x31')[pair]};"]
    lines += [f"prmt.b32 l, t, {low[1]}, s;", f"prmt.b32 h, u, {high[1]}, s;"]
    lines += [f"shl.b32 s, $2, {4 * pair};", "lop3.b32 h, s, 0x80808080, h, 0xEA;"]  # (s & sign bits) | magnitudes
    lines += ["prmt.b32 $0, l, h, 0x6240;", "prmt.b32 $1, l, h, 0x7351;"]
    return "{" + " ".join(lines) + "}"


PLANES_ASM = tl.constexpr((_planes_asm(0), _planes_asm(1)))


@triton.jit
def level_of(nibble):
    """float32 levels of nibbles (int32)."""
    size = nibble & 7
    level = tl.full(nibble.shape, LEVEL_TABLE[0], tl.float32)
    for i in tl.static_range(1, 8):
        level = tl.where(size == i, LEVEL_TABLE[i], level)
    return tl.where(nibble > 7, -level, level)


@triton.jit
def plane_pair(words, PAIR: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Levels 2 PAIR and 2 PAIR + 1 of int16 `words`, in DTYPE, each of words' shape. ASM needs float16 and real hardware."""
    if ASM:
        a, b = tl.inline_asm_elementwise(PLANES_ASM[PAIR], "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        w = words.to(tl.int32)
        signs = w << (4 * PAIR)  # those of the pair in bits 7 and 15
        a = level_of((w >> (8 * PAIR)) & 7 | (signs >> 4) & 8).to(DTYPE)
        b = level_of((w >> (8 * PAIR + 4)) & 7 | (signs >> 12) & 8).to(DTYPE)
    return a, b


@triton.jit
def sign_of(dim):
    """`signs` for indices `dim` (int32), float32."""
    x = (dim + 1).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return 1.0 - 2.0 * ((x ^ (x >> 15)) & 1).to(tl.float32)


@triton.jit
def hadamard_rows(x, ROWS: tl.constexpr, D: tl.constexpr):
    """H_D x for each row of x, float32 [ROWS, D], unscaled: log2 D steps of butterflies, additions only."""
    LOG: tl.constexpr = 6 + (D > 64) + (D > 128) + (D > 256)
    for s in tl.static_range(LOG):
        pair = tl.permute(tl.reshape(x, (ROWS * D // (2 << s), 2, 1 << s)), (0, 2, 1))
        a, b = tl.split(pair)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, D))
    return x


@triton.jit
def encode_rows(x, codes_ptr, scales_ptr, slot, keep, ROWS: tl.constexpr, D: tl.constexpr):
    """Encode rows of x, float32 [ROWS, D], into the vectors `slot` of a cache, where `keep`."""
    dim = tl.arange(0, D)
    norm = tl.sqrt(tl.sum(x * x, 1))
    z = hadamard_rows(x * sign_of(dim)[None, :], ROWS, D) * tl.where(norm > 0, SPREAD / norm, 0.0)[:, None]
    size = tl.abs(z)
    nibble = (z < 0).to(tl.int32) * 8
    for i in tl.static_range(7):
        nibble += (size > BOUNDARY_TABLE[i]).to(tl.int32)
    level = level_of(nibble)
    scale = tl.minimum(norm / tl.sqrt(tl.sum(level * level, 1)), MAX_SCALE_F16) + norm * 0.0  # NaN of a norm that is no number
    quarter = tl.reshape(nibble, (ROWS, 4, D // 4))
    j = tl.arange(0, 4)[None, :, None]
    bits = (quarter & 7) << (4 * j) | (quarter >> 3) << ((7 + 8 * j) % 20)  # SIGN_BITS[j]
    word = tl.sum(bits, 1)  # disjoint bits: the sum is the union
    tl.store(codes_ptr + slot[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :], word.to(tl.int16), mask=keep[:, None])
    tl.store(scales_ptr + slot, scale.to(tl.float16), mask=keep)


@waits()
@triton.jit
def kiln_tq4_write(k_codes_ptr, k_scales_ptr, v_codes_ptr, v_scales_ptr, k_ptr, v_ptr, pos_ptr, center_ptr, k_ring_ptr, rows,
                     SLOTS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, EXACT_WINDOW: tl.constexpr,
                     RING: tl.constexpr, EARLY: tl.constexpr):
    """Encode ROWS of the `rows` = T * KV vectors of k (program axis 1: 0) or of v (1).

    EXACT_WINDOW > 0: of keys those that are the oldest in the window of a query at `pos_ptr`, less the center [KV, D]; the past is in
    k_ring_ptr.
    """
    wait_for_earlier_kernels(EARLY)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = r < rows
    pos = tl.load(pos_ptr + r // KV, mask=keep, other=0).to(tl.int32)
    slot = (r % KV) * SLOTS + pos
    dim = tl.arange(0, D)
    offset = r[:, None] * D + dim[None, :]
    if tl.program_id(1) == 1:
        x = tl.load(v_ptr + offset, mask=keep[:, None], other=0.0).to(tl.float32)
        encode_rows(x, v_codes_ptr, v_scales_ptr, slot, keep, ROWS, D)
    elif EXACT_WINDOW > 0:
        p = late_key(pos, EXACT_WINDOW)
        keep &= p >= 0
        first = tl.load(pos_ptr).to(tl.int32)
        past = p < first
        base = tl.where(past, k_ring_ptr, k_ptr)
        row = tl.where(past, p % RING, p - first) * KV + r % KV
        x = tl.load(base[:, None] + row[:, None] * D + dim[None, :], mask=keep[:, None], other=0.0).to(tl.float32)
        x -= tl.load(center_ptr + (r % KV)[:, None] * D + dim[None, :], mask=keep[:, None], other=0.0)
        encode_rows(x, k_codes_ptr, k_scales_ptr, (r % KV) * SLOTS + p, keep, ROWS, D)
    else:
        x = tl.load(k_ptr + offset, mask=keep[:, None], other=0.0).to(tl.float32)
        encode_rows(x, k_codes_ptr, k_scales_ptr, slot, keep, ROWS, D)


@kernel_op("kiln::tq4_write", mutates_args={"k_codes", "k_scales", "v_codes", "v_scales", "center"})
def tq4_write(k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k: torch.Tensor,
              v: torch.Tensor, pos: torch.Tensor, center: list[torch.Tensor], k_exact: torch.Tensor | None = None,
              exact_window: int = 0) -> None:
    """Encode a chunk's keys and values into the cache, in place, at their positions.

    k_codes, v_codes int16 [KV, S, D/4]; k_scales, v_scales float16 [KV, S]; k, v [T, KV, D]; pos [T] int64, below S. center: a tensor or
    none (as one that may be None cannot be written to). With one, float32 [KV, D], and k_exact [R, KV, D], the ring of the keys before the
    chunk: the keys that are coded are those of positions pos - exact_window + 1, from 0 on, less the center, and the center is made where
    the chunk has its last key (`center.py`).
    Raises ValueError when the dimensions do not fit.
    """
    check_dim(k.shape[2])
    if k.shape[2] != 4 * k_codes.shape[2] or k.shape[1] != k_codes.shape[0]:
        raise ValueError(f"tq4_write: k is {tuple(k.shape)}, k_codes {tuple(k_codes.shape)}; expected [T, KV, D] and [KV, S, D/4]")
    k_center = one_or_none("tq4_write", center)
    check_center("tq4_write", k_center, k_codes, exact_window, k_exact)
    if k_exact is not None and k_exact.dtype != k.dtype:
        raise ValueError(f"tq4_write: k is {k.dtype}, exact window {k_exact.dtype}; expected one dtype")
    if not use_triton(k):
        return reference_write(k_codes, k_scales, v_codes, v_scales, k, v, pos, k_center, k_exact, exact_window)
    tokens, kv_heads, dim = k.shape
    k, v = k.contiguous(), v.contiguous()
    mean, ring, window, slots = v_scales, k, 0, 0  # what is not read is any pointer
    if k_center is not None and k_exact is not None:
        mean, ring, window, slots = k_center, k_exact, exact_window, k_exact.shape[0]
        kernel(kiln_tq4_center)[(kv_heads,)](mean, k, ring, pos, tokens, COUNT=center_keys(window), KV=kv_heads, D=dim, EARLY=early(),
                                             num_warps=WRITE_WARPS)
    grid = ((tokens * kv_heads + WRITE_ROWS - 1) // WRITE_ROWS, 2)
    kernel(kiln_tq4_write)[grid](k_codes, k_scales, v_codes, v_scales, k, v, pos, mean, ring, tokens * kv_heads,
                                   SLOTS=k_codes.shape[1], KV=kv_heads, D=dim, ROWS=WRITE_ROWS,
                                   EXACT_WINDOW=window, RING=slots, EARLY=early(), num_warps=vector_warps(dim, WRITE_WARPS))


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes."""
    caches = {"k_codes_ptr": "*i16", "k_scales_ptr": "*fp16", "v_codes_ptr": "*i16", "v_scales_ptr": "*fp16", "center_ptr": "*fp32"}
    h, cases = model.full, []
    for pointer in ("*bf16", "*fp32"):
        chunk = {"k_ptr": pointer, "k_ring_ptr": pointer, "pos_ptr": "*i64"}
        for window in (EXACT_WINDOW, 0) if model is GEMMA4_31B else (EXACT_WINDOW,):
            cases.append(KernelCase(f"tq4_write {pointer[1:]} {h.kv}x{h.dim}{'' if window else ', no center'}", kiln_tq4_write,
                                    caches | chunk | {"v_ptr": pointer, "rows": "i32"},
                                    {"SLOTS": CONTEXT, "KV": h.kv, "D": h.dim, "ROWS": WRITE_ROWS, "EXACT_WINDOW": window, "RING": window,
                                     "EARLY": early(target)}, {"num_warps": vector_warps(h.dim, WRITE_WARPS)}))
        cases.append(KernelCase(f"tq4_center {pointer[1:]} {h.kv}x{h.dim}", kiln_tq4_center,
                                chunk | {"center_ptr": "*fp32", "tokens": "i32"},
                                {"COUNT": center_keys(EXACT_WINDOW), "KV": h.kv, "D": h.dim, "EARLY": early(target)},
                                {"num_warps": WRITE_WARPS}))
    return cases
