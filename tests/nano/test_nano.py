"""The training model, its data and its tokenizer, small: the same function as the product's decoder, the same tokens as the runner."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from kiln.custom_ops.tq4 import codec
from kiln.exporter.compiler.trace import lower, make_kv, runnable
from kiln.exporter.tools.quantize import write_quantized
from tests.nano import data, vocabulary
from tests.nano.evals import STOP
from tests.nano.grammar import passkeys
from tests.nano.model import Cache, Nano, attend, attend_banded, load_gguf, nano_config, save_gguf
from tests.timeline import feed, graph_spec, weights

VOCAB, WINDOW = 1024, 32


@pytest.fixture(scope="module")
def metadata() -> dict:
    return vocabulary.train(list(data.sample_text(0, 300_000)), VOCAB)


@pytest.fixture(scope="module")
def maker(metadata: dict, tmp_path_factory: pytest.TempPathFactory) -> data.Maker:
    return data.Maker(vocabulary.save(metadata, tmp_path_factory.mktemp("nano") / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Nano:
    """Random, with every vector away from its start, so that each of them matters."""
    torch.manual_seed(0)
    model = Nano(nano_config(VOCAB, hidden=256, ffn=256, layers=6, window=WINDOW)).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.mul_(1 + 0.3 * torch.rand_like(p))
        if "post_" in name:
            p.mul_(3)
    return model


@pytest.fixture(scope="module")
def file(model: Nano, metadata: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "nano.gguf"
    save_gguf(model, metadata, path)
    return path


@pytest.fixture(scope="module")
def ids(maker: data.Maker) -> torch.Tensor:
    return torch.tensor(maker.haystack(Random(1), 110, 1)[0])


def test_same_function_as_the_decoder(model: Nano, file: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """Our GGUF, read by the exporter: the decoder's logits are those of the model that was trained."""
    spec = graph_spec(file, max_seq_len=128, chunk=128)
    lowered = lower(spec, "prefill", "cpu")
    state = {**weights(file, tmp_path), **make_kv(lowered.kv)}
    rows = feed(runnable(lowered.program, state), None, ids, len(ids) // 3)
    reference = model(ids[None], torch.arange(len(ids))[None])[0]
    assert len(rows) >= 3
    assert max((rows[i] - reference[i]).abs().max().item() for i in rows) < 1e-4
    assert reference.std() > 0.5  # not a comparison of nothing with nothing


@pytest.mark.nightly  # of a study's cache
def test_same_exact_window_as_the_product(model: Nano, file: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """The study's cache, codes and the newest keys as they are, gives the logits of the lowered graph, in chunks of any size."""
    options = {"turboquant": True, "residual_length": 32}
    lowered = lower(graph_spec(file, max_seq_len=128, chunk=128, **options, key_center=False), "prefill", "cpu")
    state = {**weights(file, tmp_path), **make_kv(lowered.kv)}
    rows = feed(runnable(lowered.program, state), None, ids, len(ids) // 3)

    def write(layer, k, v):
        return (k, v) if layer.mixer.window else tuple(codec.decode(*codec.encode(x)) for x in (k, v))

    errors = {}
    for exact_window, chunk in ((32, 1000), (32, 40), (32, 1), (31, 1000), (0, 1000)):
        cache = Cache(model.config, 160, torch.float32, "cpu", write, exact_window)
        pieces = [model.read(ids[at : at + chunk].tolist(), cache) for at in range(0, len(ids), chunk)]
        logits = model.logits(torch.cat(pieces))
        errors[exact_window, chunk] = max((rows[i] - logits[i]).abs().max().item() for i in rows)
    print(errors)
    assert max(errors[32, chunk] for chunk in (1000, 40, 1)) < 1e-4 < min(errors[31, 1000], errors[0, 1000])

    def write_centered(layer, k, v):  # all at once: the center is of the first 24
        center = k[:, :, :24].mean(2, keepdim=True)
        return (k, v) if layer.mixer.window else (codec.decode(*codec.encode(k - center)) + center, codec.decode(*codec.encode(v)))

    lowered = lower(graph_spec(file, max_seq_len=128, chunk=128, **options), "prefill", "cpu")
    rows = feed(runnable(lowered.program, {**weights(file, tmp_path), **make_kv(lowered.kv)}), None, ids, len(ids) // 3)
    for written, close in ((write_centered, True), (write, False)):
        logits = model.logits(model.read(ids.tolist(), Cache(model.config, 160, torch.float32, "cpu", written, 32)))
        error = max((rows[i] - logits[i]).abs().max().item() for i in rows)
        assert (error < 1e-4) == close, error


def test_cache_reads_like_one_batch(model: Nano, ids: torch.Tensor) -> None:
    reference = model(ids[None], torch.arange(len(ids))[None])[0]
    for chunk in (1000, 40, 7, 1):
        cache = Cache(model.config, 160, torch.float32, "cpu")
        h = model.read(ids.tolist(), cache, chunk)
        assert (model.logits(h) - reference[-len(h) :]).abs().max() < 1e-4, chunk
    fork = cache.fork()
    first = model.logits(model.read([5, 6, 7], fork))
    assert fork.length == cache.length + 3 == len(ids) + 3
    again = model.logits(model.read([5, 6, 7], cache.fork()))  # a fork leaves nothing behind
    torch.testing.assert_close(first, again)


def test_banded_attention_with_jumps() -> None:
    torch.manual_seed(0)
    window, size = 16, 64
    q, k, v = torch.randn(2, 4, size, 8), torch.randn(2, 2, size, 8), torch.randn(2, 2, size, 8)
    pos = torch.from_numpy(np.stack([data.jumps(Random(s), size, [9, 20, 33, 48, 50], still=0.0) for s in (1, 2)])).long()
    assert (pos[:, -1] > size).all()
    distance = pos[:, None, :, None] - pos[:, None, None, :]
    plain = attend(q, k, v, (distance >= 0) & (distance < window))
    torch.testing.assert_close(attend_banded(q, k, v, pos, window), plain)


def test_gguf_round_trip(model: Nano, file: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    pos = torch.arange(len(ids))[None]
    loaded = load_gguf(file)
    torch.testing.assert_close(loaded(ids[None], pos), model(ids[None], pos), atol=1e-5, rtol=0)
    write_quantized(file, tmp_path / "q.gguf", "q4_k_m")
    coarse = load_gguf(tmp_path / "q.gguf")(ids[None], pos)
    error = (coarse - model(ids[None], pos)).abs().mean()
    assert 1e-4 < error < 0.3


def test_pieces_are_encoded_as_the_whole(maker: data.Maker, metadata: dict) -> None:
    """Training text is encoded piece by piece and line by line; the runner encodes it whole."""
    rng = Random(3)
    for secret in [s for n in (1, 2, 4, 8) for s in passkeys(rng, n)] + data.secrets(rng, 1024, "dictionary"):
        doc = [(data.USER_OPEN + secret.question, data.USER), *data.answered(secret)]
        pieces = [i for ids in maker.ids([text for text, _ in doc]) for i in ids]
        assert pieces == maker.ids(["".join(text for text, _ in doc)])[0]
    text = data.held_out_text(0, 20_000)
    lines = [i for ids in maker.ids([line + "\n" for line in text.replace("\n\n", "\n").splitlines()]) for i in ids]
    assert lines == maker.ids([text.replace("\n\n", "\n")])[0]
    assert maker.tokenizer.decode(maker.ids([text])[0]) == text
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in maker.ids([" 48213."])[0]] == ["\u2581", "4", "8", "2", "1", "3", "."]  # digits stay single
    assert [tokens[i] for i in STOP] == ["<eos>", "<turn|>"]


def test_batches(maker: data.Maker) -> None:
    """Reproducible; every recalled value stands earlier in its own sequence; positions rise and reach far."""
    batch = maker.batch(Random(7), 24, 512, recall=1.0)
    again = maker.batch(Random(7), 24, 512, recall=1.0)
    for a, b in zip((batch.tokens, batch.positions, batch.classes), (again.tokens, again.positions, again.classes), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = np.diff(batch.positions, axis=1)
    assert (steps >= 1).all() and (batch.positions[:, 0] == 0).all()
    assert 20_000 < batch.positions.max() < data.MAX_POSITION
    asked = 0
    for tokens, classes in zip(batch.tokens, batch.classes, strict=True):
        at = np.flatnonzero(classes == data.VALUE)
        for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
            value = maker.tokenizer.decode(tokens[run].tolist()).strip()
            assert value in maker.tokenizer.decode(tokens[: run[0]].tolist())
            asked += 1
    assert asked > 24
    mixed = maker.batch(Random(8), 32, 512)
    assert {data.TEXT, data.USER, data.VALUE} <= set(np.unique(mixed.classes).tolist())


def test_haystack(maker: data.Maker) -> None:
    ids, questions = maker.haystack(Random(2), 3000, 8)
    assert 2900 < len(ids) <= 3000
    text = maker.tokenizer.decode(ids)
    at = [text.index(maker.tokenizer.decode(lead + value).split("<channel|>")[-1].strip() + ".") for lead, value in questions]
    assert at == sorted(at) and at[0] < len(text) / 4 < 3 * len(text) / 4 < at[-1]


def test_library_is_split() -> None:
    training, held_out = data.library_text(False), data.library_text(True)
    assert len(training) > 1000 and len(held_out) > 50
    assert len(set(held_out) - set(training)) > 0.9 * len(set(held_out))
