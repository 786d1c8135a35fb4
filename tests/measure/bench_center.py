"""What the key center costs on a GPU: attention of one layer of the 31B over TQ4, with the center and without, in turn.

    python -m tests.measure.bench_center [--out F.json]

Each case is checked against its reference first, as in `make bench-ops`. Microseconds, three times each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from kiln.custom_ops.bench import harness
from kiln.custom_ops.bench.attention_cases import tq4_case, tq4_decode_case
from kiln.custom_ops.bench.cases import GEMMA4_31B, Case
from kiln.custom_ops.bench.ceilings import measure_ceilings

DEPTHS = (128, 2048, 32768, 131072)
TIMES = 3


def cases(centered: bool) -> dict[str, Case]:
    found = {f"a step at {depth}": tq4_decode_case(GEMMA4_31B, depth, 1, centered) for depth in DEPTHS}
    found |= {f"a step of 4 tokens at {depth}": tq4_decode_case(GEMMA4_31B, depth, 4, centered) for depth in DEPTHS[1:3]}
    return found | {"a chunk of 2048 at 8192": tq4_case(GEMMA4_31B, 2048, 8192, centered)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.bench_center", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    both = {"without": cases(False), "with": cases(True)}
    harness.compile_cases([case for one in both.values() for case in one.values()])
    ceilings, l2 = measure_ceilings(), torch.cuda.get_device_properties(0).L2_cache_size
    found: dict[str, dict[str, list[float]]] = {name: {form: [] for form in both} for name in both["with"]}
    for turn in range(TIMES):
        for name, row in found.items():
            for form in sorted(both, reverse=turn % 2 == 0):
                measured = harness.measure(both[form][name], ceilings, l2, harness.free_memory() // 4)
                if not measured["right"]:
                    raise SystemExit(harness.line(measured))
                row[form].append(measured["us"])
    for name, row in found.items():
        print(f"{name:28} {', '.join(f'{form} {min(us):.2f} us' for form, us in row.items())}")
    if out:
        out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
