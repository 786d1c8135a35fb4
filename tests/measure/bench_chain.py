"""The matmuls of a decode step as one persistent kernel a layer (`chain.cu`): checked against float64, then timed over a 31B's bytes.

    python -m tests.measure.bench_chain

sm_90, with NVRTC. Each line is a form of the kernel: M tokens, warps of a thread block, units in a warp's ring. Three small kernels stand
in for each attention. With clocks: where a warp's time goes. Exit code 1 where a result is wrong.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.layouts import dequantize

SOURCE = Path(__file__).with_name("chain.cu")
STAND_IN = """
extern "C" __global__ void __launch_bounds__(256) stand_in(const uint4* from, int reads, float* out) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  unsigned some = 0;
  for (int i = 0; i < reads; ++i) {
    const uint4 v = __ldcg(from + ((size_t)blockIdx.x * reads + i) * 256 + threadIdx.x);
    some ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  for (int d = 16; d; d /= 2) some ^= __shfl_xor_sync(~0u, some, d);
  if (threadIdx.x % 32 == 0) out[blockIdx.x * 8 + threadIdx.x / 32] = __uint_as_float(some & 0x3FFFFFFF);
}
"""
ATTENTION = ((40, 4), (256, 2), (32, 8))  # thread blocks and reads of the kernels in its place
D = 5376
MATMULS = [(5376, 8192, 2, "GIVEN"), (43008, 5376, 1, "NORM"), (5376, 21504, 4, "GATED"), (16384, 5376, 1, "NORM")]  # N, K, slices, input
PLANES = {4: ("Q4_K", 35, 2), 6: ("Q6_K", 52, 1)}  # by bits: type, words and halves of a block
LAYERS, EPS, LAPS = 60, 1e-6, 8
CLOCK_GHZ = 1.755
FOUR, SIX = (4, 4, 4, 4), (4, 4, 6, 4)


@cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def nvrtc() -> ctypes.CDLL:
    """The one that torch comes with, and what it opens by name."""
    places = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libnvrtc.so.*"))
    if not places:
        return ctypes.CDLL("libnvrtc.so.13")
    for part in places[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(part))
    return ctypes.CDLL(str(places[0]))


def check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what}: error {code}")


def compiled(text: str, defines: dict[str, object]) -> bytes:
    compiler, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    check(compiler.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"source.cu", 0, None, None), "NVRTC")
    options = [b"-arch=sm_90a", b"-std=c++17", *(f"-D{name}={value}".encode() for name, value in defines.items())]
    if compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetCUBIN(program, image)
    return image.raw


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]  # fmt: skip


class Kernel:
    """Launched early: it waits inside for the kernel before it."""

    EARLY, SHARED, REGISTERS = 6, 8, 4  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION; CU_FUNC_ATTRIBUTE_*

    def __init__(self, image: bytes, name: str, shared: int = 0) -> None:
        module, self.function, self.shared = ctypes.c_void_p(), ctypes.c_void_p(), shared
        check(driver().cuModuleLoadData(ctypes.byref(module), image), "cannot load a kernel")
        check(driver().cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), f"no kernel {name}")
        check(driver().cuFuncSetAttribute(self.function, self.SHARED, shared), f"{shared} bytes of shared memory")

    def attribute(self, which: int) -> int:
        value = ctypes.c_int()
        check(driver().cuFuncGetAttribute(ctypes.byref(value), which, self.function), "cannot ask for an attribute")
        return value.value

    def launch(self, blocks: int, threads: int, arguments: list[Any]) -> None:
        held = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(0 if a is None else a.data_ptr()) for a in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
        early = Attribute(self.EARLY, 0)
        early.value[0] = 1
        config = Config((ctypes.c_uint * 3)(blocks, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1), self.shared,
                        torch.cuda.current_stream().cuda_stream, ctypes.addressof(early), 1)  # fmt: skip
        check(driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None), "cannot launch a kernel")


class Form:
    """The kernel for matrices of these bits, M tokens, and what it works in."""

    def __init__(self, bits: tuple[int, ...], m: int, warps: int, stages: int, clocks: bool = False) -> None:
        self.m, self.warps, self.blocks = m, warps, torch.cuda.get_device_properties(0).multi_processor_count
        chain = ",".join(f"{{{n},{k},{s},{b},{i}}}" for (n, k, s, i), b in zip(MATMULS, bits, strict=True))
        defines = {"M": m, "BLOCKS": self.blocks, "WARPS": warps, "STAGES": stages, "EARLY": 1, "WIDTH": D, "EPS": f"{EPS}f"}
        blocks = max(k // 256 // s for _, k, s, _ in MATMULS)
        ring = stages * (52 + 1 if 6 in bits else 36) * 128  # halves of Q6_K lie apart
        shared = warps * (ring + 256 * m + 4) + m * blocks * 576 + -(-m * blocks * 4 // 16) * 16
        defines |= {"CHAIN": chain, "SHARED": shared} | ({"CLOCKS": 1} if clocks else {})
        self.kernel = Kernel(compiled(SOURCE.read_text(), defines), "kiln_chain", shared)
        parts = [s * self.parts(n, k, s) * m * n for n, k, s, _ in MATMULS]
        rows = max(k // 256 for _, k, _, _ in MATMULS) * 145
        float_sizes = {"parts": 2 * max(parts[:-1]), "out": parts[-1], "between": m * D, "stream_out": m * D}
        self.memory = {name: torch.zeros(size, device="cuda") for name, size in float_sizes.items()}
        int_sizes = {"rows": 2 * m * rows, "flags": 320}
        self.memory |= {name: torch.zeros(size, dtype=torch.int32, device="cuda") for name, size in int_sizes.items()}
        self.memory["clocks"] = torch.zeros(LAPS, dtype=torch.int64, device="cuda")

    def parts(self, n: int, k: int, slices: int) -> int:
        """Of a row and slice, at most: as `parts_of` of the source."""
        blocks = k // 256 // slices
        return (blocks - 1) // (n // 32 * blocks // (self.blocks // slices)) + 2

    def launch(self, x: torch.Tensor, stream: torch.Tensor, norms: list[torch.Tensor | None], weights: list) -> None:
        at, planes = self.memory, [plane for pair in weights for plane in pair]
        own = [at[name] for name in ("parts", "rows", "flags", "out", "clocks")]
        self.kernel.launch(self.blocks, 32 * self.warps,
                           [x, stream, at["between"], at["stream_out"], *norms, *planes, *own])  # fmt: skip

    def result(self) -> torch.Tensor:
        return self.memory["out"].view(-1, self.m, MATMULS[-1][0]).sum(0)


def norms_of(seed: int) -> list[torch.Tensor | None]:
    g = torch.Generator("cuda").manual_seed(seed)
    sizes = (D, None, D, D, 1, D)  # after the branch, the stream's scale, before the next matmul
    return [None if size is None else torch.rand(size, generator=g, device="cuda") + 0.5 for size in sizes]


def planes_of(n: int, k: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    _, w, h = PLANES[bits]
    words = torch.empty(k // 256, w, n, dtype=torch.int32, device="cuda").random_(-(2**31), 2**31 - 1)
    halves = torch.rand(k // 256, h, n, device="cuda") * (0.002 if bits == 4 else 0.0004)
    if bits == 4:
        halves[:, 1] *= 7  # else minima have no share
    return words, halves.half()


def expected(bits: tuple[int, ...], x: torch.Tensor, stream: torch.Tensor, norms: list,
             weights: list) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The last result and the stream, float64 but for activations in fixed point."""

    def rms(t: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt((t * t).mean(1, keepdim=True) + EPS)

    stream, y, root = stream.double(), torch.empty(0), 1.0
    for i, ((_, _, _, given), b) in enumerate(zip(MATMULS, bits, strict=True)):
        if given == "NORM":
            post, scale, weight = norms[:3] if i == 1 else norms[3:]
            stream = (stream + y * rms(y) * post) * (1 if scale is None else scale)
            root, x = rms(stream), fixed_point.quantize((stream * weight).float(), 2)
        elif given == "GATED":
            gate, value = y.chunk(2, 1)
            root, x = 1.0, fixed_point.quantize((torch.nn.functional.gelu(gate, approximate="tanh") * value).float(), 2)
        y = fixed_point.dequantize(x).double() @ dequantize(PLANES[b][0], *weights[i]).double() * root
    return y, stream


def verify(bits: tuple[int, ...], forms: list[tuple[int, int, int]]) -> bool:
    """Whether all are right: each form against float64, repeated, and its first token against that of the first form of as many warps."""
    torch.manual_seed(7)
    weights = [planes_of(n, k, b) for (n, k, _, _), b in zip(MATMULS, bits, strict=True)]
    xs, streams, norms = torch.randn(8, MATMULS[0][1], device="cuda"), torch.randn(8, D, device="cuda"), norms_of(3)
    alone: dict[int, torch.Tensor] = {}
    all_right = True
    for m, warps, stages in forms:
        form, x, stream = Form(bits, m, warps, stages), fixed_point.quantize(xs, 2)[:m].contiguous(), streams[:m].contiguous()
        found = []
        for _ in range(3):
            form.launch(x, stream, norms, weights)
            torch.cuda.synchronize()
            found.append(form.result())
        y, after = expected(bits, x, stream, norms, weights)
        left = form.memory["stream_out"].view(m, D)
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in ((found[0], y), (left, after))]
        same = torch.equal(alone.setdefault(warps, found[0][0]), found[0][0])
        repeats = all(torch.equal(a, b) for a, b in pairwise(found))
        right = max(errors) < 1e-4 and same and repeats
        all_right &= right
        print(f"check {bits}, {m} tokens, {warps} warps: {'right' if right else 'WRONG'}: error {errors[0]:.1e}, stream {errors[1]:.1e}, "
              f"repeats {repeats}, first token as alone {same}", flush=True)  # fmt: skip
    return all_right


def measure(big: torch.Tensor, bits: tuple[int, ...], m: int, warps: int, stages: int, attention: bool = True,
            clocks: bool = False) -> None:  # fmt: skip
    form, stand_in = Form(bits, m, warps, stages, clocks), Kernel(compiled(STAND_IN, {}), "stand_in")
    x, stream = fixed_point.quantize(torch.randn(m, MATMULS[0][1], device="cuda"), 2), torch.randn(m, D, device="cuda")
    norms, halves = norms_of(3), (torch.rand(1 << 24, device="cuda") * 0.002).half()
    keys, unused = (torch.ones(1 << size, device="cuda") for size in (20, 14))
    total, at, layers = 0, 0, []
    for _ in range(LAYERS):
        weights = []
        for (n, k, _, _), b in zip(MATMULS, bits, strict=True):
            _, w, h = PLANES[b]
            count = k // 256 * w * n
            at = 0 if at + count > big.numel() else at  # what was read a whole step ago is in no cache
            weights.append((big[at : at + count], halves))
            at, total = at + count, total + count * 4 + k // 256 * h * n * 2
        layers.append(weights)

    def step() -> None:
        for weights in layers:
            for blocks, reads in ATTENTION if attention else ():
                stand_in.launch(blocks, 256, [keys, reads, unused])
            form.launch(x, stream, norms, weights)

    graph, side, times = torch.cuda.CUDAGraph(), torch.cuda.Stream(), []
    with torch.cuda.stream(side):
        step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            step()
    form.memory["clocks"].zero_()
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    times = sorted(times[2:])
    ms, registers = times[len(times) // 2], form.kernel.attribute(Kernel.REGISTERS)
    what = f"{'with' if attention else 'without'} attention{', clocked' if clocks else ''}"
    print(f"{bits}, {m} tokens, {warps} warps, {stages} units, {registers} registers, {what}: {ms:.3f} ms "
          f"({times[0]:.3f} - {times[-1]:.3f}), {total / 1e9:.2f} GB, {total / ms / 1e6:,.0f} GB/s", flush=True)  # fmt: skip
    if clocks:
        laps = (form.memory["clocks"].double() / (12 * LAYERS * form.blocks * warps * CLOCK_GHZ * 1e3)).tolist()
        names = ("flag", "activations", "weights", "products", "copies", "ends of rows", "the other warps", "edges")
        print("  us of a warp and layer: " + ", ".join(f"{name} {lap:.1f}" for name, lap in zip(names, laps, strict=True)), flush=True)


def main() -> int:
    big = torch.empty(1 << 32, dtype=torch.int32, device="cuda").random_(-(2**31), 2**31 - 1)
    for attention in (False, True):
        measure(big, FOUR, 1, 12, 3, attention)
    measure(big, FOUR, 1, 12, 3, clocks=True)
    for m, warps, stages in ((1, 16, 2), (1, 8, 4), (2, 12, 3), (4, 12, 2), (4, 12, 3), (8, 8, 3)):
        measure(big, FOUR, m, warps, stages)
    measure(big, SIX, 1, 12, 2)
    del big
    right = [verify(FOUR, [(1, 12, 3), (2, 12, 2), (4, 12, 2), (1, 8, 3), (8, 8, 3)]), verify(SIX, [(1, 12, 2), (4, 12, 2)])]
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
