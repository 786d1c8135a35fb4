"""Complete an artifact whose code was compiled on another machine: the rest is made here, from the same GGUF file or its like.

    python -m tests.tools.rebuild COMPILED GGUF ARTIFACT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from kiln.exporter.artifact.manifest import file_records, weights_record
from kiln.exporter.artifact.rebind import rebind
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.source.plan import read_plan


def complete(compiled: Path, gguf: Path, artifact: Path) -> Path:
    """`compiled` holds manifest.json and model*.pt2 of `kiln export`; the weights must be the manifest's in name, dtype, shape and offset.

    The checksums are those of `gguf`: compiled code depends on shapes alone.
    """
    manifest = json.loads((compiled / "manifest.json").read_text())
    plan = read_plan(gguf)
    if "gguf" in manifest["weights"]:  # they stay in their file
        rebind(compiled, plan, artifact)
        return artifact
    artifact.mkdir(parents=True, exist_ok=True)
    records = write_weights(artifact / "weights.safetensors", plan)
    without = [[{k: v for k, v in r.items() if k != "sha256"} for r in rows] for rows in (records, manifest["constants"])]
    if without[0] != without[1]:
        raise ValueError(f"{gguf} has other weights than {compiled} was compiled for")
    if plan.tokenizer:
        plan.tokenizer.write(artifact / "tokenizer.json")
    manifest |= {"weights": weights_record(artifact / "weights.safetensors", records), "files": file_records(artifact)}
    (artifact / "manifest.json").write_text(json.dumps(manifest | {"constants": records}))
    for target in manifest["targets"]:
        shutil.copy(compiled / target["file"], artifact / target["file"])
    return artifact


if __name__ == "__main__":
    complete(*map(Path, sys.argv[1:]))
