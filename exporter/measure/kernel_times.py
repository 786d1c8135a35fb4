"""`kiln bench --profile`: where the time of one decode step and of one prefill call goes, kernel by kernel, on a GPU."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.errors import KilnError
from kiln.exporter.measure.runner import runtime

DECODE_STEPS, PREFILL_CALLS = 5, 2  # under the profiler
REPLAYS, BATCHES = 10, 7  # of the step's graph, for its time without the profiler
SPARE = 128  # positions after the depth: all steps of both
DEFAULT_DEPTH = 2048
SHOWN = 40  # rows of the text; the record has all
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def kernel_rows(trace: dict, calls: int) -> list[dict]:
    """Device work in a Chrome trace of `calls` equal calls, by kernel and grid: count and microseconds of one call, longest first."""
    sums: dict[tuple, list[float]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") in ON_DEVICE and "dur" in event:
            grid = event.get("args", {}).get("grid")
            entry = sums.setdefault((event["name"], tuple(grid) if grid else None), [0, 0.0])
            entry[0] += 1
            entry[1] += event["dur"]
    rows = [
        {"kernel": name, "grid": list(grid) if grid else None, "count": n / calls, "us": us / calls}
        for (name, grid), (n, us) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def family(kernel: str) -> str:
    """The op a kernel belongs to: a name without its number, one word for what the compiler fused and for each library."""
    fused = {"triton_poi_": "fused pointwise", "triton_red_": "fused reduction", "triton_per_": "fused reduction"}
    for prefix, name in fused.items():
        if kernel.startswith(prefix):
            return name
    if re.search(r"gemm|nvjet|cublas|cutlass", kernel):
        return "matmul"
    if kernel.startswith(("Memcpy", "Memset")):
        return kernel.split()[0]
    if "at::native" in kernel:
        return "torch"
    return re.sub(r"_\d+$", "", kernel)


def families(rows: list[dict]) -> list[dict]:
    sums: dict[str, list[float]] = {}
    for row in rows:
        entry = sums.setdefault(family(row["kernel"]), [0.0, 0.0])
        entry[0] += row["count"]
        entry[1] += row["us"]
    return sorted(({"family": name, "count": n, "us": us} for name, (n, us) in sums.items()), key=lambda row: -row["us"])


def text(record: dict) -> str:
    lines = [f"{record['model']} on {record['device_name']} ({record['target']}), KV cache {record['kv_cache']}"]
    for part in record["profiles"]:
        rows, total = part["kernels"], part["kernels_us"]
        count, measured = sum(row["count"] for row in rows), part["measured_us"]
        lines.append(
            f"\n{part['entry']} of {part['tokens']} token{'' if part['tokens'] == 1 else 's'} at depth {part['depth']}: {measured:.1f} us "
            f"{'as a graph' if part['graph'] else 'directly'}; kernels {total:.1f} us ({count:.0f} launches), rest {measured - total:.1f}"
        )
        for row in part["families"]:
            lines.append(f"  {row['us']:10.1f} us {100 * row['us'] / total:5.1f} % {row['count']:6.0f} x {row['family']}")
        lines.append(f"  {'us':>10} {'share':>7} {'count':>6} {'us each':>8}  kernel, grid")
        for row in rows[:SHOWN]:
            grid = "" if row["grid"] is None else " [" + ", ".join(map(str, row["grid"])) + "]"
            each = row["us"] / row["count"]
            share = 100 * row["us"] / total
            lines.append(f"  {row['us']:10.1f} {share:5.1f} % {row['count']:6.0f} {each:8.2f}  {row['kernel'][:80]}{grid}")
        if len(rows) > SHOWN:
            lines.append(f"  and {len(rows) - SHOWN} more: {sum(row['us'] for row in rows[SHOWN:]):.1f} us")
    return "\n".join(lines)


def profile(artifact: Path, depths: list[int], prefill_chunk: int | None, device: str = "auto", weights: Path | None = None,
            rows: list[int] | None = None) -> dict:
    """Profiles decode and prefill at each depth, or steps of `rows` tokens, over random caches. Raises KilnError without a GPU that the
    artifact has a target for."""
    import torch

    manifest = read_manifest(artifact)
    if device == "cpu" or not torch.cuda.is_available():
        raise KilnError("--profile needs an NVIDIA GPU: it reads the kernels' times on the device")
    if device not in ("auto", "cuda"):
        torch.cuda.set_device(device)
    capability = list(torch.cuda.get_device_capability())
    target = next((t for t in manifest["targets"] if t["compute_capability"] == capability), None)
    if target is None:
        names = ", ".join(t["target"] for t in manifest["targets"])
        raise KilnError(f"{artifact}: no target for this GPU, which is sm_{capability[0]}{capability[1]}; the artifact has: {names}")
    limit = manifest["max_seq_len"] - SPARE
    chunk = min(prefill_chunk or manifest["prefill_chunk"], manifest["prefill_chunk"], limit)
    if chunk < 2:
        raise KilnError(f"{artifact}: holds {manifest['max_seq_len']} tokens; --profile needs more than {SPARE + 2}")
    kiln = runtime()
    try:
        model = kiln.Model(str(artifact), f"cuda:{torch.cuda.current_device()}", weights=weights and str(weights))
        profiles = []
        batches = [filled(kiln.Batch(model, graph=graph), model) for graph in (True, False) if rows]
        for depth in depths or [DEFAULT_DEPTH]:
            at = max(min(depth, limit), 2)
            several = [_rows(batches[0], batches[1], at, m) for m in rows or ()]
            profiles += several or [_decode(model, at), _prefill(model, at, min(chunk, at))]
    except kiln.Error as e:
        raise KilnError(str(e)) from e
    return {
        "artifact": artifact.name,
        "model": manifest["config"]["name"],
        "kv_cache": manifest["kv_cache"],
        "producer": manifest["producer"],
        "target": target["target"],
        "device_name": torch.cuda.get_device_name(),
        "profiles": profiles,
    }


def _session(model: Any, **options: Any) -> Any:
    import kiln

    return filled(kiln.Session(model, **options), model)


def filled(owner: Any, model: Any) -> Any:
    """A session or a batch over caches of random values: zeros would time a softmax over equal scores, and take less power than work."""
    import torch

    dtypes = {kv["name"]: getattr(torch, kv["dtype"]) for kv in model.manifest["kv"]}
    for name, (address, size) in owner.cache_memory().items():
        view = types.SimpleNamespace(__cuda_array_interface__={"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3})
        cache = torch.as_tensor(view, device="cuda").view(dtypes[name])
        if cache.dtype == torch.int16:
            cache.copy_(torch.randint(-(1 << 15), 1 << 15, cache.shape, dtype=torch.int16, device="cuda"))
        else:
            cache.uniform_(0.5, 1.5)
    torch.cuda.synchronize()
    return owner


def _rows(batch: Any, direct: Any, depth: int, m: int) -> dict:
    """A step of m tokens of one session. direct: a batch without graphs."""

    def steps(of: Any, count: int) -> None:
        of.probe([5 + i for i in range(m)], list(range(depth, depth + m)), [0] * m, times=count)

    measured, trace = _microseconds(lambda n: steps(batch, n), REPLAYS), _trace(lambda n: steps(direct, n), DECODE_STEPS)
    return _part(f"decode_{m}" if m > 1 else "decode", depth, m, True, measured, trace, DECODE_STEPS)


def _decode(model: Any, depth: int) -> dict:
    replayed, direct = _session(model), _session(model, graph=False)

    def steps(session: Any, count: int) -> None:
        session.pretend(depth)
        session.generate(count + 1, stop_at_eog=False)  # the first token is at hand

    measured = _microseconds(lambda n: steps(replayed, n), REPLAYS)
    return _part("decode", depth, 1, True, measured, _trace(lambda n: steps(direct, n), DECODE_STEPS), DECODE_STEPS)


def _prefill(model: Any, depth: int, chunk: int) -> dict:
    import torch

    session, tokens = _session(model), torch.randint(model.vocab_size, (chunk,)).tolist()

    def calls(count: int) -> None:
        for _ in range(count):
            session.pretend(depth - chunk)
            session.prefill(tokens)

    return _part("prefill", depth, chunk, False, _microseconds(calls, 1), _trace(calls, PREFILL_CALLS), PREFILL_CALLS)


def _microseconds(calls: Callable[[int], None], count: int) -> float:
    """Of one call of `calls(count)`: the median over batches, each until its last token is on the host."""
    times = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        calls(count)
        times.append(1e6 * (time.perf_counter() - start) / count)
    return statistics.median(times[1:])


def _trace(calls: Callable[[int], None], count: int) -> dict:
    import torch
    from torch.profiler import ProfilerActivity

    trace = {}
    for _ in range(2):  # the first one starts the profiler up and may miss kernels
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            calls(count)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.json")
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text())
    return trace


def _part(entry: str, depth: int, tokens: int, graph: bool, measured: float, trace: dict, calls: int) -> dict:
    rows = kernel_rows(trace, calls)
    if not rows:
        raise KilnError("the profiler saw no kernel: CUPTI is not usable on this machine")
    return {
        "entry": entry,
        "depth": depth,
        "tokens": tokens,
        "graph": graph,
        "measured_us": measured,
        "kernels_us": sum(row["us"] for row in rows),
        "families": families(rows),
        "kernels": rows,
    }
