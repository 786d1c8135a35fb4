"""Snapshots, rewinding, the store's budgets and saved sessions: what goes on from them equals a cold run, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from random import Random

import numpy as np
import pytest
from gguf import GGUFReader

import kiln
from tests.code_only import code_only
from tests.runtime.toy import MAX_SEQ, PROMPT, VOCAB, WIDTH, WINDOW, change
from tests.timeline import FIXTURES

pytestmark = pytest.mark.usefixtures("one_runner_thread")


@pytest.fixture(scope="module", params=["plain", "tq4"])
def real(request, artifacts) -> kiln.Model:
    """32-bit caches; TQ4 codes beside 16-bit rings. Their rings wrap several times within the context."""
    return kiln.Model(str(artifacts[request.param]), device="cpu")


def pieces(session: kiln.Session, ids: list[int], *ends: int) -> None:
    """Reads the rest of `ids` in pieces that end there."""
    for end in (*ends, len(ids)):
        if session.position < (end := min(end, len(ids))):
            session.prefill(ids[session.position : end])


def some(random: Random, model: kiln.Model, n: int) -> list[int]:
    return [random.randrange(3, model.vocab_size) for _ in range(n)]


def goes_on(session: kiln.Session, n: int) -> tuple[list[int], list[np.ndarray]]:
    rows = [session.logits()]
    session.set_logits_sink(rows.append)
    tokens, _ = session.generate(n, stop_at_eog=False)
    session.set_logits_sink(None)
    return tokens, rows


def equal(a: tuple[list[int], list[np.ndarray]], b: tuple[list[int], list[np.ndarray]]) -> bool:
    return a[0] == b[0] and len(a[1]) == len(b[1]) and all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("name, count", [("plain", 200), ("tq4", 25), pytest.param("tq4", 200, marks=pytest.mark.nightly)])
def test_random_cut_points(artifacts, name, count) -> None:
    """A snapshot anywhere in a prompt; the session, or another one, goes astray over the rings' ends, comes back and goes on."""
    real = kiln.Model(str(artifacts[name]), device="cpu")
    random, cold, session, other = Random(7 + count), kiln.Session(real), kiln.Session(real), kiln.Session(real)
    foreign, longest = 0, 20 if name == "plain" else 3  # steps; those over codes are slow on a CPU
    for _ in range(count):
        ids = some(random, real, random.randrange(3, 80))
        cut = random.randrange(1, len(ids))
        cold.reset()
        pieces(cold, ids, cut)
        right = goes_on(cold, 3)
        session.reset() if random.random() < 0.5 else session.rewind(0)
        session.prefill(ids[:cut])
        whole = random.random() < 0.3
        snapshot = session.snapshot(whole=whole)
        assert (snapshot.position, snapshot.tokens) == (cut, ids[:cut])
        if random.random() < 0.5:
            session.prefill(some(random, real, random.randrange(1, 96 - cut)))
        else:
            session.generate(random.randrange(1, min(longest, 96 - cut) + 1), stop_at_eog=False)
        taker = other if random.random() < 0.3 else session
        if whole and random.random() < 0.5:  # everything below is lost too
            session.reset()
            session.prefill(some(random, real, random.randrange(1, 90)))
        foreign += taker is other
        taker.restore(snapshot)
        assert taker.position == cut and taker.tokens == ids[:cut]
        pieces(taker, ids)
        assert equal(goes_on(taker, 3), right), (cut, len(ids), whole, taker is other)
    assert count / 8 < foreign < count / 2


def test_what_is_next_comes_back(real: kiln.Model) -> None:
    """At an answer's position: the token that is next, whether it was handed out, and the logits; forks of it share the past."""
    session, random = kiln.Session(real), Random(1)
    session.prefill(some(random, real, 30))
    first, _ = session.generate(3, stop_at_eog=False)
    snapshot = session.snapshot()  # the last of them is not in the caches yet
    right = goes_on(session, 9)
    forks = [kiln.Session(real) for _ in range(3)]
    for fork in forks:
        fork.restore(snapshot)
    assert all(equal(goes_on(fork, 9), right) for fork in forks)
    session.restore(snapshot)
    assert equal(goes_on(session, 9), right) and session.tokens[30:33] == first
    forks[0].rewind(0)
    forks[0].prefill(some(random, real, 50))
    forks[1].restore(snapshot)  # from the first one's row still
    assert equal(goes_on(forks[1], 9), right)


def test_a_past_that_was_overwritten(real: kiln.Model) -> None:
    session, random = kiln.Session(real), Random(2)
    ids = some(random, real, 40)
    pieces(session, ids, 10, 20)
    snapshots = []
    for at in (10, 20, 40):
        session.rewind(0)
        pieces(session, ids[:at], 10, 20)
        snapshots.append(session.snapshot())
    assert session.can_restore(snapshots[2]) and not session.can_restore(snapshots[0])  # position 0 on was written again
    with pytest.raises(kiln.Error, match="has overwritten what lay below position 20; a snapshot that is to outlive"):
        session.restore(snapshots[1])
    assert session.position == 40 and session.tokens == ids
    session.reset()
    pieces(session, ids[:20], 10)
    early = session.snapshot()
    session.prefill(ids[20:])
    late = session.snapshot()
    session.restore(early)
    assert session.can_restore(late)  # nothing was written since
    session.restore(late)
    session.restore(early)
    session.decode(5)
    assert not session.can_restore(late) and session.can_restore(early)
    gone, other = kiln.Session(real), kiln.Session(real)
    gone.prefill(ids)
    left = gone.snapshot()
    del gone
    with pytest.raises(kiln.Error, match="is gone, and with it what lay below position 40"):
        other.restore(left)


def test_with_the_help_of_others(real: kiln.Model) -> None:
    """A snapshot that is not whole serves another session while the one that it was taken of holds what lay below, and no longer."""
    random, store = Random(5), kiln.SnapshotStore(0, 1 << 30)
    first, second, third = kiln.Session(real), kiln.Session(real), kiln.Session(real)
    ids, tail = some(random, real, 40), some(random, real, 7)
    first.prefill(ids)
    assert store.take(first, "")
    first.prefill(some(random, real, 9))  # it goes on, which changes nothing below
    assert store.longest(second, [*ids, *tail], "") is None
    found = store.longest(second, [*ids, *tail], "", from_others=True)
    assert found is not None and not second.can_restore(found) and second.can_restore(found, from_others=True)
    second.restore(found)
    second.prefill(tail)
    cold = kiln.Session(real)
    pieces(cold, [*ids, *tail], 40)
    assert equal(goes_on(second, 9), goes_on(cold, 9))
    first.rewind(0)
    first.prefill(ids)  # the same tokens, written again
    assert store.longest(third, [*ids, *tail], "", from_others=True) is None and not third.can_restore(found, from_others=True)
    assert store.longest(second, [*ids, *tail], "") is not None  # which has them itself now


def test_rewind(real: kiln.Model) -> None:
    """Anywhere while no ring has wrapped; one token back, or to the start, afterwards; elsewhere refused with the range."""
    rings = [k["shape"][0] for k in real.manifest["kv"] if k["kind"] == "ring"]
    random, session, cold = Random(3), kiln.Session(real), kiln.Session(real)
    ids = some(random, real, 90)
    for n in (min(rings), min(rings) - 3):
        for to in (0, 1, n // 2, n - 1, n):
            session.rewind(0)
            pieces(session, ids[:n], to)
            assert session.earliest == 0
            session.rewind(to)
            more = some(random, real, 70)
            cold.reset()
            pieces(cold, ids[:to] + more, to)
            pieces(session, ids[:to] + more)
            assert session.tokens == cold.tokens and equal(goes_on(session, 3), goes_on(cold, 3)), (n, to)
    session.reset()
    session.prefill(ids[:40])
    session.generate(5, stop_at_eog=False)  # 4 steps
    assert (session.position, session.earliest) == (44, 43)
    held = session.tokens
    with pytest.raises(kiln.Error, match="rewind to 42 from 44: its rings and states have lost what lay before position 43"):
        session.rewind(42)
    for bad in (-1, 45):
        with pytest.raises(kiln.Error, match=f"rewind to {bad}: the session is at position 44"):
            session.rewind(bad)
    assert session.tokens == held
    session.rewind(43)
    with pytest.raises(kiln.Error, match="there is no token to feed"):
        session.decode()
    with pytest.raises(kiln.Error, match="no logits"):
        session.logits()
    assert session.earliest == 43
    session.decode(held[43])
    cold.reset()
    cold.prefill(ids[:40])
    for token in held[40:]:
        cold.decode(token)
    assert equal(goes_on(session, 6), goes_on(cold, 6))


def test_slack_of_rings(copy) -> None:
    """What the manifest says of a ring's window bounds what is legal; nonsense is refused."""
    session = kiln.Session(kiln.Model(str(copy)))
    session.prefill(PROMPT)
    assert session.earliest == len(PROMPT) - 1
    change(copy, lambda m: m["kv"][0].update(window=WINDOW - 2))
    session = kiln.Session(kiln.Model(str(copy)))
    session.prefill(PROMPT)
    assert session.earliest == len(PROMPT) - 3
    change(copy, lambda m: m["kv"][0].update(window=WINDOW + 1))
    with pytest.raises(kiln.Error, match=f"a window of {WINDOW + 1} in {WINDOW} slots"):
        kiln.Model(str(copy))


def test_on_each_device(toy, device, tmp_path) -> None:
    """The calls that touch a GPU's memory, at every cut of a prompt: to the host and back, between sessions, in a file."""
    model = kiln.Model(str(toy), device=device)
    session, other, cold = (kiln.Session(model) for _ in range(3))
    for cut in range(1, len(PROMPT)):
        cold.reset()
        pieces(cold, PROMPT, cut)
        right = goes_on(cold, 5)
        session.reset()
        session.prefill(PROMPT[:cut])
        kept = {(w, h): session.snapshot(whole=w, host=h) for w in (False, True) for h in (False, True)}
        for (whole, host), snapshot in kept.items():
            assert snapshot.on_device == (device == "cuda" and not host) and snapshot.whole == whole
            ring = 2 * min(cut, WINDOW) * WIDTH
            copies = ring + (4 * cut * WIDTH if whole else 0)
            assert session.snapshot_bytes(whole) == copies
            rest = 8 * cut + 4 * VOCAB
            assert (snapshot.device_bytes, snapshot.host_bytes) == ((copies, rest) if snapshot.on_device else (0, copies + rest))
            if snapshot.on_device:
                snapshot = snapshot.to_host()
                assert not snapshot.on_device and snapshot.host_bytes == copies + rest
            session.prefill([50, 51, 52, 53, 54])
            for taker in (other, session):
                taker.restore(snapshot)
                pieces(taker, PROMPT)
                assert equal(goes_on(taker, 5), right)
            session.restore(kept[False, False])
        session.save(tmp_path / "s")
        other.restore(tmp_path / "s")
        assert other.tokens == PROMPT[:cut]
        pieces(other, PROMPT)
        assert equal(goes_on(other, 5), right)
    if device == "cpu":
        with pytest.raises(kiln.Error, match="are the host's already"):
            kept[False, False].to_host()


def test_callbacks_and_pretended_positions(toy) -> None:
    session = kiln.Session(kiln.Model(str(toy)))
    session.prefill(PROMPT)
    snapshot = session.snapshot()

    def meddle(token: int) -> None:
        for call in (session.snapshot, lambda: session.restore(snapshot), lambda: session.rewind(0), lambda: session.tokens):
            with pytest.raises(kiln.Error, match="the session is in use"):
                call()

    tokens, _ = session.generate(3, meddle)
    session.restore(snapshot)
    assert session.generate(3)[0] == tokens
    session.pretend(4)
    for call in (session.snapshot, lambda: session.tokens, lambda: session.rewind(1), lambda: session.save("/nowhere/x")):
        with pytest.raises(kiln.Error, match="moved for a measurement"):
            call()
    assert not session.can_restore(snapshot)
    session.reset()
    session.prefill(PROMPT)
    assert session.tokens == PROMPT and session.generate(3)[0] == tokens
    other = kiln.Session(kiln.Model(str(toy)))
    with pytest.raises(kiln.Error, match="of another model"):
        other.restore(snapshot)


def test_tokens_are_those_that_were_fed(toy, device) -> None:
    """Steps that run ahead, callbacks that end calls, sinks that throw: the history is what a cold session needs to get there."""
    model, random = kiln.Model(str(toy)), Random(5)
    session, cold = kiln.Session(model), kiln.Session(model)
    fed: list[int] = []

    class Enough(Exception):
        pass

    for _ in range(150):
        what = random.randrange(6)
        if session.position > MAX_SEQ - 8 or what == 0:
            session.rewind(0) if random.random() < 0.5 else session.reset()
            fed = []
        if not session.position or what == 1:
            ids = [random.randrange(VOCAB) for _ in range(random.randrange(1, 6))]
            session.prefill(ids)
            fed += ids
        elif what == 2:
            left = random.randrange(1, 4)

            def few(token: int) -> bool:
                nonlocal left
                left -= 1
                if left < 0 and random.random() < 0.5:
                    raise Enough
                return left >= 0

            try:
                session.generate(5, few)
            except Enough:
                pass
        elif what == 3:
            session.decode()
        elif what == 4:

            def refuse(row: np.ndarray) -> None:
                raise Enough

            session.set_logits_sink(refuse)
            with pytest.raises(Enough):
                session.prefill([1, 2, 3]) if random.random() < 0.5 else session.decode(4)
            session.set_logits_sink(None)
        elif session.earliest < session.position:
            session.rewind(random.randrange(session.earliest, session.position))
            session.decode(random.randrange(VOCAB))
        held = session.tokens
        assert len(held) == session.position
        if what == 1:
            assert held[-len(ids) :] == ids
        cold.reset()
        for token in held:
            cold.decode(token) if cold.position else cold.prefill([token])
        snapshot = session.snapshot()
        session.decode(7)
        cold.decode(7)
        assert np.allclose(session.logits(), cold.logits(), rtol=0, atol=1e-5)
        session.restore(snapshot)


# ---- the store ----


def total(counts: dict[str, int]) -> int:
    return counts["device_bytes"] + counts["host_bytes"]


def test_the_budget_holds_under_random_use(artifacts) -> None:
    real = kiln.Model(str(artifacts["plain"]), device="cpu")
    random, session, cold = Random(11), kiln.Session(real), kiln.Session(real)
    session.prefill(some(random, real, 60))
    budget = 4 * session.snapshot(whole=True).host_bytes
    store = kiln.SnapshotStore(0, budget)
    talks = {name: some(random, real, 12) for name in "abcde"}
    ends: dict[str, list[int]] = {name: [] for name in talks}
    for turn in range(60):
        name = random.choice("abcde")
        ids = (talks[name] + some(random, real, random.randrange(2, 8)))[:88]
        found = store.longest(session, ids, name)
        if found is None:
            session.rewind(0)
        else:
            assert found.tokens == ids[: found.position] and found.position < len(ids)
            session.restore(found)
        pieces(session, ids, *ends[name])
        store.take(session, name, whole=turn % 3 > 0)
        counts = store.counts()
        assert total(counts) <= budget and counts["device_bytes"] == 0
        assert counts["hits"] + counts["misses"] == turn + 1
        cold.reset()
        pieces(cold, ids, *ends[name])
        assert np.array_equal(cold.logits(), session.logits())
        if len(ids) < 80:
            talks[name] = ids
            ends[name].append(len(ids))
    assert counts["evicted"] > 5 and counts["hits"] > 10 and counts["misses"] > 5 and counts["refused"] == 0
    for name in "abcde":
        store.forget(name)
    assert (total(store.counts()), store.counts()["kept"]) == (0, 0)
    small = kiln.SnapshotStore(0, 100)
    assert not small.take(session, "x") and small.counts()["refused"] == 1 and total(small.counts()) == 0


def test_which_go_first(toy, device) -> None:
    """The conversation that was used least recently, of it the snapshot used least recently; on a GPU to the host first."""
    model = kiln.Model(str(toy), device=device)
    session = kiln.Session(model)
    session.prefill(PROMPT)
    copies, rest = session.snapshot_bytes(True), 4 * VOCAB + 8 * len(PROMPT)
    each = copies + rest
    store = kiln.SnapshotStore(3 * each, 2 * each) if device == "cuda" else kiln.SnapshotStore(0, 3 * each)

    def take(first: int, name: str) -> None:
        session.reset()
        session.prefill([first, *PROMPT[1:]])
        assert store.take(session, name, whole=True)
        assert store.take(session, name, whole=True)  # it is there already

    def kept() -> list[int]:
        counts = store.counts()
        found = [i for i in range(20) if store.longest(session, [i, *PROMPT[1:], 1], "look") is not None]
        assert len(found) == counts["kept"]
        return found

    for first, name in ((1, "a"), (2, "b"), (3, "a")):
        take(first, name)
    assert store.longest(session, [2, *PROMPT[1:], 5], "b")
    assert store.longest(session, [2, *PROMPT[1:]], "b") is None  # a token must be left
    if device == "cpu":
        take(4, "c")
        assert store.counts()["kept"] == 3 and kept() == [2, 3, 4]  # of "a", which is the oldest now, the older
    else:
        take(4, "c")
        take(5, "c")
        assert store.counts()["moved"] == 2 and store.counts()["kept"] == 5
        take(6, "c")
        assert store.counts()["evicted"] == 1 and kept() == [2, 3, 4, 5, 6]
        store = kiln.SnapshotStore(2 * each, 0)  # what lies beside a device's copies needs nothing of the host's budget
        for first in (1, 2, 3):
            take(first, "a")
        assert kept() == [2, 3] and store.counts()["host_bytes"] == 0 and store.counts()["device_bytes"] == 2 * each


def test_threads_share_a_store(real: kiln.Model) -> None:
    """Each with its own session; snapshots are taken, restored and dropped by all of them."""
    prompt = some(Random(4), real, 30)
    tails = {i: some(Random(i), real, 12) for i in range(6)}
    cold, right = kiln.Session(real), {}
    for i, tail in tails.items():
        cold.reset()
        pieces(cold, prompt + tail, 30)
        right[i] = goes_on(cold, 3)
    store, errors = kiln.SnapshotStore(0, 400_000), []
    first = kiln.Session(real)
    first.prefill(prompt)
    assert store.take(first, "shared", whole=True)

    def work(thread: int) -> None:
        session, random = kiln.Session(real), Random(thread)
        for turn in range(8):
            i = random.randrange(6)
            found = store.longest(session, prompt + tails[i], f"{thread}")
            if found is None:
                session.rewind(0)
                session.prefill(prompt)
                store.take(session, f"{thread}", whole=True)
            else:
                session.restore(found)
            pieces(session, prompt + tails[i])
            if not equal(goes_on(session, 3), right[i]) or total(store.counts()) > 400_000:
                errors.append((thread, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and store.counts()["hits"] > 5


# ---- files ----

GO_ON = """
import hashlib, json, sys, kiln
model = kiln.Model(sys.argv[1], device="cpu")
session = kiln.Session(model)
session.restore(sys.argv[2])
held, rows = session.tokens, [session.logits()]
session.set_logits_sink(rows.append)
tokens = session.generate(9, stop_at_eog=False)[0]
digest = hashlib.sha256(b"".join(r.tobytes() for r in rows)).hexdigest()
print(json.dumps([held, tokens, digest]))
"""


@pytest.mark.parametrize("name", ["plain", "tq4"])
def test_in_another_process(artifacts, name, tmp_path: Path) -> None:
    model = kiln.Model(str(artifacts[name]), device="cpu")
    session = kiln.Session(model)
    session.prefill(some(Random(8), model, 47))
    session.generate(20, stop_at_eog=False)
    session.save(tmp_path / "a session")
    moved = (tmp_path / "a session").rename(tmp_path / "moved")
    held = session.tokens
    tokens, rows = goes_on(session, 9)
    done = subprocess.run([sys.executable, "-c", GO_ON, artifacts[name], moved], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [held, tokens, hashlib.sha256(b"".join(r.tobytes() for r in rows)).hexdigest()]
    filled = sum(k["bytes"] for k in model.manifest["kv"])
    assert moved.stat().st_size < filled + 100_000 and os.listdir(tmp_path) == ["moved"]
    assert moved.stat().st_mode & 0o777 == 0o600  # what was said is in it


@pytest.mark.parametrize("n", [10, 24, 31, 32, 60])
def test_a_saved_session_holds_its_own_text_alone(real, n: int, tmp_path: Path) -> None:
    """Nothing of what was in the session before is in the file: before and behind the center's last key, and the first code."""
    text, files = some(Random(9), real, n), []
    for before in (90, 0):
        session = kiln.Session(real)
        if before:
            session.prefill(some(Random(10), real, before))
            session.reset()
        session.prefill(text[:7])
        session.prefill(text[7:])
        session.save(tmp_path / str(before))
        files.append((tmp_path / str(before)).read_bytes())
    assert files[0] == files[1]


def test_files_that_are_refused(toy, copy, tmp_path: Path) -> None:
    """One line each, and the session stays as it is."""
    model = kiln.Model(str(toy))
    session = kiln.Session(model)
    session.prefill(PROMPT)
    path, bad = tmp_path / "s", tmp_path / "bad"
    session.save(path)
    whole = path.read_bytes()
    session.reset()
    session.prefill([4, 5, 6])
    snapshot = session.snapshot()
    right = goes_on(session, 4)
    session.restore(snapshot)

    def refused(raw: bytes, match: str) -> None:
        bad.write_bytes(raw)
        with pytest.raises(kiln.Error, match=match) as e:
            session.restore(bad)
        assert "\n" not in str(e.value) and str(bad) in str(e.value)
        assert session.tokens == [4, 5, 6]

    random = Random(6)
    places = sorted({*range(80), *random.sample(range(80, len(whole)), 150)})
    for at in places:
        refused(whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :], "damaged|not a saved session|of version")
    for at in (0, 7, 79, 80, 100, len(whole) - 1):
        refused(whole[:at], "damaged|not a saved session|is empty")
    refused(whole + b"x", "1 bytes too many")
    refused(b"kilnsess\2" + whole[9:], "a session of version 2, this runner reads 1")
    with pytest.raises(kiln.Error, match="no/such: cannot open"):
        session.restore("/no/such")
    with pytest.raises(kiln.Error, match="cannot save the session"):
        session.save("/no/such/folder/x")
    change(copy, lambda m: m["source"].update(name="another"))
    with pytest.raises(kiln.Error, match="s: a session of another artifact"):
        kiln.Session(kiln.Model(str(copy))).restore(path)
    session.restore(snapshot)
    assert equal(goes_on(session, 4), right)
    session.restore(path)
    assert session.tokens == PROMPT


def test_of_other_weights(artifacts, tmp_path: Path) -> None:
    """Where the weights come from a GGUF file, one manifest fits many: a session knows those that it was computed with."""
    gguf = FIXTURES / "gemma4-tiny-dense.gguf"
    artifact = str(code_only(artifacts["plain"], gguf, tmp_path / "artifact"))
    raw = bytearray(gguf.read_bytes())
    tensor = next(t for t in GGUFReader(gguf).tensors if t.name == "blk.1.attn_q.weight")
    raw[tensor.data_offset + tensor.n_bytes - 4] ^= 1  # the last bit of the last number
    (tmp_path / "other.gguf").write_bytes(raw)
    first, same, other = (
        kiln.Session(kiln.Model(artifact, device="cpu", weights=str(w))) for w in (gguf, gguf, tmp_path / "other.gguf")
    )
    first.prefill([5, 6, 7, 8])
    first.save(tmp_path / "s")
    same.restore(tmp_path / "s")
    assert equal(goes_on(same, 3), goes_on(first, 3))
    with pytest.raises(kiln.Error, match="s: a session of another artifact, or of other weights"):
        other.restore(tmp_path / "s")
