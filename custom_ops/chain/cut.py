"""How the kernel of `chain.cu` cuts its matmuls: the arithmetic of both, for what the host allocates and asserts there.

A matrix [n, k] is units of 32 rows and a block of 256 along K. K is cut into slices, each a share of the thread blocks; the units of a
slice, row by row, are cut evenly among the warps of its thread blocks. So a block of rows may be of several thread blocks, and each of
them leaves a part of its sum. Nothing of the cut depends on the number of tokens but the ring's length, so no token's sums do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kiln.custom_ops.geometry import MAX_ROWS
from kiln.custom_ops.gpu.tables import nearest
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.fixed_point import WIDE

BITS = {"Q4_K": 4, "Q6_K": 6}  # block types that the kernel multiplies
MOST_MATMULS = 5
ROWS = 32  # of a unit
GIVEN, NORM, GATED, SAME = range(4)  # where a matmul's activations are from: `Input` of chain.cu
LINE = 4 * ROWS  # bytes of a word of each row
X_WORDS = 144  # int32 of a block of activations of two bytes: its quads and the words of its sums
FLAG_WORDS = 64  # int32 of a matmul's flags, and of the last one


@dataclass(frozen=True)
class ChainConfig:
    """How the kernel is spread over one architecture."""

    blocks: int  # of 256 in a slice of K, at most: activations of a slice lie in shared memory
    warps: int  # of a thread block; their rings share what shared memory is left
    stages: int  # units in a warp's ring, at most


# By (architecture, bits of the widest block type). sm_86's 99 KiB are those of sm_89 and sm_120, too.
CONFIGS = {(80, 4): ChainConfig(16, 8, 4), (80, 6): ChainConfig(16, 8, 4), (86, 4): ChainConfig(8, 6, 4), (86, 6): ChainConfig(8, 6, 4),
           (90, 4): ChainConfig(21, 12, 3), (90, 6): ChainConfig(21, 12, 2)}  # fmt: skip


@dataclass(frozen=True)
class Matmul:
    """Of a matrix [n, k] whose K is cut into slices."""

    n: int
    k: int
    slices: int
    bits: int
    input: int

    @property
    def blocks(self) -> int:
        """Of 256 along a slice of K."""
        return self.k // WIDE // self.slices

    @property
    def units(self) -> int:
        """Of a slice."""
        return self.n // ROWS * self.blocks


@dataclass(frozen=True)
class Cut:
    """The matmuls of one launch, of `tokens` tokens, over `thread_blocks`."""

    matmuls: tuple[Matmul, ...]
    tokens: int
    thread_blocks: int
    warps: int
    stages: int

    def per_slice(self, m: Matmul) -> int:
        """Thread blocks of a slice: none is without a unit."""
        return min(self.thread_blocks // m.slices, m.units)

    def share(self, m: Matmul, worker: int) -> tuple[int, int, int]:
        """(slice, first unit, end) of a warp of all: none, in a slice that is not there, of a thread block beyond the slices."""
        workers = self.per_slice(m) * self.warps
        of_slice, own = divmod(worker, workers)
        return (of_slice, own * m.units // workers, (own + 1) * m.units // workers) if of_slice < m.slices else (of_slice, 0, 0)

    def parts_of(self, m: Matmul) -> int:
        """Thread blocks that a block of rows has in a slice, at most."""
        return (m.blocks - 1) // (m.units // self.per_slice(m)) + 2

    def parts(self, m: Matmul) -> int:
        """Of a result: what its reader adds up."""
        return m.slices * self.parts_of(m)

    @property
    def results(self) -> int:
        """The first of the matmuls whose parts are the launch's result."""
        return len(self.matmuls) - 1 - (self.matmuls[-1].input == SAME)

    @property
    def parts_floats(self) -> int:
        """Of the parts that stay inside: two matmuls' at once."""
        return 2 * max((self.parts(m) * self.tokens * m.n for m in self.matmuls[: self.results]), default=0)

    @property
    def rows_words(self) -> int:
        """Of activations that all thread blocks read, int32, with a scale for each block of 256: two matmuls'. One token has none."""
        return 2 * self.tokens * max(m.k // WIDE for m in self.matmuls) * (X_WORDS + 1) if self.tokens > 1 else 0

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return 32 * self.warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return shared_bytes(self.matmuls, self.tokens, self.warps, self.stages)

    @property
    def defines(self) -> dict[str, int]:
        """Macros of chain.cu. PARTS_FLOATS, ROWS_WORDS and P*, a matmul's parts, are what it asserts to be as here."""
        found = {"COUNT": len(self.matmuls), "M": self.tokens, "BLOCKS": self.thread_blocks, "WARPS": self.warps, "STAGES": self.stages,
                 "PARTS_FLOATS": self.parts_floats, "ROWS_WORDS": self.rows_words}  # fmt: skip
        for i, m in enumerate(self.matmuls):
            found |= {f"N{i}": m.n, f"K{i}": m.k, f"S{i}": m.slices, f"B{i}": m.bits, f"I{i}": m.input, f"P{i}": self.parts(m)}
        return found


def shared_bytes(matmuls: Sequence[Matmul], tokens: int, warps: int, stages: int) -> int:
    """Rings of words, and of halves where they lie apart; activations and their scales; ends of rows; a float of each warp."""
    six, blocks = any(m.bits == 6 for m in matmuls), max(m.blocks for m in matmuls)
    # Halves of Q4_K are the ring's 36th line.
    ring = (LAYOUTS["Q6_K"].words * LINE + LINE if six else (LAYOUTS["Q4_K"].words + 1) * LINE) * stages
    scales = -(-tokens * blocks * 4 // 16) * 16
    return warps * (ring + 2 * tokens * LINE + 4) + tokens * blocks * X_WORDS * 4 + scales


def flag_words(matmuls: int = MOST_MATMULS) -> int:
    """int32 of `flags`, which are zero between launches."""
    return (matmuls + 1) * FLAG_WORDS


def slices_of(k: int, blocks: int) -> int:
    """The fewest slices of K, all alike, of at most `blocks` blocks of 256."""
    return next(s for s in range(1, k // WIDE + 1) if k // WIDE % s == 0 and k // WIDE // s <= blocks)


def cut_for(matrices: Sequence[tuple[int, int, int]], tokens: int, target: GpuTarget) -> Cut:
    """The cut for matrices (n, k, bits), in the order of a layer; a fifth one shares the activations of the fourth.

    ValueError where there is none: other numbers of matrices or tokens, rows that are no multiple of 32, K that is none of 256 or of more
    slices than there are thread blocks.
    """
    shapes = ", ".join(f"[{n}, {k}]" for n, k, _ in matrices)
    if len(matrices) not in (4, MOST_MATMULS) or any(n <= 0 or n % ROWS or k <= 0 or k % WIDE for n, k, _ in matrices):
        raise ValueError(f"chain: matrices {shapes}; expected 4 or 5 [N, K], N a multiple of {ROWS}, K of {WIDE}")
    if not 1 <= tokens <= MAX_ROWS:
        raise ValueError(f"chain: {tokens} tokens; expected 1 to {MAX_ROWS}")
    most = max(bits for _, _, bits in matrices)
    config = CONFIGS[nearest((sm for sm, bits in CONFIGS if bits == most), target), most]
    inputs = (GIVEN, NORM, GATED, NORM, SAME)
    matmuls = tuple(Matmul(n, k, slices_of(k, config.blocks), bits, given)
                    for (n, k, bits), given in zip(matrices, inputs, strict=False))  # fmt: skip
    stages = next((s for s in range(config.stages, 0, -1) if shared_bytes(matmuls, tokens, config.warps, s) <= target.smem_optin), 0)
    if not stages or any(m.slices > target.sm_count for m in matmuls):
        raise ValueError(f"chain: matrices {shapes} of {tokens} tokens do not fit {target.name}")
    return Cut(matmuls, tokens, target.sm_count, config.warps, stages)


def follows(matrices: Sequence[tuple[int, int, int]]) -> bool:
    """Each matrix takes what the one before leaves: the stream's width, halves of gates and values, the stream's width."""
    (d, _, _), (gates, a, _), (down, half, _), *last = matrices
    return gates == 2 * half and {a, down, *(k for _, k, _ in last)} == {d}
