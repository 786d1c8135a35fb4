"""What a draft of the 31B's drafter takes on a GPU: its real geometry at Q8_0, over two layers of the model, one of each kind.

    python -m tests.measure.draft_step --work DIR --out F.json [--target native]

The drafter reads one row of the model's embedding, and its caches; the model's own step is measured elsewhere. Random weights in the
drafter, zeros in the model. Each figure is of the runner's calls, host included: the median of the seconds of `count` drafts, over count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from kiln.custom_ops.geometry import GEMMA4_31B, GEOMETRIES
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools import synth
from tests.tools.drafters import draft_config, random_tensor, write_drafter

PRESET = "gemma4-31b-two-layers"
SIZES = {"hidden": 1024, "ffn": 8192, "heads": 32}  # of the 31B's drafter
DEPTHS, COUNTS, REPEATS = (128, 2048, 32768, 130000), (1, 3, 7), 20


def export(work: Path, target: str) -> dict[str, Any]:
    GEOMETRIES[PRESET] = replace(GEMMA4_31B, layers=2, full_every=2, ffn=1024)
    synth.write_synthetic(work / "model.gguf", PRESET, "q4_k_m", sparse=True)
    config = draft_config("31b-assistant", read_plan(work / "model.gguf").config, **SIZES)
    write_drafter(config, work / "drafter.gguf", "Q8_0", random_tensor)
    began = time.monotonic()
    files = ("--gguf", work / "model.gguf", "--draft-gguf", work / "drafter.gguf", "--out", work / "artifact", "--force")
    given = (*files, "--target", target, "--max-seq-len", "131072", "--prefill-chunk", "512", "--turboquant", "--decode-rows", "1,8")
    subprocess.run([sys.executable, "-m", "exporter", "export", *given], check=True)
    return {"export_s": time.monotonic() - began, "drafter_bytes": (work / "drafter.gguf").stat().st_size}


def times(work: Path) -> list[dict[str, Any]]:
    import kiln

    session, found = kiln.Session(kiln.Model(str(work / "artifact"))), []
    for depth in DEPTHS:
        session.pretend(depth)
        session.decode()
        for count in COUNTS:
            each = sorted(session.probe_drafts(count, 5)[3] / count for _ in range(REPEATS))
            found.append({"depth": depth, "count": count, "ms": 1e3 * statistics.median(each), "ms_range": [1e3 * each[0], 1e3 * each[-1]]})
    return found


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tests.measure.draft_step", description=__doc__.splitlines()[0])
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--target", default="native")
    p.add_argument("--only", choices=("export", "times"))
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    record = {} if a.only == "times" else export(a.work, a.target)
    if a.only != "export":
        record["drafts"] = times(a.work)
    a.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
