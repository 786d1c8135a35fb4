"""`kiln bench`: kiln-run's measurements at several depths, against what the work costs by the manifest and what the device can do."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

from kiln.custom_ops.geometry import keys_attended
from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.errors import KilnError, UsageProblem
from kiln.exporter.measure.picture import log2_ticks, panels
from kiln.exporter.measure.runner import runner


def numbers(text: str, option: str = "--depths") -> list[int]:
    """`128,512` as a list; raises UsageProblem."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageProblem(f"{option} {text}: must be integers separated by commas") from None


# ---- costs, from the manifest ----


def weight_bytes(manifest: dict) -> int:
    """Bytes of weights that one decode step reads."""
    return _cost(manifest)["weight_bytes"]


def kv_bytes(manifest: dict, position: int) -> int:
    """Bytes of the caches that a decode step at `position` reads: what is filled, a ring at most once, codes up to the exact window."""
    total, readers = 0, _cost(manifest)["readers"]
    for kv in manifest["kv"]:
        times = readers.get(kv["name"].rpartition(".")[0], 1)
        if kv["kind"] == "state":  # of its two slots a step reads one and writes the other
            total += kv["bytes"] * times
            continue
        if kv["kind"] == "prefix":
            total += kv["bytes"] * times
            continue
        ring = kv["kind"] == "ring"
        slots = kv["shape"][0] if ring else manifest["max_seq_len"]
        read = position if ring else max(position - (manifest.get("residual_length") or 0), 0)
        total += kv["bytes"] * times * min(read, slots) // slots
    return total


def prefill_flops(manifest: dict, start: int, tokens: int) -> int:
    """Floating-point operations of the matmuls and attention of one prefill call; the head runs for its last token only."""
    cost = _cost(manifest)
    attention = sum(part["flops"] * keys_attended(start, tokens, part["window"]) for part in cost["attention"])
    return cost["head_flops"] + cost["token_flops"] * tokens + attention


def _cost(manifest: dict) -> dict:
    if "cost" not in manifest:
        raise KilnError("the artifact does not say what its work costs: it is older than that; export it again")
    return manifest["cost"]


# ---- the record ----


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def ceilings_of(device: str) -> dict[str, float] | None:
    """What the GPU does at best, by `kiln.custom_ops.bench.ceilings`; None of a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    from kiln.custom_ops.bench.ceilings import measure_ceilings

    with torch.cuda.device(device):
        return asdict(measure_ceilings())


def _measured(artifact: Path, device: str, **options: object) -> tuple[dict, dict]:
    """What kiln-run --bench says with those options, of which None are left away, and of what; the manifest. Raises KilnError."""
    manifest = read_manifest(artifact)
    command = [runner(), str(artifact), "--bench", "--json", "--device", device]
    for name, value in options.items():
        if value is not None and value is not False:
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KilnError(lines[-1].removeprefix("kiln-run: error: "))
    record = {
        "artifact": artifact.name,
        "model": manifest["config"]["name"],
        "max_seq_len": manifest["max_seq_len"],
        "kv_cache": manifest["kv_cache"],
        "producer": manifest["producer"],
        **({"steps": options["steps"]} if options.get("steps") else {}),
        **json.loads(done.stdout),
    }
    record["device_name"] = device_name(record["device"])
    return record, manifest


def bench_drafts(
    artifact: Path, draft: str, draft_length: int, draft_rates: str | None, prompt_file: Path | None, raw: bool, max_new_tokens: int | None,
    depths: str | None, prefill_chunk: int | None, steps: int, device: str, threads: int | None, out: Path | None, weights: Path | None,
) -> tuple[dict, str]:  # fmt: skip
    """The same text with and without drafts: the record, also written to `out`, and its text. Raises KilnError."""
    record, _ = _measured(
        artifact, device, draft=draft, draft_length=draft_length or None, draft_rates=draft_rates, prompt_file=prompt_file, raw=raw,
        max_new_tokens=max_new_tokens, depths=depths, prefill_chunk=prefill_chunk, steps=steps if draft_rates else None, threads=threads,
        weights=weights,
    )  # fmt: skip
    what = f"each place right as often as {draft_rates}" if draft_rates else draft
    lines = [
        f"{record['model']} on {record['device_name']} ({record['target']}), KV cache {record['kv_cache']}; drafts: {what}",
        f"{'depth':>8} {'tokens':>7} {'plain tok/s':>12} {'tok/s':>9} {'speed-up':>9} {'tokens/step':>12}  acceptance of each place",
    ]
    for row in record["drafts"]:
        counts = row["counts"]
        shares = [f"{right / tried:.2f}" for right, tried in zip(counts["right"], counts["tried"], strict=True) if tried]
        lines.append(
            f"{row['depth']:8d} {row['tokens']:7d} {row['plain_tok_s']:12.2f} {row['tok_s']:9.2f} {row['speed_up']:9.2f} "
            f"{counts['tokens_a_step']:12.2f}  {' '.join(shares) or '-'}"
        )
    write_record(record, out)
    return record, "\n".join(lines)


def write_record(record: dict, out: Path | None) -> None:
    """To `out`, where that is named. Raises KilnError."""
    if out:
        try:
            out.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as e:
            raise KilnError(f"--out {out}: {e.strerror}") from e


def measure(
    artifact: Path, depths: str | None, prefill_chunk: int | None, steps: int, device: str = "auto", threads: int | None = None,
    weights: Path | None = None,
) -> dict:
    """Runs kiln-run --bench and adds, to each depth, the cost of the work and the share of the ceilings. Raises KilnError."""
    record, manifest = _measured(
        artifact, device, depths=depths, prefill_chunk=prefill_chunk, steps=steps, threads=threads, weights=weights
    )
    record["ceilings"] = ceilings_of(record["device"])
    return add_costs(record, manifest)


def add_costs(record: dict, manifest: dict) -> dict:
    """To `record`: bytes of a decode step and operations of the prefill call at each depth, rates, and per cent of the measured ceilings.

    The ceiling of decode is the faster of copy and plain read, that of prefill a single bfloat16 matmul.
    """
    ceilings, first = record["ceilings"], record["first_chunk"]
    first |= {"start": 0, "seconds": first["warm_s"], "tok_s": first["tokens"] / first["warm_s"]}
    for prefill in (first, *(row["prefill"] for row in record["depths"])):
        prefill["flops"] = prefill_flops(manifest, prefill["start"], prefill["tokens"])
        prefill["tflop_s"] = prefill["flops"] / prefill["seconds"] / 1e12
        if ceilings:
            prefill["percent"] = 100 * prefill["tflop_s"] / ceilings["matmul_tflop_s"]
    for row in record["depths"]:
        decode = row["decode"]
        decode["weight_bytes"] = weight_bytes(manifest)
        decode["kv_bytes"] = kv_bytes(manifest, decode["start"] + decode["steps"] // 2)
        decode["gb_s"] = (decode["weight_bytes"] + decode["kv_bytes"]) * decode["tok_s"] / 1e9
        if ceilings:
            decode["percent"] = 100 * decode["gb_s"] / max(ceilings["copy_gb_s"], ceilings["read_gb_s"])
    return record


def table(record: dict) -> str:
    memory, first, ceilings = record["memory"], record["first_chunk"], record["ceilings"]
    lines = [
        f"{record['model']} on {record['device_name']} ({record['target']}), KV cache {record['kv_cache']}, "
        f"{record['max_seq_len']} tokens at most, prefill in chunks of {record['prefill_chunk']}",
        f"load {record['load_s']:.2f} s; first token of a prompt of {first['tokens']} tokens after {first['cold_s']:.3f} s cold, "
        f"{first['warm_s']:.3f} s warm",
        "memory " + ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.3f} GB" for name, size in memory.items()),
    ]
    if ceilings:
        lines.append(
            f"ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, read {ceilings['read_gb_s']:.0f} GB/s, bfloat16 matmul "
            f"{ceilings['matmul_tflop_s']:.0f} TFLOP/s ({ceilings['matmul_sustained_tflop_s']:.0f} sustained)"
        )
    lines.append(
        f"{'depth':>8} {'chunk':>6} {'prefill':>9} {'TFLOP/s':>8} {'of max':>7} {'prompt':>9} | {'decode':>8} {'p10':>8} {'p90':>8} "
        f"{'GB/token':>9} {'GB/s':>7} {'of max':>7}"
    )
    moved = []
    for row in record["depths"]:
        prefill, decode = row["prefill"], row["decode"]
        share = [f"{part['percent']:.1f} %" if "percent" in part else "" for part in (prefill, decode)]
        size = (decode["weight_bytes"] + decode["kv_bytes"]) / 1e9
        mark = "" if row["position"] == row["depth"] else "*"
        lines.append(
            f"{str(row['depth']) + mark:>8} {prefill['tokens']:6d} {prefill['tok_s']:9.1f} {prefill['tflop_s']:8.1f} {share[0]:>7} "
            f"{row['prompt']['tok_s']:9.1f} | {decode['tok_s']:8.2f} {decode['p10']:8.2f} {decode['p90']:8.2f} {size:9.3f} "
            f"{decode['gb_s']:7.0f} {share[1]:>7}"
        )
        if mark:
            moved.append(f"* {row['depth']}: measured at {row['position']}, so that the decode steps fit")
    return "\n".join(line.rstrip() for line in lines + moved)


def plot(record: dict, path: Path) -> None:
    """Decode and prefill against depth."""

    def column(part: str, name: str) -> list[float]:
        return [row[part][name] for row in record["depths"]]

    positions = [row["position"] for row in record["depths"]]
    with panels(path, 2, f"{record['model']} on {record['device_name']}, KV cache {record['kv_cache']}") as (left, right):
        left.plot(positions, column("decode", "tok_s"), "o-", label="median")
        left.fill_between(positions, column("decode", "p10"), column("decode", "p90"), alpha=0.25, label="p10 .. p90")
        right.plot(positions, column("prefill", "tok_s"), "o-", label="the chunk that ends here")
        right.plot(positions, column("prompt", "tok_s"), "s--", label="the whole prompt")
        for axes, title in ((left, "decode"), (right, "prefill")):
            axes.set(title=title, xlabel="depth, tokens", ylabel="tokens/s", ylim=(0, None))
            log2_ticks(axes, positions)
            axes.grid(alpha=0.3)
            axes.legend()
