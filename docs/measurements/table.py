"""The table of h200.md from the raw files beside it: python docs/measurements/table.py [--history COMMIT DATE].

Reads h200-31b-MIX-bench.json (`kiln bench --json`) and h200-31b-MIX-checks.json (`tests.tools.measure_31b`). With --history it prints the
same figures as rows of history.csv instead.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
MIXES = {"Q4_K_M": "q4_k_m", "Q6_K": "q6_k", "Q4_0": "q4_0"}
FIRST_CHUNK = 2048  # tokens; a shallower prefill is of fewer
Row = tuple[str, float, str, str]  # metric as in history.csv, value, its unit, what the table says of it


def rows(mix: str) -> list[Row]:
    """The figures of one file."""
    bench, checks = (json.loads((HERE / f"h200-31b-{mix}-{part}.json").read_text()) for part in ("bench", "checks"))
    copy, matmul = bench["ceilings"]["copy_gb_s"], bench["ceilings"]["matmul_tflop_s"]
    found: list[Row] = [
        ("ceiling: copy", copy, "GB/s", f"{copy:,.0f} GB/s"),
        ("ceiling: bf16 matmul", matmul, "TFLOP/s", f"{matmul:,.0f} TFLOP/s"),
    ]
    for depth in bench["depths"]:
        d = depth["decode"]
        said = f"{d['tok_s']:.1f} ({d['p10']:.1f} - {d['p90']:.1f}), {d['percent']:.1f} %"
        found.append((f"decode at {depth['depth']}", d["tok_s"], "tok/s", said))
    shallow, deep = bench["depths"][0], bench["depths"][-1]
    ratio = deep["decode"]["tok_s"] / shallow["decode"]["tok_s"]
    found.append((f"decode at {deep['depth']} to decode at {shallow['depth']}", ratio, "ratio", f"{ratio:.3f}"))
    for depth in bench["depths"]:
        if depth["depth"] < FIRST_CHUNK:
            continue
        p = depth["prefill"]
        said = f"{p['tok_s']:,.0f}, {p['percent']:.0f} % ({p['tflop_s']:.0f} TFLOP/s)"
        found.append((f"prefill of a {p['tokens']}-token chunk at {depth['depth']}", p["tok_s"], "tok/s", said))
        prompt = depth["prompt"]["tok_s"]
        found.append((f"prefill of a whole prompt at {depth['depth']}", prompt, "tok/s", f"{prompt:,.0f}"))
    first = [run["ttft_s"] for run in checks["runs"]]
    loads = [run["load_s"] for run in checks["runs"]]
    runner, driver = checks["memory"]["total"] / 2**30, checks["peak_memory_bytes"] / 2**30
    found += [
        (f"first token of a {checks['prompt']}-token prompt", min(first), "s", f"{min(first):.2f} s"),
        ("load, page cache warm", min(loads), "s", f"{min(loads):.1f} - {max(loads):.1f} s"),
        ("device memory, runner's count", runner, "GiB", f"{runner:.2f} GiB"),
        ("device memory, driver's count", driver, "GiB", f"{driver:.2f} GiB"),
    ]
    kept = ("three_repeats_equal", "graph_equals_direct", "sessions_interleaved_equal_solo", "logits_finite")
    found += [(name.replace("_", " "), float(checks[name]), "", "yes" if checks[name] else "NO") for name in kept]
    return found


def main(arguments: list[str]) -> None:
    tables = {name: rows(mix) for name, mix in MIXES.items()}
    if arguments[:1] == ["--history"]:
        commit, date = arguments[1:]
        out = csv.writer(sys.stdout, lineterminator="\n")
        for name, found in tables.items():
            for metric, value, unit, _ in found:
                if unit:
                    out.writerow((date, commit, "H200", f"31B {name} TQ4 {metric}", f"{value:.4g}", unit))
        return
    metrics = list(dict.fromkeys(row[0] for found in tables.values() for row in found))
    said = {name: {row[0]: row[3] for row in found} for name, found in tables.items()}
    print(f"| | {' | '.join(tables)} |\n|---|{'---|' * len(tables)}")
    for metric in metrics:
        print(f"| {metric} | {' | '.join(said[name].get(metric, '') for name in tables)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
