"""Causal attention over a TQ4 cache (`custom_ops/tq4.py`): queries and output are rotated once, cached vectors never."""

from __future__ import annotations

import torch
from torch.library import triton_op

from custom_ops import tq4
from custom_ops.flash import attend, check_heads
from custom_ops.global_attention import causal_mask
from custom_ops.launch import use_triton


def reference(q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
              pos: torch.Tensor, kv_len: torch.Tensor | None) -> torch.Tensor:
    """The op in plain torch; arguments as `tq4_attention`."""
    k = tq4.decode_rotated(k_codes, k_scales).transpose(0, 1)
    v = tq4.decode_rotated(v_codes, v_scales).transpose(0, 1)
    out = attend(tq4.rotate(q.to(torch.float32)), k, v, causal_mask(k_codes.shape[1], pos, kv_len))
    return tq4.unrotate(out).to(q.dtype)


@triton_op("kiln::tq4_attention", mutates_args=())
def tq4_attention(q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
                  pos: torch.Tensor, kv_len: torch.Tensor | None) -> torch.Tensor:
    """Causal attention with scale 1 over a TQ4 cache: slot j is attended to iff j <= pos of the query.

    q [T, H, D]; k_codes, v_codes int16 [KV, S, D/4] and k_scales, v_scales float16 [KV, S], holding the chunk already; pos [T] int64,
    consecutive; kv_len int32 [1], pos[-1] + 1 on the device, or None: it bounds the sweep and changes no result.
    Slots past pos[-1] may hold anything. Returns [T, H, D] in q's dtype. Raises ValueError when the head counts or dimensions do not fit.
    """
    check_heads("tq4_attention", q, k_codes.shape[0], 4 * k_codes.shape[2])
    tq4.check_dim(q.shape[2])
    if not use_triton(q):
        return reference(q, k_codes, k_scales, v_codes, v_scales, pos, kv_len)
    raise NotImplementedError("tq4_attention has no kernel for this device yet")
