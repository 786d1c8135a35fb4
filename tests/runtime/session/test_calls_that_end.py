"""Calls that end early, by an exception of a callback, a signal or a number that is not finite: where the session stands afterwards."""

from __future__ import annotations

import ctypes
import functools
import json
import operator
import shutil
import time

import numpy as np
import pytest

import kiln
from tests.runtime.toy import CHUNK, MAX_SEQ, PROMPT, TOLERANCE, VOCAB, WIDTH, eager, fails, ids, run

MORE = [50, 51, 52, 53, 54, 55, 56]  # a second turn, longer than the ring


class Stop(Exception):
    pass


def throws_at(call: int):
    """A callback that throws the `call`-th time, from 0 on."""
    left = iter(range(call, -1, -1))

    def callback(value) -> None:
        if next(left) == 0:
            raise Stop

    return callback


def agrees(session, prompt: list[int], steps: int = 3) -> None:
    """What the session gives after `prompt`, its last call's tokens included, is what a model does that never stopped."""
    want, rows = eager(prompt, steps + 1)
    np.testing.assert_allclose(session.logits(), rows[0], rtol=0, atol=TOLERANCE)
    assert session.position == len(prompt)
    assert [session.decode() for _ in range(steps)] == want[1:]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, CHUNK])
@pytest.mark.parametrize("first", [[], PROMPT])
def test_a_sink_that_throws_in_prefill(toy, chunk, first):
    model = kiln.Model(str(toy))
    for call in range(-(-len(MORE) // chunk)):
        session = kiln.Session(model, prefill_chunk=chunk)
        sampled = session.prefill(first) if first else None
        session.set_logits_sink(throws_at(call))
        with pytest.raises(Stop):
            session.prefill(MORE)
        assert session.position == len(first)
        session.set_logits_sink(None)
        if first:  # what was next is next
            other = kiln.Session(model, prefill_chunk=chunk)
            other.prefill(first)
            assert other.decode(sampled) == session.decode()
            session.reset()
            session.prefill(first)
            session.set_logits_sink(throws_at(call))
            with pytest.raises(Stop):
                session.prefill(MORE)
            session.set_logits_sink(None)
        else:
            with pytest.raises(kiln.Error, match="no token to feed"):
                session.decode()
        session.prefill(MORE)
        agrees(session, first + MORE)


def test_a_sink_that_throws_in_a_step(toy):
    want, _ = eager(PROMPT, 8)
    session = kiln.Session(kiln.Model(str(toy)))
    session.prefill(PROMPT)
    for step in range(1, 6):
        session.set_logits_sink(throws_at(0))
        with pytest.raises(Stop):
            session.decode()
        session.set_logits_sink(throws_at(0))
        with pytest.raises(Stop):
            session.decode(7)  # another token, which is then not what is next
        assert session.position == len(PROMPT) + step - 1
        session.set_logits_sink(None)
        assert session.decode() == want[step]
    agrees_after = eager(PROMPT + want[:5] + [7], 1)[0]
    assert session.decode(7) == agrees_after[0]


@pytest.mark.parametrize("call", range(5))
def test_a_sink_that_throws_in_generate(toy, call):
    want, _ = eager(PROMPT, 9)
    session = kiln.Session(kiln.Model(str(toy)))
    session.prefill(PROMPT)
    session.set_logits_sink(throws_at(call))
    given: list[int] = []
    with pytest.raises(Stop):
        session.generate(9, given.append)
    assert given == want[:call + 1] and session.position == len(PROMPT) + call
    session.set_logits_sink(None)
    assert given + session.generate(9 - len(given))[0] == want


@pytest.mark.parametrize("call", range(5))
def test_a_callback_of_generate_that_throws(toy, call):
    """The token that it was given has been handed out, and is not in the caches yet."""
    want, _ = eager(PROMPT, 9)
    session = kiln.Session(kiln.Model(str(toy)))
    session.prefill(PROMPT)
    given: list[int] = []
    callback = throws_at(call)
    with pytest.raises(Stop):
        session.generate(9, lambda token: (given.append(token), callback(token))[1])
    assert given == want[:call + 1] and session.position == len(PROMPT) + call
    assert given + session.generate(9 - len(given))[0] == want


def interrupted(call) -> None:
    """Ctrl-C just before `call`, and nothing of the interpreter's between the two that would notice it."""
    time.sleep(0.1)  # a session asks Python now and then
    with pytest.raises(KeyboardInterrupt):
        list(map(operator.call, [ctypes.pythonapi.PyErr_SetInterrupt, call]))


def test_ctrl_c(toy):
    want, _ = eager(PROMPT, 9)
    session = kiln.Session(kiln.Model(str(toy)))
    interrupted(functools.partial(session.prefill, PROMPT))
    assert session.position == 0
    session.prefill(PROMPT)
    interrupted(functools.partial(session.generate, 9))
    made = session.position - len(PROMPT)
    assert 0 < made < 8 and session.generate(9 - made)[0] == want[made:]  # those before went with the call, as for any Python function


def planted(toy, folder, name: str, row: int):
    """A copy of the toy with NaN in a row of the weight `name`."""
    copy = folder / "planted"
    shutil.copytree(toy, copy, dirs_exist_ok=True)
    (spec,) = (c for c in json.loads((copy / "manifest.json").read_text())["constants"] if c["name"] == name)
    raw = bytearray((copy / "weights.safetensors").read_bytes())
    size = spec["bytes"] // int(np.prod(spec["shape"]))
    at = spec["offset"] + row * spec["bytes"] // spec["shape"][0] + size
    raw[at:at + size] = (np.float32(np.nan).view(np.uint32) >> (32 - 8 * size)).tobytes()[:size]
    (copy / "weights.safetensors").write_bytes(raw)
    return copy


def test_a_weight_that_is_not_finite(toy, tmp_path):
    """Token 17's embedding: every run in which it does not occur is sound."""
    copy = planted(toy, tmp_path, "embed", 17)
    model = kiln.Model(str(copy))
    session = kiln.Session(model)
    assert session.prefill(PROMPT[:1]) == eager(PROMPT[:1], 1)[0][0]
    session.reset()
    message = ("the logits after position 8 are not finite: the first operator is in layer 1 or right before it: 'cache' is not finite "
               "at position 1; 'embed' has a number that is not finite in row 17; make the artifact again")
    with pytest.raises(kiln.Error, match=message):
        session.prefill(PROMPT)  # its second token is 17; the ring has forgotten it
    with pytest.raises(kiln.Error, match="no token to feed"):
        session.decode()
    session.reset()
    sound = [t for t in PROMPT if t != 17]
    assert session.prefill(sound) == eager(sound, 1)[0][0]
    with pytest.raises(kiln.Error, match=f"after position {len(sound)} are not finite.* layer 0 .*'ring' is not finite at position 8;"):
        session.decode(17)
    fails("the logits after position 8 are not finite", copy, "--tokens", ids(PROMPT))


def test_a_weight_of_the_head_that_is_not_finite(toy, tmp_path):
    copy = planted(toy, tmp_path, "head", WIDTH - 1)
    fails("all cached keys and values are finite, so the first operator is behind the last layer's caches; 'head' has a number that is not "
          f"finite in row {WIDTH - 1}", copy, "--tokens", ids(PROMPT))


def test_an_infinite_weight_is_found_in_generate(toy, tmp_path):
    """The run stops in the middle: what was generated before it stays."""
    want, _ = eager(PROMPT, MAX_SEQ - len(PROMPT))
    token = next(t for t in want[3:] if t not in PROMPT + want[:3])
    count = want.index(token) + 1
    copy = planted(toy, tmp_path, "embed", token)
    session = kiln.Session(kiln.Model(str(copy)))
    session.prefill(PROMPT)
    given: list[int] = []
    with pytest.raises(kiln.Error, match=f"after position {len(PROMPT) + count - 1} are not finite"):
        session.generate(MAX_SEQ, given.append)
    assert given == want[:count] and VOCAB > token
    result = run(copy, "--tokens", ids(PROMPT))
    assert result.returncode == 1 and result.stdout.split() == [str(t) for t in want[:count]] and result.stderr.count("\n") == 1
