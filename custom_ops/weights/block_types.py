"""What is known of each GGML block type, once: where a block keeps its fields, and what packing, kernels and mixes need. No torch."""

from __future__ import annotations

from dataclasses import dataclass

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled


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
    scales: str = "half"  # what a group is scaled by: see SCALES
    fallback: str | None = None  # the type of a matrix whose rows are no multiple of `block`, in llama-quantize's mixes
    levels: tuple[int, ...] = ()  # what the 16 quants stand for, where that is not q - half of the range; each fits a signed byte
    byte_fields: tuple[tuple[int, int], ...] = ()  # (byte offset of the low byte, of the high one) of each further half, no float16 value
    together: int = 1  # blocks of the GGUF file that are packed as one, which `block` and the fields are of

    @property
    def words(self) -> int:
        """int32 words of a block."""
        return sum(size for _, size in self.word_fields) // 4

    @property
    def halves(self) -> int:
        """16-bit values of a block: the float16 ones first."""
        return len(self.half_fields) + len(self.byte_fields)

    @property
    def zero(self) -> int:
        """The weight is scale * (q - zero) where there are no minima; of levels, q is the level + zero, a byte."""
        return -min(self.levels) if self.levels else 1 << self.bits - 1

    @property
    def halves_dtype(self) -> str:
        """int16 where some are no float16 values: any bits are sound there."""
        return "int16" if self.byte_fields else "float16"

    @property
    def minimum(self) -> bool:
        """A weight is scale * q + offset with a stored minimum, not scale * (q - half of the range) or scale * levels[q]."""
        return len(self.half_fields) == 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, the same in GGUF (of `together` blocks) and packed."""
        return 4 * self.words + 2 * self.halves

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


# What a group of 32 elements is scaled by. Those behind "half" are words of a block of 256, times its first float16 value.
SCALES = {
    "half": "the block's float16 value",
    "k": "12 bytes: 6-bit scales and 6-bit minima of 8 groups",
    "int8": "16 signed bytes, one for 16 elements",
    "six": "12 bytes: scale + 32 of 6 bits, one for 16 elements",
    "four": "16 bytes: 4-bit scale low, 4-bit minimum high, one for 16 elements",
    "e8m0": "a byte of the half: 2^(byte - 128), for levels are doubled; down to 2^-128, below float32's normal numbers",
    "split": "scale + 32 of 8 groups: 4 low bits in a word, nibble g, and 2 high bits in a half, bits 2g and 2g + 1",
}
LAYOUTS: dict[str, PackLayout] = {
    layout.name: layout
    for layout in (
        PackLayout("Q4_0", 2, 32, 4, (0,), ((2, 16),), 2),
        PackLayout("Q4_1", 3, 32, 4, (0, 2), ((4, 16),), 2),
        PackLayout("Q5_0", 6, 32, 5, (0,), ((6, 16), (2, 4)), 1),
        PackLayout("Q5_1", 7, 32, 5, (0, 2), ((8, 16), (4, 4)), 2),
        PackLayout("Q8_0", 8, 32, 8, (0,), ((2, 32),), 2),
        PackLayout("IQ4_NL", 20, 32, 4, (0,), ((2, 16),), 2, levels=IQ4_LEVELS),
        PackLayout("MXFP4", 39, 64, 4, (), ((1, 16), (18, 16)), 2, "e8m0", None, E2M1_LEVELS, ((0, 17),), together=2),
        PackLayout("Q2_K", 10, 256, 2, (80, 82), ((16, 64), (0, 16)), 2, "four", "Q4_0"),
        PackLayout("Q3_K", 11, 256, 3, (108,), ((32, 64), (0, 32), (96, 12)), 2, "six", "Q4_0"),
        PackLayout("Q4_K", 12, 256, 4, (0, 2), ((16, 128), (4, 12)), 2, "k", fallback="Q5_0"),
        PackLayout("Q5_K", 13, 256, 5, (0, 2), ((48, 128), (16, 32), (4, 12)), 2, "k", fallback="Q5_1"),
        PackLayout("Q6_K", 14, 256, 6, (208,), ((0, 128), (128, 64), (192, 16)), 1, "int8", fallback="Q8_0"),
        PackLayout("IQ4_XS", 23, 256, 4, (0,), ((8, 128), (4, 4)), 2, "split", "IQ4_NL", IQ4_LEVELS, ((2, 3),)),
    )
}
# Every test run compiles the kernels of these types for every architecture, those of the other types for one: the compiler's time.
USUAL_TYPES = ("Q4_K", "Q6_K")
RARE_TARGETS = (90,)


def usual_targets(block_type: str, first: bool = True) -> tuple[int, ...] | None:
    """`KernelCase.targets` of a case of this block type; of a rare one the others than `first` wait for the night."""
    return None if block_type in USUAL_TYPES else RARE_TARGETS if first else ()
