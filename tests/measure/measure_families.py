"""Models of every family in their real geometry, one after the other on a GPU, in one command.

    python -m tests.measure.measure_families --work DIR --out F.json [--presets qwen3-8b,...] [--budget 570] [--jobs 6]

Each preset's code is exported from a file that is a hole, `--jobs` at a time, then its weights are made, played from the GGUF file,
measured and removed: the disk holds one model. F.json is written after every step, and what it holds already is not done again: where the
budget ends, the same command goes on. Exit code 1 where a step failed, 3 where steps are left.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kiln.exporter.measure.bench import add_costs, ceilings_of
from tests.measure.measure_31b import ROOT, VOCAB, Failed, Measurement, Side, device, peak_memory, side

CONTEXT = {"gemma4": 131072, "qwen3": 40960, "qwen35": 131072}  # by the beginning of a preset's name
PRESETS = ("gemma4-e4b", "gemma4-26b-a4b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "qwen35-27b", "qwen35-35b-a3b")
FINISHED = re.compile(r" in (?P<seconds>\d+) s, peak memory of one process (?P<gib>[\d.]+) GiB")


def context(preset: str) -> int:
    return 4096 if "tiny" in preset else CONTEXT[preset.partition("-")[0]]


def synthesize(m: Measurement, at: Side, preset: str, mix: str, path: Path, *more: str) -> None:
    vocabulary = ("--vocab-from", VOCAB) if preset.startswith("gemma4") and "tiny" not in preset else ()
    m.run(at, at.python, "-m", "exporter", "synth", "--preset", preset, "--mix", mix, "--out", path, *vocabulary, *more)


def export(m: Measurement, at: Side, preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """The preset's code. seconds and peak GiB as the export says them."""
    hole = at.artifact.with_suffix(".hole.gguf")
    hole.parent.mkdir(parents=True, exist_ok=True)
    synthesize(m, at, preset, options.mix, hole, "--sparse")
    command = (at.python, "-m", "exporter", "export", "--gguf", hole, "--out", at.artifact, "--weights", "gguf", "--target", options.target,
               "--max-seq-len", min(context(preset), options.context or 1 << 30), *options.export)  # fmt: skip
    began = time.monotonic()
    said = m.run(at, *command, "--force", stderr=True)
    hole.unlink()
    found = FINISHED.search(said)
    size = sum(f.lstat().st_size for f in at.artifact.iterdir())
    return {"wall_s": time.monotonic() - began, "seconds": int(found["seconds"]) if found else None,
            "peak_gib": float(found["gib"]) if found else None, "artifact_bytes": size}  # fmt: skip


def speeds(m: Measurement, at: Side, options: argparse.Namespace) -> dict[str, Any]:
    command = (at.runner, *at.plays, "--bench", "--json", "--depths", options.depths, "--steps", options.steps)
    return add_costs(json.loads(m.run(at, *command)) | {"ceilings": m.record["device"].get("ceilings")}, at.manifest)


def table(record: dict[str, Any]) -> str:
    """Markdown: a row for each model and depth."""
    lines = ["| model | depth | decode tok/s (p10 - p90) | GB/s | of the read ceiling | prefill tok/s (chunk) | of the matmul ceiling | "
             "load s | memory at most, GiB | export s, GiB |", "|---" * 10 + "|"]  # fmt: skip

    def share(row: dict) -> str:
        return f"{row['percent']:.1f} %" if row.get("percent") is not None else ""

    for preset, found in record.items():
        for row in found.get("speeds", {}).get("depths", ()):
            decode, prefill, made = row["decode"], row["prefill"], found["exported"]
            memory = found.get("peak memory", {}).get("driver_peak")
            lines.append(f"| {preset} | {row['position']:,} | {decode['tok_s']:.1f} ({decode['p10']:.1f} - {decode['p90']:.1f}) | "
                         f"{decode['gb_s']:,.0f} | {share(decode)} | {prefill['tok_s']:,.0f} ({prefill['tokens']}) | {share(prefill)} | "
                         f"{found['speeds']['load_s']:.2f} | {'' if memory is None else f'{memory / 2**30:.2f}'} | "
                         f"{made['seconds']}, {made['peak_gib']} |")  # fmt: skip
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.measure_families", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="for one model at a time: 20 GB")
    parser.add_argument("--out", type=Path, required=True, metavar="F.json")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--mix", default="q4_k_m")
    parser.add_argument("--target", default="native")
    parser.add_argument("--context", type=int, help="at most so many positions  [131,072 of Gemma 4 and Qwen3.5, 40,960 of Qwen3]")
    parser.add_argument("--depths", default="128,2048,32768")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2, help="exports at a time, two processes each")
    parser.add_argument("--budget", type=float, default=570, metavar="S", help="begin no step that may not be done after S seconds (570)")
    parser.add_argument("export", nargs="*", default=["--turboquant"], help="after --: more options of the export  [--turboquant]")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    m = Measurement(options.out.resolve(), options.budget)
    presets = options.presets.split(",")
    m.step("device", "machine", 0, device)
    if options.target != "cpu":
        m.step("device", "ceilings", 10, lambda: ceilings_of("cuda"))
    sides = {preset: side(preset, work / preset / "artifact", ROOT, work) for preset in presets}
    with ThreadPoolExecutor(options.jobs) as pool:
        for preset in presets:
            pool.submit(m.step, preset, "exported", 60, lambda preset=preset: export(m, sides[preset], preset, options))
    for preset, at in sides.items():
        if "exported" not in m.record.get(preset, {}) or not (at.artifact / "manifest.json").is_file():
            continue
        gguf = work / "model.gguf"

        def play(preset: str = preset, at: Side = at, gguf: Path = gguf) -> None:
            synthesize(m, at, preset, options.mix, gguf)
            m.step(preset, "speeds", 10, lambda: speeds(m, at, options))
            if options.target != "cpu":
                prompt = [2, *(i * 7919 % at.manifest["config"]["vocab_size"] for i in range(3000))]
                m.step(preset, "peak memory", 5, lambda: peak_memory(m, at, prompt))

        if "speeds" not in m.record[preset] or ("peak memory" not in m.record[preset] and options.target != "cpu"):
            if m.left() < 45:
                m.left_out.append(f"{preset}: speeds")
                continue
            try:
                play()
            except Failed as e:
                m.failed.append(f"{preset}: {e}")
            gguf.unlink(missing_ok=True)
    print(table({name: found for name, found in m.record.items() if name != "device"}))
    for line in m.failed:
        print(line, file=sys.stderr)
    if m.left_out:
        print(f"left out, {options.budget:.0f} s were over: {'; '.join(m.left_out)}; the same command goes on", file=sys.stderr)
    return 1 if m.failed else 3 if m.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
