"""`kiln inspect`: a GGUF file or an artifact as one JSON-able record, and as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kiln.exporter.artifact.link import dangling
from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.artifact.verify import verify as verify_artifact
from kiln.exporter.errors import printable
from kiln.exporter.progress import say
from kiln.exporter.source.plan import ReadOptions, Survey, survey

FLOAT16_MAX = 65504.0


def gguf(path: Path, scan: bool = True) -> dict:
    """What can be said of a GGUF file, and under `problems` everything for which export would refuse it. `scan`: read the values, too."""
    found = survey(path, ReadOptions(scan=scan))
    file, config = found.gguf, found.config
    return {
        "file": str(path),
        "parts": len(file.files),
        "architecture": file.metadata.get("general.architecture"),
        "name": file.metadata.get("general.name"),
        "config": config.to_dict() if config else None,
        "tokenizer": _tokenizer(found),
        "chat": found.chat and found.chat.record(),
        "types": dict(Counter(t.type for t in file.tensors.values())),
        "bytes": sum(t.nbytes for t in file.tensors.values()),
        "skipped": list(found.unused),
        "notes": _notes(found),
        "problems": list(found.problems),
        "tensors": [{"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes} for t in file.tensors.values()],
    }


def _tokenizer(found: Survey) -> dict | None:
    tokenizer = found.tokenizer
    if tokenizer is None:
        return None
    ends = [{"id": i, "text": tokenizer.tokens[i]} for i in tokenizer.ends]
    return {"kind": tokenizer.kind.value, "tokens": len(tokenizer.tokens), "merges": len(tokenizer.merges), "bos": tokenizer.first,
            "ends": ends, "duplicates": len(tokenizer.tokens) - len(tokenizer.vocabulary)}  # fmt: skip


def _notes(found: Survey) -> list[str]:
    notes = found.plan.notes if found.plan else []
    if found.plan and found.plan.key_bound[0] > FLOAT16_MAX:
        bound, name = found.plan.key_bound
        notes = [*notes, f"note: {name}: keys or queries up to {bound:.3g} do not fit float16: export it with --kv-cache bf16"]
    return notes


def artifact(path: Path, verify: bool) -> dict:
    """The manifest; with `verify` every checksum is recomputed first."""
    manifest = read_manifest(path)
    for name, target in dangling(path, manifest).items():
        say(printable(f"note: {path / name} is a link to {target}, which is gone; put the file there again, or give it with --weights"))
    if verify:
        for name in verify_artifact(path):
            say(f"note: {path / name} is no part of the artifact")
    return manifest


def text(record: dict) -> str:
    """The record for a reader; of a GGUF file without its problems."""
    return "\n".join(map(printable, _artifact_lines(record) if "format" in record else _gguf_lines(record)))


def _artifact_lines(record: dict) -> list[str]:
    config, producer = record["config"], record["producer"]
    lines = [
        f"{config['name']} ({config['architecture']}), {len(config['layers'])} layers, context {record['max_seq_len']}",
        f"made by Kiln {producer['kiln']} with torch {producer['torch']}, triton {producer['triton']}",
    ]
    lines += [f"target  {t['target']:7} {t['file']} ({t['bytes'] / 2**20:.1f} MiB)" for t in record["targets"]]
    for p in record["passes"]:
        count = f"{p['matches']}/{p['expected']}" if p.get("expected") else ""
        lines.append(f"pass    {p['name']:16} {p['status']:10} {count:8} {p['note']}")
    lines += [f"note    {t['target']} {shortfall}" for t in record["targets"] for shortfall in t.get("shortfalls", ())]
    size = sum(constant["bytes"] for constant in record["constants"])
    gguf = record["weights"].get("gguf")
    where = f", in a GGUF file as {gguf['file']} ({len(gguf['tensors'])} tensors)" if gguf else ""
    lines.append(f"weights {len(record['constants'])} constants, {size / 2**30:.2f} GiB{where}")
    sizes: Counter[str] = Counter()
    for kv in record["kv"]:
        sizes[kv["kind"]] += kv["bytes"]
    rows = record.get("rows", 1)
    each = f" x {rows} rows = {{:.3f}} GiB" if rows > 1 else ""
    lines += [f"KV      {kind:7} {size / 2**30:.3f} GiB" + each.format(rows * size / 2**30) for kind, size in sizes.items()]
    if steps := sorted(int(name.removeprefix("decode_")) for name in record["entry_points"] if name.startswith("decode_")):
        lines.append(f"steps   of 1, {', '.join(map(str, steps))} tokens over {rows} timeline{'s' if rows > 1 else ''}")
    if drafter := record.get("drafter"):
        config = drafter["config"]
        lines.append(f"drafter {config['name']} ({config['architecture']}), {len(config['layers'])} layers")
    types = Counter(q["type"] for q in record["quantization"])
    lines.append("types   " + ", ".join(f"{n} {block_type}" for block_type, n in types.items()))
    return lines


def _gguf_lines(record: dict) -> list[str]:
    lines = []
    if config := record["config"]:
        sliding = sum(layer["mixer"].get("window") is not None for layer in config["layers"])
        lines.append(
            f"{config['name']} ({config['architecture']}), {len(config['layers'])} layers ({sliding} sliding), "
            f"context {config['context_length']}, vocabulary {config['vocab_size']}"
        )
    else:
        lines.append(f"{record['name'] or Path(record['file']).name} ({record['architecture'] or 'no architecture'})")
    types = ", ".join(f"{n} {t}" for t, n in record["types"].items())
    parts = f" in {record['parts']} files" if record["parts"] > 1 else ""
    lines.append(f"{len(record['tensors'])} tensors, {record['bytes'] / 2**30:.2f} GiB{parts}: {types or 'none'}")
    if tokenizer := record["tokenizer"]:
        ends = ", ".join(f"{end['text']} ({end['id']})" for end in tokenizer["ends"]) or "none"
        twice = f", {tokenizer['duplicates']} texts of several tokens" if tokenizer["duplicates"] else ""
        bos = "no BOS" if tokenizer["bos"] is None else f"BOS {tokenizer['bos']}"
        lines.append(f"tokenizer of {tokenizer['tokens']} tokens{twice} ({tokenizer['kind']}), {bos}, a generation ends at {ends}")
    if chat := record["chat"]:
        lines.append(f"chat template: {chat['prefix']!r} + text{' (trimmed)' if chat['trim'] else ''} + {chat['suffix']!r}")
    if record["skipped"]:
        lines.append(f"skipped {', '.join(record['skipped'])}")
    return lines
