"""The GPU code inside a package: every embedded cubin, its architecture, and a comparison of two packages.

    python -m tests.tools.cubins A.pt2 B.pt2
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import triton

from kiln.custom_ops.gpu.cubin import images


def cubins(package: Path) -> dict[str, list[bytes]]:
    """Entry point -> the CUDA ELF images inside its shared library, in file order."""
    found = {}
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                found[Path(name).stem] = images(archive.read(name))
    return found


def cuobjdump(image: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(image)
        f.flush()
        return subprocess.run([triton.knobs.nvidia.cuobjdump.path, option, f.name], capture_output=True, text=True, check=True).stdout


def architecture(image: bytes) -> str:
    """`sm_90`, as cuobjdump reads it."""
    return "sm_" + re.search(r"sm[_=](\d+)", cuobjdump(image, "-elf"))[1]


def registers(image: bytes) -> dict[str, int]:
    """Kernel -> registers of a thread."""
    return {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", cuobjdump(image, "-res-usage"))}


def digests(package: Path) -> dict[str, list[str]]:
    return {entry: sorted(hashlib.sha256(image).hexdigest() for image in images) for entry, images in cubins(package).items()}


def main() -> None:
    a, b = (digests(Path(p)) for p in sys.argv[1:3])
    for entry in sorted(a | b):
        x, y = set(a.get(entry, [])), set(b.get(entry, []))
        print(f"{entry}: {len(x)} and {len(y)} distinct kernels, {len(x & y)} identical, {len(x ^ y)} only in one")
    sys.exit(a != b)


if __name__ == "__main__":
    main()
