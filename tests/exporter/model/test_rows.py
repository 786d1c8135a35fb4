"""Steps of several tokens in plain torch: each token's logits are those of a step of one token, bit for bit."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from kiln.custom_ops.geometry import GEOMETRIES
from kiln.exporter.compiler.trace import lower, make_kv, runnable
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.tools.synth import write_synthetic
from kiln.passes.records import PassOptions
from tests.by_rows import by_rows
from tests.gguf_files import two_layers
from tests.timeline import graph_spec, weights
from tests.timelines import Schedule, check, sampling, solo

SLOTS, ROWS, VOCAB = 52, 3, 512
COUNTS = (2, 4, 8)


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small cost more to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def poisoned(spec) -> dict[str, torch.Tensor]:
    """Caches of all rows, full of what no token may read."""
    kv = make_kv(kv_plan(spec.config, SLOTS, spec.cache_dtype, spec.options))
    return {name: torch.full((ROWS, *t.shape), torch.nan if t.is_floating_point() else 0x1234, dtype=t.dtype) for name, t in kv.items()}


TQ4 = {"turboquant": True, "residual_length": 32}


@pytest.mark.parametrize("options", [{}, TQ4, TQ4 | {"decode_bytes": 2}, pytest.param({"decode_bytes": 3}, marks=pytest.mark.nightly)],
                         ids=["exact", "tq4", "tq4 fused", "exact fused"])
def test_batch_invariance(options, tmp_path, monkeypatch):
    """All M, any mix of timelines, drafts that are rejected; rings (16 and 32, with 14 spare slots) are passed more than once."""
    gguf = tmp_path / "two.gguf"
    if "decode_bytes" in options:  # by the references of the kernels, which multiply packed weights
        monkeypatch.setitem(GEOMETRIES, "pair", dataclasses.replace(GEOMETRIES["tiny"], layers=2, full_every=2, ffn=256))
        write_synthetic(gguf, "pair", "q4_k_m", 0)
    else:
        two_layers(gguf)
    spec = graph_spec(gguf, SLOTS, SLOTS, decode_rows=(1, *COUNTS), rows=ROWS, **options)
    state = weights(gguf, tmp_path)
    rng = random.Random(3)
    timelines = [[rng.randrange(VOCAB) for _ in range(n)] for n in (SLOTS, 46, 21)]
    graphs = {entry: lower(spec, entry, "cpu").program for entry in spec.entries if entry != "prefill"}
    with torch.no_grad(), by_rows():
        alone = poisoned(spec)
        expected = []
        for row, tokens in enumerate(timelines):
            expected.append(solo(runnable(graphs["decode"], state | {n: t[row] for n, t in alone.items()}), tokens, row))
        kv = poisoned(spec)
        runs = {m: runnable(graphs[f"decode_{m}"], state | kv) for m in COUNTS}
        schedule = Schedule(timelines, COUNTS, VOCAB)
        assert check(runs, schedule, expected) > sum(map(len, timelines))  # padding, too
        assert {(m, wrong) for m in COUNTS for wrong in range(m)} <= schedule.rejected
        # What one token goes on from is the same, whichever steps wrote it.
        for row, tokens in enumerate(timelines):
            one = runnable(graphs["decode"], state | {n: t[row] for n, t in kv.items()})
            _, logits = one(torch.tensor(tokens[-1:]), torch.tensor([len(tokens) - 1]), *sampling([row]))
            assert torch.equal(logits[0], expected[row][1][-1])
        # A row whose numbers are spoiled is alone with that.
        for cache in kv.values():
            if cache.is_floating_point():
                cache[1].fill_(torch.nan)
        last = [20, 20, 20]
        sampled, logits = runs[4](torch.tensor([t[20] for t in timelines] + [timelines[0][20]]), torch.tensor([*last, 20]),
                                  torch.tensor([0, 1, 2, 0]), *sampling([0, 1, 2, 0]))  # fmt: skip
        assert int(sampled[1]) == -1 and not logits[1].isfinite().any()
        for i, row in ((2, 2), (3, 0), (0, 0)):
            if row == 2:  # row 0 is further on: its ring has lost what position 20 needs
                assert torch.equal(logits[i], expected[row][1][20])
            assert logits[i].isfinite().all()


def test_spare_slots():
    """The least that a step of M tokens, and a second one queued behind it, leave of a window w: derived in plain Python."""
    for most in (1, 2, 4, 8):
        options = PassOptions(decode_rows=tuple(m for m in (1, 2, 4, 8) if m <= most))
        for window in (2, 5, 16):
            for slots in range(window, window + 3 * most):
                held = {}
                for p in range(100, 100 + window + 2 * most):  # two steps, then all but the first's first token is taken back
                    held[p % slots] = p
                first = 100 + window  # where the first of the two steps began
                own_step = {}
                for p in range(100, first + most):
                    own_step[p % slots] = p
                enough = all(own_step[p % slots] == p for p in range(first - window + 1, first + 1))
                enough &= all(held[p % slots] == p for p in range(first + 2 - window, first + 1))
                assert enough == (slots >= window + options.spare_slots), (most, window, slots)
