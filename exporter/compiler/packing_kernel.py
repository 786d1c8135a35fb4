"""The kernels by which the runner packs a GGUF file's weights on a GPU, compiled for a target: two images in its package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kiln.custom_ops.gpu.target import gpu_targets
from kiln.custom_ops.weights.pack_kernel import CONSTANTS, PLANES, ROWS, UNITS, WARPS, kiln_pack_plane, signature
from kiln.exporter.compiler.package import PackingKernel


@contextlib.contextmanager
def _compiling_in(work: Path) -> Iterator[None]:
    """Triton keeps its files in `work`, and no line of a source in its code: that would put the build machine's paths into it."""
    settings = {"TRITON_CACHE_DIR": str(work), "TRITON_DISABLE_LINE_INFO": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


def compile_packing(target: str, work: Path) -> list[PackingKernel]:
    """For `target` ("sm_NN"); `work` is scratch."""
    found = []
    for plane, out in PLANES.items():
        types = signature(out)
        names = kiln_pack_plane.arg_names
        source = ASTSource(kiln_pack_plane, {name: types.get(name, "constexpr") for name in names}, CONSTANTS)
        with _compiling_in(work):
            compiled = triton.compile(source, target=GPUTarget("cuda", gpu_targets()[target].sm, 32), options={"num_warps": WARPS})
        record = {"file": f"pack_{plane}.cubin", "kernel": compiled.metadata.name, "threads": 32 * WARPS,
                  "shared": compiled.metadata.shared, "rows": ROWS, "units": UNITS}  # fmt: skip
        found.append(PackingKernel(plane, compiled.asm["cubin"], record))
    return found
