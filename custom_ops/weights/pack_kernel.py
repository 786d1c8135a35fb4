"""The Triton kernel that packs blocks of a GGUF file into one plane (see `layouts`) while a model is loaded, whatever their type.

It is given a type's `permutation` as a table, so one kernel for words and one for halves serve all types. The runner launches it behind
each copy to the GPU, which is slower by far. Blocks may lie at any byte.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import Geometry
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.weights.permutation import Unit

ROWS, UNITS, WARPS = 128, 4, 4  # rows and units of a step of a program
OVERRUN = 4  # bytes behind the last block that may be read
PLANES = {"words": "*i32", "halves": "*i16"}


@triton.jit
def kiln_pack_plane(raw, out, terms, counts, rows, row_bytes, block_bytes, n, units, grain, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Grid (row blocks, blocks of a row). raw uint8 [rows, row_bytes]; out [blocks of a row, units, n], at the plane's first row of these;
    terms, counts: `table`; grain: what the addresses of all pieces are multiples of, 4, 2 or 1."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g = tl.program_id(1)
    inside = (r < rows)[:, None]
    raw += r.to(tl.int64)[:, None] * row_bytes + g * block_bytes
    out += g.to(tl.int64) * units * n + r[:, None]
    for first in range(0, units, UNITS):
        u = first + tl.arange(0, UNITS)
        there = u < units
        plane = tl.zeros((ROWS, UNITS), tl.uint32)
        for i in range(tl.load(counts + first // UNITS)):
            term = terms + i * 3 * units + u
            at = raw + tl.load(term, there, 0)[None, :]
            if grain == 4:
                piece = tl.load(at.to(tl.pointer_type(tl.uint32)), inside, 0)
            elif grain == 2:
                low = at.to(tl.pointer_type(tl.uint16))
                piece = tl.load(low, inside, 0).to(tl.uint32) | (tl.load(low + 1, inside, 0).to(tl.uint32) << 16)
            else:
                piece = tl.load(at, inside, 0).to(tl.uint32)
                piece |= tl.load(at + 1, inside, 0).to(tl.uint32) << 8
                piece |= tl.load(at + 2, inside, 0).to(tl.uint32) << 16
                piece |= tl.load(at + 3, inside, 0).to(tl.uint32) << 24
            piece &= tl.load(term + units, there, 0).to(tl.uint32)[None, :]
            shift = tl.load(term + 2 * units, there, 0).to(tl.uint32)[None, :]
            plane |= (piece << shift) | (piece >> ((32 - shift) & 31))
        tl.store(out + u.to(tl.int64)[None, :] * n, plane.to(out.dtype.element_ty), inside & there[None, :])


def table(plane: tuple[Unit, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel reads: terms int32 [most terms, 3, units], which are offset, mask and the shift up modulo 32, with masks of 0 behind
    a unit's own; and for each UNITS units the most terms of one of them."""
    terms = np.zeros((max(map(len, plane)), 3, len(plane)), np.uint32)
    for u, unit in enumerate(plane):
        for i, term in enumerate(unit):
            terms[i, :, u] = term.offset, term.mask, term.shift & 31
    counts = [max(map(len, plane[first : first + UNITS])) for first in range(0, len(plane), UNITS)]
    return terms.view(np.int32), np.array(counts, np.int32)


def grain(plane: tuple[Unit, ...], *multiples: int) -> int:
    """Of a plane, for rows and blocks at multiples of these bytes."""
    every = math.gcd(*multiples, *(term.offset for unit in plane for term in unit))
    return math.gcd(every, 4)


def signature(out: str) -> dict[str, str]:
    """Triton's types of the arguments; `out`: of the plane."""
    pointers = {"raw": "*u8", "out": out, "terms": "*i32", "counts": "*i32"}
    return pointers | dict.fromkeys(("rows", "row_bytes", "block_bytes", "n", "units", "grain"), "i32")


CONSTANTS: dict[str, Any] = {"ROWS": ROWS, "UNITS": UNITS}


def kernel_cases(target: GpuTarget, model: Geometry) -> list[KernelCase]:
    return [KernelCase(f"pack {name}", kiln_pack_plane, signature(out), CONSTANTS, {"num_warps": WARPS}) for name, out in PLANES.items()]
