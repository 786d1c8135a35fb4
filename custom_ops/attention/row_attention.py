"""Attention of M tokens, each of one of B timelines whose caches lie side by side, in the order of a step of one token.

All of a step's keys are in the caches before any of its tokens attends: token i attends to token j of the same step iff they are of one
row and pos[j] <= pos[i]. The plain form adds up what `sliding_attention` and `global_attention` add up for one token, in the same order of
keys, so that a token's result is theirs bit for bit, whatever tokens come with it. On a GPU `global_rows` has a kernel; `fuse_decode` puts
an op with kernels in the place of `sliding_rows`, or the export ends.
"""

from __future__ import annotations

import torch

from kiln.custom_ops.attention.flash import flash_rows
from kiln.custom_ops.attention.global_attention import causal_mask
from kiln.custom_ops.gpu.launch import use_triton
from kiln.custom_ops.gpu.op import kernel_op


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`flash.attend` of each token to keys of its own: q [M, H, D], k and v [M, N, KV, D], mask [M, N] -> [M, H, D] in q's dtype."""
    tokens, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    compute = torch.promote_types(q.dtype, torch.float32)
    used = mask[:, :, None, None]
    k, v = (torch.where(used, x, 0).to(compute).transpose(1, 2).reshape(tokens * kv_heads, keys, dim) for x in (k, v))
    grouped = q.to(compute).reshape(tokens * kv_heads, heads // kv_heads, dim)
    scores = torch.bmm(grouped, k.transpose(1, 2)).unflatten(0, (tokens, kv_heads))  # [M, KV, G, N]
    weights = torch.softmax(scores.masked_fill(~mask[:, None, None, :], float("-inf")), dim=-1)
    return torch.bmm(weights.flatten(0, 1), v).to(q.dtype).reshape(tokens, heads, dim)


def ring_positions(slots: int, pos: torch.Tensor) -> torch.Tensor:
    """[M, slots + 1]: those that a ring of `slots` may hold before pos, in order, then pos: what one token's attention has as its keys. The
    first shares its slot with pos, and no window reaches it."""
    return torch.arange(slots + 1, device=pos.device) - slots + pos[:, None]


def in_window(pos: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """[M, N] of positions `keys`."""
    distance = pos[:, None] - keys
    return (distance >= 0) & (distance < window) & (keys >= 0)


def _check(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, row: torch.Tensor) -> None:
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{op}: caches are {tuple(k.shape)} and {tuple(v.shape)}; expected [B, slots, KV, D] twice")
    if q.dim() != 3 or q.shape[2] != k.shape[3] or q.shape[1] % k.shape[2]:
        raise ValueError(f"{op}: q is {tuple(q.shape)}; expected [M, a multiple of {k.shape[2]} heads, {k.shape[3]}]")
    check_rows(op, q.shape[0], pos, row)


def check_rows(op: str, tokens: int, pos: torch.Tensor, row: torch.Tensor) -> None:
    """ValueError unless pos and row are int64 [tokens]."""
    for name, x in (("pos", pos), ("row", row)):
        if x.dtype != torch.int64 or x.shape != (tokens,):
            raise ValueError(f"{op}: {name} is {x.dtype} {tuple(x.shape)}; expected int64 [{tokens}]")


@kernel_op("kiln::sliding_rows", mutates_args=())
def sliding_rows(q: torch.Tensor, k_ring: torch.Tensor, v_ring: torch.Tensor, pos: torch.Tensor, row: torch.Tensor,
                 window: int) -> torch.Tensor:
    """Attention with mask 0 <= pos_q - pos_k < window and scale 1 to the ring of each token's row, which holds its own key already.

    q [M, H, D]; k_ring, v_ring [B, R, KV, D]: slot s of a row holds its latest position p with p % R == s, of those that were written; R is
    no less than window + M - 1 or no position reaches it. pos, row [M] int64. Returns [M, H, D] in q's dtype. ValueError when a shape does
    not fit.
    """
    _check("sliding_rows", q, k_ring, v_ring, pos, row)
    keys = ring_positions(k_ring.shape[1], pos)
    slot = row[:, None], keys % k_ring.shape[1]
    return attend_rows(q, k_ring[slot], v_ring[slot], in_window(pos, keys, window))


@kernel_op("kiln::global_rows", mutates_args=())
def global_rows(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pos: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Causal attention with scale 1 to the cache of each token's row: slot j is attended to iff j <= pos of the query.

    q [M, H, D]; k_cache, v_cache [B, S, KV, D], holding the step's keys already; pos, row [M] int64. Slots past pos may hold anything.
    Returns [M, H, D] in q's dtype. ValueError when a shape does not fit.
    """
    _check("global_rows", q, k_cache, v_cache, pos, row)
    if use_triton(q):
        return flash_rows(q, k_cache, v_cache, pos, row)
    return attend_rows(q, k_cache[row], v_cache[row], causal_mask(k_cache.shape[1], pos, None))
