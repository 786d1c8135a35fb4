"""Times every op on this GPU at a model's shapes: python -m kiln.custom_ops.bench [--model NAME] [--only TEXT] [--out F.json] [--tune]."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from kiln.custom_ops.bench import harness
from kiln.custom_ops.bench.cases import workload
from kiln.custom_ops.bench.tune import families, tune
from kiln.custom_ops.geometry import GEOMETRIES
from kiln.custom_ops.gpu.target import current_target

MODELS = sorted(GEOMETRIES)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kiln.custom_ops.bench", description="Time every op on this machine's GPU.")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose op and shape contain TEXT")
    parser.add_argument("--out", type=Path, metavar="F.json", help="write the record here")
    parser.add_argument("--model", choices=MODELS, default="gemma4-31b", help="whose shapes, of the Q4_K_M mix (gemma4-31b)")
    parser.add_argument("--tune", action="store_true", help="time a grid of kernel configurations instead, print the best")
    parser.add_argument("--budget", type=float, default=180, metavar="S", help="with --tune: start no candidate after S seconds (180)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench: error: no usable NVIDIA GPU here", file=sys.stderr)
        return 1
    work = workload(GEOMETRIES[options.model], "q4_k_m")
    grid = [f for f in families(current_target(), work) if options.only in f.name] if options.tune else []
    cases = [] if options.tune else [c for c in harness.all_cases(work) if options.only in c.name]
    if not grid and not cases:
        print(f"bench: error: nothing to time is called {options.only!r}; without --only everything is", file=sys.stderr)
        return 2
    if options.tune:
        record, failed = tune(grid, options.budget), False
    else:
        rows, where = harness.bench(cases)
        record, failed = where | {"rows": rows}, not all(row["right"] for row in rows)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
