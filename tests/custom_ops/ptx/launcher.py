"""Kernels' PTX on a CPU: what Triton makes of a kernel, its inline assembly with it, played a thread block at a time.

The interpreter plays a kernel's Python and another branch where that has assembly; here it is the code that the assembler gets. Every
access is checked: an address outside the launch's tensors, or one that is not aligned, is an error. Float functions that a GPU
approximates are rounded correctly, so results agree with a GPU's but for their last bits. An instruction that is not known is an error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kiln.custom_ops import ops  # noqa: F401
from kiln.custom_ops.gpu import launch
from kiln.custom_ops.gpu.target import GpuTarget, compiling_for
from tests.custom_ops.ptx.block import Block, Memory
from tests.custom_ops.ptx.program import Program

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int16: "*i16",
            torch.int8: "*i8", torch.uint8: "*u8", torch.int64: "*i64"}  # fmt: skip


class Launcher:
    """In place of `launch.kernel`: `Launcher(target)(fn, registers, x)[grid](...)` compiles for the target and plays the PTX.

    launched: names of the kernels, in order.
    """

    def __init__(self, target: GpuTarget):
        self.target, self.launched = target, list[str]()
        self._compiled: dict[Any, tuple[Program, int, int]] = {}

    def __call__(self, fn: Any, registers: int | None = None, x: torch.Tensor | None = None) -> Any:
        launcher = self

        class Gridded:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **kwargs: launcher._launch(fn, grid, args, kwargs, registers)

        return Gridded()

    def _launch(self, fn: Any, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any], registers: int | None) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
        if registers:
            options["maxnreg"] = registers
        given = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        fixed = {p.name: given[p.name] for p in fn.params if p.is_constexpr}
        fixed |= {name: value for name, value in given.items() if value is None or (type(value) is int and value == 1)}
        free = {name: given[name] for name in fn.arg_names if name not in fixed}
        signature = {name: "constexpr" if name in fixed else self._type(given[name]) for name in fn.arg_names}
        aligned = [n for n, name in enumerate(fn.arg_names) if name in free and not isinstance(free[name], float) and
                   (free[name].data_ptr() if isinstance(free[name], torch.Tensor) else free[name]) % 16 == 0]  # fmt: skip
        key = fn, *map(str, (sorted(signature.items()), sorted(fixed.items()), aligned, sorted(options.items())))
        if key not in self._compiled:
            source = ASTSource(fn, signature, fixed, {(n,): [["tt.divisibility", 16]] for n in aligned})
            compiled = triton.compile(source, target=GPUTarget("cuda", self.target.sm, 32), options=options)
            self._compiled[key] = Program.parse(compiled.asm["ptx"]), compiled.metadata.num_warps * 32, compiled.metadata.shared
        program, threads, shared = self._compiled[key]
        memory = Memory([value for value in free.values() if isinstance(value, torch.Tensor)])
        values = [memory.address(v) if isinstance(v, torch.Tensor) else v for v in free.values()]
        whole = (*grid, 1, 1)[:3]
        block = Block(program, threads, shared, memory, dict(zip(program.parameters, values, strict=False)))
        for n in range(math.prod(whole)):
            block.run((n % whole[0], n // whole[0] % whole[1], n // (whole[0] * whole[1])), whole)  # type: ignore[arg-type]
        memory.take_back()
        self.launched.append(fn.fn.__name__)

    @staticmethod
    def _type(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return "fp32" if isinstance(value, float) else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


@contextmanager
def playing(monkeypatch: pytest.MonkeyPatch, target: GpuTarget) -> Iterator[Launcher]:
    """Inside, every op takes its kernels, on tensors of the CPU, as they are compiled for the target."""
    launcher, kernel, use_triton = Launcher(target), launch.kernel, launch.use_triton
    for name, module in list(sys.modules.items()):
        if name.startswith("kiln.custom_ops."):
            if getattr(module, "kernel", None) is kernel:
                monkeypatch.setattr(module, "kernel", launcher)
            if getattr(module, "use_triton", None) is use_triton:
                monkeypatch.setattr(module, "use_triton", lambda x: True)
    with compiling_for(target):
        yield launcher
