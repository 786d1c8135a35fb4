"""What `layouts.pack` does to the bits of a block, as data: found by packing blocks of a single bit, so it cannot differ from `pack`.

Packing moves bits and computes nothing. So a word of a packed block is a few masked and shifted 32-bit pieces of the GGUF block, joined,
and whoever has the pieces packs without knowing the type: the runner's loader on the CPU (`runtime_cpp/src/artifact/packing.h`), the kernel
of `pack_kernel` on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.layouts import pack

TRIALS = 64  # random blocks on which the pieces are compared with `pack`


@dataclass(frozen=True)
class Term:
    """Bits `mask` of the little-endian integer at byte `offset` of a block, moved up by `shift`, down where that is negative."""

    offset: int
    mask: int
    shift: int

    def __str__(self) -> str:
        shift = f"<<{self.shift}" if self.shift > 0 else f">>{-self.shift}" if self.shift else ""
        return f"{self.offset}&{self.mask:08x}{shift}"


Unit = tuple[Term, ...]  # one word or half: its terms joined


@dataclass(frozen=True)
class Permutation:
    """One block type. words: of 32 bits; halves: of 16."""

    block_type: str
    words: tuple[Unit, ...]
    halves: tuple[Unit, ...]

    def record(self) -> dict:
        """As in the manifest."""
        layout = LAYOUTS[self.block_type]
        planes = {name: ["|".join(map(str, unit)) for unit in plane] for name, plane in (("words", self.words), ("halves", self.halves))}
        return {"elements": layout.block, "bytes": layout.block_bytes, **planes}


def apply(plane: tuple[Unit, ...], blocks: np.ndarray, width: int) -> np.ndarray:
    """The plane of blocks uint8 [n, block bytes], uint32 or uint16 [n, units]: the plain meaning of the terms. `width`: 32 or 16 bits."""
    out = np.zeros((len(blocks), len(plane)), f"<u{width // 8}")
    for u, unit in enumerate(plane):
        for term in unit:
            piece = (
                np.ascontiguousarray(blocks[:, term.offset : term.offset + width // 8]).view(out.dtype)[:, 0].astype(np.uint64) & term.mask
            )
            out[:, u] |= (piece << max(term.shift, 0) >> max(-term.shift, 0)).astype(out.dtype)
    return out


@functools.cache
def permutation(block_type: str) -> Permutation:
    """The pieces of a type of LAYOUTS. Raises ValueError where its packing does more than move bits."""
    size = LAYOUTS[block_type].block_bytes
    single = np.zeros((8 * size, size), np.uint8)
    bit = np.arange(8 * size)
    single[bit, bit // 8] = 1 << (bit % 8)
    planes = [_units(plane, size) for plane in _packed(block_type, single)]
    trials = np.random.default_rng(0).integers(0, 256, (TRIALS, size), dtype=np.uint8)
    trials[0] = 0
    for plane, want in zip(planes, _packed(block_type, trials), strict=True):
        if plane is None or not np.array_equal(apply(plane, trials, 8 * want.itemsize), want):
            raise ValueError(
                f"packing a {block_type} block does more than move its bits: it cannot be packed from a GGUF file while it is loaded"
            )
    words, halves = (plane or () for plane in planes)
    return Permutation(block_type, words, halves)


def _packed(block_type: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words uint32 and halves uint16 [n, units] of blocks [n, block bytes]."""
    words, halves = pack(block_type, blocks[:, None])
    return words[0].view(np.uint32).T, halves[0].view(np.uint16).T


def _units(plane: np.ndarray, size: int) -> tuple[Unit, ...] | None:
    """The terms of each unit of a plane of the blocks with bit i set; None where a bit does not go to at most one place of a unit."""
    width = 8 * plane.itemsize
    units = []
    for column in plane.T:
        moved: dict[int, list[int]] = {}  # distance -> bits of the block
        for i in np.flatnonzero(column):
            value = int(column[i])
            if value & (value - 1):
                return None
            moved.setdefault(int(i) - value.bit_length() + 1, []).append(int(i))
        terms: list[Term] = []
        for distance, bits in moved.items():
            while bits:
                offset = min(bits[0] // 8, size - width // 8)
                inside = [b for b in bits if b - 8 * offset < width]
                terms.append(Term(offset, sum(1 << (b - 8 * offset) for b in inside), 8 * offset - distance))
                bits = bits[len(inside) :]
        units.append(tuple(sorted(terms, key=lambda t: (t.offset, t.shift))))
    return tuple(units)
