"""A kernel written in CUDA C++: a Triton kernel, its stub, whose machine code NVRTC makes of a `.cu` file.

The graph, the wrapper, the launch and the package see the stub. Its last argument is the constant SOURCE, which says what it is made of:

    @triton.jit(do_not_specialize=["n"])
    def kiln_scale(x, out, n, SOURCE: tl.constexpr):
        made_from(SOURCE)
        tl.store(out, 0)  # what the analysis of writes reads: a store through each pointer that the source writes

    kernel(kiln_scale)[grid](x, out, n, SOURCE=cuda_source("weights/scale.cu", threads=256, shared=4096, BLOCK=1024))

    extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const float* x, float* out, int n, SCRATCH) {
      extern __shared__ __align__(16) char shared[];  // SHARED bytes

KERNEL, THREADS, SHARED and SCRATCH are defined here, BLOCK by the launch. The parameters are the stub's, in its order, and SCRATCH, two
pointers that Triton gives every kernel; what the source does not write is const. An integer that is 1 when the graph is compiled is a
constant to Triton and no parameter: the compilation ends with an error, and such a size is to be a definition. All shared memory is
dynamic.

SOURCE holds a digest of the text, its includes and NVRTC, so every cache of Triton and Inductor, whose keys hold the constants of a kernel,
compiles anew after a change. What `made_from` leaves in the PTX is no instruction: where nothing replaces it, ptxas refuses the stub.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import re
import sysconfig
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from kiln.custom_ops.gpu import cubin

MARK = "kiln_cuda_source"
SONAME = "libnvrtc.so.13"  # of torch's CUDA, in the wheel nvidia-cuda-nvrtc
SCRATCH = "const void*, const void*"  # see `contract.SCRATCH`
GIVEN = ("KERNEL", "THREADS", "SHARED", "SCRATCH")  # definitions made here
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"', re.MULTILINE)
_MARKED = re.compile(rf"^\s*{MARK} (.*);\s*$", re.MULTILINE)
_DECLARED = re.compile(r"\bKERNEL\s*\(([^()]*)\bSCRATCH\s*\)")
_PARAMETER = re.compile(r"\.param\s+\.[a-z]+(\d+)")


class CudaSourceError(RuntimeError):
    """A `.cu` file that cannot be compiled, or whose kernel is not what its stub promises."""


def cuda_source(path: str | Path, *, threads: int, shared: int = 0, **defines: int | float) -> str:
    """The constant SOURCE of a stub.

    path: of the `.cu` file, below `custom_ops` (`weights/scale.cu`) or absolute; threads of a block, whole warps, at most 1024; shared:
    bytes of dynamic shared memory; defines: macros by name, integers, booleans (1 or 0) or floats (as float32 literals). A text that was
    read is not read again in this process. Raises ValueError for what cannot be given, CudaSourceError without the file, one that it
    includes, or NVRTC.
    """
    wrong = [f"{name}={value!r}" for name, value in defines.items() if type(value) not in (int, bool, float) or name in GIVEN]
    wrong += [f"{name}={value!r}" for name, value in defines.items() if type(value) is float and not math.isfinite(value)]
    wrong += [f"threads={threads!r}"] if type(threads) is not int or threads % 32 or not 32 <= threads <= 1024 else []
    wrong += [f"shared={shared!r}"] if type(shared) is not int or shared < 0 else []
    wrong += [f"path={str(path)!r}"] if re.search(r"[\s;$\"\\]", str(path)) else []
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} cannot be given to a kernel of CUDA C++")
    return _described(str(path), threads, shared, tuple((name, _literal(value)) for name, value in sorted(defines.items())))


@triton.jit
def made_from(SOURCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """In a stub: its machine code is made of SOURCE, as `cuda_source` describes it."""
    tl.inline_asm_elementwise(SOURCE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def _literal(value: int | float) -> str:
    return f"{value!r}f" if type(value) is float else str(int(value))


@functools.cache
def _described(path: str, threads: int, shared: int, defines: tuple[tuple[str, str], ...]) -> str:
    words = [path, _digest(_texts(path)), str(threads), str(shared), *(f"{name}={value}" for name, value in defines)]
    return f"{MARK} {' '.join(words)};"


def _texts(path: str) -> dict[str, str]:
    """The file and all that it includes in quotation marks, by name: first the file. Includes lie beside it."""
    file = Path(path) if Path(path).is_absolute() else Path(str(files("kiln.custom_ops"))) / path
    found: dict[str, str] = {}
    pending = [file.name]
    while pending:
        name = pending.pop(0)
        if name not in found:
            try:
                found[name] = (file.parent / name).read_text()
            except OSError as e:
                raise CudaSourceError(f"{path}: {name} cannot be read: {e.strerror}") from None
            pending += _INCLUDE.findall(found[name])
    return found


def _digest(texts: dict[str, str]) -> str:
    return hashlib.sha256(repr((sorted(texts.items()), nvrtc_version())).encode()).hexdigest()[:32]


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    wheel = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "lib", SONAME)
    for name in (str(wheel), SONAME):  # the wheel's, else what the loader finds
        try:
            return ctypes.CDLL(name)
        except OSError as e:
            reason = e
    raise CudaSourceError(f"NVRTC, which compiles kernels of CUDA C++, was not found: {reason}; install nvidia-cuda-nvrtc 13.0")


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """(13, 0). Raises CudaSourceError without NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _compiled(texts: dict[str, str], options: Sequence[str]) -> bytes:
    """The cubin that NVRTC makes of the first text. Raises CudaSourceError: a line that says why, then all that NVRTC said."""
    library, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    (name, text), *headers = ((name.encode(), text.encode()) for name, text in texts.items())

    def strings(values: Sequence[bytes]) -> ctypes.Array:
        return (ctypes.c_char_p * len(values))(*values)

    def output(what: str) -> bytes:
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    includes = strings([t for _, t in headers]), strings([n for n, _ in headers])
    if library.nvrtcCreateProgram(ctypes.byref(program), text, name, len(headers), *includes):
        raise CudaSourceError(f"{name.decode()}: NVRTC takes no such program")
    try:
        if library.nvrtcCompileProgram(program, len(options), strings([o.encode() for o in options])):
            log = output("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            first = next((line for line in log.splitlines() if "error" in line), log or "NVRTC says nothing")
            raise CudaSourceError(f"{first.strip()} (NVRTC {options[0]})\n{log}")
        return output("CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _cubin_of(marked: str, ptx: str, metadata: dict[str, Any], capability: int) -> bytes:
    """The machine code of a stub; its block and shared memory go into Triton's record of the kernel, by which it is launched."""
    path, digest, threads, shared, *defines = marked.split(" ")
    kernel, texts = metadata["name"], _texts(path)
    if _digest(texts) != digest:
        raise CudaSourceError(f"{path} or what it includes has changed since this process read it; start it again")
    if metadata.get("maxnreg") is not None:
        raise CudaSourceError(f"{path}: registers are limited by __launch_bounds__ or __maxnreg__ in the source, not by its launch")
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"  # as Triton's kernels
    given = (f"KERNEL={kernel}", f"THREADS={threads}", f"SHARED={shared}", f"SCRATCH={SCRATCH}")
    options = [f"-arch={architecture}", "-std=c++17", "-default-device", *(f"-D{define}" for define in (*given, *defines))]
    image = _compiled(texts, options)
    _check(path, kernel, image, ptx)
    _stored(path, next(iter(texts.values())), kernel, ptx)
    metadata |= {"num_warps": int(threads) // 32, "shared": int(shared)}
    return image


def _check(path: str, kernel: str, image: bytes, ptx: str) -> None:
    """Raises CudaSourceError where the image is not one kernel with the stub's parameters and without shared memory of its own."""
    if cubin.kernels(image) != [kernel]:
        found = ", ".join(cubin.kernels(image)) or "none"
        raise CudaSourceError(f'{path}: kernels are {found}; expected one, extern "C" __global__ void KERNEL(...)')
    if cubin.fixed_shared(image, kernel):
        raise CudaSourceError(f"{path}: shared memory of a fixed size; declare it extern, its bytes are the launch's")
    own = [p.end - p.begin for p in cubin.parameters(image, kernel)]
    stub = [int(bits) // 8 for bits in _PARAMETER.findall(ptx[: ptx.index("{")])]
    if own != stub:
        raise CudaSourceError(
            f"{path}: the parameters of kernel {kernel} have {own} bytes, its stub's {stub}; both end in SCRATCH, and an integer that is 1 "
            "in a graph is no parameter: make it a definition"
        )


def _stored(path: str, text: str, kernel: str, ptx: str) -> None:
    """Raises CudaSourceError where the stub stores nothing through a pointer that is not to constants: what the graph does not know to be
    written it may leave out, or read too early."""
    declared = _DECLARED.search(re.sub(r"//.*|/\*[\s\S]*?\*/", "", text))
    if not declared:
        raise CudaSourceError(f"{path}: parameters were not found; expected KERNEL(..., SCRATCH), without brackets between them")
    for i, parameter in enumerate(declared[1].split(",")):
        to, pointer, _ = parameter.rpartition("*")
        if pointer and "const" not in to.split() and f"[{kernel}_param_{i}]" not in ptx:
            raise CudaSourceError(f"{path}: the stub stores nothing through {' '.join(parameter.split())}, which is not const")


def _replace(stages: dict[str, Callable], capability: int) -> None:
    """The hook on Triton's stages: the last one looks whether it has a stub."""
    make = stages["cubin"]

    def make_or_replace(ptx: str, metadata: dict[str, Any]) -> bytes:
        marked = set(_MARKED.findall(ptx))
        if len(marked) > 1:
            raise CudaSourceError(f"kernel {metadata['name']} is made from {len(marked)} sources")
        return _cubin_of(marked.pop(), ptx, metadata, capability) if marked else make(ptx, metadata)

    stages["cubin"] = make_or_replace


def _install() -> None:
    before = triton.knobs.runtime.add_stages_inspection_hook

    def hook(backend: Any, stages: dict[str, Callable], options: Any, language: Any, capability: int) -> None:
        if before is not None:
            before(backend, stages, options, language, capability)
        if "cubin" in stages:
            _replace(stages, capability)

    triton.knobs.runtime.add_stages_inspection_hook = hook


_install()
