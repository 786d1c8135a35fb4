"""`kiln eval`: perplexity, KL divergence to an fp32 forward, and passkey retrieval, of a GGUF file or an artifact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.errors import KilnError, UsageProblem
from kiln.exporter.measure.picture import check_plot, log2_ticks, panels
from kiln.exporter.measure.players import (
    KV_CACHES,
    PIECE_TOKENS,
    ArtifactPlayer,
    Player,
    Text,
    artifact_text,
    gguf_text,
    graph_player,
    piece_tokens,
    reference_player,
)
from kiln.exporter.progress import say
from kiln.exporter.source.plan import ModelPlan, read_plan

SUITES = ("ppl", "kld", "needle")
SCORED_TOKENS = 512  # fed at once where rows are compared in float64
BUCKETS = (0, 128, 512, 2048, 8192, 32768, 131072)  # edges of the position buckets
Z95 = 1.959964  # half width of a 95% interval, in standard errors

NAMES = ("Anna", "Paul", "Rosa", "Peter", "Emma", "Luke", "Nora", "Sam", "Iris", "Owen", "Zoe", "Finn", "Wendy", "Noah", "Sofia", "Max")
FILLER = (
    "The grass is green and the sky is blue.",
    "A river runs past the old mill and under the stone bridge.",
    "In the morning the baker opens the door of the shop.",
    "The train leaves at noon and arrives in the evening.",
    "Birds sing in the trees behind the house.",
    "It rained for most of the week, and the fields were wet.",
    "The children walk to school along the narrow road.",
    "At night the lights of the harbour can be seen from the hill.",
)


# ---- measures ----


def interval(values: Tensor) -> tuple[float, float]:
    """Mean of float64 [n], and the half width of its 95% interval (normal, samples taken as independent)."""
    spread = values.std().item() if len(values) > 1 else math.nan
    return values.mean().item(), Z95 * spread / math.sqrt(len(values))


def compare_rows(rows: Tensor, reference: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """For each row of logits [n, V] float64 [n]: `nll` of its target; with a reference also `reference_nll`, `kld`, `top1`, `cosine`."""
    log_q = rows.double().log_softmax(-1)
    found = {"nll": -log_q.gather(1, targets[:, None])[:, 0]}
    if reference is not None:
        reference = reference.to(rows.device)
        log_p = reference.double().log_softmax(-1)
        found |= {
            "reference_nll": -log_p.gather(1, targets[:, None])[:, 0],
            "kld": (log_p.exp() * (log_p - log_q)).sum(-1),  # nats
            "top1": (reference.argmax(-1) == rows.argmax(-1)).double(),
            "cosine": torch.cosine_similarity(reference.double(), rows.double(), dim=-1),
        }
    return found


def score_text(player: Player, reference: Player | None, tokens: Sequence[int]) -> dict[str, Tensor]:
    """`compare_rows` of every token but the first, in order, from an empty cache."""
    piece = min(piece_tokens(player.vocab_size), SCORED_TOKENS)
    player.reset()
    references: Iterator[Tensor | None] = repeat(None)
    if reference:
        reference.reset()
        references = reference.score(tokens[:-1], piece)
    parts, at = [], 1
    for rows, other in zip(player.score(tokens[:-1], piece), references, strict=False):
        targets = torch.tensor(tokens[at : at + len(rows)], device=rows.device)
        parts.append({key: values.cpu() for key, values in compare_rows(rows, other, targets).items()})
        at += len(rows)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def perplexity(nll: Tensor) -> dict[str, Any]:
    mean, half = interval(nll)
    return {"tokens": len(nll), "perplexity": math.exp(mean), "ci95": [math.exp(mean - half), math.exp(mean + half)]}


def divergence_by_position(scores: dict[str, Tensor]) -> dict[str, Any]:
    """Mean KL divergence with its 95% half width, top-1 agreement and logit cosine: over all tokens, and per bucket of positions."""

    def row(start: int, end: int) -> dict[str, Any]:
        kld, half = interval(scores["kld"][start:end])
        cosine = scores["cosine"][start:end]
        return {
            "tokens": len(cosine), "kld": kld, "ci95": half, "top1": scores["top1"][start:end].mean().item(),
            "cosine_mean": cosine.mean().item(), "cosine_min": cosine.min().item(),
            "cosine_below_0.999": (cosine < 0.999).double().mean().item(),
        }  # fmt: skip

    n = len(scores["kld"])
    edges = [e for e in BUCKETS if e < n] + [n]
    buckets = [{"from": a, "to": b} | row(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return row(0, n) | {"buckets": buckets}


@dataclass(frozen=True)
class Haystack:
    """A context, and for each key hidden in it the ids from the end of the context up to its value, and those of the value."""

    context: list[int]
    questions: list[tuple[list[int], list[int]]]


def haystack(text: Text, lines: Sequence[str], depth: int, needles: int, rng: Random) -> Haystack:
    """`needles` five-digit keys hidden evenly over a user turn of other lines; with the longest question it has at most `depth` tokens."""
    if needles > len(NAMES):
        raise KilnError(f"at most {len(NAMES)} keys fit into one context, {needles} were asked for")
    hidden, questions = [], []
    for name in rng.sample(NAMES, needles):
        key = f"{rng.randrange(100000):05}"
        lead = f"The passkey of {name} is"
        hidden.append(text(f"{lead} {key}.\n"))
        questions.append((text(f"What is the passkey of {name}?") + text.suffix + text(lead), text(f" {key}")))
    room = depth - len(text.prefix) - sum(map(len, hidden)) - max(len(lead) + len(value) for lead, value in questions)
    encoded = [ids for ids in (text(line + "\n") for line in lines) if ids]
    kept: list[list[int]] = []
    at = rng.randrange(len(encoded))
    while len(line := encoded[at % len(encoded)]) <= room:
        kept.append(line)
        room -= len(line)
        at += 1
    if len(kept) < needles:
        raise KilnError(f"{needles} keys do not fit into {depth} tokens between other lines; give larger --depths")
    for i, line in sorted(enumerate(hidden), reverse=True):
        kept.insert(int((i + rng.random()) / needles * len(kept)), line)
    return Haystack(text.prefix + [token for line in kept for token in line], questions)


def retrieve(player: Player, stack: Haystack) -> list[bool]:
    """For each key whether every one of its tokens is the likeliest after the answer's first words: a greedy answer would be right."""
    player.reset()
    player.read(stack.context)
    mark = player.mark()
    right = []
    for i, (lead, value) in enumerate(stack.questions):
        if i:
            player.rewind(mark)
        rows = torch.cat(list(player.score(lead + value, PIECE_TOKENS)))
        right.append(rows[-len(value) - 1 : -1].argmax(-1).tolist() == value)
    return right


# ---- the command ----


@dataclass(frozen=True)
class EvalOptions:
    """The options of `kiln eval`, by their names there."""

    path: Path
    suites: tuple[str, ...] = ("ppl",)
    text: Path | None = None
    tokens: int = 2048
    depths: tuple[int, ...] = (2048,)
    needles: int = 8
    kv_cache: str | None = None
    reference: Path | None = None
    device: str = "auto"
    seed: int = 0
    picture: Path | None = None
    weights: Path | None = None  # of an artifact of code alone


def choose_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise KilnError("--device cuda: there is no GPU here; give --device cpu")
    return name


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Runs the suites and returns one JSON-able record. Raises KilnError."""
    for suite in options.suites:
        if suite not in SUITES:
            raise UsageProblem(f"--suite {suite} is unknown; choose from {', '.join(SUITES)}")
    if options.picture:
        if not set(PLOTTED) & set(options.suites):
            raise UsageProblem("--plot shows the suites kld and needle; add one of them to --suite")
        check_plot()
    scored = bool({"ppl", "kld"} & set(options.suites))
    if scored and options.text is None:
        raise UsageProblem("--suite ppl and kld need text to score: give --text FILE")
    written = _read_text(options.text) if options.text else None
    longest = max([options.tokens] * scored + list(options.depths) * ("needle" in options.suites))
    is_artifact = options.path.is_dir()
    plan = None if is_artifact else read_plan(options.path)
    if is_artifact and "kld" in options.suites and options.reference is None:
        raise KilnError("--suite kld of an artifact needs the GGUF file it was made from: give --reference FILE")
    if plan is None:
        player, text, record = _artifact(options)
    else:
        player, text, record = _gguf(options, plan, longest)
    if longest > player.max_seq_len:
        raise KilnError(f"{longest} tokens are asked for, {options.path} holds {player.max_seq_len}; ask for at most that")
    if scored:
        ids = text.bos + text(written or "")
        if len(ids) <= options.tokens:
            raise KilnError(f"{options.text} has {len(ids)} tokens, more than --tokens {options.tokens} are needed; give a longer text")
        reference = None
        if "kld" in options.suites:
            other = plan if plan and not options.reference else read_plan(options.reference or options.path)
            reference = reference_player(other, options.tokens, choose_device(options.device))
            if reference.vocab_size != player.vocab_size:
                sizes = f"{reference.vocab_size} tokens, {player.vocab_size} are needed"
                raise KilnError(f"the vocabulary of --reference has {sizes}; give the file that the artifact was made from")
            record["reference"] = str(options.reference or options.path)
        scores = score_text(player, reference, ids[: options.tokens + 1])
        if "ppl" in options.suites:
            record["ppl"] = perplexity(scores["nll"])
            if reference:
                record["ppl"]["reference_perplexity"] = perplexity(scores["reference_nll"])["perplexity"]
        if reference:
            record["kld"] = divergence_by_position(scores)
    if "needle" in options.suites:
        lines = [line for line in (written or "").splitlines() if line.strip()] or FILLER
        record["needle"] = []
        for depth in options.depths:
            right = retrieve(player, haystack(text, lines, depth, options.needles, Random(f"{options.seed}/{depth}")))
            row = {"depth": depth, "keys": len(right), "accuracy": sum(right) / len(right), "right": right}
            record["needle"].append(row)
            say(f"{depth} tokens: {sum(right)} of {len(right)} keys")
    if options.picture:
        plot(record, options.picture)
    return record


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # line ends stay as they are: they are part of what is scored
    except UnicodeDecodeError as e:
        raise KilnError(f"--text {path}: not UTF-8 text ({e.reason} at byte {e.start}); convert it to UTF-8") from e
    except OSError as e:
        raise KilnError(f"--text {path}: {e.strerror}") from e
    if not text.strip():
        raise KilnError(f"--text {path}: the file has no text; give a longer one")
    return text


def _artifact(options: EvalOptions) -> tuple[Player, Text, dict[str, Any]]:
    manifest = read_manifest(options.path)
    if options.kv_cache and KV_CACHES[options.kv_cache] != manifest["kv_cache"]:
        raise KilnError(f"{options.path} has a {manifest['kv_cache']} cache; drop --kv-cache {options.kv_cache} or export again")
    player = ArtifactPlayer(options.path, options.device, options.weights)
    record = {"model": str(options.path), "player": f"artifact on {player.device}", "kv_cache": manifest["kv_cache"]}
    return player, artifact_text(options.path, manifest), record


def _gguf(options: EvalOptions, plan: ModelPlan, max_seq_len: int) -> tuple[Player, Text, dict[str, Any]]:
    device = choose_device(options.device)
    kv_cache = options.kv_cache or {"cpu": "f32", "cuda": "f16"}[device]
    text = gguf_text(plan)
    player = graph_player(plan, kv_cache, max_seq_len, device)
    return player, text, {"model": str(options.path), "player": f"lowered graph on {device}", "kv_cache": KV_CACHES[kv_cache]}


def report(record: dict[str, Any]) -> str:
    """The record as text."""
    lines = [f"{record['model']}: {record['player']}, {record['kv_cache']} KV cache"]
    if ppl := record.get("ppl"):
        lines.append(f"perplexity {ppl['perplexity']:.4f}  95% [{ppl['ci95'][0]:.4f}, {ppl['ci95'][1]:.4f}]  {ppl['tokens']} tokens")
    if kld := record.get("kld"):
        lines.append(f"against fp32 over {record['reference']}")
        lines.append(f"{'positions':>15} {'KL (nats)':>11} {'+-':>9} {'top-1':>7} {'cosine':>9} {'lowest':>9}")
        for row in [*kld["buckets"], kld | {"from": "all", "to": ""}]:
            where = f"{row['from']} .. {row['to'] - 1}" if row["to"] else "all"
            lines.append(
                f"{where:>15} {row['kld']:11.3e} {row['ci95']:9.1e} {row['top1']:7.4f} {row['cosine_mean']:9.6f} {row['cosine_min']:9.6f}"
            )
    lines += [f"{row['depth']:>8} tokens: {row['accuracy']:.3f} of {row['keys']} passkeys" for row in record.get("needle", ())]
    return "\n".join(lines)


PLOTTED = ("kld", "needle")


def plot(record: dict[str, Any], path: Path) -> None:
    """KL divergence by position and passkey accuracy by depth, whichever was measured."""
    shown = [name for name in PLOTTED if name in record]
    with panels(path, len(shown)) as drawn:
        for axes, name in zip(drawn, shown, strict=True):
            if name == "kld":
                rows = record["kld"]["buckets"]
                labels = [f"{r['from']}-{r['to'] - 1}" for r in rows]
                axes.bar(labels, [r["kld"] for r in rows], yerr=[0 if math.isnan(r["ci95"]) else r["ci95"] for r in rows], capsize=4)
                axes.set(xlabel="position", ylabel="KL divergence to fp32 (nats)", title=f"{record['kv_cache']} KV cache")
            else:
                depths = [r["depth"] for r in record["needle"]]
                axes.plot(depths, [r["accuracy"] for r in record["needle"]], "o-")
                axes.set(ylim=(-0.05, 1.05), xlabel="context (tokens)", ylabel="passkeys answered right")
                log2_ticks(axes, depths)
