"""Causal attention of a chunk of tokens to a cache that already holds them."""

from __future__ import annotations

import torch

from kiln.custom_ops.attention.flash import attend, check_heads, flash_attention, flash_cases
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import CONTEXT, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget


def causal_mask(slots: int, pos: torch.Tensor, kv_len: torch.Tensor | None) -> torch.Tensor:
    """[T, slots]: slot j is attended to iff j <= pos of the query, and j < kv_len when that is given."""
    slot = torch.arange(slots, device=pos.device)
    mask = slot[None, :] <= pos[:, None]
    return mask if kv_len is None else mask & (slot < kv_len)[None, :]


def reference(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pos: torch.Tensor,
              kv_len: torch.Tensor | None) -> torch.Tensor:
    """The op in plain torch; arguments as `global_attention`."""
    return attend(q, k_cache, v_cache, causal_mask(k_cache.shape[0], pos, kv_len))


@kernel_op("kiln::global_attention", mutates_args=())
def global_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pos: torch.Tensor,
                     kv_len: torch.Tensor | None) -> torch.Tensor:
    """Causal attention with scale 1: slot j of the cache is attended to iff j <= pos of the query.

    q [T, H, D]; k_cache, v_cache [S, KV, D], holding the chunk already; pos [T] int64, consecutive; kv_len int32 [1], pos[-1] + 1 on the
    device, or None: it bounds the sweep and changes no result. Slots past pos[-1] may hold anything. Returns [T, H, D] in q's dtype.
    Raises ValueError when the head counts or dimensions do not fit.
    """
    check_heads("global_attention", q, k_cache.shape[1], k_cache.shape[2])
    if not use_triton(q):
        return reference(q, k_cache, v_cache, pos, kv_len)
    return flash_attention(q, k_cache, v_cache, k_cache, v_cache, pos, kv_len, 0)


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes."""
    return flash_cases("global_attention", target, model.full, slots=CONTEXT, window=0)
