"""Sliding-window attention of a chunk of tokens to its own keys and values and to a ring of past ones."""

from __future__ import annotations

import torch

from kiln.custom_ops.attention.flash import attend, check_heads, flash_attention, flash_cases
from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, pos: torch.Tensor,
              window: int) -> torch.Tensor:
    """The op in plain torch; arguments as `sliding_attention`."""
    slots = k_ring.shape[0]
    past = torch.arange(slots, device=pos.device) - slots + pos[0]  # position order, so a ring equals the tail of a full cache bit for bit
    slot = past % slots
    keys = torch.cat([k_ring[slot], k])
    values = torch.cat([v_ring[slot], v])
    key_pos = torch.cat([past, pos])
    distance = pos[:, None] - key_pos[None, :]  # [T, slots + T]
    return attend(q, keys, values, (distance >= 0) & (distance < window) & (key_pos >= 0))


@kernel_op("kiln::sliding_attention", mutates_args=())
def sliding_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, pos: torch.Tensor,
                      window: int) -> torch.Tensor:
    """Attention with mask 0 <= pos_q - pos_k < window and scale 1; the ring is read, never written.

    q [T, H, D]; k, v [T, KV, D]: the chunk's own; k_ring, v_ring [R, KV, D]: slot s holds the latest position p < pos[0] with p % R == s,
    anything at all where there is no such p; R = min(window, max_seq_len); pos [T] int64, consecutive. Returns [T, H, D] in q's dtype.
    Raises ValueError when the head counts or dimensions do not fit.
    """
    check_heads("sliding_attention", q, k_ring.shape[1], k_ring.shape[2])
    if not use_triton(q):
        return reference(q, k, v, k_ring, v_ring, pos, window)
    return flash_attention(q, k, v, k_ring, v_ring, pos, None, window)


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The kernels at the model's shapes."""
    if model.sliding is None:
        return []
    return flash_cases("sliding_attention", target, model.sliding, slots=model.window, window=model.window)
