"""Real checkpoints through an artifact: log-probabilities and greedy texts beside the references of tests/fixtures, in one command.

    python -m tests.measure.measure_real --work DIR --out F.json [--target native] [--greedy FOLDER] [NAME=GGUF ...]

Each file (`python -m tests.tools.checkpoints DIR` writes them) is exported in float32 with caches of float32, and in bfloat16
with caches of float16, and played token by token over the references' ids: the largest difference of a next token's log-probability, and
perplexity beside theirs. --greedy: the references' prompts and ids, NAME.greedy.json; a text ends at its first margin below the error.
Exit code 1 where float32 is off by more than 2e-4, a perplexity by more than 1e-4 of itself, or of bfloat16 by more than 0.3 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kiln.exporter.measure.players import ArtifactPlayer
from tests.conftest import kiln
from tests.measure.measure_31b import ROOT, device

REFERENCES = {"gemma3": "gemma3-270m", "smollm": "smollm2-135m"}
TEXTS = ("prose", "gpl")
FORMS = {"float32": ("--activation-dtype", "float32"), "bfloat16": ("--activation-dtype", "bfloat16")}
LIMITS = {"float32": (2e-4, 1e-4), "bfloat16": (math.inf, 3e-3)}  # of a log-probability, of perplexity


def scored(player: ArtifactPlayer, reference: Any, text: str) -> dict[str, float]:
    """Beside the reference's next tokens: the largest difference of a log-probability, and both perplexities."""
    ids = reference[f"{text}_ids"].tolist()
    player.reset()
    rows = torch.cat([torch.log_softmax(part.double(), -1) for part in player.score(ids[:-1], 256)])
    found = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    expected = reference[f"{text}_next_logprob"][:-1]
    return {"tokens": len(ids), "log_probability": float(np.abs(found - expected).max()), "perplexity": float(np.exp(-found.mean())),
            "reference": float(np.exp(-expected.mean()))}  # fmt: skip


def continued(player: ArtifactPlayer, case: dict[str, Any], error: float) -> dict[str, Any]:
    """How far a greedy text goes with the reference, which may end where the margin of the reference is below twice the error."""
    player.reset()
    player.read(case["prompt_ids"][:-1])
    same, token = 0, case["prompt_ids"][-1]
    for expected in case["ids"]:
        token = int(next(iter(player.score([token], 3)))[0].argmax())
        if token != expected:
            break
        same += 1
    excused = next((i for i, margin in enumerate(case["margins"]) if margin < 2 * error), len(case["ids"]))
    return {"prompt": case["prompt"], "tokens": len(case["ids"]), "equal": same, "right": same >= excused}


def measure(name: str, gguf: Path, form: str, options: argparse.Namespace) -> dict[str, Any]:
    artifact = options.work / f"{name}-{form}"
    began = time.monotonic()
    kiln("export", "--gguf", gguf, "--out", artifact, "--target", options.target, "--max-seq-len", 1536, "--force", *FORMS[form])
    result: dict[str, Any] = {"export_s": round(time.monotonic() - began, 1)}
    player = ArtifactPlayer(artifact, "cpu" if options.target == "cpu" else "cuda")
    with np.load(ROOT / "tests" / "fixtures" / f"{REFERENCES[name]}.ref.npz") as reference:
        result |= {text: scored(player, reference, text) for text in TEXTS}
    error, perplexity = LIMITS[form]
    result["right"] = all(result[text]["log_probability"] <= error
                          and abs(result[text]["perplexity"] / result[text]["reference"] - 1) <= perplexity for text in TEXTS)  # fmt: skip
    if options.greedy and form == "float32":
        cases = json.loads((options.greedy / f"{REFERENCES[name]}.greedy.json").read_text())
        result["greedy"] = [continued(player, case, error) for case in cases]
        result["right"] = result["right"] and all(case["right"] for case in result["greedy"])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.measure_real", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="F.json")
    parser.add_argument("--target", default="native")
    parser.add_argument("--greedy", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=GGUF")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": device()} if options.target != "cpu" else {}
    for name, _, gguf in (word.partition("=") for word in options.checkpoints):
        for form in FORMS:
            record.setdefault(name, {})[form] = found = measure(name, Path(gguf), form, options)
            options.out.write_text(json.dumps(record, indent=1) + "\n")
            print(name, form, json.dumps(found), flush=True)
    return 0 if all(found["right"] for name, forms in record.items() if name != "device" for found in forms.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
