"""What TQ4 costs in the product: two artifacts of the small model that differ in their KV cache alone, token by token in the runner.

    python -m tests.nano.artifact_study --exact DIR --tq4 DIR --out DIR

Both are exported with `--weights copy`, so that their manifests tell whether their weights are the same.
Windows: a context is read to each depth, then fed on token by token; logits of both artifacts are compared row by row. Passkeys: all keys
of a context are asked for one after another, each value fed token by token; a greedy answer would be right where every token is the
likeliest. Writes artifact-study.json after every row, artifact-study.md at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.errors import KilnError
from kiln.exporter.measure import evaluate as ev
from kiln.exporter.measure.players import ArtifactPlayer
from tests.nano import data
from tests.nano.grammar import passkeys

WINDOW_DEPTHS = (128, 2048, 8192, 32768, 65536, 98304, 131072)  # the last one is where the last window ends
KEY_DEPTHS = (2048, 8192, 32768, 131072)
COSINE = 0.999
Keys = list[tuple[list[int], list[int]]]  # what is fed before a value, and the value


def windows(depths: Sequence[int], window: int, slots: int) -> list[int]:
    """Where the windows start: at every depth that leaves room, none overlapping; the last one ends at the deepest."""
    starts = [depth for depth in depths if depth + window <= slots]
    if len(starts) < len(depths):
        starts.append(slots - window)
    for a, b in zip(starts, starts[1:], strict=False):
        if b < a + window:
            raise KilnError(f"windows of {window} tokens at {a} and {b} overlap; give a smaller --window or other --depths")
    return starts


def window_rows(player: ArtifactPlayer, ids: list[int], starts: list[int], window: int) -> Tensor:
    """float32 [windows, window, V]: the logits after each token of the windows; between them the context is prefilled."""
    player.reset()
    rows, at = [], 0
    for start in starts:
        player.read(ids[at:start])
        at = start + window
        rows.append(torch.cat(list(player.score(ids[start:at], window))))
    return torch.stack(rows)


def key_context(maker: data.Maker, rng: Random, depth: int, needles: int) -> tuple[list[int], Keys]:
    """A user turn that hides `needles` keys evenly, and the questions in a random order; all of it has at most `depth` tokens."""
    hidden = passkeys(rng, needles)
    asked = rng.sample(range(needles), needles)
    keys: Keys = []
    for i, key in enumerate(asked):
        before = maker.ids([hidden[asked[i - 1]].end + data.TURN_CLOSE, data.USER_OPEN]) if i else []
        lead, value = maker.question(hidden[key])
        keys.append((sum(before, []) + lead, value))
    return maker.user_turn(rng, hidden, depth, sum(len(lead) + len(value) for lead, value in keys)), keys


def answers(player: ArtifactPlayer, context: list[int], keys: Keys) -> list[bool]:
    """For each key whether every token of its value is the likeliest after the tokens before it."""
    player.reset()
    player.read(context)
    right = []
    for lead, value in keys:
        player.read(lead[:-1])
        rows = torch.cat(list(player.score([lead[-1], *value], 1 << 20)))
        right.append(rows[:-1].argmax(-1).tolist() == value)
    return right


def divergence(exact: Tensor, tq4: Tensor, targets: Tensor) -> dict[str, Any]:
    """Of rows [contexts, positions, V] and their targets: KL both ways with 95% half widths, cosines, the change of the NLL.

    `cosine_min` is the lowest of all rows, `cosine_position_min` the lowest of the positions' means over the contexts.
    """
    positions = targets.shape[1]
    exact, tq4, targets = exact.flatten(0, 1), tq4.flatten(0, 1), targets.flatten()
    found = ev.compare_rows(tq4, exact, targets)
    kld, kld_ci = ev.interval(found["kld"])
    reverse, reverse_ci = ev.interval(ev.compare_rows(exact, tq4, targets)["kld"])
    change, change_ci = ev.interval(found["nll"] - found["reference_nll"])
    cosine = found["cosine"]
    return {
        "tokens": len(cosine), "cosine_mean": cosine.mean().item(), "cosine_min": cosine.min().item(),
        "cosine_position_min": cosine.unflatten(0, (-1, positions)).mean(0).min().item(), "below": (cosine < COSINE).sum().item(),
        "kl_exact_tq4": kld, "kl_exact_tq4_ci95": kld_ci, "kl_tq4_exact": reverse, "kl_tq4_exact_ci95": reverse_ci,
        "top1": found["top1"].mean().item(), "nll_change": change, "nll_change_ci95": change_ci,
    }  # fmt: skip


class Study:
    def __init__(self, a: argparse.Namespace):
        self.a, self.start = a, time.monotonic()
        manifests = {"exact": read_manifest(a.exact), "tq4": read_manifest(a.tq4)}
        if manifests["tq4"]["kv_cache"] != "tq4" or manifests["exact"]["kv_cache"] == "tq4":
            raise KilnError("--exact and --tq4 are artifacts with an exact and a TQ4 KV cache: kiln export --kv-cache bf16 and tq4")
        differing = [key for key in ("config", "activation_dtype", "constants") if manifests["exact"][key] != manifests["tq4"][key]]
        if differing:
            raise KilnError(f"{a.exact} and {a.tq4} differ in {', '.join(differing)}; export both from the same file, for the same target, "
                            "with --weights copy")
        self.players = {name: ArtifactPlayer(getattr(a, name), a.device) for name in manifests}
        self.slots = min(player.max_seq_len for player in self.players.values())
        self.maker = data.Maker(Tokenizer.from_file(str(a.tq4 / manifests["tq4"]["tokenizer"]["file"])))
        self.record: dict[str, Any] = {
            "model": manifests["tq4"]["source"]["file"], "exact_kv_cache": manifests["exact"]["kv_cache"],
            "activation_dtype": manifests["tq4"]["activation_dtype"],
            "device": torch.cuda.get_device_name() if self.players["tq4"].device.startswith("cuda") else "cpu",
            "max_seq_len": self.slots, "window": a.window, "contexts": a.contexts, "seed": a.seed, "windows": [], "keys": [],
        }  # fmt: skip

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {line}", flush=True)
        self.record["seconds"] = time.monotonic() - self.start
        (self.a.out / "artifact-study.json").write_text(json.dumps(self.record, indent=1))

    def windows(self) -> None:
        starts = windows([d for d in self.a.depths if d <= self.slots], self.a.window, self.slots)
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in range(self.a.contexts):
            ids, _ = self.maker.haystack(Random(f"{self.a.seed}/windows/{i}"), self.slots + 512, 1)
            ids = ids[: self.slots + 1]
            targets = torch.stack([torch.tensor(ids[s + 1 : s + self.a.window + 1]) for s in starts])
            rows = {name: window_rows(player, ids, starts, self.a.window) for name, player in self.players.items()}
            pairs.append((rows["exact"], rows["tq4"], targets))
            self.say(f"context {i + 1} of {self.a.contexts} read: {len(starts)} windows of {self.a.window} tokens")
        exact, tq4, targets = (torch.stack(parts) for parts in zip(*pairs, strict=True))  # [contexts, windows, window, V or nothing]
        for w, start in enumerate(starts):
            row = {"from": start, "to": start + self.a.window}
            row |= divergence(exact[:, w], tq4[:, w], targets[:, w])
            self.record["windows"].append(row)
            self.say(f"{row['from']:>7}: {brief(row)}")
        self.record["all"] = divergence(exact.flatten(1, 2), tq4.flatten(1, 2), targets.flatten(1))
        self.say(f"    all: {brief(self.record['all'])}")

    def keys(self) -> None:
        for depth in (d for d in self.a.key_depths if d <= self.slots):
            right: dict[str, list[bool]] = {name: [] for name in self.players}
            for i in range(self.a.key_contexts):
                context, keys = key_context(self.maker, Random(f"{self.a.seed}/keys/{depth}/{i}"), depth, self.a.needles)
                for name, player in self.players.items():
                    right[name] += answers(player, context, keys)
            share = {name: sum(found) / len(found) for name, found in right.items()}
            differ = sum(a != b for a, b in zip(right["exact"], right["tq4"], strict=True))
            row = {"depth": depth, "keys": len(right["tq4"]), "points": 100 * (share["tq4"] - share["exact"]), "differ": differ} | share
            self.record["keys"].append(row)
            self.say(f"{depth:>7} tokens: {len(right['tq4'])} keys, exact {share['exact']:.3f}, TQ4 {share['tq4']:.3f}")


def brief(r: dict[str, Any]) -> str:
    return (
        f"cosine {r['cosine_mean']:.6f}, lowest {r['cosine_min']:.6f}, of a position {r['cosine_position_min']:.6f}, "
        f"below {COSINE}: {r['below']} of {r['tokens']}; "
        f"KL(TQ4 || exact) {r['kl_tq4_exact']:.2e} +- {r['kl_tq4_exact_ci95']:.0e}, top-1 {r['top1']:.4f}"
    )


def table(record: dict[str, Any]) -> str:
    lines = [
        f"# TQ4 against {record['exact_kv_cache']} KV caches, {record['model']}",
        "",
        f"{record['device']}, {record['activation_dtype']} activations, artifacts of {record['max_seq_len']} slots, {record['contexts']} "
        f"contexts, windows of {record['window']} tokens fed one by one. KL in nats, 95 % half widths.",
        "",
        f"| positions | cosine, mean | lowest | lowest mean of a position | below {COSINE} "
        "| KL(TQ4 to exact) | KL(exact to TQ4) | top-1 | change of NLL |",
        "|" + "---|" * 9,
    ]
    for r in [*record["windows"], record["all"] | {"from": None}]:
        where = "all" if r["from"] is None else f"{r['from']} .. {r['to'] - 1}"
        lines.append(
            f"| {where} | {r['cosine_mean']:.6f} | {r['cosine_min']:.6f} | {r['cosine_position_min']:.6f} | {r['below']} of "
            f"{r['tokens']} | {r['kl_tq4_exact']:.2e} ± {r['kl_tq4_exact_ci95']:.0e} | {r['kl_exact_tq4']:.2e} ± "
            f"{r['kl_exact_tq4_ci95']:.0e} | {r['top1']:.4f} | {r['nll_change']:+.1e} ± {r['nll_change_ci95']:.0e} |"
        )
    lines += ["", "| context | keys | exact | TQ4 | points | answered differently |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['depth']} | {r['keys']} | {r['exact']:.3f} | {r['tq4']:.3f} | {r['points']:+.2f} | {r['differ']} |" for r in record["keys"]
    ]
    return "\n".join(lines) + "\n"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--exact", type=Path, required=True, help="artifact with an exact (bf16) KV cache")
    p.add_argument("--tq4", type=Path, required=True, help="artifact with a TQ4 KV cache, everything else equal")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", default="auto")
    p.add_argument("--depths", type=numbers, default=list(WINDOW_DEPTHS))
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--contexts", type=int, default=4, help="of the windows")
    p.add_argument("--key-depths", type=numbers, default=list(KEY_DEPTHS))
    p.add_argument("--key-contexts", type=int, default=8, help="of each depth")
    p.add_argument("--needles", type=int, default=25, help="keys in a context")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(arguments)
    a.out.mkdir(parents=True, exist_ok=True)
    study = Study(a)
    study.windows()
    study.keys()
    study.say("done")
    (a.out / "artifact-study.md").write_text(table(study.record))


if __name__ == "__main__":
    main()
