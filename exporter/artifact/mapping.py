"""What an artifact without weights says of the GGUF file that they stay in: tensors, their packing, and what else must agree.

Whatever a file of the same architecture, shapes and types may have otherwise than the one that was exported is refused by the runner, by
name, unless it is of no concern: no difference is silent. `docs/ARTIFACT.md` is the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor

from gguf import GGMLQuantizationType

from kiln.custom_ops.dtypes import FLOATS
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.permutation import permutation
from kiln.exporter.errors import KilnError
from kiln.exporter.source.config import families
from kiln.exporter.source.gguf import GGUFFile
from kiln.exporter.source.plan import ModelPlan
from kiln.exporter.source.tokenizer import harmless_keys
from kiln.exporter.source.weights import WeightPlan, plan_constants

CHAT_TEMPLATE = "tokenizer.chat_template"
TOKENIZER = "tokenizer.ggml."


def constant_records(plan: ModelPlan, limits: dict[str, float], ple: str = "device") -> list[dict]:
    """The constants that are made of tensors, as in the manifest. limits: of the size of a vector's values, by tensor; ple: where a table
    lies of which only rows are read."""
    records = []
    for p in plan.weights:
        found = [limits[source] for source in p.sources if source in limits]
        for spec, plane in zip(plan_constants(p), _planes(p), strict=True):
            source = {"plane": plane, "tensors": list(p.sources)} | ({"limit": min(found)} if found else {})
            records.append({"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes, "source": source})
            records[-1] |= {"gathered": ple} if p.gathered else {}
    return records


def _planes(p: WeightPlan) -> tuple[str, ...]:
    return ("words", "halves") if p.block_type in LAYOUTS else ("values",)


def gguf_record(plan: ModelPlan, hash_weights: bool) -> dict:
    """`weights.gguf` of the manifest. hash_weights: of the bytes of every tensor, too, which reads the whole file."""
    gguf = plan.gguf
    mapped = list(dict.fromkeys(source for p in plan.weights for source in p.sources))
    fixed = sorted(gguf.consulted - set(mapped))  # what was computed of them is in the artifact
    names = [*mapped, *fixed]
    hashed = names if hash_weights else fixed
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        digests = dict(zip(hashed, pool.map(lambda name: _tensor_sha256(gguf, name), hashed), strict=True))
    tensors = [
        {"name": name, "type": gguf.tensors[name].type, "shape": list(gguf.tensors[name].shape)}
        | ({"sha256": digests[name]} if name in digests else {})
        | ({"fixed": True} if name in fixed else {})
        for name in names
    ]
    types = {gguf.tensors[name].type for name in names} - set(FLOATS)
    try:
        packings = {block_type: permutation(block_type).record() for block_type in LAYOUTS if block_type in types}
    except ValueError as e:
        raise KilnError(f"{e}; give --weights copy") from e
    family = families()[plan.config.architecture]["harmless"]
    return {
        "file": gguf.path.name,
        "directory": directory_sha256(gguf),
        "types": {t.name: int(t) for t in GGMLQuantizationType},
        "packings": packings,
        "tensors": tensors,
        "unused": sorted({*(f"{prefix}*" for prefix in family["tensors"]), *plan.unused}),
        "metadata": metadata_record(plan),
    }


def metadata_record(plan: ModelPlan) -> dict:
    """What another file's metadata is held against: keys that were read, and what may be there beside them."""
    metadata, own = plan.gguf.metadata, f"{plan.config.architecture}."
    watched = (own, TOKENIZER) if plan.tokenizer else (own,)
    baked = ("general.architecture", f"{TOKENIZER}suppress_tokens")  # in the code, tokenizer or not
    read = {key for key in metadata.consulted if key.startswith(watched) or key in baked}
    table = families()[plan.config.architecture]
    # What the family knows and this model did not ask for: the code does not depend on it.
    unasked = {spec["key"] for spec in table["keys"].values()} | set(table["same"])
    unasked -= read
    free = [f"{prefix}*" for prefix in table["harmless"]["prefixes"]] + sorted(unasked) + (harmless_keys() if plan.tokenizer else [])
    noted = [CHAT_TEMPLATE] if plan.tokenizer and CHAT_TEMPLATE in metadata.consulted else []
    return {
        "checked": [f"{prefix}*" for prefix in watched],
        "equal": {key: value_sha256(plan.gguf, key) for key in sorted(read)},
        "free": free,
        "noted": {key: value_sha256(plan.gguf, key) for key in noted},
    }


def value_sha256(gguf: GGUFFile, key: str) -> str | None:
    """Of a metadata value's type number, four bytes little-endian, and its encoding in the file; None where it is absent."""
    try:
        number, encoding = gguf.metadata.raw(key)
    except KeyError:
        return None
    return hashlib.sha256(struct.pack("<I", number) + encoding).hexdigest()


def directory_sha256(gguf: GGUFFile) -> str:
    """Of every tensor's name, type number and shape (rows first), in the file's order, each a JSON array on a line."""
    lines = (json.dumps([t.name, t.ggml_type, *t.shape], ensure_ascii=False) + "\n" for t in gguf.tensors.values())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensor_sha256(gguf: GGUFFile, name: str) -> str:
    data = gguf.data(name).reshape(-1)
    digest, step = hashlib.sha256(), 32 << 20
    for start in range(0, len(data), step):
        digest.update(memoryview(data[start : start + step]))  # type: ignore[arg-type]  # an array is a buffer
        gguf.release(name, start, min(start + step, len(data)))
    return digest.hexdigest()
