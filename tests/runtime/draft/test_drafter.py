"""A drafter compiled beside its model: its drafts are another implementation's, and whatever it drafts, texts are what they are without."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kiln
from tests.code_only import code_only
from tests.conftest import kiln as command
from tests.runtime.batches import FIXTURES, FORMS, ROWS
from tests.runtime.draft.test_speculation import cases, same_state, session

NAME = "gemma4-assistant-tiny-mtp"
EXACT = 32  # newest keys that TQ4 does not code
SLOTS = FORMS["cpu"][1]
CLOSE = 3e-4  # of float32 sums in another order, in logits that reach 30


pytestmark = pytest.mark.usefixtures("one_runner_thread")


@pytest.fixture(scope="module")
def model(three_rows) -> kiln.Model:
    return kiln.Model(str(three_rows))


def numbers(end: str) -> np.ndarray:
    return np.fromfile(FIXTURES / f"{NAME}.{end}", np.int32 if end.endswith("i32") else np.float32)


def test_drafts_are_others(model) -> None:
    """Drafts behind beginnings of a text within the codec's exact window, to beyond the sliding one: logits, tokens, rows passed on."""
    tokens = np.fromfile(FIXTURES / "gemma4-tiny-mtp.tokens.i32", np.int32).tolist()
    starts, last, ids = (numbers(f"{end}.i32") for end in ("starts", "last", "draft_ids"))
    logits, hidden = numbers("draft_logits.f32").reshape(len(starts), 4, -1), numbers("draft_hidden.f32").reshape(len(starts), 4, -1)
    seen = 0
    for i, start in enumerate(starts):
        if start > EXACT:
            continue
        each = kiln.Session(model)
        each.prefill(tokens[:start])
        for _ in range(2):  # nothing is left behind by drafting
            got = each.probe_drafts(3, int(last[i]))
            assert got[0] == ids.reshape(-1, 4)[i, :3].tolist()
            assert np.abs(got[1] - logits[i, :3]).max() < CLOSE
            assert np.abs(got[2] - hidden[i, :3]).max() < 3 * CLOSE  # each comes of the last
        seen += 1
    assert seen == 6


def test_where_the_row_comes_from(model) -> None:
    """By a chunk, by steps, by the accepted part of a step of several: drafts are the same. Behind restore() it is not known at first."""
    rng = random.Random(2)
    prompt = [rng.randrange(8, 512) for _ in range(20)]
    chunk, steps, drafted = kiln.Session(model), kiln.Session(model), kiln.Session(model)
    chunk.prefill(prompt), steps.prefill(prompt[:12]), drafted.prefill(prompt[:12])
    for token in prompt[12:]:
        steps.decode(token)
    assert np.abs(steps.probe_drafts(3, 9)[1] - chunk.probe_drafts(3, 9)[1]).max() < CLOSE
    for most in range(1, 12):
        plain, drafted = session(model, prompt[:12]), session(model, prompt[:12])
        plain.generate(most, stop_at_eog=False)
        drafted.generate(most, stop_at_eog=False, draft="mtp", draft_fixed=True)
        a, b = plain.probe_drafts(3), drafted.probe_drafts(3)
        assert a[0] == b[0] and np.abs(a[1] - b[1]).max() < CLOSE, most
        assert same_state(plain, drafted)
    snapshot = plain.snapshot()
    plain.restore(snapshot)
    with pytest.raises(kiln.Error, match="the hidden row of position 21 is not known; feed a token first"):
        plain.probe_drafts(1)
    text = plain.generate(8, stop_at_eog=False, draft="mtp")
    plain.restore(snapshot)
    assert plain.generate(8, stop_at_eog=False) == text


def test_texts(model) -> None:
    """Tokens, why they end, and the session behind them, greedy and sampled, to the last slot of the rings, and in a second call."""
    right = 0
    for prompt, sampling in cases(16, 0):
        plain, drafted = session(model, prompt, **sampling), session(model, prompt, **sampling)
        for length, tokens in ((0, 11), (1 + len(prompt) % 3, SLOTS)):
            text = plain.generate(tokens, stop_at_eog=False)
            assert drafted.generate(tokens, stop_at_eog=False, draft="mtp", draft_length=length, draft_fixed=True) == text, prompt
            assert same_state(plain, drafted)
        counts = drafted.draft_counts
        assert counts["tokens"] == counts["steps"] + sum(counts["right"])
        right += sum(counts["right"])
    assert right > 16


def test_drafts_at_a_temperature(model) -> None:
    """A draft takes the noise of its place: of equal logits equal tokens. Two seeds draft what each of them would sample."""
    drafts = {}
    for seed in (1, 2):
        each = session(model, [9, 8, 7, 6, 5], temperature=1.0, seed=seed)
        drafts[seed] = each.probe_drafts(3, 11)[0]
        assert drafts[seed] == each.probe_drafts(3, 11)[0]
    assert drafts[1] != drafts[2]


def test_back_and_forth(model) -> None:
    """Drafts of both kinds, plain steps, prompts, rewinding and snapshots in any order: a session without drafts does the same."""
    rng = random.Random(4)
    warm, plain = session(model, [9, 8, 7, 9, 8], temperature=0.7, seed=3), session(model, [9, 8, 7, 9, 8], temperature=0.7, seed=3)
    rewound = 0
    for _ in range(100):
        what, more = rng.randrange(6), [rng.randrange(8, 40) for _ in range(rng.randrange(1, 5))]
        if warm.position > SLOTS - 12:
            for each in (warm, plain):
                each.reset(), each.prefill(more)
        elif what == 0:
            assert warm.prefill(more) == plain.prefill(more)
        elif what == 1:
            assert warm.decode() == plain.decode()
        elif what == 2 and max(warm.earliest, plain.earliest) < warm.position:
            to = rng.randrange(max(warm.earliest, plain.earliest, 1), warm.position)
            for each in (warm, plain):
                each.rewind(to)
            assert warm.decode(more[0]) == plain.decode(more[0])
            rewound += 1
        elif what == 3:
            kept = warm.snapshot(whole=True)
            warm.generate(4, stop_at_eog=False, draft="mtp", draft_fixed=True)
            warm.restore(kept)
        else:
            n, fixed = rng.randrange(1, 9), rng.random() < 0.7
            text = plain.generate(n, stop_at_eog=False)
            assert warm.generate(n, stop_at_eog=False, draft="mtp" if what == 4 else "ngram", draft_fixed=fixed) == text
        assert same_state(warm, plain)
    assert rewound > 3


def test_timelines_of_a_batch(model) -> None:
    """Rows that draft by the model, by the text, or not at all, and come and go: every text is that of the timeline alone."""
    rng = random.Random(1)
    kinds = ("mtp", "mtp", "ngram", "off")
    todo = [(prompt, sampling, rng.choice((1, 2, 7, 30, 0)), rng.choice(kinds)) for prompt, sampling in cases(16, 9)]
    batch, texts, told, waiting = kiln.Batch(model), {}, {}, list(todo)
    while waiting or batch.active:
        while waiting and batch.active < ROWS and rng.random() < 0.6:
            prompt, sampling, most, draft = waiting.pop()
            seed = len(waiting)
            handle = batch.join(prompt, **sampling, max_new_tokens=most, stop_at_eog=False, draft=draft, draft_fixed=bool(seed % 3))
            texts[handle], told[handle] = [], (prompt, sampling, most)
        for handle, token, stop, error in batch.step():
            assert error is None
            texts[handle].append(token)
            if stop:
                prompt, sampling, most = told[handle]
                assert (texts.pop(handle), stop) == session(model, prompt, **sampling).generate(most or SLOTS, stop_at_eog=False)
    assert not texts
    counts = batch.draft_counts
    assert counts["tokens"] == counts["steps"] + sum(counts["right"]) > sum(counts["right"]) > 10


def test_rows_of_a_batch_accept(model) -> None:
    """In any row, beside others, a timeline's drafts are those of a session: it is given its own row's keys and hidden rows."""
    drafting: dict[str, Any] = {"stop_at_eog": False, "draft": "mtp", "draft_length": 1, "draft_fixed": True}  # what room others leave
    best = 0
    for prompt, sampling in cases(6, 5):
        alone = session(model, prompt, **sampling)
        most = min(20, SLOTS - len(prompt))
        text, _ = alone.generate(most, **drafting)
        best = max(best, sum(alone.draft_counts["right"]))
        for row in range(ROWS):
            batch = kiln.Batch(model)
            for other in range(ROWS):
                if other != row:
                    batch.join([9] * (other + 2), row=other, stop_at_eog=False)
            handle = batch.join(prompt, **sampling, row=row, max_new_tokens=most, **drafting)
            got: list[int] = []
            while len(got) < most:
                got += [token for who, token, *_ in batch.step() if who == handle]
            assert got == text and batch.draft_counts["tried"] == alone.draft_counts["tried"]
            assert batch.draft_counts["right"] == alone.draft_counts["right"]
    assert best > 3


def test_refused(model, toy, three_rows, tmp_path) -> None:
    """What there is no drafter for; and a manifest that says otherwise than the code."""
    plain = kiln.Session(kiln.Model(str(toy)))
    plain.prefill([1, 2, 3])
    with pytest.raises(kiln.Error, match="has no steps of several tokens"):
        plain.generate(4, draft="mtp")
    with pytest.raises(kiln.Error, match="a step: the artifact's largest step takes 4 tokens, so 1 to 3 drafts"):
        session(model, [9]).generate(4, draft="mtp", draft_length=4)

    def changed(name: str, old: str, new: str) -> Path:
        out = Path(shutil.copytree(three_rows, tmp_path / name))
        text = (out / "manifest.json").read_text()
        assert text.count(old)
        (out / "manifest.json").write_text(text.replace(old, new))
        return out

    for name, old, new, match in (
        ("input", '"name": "last"', '"name": "first"', "draft has the input 'first'"),
        ("output", '"name": "hidden"', '"name": "other"', "draft has the input 'other'"),
    ):
        with pytest.raises(kiln.Error, match=match):
            kiln.Model(str(changed(name, old, new)))


def test_weights_in_their_file(three_rows, tmp_path) -> None:
    """Of an artifact of code alone the model's weights come from its file, and the drafter's from the artifact."""
    gguf = FIXTURES / "gemma4-tiny-mtp.gguf"
    alone = code_only(three_rows, gguf, tmp_path / "code", drafter=FIXTURES / f"{NAME}.gguf")
    there, here = (session(m, [9, 8, 7]) for m in (kiln.Model(str(alone), weights=str(gguf)), kiln.Model(str(three_rows))))
    assert np.array_equal(there.probe_drafts(3)[1], here.probe_drafts(3)[1])
    assert there.generate(20, stop_at_eog=False, draft="mtp") == here.generate(20, stop_at_eog=False)


def test_inspected(three_rows) -> None:
    """Every byte is the manifest's, and the drafter is named."""
    assert f"drafter {NAME} (gemma4-assistant), 4 layers" in command("inspect", "--verify", three_rows).stdout


def test_without_a_drafter(tmp_path: Path) -> None:
    """`--draft mtp` of an artifact that has none, and --draft-gguf without steps that check."""
    given: tuple[Any, ...] = ("--gguf", FIXTURES / "gemma4-tiny-mtp.gguf", "--draft-gguf", FIXTURES / f"{NAME}.gguf", "--target", "cpu")
    done = command("export", *given, "--out", tmp_path / "out", check=False)
    assert done.returncode == 1 and "give --decode-rows 1,2,4,8 with it" in done.stderr and not (tmp_path / "out").exists()
