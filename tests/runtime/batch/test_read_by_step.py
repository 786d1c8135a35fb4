"""The end of a prompt that one step takes instead of a prefill call: the bits of its tokens one by one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import kiln
from tests.runtime.batches import CHUNK, FORMS, ROWS, load, spoil

pytestmark = pytest.mark.usefixtures("one_runner_thread")


@pytest.fixture(scope="module")
def model(several, device) -> kiln.Model:
    return load(several, device)


@pytest.fixture(scope="module")
def most(device) -> int:
    return FORMS[device][0][-1]


def ids(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 512) for _ in range(count)]


def test_a_session(model, most) -> None:
    """Short prompts, those that end behind a chunk, and a second piece: logits, what follows, and where it can go back to."""
    for length in (1, 2, 3, most, most + 1, CHUNK, CHUNK + 1, CHUNK + most - 1):
        tokens = ids(length, length)
        read = length if length <= most else length % CHUNK if length % CHUNK <= most and length > CHUNK else 0  # by a step
        for piece in ([], ids(most - 1, 7)):
            quick, slow = kiln.Session(model, read_by_step=most), kiln.Session(model, read_by_step=1)
            quick.prefill(tokens)
            if length - read:
                slow.prefill(tokens[: length - read])
            for token in tokens[length - read :]:
                slow.decode(token)
            if piece:
                quick.prefill(piece)
                for token in piece:
                    slow.decode(token)
            assert np.array_equal(quick.logits(), slow.logits()) and quick.tokens == slow.tokens == [*tokens, *piece], length
            assert quick.earliest <= quick.position == slow.position == length + len(piece)
            assert quick.generate(9, stop_at_eog=False) == slow.generate(9, stop_at_eog=False)
            quick.rewind(quick.position - 1)
            slow.rewind(slow.position - 1)
            assert quick.decode(11) == slow.decode(11) and np.array_equal(quick.logits(), slow.logits())


def test_a_batch(model, most) -> None:
    """Prompts that wait, ends of prompts, answers and drafts share steps, with more given tokens than a step has room for."""
    rng, todo, texts, rows = random.Random(2), [], {}, {}
    for i in range(16):
        sampling = {"temperature": rng.choice((0.0, 0.9)), "seed": i}
        prompt = ids(rng.choice((1, 2, most, most + 1, CHUNK, CHUNK + 2)), i)
        todo.append((prompt, sampling, rng.choice((1, 4, 9)), rng.choice(("off", "ngram"))))
    batch, waiting = kiln.Batch(model, keep_logits=True, read_by_step=most), list(todo)
    while waiting or batch.active:
        while waiting and batch.active < ROWS and rng.random() < 0.7:
            told = waiting.pop()
            prompt, sampling, new, draft = told
            handle = batch.join(prompt, **sampling, max_new_tokens=new, stop_at_eog=False, draft=draft)
            texts[handle], rows[handle] = [], told
        for handle, token, stop, error in batch.step():
            assert error is None
            texts[handle].append(token)
            if stop:
                prompt, sampling, new, _ = rows[handle]
                session = kiln.Session(model, read_by_step=most)
                session.set_sampling(**sampling)
                session.prefill(prompt)
                assert session.generate(new, stop_at_eog=False) == (texts[handle], stop)
                assert np.array_equal(batch.logits(handle), last_logits(model, prompt, sampling, new, most))
    assert len(texts) == len(todo)


def last_logits(model: kiln.Model, prompt: list[int], sampling: dict[str, Any], new: int, most: int) -> np.ndarray:
    """That the last of `new` tokens was sampled from."""
    session, rows = kiln.Session(model, read_by_step=most), []
    session.set_sampling(**sampling)
    session.prefill(prompt)
    rows.append(session.logits().copy())
    session.set_logits_sink(lambda row: rows.append(row.copy()))
    session.generate(new, stop_at_eog=False)
    return rows[new - 1]


def test_logits_that_are_not_finite(model, device, most) -> None:
    """The error names the first position behind which they are, as tokens one by one would."""
    said = []
    for read_by_step in (most, 1):
        session = kiln.Session(model, read_by_step=read_by_step)
        session.prefill(ids(CHUNK))
        for name, (address, size) in session.cache_memory().items():
            if "center" not in name:
                spoil(address, size, device)
        with pytest.raises(kiln.Error, match="are not finite") as error:
            if read_by_step > 1:
                session.prefill(ids(most, 3))
            else:
                session.decode(ids(most, 3)[0])
        said.append(str(error.value))
        assert session.position == CHUNK + 1
    assert said[0] == said[1] and f"after position {CHUNK} " in said[0]


def test_refused(model, most) -> None:
    for make in (kiln.Session, kiln.Batch):
        for wrong in (-1, most + 1):
            with pytest.raises(kiln.Error, match=f"read_by_step is {wrong}: the artifact's largest step takes {most} tokens"):
                make(model, read_by_step=wrong)
