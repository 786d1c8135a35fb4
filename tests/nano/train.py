"""Trains gemma4-nano and writes it as GGUF: python -m tests.nano.train --out DIR

One GPU, minutes. The text is generated while training, every batch from (seed, stream, index); the weights' start is seeded too. Not the
same from run to run: matrix products (their order of summation follows the library and the GPU), the standard library's docstrings (they
follow the Python version), and the number of steps unless --steps is given, because it is what fits into --minutes. The log names them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from kiln.exporter.tools.quantize import write_quantized
from tests.nano import data, evals, vocabulary
from tests.nano.model import NAME, Nano, load_gguf, nano_config, save_gguf

CLASS_WEIGHTS = (0.0, 1.0, 0.5, 5.0)  # of the loss: padding, text, user, value to recall
PART_BYTES = 15 << 20  # of one piece of a file too large to travel
TIMED_STEPS = 8


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="what to keep: the log, the Q4_K_M file, the BF16 file in parts")
    p.add_argument("--work", type=Path, help="everything else: tokenizer, checkpoint, all GGUF files  [default: OUT]")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    p.add_argument("--minutes", type=float, default=4.5, help="of training, without preparation and evaluation")
    p.add_argument("--steps", type=int, help="instead of --minutes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-tokens", type=int, default=65536)
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--long-length", type=int, default=8192, help="of the sequences of the last steps")
    p.add_argument("--long-share", type=float, default=0.12, help="of the steps")
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--ffn", type=int, default=512)
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--window", type=int, default=128)
    p.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that make text; 0: none")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="[default: on a GPU]")
    p.add_argument("--haystacks", default="2048,8192,32768,131072", help="context lengths to hide keys in")
    p.add_argument("--mixes", default="q4_k_m,q5_k_m,q6_k,q4_0,q8_0")
    a = p.parse_args()
    a.work = a.work or a.out
    a.compile = a.device == "cuda" if a.compile is None else a.compile
    return a


class Log:
    """Lines on the terminal and one JSON file, rewritten after every change: a run that is cut short leaves what it knew."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()
        self.record: dict[str, Any] = {"curve": [], "lines": []}

    def say(self, text: str, **values: Any) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        self.record["lines"].append(line)
        self.record |= values
        self.path.write_text(json.dumps(self.record, indent=1))


class Trainer:
    def __init__(self, model: Nano, device: str, lr: float, compiled: bool):
        self.model, self.device, self.lr = model, device, lr
        self.plain = copy.deepcopy(model)  # the same weights when asked for, never compiled
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=device == "cuda")
        self.head = self._head
        self.weights = torch.tensor(CLASS_WEIGHTS, device=device)
        if compiled:
            for layer in model.blk:
                layer.compile(dynamic=False)
            self.head = torch.compile(self._head, dynamic=False)

    def uncompile(self) -> None:
        for layer in self.model.blk:
            layer._compiled_call_impl = None
        self.head = self._head
        self.optimizer.zero_grad(set_to_none=True)

    def _head(self, h: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(self.model.logits(h).flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    def gradient(self, batch: data.Batch) -> Tensor:
        tokens, pos, targets, classes = evals.tensors(batch, self.device)
        with evals.autocast(self.device):
            loss = self.head(self.model.hidden(tokens, pos), targets, self.weights[classes])
        loss.backward()
        return loss.detach()

    def step(self, batch: data.Batch, rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        loss = self.gradient(batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def snapshot(self) -> Nano:
        self.plain.load_state_dict(self.model.state_dict())
        return self.plain


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 2%."""
    warm = min(200, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def seconds(action, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.monotonic()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start


def planned_steps(a: argparse.Namespace, trainer: Trainer, short, long, log: Log) -> int:
    """Compiles and times both kinds of steps (no weight changes), and says how many fit into the time."""

    def trial(batch: data.Batch) -> float:
        took = seconds(lambda: trainer.gradient(batch), a.device)
        trainer.optimizer.zero_grad(set_to_none=True)
        return took

    times = []
    for stream in (short, long):
        batch = next(stream)
        try:
            first = trial(batch)
        except Exception as e:
            if not a.compile:
                raise
            log.say(f"torch.compile failed, going on without it: {type(e).__name__}: {str(e)[:500]}", compile=False)
            a.compile = False
            trainer.uncompile()
            first = trial(batch)
        batches = [next(stream) for _ in range(TIMED_STEPS)]
        times.append(sorted(trial(batch) for batch in batches)[TIMED_STEPS // 2])
        count, size = batches[0].tokens.shape
        log.say(f"a step of {count} x {size - 1}: first {first:.1f} s, then {times[-1] * 1e3:.0f} ms")
    if a.steps:
        return a.steps
    mean = (1 - a.long_share) * times[0] + a.long_share * times[1]
    return max(TIMED_STEPS, int(a.minutes * 60 / (mean * 1.12)))  # the optimizer and the tests on the way take a little more


def fit(a: argparse.Namespace, trainer: Trainer, pool, tokenizer: Path, log: Log) -> None:
    def stream(name: str, length: int, ahead: int):
        return data.feed(pool, ahead, str(tokenizer), a.seed, name, max(1, a.batch_tokens // length), length)

    short, long = stream("train", a.length, 4 * a.workers), stream("train-long", a.long_length, 2 * a.workers)
    tests = {
        "short": [data.make(str(tokenizer), a.seed, "held-out", i, max(1, a.batch_tokens // a.length), a.length) for i in range(2)],
        "long": [data.make(str(tokenizer), a.seed, "held-out-long", 0, max(1, a.batch_tokens // a.long_length), a.long_length)],
    }
    steps = planned_steps(a, trainer, short, long, log)
    n_long = int(steps * a.long_share)
    log.say(f"{steps} steps, the last {n_long} of length {a.long_length}", steps=steps, long_steps=n_long)
    every = max(1, steps // 20)
    start, waited, losses = time.monotonic(), 0.0, []
    for step in range(steps):
        before = time.monotonic()
        batch = next(long if step >= steps - n_long else short)
        waited += time.monotonic() - before
        losses.append(trainer.step(batch, rate(step, steps)))
        if (step + 1) % every == 0 or step + 1 == steps:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise SystemExit(f"step {step + 1}: the loss is {loss}; lower --lr")
            found = evals.held_out(trainer.snapshot(), tests["long" if step >= steps - n_long else "short"], a.device)
            tokens = (step + 1) * a.batch_tokens
            log.record["curve"].append({"step": step + 1, "tokens": tokens, "loss": loss, **found})
            log.say(
                f"step {step + 1}/{steps}  loss {loss:.3f}  held-out perplexity {found['perplexity']:.3f}  recall {found['recall']:.3f}  "
                f"{tokens / (time.monotonic() - start) / 1e6:.2f} M tokens/s  waited {waited:.1f} s for text"
            )
    log.say(f"trained on {steps * a.batch_tokens / 1e6:.0f} M tokens in {time.monotonic() - start:.0f} s")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def deliver(path: Path, out: Path) -> list[dict[str, Any]]:
    """Copies a file to `out`, in parts NAME.part0, NAME.part1, ... when it is too large for one."""
    raw = path.read_bytes()
    if len(raw) <= PART_BYTES:
        if path.parent != out:
            shutil.copy(path, out)
        return [{"file": path.name, "bytes": len(raw)}]
    parts = [raw[i : i + PART_BYTES] for i in range(0, len(raw), PART_BYTES)]
    for i, part in enumerate(parts):
        (out / f"{path.name}.part{i}").write_bytes(part)
    return [{"file": f"{path.name}.part{i}", "bytes": len(part)} for i, part in enumerate(parts)]


def write_files(a: argparse.Namespace, model: Nano, metadata: dict[str, Any], log: Log) -> dict[str, Path]:
    """The BF16 file (the original of all others), the F32 one, and the quantized ones."""
    files = {"bf16": a.work / f"{NAME}-BF16.gguf", "f32": a.work / f"{NAME}-F32.gguf"}
    save_gguf(model, metadata, files["bf16"], "BF16")
    write_quantized(files["bf16"], files["f32"], "f32")
    for mix in filter(None, a.mixes.split(",")):
        files[mix] = a.work / f"{NAME}-{mix.upper()}.gguf"
        write_quantized(files["bf16"], files[mix], mix)
    listing = {key: {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for key, path in files.items()}
    kept = deliver(files["bf16"], a.out) + (deliver(files["q4_k_m"], a.out) if "q4_k_m" in files else [])
    log.say(f"wrote {', '.join(path.name for path in files.values())}", files=listing, delivered=kept)
    return files


def examine(a: argparse.Namespace, files: dict[str, Path], tokenizer: Path, log: Log) -> None:
    """The finished files, read back: what they say, recall over long contexts, and each mix against the BF16 file."""
    maker = data.Maker(Tokenizer.from_file(str(tokenizer)))
    model = load_gguf(files["bf16"], a.device)
    answers = {prompt: evals.answer(model, maker, prompt, a.device) for prompt in evals.PROMPTS}
    for prompt, text in answers.items():
        log.say(f"{prompt!r} -> {text!r}", answers=answers)
    lengths = [int(x) for x in a.haystacks.split(",") if x]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        rows.append(evals.haystack(model, maker, length, 8, 4 if length <= 8192 else 2, a.device, a.seed))
        log.say(f"{length} tokens: {rows[-1]['accuracy']:.3f} of {rows[-1]['keys']} keys {rows[-1]['by_depth']}", haystack=rows)
    tests = [data.make(str(tokenizer), a.seed, "held-out", 100, max(1, a.batch_tokens // a.length), a.length)]
    mixes = {}
    for mix, path in files.items():
        other = load_gguf(path, a.device)
        mixes[mix] = {**evals.held_out(other, tests, a.device), **evals.compare(other, model, tests, a.device)}
        log.say(f"{mix}: " + "  ".join(f"{k} {v:.5f}" for k, v in mixes[mix].items()), mixes=mixes)
    if "q4_k_m" in files:
        model = load_gguf(files["q4_k_m"], a.device)
        rows = [evals.haystack(model, maker, length, 8, 2, a.device, a.seed) for length in lengths]
        log.say("q4_k_m: keys " + ", ".join(f"{r['length']}: {r['accuracy']:.3f}" for r in rows), haystack_q4_k_m=rows)


def main() -> None:
    a = arguments()
    for directory in (a.out, a.work):
        directory.mkdir(parents=True, exist_ok=True)
    # before the first CUDA call and the first thread of the tokenizer: children inherit neither
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if a.workers else "true"
    library = data.library_text(False)
    pool = multiprocessing.get_context("fork").Pool(a.workers) if a.workers else None
    log = Log(a.out / "log.json")
    torch.manual_seed(a.seed)
    name = torch.cuda.get_device_name() if a.device == "cuda" else platform.processor()
    settings = {k: v for k, v in vars(a).items() if k not in ("out", "work")}
    log.say(f"python {platform.python_version()}, torch {torch.__version__}, {name}", settings=settings, python=sys.version, gpu=name)
    digest = hashlib.sha256("\0".join(library).encode()).hexdigest()
    log.say(f"library text: {len(library)} pieces, {sum(map(len, library)) / 1e6:.2f} M characters, sha256 {digest[:16]}")
    metadata = vocabulary.train(list(data.sample_text(a.seed, 8_000_000 if a.device == "cuda" else 2_000_000)), a.vocab)
    tokenizer = a.work / "tokenizer.json"
    vocabulary.save(metadata, tokenizer)
    log.say(f"tokenizer of {a.vocab} tokens, sha256 {sha256(tokenizer)[:16]}")

    config = nano_config(a.vocab, a.hidden, a.ffn, a.layers, window=a.window)
    model = Nano(config).to(a.device)
    log.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", config=config.to_dict())
    trainer = Trainer(model, a.device, a.lr, a.compile)
    fit(a, trainer, pool, tokenizer, log)
    if pool:
        pool.terminate()
    trained = trainer.snapshot().eval()
    torch.save(trained.state_dict(), a.work / "checkpoint.pt")
    files = write_files(a, trained, metadata, log)
    del trainer, model, trained
    examine(a, files, tokenizer, log)
    log.say("done")


if __name__ == "__main__":
    main()
