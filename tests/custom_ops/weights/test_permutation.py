"""Packing as data: the pieces of every block type give what `pack` gives, plainly and by the kernel that the runner launches."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kiln.custom_ops.weights import permutation as module
from kiln.custom_ops.weights.layouts import LAYOUTS, pack
from kiln.custom_ops.weights.pack_kernel import CONSTANTS, OVERRUN, ROWS, UNITS, grain, kiln_pack_plane, table
from kiln.custom_ops.weights.permutation import apply, permutation
from tests.custom_ops.interpret import interpreted

test_kernels_interpreted = interpreted(__file__)


def random_rows(block_type: str, n: int, groups: int) -> np.ndarray:
    """Any bits, those of scales that are not finite too: packing looks at none."""
    return np.random.default_rng(7).integers(0, 256, (n, groups, LAYOUTS[block_type].block_bytes), dtype=np.uint8)


@pytest.mark.parametrize("block_type", LAYOUTS)
def test_the_pieces_are_what_pack_does(block_type: str) -> None:
    blocks = random_rows(block_type, 300, 1)
    words, halves = pack(block_type, blocks)
    found = permutation(block_type)
    np.testing.assert_array_equal(apply(found.words, blocks[:, 0], 32), words[0].view(np.uint32).T)
    np.testing.assert_array_equal(apply(found.halves, blocks[:, 0], 16), halves[0].view(np.uint16).T)


@pytest.mark.parametrize("block_type", LAYOUTS)
def test_no_piece_leaves_the_block(block_type: str) -> None:
    found, size = permutation(block_type), LAYOUTS[block_type].block_bytes
    for plane, width in ((found.words, 32), (found.halves, 16)):
        for term in (term for unit in plane for term in unit):
            assert 0 <= term.offset <= size - width // 8 and 0 < term.mask < 1 << width and abs(term.shift) < width
    text = found.record()["words"][0]
    assert re.fullmatch(r"\d+&[0-9a-f]{8}((<<|>>)[1-9]\d*)?(\|\d+&[0-9a-f]{8}((<<|>>)[1-9]\d*)?)*", text)


@pytest.mark.parametrize("change", [lambda w: w ^ 1, lambda w: w + 1, lambda w: w | (w << 1), lambda w: w * 3])
def test_packing_that_computes_is_refused(monkeypatch: pytest.MonkeyPatch, change) -> None:
    def other(block_type: str, blocks: np.ndarray):
        words, halves = pack(block_type, blocks)
        return change(words.view(np.uint32)).view(np.int32), halves

    monkeypatch.setattr(module, "pack", other)
    with pytest.raises(ValueError, match="packing a Q4_0 block does more than move its bits"):
        permutation.__wrapped__("Q4_0")


def launch(block_type: str, n: int, groups: int, device: str, shift: int = 0) -> None:
    """Rows into a part of larger planes, as the runner does with a piece of a fused matrix; nothing else is written. `shift`: bytes between
    an aligned address and the first row."""
    layout, before, after = LAYOUTS[block_type], 3, 2
    blocks = random_rows(block_type, n, groups)
    raw = torch.from_numpy(np.pad(blocks.reshape(-1), (shift, OVERRUN), constant_values=255)).to(device)[shift:]
    found = permutation(block_type)
    for plane, want, units, bits in zip(
        (found.words, found.halves), pack(block_type, blocks), (layout.words, layout.halves), (32, 16), strict=True
    ):
        terms, counts = (torch.from_numpy(x).to(device) for x in table(plane))
        out = torch.full((groups, units, before + n + after), -1, dtype=torch.int32 if bits == 32 else torch.int16, device=device)
        row_bytes, total = groups * layout.block_bytes, before + n + after
        grid = (-(-n // ROWS), groups)
        step = grain(plane, row_bytes, layout.block_bytes, shift)
        kiln_pack_plane[grid](raw, out[0, 0, before:], terms, counts, n, row_bytes, layout.block_bytes, total, units, step, **CONSTANTS)
        got = out.cpu().numpy()
        np.testing.assert_array_equal(got[:, :, before : before + n], want.view(got.dtype))
        assert (got[:, :, :before] == -1).all() and (got[:, :, before + n :] == -1).all()


@pytest.mark.parametrize("block_type", LAYOUTS)
def interpreted_kernel(block_type: str) -> None:
    launch(block_type, ROWS + 5, 2, "cpu")
    launch(block_type, 3, 1, "cpu", shift=1)


@pytest.mark.gpu
@pytest.mark.parametrize("block_type", LAYOUTS)
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (ROWS + 5, 3), (4096, 21)])
def test_kernel_on_a_gpu(block_type: str, n: int, groups: int) -> None:
    for shift in (0, 1, 2):
        launch(block_type, n, groups, "cuda", shift)


def test_grain() -> None:
    assert grain(permutation("Q4_K").words, 144) == 4 and grain(permutation("Q6_K").words, 210) == 2
    assert grain(permutation("Q4_K").words, 144, 144 * 21, 2) == 2 and grain(permutation("Q8_0").words, 34, 1) == 1


def test_table() -> None:
    """Every term is in it, shifts modulo 32; a step of UNITS units reads as many as its longest has."""
    plane = permutation("Q5_0").words
    terms, counts = table(plane)
    assert terms.shape == (max(map(len, plane)), 3, len(plane)) and list(counts) == [2, len(plane[4])] and UNITS == 4
    for u, unit in enumerate(plane):
        assert [(int(t[0]), int(np.uint32(t[1])), int(t[2])) for t in terms[: len(unit), :, u]] == [
            (t.offset, t.mask, t.shift % 32) for t in unit
        ]
        assert not terms[len(unit) :, 1, u].any()
