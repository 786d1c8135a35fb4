"""`manifest.json` of a finished export: what it says of the graphs, weights and caches. `docs/ARTIFACT.md` is its format."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton

from kiln.custom_ops.dtypes import dtype_name
from kiln.custom_ops.gpu.tables import borrowed
from kiln.custom_ops.gpu.target import gpu_targets
from kiln.custom_ops.tq4.center import center_keys
from kiln.exporter.artifact.cost import cost
from kiln.exporter.artifact.manifest import FORMAT_VERSION, file_records, file_sha256, weights_record
from kiln.exporter.artifact.output import MANIFEST
from kiln.exporter.compiler.compile import CompiledEntry, CompiledTarget
from kiln.exporter.compiler.trace import DRAFT_ENTRY, GraphSpec, entry_rows
from kiln.exporter.model.assistant import DRAFT_INPUTS
from kiln.exporter.model.decoder import SAMPLING_INPUTS
from kiln.exporter.source.weights import DRAFT
from kiln.passes.records import KVBuffer


def kiln_version() -> str:
    try:
        return version("kiln-export")
    except PackageNotFoundError:
        return "0.0.0+source"


def entry_points(spec: GraphSpec, waits: tuple[str, ...] = ()) -> dict:
    def points(entry: str) -> dict:
        rows = entry_rows(entry)
        drafts, length = entry == DRAFT_ENTRY, "T" if entry == "prefill" else rows or 1
        names = DRAFT_INPUTS if drafts else ("tokens", "pos", "row") if rows else ("tokens", "pos")
        tokens = [{"name": n, "dtype": "int64", "shape": [length]} for n in names]
        hidden = [{"name": "hidden", "dtype": "float32", "shape": [rows or 1, spec.config.hidden_size]}] if spec.drafter else []
        sampling = [{"name": n, "dtype": dtype_name(d), "shape": [rows or 1]} for n, d in SAMPLING_INPUTS]
        outputs = [
            {"name": "token", "dtype": "int64", "shape": [rows or 1]},
            {"name": "logits", "dtype": "float32", "shape": [rows or 1, spec.config.vocab_size]},
        ]
        found = {"inputs": tokens + (hidden if drafts else []) + sampling, "outputs": outputs + hidden}
        return found | ({"waits": list(waits)} if waits and entry != "prefill" else {})

    return {entry: points(entry) for entry in spec.entries}


def quantization(spec: GraphSpec) -> list[dict]:
    rows = []
    plans = [("", plan) for plan in spec.plan] + [(DRAFT, plan) for plan in (spec.drafter.plan if spec.drafter else ())]
    for under, plan in plans:
        if plan.K:
            rows.append(
                {
                    "name": under + plan.name,
                    "type": plan.block_type,
                    "shape": [plan.N, plan.K],
                    "sources": list(plan.sources),
                    "bits_per_weight": plan.bits_per_weight,
                }
            )
    return rows


def kv_record(kv: KVBuffer, window: int | None = None, behind: int = 0) -> dict:
    """Of one timeline. window: of a ring that has more slots. behind: of how many newest positions nothing is in it yet."""
    return {
        "name": kv.name,
        "layer": kv.layer,
        "kind": kv.kind,
        "dtype": dtype_name(kv.dtype),
        "shape": list(kv.shape),
        "bytes": kv.nbytes,
        **({"window": window} if window is not None and window < kv.shape[0] else {}),
        **({"behind": behind} if behind else {}),
    }


def _window(spec: GraphSpec, kv: KVBuffer) -> int | None:
    """Of a ring, how many of the newest positions a token needs."""
    if kv.kind != "ring":
        return None
    return spec.options.residual_length if kv.name.endswith("_exact") else spec.config.attentions[kv.layer].window


def _last_step(compiled: CompiledTarget) -> CompiledEntry:
    """Of the model, whose passes are shown."""
    return [e for e in compiled.entries if e.entry != DRAFT_ENTRY][-1]


def _behind(spec: GraphSpec, kv: KVBuffer) -> int:
    """With a center a key is coded when it is the oldest in the exact window."""
    if kv.kind == "prefix":
        return center_keys(spec.options.residual_length) - 1
    return spec.options.residual_length - 1 if spec.options.key_center and kv.name.endswith((".k_codes", ".k_scales")) else 0


def target_record(compiled: CompiledTarget) -> dict:
    gpu = gpu_targets().get(compiled.target)
    chained = any(r.name == "chain" and r.status == "applied" for entry in compiled.entries for r in entry.reports)
    return {
        "target": compiled.target,
        "file": compiled.path.name,
        "device": "cuda" if gpu else "cpu",
        "compute_capability": list(gpu.capability) if gpu else None,
        "bytes": compiled.path.stat().st_size,
        "sha256": file_sha256(compiled.path),
        "passes": [r.to_dict() for r in _last_step(compiled).reports],
        "shortfalls": [f"{entry.entry}: {r.shortfall}" for entry in compiled.entries for r in entry.reports if r.shortfall],
        "borrowed": {f"sm_{sm}": tables for sm, tables in borrowed(gpu).items()} if gpu else {},
        **({"blocks_at_once": gpu.sm_count} if gpu and chained else {}),
        "packing": {kernel.plane: kernel.record for kernel in compiled.packing} or None,
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
    gguf: dict | None = None,
    drafter: Path | None = None,
) -> dict:
    """`manifest.json`, the last file written. `waits`: name prefixes of the decode kernels that wait inside for what ran before.
    `gguf`: of the file that weights stay in (see `mapping`). `drafter`: that of `spec.drafter`."""
    kv = targets[0].entries[0].kv
    manifest = {
        "format": "kiln",
        "format_version": FORMAT_VERSION,
        "producer": {"kiln": kiln_version(), "torch": torch.__version__.split("+")[0], "triton": triton.__version__},
        "source": {"file": source.name, "architecture": spec.config.architecture, "name": spec.config.name},
        "config": spec.config.to_dict(),
        **({"drafter": {"file": drafter.name, "config": spec.drafter.config.to_dict()}} if spec.drafter and drafter else {}),
        "cost": cost(spec.config, spec.plan),
        "max_seq_len": spec.max_seq_len,
        "prefill_chunk": spec.prefill_chunk,
        **({"rows": spec.options.rows} if spec.options.rows > 1 else {}),
        "activation_dtype": spec.activation_dtype,
        "kv_cache": "tq4" if spec.options.turboquant else dtype_name(spec.cache_dtype),
        "residual_length": spec.options.residual_length if spec.options.turboquant else None,
        "key_center": center_keys(spec.options.residual_length) if spec.options.turboquant and spec.options.key_center else None,
        "targets": [target_record(t) for t in targets],
        "passes": [r.to_dict() for r in _last_step(targets[0]).reports],
        "entry_points": entry_points(spec, waits),
        "quantization": quantization(spec),
        "constants": records,
        "kv": [kv_record(b, _window(spec, b), _behind(spec, b)) for b in kv],
        "weights": weights_record(directory / "weights.safetensors", records) | ({"gguf": gguf} if gguf else {}),
        "files": file_records(directory),
        "tokenizer": tokenizer,
        "chat": chat,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8", errors="replace")  # a file's name need not be text
    return manifest
