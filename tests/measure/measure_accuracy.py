"""A few layers of the 31B's geometry on a GPU: logits of the artifact against a float32 eager forward over the same dequantized weights.

    python -m tests.measure.measure_accuracy --compiled DIR --work DIR --out accuracy.json

`--compiled` holds manifest.json and model.sm_NN.pt2 of `kiln export --weights copy` of `kiln synth --preset gemma4-31b --layers 6`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import torch

from kiln.exporter.artifact.load import load_weights
from kiln.exporter.tools.synth import write_synthetic
from tests.timeline import graph_spec
from tests.tools.rebuild import complete


def eager_logits(gguf: Path, state: dict[str, torch.Tensor], tokens: torch.Tensor, dtype: str) -> torch.Tensor:
    """The plain decoder in one batch, every position's logits [T, V] float32 on the CPU."""
    spec = dataclasses.replace(graph_spec(gguf, max_seq_len=len(tokens), dtype=dtype), cache="bfloat16")
    with torch.device("cuda"), torch.inference_mode():
        model = spec.model()
        model.load_state_dict(state, strict=False, assign=True)
        x = model.hidden(tokens, torch.arange(len(tokens)))
        return torch.cat([model.logits(piece).cpu() for piece in x.split(8)])


def artifact_logits(artifact: Path, tokens: torch.Tensor, chunk: int, vocab: int, out: Path) -> torch.Tensor:
    command = [
        "kiln-run",
        str(artifact),
        "--tokens",
        ",".join(map(str, tokens.tolist())),
        "--max-new-tokens",
        "1",
        "--prefill-chunk",
        str(chunk),
    ]
    subprocess.run([*command, "--logits", str(out)], check=True, capture_output=True)
    return torch.from_numpy(np.fromfile(out, np.float32)).view(-1, vocab)


def compare(rows: torch.Tensor, reference: torch.Tensor) -> dict:
    return {
        "positions": len(rows),
        "relative_error": ((rows - reference).norm() / reference.norm()).item(),
        "max_abs": (rows - reference).abs().max().item(),
        "top1": (rows.argmax(1) == reference.argmax(1)).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2300)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    gguf = args.work / "model.gguf"
    write_synthetic(gguf, "gemma4-31b", "q4_k_m", 0, layers=args.layers)
    artifact = complete(args.compiled, gguf, args.work / "artifact")
    state = {k: v.cuda() for k, v in load_weights(artifact / "weights.safetensors").items() if not k.startswith("__pad")}
    vocab = state["token_embd.words"].shape[2]
    tokens = torch.arange(args.tokens) * 7919 % vocab
    reference = eager_logits(gguf, state, tokens.cuda(), "float32")
    found = {"eager bfloat16": compare(eager_logits(gguf, state, tokens.cuda(), "bfloat16"), reference)}
    del state
    torch.cuda.empty_cache()
    found["artifact, token by token"] = compare(artifact_logits(artifact, tokens, 1, vocab, args.work / "one.f32"), reference)
    for chunk in (2048, 500):
        rows = artifact_logits(artifact, tokens, chunk, vocab, args.work / "chunks.f32")
        ends = [min(start + chunk, len(tokens)) - 1 for start in range(0, len(tokens), chunk)]
        found[f"artifact, chunks of {chunk}"] = compare(rows, reference[ends])
    args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
