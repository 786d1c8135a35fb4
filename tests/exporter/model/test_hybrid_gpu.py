"""A hybrid on a GPU: prompts in chunks of any length, states after dropped steps, after replays and from snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kiln.exporter.compiler.trace import lower
from tests.conftest import kiln
from tests.exporter.model.test_families import MODELS, model_file
from tests.timeline import feed, graph_spec, programs, weights

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


SIZES = (80, 65, 64, 7, 1)


def errors(rows: dict[int, torch.Tensor], reference: torch.Tensor) -> list[torch.Tensor]:
    return [row - reference[i] for i, row in rows.items()]


def in_chunks(session, tokens: torch.Tensor, size: int) -> dict[int, torch.Tensor]:
    session.reset()
    return {min(at + size, len(tokens)) - 1: logits(session, tokens[at : at + size]) for at in range(0, len(tokens), size)}


def test_chunks(played, files: Path) -> None:
    """Over all logits no further from the reference than 1.2 times what eager bfloat16 is; and the same bits again."""
    runner = pytest.importorskip("kiln")
    path = model_file(MODEL, files)
    tokens, reference = MODEL.reference(path)
    spec, state = graph_spec(path, dtype="bfloat16"), weights(path, files)
    session = runner.Session(played)
    off: dict[str, list[torch.Tensor]] = {"eager": [], "GPU": []}
    for size in SIZES:
        decoder = spec.model()
        decoder.load_state_dict(state, strict=False)
        with torch.inference_mode():
            off["eager"] += errors(feed(decoder, decoder, tokens, size), reference)
        found = [in_chunks(session, tokens, size) for _ in range(2)]
        off["GPU"] += errors(found[0], reference)
        assert all(torch.equal(found[0][i], found[1][i]) for i in found[0]), size
    eager, gpu = (torch.stack(off[where]).norm().item() for where in ("eager", "GPU"))
    print(f"error over {len(off['GPU'])} rows of logits: eager {eager:.3e}, on the GPU {gpu:.3e}")
    assert gpu <= 1.2 * eager


def test_codes(files: Path) -> None:
    """Keys and values older than 32 tokens in four bits: no further from exact ones than the passes' graphs in eager bfloat16 are."""
    runner = pytest.importorskip("kiln")
    path, out = model_file(MODEL, files), files / "codes"
    kiln("export", "--gguf", path, "--out", out, "--target", "native", "--max-seq-len", 96, "--prefill-chunk", 96, "--kv-cache", "tq4",
         "--residual-length", 32)  # fmt: skip
    tokens, reference = MODEL.reference(path)
    spec, state = graph_spec(path, dtype="bfloat16", turboquant=True, residual_length=32), weights(path, files)
    start = programs(spec, state, lambda entry: lower(spec, entry, "cpu").program)
    session = runner.Session(runner.Model(str(out), device="cuda"))
    off: dict[str, list[torch.Tensor]] = {"eager": [], "GPU": []}
    for size in (80, 32, 1):
        with torch.inference_mode():
            off["eager"] += errors(feed(*start(), tokens, size), reference)
        off["GPU"] += errors(in_chunks(session, tokens, size), reference)
    eager, gpu = (torch.stack(off[where]).norm().item() for where in ("eager", "GPU"))
    print(f"error over {len(off['GPU'])} rows of logits: eager {eager:.3e}, on the GPU {gpu:.3e}")
    assert gpu <= 1.2 * eager


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
