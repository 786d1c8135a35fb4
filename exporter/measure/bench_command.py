"""`kiln bench`: speed against depth, steps of several tokens, or the times of kernels."""

from __future__ import annotations

from pathlib import Path

from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.errors import KilnError
from kiln.exporter.measure import bench as speed
from kiln.exporter.measure import bench_rows, kernel_times
from kiln.exporter.measure.bench import numbers
from kiln.exporter.measure.picture import check_plot


def bench(
    artifact: Path,
    depths: str | None,
    prefill_chunk: int | None,
    steps: int,
    device: str,
    threads: int | None,
    profile: bool,
    out: Path | None,
    picture: Path | None,
    weights: Path | None = None,
    rows: str | None = None,
) -> tuple[dict, str]:
    """The command: the record, also written to `out`, and its text."""
    taken = numbers(rows, "--rows") if rows else []
    if taken:
        if picture or prefill_chunk:
            raise KilnError("--rows goes with neither --plot nor --prefill-chunk")
        bench_rows.check(read_manifest(artifact), taken, numbers(depths or bench_rows.DEFAULT_DEPTHS), steps)
    if taken and not profile:
        asked = numbers(depths or bench_rows.DEFAULT_DEPTHS)
        record = bench_rows.measure(artifact, taken, asked, steps, device, threads, weights)
        text = bench_rows.table(record)
    elif profile:
        if picture:
            raise KilnError("--plot draws speed against depth, --profile has none; run them apart")
        record = kernel_times.profile(artifact, numbers(depths) if depths else [], prefill_chunk, device, weights, taken)
        text = kernel_times.text(record)
    else:
        if picture:
            check_plot()
        if depths:
            numbers(depths)
        record = speed.measure(artifact, depths, prefill_chunk, steps, device, threads, weights)
        text = speed.table(record)
    speed.write_record(record, out)
    if picture:
        speed.plot(record, picture)
    return record, text
