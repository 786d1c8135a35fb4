"""`kiln bench --rows`: a step of several tokens, of one session and of as many sessions, against a step of one and the ceilings."""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.errors import KilnError
from kiln.exporter.measure.bench import ceilings_of, device_name, kv_bytes, weight_bytes
from kiln.exporter.measure.kernel_times import filled
from kiln.exporter.measure.runner import runtime

REPEATS = 7  # of the timed steps
MOST_READ = 1 << 15  # tokens of all prompts of a batch that is timed with its host: more are not read
DEFAULT_DEPTHS = "128,2048"


def entries(manifest: dict) -> list[int]:
    """Tokens that a step of the artifact takes."""
    return [1, *sorted(int(name.removeprefix("decode_")) for name in manifest["entry_points"] if name.startswith("decode_"))]


def check(manifest: dict, rows: list[int], depths: list[int], steps: int) -> None:
    """KilnError where the artifact has no such step, or no room for it."""
    if missing := [m for m in rows if m not in entries(manifest)]:
        found = ", ".join(map(str, entries(manifest)))
        raise KilnError(f"--rows {missing[0]}: the artifact's steps are of {found} tokens; export it with --decode-rows")
    last = manifest["max_seq_len"] - max(rows) - steps - REPEATS
    if last < 1:
        raise KilnError(f"--steps {steps}: the artifact holds {manifest['max_seq_len']} tokens, which leaves no depth for as many")
    if wrong := [depth for depth in depths if not 1 <= depth <= last]:
        raise KilnError(f"--depths {wrong[0]}: the artifact holds {manifest['max_seq_len']} tokens, which leaves depths of 1 to {last}")


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most, in milliseconds."""
    ms = [1e3 * s for s in seconds]
    return {"ms": statistics.median(ms), "least": min(ms), "most": max(ms)}


def probed(batch: Any, positions: list[int], rows: list[int], steps: int) -> dict[str, float]:
    """A step of tokens at positions of rows: `steps` queued one behind the other, as a session's are."""
    tokens = [5 + i for i in range(len(rows))]
    batch.probe(tokens, positions, rows, times=3)
    return spread([batch.probe(tokens, positions, rows, times=steps)[2] / steps for _ in range(REPEATS)])


def batched(batch: Any, sessions: int, depth: int, steps: int, vocab: int) -> dict[str, float]:
    """A step of sessions that have read prompts of `depth` tokens, with all that the host does between two."""
    random.seed(0)
    for i in range(sessions):
        batch.join([random.randrange(vocab) for _ in range(depth)], temperature=0.7, seed=i, stop_at_eog=False)
    handles: set[int] = set()
    while len(handles) < sessions:
        handles |= {handle for handle, *_ in batch.step()}
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(max(steps // REPEATS, 1)):
            if any(error for *_, error in batch.step()):
                raise KilnError("a timeline of the measured batch ended: its logits are not finite")
        times.append((time.perf_counter() - start) / max(steps // REPEATS, 1))
    for handle in handles:
        batch.leave(handle)
    return spread(times)


def measure(artifact: Path, rows: list[int], depths: list[int], steps: int, device: str, threads: int | None, weights: Path | None) -> dict:
    """The record. Raises KilnError."""
    manifest = read_manifest(artifact)
    kiln = runtime()
    try:
        return _measure(kiln, artifact, manifest, rows, depths, steps, device, threads, weights)
    except kiln.Error as e:
        raise KilnError(str(e)) from e


def _measure(kiln: Any, artifact: Path, manifest: dict, rows: list[int], depths: list[int], steps: int, device: str, threads: int | None,
             weights: Path | None) -> dict:
    model = kiln.Model(str(artifact), device, threads=threads or os.cpu_count() or 1, weights=weights and str(weights))
    batch = kiln.Batch(model)
    if model.device != "cpu":
        filled(batch, model)
    record: dict[str, Any] = {
        "artifact": artifact.name, "model": manifest["config"]["name"], "max_seq_len": manifest["max_seq_len"],
        "kv_cache": manifest["kv_cache"], "producer": manifest["producer"], "target": model.target, "device": model.device, "steps": steps,
        "sessions": batch.rows, "memory": batch.memory(), "ceilings": ceilings_of(model.device), "depths": [],
    }  # fmt: skip
    record["device_name"] = device_name(record["device"])
    for depth in depths:
        found = []
        for m in sorted({1, *rows}):
            one = probed(batch, list(range(depth, depth + m)), [0] * m, steps)
            row: dict[str, Any] = {"tokens": m, "one session": one}
            if m <= batch.rows:
                row["sessions"] = probed(batch, [depth] * m, list(range(m)), steps)
                written = m * -(-depth // manifest["prefill_chunk"]) + steps + REPEATS  # of the first, while the others' prompts are read
                if m * depth <= MOST_READ and depth + written < manifest["max_seq_len"]:
                    row["batch"] = batched(batch, m, depth, steps, model.vocab_size)
            found.append(row)
        add_rates(found, manifest, depth, record["ceilings"])
        record["depths"].append({"depth": depth, "rows": found})
    return record


def add_rates(found: list[dict], manifest: dict, depth: int, ceilings: dict | None) -> None:
    """To each step its cost in steps of one token, tokens a second of all, bytes that it cannot do without, and per cent of the ceiling.

    Those are the weights, and what is filled of the caches of each session, once.
    """
    for row in found:
        for name, sessions in (("one session", 1), ("sessions", row["tokens"]), ("batch", row["tokens"])):
            if name not in row:
                continue
            at = row[name]
            at["of one"] = at["ms"] / found[0][name]["ms"]
            at["tok_s"] = 1e3 * row["tokens"] / at["ms"]
            at["gb_s"] = (weight_bytes(manifest) + sessions * kv_bytes(manifest, depth)) / at["ms"] / 1e6
            if ceilings:
                at["percent"] = 100 * at["gb_s"] / max(ceilings["copy_gb_s"], ceilings["read_gb_s"])


def table(record: dict) -> str:
    caches = (record["memory"]["kv_ring"] + record["memory"]["kv_global"]) / 1e9
    rates = f"{'of 1':>6} {'GB/s':>7} {'of max':>7}"
    lines = [
        f"{record['model']} on {record['device_name']} ({record['target']}), KV cache {record['kv_cache']}, {record['sessions']} sessions "
        f"of {record['max_seq_len']} tokens, {caches:.2f} GB of caches",
        f"{'depth':>8} {'tokens':>6} | {'one session, ms':>26} {rates} | {'sessions, ms':>12} {rates} | "
        f"{'with the host, ms':>17} {'tok/s':>8}",
    ]
    for at in record["depths"]:
        for row in at["rows"]:
            parts = []
            for name in ("one session", "sessions"):
                part = row.get(name)
                share = f"{part['percent']:.1f} %" if part and "percent" in part else ""
                spread = f"{part['ms']:.3f} ({part['least']:.3f} - {part['most']:.3f})" if part and name == "one session" else ""
                spread = spread or (f"{part['ms']:.3f}" if part else "")
                rates = f"{part['of one']:6.3f} {part['gb_s']:7.0f}" if part else " " * 14
                parts.append(f"{spread:>{26 if name == 'one session' else 12}} {rates} {share:>7}")
            host = row.get("batch")
            last = f"{host['ms']:17.3f} {host['tok_s']:8.1f}" if host else f"{'not read':>17}" if "sessions" in row else ""
            lines.append(f"{at['depth']:8d} {row['tokens']:6d} | {parts[0]} | {parts[1]} | {last}".rstrip())
    return "\n".join(lines)
