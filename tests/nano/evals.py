"""What a trained model is asked: perplexity, recall, long contexts, and how far a quantized copy is from the original."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kiln.exporter.measure import evaluate as ev
from tests.nano import data
from tests.nano.model import Cache, Nano
from tests.nano.vocabulary import BOS, EOS

STOP = (EOS, 6)  # <eos>, <turn|>
PROMPTS = (
    "Why is the sky blue?", "Tell me a story about a fox.", "What is the capital of France?", "Count from 7 to 15.", "What is 12 + 30?",
    "Repeat this: lamp river honey stone crow", "Who are you?",
)  # fmt: skip


def autocast(device: str) -> contextlib.AbstractContextManager:
    """bfloat16 matrix products on a GPU; a CPU computes in float32."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def tensors(batch: data.Batch, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, their positions, targets and the targets' classes, each int64 [n, T]."""
    tokens, positions, classes = (torch.from_numpy(a.astype("int64")) for a in (batch.tokens, batch.positions, batch.classes))
    if device == "cuda":
        tokens, positions, classes = (a.pin_memory().to(device, non_blocking=True) for a in (tokens, positions, classes))
    return tokens[:, :-1], positions[:, :-1], tokens[:, 1:], classes[:, 1:]


@torch.no_grad()
def held_out(model: Nano, batches: list[data.Batch], device: str) -> dict[str, float]:
    """Perplexity of the text, and the share of value tokens (what must be recalled) that are the likeliest ones."""
    loss = count = right = values = 0.0
    for batch in batches:
        tokens, pos, targets, classes = tensors(batch, device)
        with autocast(device):
            logits = model(tokens, pos)
        text = classes == data.TEXT
        loss += F.cross_entropy(logits[text], targets[text], reduction="sum").item()
        count += text.sum().item()
        value = classes == data.VALUE
        right += (logits[value].argmax(-1) == targets[value]).sum().item()
        values += value.sum().item()
    return {"perplexity": math.exp(loss / count), "recall": right / max(values, 1.0)}


def retrieve(model: Nano, cache: Cache, questions: list[tuple[list[int], list[int]]]) -> list[bool]:
    """Of the (ids up to a value, ids of the value) asked after what the cache holds: whether every token of the value is the likeliest.

    That is the same as a greedy answer that is right.
    """
    right = []
    for lead, value in questions:
        h = model.read(lead + value, cache.fork())
        right.append(model.logits(h[-len(value) - 1 : -1]).argmax(-1).tolist() == value)
    return right


@torch.no_grad()
def haystack(model: Nano, maker: data.Maker, length: int, needles: int, trials: int, device: str, seed: int = 0) -> dict[str, Any]:
    """Share of five-digit keys told exactly, hidden evenly over contexts of `length` tokens; `by_depth` from the start to the end."""
    hits = torch.zeros(needles)
    cache_dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for trial in range(trials):
        ids, questions = maker.haystack(Random(f"{seed}/haystack/{length}/{trial}"), length, needles)
        cache = Cache(model.config, length + 128, cache_dtype, device)
        with autocast(device):
            model.read(ids, cache)
            hits += torch.tensor(retrieve(model, cache, questions))
    return {"length": length, "keys": needles * trials, "accuracy": hits.mean().item() / trials, "by_depth": (hits / trials).tolist()}


def joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pieces of `kiln.exporter.evaluate.compare_rows` as one, on the host."""
    every = list(parts)
    return {key: torch.cat([part[key].cpu() for part in every]) for key in every[0]}


@torch.no_grad()
def compare(model: Nano, reference: Nano, batches: list[data.Batch], device: str) -> dict[str, float]:
    """How far `model` is from `reference`: mean KL divergence (nats) with its 95% half width, and top-1 agreement, over all tokens."""
    parts = []
    for batch in batches:
        tokens, pos, targets, classes = tensors(batch, device)
        for row in range(len(tokens)):
            keep = classes[row] != data.IGNORED
            rows, base = (m(tokens[row : row + 1], pos[row : row + 1])[0][keep] for m in (model, reference))
            parts.append(ev.compare_rows(rows, base, targets[row][keep]))
    scores = joined(parts)
    kld, half = ev.interval(scores["kld"])
    return {"kld": kld, "kld_ci95": half, "top1": scores["top1"].mean().item()}


@torch.no_grad()
def answer(model: Nano, maker: data.Maker, prompt: str, device: str, most: int = 160) -> str:
    """The greedy answer to one user turn."""
    ids = [BOS, *maker.ids([data.USER_OPEN + prompt + data.MODEL_OPEN])[0]]
    cache = Cache(model.config, len(ids) + most, torch.float32, device)
    out: list[int] = []
    with autocast(device):
        h = model.read(ids, cache)
        while len(out) < most:
            token = int(model.logits(h[-1]).argmax())
            if token in STOP:
                break
            out.append(token)
            h = model.read([token], cache)
    return maker.tokenizer.decode(out)
