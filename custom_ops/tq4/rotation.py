"""What surrounds attention to codes: queries rotated once, with what the key center adds to their scores, and outputs rotated back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.attention.flash import LOG2E
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import Heads
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, vector_warps
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.tq4.codec import LEVEL_UNIT, hadamard_rows, sign_of
from kiln.custom_ops.weights.fixed_point import largest, largest_size

ROTATE_WARPS = 4  # at most

LARGEST = tl.constexpr(largest(2))  # of a query's integers


@triton.jit
def rotated_query(x, D: tl.constexpr):
    """sqrt(D) R x / |x| of x, float32 [1, D], whose coordinates fit float16 whatever |x|, and the scale log2(e) |x| / sqrt(D)."""
    norm = tl.sqrt(tl.sum(tl.sum(x * x, 1), 0))
    y = hadamard_rows(x * sign_of(tl.arange(0, D))[None, :], 1, D) * tl.where(norm > 0, 1.0 / norm, 0.0)
    return y, norm * (LOG2E * D**-0.5)


@waits()
@triton.jit
def kiln_tq4_rotate(x_ptr, out_ptr, scale_ptr, center_ptr, shift_ptr, D: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
                  BYTES: tl.constexpr, CENTERED: tl.constexpr, EARLY: tl.constexpr):
    """`rotated_query` of one query. BYTES: as integers 256 a + b, out_ptr int8 [queries, 2, D] a, then b, and the scale of their products
    with levels times LEVEL_UNIT. CENTERED: what its KV head's center, float32 [KV, D], adds to its base-2 scores goes to shift_ptr.
    """
    wait_for_earlier_kernels(EARLY)
    r = tl.program_id(0)
    dim = tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + r * D + dim).to(tl.float32)
    if CENTERED:
        center = tl.load(center_ptr + r % HEADS // GROUP * D + dim)
        tl.store(shift_ptr + r, tl.sum(tl.sum(x * center, 1), 0) * LOG2E)
    y, scale = rotated_query(x, D)
    if BYTES:
        high = tl.sum(largest_size(y, 1), 0)  # of the one row
        v = tl.floor(y * tl.where(high > 0, LARGEST / high, 0.0) + 0.5).to(tl.int32)
        a = (v + 128) >> 8
        tl.store(out_ptr + r * 2 * D + dim, a.to(tl.int8))
        tl.store(out_ptr + r * 2 * D + D + dim, (v - a * 256).to(tl.int8))
        scale *= high * (1.0 / (LARGEST * LEVEL_UNIT))
    else:
        tl.store(out_ptr + r * D + dim, y)
    tl.store(scale_ptr + r, scale)


@triton.jit
def unrotated(x, D: tl.constexpr):
    """R^T x of x, float32 [D] -> [1, D]."""
    return hadamard_rows(x[None, :], 1, D) * (sign_of(tl.arange(0, D)) * D**-0.5)[None, :]


@triton.jit
def kiln_tq4_unrotate(x_ptr, x_lse_ptr, lse_ptr, shift_ptr, pos_ptr, out_ptr, tokens, EXACT_WINDOW: tl.constexpr, HEADS: tl.constexpr,
                    GROUP: tl.constexpr, D: tl.constexpr, CENTERED: tl.constexpr):
    """One row of out, attention to exact keys, merged with R^T x, that to codes, by the logarithms of their total weights.

    CENTERED: shift_ptr float32 [T, H] is what the center adds to the second.
    """
    r = tl.program_id(0)
    token = r // HEADS
    head = r % HEADS
    if tl.load(pos_ptr).to(tl.int32) + token < EXACT_WINDOW:
        return  # this query reads no code
    dim = tl.arange(0, D)
    y = unrotated(tl.load(x_ptr + r * D + dim).to(tl.float32), D)
    weight = head // GROUP * tokens * GROUP + token * GROUP + head % GROUP
    coded = tl.load(x_lse_ptr + weight)
    if CENTERED:
        coded += tl.load(shift_ptr + r)
    share = 1.0 / (1.0 + tl.exp2(tl.load(lse_ptr + weight) - coded))
    out = out_ptr + r * D + dim[None, :]
    tl.store(out, y * share + tl.load(out).to(tl.float32) * (1.0 - share))


def rotated(q: torch.Tensor, k_center: torch.Tensor | None,
            as_bytes: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`kiln_tq4_rotate`: q [T, H, D] -> [T, H, D] in float16, in float32 for float32 q, or int8 [T, H, 2, D]; scale float32 [T, H]; with a
    center what it adds to scores, float32 [T, H].
    """
    tokens, heads, dim = q.shape
    scale = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if as_bytes:
        out = torch.empty(tokens, heads, 2, dim, dtype=torch.int8, device=q.device)
    else:
        out = torch.empty(tokens, heads, dim, dtype=torch.float32 if q.dtype == torch.float32 else torch.float16, device=q.device)
    shift = None if k_center is None else torch.empty_like(scale)
    center, to, kv_heads = (scale, scale, heads) if k_center is None or shift is None else (k_center, shift, k_center.shape[0])
    kernel(kiln_tq4_rotate)[(tokens * heads,)](q, out, scale, center, to, D=dim, HEADS=heads, GROUP=heads // kv_heads, BYTES=as_bytes,
                                               CENTERED=k_center is not None, EARLY=early(), num_warps=vector_warps(dim, ROTATE_WARPS))
    return out, scale, shift


def merge_rotated(x: torch.Tensor, x_lse: torch.Tensor, lse: torch.Tensor, shift: torch.Tensor | None, pos: torch.Tensor, out: torch.Tensor,
                  exact_window: int) -> None:
    """`kiln_tq4_unrotate`: x, out [T, H, D], x_lse, lse float32 [KV, T * H / KV], shift as `rotated` makes it."""
    (tokens, heads, dim), kv_heads = x.shape, lse.shape[0]
    constants = {"HEADS": heads, "GROUP": heads // kv_heads, "D": dim, "CENTERED": shift is not None}
    kernel(kiln_tq4_unrotate)[(tokens * heads,)](x, x_lse, lse, lse if shift is None else shift, pos, out, tokens,
                                                 EXACT_WINDOW=exact_window, **constants, num_warps=vector_warps(dim, ROTATE_WARPS))


def rotation_cases(name: str, pointer: str, inner: str, target: GpuTarget, heads: Heads, exact_window: int) -> list[KernelCase]:
    """The compilations of activations behind `pointer`, whose rotated queries are `inner` where a product is of floats."""
    dim = heads.dim
    shape = {"HEADS": heads.queries, "GROUP": heads.queries // heads.kv, "D": dim, "CENTERED": True}
    rotate = {"x_ptr": pointer} | dict.fromkeys(("scale_ptr", "center_ptr", "shift_ptr"), "*fp32")
    unrotate = dict.fromkeys(("x_ptr", "out_ptr"), pointer) | dict.fromkeys(("x_lse_ptr", "lse_ptr", "shift_ptr"), "*fp32")
    unrotate |= {"pos_ptr": "*i64", "tokens": "i32"}
    cases = [KernelCase(f"{name} rotate {dim} to {out[1:]}", kiln_tq4_rotate, rotate | {"out_ptr": out},
                        shape | {"BYTES": out == "*i8", "EARLY": early(target)}, {"num_warps": vector_warps(dim, ROTATE_WARPS)})
             for out in ((inner,) if inner == "*fp32" else (inner, "*i8"))]  # fmt: skip
    return [*cases, KernelCase(f"{name} unrotate {heads.label}", kiln_tq4_unrotate, unrotate, shape | {"EXACT_WINDOW": exact_window},
                               {"num_warps": vector_warps(dim, ROTATE_WARPS)})]  # fmt: skip
