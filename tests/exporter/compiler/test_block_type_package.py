"""Inductor compiles the kernels of every form of block type: their constants pass its source and its wrapper. No GPU needed."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.dtypes import DTYPES
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights.layouts import LAYOUTS

FORMS = ("IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K")  # those that no model of the other tests has


class Products(torch.nn.Module):
    """A row of a packed matrix, times packed matrices one after another: dequantization and GEMV."""

    def __init__(self) -> None:
        super().__init__()
        for name in FORMS:
            layout = LAYOUTS[name]
            for part, size, dtype in (("words", layout.words, torch.int32), ("halves", layout.halves, DTYPES[layout.halves_dtype].torch)):
                tensor = torch.empty(512 // layout.block, size, 512, dtype=dtype)
                self.register_parameter(f"{name}_{part}", torch.nn.Parameter(tensor, requires_grad=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        words, halves = ({name: getattr(self, f"{name}_{part}") for name in FORMS} for part in ("words", "halves"))
        x = torch.stack([torch.ops.kiln.quantized_embedding(ids, words[name], halves[name], name) for name in FORMS]).sum(0)
        for name in FORMS:
            x = torch.tanh(torch.ops.kiln.quantized_linear(x.bfloat16(), words[name], halves[name], name))
        return x


def kernels(directory: str) -> list[str]:
    """In a process of its own: the names of the compiled kernels."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = f"{directory}/inductor", f"{directory}/triton"
    import torch._inductor

    from kiln.exporter.compiler import torch_private

    gpu = gpu_targets()["sm_90"]
    with torch_private.quiet(), compiling_for(gpu):
        torch_private.install(gpu)
        program = torch_private.fake_export(Products, lambda: (torch.zeros(1, dtype=torch.int64),), {"ids": None}, "cuda")
        module = program.module(check_guards=False)
        options = torch_private.inductor_options(gpu, "decode") | {"aot_inductor.package_cpp_only": True}  # nothing of it is compiled
        torch._inductor.aot_compile(module, *program.example_inputs, options=options)
    return torch_private.KERNELS


def test_forms_are_compiled(tmp_path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        names = pool.submit(kernels, str(tmp_path)).result()
    for kernel in ("kiln_gemv", "kiln_dequantize"):
        assert sum(name.startswith(kernel) for name in names) == len(FORMS), names
