"""The artifact directory: written under a temporary name, renamed when complete. `docs/ARTIFACT.md` is its format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton

from custom_ops.gpu.tables import borrowed
from custom_ops.gpu.target import gpu_targets
from exporter.compiler.compile import CompiledTarget
from exporter.compiler.trace import GraphSpec
from exporter.errors import KilnError
from exporter.model.decoder import SAMPLING_INPUTS
from passes.records import KVBuffer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def kiln_version() -> str:
    try:
        return version("kiln-export")
    except PackageNotFoundError:
        return "0.0.0+source"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends without an error, and vanishes otherwise."""
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise KilnError(f"{out} exists; remove it, name another --out, or say --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        stage.rename(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def entry_points(spec: GraphSpec, waits: tuple[str, ...] = ()) -> dict:
    def points(length: int | str) -> dict:
        tokens = [{"name": n, "dtype": "int64", "shape": [length]} for n in ("tokens", "pos")]
        sampling = [{"name": n, "dtype": dtype_name(d), "shape": [1]} for n, d in SAMPLING_INPUTS]
        outputs = [
            {"name": "token", "dtype": "int64", "shape": [1]},
            {"name": "logits", "dtype": "float32", "shape": [1, spec.config.vocab_size]},
        ]
        return {"inputs": tokens + sampling, "outputs": outputs}

    return {"prefill": points("T"), "decode": points(1) | ({"waits": list(waits)} if waits else {})}


def quantization(spec: GraphSpec) -> list[dict]:
    rows = []
    for plan in spec.plan:
        if plan.K:
            rows.append(
                {
                    "name": plan.name,
                    "type": plan.kind,
                    "shape": [plan.N, plan.K],
                    "sources": list(plan.sources),
                    "bits_per_weight": plan.bits_per_weight,
                }
            )
    return rows


def kv_record(kv: KVBuffer) -> dict:
    return {
        "name": kv.name,
        "layer": kv.layer,
        "kind": kv.kind,
        "dtype": dtype_name(kv.dtype),
        "shape": list(kv.shape),
        "bytes": kv.nbytes,
    }


def target_record(compiled: CompiledTarget) -> dict:
    gpu = gpu_targets().get(compiled.target)
    return {
        "target": compiled.target,
        "file": compiled.path.name,
        "device": "cuda" if gpu else "cpu",
        "compute_capability": list(gpu.capability) if gpu else None,
        "bytes": compiled.path.stat().st_size,
        "sha256": file_sha256(compiled.path),
        "passes": [r.to_dict() for r in compiled.entries[-1].reports],
        "shortfalls": [f"{entry.entry}: {r.shortfall}" for entry in compiled.entries for r in entry.reports if r.shortfall],
        "borrowed": {f"sm_{sm}": tables for sm, tables in borrowed(gpu).items()} if gpu else {},
    }


def write_manifest(
    directory: Path,
    spec: GraphSpec,
    source: Path,
    targets: list[CompiledTarget],
    records: list[dict],
    tokenizer: dict | None,
    chat: dict | None,
    waits: tuple[str, ...] = (),
) -> dict:
    """`manifest.json`, the last file written. `waits`: name prefixes of the decode kernels that wait inside for what ran before."""
    kv = targets[0].entries[0].kv
    manifest = {
        "format": "kiln",
        "format_version": FORMAT_VERSION,
        "producer": {"kiln": kiln_version(), "torch": torch.__version__.split("+")[0], "triton": triton.__version__},
        "source": {"file": source.name, "architecture": spec.config.architecture, "name": spec.config.name},
        "config": spec.config.to_dict(),
        "max_seq_len": spec.max_seq_len,
        "prefill_chunk": spec.prefill_chunk,
        "activation_dtype": spec.activation_dtype,
        "kv_cache": "tq4" if spec.options.turboquant else dtype_name(spec.cache_dtype),
        "residual_length": spec.options.residual_length if spec.options.turboquant else None,
        "targets": [target_record(t) for t in targets],
        "passes": [r.to_dict() for r in targets[0].entries[-1].reports],
        "entry_points": entry_points(spec, waits),
        "quantization": quantization(spec),
        "constants": records,
        "kv": [kv_record(b) for b in kv],
        "weights": {"file": "weights.safetensors", "bytes": (directory / "weights.safetensors").stat().st_size},
        "tokenizer": tokenizer,
        "chat": chat,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def read_manifest(directory: Path) -> dict:
    """The manifest of an artifact; raises KilnError when it is not one of this format version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise KilnError(f"{directory} is not an artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as e:
        raise KilnError(f"{path} is not valid JSON: {e}") from e
    if manifest.get("format") != "kiln" or manifest.get("format_version") != FORMAT_VERSION:
        raise KilnError(
            f"{directory} has format version {manifest.get('format_version')}, this Kiln reads {FORMAT_VERSION}; export it again"
        )
    return manifest


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(directory: Path) -> None:
    """Recompute every checksum; raises KilnError naming the first file or tensor that differs."""
    manifest = read_manifest(directory)
    for target in manifest["targets"]:
        path = directory / target["file"]
        if not path.is_file() or file_sha256(path) != target["sha256"]:
            raise KilnError(f"{path} is missing or differs from the manifest; copy the artifact again")
    path = directory / manifest["weights"]["file"]
    size = path.stat().st_size if path.is_file() else 0
    if size != manifest["weights"]["bytes"]:
        raise KilnError(f"{path} has {size} bytes, the manifest says {manifest['weights']['bytes']}; copy the artifact again")
    with path.open("rb") as f:
        for constant in manifest["constants"]:
            f.seek(constant["offset"])
            digest, left = hashlib.sha256(), constant["bytes"]
            while left:
                block = f.read(min(left, 1 << 24))
                digest.update(block)
                left -= len(block)
            if digest.hexdigest() != constant["sha256"]:
                raise KilnError(f"{path}: {constant['name']} differs from its checksum; copy the artifact again")
