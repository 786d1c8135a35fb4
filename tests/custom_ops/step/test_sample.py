"""Sampling: the reference against a plain oracle, the noise, the quantized ops and sampling compiled, the kernels against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.step import sample as op
from tests.custom_ops.interpret import interpreted
from tests.custom_ops.weights.test_linear import random_weight

test_kernels_interpreted = interpreted(__file__)


def arguments(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0, pos: int = 0) -> tuple:
    return (
        logits.view(1, -1),
        torch.tensor([temperature], dtype=torch.float32),
        torch.tensor([top_k], dtype=torch.int32),
        torch.tensor([top_p], dtype=torch.float32),
        torch.tensor([seed]),
        torch.tensor([pos]),
    )


def draw(*args, **kwargs) -> int:
    token = torch.ops.kiln.sample(*arguments(*args, **kwargs))
    assert token.dtype == torch.int64 and token.shape == (1,)
    return int(token)


def random_logits(vocab: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def oracle(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability, by the definition: temperature, then top-k, then top-p, equals of the last one kept with it."""
    kept = sorted(range(len(logits)), key=lambda token: -logits[token])
    if 0 < top_k < len(logits):
        kept = [token for token in kept if logits[token] >= logits[kept[top_k - 1]]]
    weight = {token: math.exp((logits[token] - max(logits)) / temperature) for token in kept}
    if top_p < 1:
        total, mass, last = sum(weight.values()), 0.0, kept[0]
        for last in kept:
            mass += weight[last]
            if mass >= top_p * total:
                break
        weight = {token: w for token, w in weight.items() if logits[token] >= logits[last]}
    return {token: w / sum(weight.values()) for token, w in weight.items()}


def test_greedy_takes_the_first_of_equals() -> None:
    logits = random_logits(300, 3)
    logits[[250, 40, 120]] = 20.0
    for temperature in (0.0, -1.0):
        assert draw(logits, temperature, top_k=3, top_p=0.5, seed=9) == 40
    for temperature in (1e-40, 1e-9):  # only between equals is there a choice
        assert {draw(logits, temperature, seed=seed) for seed in range(20)} == {40, 120, 250}


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (12, 0.9), (1, 1.0), (0, 0.0), (100, 0.3), (-3, 2.0), (40, 1.0)])
def test_frequencies(top_k: int, top_p: float) -> None:
    """Only kept tokens are drawn, as often as their probability says (chi-squared, 8 standard deviations)."""
    logits = random_logits(40, 1.5)
    logits[[7, 8, 9]] = float(logits[11])
    temperature, draws = 0.8, 1500
    probability = oracle(logits.tolist(), temperature, top_k, top_p)
    count = np.zeros(40)
    for i in range(draws):
        count[draw(logits, temperature, top_k, top_p, seed=5, pos=i)] += 1
    assert {int(token) for token in np.flatnonzero(count)} <= set(probability)
    expected = {token: p * draws for token, p in probability.items()}
    chi = sum((count[token] - e) ** 2 / e for token, e in expected.items())
    freedom = len(expected) - 1
    assert chi <= freedom + 8 * math.sqrt(2 * freedom), (chi, freedom)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.zeros(64)
    logits[::2] = -torch.inf
    for top_k, top_p in ((0, 1.0), (50, 0.9), (10, 1.0)):
        assert all(draw(logits, 1.5, top_k, top_p, seed=seed) % 2 == 1 for seed in range(50))


def test_noise_is_a_fixed_function_of_seed_position_and_token() -> None:
    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x21F0AAAD) % 2**32
        x = ((x ^ x >> 15) * 0x735A2D97) % 2**32
        return x ^ x >> 15

    for seed, pos in ((0, 0), (1, 7), (-1, 131071), (2**40 + 3, 5)):
        key = mix(mix(mix(seed % 2**32 ^ 0x1E3779B9) ^ seed // 2**32 % 2**32) ^ pos)
        expected = [mix(mix(token ^ key) ^ key) for token in range(100)]
        assert op.noise_bits(torch.tensor([seed]), torch.tensor([pos]), 100).tolist() == expected


def test_noise_is_uniform_and_streams_differ() -> None:
    streams = [op.noise_bits(torch.tensor([seed]), torch.tensor([pos]), 1 << 16).double() / 2**32 for seed in (0, 1) for pos in (0, 1, 2)]
    for i, stream in enumerate(streams):
        assert len(stream.unique()) > (1 << 16) - 8
        assert abs(float(stream.mean()) - 0.5) < 0.006 and abs(float(stream.var()) - 1 / 12) < 0.003
        for other in streams[:i]:
            assert abs(float(torch.corrcoef(torch.stack((stream, other)))[0, 1])) < 0.02


def test_wrong_arguments_are_named() -> None:
    good = arguments(random_logits(8, 1), 1.0)
    for i, bad, message in (
        (0, good[0].half(), "logits is torch.float16"),
        (0, good[0][0], r"logits is torch.float32 \(8,\); expected float32 \[T, V\]"),
        (0, good[0].expand(2, 8), r"temperature is torch.float32 \(1,\); expected torch.float32 \(2\)"),
        (2, good[2].long(), "top_k is torch.int64"),
        (4, torch.zeros(2, dtype=torch.int64), r"seed is torch.int64 \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.kiln.sample(*good[:i], bad, *good[i + 1 :])


class Model(torch.nn.Module):
    """Embedding, a matrix, a slice of another, the tied head, sampling: every op that this file's neighbours define, once or more."""

    def __init__(self) -> None:
        super().__init__()
        for name, kind, n, k in (("table", "Q6_K", 320, 256), ("up", "Q4_K", 96, 256), ("down", "Q5_0", 512, 96)):
            words, halves, _ = random_weight(kind, n, k)
            self.register_buffer(f"{name}_words", words)
            self.register_buffer(f"{name}_halves", halves)

    def forward(self, ids, temperature, top_k, top_p, seed, pos):
        x = torch.ops.kiln.quantized_embedding(ids, self.table_words, self.table_halves, "Q6_K")
        x = torch.tanh(torch.ops.kiln.quantized_linear(x, self.up_words, self.up_halves, "Q4_K"))
        x = torch.ops.kiln.quantized_linear(x, self.down_words[:, :, 64:320], self.down_halves[:, :, 64:320], "Q5_0")
        logits = torch.ops.kiln.quantized_linear(torch.tanh(x[-1:]), self.table_words, self.table_halves, "Q6_K")
        logits = 30 * torch.tanh(logits / 3000)
        return torch.ops.kiln.sample(logits, temperature, top_k, top_p, seed, pos[-1:]), logits


@pytest.mark.nightly  # a minute and more; every artifact for the CPU has these ops compiled
def test_opaque_when_exported_reference_when_compiled(tmp_path) -> None:
    model = Model()
    settings = arguments(torch.zeros(1), 1.0)[1:5]
    tokens = torch.export.Dim("tokens", min=2, max=64)
    inputs = (torch.arange(5), *settings, torch.arange(5))
    program = torch.export.export(model, inputs, dynamic_shapes=({0: tokens}, None, None, None, None, {0: tokens}), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t.startswith("kiln.")] == [
        "kiln.quantized_embedding.default", *["kiln.quantized_linear.default"] * 3, "kiln.sample.default",
    ]
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for count in (2, 5, 33):
        ids, pos = torch.arange(count) * 7 % 320, torch.arange(count)
        for settings in ((0.0, 0, 1.0, 1), (1.0, 0, 1.0, 1), (1.0, 5, 0.5, 2), (0.7, 0, 0.3, -5), (0.7, 64, 0.95, 1 << 40)):
            temperature, top_k, top_p, seed = settings
            values = arguments(torch.zeros(1), temperature, top_k, top_p, seed)[1:5]
            token, logits = compiled(ids, *values, pos)
            expected_token, expected_logits = model(ids, *values, pos)
            torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=2e-3)
            assert torch.equal(token, expected_token), settings


# ---- under the interpreter ----

LOGITS = {
    "ordinary": random_logits(2500, 3.0),
    "peaked": random_logits(1024, 8.0, 1),
    "ties": torch.randint(-3, 4, (2500,), generator=torch.Generator().manual_seed(2)).float(),
    "equal": torch.zeros(1500),
    "forbidden": torch.where(random_logits(1300, 1.0, 3) > 0, -torch.inf, random_logits(1300, 2.0, 4)),
    "few": random_logits(3, 1.0, 5),
    "signed zeros": torch.tensor([-1.0, -0.0, 0.0, -0.0]),
}


def assert_equal_to_reference(*args, **kwargs) -> None:
    values = arguments(*args, **kwargs)
    assert int(torch.ops.kiln.sample(*values)) == int(op.reference(*values)), (args[1:], kwargs)


@pytest.mark.parametrize("name", LOGITS)
def interpreted_kernels(name: str) -> None:
    logits = LOGITS[name]
    assert_equal_to_reference(logits, 0.0, 5, 0.5, seed=3)
    assert_equal_to_reference(logits, 1.0, 1, 1.0, seed=4)
    assert_equal_to_reference(logits, 2.0, 0, 0.0, seed=5)
    for temperature in (0.3, 1.5):
        for top_k in (0, 5, 64, 2400):
            for top_p in (0.5, 0.95, 1.0):
                assert_equal_to_reference(logits, temperature, top_k, top_p, seed=top_k - 7, pos=int(100 * top_p))


def interpreted_seeds_and_positions() -> None:
    for seed in (0, 1, -1, 2**32, -(2**63), 2**63 - 1):
        for pos in (0, 262143):
            assert_equal_to_reference(LOGITS["ordinary"], 1.5, 0, 1.0, seed, pos)
            assert_equal_to_reference(LOGITS["ordinary"], 1.5, 900, 0.9, seed, pos)


def interpreted_more_listed_tokens_than_a_tile() -> None:
    """The cut falls among 1500 distinct logits within one step: several passes over the list, all 32 bits of the key."""
    logits = 1 + random_logits(1500, 1e-3)
    assert len(logits.unique()) > 1400 and op.TILE < 1500
    for top_k in (2, 700, 1499):
        for top_p in (0.4, 1.0):
            for seed in range(2):
                assert_equal_to_reference(logits, 1.0, top_k, top_p, seed)
