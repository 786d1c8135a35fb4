"""How the chain's kernel cuts matmuls: every unit once, no part lost, the same for every number of tokens, within shared memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest

from kiln.custom_ops.chain import cut as cutting
from kiln.custom_ops.chain.cut import BITS, CONFIGS, SAME, Cut, Matmul, cut_for, flag_words, follows, shared_bytes, slices_of
from kiln.custom_ops.geometry import GEOMETRIES, MAX_ROWS, Geometry
from kiln.custom_ops.gpu.target import gpu_targets

TARGETS = gpu_targets()
H200 = TARGETS["sm_90"]
COUNTS = (84, 108, 128, 132, 170)  # of multiprocessors
# Of the 31B and smaller models; K of a prime number of blocks; fewer units than warps, and than thread blocks.
SHAPES = ((5376, 8192, 2), (5376, 16384, 4), (43008, 5376, 1), (5376, 21504, 4), (16384, 5376, 1), (4096, 5376, 1), (2560, 9728, 2),
          (1024, 2048, 1), (256, 256, 1), (32, 256, 1), (32, 512, 2), (96, 2816, 11), (128, 4352, 17))  # fmt: skip


def chains(model: Geometry, mix: str = "q4_k_m") -> list[list[tuple[int, int, int]]]:
    found = {}
    for layer, following in pairwise(model.layer_matrices(mix)):
        own = {m.name: m for m in layer}
        names = ("attn_output", "ffn_gate_up", "ffn_down")
        matrices = [(m.n, m.k, BITS[m.block_type]) for m in (*(own[n] for n in names), *(m for m in following if m.end == "split"))]
        found[tuple(matrices)] = matrices
    return list(found.values())


@pytest.mark.parametrize("blocks", COUNTS)
@pytest.mark.parametrize("warps", [1, 6, 12])
def test_every_unit_is_one_warps(blocks: int, warps: int) -> None:
    for n, k, slices in SHAPES:
        m = Matmul(n, k, slices, 4, 0)
        cut = Cut((m,), 1, blocks, warps, 1)
        taken: Counter[tuple[int, int]] = Counter()
        writers: dict[tuple[int, int], set[int]] = {}  # a slice and a block of rows -> its thread blocks
        for worker in range(blocks * warps):
            of_slice, first, end = cut.share(m, worker)
            taken.update((of_slice, unit) for unit in range(first, end))
            for unit in range(first, end):
                writers.setdefault((of_slice, unit // m.blocks), set()).add(worker // warps)
        assert taken == dict.fromkeys(((s, u) for s in range(slices) for u in range(m.units)), 1), (n, k)
        most = max(map(len, writers.values()))
        each = cut.per_slice(m)
        assert most <= cut.parts_of(m) and (cut.parts_of(m) <= most + 1 or m.units // each < m.blocks), (n, k, most)
        assert 1 <= each * slices <= blocks and {b for found in writers.values() for b in found} == set(range(each * slices))
        for (of_slice, row), found in writers.items():  # those of a row, as a reader of parts finds them
            first, last = (((row * m.blocks + at) * each - 1) // m.units for at in (1, m.blocks))
            assert found == set(range(of_slice * each + first, of_slice * each + last + 1))


def test_slices() -> None:
    assert [slices_of(k, 21) for k in (8192, 16384, 21504, 5376, 256, 17408, 23 * 256)] == [2, 4, 4, 1, 1, 4, 23]
    for blocks in (1, 8, 16, 21):
        for count in range(1, 200):
            s = slices_of(256 * count, blocks)
            assert count % s == 0 and count // s <= blocks
            assert not any(count % other == 0 and count // other <= blocks for other in range(1, s))


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_no_cut_depends_on_the_number_of_tokens(target) -> None:
    """The ring's length may, which no sum depends on; shared memory holds it all."""
    for model in (GEOMETRIES[name] for name in ("gemma4-31b", "gemma4-12b", "qwen3-8b", "qwen3-32b")):
        for matrices in chains(model):
            assert follows(matrices)
            cuts = [cut_for(matrices, tokens, target) for tokens in range(1, MAX_ROWS + 1)]
            assert len({dataclasses.replace(cut, tokens=0, stages=0) for cut in cuts}) == 1
            assert all(cut.stages >= 1 and cut.shared <= target.smem_optin for cut in cuts)
            assert all(a.stages >= b.stages for a, b in pairwise(cuts))
            for cut in cuts:
                config = next(c for c in CONFIGS.values() if c.warps == cut.warps and c.blocks >= max(m.blocks for m in cut.matmuls))
                more = shared_bytes(cut.matmuls, cut.tokens, cut.warps, cut.stages + 1)
                assert cut.stages == config.stages or more > target.smem_optin or target.sm != 90


def test_what_is_allocated() -> None:
    """Of the 31B, by hand."""
    first = chains(GEOMETRIES["gemma4-31b"])[0]
    assert first == [(5376, 8192, 4), (43008, 5376, 4), (5376, 21504, 6), (12288, 5376, 4), (4096, 5376, 6)]
    cut = cut_for(first, 1, H200)
    assert [m.slices for m in cut.matmuls] == [2, 1, 4, 1, 1] and (cut.warps, cut.stages) == (12, 2)
    assert [m.input for m in cut.matmuls] == [0, 1, 2, 1, SAME] and cut.results == 3
    assert [cut.parts(m) for m in cut.matmuls] == [2 * 2, 2, 4 * 2, 2, 3]
    assert cut.parts_floats == 2 * 2 * 43008 and cut.rows_words == 0
    assert cut.shared == 12 * 2 * (52 * 128 + 128) + 12 * (2 * 128 + 4) + 21 * 576 + 96
    four = cut_for(first[:4], 4, H200)
    assert four.results == 3 and four.rows_words == 2 * 4 * 84 * 145 and four.parts_floats == 4 * cut.parts_floats
    assert flag_words() == 6 * 64 and flag_words(4) == 5 * 64
    assert cut.defines.items() >= {"COUNT": 5, "M": 1, "BLOCKS": 132, "N4": 4096, "K2": 21504, "S2": 4, "B2": 6, "I4": 3, "P2": 8}.items()


def test_what_has_no_cut() -> None:
    right = [(512, 256, 4), (1024, 512, 4), (512, 512, 4), (768, 512, 6)]
    assert cut_for(right, 8, H200)
    for matrices, tokens, message in (
        (right[:3], 1, r"matrices \[512, 256\], .*; expected 4 or 5 \[N, K\]"),
        ([*right[:3], (770, 512, 4)], 1, r"\[770, 512\]; expected .* N a multiple of 32, K of 256"),
        ([(512, 320, 4), *right[1:]], 1, r"\[512, 320\]"),
        (right, 9, "9 tokens; expected 1 to 8"),
        (right, 0, "0 tokens"),
        ([(512, 256 * 139, 4), *right[1:]], 1, "do not fit NVIDIA H200"),  # more slices than thread blocks
    ):
        with pytest.raises(ValueError, match=message):
            cut_for(matrices, tokens, H200)
    with pytest.raises(ValueError, match=r"of 8 tokens do not fit small"):
        cut_for(right, 8, dataclasses.replace(H200, name="small", smem_optin=20 << 10))
    for wrong in ([*right[:3], (768, 256, 4)], [right[0], (512, 512, 4), *right[2:]], [(256, 256, 4), *right[1:]]):
        assert follows(right) and not follows(wrong)
    assert cutting.ROWS == 32
