"""Our matmul against cuBLAS on a GPU, at the pieces prefill of the 31B multiplies: every candidate checked, then timed.

    python -m tests.measure.bench_matmul --out matmul.json [--budget 150] [--compile-only]

Checks: every element against float32 (TF32 off), with rows beyond T full of NaN; rows of short chunks bit-equal to those of long ones.
Times: candidates in turn, round after round, so that all run at the clock that the load leaves; then the dequantization and matmul of a
whole chunk, 60 layers in one CUDA graph, for at least a second. `--compile-only` needs no GPU: registers and shared memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kiln.custom_ops.gpu.launch import kernel
from kiln.custom_ops.gpu.target import GpuTarget, compiling_for, gpu_targets
from kiln.custom_ops.weights import linear, matmul
from kiln.custom_ops.weights.dequantize import kiln_dequantize
from kiln.custom_ops.weights.layouts import LAYOUTS
from kiln.custom_ops.weights.matmul import MatmulTile
from kiln.custom_ops.weights.matmul_kernels import kiln_matmul, kiln_matmul_tma
from kiln.custom_ops.weights.packed import format_constants

SHAPES = ((16384, 5376), (5376, 8192), (21504, 5376), (5376, 21504), (18432, 5376), (5376, 16384))  # (N, K)
FIRST = SHAPES[:2]  # on which the field is narrowed
# pieces of a layer: name, block type, N of the packed matrix, K; 50 sliding layers, 10 global ones
SLIDING = (("Q4_K", 16384, 5376), ("Q4_K", 5376, 8192), ("Q4_K", 43008, 5376), ("Q6_K", 5376, 21504))
GLOBAL = (("Q4_K", 18432, 5376), ("Q4_K", 5376, 16384), ("Q4_K", 43008, 5376), ("Q6_K", 5376, 21504))
LAYERS = (SLIDING,) * 5 + (GLOBAL,)
REPEATS = 10  # of LAYERS in a chunk
TOKENS = (2048, 512, 64)
ROUNDS, SLICE = 5, 6e-3  # of a candidate: slices of a replay, seconds each
FINALISTS = 6
LIMIT = 3e-3  # relative error of a bfloat16 result; rounding alone gives 1.7e-3


def tiles(sm: int) -> list[MatmulTile]:
    """Candidates for an architecture; the first is what the table holds."""
    def t(rows: int, columns: int, inner: int, warps: int, stages: int, group: int = 8, **options) -> MatmulTile:
        return MatmulTile(rows, columns, inner, warps, stages, group, **options)

    pointers = [t(128, 128, 32, 4, 4), t(128, 128, 32, 4, 3), t(128, 128, 64, 4, 3), t(128, 128, 64, 8, 3), t(128, 256, 32, 8, 3),
                t(256, 128, 32, 8, 3), t(64, 128, 64, 4, 3), t(64, 64, 64, 4, 4)]  # fmt: skip
    table = matmul.table_tile(torch.bfloat16, gpu_targets()[f"sm_{sm}"])
    if sm not in (90, 100):
        more = [t(128, 256, 64, 8, 3), t(256, 128, 64, 8, 3), t(128, 256, 32, 8, 4)] if sm == 80 else []
        return list(dict.fromkeys([table, *pointers, *more]))
    few = ((0, 0, 0, 0), (64, 64, 128, 6), (64, 64, 128, 5), (64, 64, 64, 8), (64, 128, 64, 6))
    found = [table, *(t(128, 256, 64, 8, 3, tma=True, few=tiles) for tiles in few)]
    found += [t(128, 256, 64, 8, 3, group, tma=True) for group in (4, 16)]
    found += [t(128, 256, 64, 8, 4, group, tma=True, halves=True) for group in (8, 16)]
    found += [t(128, 256, 64, 8, 4, 8, tma=True, halves=True, few=few[1])]
    found += [t(256, 128, 64, 8, 3, tma=True), t(256, 128, 64, 8, 4, tma=True, halves=True), t(64, 256, 64, 4, 4, 16, tma=True)]
    found += [t(128, 128, 64, 4, 4, 16, tma=True), t(64, 64, 128, 4, 6, 16, tma=True)]
    found += [t(128, 256, 64, 8, 3), t(128, 128, 64, 8, 4), t(256, 128, 64, 8, 3)]
    if sm == 90:
        found += [t(128, 256, 64, 4, 3, tma=True, specialize=True), t(256, 128, 64, 4, 3, tma=True, specialize=True),
                  t(128, 128, 128, 4, 3, 16, tma=True, specialize=True)]  # fmt: skip
    return list(dict.fromkeys(found))


def turned(sm: int) -> list[MatmulTile]:
    """Of the candidates, those that are tried with the piece [N, K] as well."""
    if sm not in (90, 100):
        return tiles(sm)[:1]
    return [found for found in tiles(sm) if found.tma and found.rows * found.columns == 1 << 15 and not found.few[0]][:4]


@dataclasses.dataclass(frozen=True)
class Product:
    """One compilation: a candidate at a shape."""

    tile: MatmulTile
    n: int
    k: int
    transposed: bool
    sm: int
    block_type: str = "bf16"

    @property
    def name(self) -> str:
        options = [word for word in ("tma", "halves", "specialize") if getattr(self.tile, word)]
        shape = f"{self.tile.rows}x{self.tile.columns}x{self.tile.inner}"
        few = " few {}x{}x{} s{}".format(*self.tile.few) if self.tile.few[0] else ""
        turn = " [N, K]" * self.transposed
        return f"{shape} w{self.tile.warps} s{self.tile.stages} g{self.tile.group} {' '.join(options)}{few}{turn}"

    def source(self) -> tuple[ASTSource, dict]:
        fn = kiln_matmul_tma if self.tile.tma else kiln_matmul
        fixed = matmul.constants(self.tile, self.n, self.k, self.n, self.transposed)
        types = {name: f"*{self.block_type}" for name in ("x", "w", "out")}
        types |= {"tokens": "i32", "first": "i32"}
        signature = {name: "constexpr" if name in fixed else types[name] for name in fn.arg_names}
        aligned = [i for i, name in enumerate(fn.arg_names) if signature[name].startswith("*") or name == "first"]
        options = {"num_warps": matmul.launch_warps(self.tile), "num_stages": self.tile.stages}
        return ASTSource(fn, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned}), options

    def compiled(self) -> triton.compiler.CompiledKernel:
        source, options = self.source()
        return triton.compile(source, target=GPUTarget("cuda", self.sm, 32), options=options)


def compile_one(product: Product) -> tuple[Product, str, int]:
    """In a worker, into the cache: (product, what is wrong, bytes of shared memory)."""
    from kiln.exporter.compiler.torch_private import cubin_resources

    try:
        compiled = product.compiled()
        registers, stack = cubin_resources(compiled.asm["cubin"])
    except Exception as error:  # any of the compiler's: it is the finding
        return product, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", 0
    limit = gpu_targets()[f"sm_{product.sm}"].smem_optin
    wrong = ""
    if compiled.metadata.shared > limit:
        wrong = f"{compiled.metadata.shared} bytes of shared memory of {limit}"
    elif stack:
        wrong = f"spills {stack} bytes"
    elif registers < 12:
        wrong = "empty"
    return product, wrong, compiled.metadata.shared


class Launcher:
    """A compiled product."""

    def __init__(self, product: Product, target: GpuTarget):
        self.product, self.kernel, self.programs = product, product.compiled(), target.sm_count

    def __call__(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        tile, n = self.product.tile, self.product.n
        fixed = matmul.constants(tile, n, self.product.k, n, self.product.transposed)
        values = {"x": x, "w": w, "out": out, "tokens": x.shape[0], "first": 0} | fixed
        grid = self.programs if tile.tma else triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(n, tile.columns)
        self.kernel[(grid, 1, 1)](*(values[name] for name in self.kernel.src.fn.arg_names))


def started(tokens: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """x [T, K], the memory behind it full of NaN."""
    whole = torch.full((tokens + 256, k), math.nan, dtype=dtype, device="cuda")
    generator = torch.Generator("cuda").manual_seed(7)
    whole[:tokens] = torch.randn(2048, k, generator=generator, device="cuda")[:tokens].to(dtype)
    return whole[:tokens]


def weight(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(k, n, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * 0.02).to(dtype)


def right(launcher: Launcher, w: torch.Tensor, expected: torch.Tensor) -> tuple[str, float]:
    """(what is wrong, relative error at 2,048 tokens). expected: float32 [2048, N]."""
    product = launcher.product
    full, error = None, math.nan
    for tokens in (2048, 2, 64, 77, 128, 512, 1999):
        out = torch.full((tokens + 1, product.n), math.nan, dtype=w.dtype, device="cuda")
        launcher(started(tokens, product.k), w, out)
        result = out[:tokens]
        if not bool(result.isfinite().all()):
            return f"not finite at {tokens} tokens", error
        if not bool(out[tokens:].isnan().all()):
            return f"writes beyond {tokens} tokens", error
        if full is None:
            full = result
            error = ((result.float() - expected).norm() / expected.norm()).item()
            worst = ((result.float() - expected).abs() / (expected.abs() + expected.abs().mean())).max().item()
            if error > LIMIT or worst > 0.03:
                return f"wrong: relative error {error:.2e}, worst {worst:.2e}", error
        elif not torch.equal(result, full[:tokens]):
            return f"rows differ between 2048 and {tokens} tokens", error
    return "", error


def captured(calls: list[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    return graph


def timed(graph: torch.cuda.CUDAGraph, replays: int = 1) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def compete(calls: dict[str, Callable[[int], None]], copies: int, rough_us: float) -> dict[str, float]:
    """Microseconds of a call of each, median over rounds in which all take turns; call(i) works on copy i."""
    number = max(copies, min(200, round(SLICE * 1e6 / rough_us)))
    graphs = {name: captured([lambda call=call, i=i: call(i % copies) for i in range(number)]) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for graph in graphs.values():
        graph.replay()
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(timed(graph) * 1e3 / number)
    return {name: sorted(found)[ROUNDS // 2] for name, found in times.items()}


def clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "clock unknown"


def packed_weights() -> list[list[tuple]]:
    """Random packed weights of LAYERS, each read from memory."""
    from kiln.custom_ops.bench.cases import packed

    generator = torch.Generator("cuda").manual_seed(3)
    return [[(block_type, n, k, *packed(block_type, n, k, generator)) for block_type, n, k in layer] for layer in LAYERS]


def by_columns(words: torch.Tensor, halves: torch.Tensor, block_type: str, x: torch.Tensor) -> torch.Tensor:
    """The piece [K, N], as prefill makes it."""
    return linear.dequantized(words, halves, block_type, torch.bfloat16, x)


def by_rows(words: torch.Tensor, halves: torch.Tensor, block_type: str, x: torch.Tensor) -> torch.Tensor:
    """The piece [N, K], by the kernel that makes rows of an embedding."""
    n, k = words.shape[2], x.shape[1]
    out = torch.empty((n, k), dtype=torch.bfloat16, device="cuda")
    groups = min(LAYOUTS[block_type].block // 32, 2)
    constants = {"GATHER": True, "GROUPS": groups, "ROWS": 32, "EVEN": n % 32 == 0}
    every, strides = torch.arange(n, device="cuda"), (words.stride(1), halves.stride(1))
    kernel(kiln_dequantize)[(triton.cdiv(n, 32), k // 32 // groups)](words, halves, every, out, n, k, *strides,
                                                                     **format_constants(block_type), **constants, num_warps=1)
    return out


Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def chunk_calls(weights: list[list[tuple]], tokens: int, multiply: Callable[[int, int], Multiply] | None,
                dequantize: Callable[..., torch.Tensor] | None) -> Callable[[], None]:
    """One call for a chunk's products over all layers; multiply(n, k) gives a product's function, None leaves products out."""
    xs = {k: started(tokens, k) for layer in LAYERS for _, _, k in layer}
    outs: dict[int, torch.Tensor] = {}
    dense: dict[tuple[int, int], torch.Tensor] = {}

    def call() -> None:
        for _ in range(REPEATS):
            for layer in weights:
                for block_type, n, k, words, halves in layer:
                    step = linear.chunk_rows(n, k, 2)
                    for i in range(0, n, step):
                        size = min(step, n - i)
                        if dequantize:
                            w = dequantize(words[:, :, i : i + step], halves[:, :, i : i + step], block_type, xs[k])
                        else:
                            w = dense.setdefault((size, k), None)
                            if w is None:
                                w = dense[size, k] = weight(size, k)
                        if multiply:
                            out = outs.get(size)
                            if out is None:
                                out = outs[size] = torch.empty(tokens, size, dtype=torch.bfloat16, device="cuda")
                            multiply(size, k)(xs[k], w, out)

    return call


def sustained(call: Callable[[], None], seconds: float) -> tuple[float, str]:
    """(milliseconds of a replay in a run of at least `seconds`, clock and power in it)."""
    graph = captured([call])
    replays = max(2, math.ceil(seconds / (timed(graph) / 1e3)))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    state = clocks()
    end.synchronize()
    return start.elapsed_time(end) / replays, state


class Record:
    """What was found so far, on disk after each step."""

    def __init__(self, path: Path | None, budget: float):
        self.path, self.deadline, self.found, self.began = path, time.monotonic() + budget, {}, time.monotonic()

    def put(self, key: str, value) -> None:
        self.found[key] = value
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1))

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.1f}] {text}", flush=True)


def probe(sm: int, word: str) -> None:
    """In a process of its own, which may hang: one candidate of a kind whose warps wait for each other."""
    target = dataclasses.replace(gpu_targets()[f"sm_{sm}"], sm_count=torch.cuda.get_device_properties().multi_processor_count)
    triton.set_allocator(matmul._scratch)
    n, k = 5376, 8192
    launcher = Launcher(Product(next(tile for tile in tiles(sm) if getattr(tile, word)), n, k, False, sm), target)
    w = weight(n, k)
    wrong, error = right(launcher, w, started(2048, k).float() @ w.float())
    print(f"{word}: {wrong or 'right'}, error {error:.2e}")


def probes(sm: int, record: Record) -> list[str]:
    """The block_types that hang or fail."""
    words = [word for word in ("specialize",) if any(getattr(tile, word) for tile in tiles(sm))]
    running = {word: subprocess.Popen([sys.executable, "-m", "tests.measure.bench_matmul", "--probe", word, "--sm", str(sm)],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for word in words}  # fmt: skip
    bad = []
    for word, process in running.items():
        try:
            text = process.communicate(timeout=60)[0].strip().splitlines() or ["nothing said"]
        except subprocess.TimeoutExpired:
            process.kill()
            text = [f"{word}: hangs"]
        record.say(f"probe {text[-1]}")
        if process.returncode != 0:
            bad.append(word)
    return bad


def by_blas(x: torch.Tensor, ws: list[torch.Tensor], out: torch.Tensor, i: int) -> None:
    torch.mm(x, ws[i], out=out)


def by_launcher(launcher: Launcher, x: torch.Tensor, ws: list[torch.Tensor], out: torch.Tensor, i: int) -> None:
    launcher(x, ws[i], out)


def table(record: Record, rows: dict[str, dict[str, float]], n: int, k: int, tokens: int) -> None:
    work = 2 * tokens * n * k / 1e6
    blas = rows["cuBLAS"]
    record.say(f"{n}x{k} T {tokens}: cuBLAS {blas:.1f} us {work / blas:.0f} TFLOP/s")
    for name, us in sorted(rows.items(), key=lambda row: row[1])[:5]:
        if name != "cuBLAS":
            record.say(f"    {us:8.1f} us {work / us:5.0f} TFLOP/s {blas / us:6.3f}  {name}")


def compare(record: Record, launchers: dict[tuple[str, int, int], Launcher], shapes, names: set[str] | None) -> None:
    """Check and time the launchers at these shapes; names: of the only ones."""
    for n, k in shapes:
        if record.left() < 45:
            record.say(f"{n}x{k} left out: the budget ends")
            continue
        w = weight(n, k)
        turned_w = w.T.contiguous()
        expected = started(2048, k).float() @ w.float()
        here = {name: launcher for (name, a, b), launcher in launchers.items() if (a, b) == (n, k) and (names is None or name in names)}
        for name, launcher in list(here.items()):
            wrong, error = right(launcher, turned_w if launcher.product.transposed else w, expected)
            record.found.setdefault("checks", {})[f"{name} {n}x{k}"] = wrong or error
            if wrong:
                record.say(f"    {n}x{k} {name}: {wrong}")
                here.pop(name)
                for key in [key for key in launchers if key[0] == name]:
                    del launchers[key]
        blas = torch.mm(started(2048, k), w).float()
        record.say(f"{n}x{k}: {len(here)} candidates right; cuBLAS error {((blas - expected).norm() / expected.norm()).item():.2e}")
        del blas, expected
        copies = max(2, math.ceil(4 * torch.cuda.get_device_properties().L2_cache_size / (2 * n * k)))
        ws = [w, *(w.clone() for _ in range(copies - 1))]
        turned_ws = [turned_w, *(turned_w.clone() for _ in range(copies - 1))] if any(c.product.transposed for c in here.values()) else []
        for tokens in TOKENS:
            if record.left() < 40:
                break
            x = started(tokens, k)
            out = torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda")
            calls = {"cuBLAS": functools.partial(by_blas, x, ws, out)}
            for name, launcher in here.items():
                calls[name] = functools.partial(by_launcher, launcher, x, turned_ws if launcher.product.transposed else ws, out)
            rows = compete(calls, copies, max(2 * tokens * n * k / 6e8, 2 * n * k / 3e6))
            table(record, rows, n, k, tokens)
            record.put("times_us", record.found.get("times_us", {}) | {f"{n}x{k} T {tokens}": rows})


def ranked(times: dict[str, dict[str, float]], tokens: int) -> list[str]:
    """Candidates by the geometric mean of their times over the shapes timed at this T, [K, N] only."""
    logs: dict[str, list[float]] = {}
    rows = [found for key, found in times.items() if key.endswith(f"T {tokens}")]
    for found in rows:
        for name, us in found.items():
            if name != "cuBLAS" and "[N, K]" not in name:
                logs.setdefault(name, []).append(math.log(us / found["cuBLAS"]))
    means = {name: sum(values) / len(values) for name, values in logs.items() if len(values) == max(map(len, logs.values()))}
    return sorted(means, key=means.__getitem__)


def whole_chunks(record: Record, launchers: dict[tuple[str, int, int], Launcher]) -> None:
    """Sustained: cuBLAS, our best, cuBLAS again; dequantization alone; products alone."""
    weights = packed_weights()
    times = record.found["times_us"]
    results = {}
    for tokens in TOKENS[:2]:
        best = {}
        for n, k in SHAPES:
            rows = times.get(f"{n}x{k} T {tokens}", {})
            names = [name for name in rows if name != "cuBLAS" and "[N, K]" not in name and (name, n, k) in launchers]
            if names:
                best[n, k] = min(names, key=rows.__getitem__)
        order = [name for name in ranked(times, tokens) if all((name, n, k) in launchers for n, k in SHAPES)]

        def blas(n: int, k: int) -> Multiply:
            return lambda x, w, out: torch.mm(x, w, out=out)

        ways: list[tuple[str, Callable[[int, int], Multiply] | None, Callable | None]] = [("cuBLAS", blas, by_columns)]
        ways += [(name, lambda n, k, name=name: launchers[name, n, k], by_columns) for name in order[:3]]
        if len(best) == len(SHAPES):
            ways.append(("best of each shape", lambda n, k, best=best: launchers[best[n, k], n, k], by_columns))
        ways += [("cuBLAS again", blas, by_columns), ("dequantization alone", None, by_columns), ("cuBLAS, products alone", blas, None)]
        ways += [(f"{name}, products alone", lambda n, k, name=name: launchers[name, n, k], None) for name in order[:2]]
        if tokens == TOKENS[0]:
            ways.append(("dequantization to [N, K] alone", None, by_rows))
        first = None
        for name, multiply, dequantize in ways:
            if record.left() < 5:
                record.say(f"T {tokens}: {name} left out: the budget ends")
                continue
            ms, state = sustained(chunk_calls(weights, tokens, multiply, dequantize), 1.0)
            first = first or ms
            record.say(f"chunk of {tokens}: {ms:8.2f} ms, {first / ms:6.3f} of cuBLAS's speed  {name}  ({state})")
            results[f"T {tokens}: {name}"] = {"ms": ms, "state": state}
            record.put("chunk_ms", results)
            torch.cuda.empty_cache()
        for shape, name in best.items():
            record.say(f"    best at {shape[0]}x{shape[1]}, T {tokens}: {name}")


def float32(record: Record, target: GpuTarget) -> None:
    """The float32 tile against float64, and its time."""
    n, k, tokens = 5376, 5376, 512
    x, w = started(tokens, k, torch.float32), weight(n, k, dtype=torch.float32)
    expected = x.double() @ w.double()
    out = torch.empty(tokens, n, device="cuda")
    candidates = [matmul.FLOAT32, MatmulTile(128, 64, 16, 8, 2, span=512), MatmulTile(64, 64, 16, 8, 3)]
    names = [f"{tile.rows}x{tile.columns}x{tile.inner} w{tile.warps} s{tile.stages} span {tile.span}" for tile in candidates]
    with compiling_for(target):
        calls: dict[str, Callable[[int], None]] = {"cuBLAS": lambda i: torch.mm(x, w, out=out)}
        for name, tile in zip(names, candidates, strict=True):
            calls[name] = lambda i, tile=tile: matmul.multiply_into(x, w, out, tile=tile)
        errors = {}
        for name, call in calls.items():
            call(0)
            errors[name] = ((out.double() - expected).norm() / expected.norm()).item()
        rows = compete(calls, 1, 2000)
    for name, us in rows.items():
        record.say(f"float32 {n}x{k} T {tokens}: {us:.0f} us, error {errors[name]:.1e}  {name}")
    record.put("float32", {"errors": errors, "us": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=150, help="seconds")
    parser.add_argument("--sm", type=int, help="compute capability, as 90  [default: this GPU's]")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--probe")
    args = parser.parse_args()
    record = Record(args.out, args.budget)
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.probe:
        probe(args.sm, args.probe)
        return
    sm = args.sm or sm_here()
    products = [Product(tile, n, k, False, sm) for n, k in SHAPES for tile in tiles(sm)]
    products += [Product(tile, n, k, True, sm) for n, k in FIRST for tile in turned(sm)]
    if args.compile_only:
        products = [product for product in products if (product.n, product.k) in FIRST[:1]]
    workers = max(1, (os.cpu_count() or 2) - 1)
    pool = multiprocessing.get_context("fork").Pool(workers)  # before this process has met the GPU
    compiled = [pool.apply_async(compile_one, (product,)) for product in products]
    bad = [] if args.compile_only else probes(sm, record)
    good: list[Product] = []
    for result in compiled:
        product, wrong, shared = result.get(timeout=120)
        if wrong or args.compile_only:
            record.say(f"{product.n}x{product.k} {product.name}: {wrong or f'{shared} bytes of shared memory'}")
        if not wrong and not any(getattr(product.tile, word) for word in bad):
            good.append(product)
    pool.terminate()
    record.say(f"{len(good)} of {len(products)} compilations for sm_{sm} fit")
    if args.compile_only:
        sys.exit(len(good) != len(products))
    faulthandler.dump_traceback_later(args.budget + 60, exit=True)  # a GPU that hangs; what was found is on disk
    properties = torch.cuda.get_device_properties()
    target = dataclasses.replace(gpu_targets()[f"sm_{sm}"], sm_count=properties.multi_processor_count)
    record.put("machine", {"gpu": properties.name, "sms": properties.multi_processor_count, "torch": torch.__version__, "sm": sm})
    triton.set_allocator(matmul._scratch)
    launchers = {(p.name, p.n, p.k): Launcher(p, target) for p in good}
    record.say(f"{properties.name}, {properties.multi_processor_count} multiprocessors")
    compare(record, launchers, FIRST, None)
    times = record.found["times_us"]
    names = {name for tokens in TOKENS for name in ranked(times, tokens)[:FINALISTS]}
    names |= {min((name for name in found if name != "cuBLAS"), key=found.__getitem__) for found in times.values()}
    compare(record, launchers, SHAPES[2:], names)
    whole_chunks(record, launchers)
    if record.left() > 10:
        float32(record, target)
    record.say("done")


def sm_here() -> int:
    """Asked of another process: this one must not meet the GPU before it has forked its compilers."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0].replace(".", ""))


if __name__ == "__main__":
    main()
