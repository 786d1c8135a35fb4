"""Products compiled into a package for a GPU that is not there: no library, scratch for every program, an input computed once."""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights import linear
from kiln.custom_ops.weights.layouts import LAYOUTS
from kiln.custom_ops.weights.matmul import choosing


class Products(torch.nn.Module):
    """A packed matrix in two pieces, then a float one."""

    def __init__(self) -> None:
        super().__init__()
        layout = LAYOUTS["Q4_K"]
        self.words = torch.nn.Parameter(torch.empty(2, layout.words, 1024, dtype=torch.int32), requires_grad=False)
        self.halves = torch.nn.Parameter(torch.empty(2, layout.halves, 1024, dtype=torch.float16), requires_grad=False)
        self.weight = torch.nn.Parameter(torch.empty(512, 1024, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.ops.kiln.quantized_linear(torch.tanh(x), self.words, self.halves, "Q4_K")
        return torch.tanh(torch.ops.kiln.matmul(torch.tanh(x), self.weight, True))


def wrapper(directory: str, choice: str) -> tuple[str, list[str]]:
    """In a process of its own: the generated host code and the kernels' names."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = f"{directory}/inductor", f"{directory}/triton"
    import torch._inductor

    from kiln.exporter.compiler import torch_private

    gpu = gpu_targets()["sm_90"]
    linear.MAX_SCRATCH_BYTES = 512 * 512 * 2
    with torch_private.quiet(), compiling_for(gpu), choosing(choice):
        torch_private.install(gpu)
        tokens = torch.export.Dim("T", min=2, max=2048)
        program = torch_private.fake_export(Products, lambda: (torch.empty(1999, 512, dtype=torch.bfloat16),), {"x": {0: tokens}}, "cuda")
        module = program.module(check_guards=False)
        options = torch_private.inductor_options(gpu, "prefill") | {"aot_inductor.package_cpp_only": True}  # nothing of it is compiled
        files = torch._inductor.aot_compile(module, *program.example_inputs, options=options)
    return next(Path(f).read_text() for f in files if f.endswith("wrapper.cpp")), torch_private.KERNELS


def test_a_package_that_multiplies_by_itself(tmp_path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        source, kernels = pool.submit(wrapper, str(tmp_path), "kiln").result()
    assert sum(name.startswith("kiln_matmul_tma") for name in kernels) >= 2, kernels
    assert not re.findall(r"aoti_torch_cuda_\w*mm\w*\(", source)
    assert len(re.findall(r"^ *call_\w*tanh\w*\(.*;$", source, re.MULTILINE)) == 3
    scratch = re.findall(r"global_scratch_scratch_\d+_size\[\] = \{(.*)\};", source)
    assert scratch and all(size.endswith("* grid_0 * grid_1 * grid_2") for size in scratch)
