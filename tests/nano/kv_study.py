"""What quantizing the global layers' KV cache costs: python3 -m tests.nano.kv_study --gguf tests/nano/gemma4-nano-Q4_K_M.gguf --out DIR

Three parts. `codecs`: codecs of keys and values in a float32 forward, everything else equal. `product`: the lowered graph with the TQ4
ops, against the same codec in the plain forward and against exact caches. `mixes`: the lowered graph of every weight mix against an fp32
forward over the same dequantized weights (needs --bf16). Writes kv-study.json after every row, kv-study.md at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from kiln.custom_ops.tq4 import codec
from kiln.exporter.measure import evaluate as ev
from kiln.exporter.measure import players as pl
from kiln.exporter.model.records import Layer as LayerConfig
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.quantize import write_quantized
from kiln.passes.records import PassOptions
from tests.nano import data, vocabulary
from tests.nano.evals import joined, retrieve
from tests.nano.model import Cache, Nano, load_gguf

HELD_OUT = Path(__file__).parent / "held_out.txt"
EXACT_WINDOW = PassOptions.residual_length
BASE, TQ4, SHIPPED = "bf16", "TQ4", f"TQ4, newest {EXACT_WINDOW} exact"
LEVELS_4BIT = tuple(level / codec.SPREAD.value for level in codec.LEVELS)
LEVELS_3BIT = (0.2451, 0.7560, 1.3439, 2.1520)  # Lloyd-Max of N(0, 1), 8 levels
GEOMETRY_31B = (10, 4, 512)  # global layers, KV heads, head size
MIXES = ("q4_k_m", "q5_k_m", "q6_k", "q4_0", "q8_0")
NEEDLES = 25  # keys in a context

Map = Callable[[Tensor], Tensor]


# ---- codecs: [..., D] float32 -> what is read back ----


@dataclass(frozen=True)
class Codec:
    """apply: encode and decode vectors of D elements. bytes: stored for one of them."""

    name: str
    apply: Map
    bytes: Callable[[int], float]
    one_side: bool = False  # also alone on K, and alone on V


def half(x: Tensor) -> Tensor:
    return x.half().float()


def lloyd_max(levels: tuple[float, ...], rotate: Map, unrotate: Map, corrected: bool = True) -> Map:
    """TurboQuant with these positive levels: one float16 scale a vector, which keeps its length when `corrected`."""
    edges = torch.tensor([(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)])

    def apply(x: Tensor) -> Tensor:
        dim, norm = x.shape[-1], x.norm(dim=-1, keepdim=True)
        z = rotate(x) * (dim**0.5 / norm.clamp_min(1e-30))
        c = torch.tensor(levels, device=x.device)[torch.bucketize(z.abs().contiguous(), edges.to(x.device))] * torch.where(z < 0, -1.0, 1.0)
        length = c.norm(dim=-1, keepdim=True) if corrected else dim**0.5
        return unrotate(c * half(norm / length))

    return apply


def int4_symmetric(rotate: Map, unrotate: Map, block: int | None = None) -> Map:
    """Q4_0's rule, the extreme value at -8, over whole vectors or over blocks."""

    def apply(x: Tensor) -> Tensor:
        z = rotate(x).unflatten(-1, (-1, block or x.shape[-1]))
        d = half(z.gather(-1, z.abs().argmax(-1, keepdim=True)) / -8)
        q = (z / torch.where(d == 0, 1.0, d)).round().clamp(-8, 7)
        return unrotate((q * d).flatten(-2))

    return apply


def int4_affine(rotate: Map, unrotate: Map) -> Map:
    def apply(x: Tensor) -> Tensor:
        z = rotate(x)
        low = half(z.amin(-1, keepdim=True))
        d = half((z.amax(-1, keepdim=True) - low) / 15)
        q = ((z - low) / torch.where(d == 0, 1.0, d)).round().clamp(0, 15)
        return unrotate(q * d + low)

    return apply


def fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def fp8_scaled(x: Tensor) -> Tensor:
    d = half(x.abs().amax(-1, keepdim=True) / 448).clamp_min(2**-24)
    return fp8(x / d) * d


def identity(x: Tensor) -> Tensor:
    return x


def dense_rotation(seed: int) -> tuple[Map, Map]:
    """A uniformly random orthogonal matrix for every size asked for."""
    made: dict[tuple[int, torch.device], Tensor] = {}

    def matrix(x: Tensor) -> Tensor:
        key = (x.shape[-1], x.device)
        if key not in made:
            generator = torch.Generator().manual_seed(seed)
            made[key] = torch.linalg.qr(torch.randn(key[0], key[0], generator=generator, dtype=torch.float64))[0].float().to(x.device)
        return made[key]

    return lambda x: x @ matrix(x).T, lambda x: x @ matrix(x)


def codecs(seed: int) -> list[Codec]:
    """The base first, what ships, but for its exact window, second."""
    hadamard = (codec.rotate, codec.unrotate)
    plain = (identity, identity)
    return [
        Codec(BASE, identity, lambda d: 2 * d),  # every hook rounds to bfloat16 first
        Codec(TQ4, lambda x: codec.decode(*codec.encode(x)), lambda d: d / 2 + 2, True),
        Codec("TQ4, length not corrected", lloyd_max(LEVELS_4BIT, *hadamard, corrected=False), lambda d: d / 2 + 2),
        Codec("TQ4, dense random rotation", lloyd_max(LEVELS_4BIT, *dense_rotation(seed)), lambda d: d / 2 + 2),
        Codec("TQ4, no rotation", lloyd_max(LEVELS_4BIT, *plain), lambda d: d / 2 + 2),
        Codec("int4 symmetric, rotated", int4_symmetric(*hadamard), lambda d: d / 2 + 2, True),
        Codec("int4 affine, rotated", int4_affine(*hadamard), lambda d: d / 2 + 4),
        Codec("int4 in blocks of 32, rotated", int4_symmetric(*hadamard, block=32), lambda d: d / 2 + d / 16),
        Codec("int4 in blocks of 32, no rotation", int4_symmetric(*plain, block=32), lambda d: d / 2 + d / 16),
        Codec("TQ3", lloyd_max(LEVELS_3BIT, *hadamard), lambda d: 3 * d / 8 + 2, True),
        Codec("fp8 e4m3", fp8, lambda d: d, True),
        Codec("fp8 e4m3, scaled by vector", fp8_scaled, lambda d: d + 2),
    ]


@dataclass(frozen=True)
class Setting:
    """A codec on keys, values or both; the other side stays bfloat16, and so do the newest `exact window` positions."""

    name: str
    k: Codec
    v: Codec
    exact_window: int = 0

    def write_unrounded(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (k, v) if layer.mixer.window else (self.k.apply(k), self.v.apply(v))

    def write(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.write_unrounded(layer, *self.newest(layer, k, v))

    def newest(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.bfloat16().float(), v.bfloat16().float()

    @property
    def bytes_per_token_31b(self) -> float:
        layers, heads, dim = GEOMETRY_31B
        return layers * heads * (self.k.bytes(dim) + self.v.bytes(dim))


def settings(seed: int) -> list[Setting]:
    every = codecs(seed)
    base, tq4_codec = every[:2]
    rows = [Setting(c.name, c, c) for c in every]
    rows.insert(1, Setting(SHIPPED, tq4_codec, tq4_codec, EXACT_WINDOW))
    for c in every:
        if c.one_side:
            rows += [Setting(f"{c.name}, K only", c, base), Setting(f"{c.name}, V only", base, c)]
    return rows


# ---- the study ----


@dataclass(frozen=True)
class Sizes:
    text_tokens: int  # of one sequence of held-out text
    sequences: int
    depths: tuple[int, ...]
    contexts: int  # hidden-key contexts of a depth for the base and for what ships
    few: int  # for the others
    needles: int
    float32_depth: int  # of the product in float32, whose kernels are slow


FULL = Sizes(4096, 5, (2048, 8192, 32768, 131072), 4, 1, NEEDLES, 32768)
QUICK = Sizes(192, 1, (400, 800), 1, 1, 4, 800)


class Study:
    def __init__(self, a: argparse.Namespace):
        self.a, self.sizes, self.device = a, QUICK if a.quick else FULL, a.device
        self.start = time.monotonic()
        self.plan = read_plan(a.gguf)
        with tempfile.TemporaryDirectory() as directory:
            self.maker = data.Maker(vocabulary.save(self.plan.gguf.metadata, Path(directory) / "tokenizer.json"))
        self.ids = self.maker.ids([a.text.read_text()])[0]
        size = self.sizes.text_tokens
        self.sequences = [[vocabulary.BOS, *self.ids[i * size : (i + 1) * size]] for i in range(self.sizes.sequences)]
        if len(self.sequences[-1]) <= size:
            raise SystemExit(f"{a.text}: {len(self.ids)} tokens, {size * self.sizes.sequences} are needed")
        self.stacks = {
            depth: [
                ev.Haystack(*self.maker.haystack(Random(f"{a.seed}/{depth}/{i}"), depth - 64, self.sizes.needles))
                for i in range(self.sizes.contexts)
            ]
            for depth in self.sizes.depths
        }
        gpu = torch.cuda.get_device_name() if a.device == "cuda" else platform.processor() or "cpu"
        self.record: dict[str, Any] = {
            "gguf": a.gguf.name, "device": gpu, "torch": torch.__version__, "seed": a.seed, "quick": a.quick,
            "text_tokens": size * self.sizes.sequences, "depths": self.sizes.depths, "codecs": [], "product": {}, "mixes": [],
        }  # fmt: skip
        self.say(f"{gpu}: {len(self.ids)} tokens of text, {sum(map(len, self.stacks.values()))} contexts")

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {line}", flush=True)
        self.record["seconds"] = time.monotonic() - self.start
        (self.a.out / "kv-study.json").write_text(json.dumps(self.record, indent=1))

    # -- codecs --

    def cache(self, model: Nano, setting: Setting, slots: int) -> Cache:
        return Cache(model.config, slots, torch.float32, self.device, setting.write, setting.exact_window, setting.newest)

    def states(self, model: Nano, ids: list[int], cache: Cache) -> Tensor:
        """[len(ids), D]"""
        return torch.cat([model.read(ids[at:to], cache) for at, to in steps(len(ids))])

    def compare(self, model: Nano, h: Tensor, base: Tensor, ids: list[int]) -> dict[str, Tensor]:
        """As `kiln.exporter.evaluate.score_text`, from the states of both."""
        return joined(measure(model.logits(base[at:to]), model.logits(h[at:to]), ids[at + 1 : to + 1]) for at, to in steps(len(ids) - 1))

    def keys(self, model: Nano, setting: Setting, depth: int, stacks: list[ev.Haystack], after: Callable | None = None) -> list[bool]:
        right = []
        for stack in stacks:
            cache = self.cache(model, setting, depth)
            h = self.states(model, stack.context, cache)
            if after:
                after(stack, h)
                after = None
            right += retrieve(model, cache, stack.questions)
        return right

    def codecs(self) -> None:
        model = load_gguf(self.a.gguf, self.device)
        base_text: list[Tensor] = []
        base_deep: dict[int, Tensor] = {}
        deepest = max(self.sizes.depths)
        for setting in settings(self.a.seed):
            began, full = time.monotonic(), setting.name in (BASE, SHIPPED)
            states = [self.states(model, ids, self.cache(model, setting, len(ids))) for ids in self.sequences]
            if setting.name == BASE:
                base_text = states
            text = joined(self.compare(model, h, b, ids) for h, b, ids in zip(states, base_text, self.sequences, strict=True))
            row = {"name": setting.name, "bytes_per_token_31b": setting.bytes_per_token_31b, "ppl": ev.perplexity(text["nll"])}
            change, change_ci = ev.interval(text["nll"] - text["reference_nll"])
            row |= {"nll_change": change, "nll_change_ci95": change_ci, "text": whole(text), "keys": {}}

            def deep(stack: ev.Haystack, h: Tensor, row=row) -> None:
                base = base_deep.setdefault(deepest, h)
                row["deep"] = ev.divergence_by_position(self.compare(model, h, base, stack.context))

            for depth, stacks in self.stacks.items():
                used = stacks[: self.sizes.contexts if full else self.sizes.few]
                right = self.keys(model, setting, depth, used, deep if depth == deepest else None)
                row["keys"][depth] = {"keys": len(right), "accuracy": sum(right) / len(right)}
            self.record["codecs"].append(row)
            self.say(
                f"{setting.name}: perplexity {row['ppl']['perplexity']:.4f}  KL {row['text']['kld']:.2e} +- {row['text']['ci95']:.0e}  "
                f"deep KL {row['deep']['kld']:.2e}  cosine {row['deep']['cosine_mean']:.6f} / {row['deep']['cosine_min']:.4f}  keys "
                f"{' '.join(format(k['accuracy'], '.3f') for k in row['keys'].values())}  {time.monotonic() - began:.1f} s"
            )

    # -- product --

    def product(self) -> None:
        """The shipped ops: equal to the codec of the table with the same exact window, and how far from exact caches."""
        depth = max(d for d in self.sizes.depths if d <= self.sizes.float32_depth)
        model, setting = load_gguf(self.a.gguf, self.device), next(s for s in settings(self.a.seed) if s.name == SHIPPED)
        ids = self.stacks[depth][0].context
        h = self.states(model, ids, Cache(model.config, depth, torch.float32, self.device, setting.write_unrounded, setting.exact_window))
        player = pl.graph_player(self.plan, "tq4", depth, self.device, "float32")
        scores = joined(
            measure(model.logits(h[at : at + len(rows)]), rows, ids[at + 1 : at + len(rows) + 1]) for at, rows in scored(player, ids[:-1])
        )
        self.record["product"]["tq4_float32_vs_codec"] = ev.divergence_by_position(scores)
        del player, h
        self.say(f"product TQ4 in float32 against the codec, {depth} tokens: {brief(scores)}")
        deepest = max(self.sizes.depths)
        exact, dtype = ("bf16", "bfloat16") if self.device == "cuda" else ("f32", "float32")
        players = {name: pl.graph_player(self.plan, name, deepest, self.device, dtype) for name in (exact, "tq4")}
        self.say(f"lowered {dtype} graphs")
        rows = []
        for depth, stacks in self.stacks.items():
            right: dict[str, list[bool]] = {name: [] for name in players}
            for stack in stacks:
                for name, player in players.items():
                    right[name] += ev.retrieve(player, stack)
            accuracy = {name: sum(found) / len(found) for name, found in right.items()}
            points = 100 * (accuracy["tq4"] - accuracy[exact])
            rows.append({"depth": depth, "keys": len(right["tq4"]), "points": points} | accuracy)
            self.record["product"]["keys"] = rows
            self.say(f"product, {depth} tokens: keys {accuracy}, TQ4 {points:+.2f} points")
        scores = ev.score_text(players["tq4"], players[exact], self.stacks[deepest][0].context)
        self.record["product"]["tq4_vs_exact"] = {"activations": dtype} | ev.divergence_by_position(scores)
        self.say(f"product TQ4 against exact caches, {dtype} activations, {deepest} tokens: {brief(scores)}")

    # -- mixes --

    def mixes(self) -> None:
        kv_cache = "bf16" if self.device == "cuda" else "f32"
        ids = [vocabulary.BOS, *self.ids][: self.sizes.text_tokens * min(2, self.sizes.sequences) + 1]
        base: Tensor | None = None
        with tempfile.TemporaryDirectory() as directory:
            for mix in ("bf16", *MIXES)[: 2 if self.a.quick else None]:
                path = self.a.bf16 if mix == "bf16" else Path(directory) / f"{mix}.gguf"
                if mix != "bf16":
                    write_quantized(self.a.bf16, path, mix)
                plan = read_plan(path)
                player = pl.graph_player(plan, kv_cache, len(ids), self.device)
                scores = ev.score_text(player, pl.reference_player(plan, len(ids), self.device), ids)
                ours, reference = ev.perplexity(scores["nll"]), ev.perplexity(scores["reference_nll"])
                change, change_ci = ev.interval(scores["nll"] - scores["reference_nll"])
                low, high = reference["ci95"]
                base = scores["reference_nll"] if base is None else base
                quality, quality_ci = ev.interval(scores["nll"] - base)  # token by token: far finer than two perplexities
                self.record["mixes"].append(
                    {"mix": mix, "bytes": path.stat().st_size, "product": ours, "fp32": reference, "nll_change": change,
                     "nll_change_ci95": change_ci, "within": low <= ours["perplexity"] <= high, "nll_above_bf16": quality,
                     "nll_above_bf16_ci95": quality_ci, "fidelity": whole(scores)}
                )  # fmt: skip
                ends = f"{reference['perplexity']:.4f} [{low:.4f}, {high:.4f}]"
                self.say(f"{mix}: perplexity {ours['perplexity']:.4f}, fp32 {ends}  {brief(scores)}")


def steps(n: int, size: int = 4096) -> Iterator[tuple[int, int]]:
    return ((at, min(n, at + size)) for at in range(0, n, size))


def scored(player: pl.Player, ids: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(index of the first token, logits of a piece), piece by piece, from an empty cache."""
    player.reset()
    at = 0
    for rows in player.score(ids, pl.PIECE_TOKENS):
        yield at, rows
        at += len(rows)


def measure(reference: Tensor, rows: Tensor, targets: list[int]) -> dict[str, Tensor]:
    return ev.compare_rows(rows, reference, torch.tensor(targets, device=rows.device))


def whole(scores: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value for key, value in ev.divergence_by_position(scores).items() if key != "buckets"}


def brief(scores: dict[str, Tensor]) -> str:
    row = whole(scores)
    cosine = f"cosine {row['cosine_mean']:.6f}, lowest {row['cosine_min']:.6f}, below 0.999: {row['cosine_below_0.999']:.5f}"
    return f"KL {row['kld']:.2e} +- {row['ci95']:.0e}, top-1 {row['top1']:.4f}, {cosine}"


# ---- the table ----


def table(record: dict[str, Any]) -> str:
    lines = [
        f"# The KV cache of the global layers, {record['gguf']}",
        "",
        f"{record['device']}, torch {record['torch']}, {record['seconds']:.0f} s. KL in nats, cosine of logits, 95% half widths. "
        "Bytes a token: 10 layers of 4 heads of 512, K and V; an exact window does not grow with the context.",
        "",
    ]
    if record["codecs"]:
        depths = list(record["codecs"][0]["keys"])
        lines += [
            f"Against bfloat16 caches, all else in float32. Text: {record['text_tokens']} held-out tokens. Deep: every position of one "
            f"context of {max(depths)} tokens.",
            "",
            "| KV cache | bytes a token | perplexity | change of NLL | KL, text | top-1 | KL, deep | cosine, deep: mean | lowest "
            "| below 0.999 | keys at " + " | ".join(f"{d}" for d in depths) + " |",
            "|" + "---|" * (10 + len(depths)),
        ]  # fmt: skip
        for r in record["codecs"]:
            t, d = r["text"], r["deep"]
            lines.append(
                f"| {r['name']} | {r['bytes_per_token_31b']:,.0f} | {r['ppl']['perplexity']:.4f} | {nll(r, 'nll_change')} | {kl(t)} "
                f"| {t['top1']:.4f} | {kl(d)} | {cosines(d)} | "
                + " | ".join(f"{k['accuracy']:.3f} of {k['keys']}" for k in r["keys"].values()) + " |"
            )  # fmt: skip
        shipped = next((r for r in record["codecs"] if r["name"] == SHIPPED), None)
        if shipped:
            lines += ["", f"{SHIPPED} by position:", ""] + by_position(shipped["deep"])
    product = record["product"]
    if "tq4_float32_vs_codec" in product:
        lines += ["", "## The shipped ops", "", "TQ4 in float32 against the same codec and exact window in the plain forward:", ""]
        lines += by_position(product["tq4_float32_vs_codec"])
    if "tq4_vs_exact" in product:
        lines += ["", f"TQ4 against exact caches, both lowered, {product['tq4_vs_exact']['activations']} activations:", ""]
        lines += by_position(product["tq4_vs_exact"])
    if "keys" in product:
        exact = next(key for key in product["keys"][0] if key in pl.KV_CACHES and key != "tq4")
        lines += ["", f"| context | keys | {exact} | TQ4 | points |", "|---|---|---|---|---|"]
        lines += [f"| {r['depth']} | {r['keys']} | {r[exact]:.3f} | {r['tq4']:.3f} | {r['points']:+.2f} |" for r in product["keys"]]
    if record["mixes"]:
        lines += ["", "## Weight mixes, lowered graph against fp32 over the same dequantized weights, and against the BF16 file", ""]
        lines += ["| mix | MB | perplexity | fp32, 95% | NLL above fp32 | KL | top-1 | within | NLL above BF16 |", "|" + "---|" * 9]
        for r in record["mixes"]:
            ref, f = r["fp32"], r["fidelity"]
            lines.append(
                f"| {r['mix']} | {r['bytes'] / 1e6:.1f} | {r['product']['perplexity']:.4f} | {ref['perplexity']:.4f} "
                f"[{ref['ci95'][0]:.4f}, {ref['ci95'][1]:.4f}] | {nll(r, 'nll_change')} | {kl(f)} | {f['top1']:.4f} "
                f"| {'yes' if r['within'] else 'no'} | {nll(r, 'nll_above_bf16')} |"
            )
    return "\n".join(lines) + "\n"


def nll(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:+.1e} ± {row[key + '_ci95']:.0e}"


def kl(row: dict[str, Any]) -> str:
    return f"{row['kld']:.2e}" + ("" if math.isnan(row["ci95"]) else f" ± {row['ci95']:.0e}")


def cosines(row: dict[str, Any]) -> str:
    return f"{row['cosine_mean']:.6f} | {row['cosine_min']:.5f} | {100 * row['cosine_below_0.999']:.3f}%"


def by_position(row: dict[str, Any]) -> list[str]:
    lines = ["| positions | KL | top-1 | cosine, mean | lowest | below 0.999 |", "|---|---|---|---|---|---|"]
    return lines + [f"| {r['from']} .. {r['to'] - 1} | {kl(r)} | {r['top1']:.4f} | {cosines(r)} |" for r in row["buckets"]]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", type=Path, required=True)
    p.add_argument("--bf16", type=Path, help="the model's BF16 file, to make the weight mixes from")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--text", type=Path, default=HELD_OUT)
    p.add_argument("--parts", default="codecs,product,mixes")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    study = Study(a)
    for part in a.parts.split(","):
        if part == "mixes" and not a.bf16:
            study.say("no --bf16: the weight mixes are left out")
        else:
            {"codecs": study.codecs, "product": study.product, "mixes": study.mixes}[part]()
    study.say("done")
    (a.out / "kv-study.md").write_text(table(study.record))


if __name__ == "__main__":
    main()
