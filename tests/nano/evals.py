"""What a trained model is asked: perplexity, recall, long contexts, and how far a quantized copy is from the original."""

from __future__ import annotations

import contextlib
import math
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


@torch.no_grad()
def haystack(model: Nano, maker: data.Maker, length: int, needles: int, trials: int, device: str, seed: int = 0) -> dict[str, Any]:
    """Share of five-digit keys told exactly, hidden evenly over contexts of `length` tokens; `by_depth` from the start to the end.

    The value is fed after the question and every one of its tokens must be the likeliest: the same as a greedy answer that is right.
    """
    hits = torch.zeros(needles)
    cache_dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for trial in range(trials):
        ids, questions = maker.haystack(Random(f"{seed}/haystack/{length}/{trial}"), length, needles)
        cache = Cache(model.config, length + 128, cache_dtype, device)
        with autocast(device):
            model.read(ids, cache)
            for i, (lead, value) in enumerate(questions):
                h = model.read(lead + value, cache.fork())
                guess = model.logits(h[-len(value) - 1 : -1]).argmax(-1)
                hits[i] += guess.tolist() == value
    return {"length": length, "keys": needles * trials, "accuracy": hits.mean().item() / trials, "by_depth": (hits / trials).tolist()}


@torch.no_grad()
def compare(model: Nano, reference: Nano, batches: list[data.Batch], device: str) -> dict[str, float]:
    """How far `model` is from `reference`: mean KL divergence (nats) with its 95% half width, and top-1 agreement, over all tokens."""
    divergence, agree = [], 0.0
    for batch in batches:
        tokens, pos, _, classes = tensors(batch, device)
        for row in range(len(tokens)):
            keep = classes[row] != data.IGNORED
            p, q = (m(tokens[row : row + 1], pos[row : row + 1])[0][keep].log_softmax(-1) for m in (reference, model))
            divergence.append((p.exp() * (p - q)).sum(-1).double())
            agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
    kl = torch.cat(divergence)
    return {"kld": kl.mean().item(), "kld_ci95": 1.96 * (kl.std() / len(kl) ** 0.5).item(), "top1": agree / len(kl)}


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
