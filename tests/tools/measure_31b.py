"""The synthetic 31B on a GPU: rebuild its weights beside an artifact that was compiled elsewhere, then measure and check it.

    python -m tests.tools.measure_31b --compiled DIR --work DIR [--depths 2000] --out measurements.json

`--compiled` holds manifest.json and model.sm_NN.pt2 of `kiln export`; the weights are made here by `kiln synth`: nothing but code travels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from exporter.tools.synth import write_synthetic
from tests.sessions import interleaved_equal_solo
from tests.tools.rebuild import complete

VOCAB = Path(__file__).parents[1] / "fixtures" / "gemma4-vocab.gguf"


def rebuild(compiled: Path, work: Path, preset: str, mix: str, layers: int | None) -> Path:
    """The whole artifact at work/artifact."""
    start = time.monotonic()
    write_synthetic(work / "model.gguf", preset, mix, 0, layers=layers, vocab_from=VOCAB)
    synthesized = time.monotonic()
    artifact = complete(compiled, work / "model.gguf", work / "artifact")
    print(f"synthesized in {synthesized - start:.0f} s, packed in {time.monotonic() - synthesized:.0f} s", flush=True)
    return artifact


def run(artifact: Path, prompt: list[int], *options: object) -> dict:
    command = ["kiln-run", str(artifact), "--tokens", ",".join(map(str, prompt)), "--no-eog", "--json", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command[:2])}: {result.stderr}")
    return json.loads(result.stdout) | {"stderr": result.stderr}


def peak_memory(artifact: Path, prompt: list[int]) -> int:
    """Largest device memory in use while a prompt runs, bytes, as the driver counts it (context and code included)."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = lambda: int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])  # noqa: E731
    before, peak = used(), 0
    command = ["kiln-run", str(artifact), "--tokens", ",".join(map(str, prompt)), "--no-eog", "--json", "--max-new-tokens", "64"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, used() - before)
        time.sleep(0.05)
    return peak << 20


def interleaved(artifact: Path, vocab: int) -> bool:
    import kiln

    prompts = [[2, *((np.arange(200 + 150 * i) * (37 + i)) % vocab).tolist()] for i in range(2)]
    return interleaved_equal_solo(kiln.Model(str(artifact)), prompts, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--preset", default="gemma4-31b")
    parser.add_argument("--mix", default="q4_k_m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompt", type=int, default=3000, help="tokens")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    artifact = rebuild(args.compiled, args.work, args.preset, args.mix, args.layers)
    vocab = json.loads((artifact / "manifest.json").read_text())["config"]["vocab_size"]
    prompt = [2, *((np.arange(args.prompt - 1) * 7919) % vocab).tolist()]
    files = {way: args.work / f"{way}.f32" for way in ("graph", "direct")}

    found: dict = {"prompt": len(prompt)}
    answers = [run(artifact, prompt, "--max-new-tokens", 64, "--memory") for _ in range(3)]
    found["runs"] = [{k: a[k] for k in ("load_s", "ttft_s", "prefill_tok_s", "decode_tok_s")} for a in answers]
    found["memory"] = answers[0]["memory"]
    found["three_repeats_equal"] = answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]
    found["tokens"] = answers[0]["tokens"]
    run(artifact, prompt, "--max-new-tokens", 16, "--logits", files["graph"])
    run(artifact, prompt, "--max-new-tokens", 16, "--logits", files["direct"], "--no-graph")
    graph, direct = (np.fromfile(f, np.float32) for f in files.values())
    found["logits_finite"] = bool(np.isfinite(graph).all())
    found["logits_std"] = float(graph.std())
    found["graph_equals_direct"] = bool(np.array_equal(graph, direct))
    found["peak_memory_bytes"] = peak_memory(artifact, prompt)
    found["sessions_interleaved_equal_solo"] = interleaved(artifact, vocab)
    args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
