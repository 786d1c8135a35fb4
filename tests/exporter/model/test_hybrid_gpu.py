"""A hybrid on a GPU: prompts in chunks of any length, states after dropped steps, after replays and from snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import kiln
from tests.exporter.model.test_families import MODELS, model_file
from tests.timeline import feed, graph_spec, weights, worst

pytestmark = pytest.mark.gpu
MODEL = next(m for m in MODELS if m.name == "qwen35moe-tiny-wide-Q4_K_M")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hybrids")


@pytest.fixture(scope="module", params=["f16", "tq4"])
def played(request, files: Path):
    """With codes the exact window holds the whole context, but for `test_codes`."""
    runner = pytest.importorskip("kiln")
    out = files / request.param
    kiln("export", "--gguf", model_file(MODEL, files), "--out", out, "--target", "native", "--max-seq-len", 96, "--prefill-chunk", 96,
         "--kv-cache", request.param, *(("--residual-length", 96) if request.param == "tq4" else ()))  # fmt: skip
    return runner.Model(str(out), device="cuda")


def logits(session, tokens: torch.Tensor) -> torch.Tensor:
    session.prefill(tokens.tolist())
    return torch.from_numpy(np.array(session.logits()))


def test_chunks(played, files: Path) -> None:
    """No further from the reference than 1.2 times what eager bfloat16 is; and the same bits again."""
    runner = pytest.importorskip("kiln")
    path = model_file(MODEL, files)
    tokens, reference = MODEL.reference(path)
    spec, state = graph_spec(path, dtype="bfloat16"), weights(path, files)
    session = runner.Session(played)
    for size in (80, 65, 64, 7, 1):
        decoder = spec.model()
        decoder.load_state_dict(state, strict=False)
        with torch.inference_mode():
            eager = worst(feed(decoder, decoder, tokens, size), reference)
        found = []
        for _ in range(2):
            session.reset()
            found.append({min(at + size, 80) - 1: logits(session, tokens[at : at + size]) for at in range(0, 80, size)})
        error = worst(found[0], reference)
        print(f"chunks of {size}: max |dlogit| eager {eager:.2e}, on the GPU {error:.2e}")
        assert error <= 1.2 * eager and all(torch.equal(found[0][i], found[1][i]) for i in found[0])


def test_codes(files: Path) -> None:
    """Keys and values older than 32 tokens in four bits: near to exact ones, and not the same."""
    runner = pytest.importorskip("kiln")
    path, out = model_file(MODEL, files), files / "codes"
    kiln("export", "--gguf", path, "--out", out, "--target", "native", "--max-seq-len", 96, "--prefill-chunk", 96, "--kv-cache", "tq4",
         "--residual-length", 32)  # fmt: skip
    tokens, reference = MODEL.reference(path)
    session = runner.Session(runner.Model(str(out), device="cuda"))
    for size in (80, 33, 1):
        session.reset()
        rows = {min(at + size, 80) - 1: logits(session, tokens[at : at + size]) for at in range(0, 80, size)}
        errors = [worst({i: x for i, x in rows.items() if old == (i >= 32)}, reference) for old in (False, True) if size < 80 or old]
        print(f"chunks of {size}: max |dlogit| {errors}")
        assert max(errors) < 0.1 * reference.abs().max()


def test_a_step_that_is_dropped_changes_nothing(played, files: Path) -> None:
    """One stays queued behind the token at which a generation is stopped; at odd and even positions."""
    runner = pytest.importorskip("kiln")
    tokens, _ = MODEL.reference(model_file(MODEL, files))
    session, other = runner.Session(played), runner.Session(played)
    for cut, stop in ((20, 5), (21, 5), (20, 6), (21, 6)):
        session.rewind(0), other.rewind(0)
        for s in (session, other):
            logits(s, tokens[:cut])
        found: list[int] = []

        def until(token: int, found: list[int] = found, stop: int = stop) -> bool:
            found.append(token)
            return len(found) < stop

        session.generate(40, until, stop_at_eog=False)
        for token in found[:-1]:
            other.decode(token)
        assert session.position == other.position == cut + stop - 1
        for last in (torch.tensor([found[-1], 7]), torch.tensor([9])):
            assert torch.equal(logits(session, last), logits(other, last))


def test_replays_are_what_launches_are(played, files: Path) -> None:
    runner = pytest.importorskip("kiln")
    tokens, _ = MODEL.reference(model_file(MODEL, files))
    found = []
    for options in ({}, {"graph": False}, {"early_launch": False}):
        session = runner.Session(played, **options)
        rows = [logits(session, tokens[:30])]
        for token in tokens[30:50].tolist():
            session.decode(token)
            rows.append(torch.from_numpy(np.array(session.logits())))
        found.append(torch.stack(rows))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_snapshots(played, files: Path, tmp_path: Path) -> None:
    """On the device, on the host and from a file, in another session too: what follows is bit for bit what it was."""
    runner = pytest.importorskip("kiln")
    tokens, _ = MODEL.reference(model_file(MODEL, files))
    session, other, saved = runner.Session(played), runner.Session(played), tmp_path / "s"
    for cut, steps in ((20, 0), (21, 0), (20, 3), (64, 1), (65, 0)):
        session.rewind(0)
        logits(session, tokens[:cut])
        session.generate(steps + 1, stop_at_eog=False)
        kept = [session.snapshot(whole=whole, host=host) for whole in (False, True) for host in (False, True)]
        session.save(saved)
        right = [logits(session, tokens[66:75])]
        for token in (5, 6, 7):
            session.decode(token)
            right.append(torch.from_numpy(np.array(session.logits())))
        for source in (*kept, saved):
            for taker in (other, session) if source is not saved else (other,):
                taker.restore(source)
                found = [logits(taker, tokens[66:75])]
                for token in (5, 6, 7):
                    taker.decode(token)
                    found.append(torch.from_numpy(np.array(taker.logits())))
                assert all(map(torch.equal, found, right)), (cut, steps)
