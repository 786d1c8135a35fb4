"""What attention of a few tokens takes, from their raw projections: norms and rotary embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, GEOMETRIES, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton, vector_warps
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.markers import rms_norm, rope
from kiln.custom_ops.weights.gemv_kernels import sum_splits

PREPARE_WARPS = 8  # at most


def prepare_warps(dim: int) -> int:
    return vector_warps(dim // 2, PREPARE_WARPS)


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
                  SCALE: tl.constexpr, NEIGHBOURS: tl.constexpr, EARLY: tl.constexpr, GATED: tl.constexpr = False,
                  TURNED: tl.constexpr = 0):
    """Both halves, float32 [D / 2], of head `head` of queries, keys and values: RMSNorm and, but for values, weight and rotary embedding.

    A projection is the sum of `splits` parts, `stride` elements apart (q and k alike). Without QK_NORM queries and keys have no norm and no
    weight, without V_NORM values have none. Queries are multiplied by SCALE. NEIGHBOURS: as `markers.rope`. GATED: behind each query of q
    lies the gate of its head's output. TURNED: of so many dimensions, the first, the halves turn; 0: all.
    """
    if TURNED > 0:
        return _turned_in_part(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride,
                               EPS, HEADS, KV, D, V_NORM, SCALE, EARLY, GATED, TURNED)
    else:
        return _turned(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride, EPS,
                       HEADS, KV, D, QK_NORM, V_NORM, SCALE, NEIGHBOURS, EARLY, GATED)


@triton.jit
def _turned_in_part(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride,
                    EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, V_NORM: tl.constexpr, SCALE: tl.constexpr,
                    EARLY: tl.constexpr, GATED: tl.constexpr, TURNED: tl.constexpr):
    """`prepared_head` with norms, where TURNED dimensions turn: each element is loaded with the one that it turns with."""
    PAIRS: tl.constexpr = TURNED // 2
    rotated = head < HEADS + KV
    dim = tl.arange(0, D)
    other = tl.where(dim < PAIRS, dim + PAIRS, tl.where(dim < TURNED, dim - PAIRS, dim))
    weight = tl.where(head < HEADS, q_weight_ptr, k_weight_ptr)
    own_weight = tl.load(weight + dim, rotated, other=1.0)
    other_weight = tl.load(weight + other, rotated, other=1.0)
    wait_for_earlier_kernels(EARLY)
    parts = splits
    step = stride
    if head < HEADS:
        source = q_ptr + head * (2 * D if GATED else D)
    elif rotated:
        source = k_ptr + (head - HEADS) * D
    else:
        source = v_ptr + (head - HEADS - KV) * D
        parts = v_splits
        step = v_stride
    x = sum_splits(source + dim, step, parts, None, D, TOGETHER=16)
    y = sum_splits(source + other, step, parts, None, D, TOGETHER=16)
    turns = (dim < TURNED) & rotated
    cos = tl.load(cos_ptr + dim % PAIRS, turns, other=1.0)
    sin = tl.load(sin_ptr + dim % PAIRS, turns, other=0.0)
    norm = tl.rsqrt(tl.sum(x * x, 0) / D + EPS)
    if not V_NORM:
        norm = tl.where(rotated, norm, 1.0)
    x = x * norm * own_weight * cos + y * norm * other_weight * tl.where(dim < PAIRS, -sin, sin)
    if SCALE != 1:
        x *= tl.where(head < HEADS, SCALE, 1.0)
    return tl.split(tl.permute(tl.reshape(x, [2, D // 2]), [1, 0]))


@triton.jit
def _turned(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride, EPS: tl.constexpr,
            HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr, V_NORM: tl.constexpr, SCALE: tl.constexpr,
            NEIGHBOURS: tl.constexpr, EARLY: tl.constexpr, GATED: tl.constexpr):
    """`prepared_head` where all of a head turns."""
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
        source = q_ptr + head * (2 * D if GATED else D)
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
                   V_TOKEN: tl.constexpr, GATED: tl.constexpr, TURNED: tl.constexpr):
    """`prepared_head` of each token. Grid (HEADS + 2 KV, tokens). TOKEN, V_TOKEN: of several, elements from one to the next; 0 of one."""
    head = tl.program_id(0)
    if TOKEN > 0:
        token = tl.program_id(1)
        q_ptr += token * TOKEN
        k_ptr += token * TOKEN
        v_ptr += token * V_TOKEN
        cos_ptr += token * ((TURNED if TURNED > 0 else D) // 2)
        sin_ptr += token * ((TURNED if TURNED > 0 else D) // 2)
        q_out_ptr += token * (HEADS * D)
        k_out_ptr += token * (KV * D)
        v_out_ptr += token * (KV * D)
    a, b = prepared_head(head, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, splits, stride, v_splits, v_stride,
                         EPS, HEADS, KV, D, QK_NORM, V_NORM, SCALE, NEIGHBOURS, EARLY, GATED, TURNED)
    if head < HEADS:
        target = q_out_ptr + head * D
    elif head < HEADS + KV:
        target = k_out_ptr + (head - HEADS) * D
    else:
        target = v_out_ptr + (head - HEADS - KV) * D
    dim = tl.arange(0, D // 2)
    tl.store(target + dim, a)
    tl.store(target + D // 2 + dim, b)


def form_constants(q_weight: torch.Tensor | None, v_norm: bool, scale: float, neighbours: bool = False, cos: torch.Tensor | None = None,
                   gated: bool = False) -> dict:
    """What `prepared_head` is told of a model's form. cos: of what may turn in part."""
    turned = 0 if cos is None or q_weight is None or 2 * cos.shape[1] == q_weight.shape[0] else 2 * cos.shape[1]
    return {"QK_NORM": q_weight is not None, "V_NORM": v_norm, "SCALE": scale, "NEIGHBOURS": neighbours, "GATED": gated, "TURNED": turned}


def queries_of(q: torch.Tensor, dim: int, gated: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [..., H dim]; gated: of [..., H 2 dim] the queries, and the gates behind each of them, [..., H dim] both."""
    if not gated:
        return q, None
    query, gate = q.unflatten(-1, (-1, 2, dim)).unbind(-2)
    return query.flatten(-2), gate.flatten(-2)


def check_projections(op: str, q, k, v, q_weight, k_weight, cos, part: bool = False, gated: bool = False) -> int:
    """How many tokens there are; ValueError where the projections [S, heads * D] of one, [S, T, heads * D] of any number, do not fit.

    part: a part of each head may turn, by cos [T, turned / 2]. gated: q has 2 D for each head.
    """
    dim, tokens = head_dim(q_weight, cos), q.shape[1] if q.dim() == 3 else 1
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: a norm's weight for q or k alone; expected both or none")
    sizes = [x.shape[-1] for x in (q, k, v)]
    if gated:
        if sizes[0] % (2 * dim):
            raise ValueError(f"{op}: q has {sizes[0]} elements; expected a query and a gate of {dim} for each head")
        sizes[0] //= 2
    if any(x.dtype != torch.float32 or x.stride(-1) != 1 for x in (q, k, v)) or any(s % dim for s in sizes) or sizes[1] != sizes[2]:
        raise ValueError(f"{op}: q, k, v have {sizes} elements; expected float32, whole heads of {dim}, as many keys as values")
    turned = 2 * cos.shape[-1]
    pairs = turned // 2 if part and q_weight is not None and 0 < turned < dim and not turned & (turned - 1) else dim // 2
    if sizes[0] % sizes[1] or cos.shape != (tokens, pairs):
        raise ValueError(f"{op}: {sizes[0] // dim} heads to {sizes[1] // dim}, cos {tuple(cos.shape)}; expected [{tokens}, {dim // 2}]")
    if q.shape[0] != k.shape[0] or (q.shape[0] > 1 and q.stride(0) != k.stride(0)):
        raise ValueError(f"{op}: q has {q.shape[0]} parts {q.stride(0)} apart, k {k.shape[0]}, {k.stride(0)}; expected the same")
    apart = tokens > 1 and q.stride(1) != k.stride(1)
    if apart or q.dim() not in (2, 3) or any(x.shape[1:-1] != q.shape[1:-1] for x in (q, k, v)):
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


@kernel_op("kiln::rope_table", mutates_args=())
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


@kernel_op("kiln::prepare_qkv", mutates_args=())
def prepare_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
                cos: torch.Tensor, sin: torch.Tensor, eps: float, dtype: torch.dtype, scale: float = 1.0, v_norm: bool = True,
                neighbours: bool = False, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections, float32 [S, heads * D] of one token, [S, T, heads * D] of several, to be summed over S, to what attention takes:
    [T, heads, D] in dtype each. No token's bits depend on the others.

    q and k: RMSNorm over D, times weight float32 [D], neither without weights; rotary embedding by cos, sin float32 [T, D / 2] (as
    `markers.rope`; with weights [T, R / 2], R a power of two, of which then the first R dimensions turn), q then times scale. v: RMSNorm if
    `v_norm`. gated: q is [S, heads * 2 D], behind each query a gate, which is left out here. ValueError when a shape does not fit.
    """
    tokens = check_projections("prepare_qkv", q, k, v, q_weight, k_weight, cos, part=not neighbours, gated=gated)
    dim = head_dim(q_weight, cos)
    if not use_triton(q):
        q, _ = queries_of(q, dim, gated)
        return prepare_reference(q, k, v, q_weight, k_weight, cos, sin, eps, dtype, scale, v_norm, neighbours)
    sizes = (q.shape[-1] // (2 if gated else 1), k.shape[-1], v.shape[-1])
    outs = [torch.empty((tokens, size // dim, dim), dtype=dtype, device=q.device) for size in sizes]
    heads, kv_heads = (x.shape[1] for x in outs[:2])
    parts = (q.shape[0], q.stride(0), v.shape[0], v.stride(0))
    weights = (cos if w is None else w for w in (q_weight, k_weight))  # what is not read is any pointer
    kernel(kiln_prepare)[(heads + 2 * kv_heads, tokens)](q, k, v, *weights, cos, sin, *outs, *parts, EPS=eps, HEADS=heads, KV=kv_heads,
                                                         D=dim, **form_constants(q_weight, v_norm, scale, neighbours, cos, gated),
                                                         EARLY=early(), **token_strides(q, v), num_warps=prepare_warps(dim))
    return outs[0], outs[1], outs[2]


@kernel_op("kiln::prepare_q", mutates_args=())
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
                                          num_warps=prepare_warps(dim))
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernel at the shape of the model's global layers."""
    raw = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    numbers = dict.fromkeys(("splits", "stride", "v_splits", "v_stride"), "i32")
    signature = raw | dict.fromkeys(("q_out_ptr", "k_out_ptr", "v_out_ptr"), "*fp16") | numbers
    constants = {"EPS": EPS, "HEADS": model.full.queries, "KV": model.full.kv, "D": model.full.dim, "EARLY": early(target)}
    size = (model.full.queries + model.full.kv) * model.full.dim  # of a token in the matmul of q and k, which v is taken from as well
    forms = [("", model.form, {"TOKEN": 0, "V_TOKEN": 0}), (", several tokens", model.form, {"TOKEN": size, "V_TOKEN": size})]
    if model is GEMMA4_31B:
        forms.append((", gated, turned in part", GEOMETRIES["qwen35-27b"].form, {"TOKEN": 0, "V_TOKEN": 0}))
    return [KernelCase(f"prepare {model.full.label}{name}", kiln_prepare, signature, constants | form | apart,
                       {"num_warps": prepare_warps(model.full.dim)}, aligned=("stride", "v_stride")) for name, form, apart in forms]
