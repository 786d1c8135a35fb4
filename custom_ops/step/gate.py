"""Gates between two matmuls: the parts of the first added up, their activation, times a value, in fixed point.

Of a per-layer embedding, by GELU; of attention's output, by a sigmoid, where a head's gate lies behind its query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.early import early, wait_for_earlier_kernels, waits
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.markers import gelu_mul
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import GROUP, extent_of, row_words, store_fixed
from kiln.custom_ops.weights.gemv_finish import gelu_tanh
from kiln.custom_ops.weights.gemv_kernels import sum_splits

BLOCK, WARPS = 256, 4
TOGETHER = 16  # parts in flight


@waits()
@triton.jit
def kiln_gate(gate, value, out, n, splits, stride, TERMS: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
              MANY: tl.constexpr, D: tl.constexpr, EXTENT: tl.constexpr):
    """BLOCK elements of gelu(sum of `splits` rows of gate, `stride` apart) * value [n], in fixed point. Grid (n / BLOCK, tokens).

    MANY: there are several tokens, whose n elements lie one after the other. D > 0: a sigmoid, the gate of each D values being the second
    half of 2 D elements.
    """
    if MANY:
        token = tl.program_id(1)
        gate += token * n
        value += token * n
        out += token * row_words(n, TERMS, EXTENT)
    wait_for_earlier_kernels(EARLY)
    first = tl.program_id(0) * BLOCK
    i = first + tl.arange(0, BLOCK)
    keep = i < n
    if D > 0:
        total = sum_splits(gate + i + (i // D + 1) * D, stride, splits, keep, BLOCK, TOGETHER)
        by = 1.0 / (1.0 + tl.exp(-total))
    else:
        total = sum_splits(gate + i, stride, splits, keep, BLOCK, TOGETHER)
        by = gelu_tanh(total)
    store_fixed(by * tl.load(value + i, keep, other=0.0).to(tl.float32), out, first // 32, n // 32, TERMS, BLOCK, EXTENT)


@kernel_op("kiln::gate_fixed", mutates_args=())
def gate_fixed(gate: torch.Tensor, value: torch.Tensor, terms: int) -> torch.Tensor:
    """gelu(gate) * value in fixed point of `terms` bytes, T rows of P; GELU is the one with tanh.

    gate float32 [S, P] of one token, [S, T, P] of several, to be summed over S; value float32 [T, P], P a multiple of 32. No token's bits
    depend on the others. ValueError when a shape or dtype does not fit.
    """
    tokens, p = value.shape if value.dim() == 2 else (0, 1)
    fits = gate.shape[1:] == (value.shape if tokens > 1 else value.shape[1:]) and gate.stride(-1) == 1 and tokens and not p % GROUP
    if not fits or gate.dtype != torch.float32 or value.dtype != torch.float32 or (tokens > 1 and gate.stride(1) != p):
        given = f"gate is {gate.dtype} {tuple(gate.shape)}, value {value.dtype} {tuple(value.shape)}"
        raise ValueError(f"gate_fixed: {given}; expected float32 [S, P] and [1, P], or [S, T, P] and [T, P], P a multiple of {GROUP}")
    if not use_triton(gate):
        return fixed_point.quantize(gelu_mul(gate.sum(0).view(tokens, p), value), terms)
    out = fixed_point.empty(tokens, p, terms, extent_of(p, BLOCK), gate)
    kernel(kiln_gate)[(triton.cdiv(p, BLOCK), tokens)](gate, value.contiguous(), out, p, gate.shape[0], gate.stride(0),
                                                       **_constants(terms, p, tokens=tokens), num_warps=WARPS)
    return out


@kernel_op("kiln::attention_gate_fixed", mutates_args=())
def attention_gate_fixed(q: torch.Tensor, value: torch.Tensor, terms: int) -> torch.Tensor:
    """sigmoid(gate) * value in fixed point of `terms` bytes, a row of H D.

    value [1, H, D] of floats, attention's output; q float32 [S, H 2 D], to be summed over S, of each head D of its query and the D of its
    gate. ValueError when a shape or dtype does not fit.
    """
    tokens, heads, dim = value.shape if value.dim() == 3 else (0, 1, 1)
    if q.dim() != 2 or q.shape[1] != 2 * heads * dim or q.dtype != torch.float32 or q.stride(1) != 1 or tokens != 1 or dim % GROUP:
        given = f"q is {q.dtype} {tuple(q.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"attention_gate_fixed: {given}; expected float32 [S, H * 2 D] and [1, H, D], D a multiple of {GROUP}")
    if not use_triton(q):
        gate = q.sum(0).view(heads, 2, dim)[:, 1]
        return fixed_point.quantize((value[0].float() * gate.sigmoid()).view(1, -1), terms)
    n = heads * dim
    out = fixed_point.empty(1, n, terms, extent_of(n, BLOCK), q)
    kernel(kiln_gate)[(triton.cdiv(n, BLOCK), 1)](q, value.contiguous(), out, n, q.shape[0], q.stride(0), **_constants(terms, n, dim=dim),
                                                  num_warps=WARPS)
    return out


def _constants(terms: int, n: int, target: GpuTarget | None = None, tokens: int = 1, dim: int = 0) -> dict[str, int | bool]:
    return {"MANY": tokens > 1, "TERMS": terms, "BLOCK": BLOCK, "TOGETHER": TOGETHER, "EARLY": early(target), "D": dim,
            "EXTENT": extent_of(n, BLOCK)}  # fmt: skip


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernel, which no shape of a model changes."""
    types = {"gate": "*fp32", "value": "*fp32", "out": "*i32", "n": "i32", "splits": "i32", "stride": "i32"}
    of_attention = KernelCase("gate of attention", kiln_gate, types | {"value": "*fp16"}, _constants(2, 8192, target, dim=256),
                              {"num_warps": WARPS}, (90,), ("n", "stride"))
    return [KernelCase("gate", kiln_gate, types, _constants(2, 256, target), {"num_warps": WARPS}, aligned=("n", "stride")), of_attention]
