"""TQ4 for a step of M tokens, each of one of B timelines whose caches lie side by side: as `tq4_write` and `tq4_attention` of one token.

In plain torch on every device: for a GPU `fuse_decode` puts `tq4_decode_rows` in their place, or the export ends.
"""

from __future__ import annotations

import torch

from kiln.custom_ops.attention.global_attention import causal_mask
from kiln.custom_ops.attention.row_attention import attend_rows, check_rows, in_window, ring_positions
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.tq4 import codec
from kiln.custom_ops.tq4.center import added_by_halves, center_keys, check_center, one_or_none


def _check(op: str, x: torch.Tensor, codes: torch.Tensor) -> None:
    codec.check_dim(x.shape[2])
    if codes.dim() != 4 or x.shape[2] != 4 * codes.shape[3] or x.shape[1] % codes.shape[1]:
        raise ValueError(f"{op}: heads are {tuple(x.shape)}, codes {tuple(codes.shape)}; expected [M, heads, D] and [B, KV, S, D/4]")


def write_rows(caches: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, row: torch.Tensor,
               k_center: torch.Tensor | None, k_exact: torch.Tensor, exact_window: int, alone: bool = False) -> None:
    """The op in plain torch; arguments as `tq4_write_rows`. alone: a token's vectors are encoded by themselves."""
    at_key, at_value = pos, pos
    if k_center is not None:
        count, late = center_keys(exact_window), pos - (exact_window - 1)
        k = k_exact[row, late % k_exact.shape[1]].to(torch.float32) - k_center[row]  # a center of an earlier step
        mean = added_by_halves(k_exact[row, :count].transpose(0, 1).to(torch.float32)) / count
        made = ((row[:, None] == row) & (pos == count - 1)).any(1)  # equal for all tokens of a row, which write the same
        k_center.index_put_((row,), torch.where(made[:, None, None], mean, k_center[row]))
        at_key = late % caches[0].shape[2]  # before there is a key to code: a slot at the end, which no query reads
    heads = torch.arange(k.shape[1], device=pos.device)
    for codes, scales, x, at in ((*caches[:2], k, at_key), (*caches[2:], v, at_value)):
        encoded = [torch.cat(part) for part in zip(*map(codec.encode, x.split(1)), strict=True)] if alone else codec.encode(x)
        for cache, new in zip((codes, scales), encoded, strict=True):
            cache.index_put_((row[:, None], heads, at[:, None]), new)  # [M, KV]


@kernel_op("kiln::tq4_write_rows", mutates_args={"k_codes", "k_scales", "v_codes", "v_scales", "center"})
def tq4_write_rows(k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor, k: torch.Tensor,
                   v: torch.Tensor, pos: torch.Tensor, row: torch.Tensor, center: list[torch.Tensor],
                   k_exact: torch.Tensor | None = None, exact_window: int = 0) -> None:
    """Encode a step's keys and values into the caches of their rows, in place, at their positions.

    k_codes, v_codes int16 [B, KV, S, D/4]; k_scales, v_scales float16 [B, KV, S]; k, v [M, KV, D]; pos, row [M] int64. Tokens of one row
    and position must be the same. With a center, float32 [B, KV, D], and k_exact [B, R, KV, D], which holds the step's keys already: as
    `tq4_write` with them. Raises ValueError when the dimensions do not fit.
    """
    _check("tq4_write_rows", k, k_codes)
    check_rows("tq4_write_rows", k.shape[0], pos, row)
    k_center = one_or_none("tq4_write_rows", center)
    check_center("tq4_write_rows", k_center, k_codes, exact_window, k_exact, k.shape[0])
    write_rows((k_codes, k_scales, v_codes, v_scales), k, v, pos, row, k_center, k if k_exact is None else k_exact, exact_window)


@kernel_op("kiln::tq4_rows", mutates_args=())
def tq4_rows(q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
             k_exact: torch.Tensor, v_exact: torch.Tensor, pos: torch.Tensor, row: torch.Tensor, exact_window: int,
             k_center: torch.Tensor | None = None) -> torch.Tensor:
    """`tq4_attention` of each token to the caches of its row, which hold the step's keys and values already.

    q [M, H, D]; codes and scales as `tq4_write_rows`; k_exact, v_exact [B, R, KV, D] in q's dtype: slot s of a row holds its latest
    position p with p % R == s; R is no less than exact_window + M - 1; pos, row [M] int64; k_center float32 [B, KV, D], which keys were
    coded less, or None. Returns [M, H, D] in q's dtype. ValueError when the dimensions do not fit.
    """
    _check("tq4_rows", q, k_codes)
    check_rows("tq4_rows", q.shape[0], pos, row)
    batch, _, kv_heads, dim = k_exact.shape
    if k_exact.shape != v_exact.shape or (batch, kv_heads, dim) != (k_codes.shape[0], k_codes.shape[1], q.shape[2]):
        raise ValueError(f"tq4_rows: exact windows {tuple(k_exact.shape)} and {tuple(v_exact.shape)}; codes {tuple(k_codes.shape)}")
    check_center("tq4_rows", k_center, k_codes, exact_window, k_exact, q.shape[0])
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = ring_positions(k_exact.shape[1], pos)
    slot = row[:, None], keys % k_exact.shape[1]
    sides = []
    for codes, scales, ring, center in ((k_codes, k_scales, k_exact, k_center), (v_codes, v_scales, v_exact, None)):
        coded = codec.decode_rotated(codes[row], scales[row]).transpose(1, 2).to(compute)  # [M, S, KV, D]
        coded = coded if center is None else coded + codec.rotate(center[row].to(compute))[:, None]
        sides.append(torch.cat([coded, codec.rotate(ring[slot].to(compute))], 1))
    mask = torch.cat([causal_mask(k_codes.shape[2], pos - exact_window, None), in_window(pos, keys, exact_window)], 1)
    return codec.unrotate(attend_rows(codec.rotate(q.to(compute)), *sides, mask)).to(q.dtype)
