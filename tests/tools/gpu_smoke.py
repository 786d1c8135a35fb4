"""The runner's GPU path on a small artifact, step by step; for a machine with a GPU, before the tests marked gpu.

    python -m exporter export --gguf tests/nano/gemma4-nano-Q4_K_M.gguf --out ART --target sm_90 --turboquant --max-seq-len 1024 \\
      --prefill-chunk 256
    python -m tests.tools.gpu_smoke ART [--threads build/cpp/kiln-threads] [--devices 2]

Each line is one check; the first that fails ends it with exit code 1. `kiln-threads` is `cmake --build build/cpp --target kiln-threads`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from kiln.exporter.measure.runner import runner

RUNNER = Path(runner())
PROMPT = "Why is the sky blue?"
LONG = ",".join(str(3 + i * 7 % 200) for i in range(600))  # three chunks, the last one short


def run(artifact: Path, *arguments: object) -> dict:
    start = time.perf_counter()
    result = subprocess.run([RUNNER, artifact, *map(str, arguments), "--device", "cuda", "--json"], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"FAILED: kiln-run {' '.join(map(str, arguments))}: {result.stderr.strip()}")
    return json.loads(result.stdout) | {"wall_s": time.perf_counter() - start, "stderr": result.stderr}


def check(name: str, good: bool, detail: object = "") -> None:
    print(f"{'ok    ' if good else 'FAILED'} {name} {detail}", flush=True)
    if not good:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=Path, help="kiln-threads")
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()
    artifact = options.artifact

    libraries = subprocess.run(["ldd", RUNNER], capture_output=True, text=True, check=True).stdout
    check("kiln-run links to nothing of torch and CUDA", not any(word in libraries for word in ("torch", "c10", "cuda", "cublas")))

    answer = run(artifact, "--prompt", PROMPT, "--memory")
    check("it answers", len(answer["tokens"]) > 5, repr(answer["text"]))
    times = f"{answer['wall_s']:.2f} s, of it load {answer['load_s']:.2f}, first token {answer['ttft_s']:.3f}"
    check("process start to end", answer["wall_s"] < 60, times)
    check("kernels start early", answer["early_launches"] > 0, answer["early_launches"])
    print("      memory", json.dumps(answer["memory"]), "outside", answer["memory_outside"])
    for flag in ("--no-graph", "--no-early-launch"):
        check(f"the same answer with {flag}", run(artifact, "--prompt", PROMPT, flag)["tokens"] == answer["tokens"])

    common = ("--tokens", LONG, "--max-new-tokens", 40, "--no-eog")
    long = run(artifact, *common)
    check("a prompt of three chunks, twice", run(artifact, *common)["tokens"] == long["tokens"], long["tokens"][:8])
    check("without a graph", run(artifact, *common, "--no-graph")["tokens"] == long["tokens"])
    print("      rates", f"prefill {long['prefill_tok_s']:.0f} tok/s, decode {long['decode_tok_s']:.0f} tok/s")

    python = """
import kiln, sys
model = kiln.Model(sys.argv[1], sys.argv[2])
session = kiln.Session(model)
ids = [3 + i * 7 % 200 for i in range(600)]
def answer():
    session.reset()
    session.prefill(ids)
    return session.generate(40, stop_at_eog=False)[0]
first = answer()
assert answer() == first
import torch
assert torch.ones(8, device=sys.argv[2]).sum() == 8
assert answer() == first
held = torch.cuda.mem_get_info(sys.argv[2])[0]
for _ in range(20):
    kiln.Session(model).prefill(ids)
left = torch.cuda.mem_get_info(sys.argv[2])[0]
assert held - left < 64 << 20, (held, left)
print(first)
"""
    for device in ["cuda", *(f"cuda:{n}" for n in range(options.devices))]:
        result = subprocess.run([sys.executable, "-c", python, artifact, device], capture_output=True, text=True)
        check(f"the Python module beside torch on {device}; 20 sessions leave nothing", result.returncode == 0, result.stderr[-800:])
        check("it says what kiln-run says", json.loads(result.stdout) == long["tokens"])

    if options.threads:
        for arguments in (("8", "64", "20"), ("8", "40", "3", "alive")):
            result = subprocess.run([options.threads, artifact, "cuda", *arguments], capture_output=True, text=True)
            check(f"sessions from many threads {arguments}", result.returncode == 0, (result.stdout + result.stderr)[-800:].strip())


if __name__ == "__main__":
    main()
