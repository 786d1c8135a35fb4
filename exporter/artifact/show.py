"""`kiln inspect`: a GGUF file or an artifact as one JSON-able record, and as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from exporter.artifact.manifest import read_manifest
from exporter.artifact.manifest import verify as verify_artifact
from exporter.source.config import check_tensors, from_gguf
from exporter.source.gguf import open_gguf


def gguf(path: Path) -> dict:
    """Configuration, tensor types and sizes of a GGUF file, after the checks that export makes."""
    file = open_gguf(path)
    config = from_gguf(file)
    skipped = check_tensors(config, file)
    return {
        "file": str(path),
        "config": config.to_dict(),
        "types": dict(Counter(t.type for t in file.tensors.values())),
        "bytes": sum(t.nbytes for t in file.tensors.values()),
        "skipped": list(skipped),
        "tensors": [{"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes} for t in file.tensors.values()],
    }


def artifact(path: Path, verify: bool) -> dict:
    """The manifest; with `verify` every checksum is recomputed first."""
    manifest = read_manifest(path)
    if verify:
        verify_artifact(path)
    return manifest


def text(record: dict) -> str:
    lines = []
    if "format" in record:
        config, producer = record["config"], record["producer"]
        lines.append(f"{config['name']} ({config['architecture']}), {len(config['layers'])} layers, context {record['max_seq_len']}")
        lines.append(f"made by Kiln {producer['kiln']} with torch {producer['torch']}, triton {producer['triton']}")
        lines += [f"target  {t['target']:7} {t['file']} ({t['bytes'] / 2**20:.1f} MiB)" for t in record["targets"]]
        for p in record["passes"]:
            count = f"{p['matches']}/{p['expected']}" if p.get("expected") else ""  # older artifacts have no "expected"
            lines.append(f"pass    {p['name']:16} {p['status']:10} {count:8} {p['note']}")
        lines += [f"note    {t['target']} {shortfall}" for t in record["targets"] for shortfall in t.get("shortfalls", ())]
        lines.append(f"weights {len(record['constants'])} constants, {record['weights']['bytes'] / 2**30:.2f} GiB")
        kinds = Counter()
        for kv in record["kv"]:
            kinds[kv["kind"]] += kv["bytes"]
        lines += [f"KV      {kind:7} {size / 2**30:.3f} GiB" for kind, size in kinds.items()]
        kinds = Counter(q["type"] for q in record["quantization"])
        lines.append("types   " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    else:
        config = record["config"]
        sliding = sum(layer["sliding"] for layer in config["layers"])
        lines.append(
            f"{config['name']} ({config['architecture']}), {len(config['layers'])} layers ({sliding} sliding), "
            f"context {config['context_length']}, vocabulary {config['vocab_size']}"
        )
        lines.append(
            f"{len(record['tensors'])} tensors, {record['bytes'] / 2**30:.2f} GiB: "
            + ", ".join(f"{n} {t}" for t, n in record["types"].items())
        )
        if record["skipped"]:
            lines.append(f"skipped {', '.join(record['skipped'])}")
    return "\n".join(lines)
