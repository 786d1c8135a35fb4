"""What is known of each GGML block type, once: where a block keeps its fields, and what packing, kernels and mixes need. No torch."""

from __future__ import annotations

from dataclasses import dataclass

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class PackLayout:
    """One block type of a GGUF matrix; `layouts` says how its blocks are packed into int32 words and float16 halves."""

    name: str
    ggml_type: int  # its number in a GGUF file
    block: int  # elements
    bits: int  # of a quant
    half_fields: tuple[int, ...]  # byte offsets of the block's float16 values: the scale and, where there are minima, theirs
    word_fields: tuple[tuple[int, int], ...]  # (byte offset, bytes) of each other field, in the order of the packed words
    gemv_groups: int  # of 32 elements that a lane of the GEMV takes at a time: loads in flight against registers
    fallback: str | None = None  # the type of a matrix whose rows are no multiple of `block`, in llama-quantize's mixes
    levels: tuple[int, ...] = ()  # what the 16 quants stand for, where that is not q - half of the range; each fits a signed byte

    @property
    def words(self) -> int:
        """int32 words of a block."""
        return sum(size for _, size in self.word_fields) // 4

    @property
    def halves(self) -> int:
        """float16 values of a block."""
        return len(self.half_fields)

    @property
    def minimum(self) -> bool:
        """A weight is scale * q + offset with a stored minimum, not scale * (q - half of the range) or scale * levels[q]."""
        return self.halves == 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, the same in GGUF and packed."""
        return 4 * self.words + 2 * self.halves

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


LAYOUTS: dict[str, PackLayout] = {
    layout.name: layout
    for layout in (
        PackLayout("Q4_0", 2, 32, 4, (0,), ((2, 16),), 2),
        PackLayout("Q4_1", 3, 32, 4, (0, 2), ((4, 16),), 2),
        PackLayout("Q5_0", 6, 32, 5, (0,), ((6, 16), (2, 4)), 1),
        PackLayout("Q5_1", 7, 32, 5, (0, 2), ((8, 16), (4, 4)), 2),
        PackLayout("Q8_0", 8, 32, 8, (0,), ((2, 32),), 2),
        PackLayout("IQ4_NL", 20, 32, 4, (0,), ((2, 16),), 2, levels=IQ4_LEVELS),
        PackLayout("Q4_K", 12, 256, 4, (0, 2), ((16, 128), (4, 12)), 2, fallback="Q5_0"),
        PackLayout("Q5_K", 13, 256, 5, (0, 2), ((48, 128), (16, 32), (4, 12)), 2, fallback="Q5_1"),
        PackLayout("Q6_K", 14, 256, 6, (208,), ((0, 128), (128, 64), (192, 16)), 1, fallback="Q8_0"),
    )
}
# Every test run compiles the kernels of these types for every architecture, those of the other types for one: the compiler's time.
USUAL_TYPES = ("Q4_K", "Q6_K")
RARE_TARGETS = (90,)


def usual_targets(block_type: str) -> tuple[int, ...] | None:
    """`KernelCase.targets` of a case of this block type."""
    return None if block_type in USUAL_TYPES else RARE_TARGETS
