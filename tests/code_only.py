"""Test helper: artifacts with their weights left in a GGUF file, and with them copied, over the same compiled code; no export needed."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kiln.exporter.artifact.manifest import weights_record
from kiln.exporter.artifact.mapping import constant_records, gguf_record
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.compiler.package import EPOCH
from kiln.exporter.source.drafter import read_drafter
from kiln.exporter.source.plan import read_plan


def _with(artifact: Path, out: Path, change: Callable[[dict], None]) -> Path:
    shutil.copytree(artifact, out, ignore=shutil.ignore_patterns("weights.safetensors", "*.gguf"))
    manifest = json.loads((artifact / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def code_only(artifact: Path, gguf: Path, out: Path, limits: dict[str, float] | None = None, hash_weights: bool = False,
              drafter: Path | None = None) -> Path:  # fmt: skip
    """What `kiln export` makes of `gguf`, of which `artifact` was made, with the drafter that it has; but for the link to `gguf`."""

    def change(manifest: dict) -> None:
        plan = read_plan(gguf)
        beside = read_drafter(drafter, plan) if drafter else None
        computed = write_weights(out / "weights.safetensors", replace(plan, weights=()), drafter=beside)
        manifest["constants"] = constant_records(plan, limits or {}) + computed
        manifest["weights"] = weights_record(out / "weights.safetensors", computed) | {"gguf": gguf_record(plan, hash_weights)}

    return _with(artifact, out, change)


def with_weights(artifact: Path, gguf: Path, out: Path, allow_nonfinite: bool = False) -> Path:
    """The weights of another file of the same shapes and types, copied, beside the code of `artifact`."""

    def change(manifest: dict) -> None:
        manifest["constants"] = write_weights(out / "weights.safetensors", read_plan(gguf), allow_nonfinite=allow_nonfinite)
        manifest["weights"] = weights_record(out / "weights.safetensors", manifest["constants"])

    return _with(artifact, out, change)


def add_to_package(artifact: Path, target: dict, files: dict[str, bytes]) -> None:
    """Puts files into the package of a target, whose record in the manifest is brought up to date."""
    path = artifact / target["file"]
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
    target |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
