"""`sliding_decode` of several tokens, each of one of B rows of rings: all their keys and values are written, then each attends.

A token attends to another of its step where both are of one row and the other's position is no later. Each has the bits that it has alone:
the kernel is that of `sliding_decode`, with the same split of its keys. Tokens that are the same, of one row and position, write the same.
"""

from __future__ import annotations

import torch

from kiln.custom_ops.attention import sliding_attention, sliding_cut, sliding_together
from kiln.custom_ops.attention.flash import check_kernel_shapes, kiln_flash_merge, merge_warps
from kiln.custom_ops.attention.prepare import check_projections, prepare_reference, query_reference, token_strides
from kiln.custom_ops.attention.sliding_decode import kiln_sliding_decode
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import extent_of


def _check(op: str, q: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, kv_heads: int, dim: int, pos: torch.Tensor,
           row: torch.Tensor, window: int) -> None:
    if q.dim() != 3 or any(x.dtype != torch.int64 or x.shape != q.shape[1:2] for x in (pos, row)):
        given = f"q {tuple(q.shape)}, pos {pos.dtype} {tuple(pos.shape)}, row {row.dtype} {tuple(row.shape)}"
        raise ValueError(f"{op}: {given}; expected [S, T, heads * D], int64 [T] twice")
    if k_ring.dim() != 4 or not k_ring.shape == v_ring.shape == (*k_ring.shape[:2], kv_heads, dim):
        raise ValueError(f"{op}: rings {tuple(k_ring.shape)}, {tuple(v_ring.shape)}; expected [B, R, {kv_heads}, {dim}]")
    if q.shape[2] % (kv_heads * dim) or window < 1:
        raise ValueError(f"{op}: q has {q.shape[2]} elements, window {window}; expected a multiple of {kv_heads} heads of {dim}, 1 or more")


def _attended(query: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, pos: torch.Tensor, row: torch.Tensor, window: int,
              terms: int) -> torch.Tensor:
    """The reference of the second half: a token at a time, its own key and value in the ring."""
    out = []
    for x, p, r in zip(query.split(1), pos.split(1), row.split(1), strict=True):
        (keys,), (values,) = k_ring[r], v_ring[r]
        slot = p % k_ring.shape[1]  # as a ring's, it stands for a position out of the window
        out.append(sliding_attention.reference(x, keys[slot], values[slot], keys, values, p, window))
    return fixed_point.quantize(torch.cat(out).flatten(1), terms, query.shape[-1])


@kernel_op("kiln::sliding_decode_rows", mutates_args=("k_ring", "v_ring"))
def sliding_decode_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor,
                        cos: torch.Tensor, sin: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, pos: torch.Tensor,
                        row: torch.Tensor, window: int, eps: float, terms: int, scale: float = 1.0, v_norm: bool = True,
                        slots: bool = False) -> torch.Tensor:
    """`sliding_decode` of T tokens: q, k, v float32 [S, T, heads * D]; cos, sin [T, D / 2]; pos, row [T] int64, a row below B.

    k_ring, v_ring [B, R, KV, D]: slot s of a row holds its latest position p with p % R == s, of those before the step; R is no less than
    window + T - 1, or than every position + 1. slots: the tokens of a row read its window together (`sliding_together`). Returns T rows of
    H * D in fixed point. ValueError when a shape does not fit.
    """
    check_projections("sliding_decode_rows", q, k, v, q_weight, k_weight, cos)
    dim = q_weight.shape[0]
    _check("sliding_decode_rows", q, k_ring, v_ring, k.shape[-1] // dim, dim, pos, row, window)
    if use_triton(q):
        return _launch(q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, row, window, eps, terms, scale, v_norm, slots)
    query, *own = prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, k_ring.dtype, scale, v_norm)
    for ring, x in zip((k_ring, v_ring), own, strict=True):
        ring[row, pos % ring.shape[1]] = x
    return _attended(query, k_ring, v_ring, pos, row, window, terms)


@kernel_op("kiln::sliding_read_rows", mutates_args=())
def sliding_read_rows(q: torch.Tensor, q_weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_ring: torch.Tensor,
                      v_ring: torch.Tensor, pos: torch.Tensor, row: torch.Tensor, window: int, eps: float, terms: int,
                      scale: float = 1.0, slots: bool = False) -> torch.Tensor:
    """`sliding_decode_rows` of a layer that reads another's keys and values: the rings hold those of the tokens already."""
    check_projections("sliding_read_rows", q, q, q, q_weight, q_weight, cos)
    _check("sliding_read_rows", q, k_ring, v_ring, k_ring.shape[2] if k_ring.dim() == 4 else 1, q_weight.shape[0], pos, row, window)
    if use_triton(q):
        return _launch(q, q, q, q_weight, q_weight, cos, sin, k_ring, v_ring, pos, row, window, eps, terms, scale, True, slots, shared=True)
    query = query_reference(q, q_weight, cos, sin, eps, k_ring.dtype, scale)
    return _attended(query, k_ring, v_ring, pos, row, window, terms)


def rows_constants(tile, target: GpuTarget, heads: int, kv_heads: int, dim: int, slots: int, window: int, parts: int, v_parts: int,
                   terms: int, v_norm: bool, scale: float, strides: dict[str, int]) -> tuple[dict, dict, dict]:
    """The constants of `kiln_sliding_decode`, to write and to attend, and of `kiln_flash_merge`. No key is read ahead: it may be of this
    step."""
    split, merge = sliding_cut.constants(tile, target, heads, kv_heads, dim, slots, window, parts, v_parts, terms, v_norm, scale)
    both = split | strides | {"AHEAD": False}
    return both | {"WRITE": True}, both | {"SHARED": True}, merge | {"MANY": True}


def _launch(q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, row, window: int, eps: float, terms: int, scale: float,
            v_norm: bool, slots: bool, shared: bool = False) -> torch.Tensor:
    """The three kernels, without the first where `shared`; arguments as `sliding_decode_rows`."""
    if slots:
        return sliding_together.launch(q, k, v, q_weight, k_weight, cos, sin, k_ring, v_ring, pos, row, window, eps, terms, scale, v_norm,
                                       shared)
    dim, (_, size, kv_heads, _) = q_weight.shape[0], k_ring.shape
    tokens, heads, target = q.shape[1], q.shape[2] // dim, current_target()
    check_kernel_shapes("sliding_decode_rows", dim, k_ring[0])
    tile = sliding_cut.tile_of(k_ring.dtype, target, dim)
    write, split, merge = rows_constants(tile, target, heads, kv_heads, dim, size, window, q.shape[0], v.shape[0], terms, v_norm, scale,
                                         token_strides(q, v))
    part = torch.empty(tokens, split["SPLITS"], heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens, split["SPLITS"], heads, 2, dtype=torch.float32, device=q.device)
    out = fixed_point.empty(tokens, heads * dim, terms, extent_of(heads * dim, dim), q)
    options = {"EPS": eps, "num_warps": tile.warps, "num_stages": tile.stages}
    if not shared:
        kernel(kiln_sliding_decode)[(kv_heads, 1, tokens)](q, k, v, row, k_weight, cos, sin, k_ring, v_ring, pos, part, sums, q.stride(0),
                                                           v.stride(0), **write, **options)
    kernel(kiln_sliding_decode)[(kv_heads, split["SPLITS"], tokens)](q, k, v, q_weight, row, cos, sin, k_ring, v_ring, pos, part, sums,
                                                                     q.stride(0), v.stride(0), **split, **options)
    kernel(kiln_flash_merge)[(heads, tokens)](part, sums, pos, pos, q, q, q, out, **merge, num_warps=merge_warps(dim))
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes, its rings with spare slots for 8 tokens."""
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "o_ptr", "ml_ptr"), "*fp32")
    signature |= {"pos_ptr": "*i64", "stride": "i32", "v_stride": "i32"}
    h, cases = model.sliding, []
    if h is None:
        return []
    size = (h.queries + 2 * h.kv) * h.dim
    for element, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        rings = {"k_ring_ptr": f"*{element}", "v_ring_ptr": f"*{element}"}
        tile = sliding_cut.tile_of(dtype, target, h.dim)
        write, split, merge = rows_constants(tile, target, h.queries, h.kv, h.dim, model.window + 14, model.window, 3, 3, 2, True, 1.0,
                                             {"TOKEN": size, "V_TOKEN": size})
        for name, constants, unused in (("write", write, "q_weight_ptr"), ("attend", split, "k_weight_ptr")):
            cases.append(KernelCase(f"sliding_decode_rows {name} {element} {h.label}", kiln_sliding_decode,
                                    signature | rings | {unused: "*i64"}, {"EPS": EPS} | constants,
                                    {"num_warps": tile.warps, "num_stages": tile.stages}, aligned=("stride", "v_stride")))
        inputs = dict.fromkeys(("o_ptr", "ml_ptr", "q_ptr", "k_ptr", "v_ptr"), "*fp32") | {"pos_ptr": "*i64", "len_ptr": "*i64"}
        cases.append(KernelCase(f"sliding_decode_rows {element} merge {h.label}", kiln_flash_merge, inputs | {"out_ptr": "*i32"}, merge,
                                {"num_warps": merge_warps(h.dim)}))
    return cases
