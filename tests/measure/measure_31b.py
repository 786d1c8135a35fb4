"""The whole table of docs/measurements in one command: the synthetic 31B on a GPU, and beside it another commit's in the same run.

    python -m tests.measure.measure_31b --compiled NEW [--baseline OLD --baseline-checkout DIR] --work DIR --out F.json [--budget 570]

`--compiled` and `--baseline` hold manifest.json and model.sm_NN.pt2 of `kiln export`; the weights are made here by `kiln synth`: nothing
but code travels. Those of an artifact of code alone stay in that file; the rest of it is made anew. Each side is completed, played
and measured by the runner and the Python of its own checkout (built there: `make build`).
Speeds are measured in turns, new and old, `--rounds` times. F.json is written after every step, and what it holds already is not measured
again: where the budget ends, the same command goes on. Exit code 1 where something is wrong or a step failed, 3 where steps are left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln.exporter.measure.bench import add_costs, ceilings_of

ROOT = Path(__file__).parents[2]
VOCAB = ROOT / "tests" / "fixtures" / "gemma4-vocab.gguf"
DEPTHS = "128,512,2048,8192,32768,131004"
PROMPT = 3000  # tokens of the checks
# Modules of the oldest commit that can be compared lay one folder higher.
COMPLETE = """
import sys
from pathlib import Path
try:
    from tests.tools.rebuild import complete
except ImportError:
    from tests.rebuild import complete
complete(*map(Path, sys.argv[1:]))
"""
INTERLEAVED = """
import json, sys
import kiln
from tests.sessions import interleaved_equal_solo
prompts = [[2, *((i * (37 + at)) % int(sys.argv[2]) for i in range(int(sys.argv[3]) * (1 + at) // 2))] for at in range(2)]
more = {"weights": sys.argv[4]} if sys.argv[4:] else {}
print(json.dumps(interleaved_equal_solo(kiln.Model(sys.argv[1], **more), prompts, 12)))
"""


class Failed(Exception):
    """A step that gave no result; the rest goes on."""


@dataclass(frozen=True)
class Side:
    """An artifact with the checkout that it belongs to."""

    name: str
    compiled: Path
    checkout: Path
    python: str
    runner: Path
    artifact: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.compiled / "manifest.json").read_text())

    @property
    def in_gguf(self) -> bool:
        """Whether the weights stay in the model file."""
        return "gguf" in self.manifest["weights"]

    @property
    def plays(self) -> tuple[object, ...]:
        """What the runner is told to play."""
        return (self.artifact, *(("--weights", self.artifact.parent.parent / "model.gguf") if self.in_gguf else ()))


def side(name: str, compiled: Path, checkout: Path, work: Path) -> Side:
    """With the Python and the runner that the checkout's own `make build` installed, else those that run this."""
    own = checkout / ".venv" / "bin" / "python"
    python = str(own) if own.is_file() else sys.executable
    inside = (checkout / ".venv").glob("lib/python3*/site-packages/kiln/bin")
    here = [Path(sys.executable).parent] if checkout == ROOT else []  # never another commit's
    places = [*inside, own.parent, checkout / "build" / "cpp", *here]
    runner = next((place / "kiln-run" for place in places if (place / "kiln-run").is_file()), None)
    if runner is None:
        sys.exit(f"measure_31b: error: no kiln-run in {', '.join(map(str, places))}; run `make build` in {checkout}")
    return Side(name, compiled, checkout, python, runner, work / name / "artifact")


class Measurement:
    """The record, written after every step, and the time that is left."""

    def __init__(self, out: Path, budget: float):
        self.out, self.end, self.left_out, self.failed = out, time.monotonic() + budget, [], []
        self.lock = threading.Lock()  # of the record
        self.record: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def step(self, where: str, name: str, seconds: float, work: Callable[[], Any]) -> None:
        """Does `work`, unless its result is there or less than the `seconds` that it takes on an H200 are left."""
        with self.lock:
            found = self.record.setdefault(where, {})
        if name in found:
            return
        if self.left() < seconds:
            self.left_out.append(f"{where}: {name}")
            return
        print(f"{where}: {name} ...", end=" ", flush=True)
        began = time.monotonic()
        try:
            result = work()
            with self.lock:
                found[name] = result
            print(f"{time.monotonic() - began:.1f} s", flush=True)
        except subprocess.TimeoutExpired:
            self.left_out.append(f"{where}: {name}")
            print("not done in time", flush=True)
        except Failed as e:
            self.failed.append(f"{where}: {name}: {e}")
            print(f"failed: {e}", flush=True)
        with self.lock:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.record, indent=1) + "\n")

    def run(self, side: Side, *command: object, stderr: bool = False) -> str:
        """stdout (or stderr) of a command in the side's checkout; raises Failed with the last line of its stderr."""
        path = os.pathsep.join([str(side.runner.parent), os.environ.get("PATH", "")])
        environment = os.environ | {"PYTHONPATH": str(side.checkout), "PATH": path}
        done = subprocess.run(list(map(str, command)), cwd=side.checkout, env=environment, capture_output=True, text=True,
                              timeout=max(self.left(), 1))  # fmt: skip
        if done.returncode:
            raise Failed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return done.stderr if stderr else done.stdout

    def play(self, side: Side, prompt: list[int], *options: object) -> dict:
        command = (side.runner, *side.plays, "--tokens", ",".join(map(str, prompt)), "--no-eog", "--json", *options)
        return json.loads(self.run(side, *command))


# ---- steps ----


def complete(m: Measurement, side: Side, gguf: Path, other: Side | None) -> dict:
    """The whole artifact; weights that are the other side's in name, dtype, shape and offset are linked, not packed again."""
    done = side.artifact.parent / "complete"
    if done.is_file():
        return {"weights": done.read_text()}

    def layout(constants: list[dict]) -> list[dict]:
        return [{k: v for k, v in c.items() if k != "sha256"} for c in constants]

    shutil.rmtree(side.artifact, ignore_errors=True)
    side.artifact.parent.mkdir(parents=True, exist_ok=True)
    how = "in the model file" if side.in_gguf else "packed"
    packed_already = other is not None and (other.artifact.parent / "complete").is_file()
    if other and not side.in_gguf and packed_already and layout(other.manifest["constants"]) == layout(side.manifest["constants"]):
        side.artifact.mkdir(parents=True)
        packed = json.loads((other.artifact / "manifest.json").read_text())
        for name in ("weights.safetensors", "tokenizer.json"):
            os.link(other.artifact / name, side.artifact / name)
        for target in side.manifest["targets"]:
            shutil.copy(side.compiled / target["file"], side.artifact / target["file"])
        (side.artifact / "manifest.json").write_text(json.dumps(side.manifest | {"constants": packed["constants"]}))
        how = f"those of {other.name}"
    else:
        m.run(side, side.python, "-c", COMPLETE, side.compiled, gguf, side.artifact)
    done.write_text(how)
    return {"weights": how}


def speeds(m: Measurement, side: Side, options: argparse.Namespace) -> dict:
    chunk = ("--prefill-chunk", options.prefill_chunk) if options.prefill_chunk else ()
    command = (side.runner, *side.plays, "--bench", "--json", "--depths", options.depths, "--steps", options.steps, *chunk)
    record = json.loads(m.run(side, *command)) | {"ceilings": m.record["device"].get("ceilings")}
    told = side.manifest if "cost" in side.manifest else json.loads((options.compiled / "manifest.json").read_text())
    return add_costs(record, told)  # the work is the model's; the oldest manifests do not tell it


def repeats(m: Measurement, side: Side, prompt: list[int]) -> dict:
    answers = [m.play(side, prompt, "--max-new-tokens", 64) for _ in range(3)]
    same = all(a["tokens"] == answers[0]["tokens"] for a in answers)
    runs = [{k: a[k] for k in ("load_s", "ttft_s", "decode_tok_s")} for a in answers]
    return {"equal": same, "tokens": answers[0]["tokens"], "runs": runs}


def graph_and_direct(m: Measurement, side: Side, prompt: list[int], work: Path) -> dict:
    """Logits of a replayed graph, bit for bit those of direct calls."""
    import numpy as np

    rows = []
    for way, option in (("graph", ()), ("direct", ("--no-graph",))):
        m.play(side, prompt, "--max-new-tokens", 16, "--logits", work / f"{way}.f32", *option)
        rows.append(np.fromfile(work / f"{way}.f32", np.float32))
    finite = bool(np.isfinite(rows[0]).all())
    return {"equal": bool(np.array_equal(*rows)), "finite": finite, "std": float(rows[0].std()) if finite else None}


def peak_memory(m: Measurement, side: Side, prompt: list[int], *options: object) -> dict:
    """Most device memory in use while a prompt runs, bytes as the driver counts it, context and code included, and the runner's report."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def used() -> int:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20

    before, peak = used(), 0
    command = [side.runner, *side.plays, "--tokens", ",".join(map(str, prompt)), "--no-eog", "--json", "--memory", "--max-new-tokens", 64,
               *options]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, used() - before)
        time.sleep(0.05)
    out, err = process.communicate()
    if process.returncode:
        raise Failed(err.strip())
    return {"driver_peak": peak, "memory": json.loads(out)["memory"]}


def device() -> dict[str, Any]:
    from tests.record import machine

    return machine()


# ---- the table ----


def rounds_of(found: dict) -> list[dict]:
    return [found[name] for name in sorted(found) if name.startswith("speeds ")]


def rows_of(found: dict) -> list[dict]:
    """For each depth the median over rounds of decode and prefill, and where the ceilings are known the share of them."""
    rows = []
    for at in zip(*(record["depths"] for record in rounds_of(found)), strict=True):

        def middle(part: str, name: str, at: tuple = at) -> float | None:
            values = [row[part][name] for row in at if name in row[part]]
            return statistics.median(values) if values else None

        rows.append({"depth": at[0]["position"], "chunk": at[0]["prefill"]["tokens"]} | {
            f"{part} {name}": middle(part, name) for part, name in (
                ("decode", "tok_s"), ("decode", "p10"), ("decode", "p90"), ("decode", "gb_s"), ("decode", "percent"),
                ("prefill", "tok_s"), ("prefill", "tflop_s"), ("prefill", "percent"), ("prompt", "tok_s"))})  # fmt: skip
    return rows


def table(record: dict) -> str:
    """Markdown; beside the new artifact's figures their ratio to the baseline's."""
    new, old = record.get("new", {}), record.get("baseline", {})
    lines = []
    if ceilings := record.get("device", {}).get("ceilings"):
        lines.append(f"Ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, read {ceilings['read_gb_s']:.0f} GB/s, bf16 matmul "
                     f"{ceilings['matmul_tflop_s']:.0f} TFLOP/s ({ceilings['matmul_sustained_tflop_s']:.0f} sustained)")  # fmt: skip
    lines += ["", "| depth | decode tok/s (p10 - p90) | GB/s | of the ceiling | to baseline | prefill of a chunk, tok/s | TFLOP/s | "
              "of the ceiling | to baseline | whole prompt, tok/s |", "|---" * 10 + "|"]  # fmt: skip
    before = {row["depth"]: row for row in rows_of(old)}

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} %"

    for row in rows_of(new):
        base = before.get(row["depth"])
        ratios = [f"{row[name] / base[name]:.3f}" if base else "" for name in ("decode tok_s", "prefill tok_s")]
        lines.append(
            f"| {row['depth']:,} | {row['decode tok_s']:.1f} ({row['decode p10']:.1f} - {row['decode p90']:.1f}) | "
            f"{row['decode gb_s']:,.0f} | {share(row['decode percent'])} | {ratios[0]} | {row['prefill tok_s']:,.0f} ({row['chunk']}) | "
            f"{row['prefill tflop_s']:.0f} | {share(row['prefill percent'])} | {ratios[1]} | {row['prompt tok_s']:,.0f} |"
        )
    for name, found in (("new", new), ("baseline", old)):
        if runs := rounds_of(found):
            loads = [run["load_s"] for run in runs] + [run["load_s"] for run in found.get("repeats", {}).get("runs", ())]
            memory = ", ".join(f"{part.replace('_', ' ')} {size / 1e9:.2f}" for part, size in runs[-1]["memory"].items())
            first = runs[-1]["first_chunk"]["warm_s"]
            lines += ["", f"{name}: load {min(loads):.2f} - {max(loads):.2f} s; first chunk {first:.3f} s; memory, GB: {memory}"]
            if peak := found.get("peak memory"):
                lines.append(f"{name}: {peak['driver_peak'] / 2**30:.2f} GiB at most as the driver counts it")
        for check, key in CHECKS:
            if check in found:
                what = check if key == "equal" else f"logits {key}"
                lines.append(f"{name}: {what}: {'yes' if found[check][key] else 'NO'}")
    return "\n".join(lines)


CHECKS = (("repeats", "equal"), ("graph equals direct calls", "equal"), ("graph equals direct calls", "finite"),
          ("interleaved sessions equal solo", "equal"))  # fmt: skip


def wrong(record: dict) -> list[str]:
    return [f"{name}: {check} ({key})" for name in ("new", "baseline") for check, key in CHECKS
            if not record.get(name, {}).get(check, {key: True})[key]]  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.measure_31b", description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", type=Path, required=True, help="manifest.json and model.sm_NN.pt2 of this checkout")
    parser.add_argument("--baseline", type=Path, help="the same of another commit")
    parser.add_argument("--baseline-checkout", type=Path, help="that commit, built")
    parser.add_argument("--work", type=Path, required=True, help="for the model and the artifacts: 40 GB, 60 GB where weights differ")
    parser.add_argument("--out", type=Path, required=True, metavar="F.json")
    parser.add_argument("--budget", type=float, default=570, metavar="S", help="begin no step that may not be done after S seconds (570)")
    parser.add_argument("--preset", default="gemma4-31b")
    parser.add_argument("--mix", default="q4_k_m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--depths", default=DEPTHS)
    parser.add_argument("--steps", type=int, default=64, help="decode steps at each depth")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of the checks' prompt")
    options = parser.parse_args(arguments)
    if (options.baseline is None) != (options.baseline_checkout is None):
        parser.error("--baseline and --baseline-checkout go together")
    for path in (options.compiled, options.baseline):
        if path and not (path / "manifest.json").is_file():
            parser.error(f"{path}: no manifest.json there")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    m = Measurement(options.out.resolve(), options.budget)
    new = side("new", options.compiled.resolve(), ROOT, work)
    old = side("baseline", options.baseline.resolve(), options.baseline_checkout.resolve(), work) if options.baseline else None
    sides = [new, old] if old else [new]
    cuda = any(t["device"] == "cuda" for t in new.manifest["targets"])
    gguf = work / "model.gguf"
    m.record["command"] = {"preset": options.preset, "mix": options.mix, "layers": options.layers, "steps": options.steps}
    vocab = new.manifest["config"]["vocab_size"]
    prompt = [2, *(i * 7919 % vocab for i in range(options.prompt - 1))]

    def synthesize() -> dict:
        if not gguf.is_file():
            more = (*(("--layers", options.layers) if options.layers else ()), *(("--vocab-from", VOCAB) if vocab == 262144 else ()))
            m.run(new, new.python, "-m", "exporter", "synth", "--preset", options.preset, "--mix", options.mix, "--out", gguf, *more)
        return {"bytes": gguf.stat().st_size}

    m.step("device", "machine", 0, device)
    if cuda:
        m.step("device", "ceilings", 10, lambda: ceilings_of("cuda"))
    m.step("model", "synthesized", 60, synthesize)
    for at in sides:
        m.record.setdefault(at.name, {})["producer"] = at.manifest["producer"]
        m.step(at.name, "completed", 60, lambda at=at: complete(m, at, gguf, new if at is old else None))
    sides = [at for at in sides if "completed" in m.record[at.name]]
    for turn in range(options.rounds):
        for at in sides:
            m.step(at.name, f"speeds {turn + 1}", 90, lambda at=at: speeds(m, at, options))
    for at in sides:
        m.step(at.name, "repeats", 20, lambda at=at: repeats(m, at, prompt))
        m.step(at.name, "graph equals direct calls", 20, lambda at=at: graph_and_direct(m, at, prompt, work))
        if cuda:
            m.step(at.name, "peak memory", 10, lambda at=at: peak_memory(m, at, prompt))
        if at.python == sys.executable and at is old:
            print(f"{at.name}: no Python of its own in {at.checkout}/.venv: its sessions are not interleaved", flush=True)
            continue
        interleave = (at.python, "-c", INTERLEAVED, at.artifact, vocab, len(prompt), *at.plays[2:])
        m.step(at.name, "interleaved sessions equal solo", 30, lambda at=at, c=interleave: {"equal": json.loads(m.run(at, *c))})
    print(table(m.record))
    for line in m.failed + [f"wrong: {line}" for line in wrong(m.record)]:
        print(line, file=sys.stderr)
    if m.left_out:
        print(f"left out, {options.budget:.0f} s were over: {'; '.join(m.left_out)}; the same command goes on", file=sys.stderr)
    return 1 if m.failed or wrong(m.record) else 3 if m.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
