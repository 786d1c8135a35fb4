"""What the attention ops share: the plain attention their references end in, and (below) the pieces of their kernels."""

from __future__ import annotations

import torch


def check_heads(op: str, q: torch.Tensor, kv_heads: int, head_dim: int) -> None:
    """`q` is [T, H, D] with D the cache's head dimension and H a multiple of its heads; ValueError otherwise."""
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % kv_heads:
        raise ValueError(f"{op}: q is {tuple(q.shape)}; expected [T, a multiple of {kv_heads} heads, {head_dim}]")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Plain grouped-query attention with scale 1: q [T, H, D], k and v [N, KV, D], mask [T, N] (True: attend) -> [T, H, D] in q's dtype.

    Head j uses KV head j // (H / KV). Computed in float32 (float64 for float64 q). Keys that no query attends to may hold anything,
    NaN included.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    used = mask.any(0)[:, None, None]
    k = torch.where(used, k, 0).to(compute)
    v = torch.where(used, v, 0).to(compute)  # 0 * NaN is NaN: a masked value must be zeroed, not only weighted by 0
    grouped = q.to(compute).view(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)  # [KV, G, T, D]
    scores = torch.matmul(grouped, k.permute(1, 2, 0).unsqueeze(1))  # [KV, G, T, N]
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    out = torch.matmul(weights, v.permute(1, 0, 2).unsqueeze(1))  # [KV, G, T, D]
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, dim).to(q.dtype)
