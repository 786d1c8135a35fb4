"""A server of an artifact under load, and any other server beside it, in one command on a machine with a GPU.

    python -m tests.measure.measure_serve ARTIFACT --weights GGUF --out F.json
    python -m tests.measure.measure_serve --url http://127.0.0.1:8081 --out F2.json

The artifact has rows for as many users as `--users` names at most, and steps of as many tokens. What is sent:
- long answers behind short prompts, answers behind prompts of 2,048 tokens, and behind a beginning of 8,192 that all share
- turns of 50 tokens behind a prompt of 32,000
- a prompt of 32,000 while others get their answers; of an artifact by a server with `--max-gap-ms 100` and chunks of 256

The first of these at one user is compared with the same steps without HTTP (`kiln bench --rows`). F.json is written after every step, and
what it holds already is not done again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kiln.exporter.files import write_text
from kiln.exporter.measure import bench_rows
from kiln.exporter.measure.serve_bench import Load, measure, notes, table

GAP_MS, GAP_CHUNK = 100, 256
WAIT = 300  # seconds until a server says where it is


def loads(scale: int) -> dict[str, Load]:
    """By name; lengths divided by `scale`, for a model that holds little."""
    def load(prompt: int, output: int, **more: int) -> Load:
        return Load(prompt_tokens=max(prompt // scale, 8), output_tokens=max(output // scale, 4),
                    **{name: max(n // scale, 8) if name.endswith(("prefix", "tokens")) else n for name, n in more.items()})  # fmt: skip

    return {
        "long answers": load(128, 512),
        "prompts of 2,048": load(2048, 256),
        "8,192 shared": load(128, 256, shared_prefix=8192),
        "turns behind 32,000": load(32000, 32, turns=3, turn_tokens=50, conversations=2),
    }


@contextlib.contextmanager
def serving(artifact: Path, weights: Path | None, device: str, *options: str) -> Iterator[str]:
    """The URL of `kiln serve`."""
    command = [sys.executable, "-m", "exporter", "serve", str(artifact), "--port", "0", "--device", device, *options]
    with subprocess.Popen([*command, *(["--weights", str(weights)] if weights else [])], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            found = re.search(r"http://\S+", process.stdout.readline())
            if not found:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            yield found[0]
        finally:
            process.terminate()
            process.wait(60)


def levels(url: str, load: Load, users: list[int], told: str) -> dict[str, Any]:
    """Each number of users with as many conversations, or as many as the load has; three times as many where they share a beginning."""
    several, rounds = load.conversations if load.turns > 1 else 0, 3 if load.shared_prefix else 1
    found: dict[str, Any] = {}
    for n in users:
        one = asyncio.run(measure(url, dataclasses.replace(load, conversations=several or rounds * n), users=[n]))
        print("\n".join([f"{told}:", table(one), *notes(one)]), flush=True)
        found = found or {key: value for key, value in one.items() if key != "levels"} | {"levels": []}
        found["levels"] += one["levels"]
    if (several or load.shared_prefix) and not any(level["cached_tokens"] for level in found["levels"]):
        print(f"note: {told}: nothing was reused", flush=True)
    return found


def gaps(url: str, scale: int, users: int) -> dict[str, Any]:
    """What users see of their answers while another's long prompt is read."""
    answers = Load(prompt_tokens=128 // min(scale, 16), output_tokens=max(1024 // scale, 8), conversations=users)
    prompt = Load(prompt_tokens=32000 // scale, output_tokens=4, conversations=1, seed=1)

    async def both() -> tuple[dict[str, Any], dict[str, Any], float]:
        others = asyncio.create_task(measure(url, answers, users=[users]))
        await asyncio.sleep(1.5 / scale)
        began = time.perf_counter()
        long = await measure(url, prompt, users=[1])
        seconds = time.perf_counter() - began
        return await others, long, seconds

    others, long, seconds = asyncio.run(both())
    print("\n".join([f"{users} users while a prompt is read:", table(others), table(long)]), flush=True)
    return {"others": others, "prompt": long, "seconds": seconds}


def without_http(artifact: Path, weights: Path | None, device: str, users: list[int], scale: int) -> dict[str, Any]:
    """Steps of the batch itself in the middle of the long answers."""
    depth = max((128 + 256) // scale, 8)
    steps = sorted({1 << (n - 1).bit_length() for n in users})
    command = [sys.executable, "-m", "exporter", "bench", str(artifact), "--rows", ",".join(map(str, steps)), "--depths", str(depth),
               "--steps", str(max(64 // scale, 7)), "--device", device, "--json"]  # fmt: skip
    done = subprocess.run([*command, *(["--weights", str(weights)] if weights else [])], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    record = json.loads(done.stdout)
    print(bench_rows.table(record), flush=True)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.measure_serve", description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--url", help="a server that runs, instead of an artifact")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--users", default="1,4,8")
    parser.add_argument("--out", type=Path, required=True, metavar="F.json")
    parser.add_argument("--only", default="", metavar="TEXT", help="loads whose name contains TEXT")
    parser.add_argument("--serve", action="append", default=[], metavar="=OPTION", help="an option more for kiln serve; repeatable")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="lengths divided by N")
    options = parser.parse_args(arguments)
    if (options.artifact is None) == (options.url is None):
        parser.error("name an artifact or --url, one of them")
    users, scale = [int(n) for n in options.users.split(",")], options.scale
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}

    def step(name: str, found: dict[str, Any]) -> None:
        record[name] = found
        write_text(options.out, json.dumps(record, indent=1) + "\n", "the record")

    def missing(name: str) -> bool:
        return name not in record and options.only in name

    def all_loads(url: str) -> None:
        for name, load in loads(scale).items():
            if missing(name):
                step(name, levels(url, load, users if load.turns == 1 else users[:1], name))

    if options.url:
        all_loads(options.url)
        if missing("gaps"):
            step("gaps", gaps(options.url, scale, users[-1] // 2 or 1))
        return 0
    given = options.artifact, options.weights, options.device
    if missing("without HTTP"):
        step("without HTTP", without_http(*given, users, scale))
    if any(missing(name) for name in loads(scale)):
        with serving(*given, *options.serve) as url:
            all_loads(url)
    if missing("gaps"):
        with serving(*given, *options.serve, "--max-gap-ms", str(GAP_MS), "--prefill-chunk", str(GAP_CHUNK // min(scale, 16))) as url:
            step("gaps", gaps(url, scale, users[-1] // 2 or 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
