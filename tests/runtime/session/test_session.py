"""Sessions: tokens and logits, one timeline or several, sampling, limits, memory."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import kiln
from tests.runtime.toy import CHUNK, MAX_SEQ, PROMPT, TOLERANCE, VOCAB, WIDTH, WINDOW, change, eager, fails, ids, run, sampling_tensors


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 9, CHUNK])
def test_tokens_and_logits_equal_eager_at_every_chunk(toy, chunk):
    want, rows = eager(PROMPT, 8)
    session = kiln.Session(kiln.Model(str(toy)), prefill_chunk=chunk)
    seen = []
    session.set_logits_sink(seen.append)
    assert session.prefill(PROMPT) == want[0]
    assert session.position == len(PROMPT) and len(seen) == -(-len(PROMPT) // chunk)
    tokens, stop = session.generate(8)
    assert (tokens, stop) == (want, "length")
    np.testing.assert_allclose(np.stack(seen[-8:]), rows, rtol=0, atol=TOLERANCE)
    assert len({tuple(r.argsort()[-3:]) for r in rows}) > 3  # the toy's logits do move


def test_decode_step_by_step_and_forced(toy):
    want, rows = eager(PROMPT, 6)
    session = kiln.Session(kiln.Model(str(toy)))
    got = [session.prefill(PROMPT)] + [session.decode() for _ in range(5)]
    assert got == want
    np.testing.assert_allclose(session.logits(), rows[-1], rtol=0, atol=TOLERANCE)
    forced = kiln.Session(kiln.Model(str(toy)))
    forced.prefill(PROMPT[:4])
    for token in PROMPT[4:]:
        last = forced.decode(token)
    assert last == want[0]
    np.testing.assert_allclose(forced.logits(), rows[0], rtol=0, atol=TOLERANCE)


def test_generate_goes_on_where_it_stopped(toy):
    want, _ = eager(PROMPT, 9)
    session = kiln.Session(kiln.Model(str(toy)))
    session.prefill(PROMPT)
    first, stop = session.generate(4)
    assert stop == "length" and session.position == len(PROMPT) + 3
    left = iter([True, None, False])  # only False stops
    second, stop = session.generate(9, lambda token: next(left))
    assert stop == "callback" and first + second == want[:7]
    assert first + second + session.generate(2)[0] == want


def test_steps_in_flight_are_discarded(toy, device):
    """On a GPU a step runs ahead of the token that ends a generation; what follows must not notice."""
    want, rows = eager(PROMPT, 4)
    after, _ = eager(PROMPT + want[:1] + [50, 51, 52, 53, 54], 5)
    for graph in (True, False):
        session = kiln.Session(kiln.Model(str(toy)), graph=graph)
        session.prefill(PROMPT)
        assert session.generate(10, lambda token: False) == (want[:1], "callback")
        session.generate(2)
        assert session.position == len(PROMPT) + 2
        session.reset()
        session.prefill(PROMPT)
        left = iter([True, False])
        assert session.generate(10, lambda token, left=left: next(left)) == (want[:2], "callback")
        assert session.position == len(PROMPT) + 1
        if device == "cuda":
            with pytest.raises(kiln.Error, match="discarded"):
                session.logits()
        else:
            np.testing.assert_allclose(session.logits(), rows[1], rtol=0, atol=TOLERANCE)
        session.prefill([50, 51, 52, 53, 54])
        assert session.generate(5)[0] == after
        with pytest.raises(ZeroDivisionError):
            session.generate(9, lambda token: 1 // 0)
        assert session.position == len(PROMPT) + 1 + 5 + 4 + 1
    with pytest.raises(kiln.Error, match="max_new_tokens"):
        session.generate(0)


def test_reset_and_sessions_do_not_bleed(toy):
    model = kiln.Model(str(toy))
    other = [11, 12, 13, 14, 15]
    a, b = kiln.Session(model), kiln.Session(model)
    a.prefill(PROMPT)
    b.prefill(other)
    mixed_a, mixed_b = [], []
    for _ in range(6):
        mixed_a.append(a.decode())
        mixed_b.append(b.decode())
    assert mixed_a == eager(PROMPT, 7)[0][1:] and mixed_b == eager(other, 7)[0][1:]
    a.reset()
    assert a.position == 0
    with pytest.raises(kiln.Error, match="no logits"):
        a.logits()
    with pytest.raises(kiln.Error, match="before prefill"):
        a.decode()
    assert [a.prefill(other), *(a.decode() for _ in range(6))] == eager(other, 7)[0]
    a.reset()
    for session in (a, kiln.Session(model)):  # too short to overwrite a ring that reset or, on a GPU, the warm-up left filled
        session.prefill(PROMPT[:2])
        np.testing.assert_allclose(session.logits(), eager(PROMPT[:2], 1)[1][0], rtol=0, atol=TOLERANCE)


def test_sessions_in_threads(toy):
    model, results = kiln.Model(str(toy)), {}

    def work(i: int) -> None:
        prompt = PROMPT[i:]
        session = kiln.Session(model)
        session.prefill(prompt)
        results[i] = session.generate(10)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {i: eager(PROMPT[i:], 10)[0] for i in range(4)}


def test_sampling_inputs_reach_both_models(toy):
    session = kiln.Session(kiln.Model(str(toy)))
    session.set_sampling(temperature=0.5, top_k=3, top_p=0.9, seed=7)
    want, _ = eager(PROMPT, 5, sampling_tensors(0.5, 3, 0.9, 7))
    assert want != eager(PROMPT, 5)[0]
    session.prefill(PROMPT)
    assert session.generate(5)[0] == want
    for bad in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(kiln.Error, match=next(iter(bad))):
            session.set_sampling(**bad)


def test_limit_of_max_seq_len(toy):
    session = kiln.Session(kiln.Model(str(toy)))
    full = (PROMPT * 3)[:MAX_SEQ]
    with pytest.raises(kiln.Error, match=f"{MAX_SEQ + 1} tokens.* holds {MAX_SEQ}"):
        session.prefill([*full, 1])
    assert session.position == 0
    first = session.prefill(full)
    assert session.generate(5) == ([first], "max_seq_len")
    with pytest.raises(kiln.Error, match="full"):
        session.decode()
    session.reset()
    session.prefill(PROMPT)
    tokens, stop = session.generate(100)
    assert (tokens, stop) == (eager(PROMPT, MAX_SEQ - len(PROMPT) + 1)[0], "max_seq_len")
    for bad in ([VOCAB], [-1], []):
        with pytest.raises(kiln.Error):
            session.prefill(bad)


def test_memory_and_properties(toy, device):
    model = kiln.Model(str(toy), verify=True)
    memory = kiln.Session(model).memory()
    assert memory["weights"] == 4 * VOCAB * WIDTH + 2 * WIDTH * VOCAB + 4 * MAX_SEQ
    assert (memory["kv_ring"], memory["kv_global"]) == (2 * WINDOW * WIDTH, 4 * MAX_SEQ * WIDTH)
    assert memory["total"] == sum(memory[k] for k in memory if k != "total")
    assert (memory["activations"] > 0) == (device == "cuda")
    assert model.device == {"cpu": "cpu", "cuda": "cuda:0"}[device] and model.target == model.manifest["targets"][0]["target"]
    assert (model.vocab_size, model.max_seq_len, model.prefill_chunk) == (VOCAB, MAX_SEQ, CHUNK)
    assert model.manifest["source"]["architecture"] == "toy"
    with pytest.raises(kiln.Error, match="no tokenizer"):
        model.encode_prompt("x")
    with pytest.raises(kiln.Error, match="prefill chunk 13"):
        kiln.Session(model, prefill_chunk=CHUNK + 1)


def test_end_of_generation_tokens_stop(copy):
    want, _ = eager(PROMPT, 8)
    stop_at = next(t for t in want[2:] if t not in want[:2])
    texts = ["<bos>"] + [f"t{i}" for i in range(1, VOCAB)]
    vocab = {t: i for i, t in enumerate(texts)} | {f"<0x{b:02X}>": VOCAB + b for b in range(256)}
    document = {
        "added_tokens": [{"id": 0, "content": "<bos>", "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated"}, "post_processor": None,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []},
    }
    (copy / "tokenizer.json").write_text(json.dumps(document))
    change(copy, lambda m: m.update(tokenizer={"file": "tokenizer.json", "bos": None, "eog": [stop_at]}))
    fails(f"the tokenizer has {len(vocab)} tokens, the model {VOCAB}", copy, "--tokens", "1")
    for point in ("prefill", "decode"):  # the token ids of the toy stay below VOCAB: only the manifest's figure grows
        change(copy, lambda m, p=point: m["entry_points"][p]["outputs"][1].update(shape=[1, len(vocab)]))
    before = want[:want.index(stop_at)]
    result = json.loads(run(copy, "--tokens", ids(PROMPT), "--json").stdout)
    assert (result["tokens"], result["stop"], result["text"]) == (before, "eog", "".join(texts[t].replace("<bos>", "") for t in before))
    result = json.loads(run(copy, "--tokens", ids(PROMPT), "--json", "--no-eog", "--max-new-tokens", 8).stdout)
    assert (result["tokens"], result["stop"]) == (want, "length")


# ---- many at once ----

PROMPTS = [PROMPT[i % 5 :] + [i] * (1 + i % 3) for i in range(40)]


def answer(session, prompt: list[int], n: int = 5) -> list[int]:
    session.prefill(prompt)
    return session.generate(n)[0]


@pytest.fixture(scope="module")
def solo(toy) -> list[list[int]]:
    """The answers of sessions that have the model for themselves."""
    model = kiln.Model(str(toy))
    found = [answer(kiln.Session(model), prompt) for prompt in PROMPTS]
    assert found[:4] == [eager(prompt, 5)[0] for prompt in PROMPTS[:4]] and len({tuple(tokens) for tokens in found}) > 3
    return found


def test_many_sessions_alive_at_once(toy, device, solo):
    """More than the 32 streams that torch keeps: a step of one may not be recorded into the graph of another."""
    count = {"cpu": 6, "cuda": 40}[device]
    model = kiln.Model(str(toy))
    sessions = [kiln.Session(model) for _ in range(count)]
    for _ in range(2):
        answers = [[session.prefill(prompt)] for session, prompt in zip(sessions, PROMPTS, strict=False)]
        for _ in range(4):
            for session, tokens in zip(sessions, answers, strict=True):
                tokens.append(session.decode())
        assert answers == solo[:count]
        for session in sessions:
            session.reset()


def in_threads(count: int, work) -> None:
    """work(i) in `count` threads that begin together; raises the first of their errors."""
    errors, barrier = [], threading.Barrier(count)

    def run_one(i: int) -> None:
        try:
            barrier.wait()
            work(i)
        except Exception as e:  # of any kind: it is the finding
            errors.append(e)

    threads = [threading.Thread(target=run_one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_sessions_alive_at_once_in_threads(toy, device, solo):
    """All made, used and destroyed beside each other; a GPU's under graphs."""
    count = {"cpu": 6, "cuda": 40}[device]
    model, answers = kiln.Model(str(toy)), {}

    def work(i: int) -> None:
        answers[i] = answer(kiln.Session(model), PROMPTS[i])

    in_threads(count, work)
    assert [answers[i] for i in range(count)] == solo[:count]


def test_sessions_made_and_destroyed_by_threads(toy, device, solo):
    """On a GPU 64 sessions by 8 threads, 20 rounds; a few on the CPU, where ThreadSanitizer has its own test."""
    threads, each, rounds = {"cpu": (3, 2, 2), "cuda": (8, 8, 20)}[device]
    model = kiln.Model(str(toy))

    def work(i: int) -> None:
        for turn in range(each):
            at = (i * each + turn) % len(PROMPTS)
            assert answer(kiln.Session(model), PROMPTS[at]) == solo[at]

    for _ in range(rounds):
        in_threads(threads, work)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; this machine has fewer")
def test_two_gpus_at_once(toy, device, solo):
    """The same model on each of two devices, by threads in turn: every thread that touches a device selects it first."""
    if device == "cpu":
        pytest.skip("of GPUs alone")
    models = [kiln.Model(str(toy), device=f"cuda:{i}") for i in range(2)]
    assert [model.device for model in models] == ["cuda:0", "cuda:1"]

    def work(i: int) -> None:
        for at in range(i, 12, 4):
            assert answer(kiln.Session(models[(i + at) % 2]), PROMPTS[at]) == solo[at]

    in_threads(4, work)
    sessions = [kiln.Session(model) for model in models]
    assert [answer(session, PROMPTS[0]) for session in sessions] == [solo[0]] * 2


def test_a_session_is_one_threads_at_a_time(toy, device):
    session = kiln.Session(kiln.Model(str(toy)))
    session.prefill(PROMPT)
    refused = []

    def on_token(token: int) -> None:
        assert session.position >= len(PROMPT)  # this may be asked at any time
        for call in (session.decode, session.reset, session.logits, lambda: session.prefill([1, 2]), lambda: session.generate(1)):
            with pytest.raises(kiln.Error, match="the session is in use"):
                call()
        with ThreadPoolExecutor(1) as pool:
            assert "the session is in use" in str(pool.submit(session.decode).exception())
        refused.append(token)

    tokens, _ = session.generate(4, on_token, stop_at_eog=False)
    assert tokens == refused == eager(PROMPT, 4)[0]
    session.reset()  # and afterwards it goes on as ever
    session.prefill(PROMPT)
    assert session.generate(4, stop_at_eog=False)[0] == tokens


def test_pretending_for_a_measurement(toy):
    session = kiln.Session(kiln.Model(str(toy)))
    assert sorted(session.cache_memory()) == ["cache", "ring"] and session.cache_memory()["cache"][1] == MAX_SEQ * WIDTH * 4
    session.pretend(MAX_SEQ - 2)
    assert session.position == MAX_SEQ - 2 and len(session.generate(9, stop_at_eog=False)[0]) == 3
    with pytest.raises(kiln.Error, match="position 25: the artifact holds 24 tokens"):
        session.pretend(MAX_SEQ + 1)
