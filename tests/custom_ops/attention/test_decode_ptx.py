"""The PTX of decode attention, on a CPU: each token of a step has the bits of a step of it alone."""

from __future__ import annotations

import pytest
import torch

from kiln.custom_ops.geometry import EXACT_WINDOW
from kiln.custom_ops.gpu.target import gpu_targets
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.gpu.test_gpu_rows import check_attention
from tests.custom_ops.ptx.launcher import playing

kiln = torch.ops.kiln
QUERIES, KV, DIM, WINDOW, SPARE = 4, 2, 256, 128, 14  # slots of a ring beyond its window, for 8 tokens
PLACES = ([(0, 1), (1, 1)], [(131, 1), (7, 0), (130, 1), (131, 1)], [(4090 + i, 0) for i in range(8)])  # (position, row) of tokens


def given(places: list[tuple[int, int]], dim: int) -> tuple:
    """Parts of q and k, of v, norms and rotary tables; a place that is named twice has the same twice."""
    token = [places.index(p) for p in places]
    qk = torch.randn(3, len(places), (QUERIES + KV) * dim)[:, token].contiguous()
    v = torch.randn(3, len(places), KV * dim)[:, token].contiguous()
    cos, sin = (torch.randn(len(places), dim // 2)[token] for _ in range(2))
    return qk[..., : QUERIES * dim], qk[..., QUERIES * dim :], v, torch.rand(dim), torch.rand(dim), cos, sin


def check(together, alone, caches: list[torch.Tensor], places: list[tuple[int, int]], dim: int) -> None:
    pos, row = torch.tensor(places).unbind(1)
    check_attention(together, alone, caches, given(places, dim), pos.contiguous(), row.contiguous())


def rings(rows: int, slots: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [(torch.randn(rows, slots, KV, dim) * 0.3).to(dtype) for _ in range(2)]


@pytest.mark.nightly
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sliding(dtype: torch.dtype, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(x, caches, p):
        copies = [t.clone() for t in caches]
        made = kiln.sliding_decode(*x, *caches, p, WINDOW, 1e-6, 2, slots=together)
        expected = kiln.sliding_decode(*x, *copies, p, WINDOW, 1e-6, 2)
        bound = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(fixed_point.dequantize(made), fixed_point.dequantize(expected), rtol=bound, atol=bound)
        return made

    with playing(monkeypatch, gpu_targets()["sm_90"]):
        for places in PLACES:
            check(lambda x, c, p, r: kiln.sliding_decode_rows(*x, *c, p, r, WINDOW, 1e-6, 2, slots=together), alone,
                  rings(2, WINDOW + SPARE, DIM, dtype), places, DIM)  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("dim", [128, 512])
def test_tq4(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = 2048
    with playing(monkeypatch, gpu_targets()["sm_90"]):
        for places in ([(0, 1), (1, 1)], [(321, 1), (7, 0), (320, 1), (321, 1)], [(1290 + i, 0) for i in range(4)]):
            codes = [torch.randint(-(1 << 15), 1 << 15, (2, KV, slots, dim // 4), dtype=torch.int16) if i % 2 == 0
                     else torch.rand(2, KV, slots).half() for i in range(4)]  # fmt: skip
            check(lambda x, c, p, r: kiln.tq4_decode_rows(*x, *c, p, r, EXACT_WINDOW, 1e-6, 2, []),
                  lambda x, c, p: kiln.tq4_decode(*x, *c, p, 1e-6, 2, [], exact_window=EXACT_WINDOW),
                  [*codes, *rings(2, EXACT_WINDOW + SPARE, dim, torch.bfloat16)], places, dim)  # fmt: skip
