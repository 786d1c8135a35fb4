"""Constants of a decoder: matrices, norms and vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiln.custom_ops import ops  # noqa: F401  registers torch.ops.kiln
from kiln.custom_ops.dtypes import DTYPES, FLOATS
from kiln.custom_ops.weights.layouts import LAYOUTS
from kiln.exporter.source.weights import WeightPlan


def constant(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Matrix(nn.Module):
    """One weight [N, K] of the plan: packed planes of a block type, or a float tensor."""

    def __init__(self, plan: WeightPlan):
        super().__init__()
        self.block_type = plan.block_type
        if plan.block_type in LAYOUTS:
            layout = LAYOUTS[plan.block_type]
            groups = plan.K // layout.block
            self.words = constant(groups, layout.words, plan.N, dtype=torch.int32)
            self.halves = constant(groups, layout.halves, plan.N, dtype=DTYPES[layout.halves_dtype].torch)
        else:
            self.weight = constant(plan.N, plan.K, dtype=FLOATS[plan.block_type].torch)

    def linear(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        if self.block_type in LAYOUTS:
            return torch.ops.kiln.quantized_linear(x, self.words, self.halves, self.block_type)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)  # a float weight is never rounded
        return F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype)

    def chosen(self, x: Tensor, experts: Tensor, count: int) -> Tensor:  # [T, U or 1, K], numbers [T, U] -> [T, U, N / count]
        if self.block_type in LAYOUTS:
            return torch.ops.kiln.expert_linear(x, self.words, self.halves, self.block_type, experts, count)
        return torch.ops.kiln.expert_matmul(x, self.weight, experts, count)

    def rows(self, ids: Tensor) -> Tensor:  # [T] -> [T, K] float32
        if self.block_type in LAYOUTS:
            return torch.ops.kiln.quantized_embedding(ids, self.words, self.halves, self.block_type)
        return F.embedding(ids.clamp(min=0), self.weight).float()  # -1: this step is queued behind one that found no token


class Norm(nn.Module):
    """RMSNorm in float32; the epsilon is inside the root, the weight is stored as it is (no +1)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = constant(size, dtype=torch.float32)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # [..., size] -> the same, in `dtype`
        return torch.ops.kiln.rms_norm(x, self.weight, self.eps, dtype or x.dtype)


def vector(size: int) -> nn.Module:
    module = nn.Module()
    module.weight = constant(size, dtype=torch.float32)
    return module
