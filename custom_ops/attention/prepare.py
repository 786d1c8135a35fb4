"""What attention of a few tokens takes, from their raw projections: norms and rotary embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.markers import rms_norm, rope
from kiln.custom_ops.weights.gemv_kernels import sum_splits

PREPARE_WARPS = 8


def head_dim(q_weight: torch.Tensor | None, cos: torch.Tensor) -> int:
    """All of a head turns."""
    return 2 * cos.shape[1] if q_weight is None else q_weight.shape[0]


def prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps: float, dtype: torch.dtype, scale: float = 1.0, v_norm: bool = True,
                      neighbours: bool = False) -> tuple[torch.Tensor, ...]:
    """The op in plain torch, a token at a time, so that none depends on the others; arguments as `prepare_qkv`."""
    if q.dim() == 3:
        tokens = [prepare_reference(q[:, i], k[:, i], v[:, i], q_weight, k_weight, cos[[i]], sin[[i]], eps, dtype, scale, v_norm,
                                    neighbours) for i in range(q.shape[1])]  # fmt: skip
        return tuple(torch.cat(x) for x in zip(*tokens, strict=True))
    q, k, v = (x.sum(0).view(1, -1, head_dim(q_weight, cos)) for x in (q, k, v))
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps, torch.float32), rms_norm(k, k_weight, eps, torch.float32)
    q, k = rope(q, cos, sin, scale, neighbours), rope(k, cos, sin, 1.0, neighbours)
    return q.to(dtype), k.to(dtype), rms_norm(v, None, eps, dtype) if v_norm else v.to(dtype)


def query_reference(q, q_weight, cos, sin, eps: float, dtype: torch.dtype, scale: float = 1.0, neighbours: bool = False) -> torch.Tensor:
    """The op in plain torch, a token at a time; arguments as `prepare_q`."""
    if q.dim() == 3:
        tokens = range(q.shape[1])
        return torch.cat([query_reference(q[:, i], q_weight, cos[[i]], sin[[i]], eps, dtype, scale, neighbours) for i in tokens])
    q = q.sum(0).view(1, -1, head_dim(q_weight, cos))
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps, torch.float32)
    return rope(q, cos, sin, scale, neighbours).to(dtype)


@triton.jit
def prepared_head(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride,
                  EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr, V_NORM: tl.constexpr,
                  SCALE: tl.constexpr, NEIGHBOURS: tl.constexpr, EARLY: tl.constexpr):
    """Both halves, float32 [D / 2], of head `head` of queries, keys and values: RMSNorm and, but for values, weight and rotary embedding.

    A projection is the sum of `splits` parts, `stride` elements apart (q and k alike). Without QK_NORM queries and keys have no norm and no
    weight, without V_NORM values have none. Queries are multiplied by SCALE. NEIGHBOURS: as `markers.rope`.
    """
    H: tl.constexpr = D // 2
    dim = tl.arange(0, H)
    rotated = head < HEADS + KV
    if QK_NORM:
        weight = tl.where(head < HEADS, q_weight_ptr, k_weight_ptr) + (2 * dim if NEIGHBOURS else dim)
        weight0 = tl.load(weight, rotated, other=1.0)
        weight1 = tl.load(weight + (1 if NEIGHBOURS else H), rotated, other=1.0)
    wait_for_earlier_kernels(EARLY)
    parts = splits
    step = stride
    if head < HEADS:
        source = q_ptr + head * D
    elif rotated:
        source = k_ptr + (head - HEADS) * D
    else:
        source = v_ptr + (head - HEADS - KV) * D
        parts = v_splits
        step = v_stride
    element = tl.arange(0, D)
    if NEIGHBOURS:
        element = tl.where(rotated, element % H * 2 + element // H, element)
    whole = sum_splits(source + element, step, parts, None, D, TOGETHER=16)
    a, b = tl.split(tl.permute(tl.reshape(whole, [2, H]), [1, 0]))
    cos = tl.load(cos_ptr + dim, rotated, other=1.0)
    sin = tl.load(sin_ptr + dim, rotated, other=0.0)
    if QK_NORM or V_NORM:
        norm = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + EPS)
        if not V_NORM:
            norm = tl.where(rotated, norm, 1.0)
        if QK_NORM:
            a = a * norm * weight0
            b = b * norm * weight1
        else:
            norm = tl.where(rotated, 1.0, norm)
            a = a * norm
            b = b * norm
    if SCALE == 1:
        return a * cos - b * sin, b * cos + a * sin
    else:
        scale = tl.where(head < HEADS, SCALE, 1.0)
        return (a * cos - b * sin) * scale, (b * cos + a * sin) * scale


@waits("q_weight_ptr", "k_weight_ptr")
@triton.jit
def kiln_prepare(q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, splits, stride,
                   v_splits, v_stride, EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr,
                   V_NORM: tl.constexpr, SCALE: tl.constexpr, NEIGHBOURS: tl.constexpr, EARLY: tl.constexpr, TOKEN: tl.constexpr,
                   V_TOKEN: tl.constexpr):
    """`prepared_head` of each token. Grid (HEADS + 2 KV, tokens). TOKEN, V_TOKEN: of several, elements from one to the next; 0 of one."""
    head = tl.program_id(0)
    if TOKEN > 0:
        token = tl.program_id(1)
        q_ptr += token * TOKEN
        k_ptr += token * TOKEN
        v_ptr += token * V_TOKEN
        cos_ptr += token * (D // 2)
        sin_ptr += token * (D // 2)
        q_out_ptr += token * (HEADS * D)
        k_out_ptr += token * (KV * D)
        v_out_ptr += token * (KV * D)
    a, b = prepared_head(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride,
                         EPS, HEADS, KV, D, QK_NORM, V_NORM, SCALE, NEIGHBOURS, EARLY)
    if head < HEADS:
        target = q_out_ptr + head * D
    elif head < HEADS + KV:
        target = k_out_ptr + (head - HEADS) * D
    else:
        target = v_out_ptr + (head - HEADS - KV) * D
    dim = tl.arange(0, D // 2)
    tl.store(target + dim, a)
    tl.store(target + D // 2 + dim, b)


def form_constants(q_weight: torch.Tensor | None, v_norm: bool, scale: float, neighbours: bool = False) -> dict:
    """What `prepared_head` is told of a model's form."""
    return {"QK_NORM": q_weight is not None, "V_NORM": v_norm, "SCALE": scale, "NEIGHBOURS": neighbours}


def check_projections(op: str, q, k, v, q_weight, k_weight, cos) -> int:
    """How many tokens there are; ValueError where the projections [S, heads * D] of one, [S, T, heads * D] of several, do not fit."""
    dim, tokens = head_dim(q_weight, cos), q.shape[1] if q.dim() == 3 else 1
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: a norm's weight for q or k alone; expected both or none")
    sizes = [x.shape[-1] for x in (q, k, v)]
    if any(x.dtype != torch.float32 or x.stride(-1) != 1 for x in (q, k, v)) or any(s % dim for s in sizes) or sizes[1] != sizes[2]:
        raise ValueError(f"{op}: q, k, v have {sizes} elements; expected float32, whole heads of {dim}, as many keys as values")
    if sizes[0] % sizes[1] or cos.shape != (tokens, dim // 2):
        raise ValueError(f"{op}: {sizes[0] // dim} heads to {sizes[1] // dim}, cos {tuple(cos.shape)}; expected [{tokens}, {dim // 2}]")
    if q.shape[0] != k.shape[0] or (q.shape[0] > 1 and q.stride(0) != k.stride(0)):
        raise ValueError(f"{op}: q has {q.shape[0]} parts {q.stride(0)} apart, k {k.shape[0]}, {k.stride(0)}; expected the same")
    apart = tokens > 1 and q.stride(1) != k.stride(1)
    if apart or any(x.dim() != (2 if tokens == 1 else 3) or x.shape[1:-1] != q.shape[1:-1] for x in (q, k, v)):
        given = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"{op}: q, k, v are {given}; expected [S, heads * D] of one token, [S, T, heads * D] of several")
    return tokens


def token_strides(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """TOKEN and V_TOKEN of the kernels that take projections."""
    return {"TOKEN": q.stride(1), "V_TOKEN": v.stride(1)} if q.dim() == 3 else {"TOKEN": 0, "V_TOKEN": 0}


@waits("inv_freq_ptr")
@triton.jit
def kiln_rope_table(pos_ptr, inv_freq_ptr, cos_ptr, sin_ptr, half, BLOCK: tl.constexpr, EARLY: tl.constexpr,
                    MANY: tl.constexpr):
    """cos and sin of pos * inv_freq, float32 [half]. Grid (tokens); MANY: there are several."""
    i = tl.arange(0, BLOCK)
    inv_freq = tl.load(inv_freq_ptr + i, i < half, other=0.0)
    wait_for_earlier_kernels(EARLY)
    if MANY:
        pos_ptr += tl.program_id(0)
        cos_ptr += tl.program_id(0) * half
        sin_ptr += tl.program_id(0) * half
    angle = tl.load(pos_ptr).to(tl.float32) * inv_freq
    tl.store(cos_ptr + i, tl.cos(angle), i < half)
    tl.store(sin_ptr + i, tl.sin(angle), i < half)


@triton_op("kiln::rope_table", mutates_args=())
def rope_table(pos: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of pos * inv_freq, computed once: pos int64 [T], inv_freq float32 [H] -> float32 [T, H] each."""
    if not use_triton(inv_freq):
        angle = pos.float()[:, None] * inv_freq
        return angle.cos(), angle.sin()
    tokens, half = pos.shape[0], inv_freq.shape[0]
    cos = torch.empty((tokens, half), dtype=torch.float32, device=inv_freq.device)
    sin = torch.empty_like(cos)
    kernel(kiln_rope_table)[(tokens,)](pos, inv_freq, cos, sin, half, BLOCK=triton.next_power_of_2(half), EARLY=early(), MANY=tokens > 1,
                                       num_warps=1)
    return cos, sin


@triton_op("kiln::prepare_qkv", mutates_args=())
def prepare_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
                cos: torch.Tensor, sin: torch.Tensor, eps: float, dtype: torch.dtype, scale: float = 1.0, v_norm: bool = True,
                neighbours: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections, float32 [S, heads * D] of one token, [S, T, heads * D] of several, to be summed over S, to what attention takes:
    [T, heads, D] in dtype each. No token's bits depend on the others.

    q and k: RMSNorm over D, times weight float32 [D], neither without weights; rotary embedding by cos, sin float32 [T, D / 2] (as
    `markers.rope`), q then times scale. v: RMSNorm if `v_norm`. ValueError when a shape does not fit.
    """
    tokens = check_projections("prepare_qkv", q, k, v, q_weight, k_weight, cos)
    if not use_triton(q):
        return prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, dtype, scale, v_norm, neighbours)
    dim = head_dim(q_weight, cos)
    outs = [torch.empty((tokens, x.shape[-1] // dim, dim), dtype=dtype, device=q.device) for x in (q, k, v)]
    heads, kv_heads = (x.shape[1] for x in outs[:2])
    parts = (q.shape[0], q.stride(0), v.shape[0], v.stride(0))
    weights = (cos if w is None else w for w in (q_weight, k_weight))  # what is not read is any pointer
    kernel(kiln_prepare)[(heads + 2 * kv_heads, tokens)](q, k, v, *weights, cos, sin, *outs, *parts, EPS=eps, HEADS=heads, KV=kv_heads,
                                                         D=dim, **form_constants(q_weight, v_norm, scale, neighbours), EARLY=early(),
                                                         **token_strides(q, v), num_warps=PREPARE_WARPS)
    return outs[0], outs[1], outs[2]


@triton_op("kiln::prepare_q", mutates_args=())
def prepare_q(q: torch.Tensor, q_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float, dtype: torch.dtype,
              scale: float = 1.0, neighbours: bool = False) -> torch.Tensor:
    """The queries of `prepare_qkv` alone, of a layer that reads another's keys and values."""
    tokens = check_projections("prepare_q", q, q, q, q_weight, q_weight, cos)
    if not use_triton(q):
        return query_reference(q, q_weight, cos, sin, eps, dtype, scale, neighbours)
    dim = head_dim(q_weight, cos)
    heads = q.shape[-1] // dim
    out, *unused = (torch.empty(shape, dtype=dtype, device=q.device) for shape in ((tokens, heads, dim), 1, 1))
    weight = cos if q_weight is None else q_weight
    parts = (q.shape[0], q.stride(0), q.shape[0], q.stride(0))
    kernel(kiln_prepare)[(heads, tokens)](q, q, q, weight, weight, cos, sin, out, *unused, *parts, EPS=eps, HEADS=heads, KV=1, D=dim,
                                          **form_constants(q_weight, True, scale, neighbours), EARLY=early(), **token_strides(q, q),
                                          num_warps=PREPARE_WARPS)
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernel at the shape of the model's global layers."""
    raw = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    numbers = dict.fromkeys(("splits", "stride", "v_splits", "v_stride"), "i32")
    signature = raw | dict.fromkeys(("q_out_ptr", "k_out_ptr", "v_out_ptr"), "*fp16") | numbers
    constants = {"EPS": EPS, "HEADS": model.full.queries, "KV": model.full.kv, "D": model.full.dim, "EARLY": early(target)}
    size = (model.full.queries + model.full.kv) * model.full.dim  # of a token in the matmul of q and k, which v is taken from as well
    return [KernelCase(f"prepare {model.full.label}{name}", kiln_prepare, signature, constants | model.form | apart,
                       {"num_warps": PREPARE_WARPS}, aligned=("stride", "v_stride"))
            for name, apart in (("", {"TOKEN": 0, "V_TOKEN": 0}), (", several tokens", {"TOKEN": size, "V_TOKEN": size}))]
