"""TQ4 for a step of M tokens, each of one of B timelines whose caches lie side by side: as `tq4_write` and `tq4_attention` of one token.

In plain torch on every device: for a GPU `fuse_decode` puts `tq4_decode_rows` in their place, or the export ends.
"""

from __future__ import annotations

import torch
from torch.library import triton_op

from kiln.custom_ops.attention.global_attention import causal_mask
from kiln.custom_ops.attention.row_attention import attend_rows, check_rows, in_window, ring_positions
from kiln.custom_ops.tq4 import codec


def _check(op: str, x: torch.Tensor, codes: torch.Tensor) -> None:
    codec.check_dim(x.shape[2])
    if codes.dim() != 4 or x.shape[2] != 4 * codes.shape[3] or x.shape[1] % codes.shape[1]:
        raise ValueError(f"{op}: heads are {tuple(x.shape)}, codes {tuple(codes.shape)}; expected [M, heads, D] and [B, KV, S, D/4]")


@triton_op("kiln::tq4_write_rows", mutates_args={"k_codes", "k_scales", "v_codes", "v_scales"})
def tq4_write_rows(k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k: torch.Tensor,
                   v: torch.Tensor, pos: torch.Tensor, row: torch.Tensor) -> None:
    """Encode a step's keys and values into the caches of their rows, in place, at their positions.

    k_codes, v_codes int16 [B, KV, S, D/4]; k_scales, v_scales float16 [B, KV, S]; k, v [M, KV, D]; pos, row [M] int64. Tokens of one row
    and position must be the same. Raises ValueError when the dimensions do not fit.
    """
    _check("tq4_write_rows", k, k_codes)
    check_rows("tq4_write_rows", k.shape[0], pos, row)
    index = row[:, None], torch.arange(k.shape[1], device=pos.device), pos[:, None]  # [M, KV]
    for codes, scales, x in ((k_codes, k_scales, k), (v_codes, v_scales, v)):
        new_codes, new_scales = codec.encode(x)
        codes.index_put_(index, new_codes)
        scales.index_put_(index, new_scales)


@triton_op("kiln::tq4_rows", mutates_args=())
def tq4_rows(q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
             k_exact: torch.Tensor, v_exact: torch.Tensor, pos: torch.Tensor, row: torch.Tensor, exact_window: int) -> torch.Tensor:
    """`tq4_attention` of each token to the caches of its row, which hold the step's keys and values already.

    q [M, H, D]; codes and scales as `tq4_write_rows`; k_exact, v_exact [B, R, KV, D] in q's dtype: slot s of a row holds its latest
    position p with p % R == s; R is no less than exact_window + M - 1; pos, row [M] int64. Returns [M, H, D] in q's dtype. ValueError when
    the dimensions do not fit.
    """
    _check("tq4_rows", q, k_codes)
    check_rows("tq4_rows", q.shape[0], pos, row)
    batch, _, kv_heads, dim = k_exact.shape
    if k_exact.shape != v_exact.shape or (batch, kv_heads, dim) != (k_codes.shape[0], k_codes.shape[1], q.shape[2]):
        raise ValueError(f"tq4_rows: exact windows {tuple(k_exact.shape)} and {tuple(v_exact.shape)}; codes {tuple(k_codes.shape)}")
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = ring_positions(k_exact.shape[1], pos)
    slot = row[:, None], keys % k_exact.shape[1]
    sides = []
    for codes, scales, ring in ((k_codes, k_scales, k_exact), (v_codes, v_scales, v_exact)):
        coded = codec.decode_rotated(codes[row], scales[row]).transpose(1, 2).to(compute)  # [M, S, KV, D]
        sides.append(torch.cat([coded, codec.rotate(ring[slot].to(compute))], 1))
    mask = torch.cat([causal_mask(k_codes.shape[2], pos - exact_window, None), in_window(pos, keys, exact_window)], 1)
    return codec.unrotate(attend_rows(codec.rotate(q.to(compute)), *sides, mask)).to(q.dtype)
