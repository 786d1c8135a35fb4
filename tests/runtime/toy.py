"""A toy artifact for the runner, made without the exporter: two compiled models over shared weights and caches."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from kiln.exporter.compiler.package import write_package
from kiln.exporter.measure.runner import runner

KILN_RUN = Path(os.environ.get("KILN_RUN") or runner())  # named where it is built with sanitizers
VOCAB, WIDTH, WINDOW, MAX_SEQ, CHUNK = 61, 8, 4, 24, 12
ALIGN = 256
TOLERANCE = 1e-5  # of logits below 1
PROMPT = [3, 17, 42, 8, 60, 0, 25, 33, 9]


class Toy(torch.nn.Module):
    """A chunk-invariant next-token function of every token in a global cache and of the last WINDOW ones in a ring."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        # Exact in bfloat16: the compiler skips the rounding of a ring value it has just written.
        self.register_buffer("embed", torch.randn(VOCAB, WIDTH, generator=g).to(torch.bfloat16).float())
        self.register_buffer("head", torch.randn(WIDTH, VOCAB, generator=g).to(torch.bfloat16))
        self.register_buffer("decay", torch.randint(1, 9, (MAX_SEQ,), generator=g, dtype=torch.int32))
        self.register_buffer("ring", torch.zeros(WINDOW, WIDTH, dtype=torch.bfloat16))
        self.register_buffer("cache", torch.zeros(MAX_SEQ, WIDTH))

    def forward(self, tokens, pos, temperature, top_k, top_p, seed):
        x = self.embed[tokens]  # [T, WIDTH]
        first, last = pos[0], pos[-1]
        self.cache.index_copy_(0, pos, x)
        slot = torch.arange(WINDOW, device=pos.device)
        held = last - (last - slot) % WINDOW  # the newest position of each slot
        fresh = (held >= first).unsqueeze(1)
        self.ring.copy_(torch.where(fresh, x[(held - first).clamp(min=0)].to(torch.bfloat16), self.ring))
        past = (torch.arange(MAX_SEQ, device=pos.device) <= last).float() / self.decay
        recent = (held >= 0).float().unsqueeze(1) * self.ring.float()  # a slot that the session has not come to counts for nothing
        h = (self.cache * past.unsqueeze(1)).sum(0) + 3 * recent.sum(0)
        logits = torch.tanh(h @ self.head.float() / 64).unsqueeze(0)  # [1, VOCAB]
        shift = torch.where(temperature > 0, seed + top_k + (top_p * 0).long(), 0)
        return torch.where(logits.amax().isfinite(), (logits.argmax(-1) + shift) % VOCAB, -1), logits


def compile_toy(path: Path, device: str) -> None:
    """In processes of their own: the compiler of packages is installed into them. Not in an export's, which hide the GPU."""
    entries = ("prefill", "decode")
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as processes:
        files = processes.map(_compile_entry, entries, [device] * 2, [f"{work}/{entry}" for entry in entries])
        write_package(path, {entry: Path(file) for entry, file in zip(entries, files, strict=True)})


def _compile_entry(entry: str, device: str, work: str) -> str:
    from kiln.exporter.compiler import torch_private

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = work
    options = torch_private.inductor_options(None, entry)
    if device == "cpu":
        torch_private.install(None)
    else:  # for this machine's GPU
        torch_private.packages_for_the_runner()
        options |= {"aot_inductor.embed_kernel_binary": True}
    t = 3 if entry == "prefill" else 1
    inputs = tuple(x.to(device) for x in (torch.arange(t), torch.arange(t), *sampling_tensors()))
    length = {0: torch.export.Dim("T", min=2, max=CHUNK)} if t > 1 else None
    exported = torch.export.export(Toy().to(device), inputs, dynamic_shapes=(length, length, None, None, None, None))
    files = torch._inductor.aot_compile(exported.module(), inputs, options=options)
    return next(f for f in files if f.endswith(".so"))


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> list[dict]:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}
    header, data, constants = {}, b"", []
    for i, (name, t) in enumerate(tensors.items()):
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        constants.append({"name": name, "dtype": str(t.dtype)[6:], "shape": list(t.shape), "offset": len(data), "bytes": len(raw),
                          "sha256": hashlib.sha256(raw).hexdigest()})
        data += raw
        if pad := -len(data) % ALIGN:
            header[f"__pad.{i}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [len(data), len(data) + pad]}
            data += bytes(pad)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    for c in constants:
        c["offset"] += 8 + len(text)
    return constants


def write_artifact(root: Path, device: str) -> None:
    compile_toy(root / "model.pt2", device)
    capability = list(torch.cuda.get_device_capability()) if device == "cuda" else None
    buffers = dict(Toy().named_buffers())
    caches = {name: buffers.pop(name) for name in ("ring", "cache")}
    package = (root / "model.pt2").read_bytes()
    constants = write_weights(root / "weights.safetensors", buffers)
    inputs = [("tokens", "int64"), ("pos", "int64"), ("temperature", "float32"), ("top_k", "int32"), ("top_p", "float32"),
              ("seed", "int64")]

    def entry(length):
        return {"inputs": [{"name": n, "dtype": d, "shape": [length] if n in ("tokens", "pos") else [1]} for n, d in inputs],
                "outputs": [{"name": "token", "dtype": "int64", "shape": [1]}, {"name": "logits", "dtype": "float32", "shape": [1, VOCAB]}]}

    manifest = {
        "format": "kiln", "format_version": 2, "producer": {"kiln": "0.1.0", "torch": torch.__version__.split("+")[0], "triton": "0"},
        "source": {"file": "toy.gguf", "architecture": "toy", "name": "toy"}, "config": {}, "max_seq_len": MAX_SEQ, "prefill_chunk": CHUNK,
        "activation_dtype": "float32", "kv_cache": "float32", "passes": [], "quantization": [],
        "targets": [{"target": "sm_{}{}".format(*capability) if capability else "cpu", "file": "model.pt2", "device": device,
                     "compute_capability": capability, "bytes": len(package), "sha256": hashlib.sha256(package).hexdigest()}],
        "entry_points": {"prefill": entry("T"), "decode": entry(1)}, "constants": constants,
        "kv": [{"name": n, "layer": i, "kind": "ring" if n == "ring" else "global", "dtype": str(t.dtype)[6:], "shape": list(t.shape),
                "bytes": t.nbytes} for i, (n, t) in enumerate(caches.items())],
        "weights": {"file": "weights.safetensors", "bytes": (root / "weights.safetensors").stat().st_size}, "tokenizer": None, "chat": None,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))


def change(root: Path, edit) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    edit(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def sampling_tensors(temperature=0.0, top_k=0, top_p=1.0, seed=0):
    return torch.tensor([temperature]), torch.tensor([top_k], dtype=torch.int32), torch.tensor([top_p]), torch.tensor([seed])


def eager(prompt: list[int], n: int, sampling=None) -> tuple[list[int], np.ndarray]:
    """n tokens after the prompt and the logits [n, VOCAB] they were taken from, by the module itself."""
    model, tokens, rows, fed = Toy(), [], [], 0
    feed = list(prompt)
    for _ in range(n):
        token, logits = model(torch.tensor(feed), torch.arange(fed, fed + len(feed)), *(sampling or sampling_tensors()))
        fed += len(feed)
        feed = [int(token)]
        tokens += feed
        rows.append(logits[0].numpy())
    return tokens, np.stack(rows)


def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([KILN_RUN, *map(str, arguments), "--threads", "1"], capture_output=True, text=True, env=os.environ | (env or {}))


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def fails(message: str, *arguments: object, code: int = 1, env: dict[str, str] | None = None) -> None:
    result = run(*arguments, env=env)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("kiln-run: error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr, result.stderr


if __name__ == "__main__":  # python -m tests.runtime.toy FOLDER: what KILN_TEST_TOY may name
    (folder := Path(sys.argv[1]) / "cpu").mkdir(parents=True)
    write_artifact(folder, "cpu")
