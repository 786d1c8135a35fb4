"""The code of one artifact for another file of the same architecture, shapes and types: what is the file's own is written anew."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from kiln.exporter.artifact.manifest import file_records, read_manifest, weights_record
from kiln.exporter.artifact.mapping import constant_records, gguf_record
from kiln.exporter.artifact.output import MANIFEST, check_output, staged
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.errors import KilnError
from kiln.exporter.files import write_text
from kiln.exporter.source.plan import ModelPlan


def rebind(code: Path, plan: ModelPlan, out: Path) -> None:
    """An artifact at `out` that plays `plan` by the packages of the code-only artifact `code`. Raises KilnError where they do not fit."""
    manifest = read_manifest(code)
    if "gguf" not in manifest["weights"]:
        raise KilnError(f"{code} holds weights, not code alone; export it with --weights gguf")
    made = [c for c in manifest["constants"] if "source" in c]
    limits = {name: c["source"]["limit"] for c in made if "limit" in c["source"] for name in c["source"]["tensors"]}
    records = constant_records(plan, limits, next((c["gathered"] for c in made if "gathered" in c), "device"))
    if records != made:
        other = next(((a, b) for a, b in zip(records, made, strict=False) if a != b), (None, None))
        raise KilnError(
            f"{plan.gguf.path}: the code at {code} is of another model: {(other[0] or other[1] or {'name': 'a constant'})['name']} differs"
        )
    with staged(check_output(out)) as stage:
        for target in manifest["targets"]:
            _share(code / target["file"], stage / target["file"])
        if plan.tokenizer:
            plan.tokenizer.write(stage / "tokenizer.json")
        if plan.chat:
            write_text(stage / "chat_template.jinja", plan.chat.template, "the chat template")
        computed = write_weights(stage / "weights.safetensors", replace(plan, weights=()))
        manifest |= {
            "source": {"file": plan.gguf.path.name, "architecture": plan.config.architecture, "name": plan.config.name},
            "config": plan.config.to_dict(),
            "constants": records + computed,
            "weights": weights_record(stage / "weights.safetensors", computed) | {"gguf": gguf_record(plan, hash_weights=False)},
            "files": file_records(stage),
            "tokenizer": {"file": "tokenizer.json", **plan.tokenizer.record()} if plan.tokenizer else None,
            "chat": plan.chat.record() if plan.chat else None,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (stage / MANIFEST).write_text(text, encoding="utf-8", errors="replace")


def _share(source: Path, copy: Path) -> None:
    """The same file by two names where the file system allows it; nothing ever writes to it."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copyfile(source, copy)
