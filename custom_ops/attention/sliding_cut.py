"""How the attention of a few tokens over a ring is cut: tiles by architecture and the constants of its kernels."""

from __future__ import annotations

import torch
import triton

from kiln.custom_ops.attention.flash import DECODE_FLOAT32, Tile, decode_constants
from kiln.custom_ops.gpu.tables import pick
from kiln.custom_ops.gpu.target import GpuTarget

# By (architecture, largest head dimension), see `gpu/tables.py`; measured on sm_90, elsewhere what fits. 16-bit keys and values.
SLIDING_TILES = {
    (86, 256): Tile(keys=32, warps=8, stages=1),
    (86, 512): Tile(keys=16, warps=8, stages=1),
    (90, 256): Tile(keys=64, warps=4, stages=1),
    (90, 512): Tile(keys=32, warps=8, stages=1),
}


def tile_of(dtype: torch.dtype, target: GpuTarget, dim: int) -> Tile:
    return DECODE_FLOAT32 if dtype == torch.float32 else pick(SLIDING_TILES, target, dim)


def constants(tile: Tile, target: GpuTarget, heads: int, kv_heads: int, dim: int, slots: int, window: int, parts: int, v_parts: int,
              terms: int, v_norm: bool = True, scale: float = 1.0, shared: bool = False) -> tuple[dict, dict]:
    """The constants of `kiln_sliding_decode` and of `kiln_flash_merge`."""
    split, merge = decode_constants(tile, target, heads, kv_heads, dim, slots, window, False, own=True, terms=terms)
    del split["HAS_LEN"], split["ROW"]
    pads = {"PARTS_PAD": triton.next_power_of_2(parts), "V_PARTS_PAD": triton.next_power_of_2(v_parts)}
    ahead = tile is not DECODE_FLOAT32  # its matmuls, out of registers, leave none for keys ahead
    form = {"V_NORM": v_norm, "SCALE": scale, "SHARED": shared, "ROWS": triton.next_power_of_2(heads // kv_heads)}
    one = {"TOKEN": 0, "V_TOKEN": 0, "WRITE": False}
    return split | pads | form | one | {"AHEAD": ahead, "PARTS": parts, "V_PARTS": v_parts}, merge
