"""The table of h200.md from the raw files beside it: python docs/measurements/table.py [--history COMMIT DATE].

Reads the h200-31b-MIX.json of `python -m tests.measure.measure_31b`: one commit's, so a file that was not measured again is not shown. With
--history it prints the same figures as rows of history.csv instead, where there is no such file those of h200-31b-MIX-bench.json and
-checks.json, as the tools before wrote them.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
MIXES = {"Q4_K_M": "q4_k_m", "Q6_K": "q6_k", "Q4_0": "q4_0"}
FIRST_CHUNK = 2048  # tokens; a shallower prefill is of fewer
Row = tuple[str, float, str, str]  # metric as in history.csv, value, its unit, what the table says of it


def read(mix: str) -> dict | None:
    """The raw figures of one file: ceilings, rounds of speeds, runs of the checks, memory, what was checked."""
    whole, bench, checks = (HERE / f"h200-31b-{mix}{part}.json" for part in ("", "-bench", "-checks"))
    if whole.is_file():
        found = json.loads(whole.read_text())
        new = found["new"]
        rounds = [new[name] for name in sorted(new) if name.startswith("speeds ")]
        equal = {name: new[name]["equal"] for name in new if "equal" in new[name] and isinstance(new[name], dict)}
        equal["logits finite"] = new["graph equals direct calls"]["finite"]
        peak = new.get("peak memory", {})
        return {"ceilings": found["device"]["ceilings"], "rounds": rounds, "runs": new["repeats"]["runs"], "checks": equal,
                "runner": peak.get("memory", rounds[-1]["memory"])["total"], "driver": peak.get("driver_peak")}  # fmt: skip
    if not bench.is_file():
        return None
    speeds, found = json.loads(bench.read_text()), json.loads(checks.read_text())
    names = {"repeats": "three_repeats_equal", "graph equals direct calls": "graph_equals_direct",
             "interleaved sessions equal solo": "sessions_interleaved_equal_solo", "logits finite": "logits_finite"}  # fmt: skip
    equal = {name: found[key] for name, key in names.items()}
    return {"ceilings": speeds["ceilings"], "rounds": [speeds], "runs": found["runs"], "checks": equal,
            "runner": found["memory"]["total"], "driver": found["peak_memory_bytes"]}  # fmt: skip


def rows(raw: dict) -> list[Row]:
    """The figures of one file; speeds are medians over the rounds."""
    bandwidth, matmul = max(raw["ceilings"][name] for name in ("copy_gb_s", "read_gb_s")), raw["ceilings"]["matmul_tflop_s"]
    found: list[Row] = [
        ("ceiling: bandwidth", bandwidth, "GB/s", f"{bandwidth:,.0f} GB/s"),
        ("ceiling: bf16 matmul", matmul, "TFLOP/s", f"{matmul:,.0f} TFLOP/s"),
    ]
    depths: dict[int, dict[str, float]] = {}
    for at in zip(*(record["depths"] for record in raw["rounds"]), strict=True):
        tokens = at[0]["prefill"]["tokens"]
        middle = {f"{part} {name}": statistics.median(row[part][name] for row in at)
                  for part, names in (("decode", ("tok_s", "p10", "p90", "percent")), ("prefill", ("tok_s", "tflop_s", "percent")),
                                      ("prompt", ("tok_s",))) for name in names}  # fmt: skip
        depths[at[0]["depth"]] = middle | {"tokens": tokens}
    for depth, row in depths.items():
        said = f"{row['decode tok_s']:.1f} ({row['decode p10']:.1f} - {row['decode p90']:.1f}), {row['decode percent']:.1f} %"
        found.append((f"decode at {depth}", row["decode tok_s"], "tok/s", said))
    chunks = [record["first_chunk"] for record in raw["rounds"]]
    if "percent" in chunks[0]:  # the tool before did not say
        speed, share, rate = (statistics.median(chunk[name] for chunk in chunks) for name in ("tok_s", "percent", "tflop_s"))
        said = f"{speed:,.0f}, {share:.0f} % ({rate:.0f} TFLOP/s)"
        found.append((f"prefill of the first {chunks[0]['tokens']} tokens", speed, "tok/s", said))
    first, last = min(depths), max(depths)
    ratio = depths[last]["decode tok_s"] / depths[first]["decode tok_s"]
    found.append((f"decode at {last} to decode at {first}", ratio, "ratio", f"{ratio:.3f}"))
    for depth, row in depths.items():
        if depth < FIRST_CHUNK:
            continue
        said = f"{row['prefill tok_s']:,.0f}, {row['prefill percent']:.0f} % ({row['prefill tflop_s']:.0f} TFLOP/s)"
        found.append((f"prefill of a {row['tokens']}-token chunk at {depth}", row["prefill tok_s"], "tok/s", said))
        found.append((f"prefill of a whole prompt at {depth}", row["prompt tok_s"], "tok/s", f"{row['prompt tok_s']:,.0f}"))
    first_token, loads = ([run[name] for run in raw["runs"]] for name in ("ttft_s", "load_s"))
    found.append(("first token of a 3000-token prompt", min(first_token), "s", f"{min(first_token):.2f} s"))
    found.append(("load, page cache warm", min(loads), "s", f"{min(loads):.1f} - {max(loads):.1f} s"))
    for who in ("runner", "driver"):
        if raw[who]:
            found.append((f"device memory, {who}'s count", raw[who] / 2**30, "GiB", f"{raw[who] / 2**30:.2f} GiB"))
    return found + [(name, float(right), "", "yes" if right else "NO") for name, right in raw["checks"].items()]


def main(arguments: list[str]) -> None:
    history = arguments[:1] == ["--history"]
    measured = {name: mix for name, mix in MIXES.items() if history or (HERE / f"h200-31b-{mix}.json").is_file()}
    tables = {name: rows(raw) for name, mix in measured.items() if (raw := read(mix))}
    if history:
        commit, date = arguments[1:]
        out = csv.writer(sys.stdout, lineterminator="\n")
        for name, found in tables.items():
            out.writerows((date, commit, "H200", f"31B {name} TQ4 {row[0]}", f"{row[1]:.4g}", row[2]) for row in found if row[2])
        return
    said = {name: {row[0]: row[3] for row in found} for name, found in tables.items()}
    print(f"| | {' | '.join(tables)} |\n|---|{'---|' * len(tables)}")
    for metric in dict.fromkeys(row[0] for found in tables.values() for row in found):
        print(f"| {metric} | {' | '.join(said[name].get(metric, '') for name in tables)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
