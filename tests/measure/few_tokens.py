"""What a short piece of a prompt could gain: matmuls straight from packed weights beside those of dequantized pieces, and attention over a
long TQ4 cache with its keys split between more programs.

    python -m tests.measure.few_tokens --out F.json [--budget 60] [--compile-only]

`kiln_few` unpacks a tile of rows in registers and multiplies it by all tokens on tensor cores, so a weight crosses memory once, packed.
Each candidate is checked against float32 and timed at the shapes of the 31B, beside dequantization and torch.mm; the sums are over its
layers. Attention is timed a layer at a time, with the splits that a tile may have. `--compile-only` needs no GPU: shared memory of some
candidates.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kiln.custom_ops.bench.cases import packed
from kiln.custom_ops.geometry import EXACT_WINDOW, GEMMA4_31B
from kiln.custom_ops.gpu.early import INTERPRETED
from kiln.custom_ops.gpu.launch import kernel
from kiln.custom_ops.gpu.target import compiling_for, current_target, gpu_targets
from kiln.custom_ops.tq4 import prefill
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.dequantize import octet, scale_and_offset
from kiln.custom_ops.weights.layouts import dequantize
from kiln.custom_ops.weights.packed import format_constants
from kiln.exporter.files import write_text
from tests.measure.bench_matmul import GLOBAL, LAYERS, REPEATS, SLIDING

TOKENS = (64, 16, 128)
LIMIT = 4e-3  # relative error of a bfloat16 result; weights are rounded to bfloat16 as in prefill


@dataclasses.dataclass(frozen=True)
class Tile:
    """rows of the matrix and splits of K of a program; groups of 32 of a step."""

    rows: int = 128
    splits: int = 1
    warps: int = 8
    stages: int = 3
    groups: int = 2


@triton.jit
def _quant(word, large, b: tl.constexpr, ZERO: tl.constexpr):
    """Byte b of a word less ZERO, float32: as the last bits of `large`, 2^23, by one instruction, and a subtraction."""
    if INTERPRETED:
        return (((word >> (8 * b)) & 255) - ZERO).to(tl.float32)
    code: tl.constexpr = f"prmt.b32 $0, $1, $2, {0x7440 + b};"
    return tl.inline_asm_elementwise(code, "=r,r,r", [word, large], dtype=tl.float32, is_pure=True, pack=1) - (8388608.0 + ZERO)


@triton.jit
def _four(word, large, scale, offset, MINIMUM: tl.constexpr, ZERO: tl.constexpr):
    """The weights of the four bytes of a word, float32."""
    if MINIMUM:
        return (_quant(word, large, 0, 0) * scale + offset, _quant(word, large, 1, 0) * scale + offset,
                _quant(word, large, 2, 0) * scale + offset, _quant(word, large, 3, 0) * scale + offset)  # fmt: skip
    else:
        return (_quant(word, large, 0, ZERO) * scale, _quant(word, large, 1, ZERO) * scale, _quant(word, large, 2, ZERO) * scale,
                _quant(word, large, 3, ZERO) * scale)  # fmt: skip


@triton.jit
def _eight(words, stride, rows, mask, g, j: tl.constexpr, large, scale, offset, BITS: tl.constexpr, BLOCK: tl.constexpr,
           MINIMUM: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr):
    """Elements 8 j .. 8 j + 7 of a group."""
    low, high = octet(words, stride, rows, mask, g, j, BITS, BLOCK, LEVELS)
    return _four(low, large, scale, offset, MINIMUM, ZERO) + _four(high, large, scale, offset, MINIMUM, ZERO)


@triton.jit
def _side_by_side(v, N: tl.constexpr):
    """N tensors as one of N elements more for each of theirs, in dimensions of 2: a thread's own, in their order."""
    if N == 1:
        return v[0]
    else:
        return tl.join(_side_by_side(v[0::2], N // 2), _side_by_side(v[1::2], N // 2))


@triton.jit
def kiln_few(x, words, halves, out, tokens, n, k, stride, halves_stride, BITS: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr,
             WORDS: tl.constexpr, HALVES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr,
             TOKENS: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """x [tokens, k] bfloat16, at most TOKENS, times the packed matrix [n, k], of which a program has ROWS rows and 1 / SPLITS of K: out
    [tokens, n] bfloat16, or float32 [SPLITS, tokens, n]. Grid (row tiles, SPLITS). A warp unpacks groups of 32, a thread four rows."""
    IN_BLOCK: tl.constexpr = BLOCK // 32
    TWICE: tl.constexpr = SCALES == "int8" or SCALES == "six" or SCALES == "four"
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row[None, :]
    mask = None if EVEN else rows < n
    token = tl.arange(0, TOKENS)
    e = tl.arange(0, 32 * GROUPS)
    i = tl.arange(0, GROUPS)[:, None]
    steps = tl.cdiv(k // 32, GROUPS * SPLITS)
    first = tl.program_id(1) * steps * GROUPS
    large = (tokens >> 31) + 0x4B000000  # not known to the assembler, which would fetch a constant for every quant
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    for at in tl.range(first, tl.minimum(first + steps * GROUPS, k // 32), GROUPS):
        if IN_BLOCK >= GROUPS:
            block = at // IN_BLOCK
            g = at % IN_BLOCK + i
        else:
            block = (at + i) // IN_BLOCK
            g = (at + i) % IN_BLOCK
        base = words + block.to(tl.int64) * WORDS * stride
        half = halves + (block // 2 if SCALES == "e8m0" else block).to(tl.int64) * HALVES * halves_stride
        scaled = at + i if SCALES == "e8m0" else g
        scale, offset = scale_and_offset(base, half, stride, halves_stride, rows, mask, scaled, 0, BITS, BLOCK, MINIMUM, SCALES)
        scale1 = scale
        offset1 = offset
        if TWICE:
            scale1, offset1 = scale_and_offset(base, half, stride, halves_stride, rows, mask, g, 1, BITS, BLOCK, MINIMUM, SCALES)
        a = _eight(base, stride, rows, mask, g, 0, large, scale, offset, BITS, BLOCK, MINIMUM, ZERO, LEVELS)
        b = _eight(base, stride, rows, mask, g, 1, large, scale, offset, BITS, BLOCK, MINIMUM, ZERO, LEVELS)
        c = _eight(base, stride, rows, mask, g, 2, large, scale1, offset1, BITS, BLOCK, MINIMUM, ZERO, LEVELS)
        d = _eight(base, stride, rows, mask, g, 3, large, scale1, offset1, BITS, BLOCK, MINIMUM, ZERO, LEVELS)
        w = tl.permute(_side_by_side(a + b + c + d, 32), (0, 2, 3, 4, 5, 6, 1))
        w = tl.reshape(w, [GROUPS * 32, ROWS]).to(tl.bfloat16)
        some = tl.load(x + token[:, None] * k + (32 * at + e)[None, :], (token < tokens)[:, None], other=0.0)
        acc = tl.dot(some, w, acc)
    to = token[:, None] * n + rows
    keep = (token < tokens)[:, None] if EVEN else (token < tokens)[:, None] & mask
    if SPLITS > 1:
        out += tl.program_id(1).to(tl.int64) * tokens * n
    tl.store(out + to, acc.to(out.dtype.element_ty), keep)


@triton.jit
def kiln_few_sum(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of SPLITS float32 parts, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + at, at < size, other=0.0)
    for i in tl.static_range(1, SPLITS):
        total += tl.load(parts + tl.cast(size, tl.int64) * i + at, at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


SUM_BLOCK = 1024


def tokens_of(tokens: int) -> int:
    return max(64, triton.next_power_of_2(tokens))  # a warp group's tile has 64 rows


def constants(block_type: str, n: int, tokens: int, tile: Tile) -> dict[str, Any]:
    return format_constants(block_type) | {"ROWS": tile.rows, "TOKENS": tokens_of(tokens), "SPLITS": tile.splits, "GROUPS": tile.groups,
                                           "EVEN": n % tile.rows == 0}  # fmt: skip


def few(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, block_type: str, tile: Tile) -> torch.Tensor:
    """x [T, K] bfloat16 -> [T, N] bfloat16."""
    n, (tokens, k) = words.shape[2], x.shape
    if k // 32 % tile.groups:
        raise ValueError(f"K {k} in steps of {tile.groups} groups of 32")
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    parts = out if tile.splits == 1 else torch.empty(tile.splits, tokens, n, dtype=torch.float32, device=x.device)
    kernel(kiln_few)[(triton.cdiv(n, tile.rows), tile.splits)](
        x, words, halves, parts, tokens, n, k, words.stride(1), halves.stride(1), **constants(block_type, n, tokens, tile),
        num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
    if tile.splits > 1:
        kernel(kiln_few_sum)[(triton.cdiv(tokens * n, SUM_BLOCK),)](parts, out, tokens * n, SPLITS=tile.splits, BLOCK=SUM_BLOCK)
    return out


def candidates(n: int) -> list[Tile]:
    """Those that give the 132 multiprocessors something to do each."""
    forms = ((256, 8, 2, 4), (128, 8, 2, 8), (128, 4, 2, 4), (128, 8, 3, 8), (256, 8, 3, 4), (128, 4, 3, 4), (256, 8, 2, 8), (128, 4, 1, 4))
    tiles = [Tile(rows, splits, warps, stages, groups) for splits in (1, 2, 3, 4, 6) for rows, warps, stages, groups in forms]
    return [tile for tile in tiles if 100 <= triton.cdiv(n, tile.rows) * tile.splits <= 1400]


def compiled(block_type: str, n: int, tokens: int, tile: Tile, target: str = "sm_90") -> Any:
    """A candidate for a target, which need not be there."""
    sm = gpu_targets()[target]
    types = {"x": "*bf16", "words": "*i32", "halves": "*fp16", "out": "*bf16" if tile.splits == 1 else "*fp32"}
    types |= dict.fromkeys(("tokens", "n", "k", "stride", "halves_stride"), "i32")
    fixed = constants(block_type, n, tokens, tile)
    aligned = ("x", "words", "halves", "out", "n", "k", "stride", "halves_stride")
    attributes = {(kiln_few.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    with compiling_for(sm):
        source = ASTSource(kiln_few, types | dict.fromkeys(fixed, "constexpr"), fixed, attributes)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        return triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)


def seconds(call: Callable[[], Any], least: float = 0.02) -> float:
    """Of a call, in a CUDA graph that is replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < least:
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        count += 5
    return (time.perf_counter() - began) / count


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def measured(tokens: int, block_type: str, n: int, k: int, until: float, g: torch.Generator) -> dict[str, Any]:
    """The best of the candidates that could be timed `until` then, one at least, and what is done now."""
    words, halves = packed(block_type, n, k, g)
    x = torch.randn(tokens, k, generator=g, device="cuda").bfloat16()
    expected = x.float() @ dequantize(block_type, words, halves)
    now = seconds(lambda: torch.ops.kiln.quantized_linear(x, words, halves, block_type))  # what prefill does
    found: list[tuple[float, Tile]] = []
    for tile in candidates(n):
        if found and time.monotonic() > until:
            break
        call = functools.partial(few, x, words, halves, block_type, tile)
        try:
            if (error := off(call(), expected)) > LIMIT:
                raise SystemExit(f"{block_type} {n} x {k}, {tokens} tokens, {tile}: relative error {error}")
            found.append((seconds(call, 0.01), tile))
        except triton.runtime.errors.OutOfResources:
            continue
    found.sort(key=lambda one: one[0])
    took, tile = found[0]
    size = n * k // LAYOUTS[block_type].block * LAYOUTS[block_type].block_bytes
    row = {"tokens": tokens, "type": block_type, "n": n, "k": k, "us": 1e6 * took, "now_us": 1e6 * now, "gb_s": size / took / 1e9}
    return row | {"tile": dataclasses.asdict(tile), "tried": [(round(1e6 * t, 1), *dataclasses.astuple(tile)) for t, tile in found]}


def attention(tokens: int, depth: int, g: torch.Generator) -> dict[str, Any]:
    """A layer's of the 31B behind `depth` keys, by splits; those of one split are what is done now."""
    h, target = GEMMA4_31B.full, current_target()
    slots, pos = depth + tokens, torch.arange(depth, depth + tokens, device="cuda")
    q, k, v = (torch.randn(tokens, heads, h.dim, generator=g, device="cuda").bfloat16() for heads in (h.queries, h.kv, h.kv))
    codes = [torch.randint(-(1 << 15), 1 << 15, (h.kv, slots, h.dim // 4), generator=g, device="cuda", dtype=torch.int16) for _ in range(2)]
    scales = [torch.rand(h.kv, slots, generator=g, device="cuda").half() for _ in range(2)]
    rings = [torch.randn(EXACT_WINDOW, h.kv, h.dim, generator=g, device="cuda").bfloat16() for _ in range(2)]
    center = torch.zeros(h.kv, h.dim, device="cuda")
    table = prefill.PIECE_TILES[target.sm, 512]
    found, expected = dict[str, float](), None
    for splits in (1, 2, 4, 8):
        prefill.PIECE_TILES[target.sm, 512] = dataclasses.replace(table, splits=splits, few=target.sm_count // 2)
        caches = codes[0], scales[0], codes[1], scales[1]
        call = functools.partial(torch.ops.kiln.tq4_attention, q, k, v, *caches, *rings, pos, None, 0, center)
        out = call()
        expected = out.float() if expected is None else expected
        if (error := off(out, expected)) > LIMIT:
            raise SystemExit(f"attention of {tokens} tokens behind {depth}, {splits} splits: {error} off one split")
        found[str(splits)] = 1e6 * seconds(call)
    prefill.PIECE_TILES[target.sm, 512] = table
    return {"tokens": tokens, "depth": depth, "us": found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.few_tokens", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=60, help="seconds of candidates")
    parser.add_argument("--compile-only", action="store_true")
    given = parser.parse_args()
    shapes = list(dict.fromkeys((*SLIDING, *GLOBAL)))
    if given.compile_only:
        for (block_type, n, _), tile, tokens in itertools.product((shapes[0], shapes[3]), candidates(5376)[:8], TOKENS):
            print(block_type, tokens, tile, compiled(block_type, n, tokens, tile).metadata.shared, flush=True)
        return
    g = torch.Generator("cuda").manual_seed(1)
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "shapes": []}
    record["attention"] = []
    for tokens, depth in itertools.product((16, 48, 96), (8192, 32768, 130000)):
        record["attention"].append(attention(tokens, depth, g))
        print(json.dumps(record["attention"][-1]), flush=True)
    began, todo = time.monotonic(), list(itertools.product(TOKENS, shapes))
    for i, (tokens, shape) in enumerate(todo, 1):
        row = measured(tokens, *shape, began + given.budget * i / len(todo), g)
        record["shapes"].append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "tried"}), flush=True)
    layers = [matrix for layer in LAYERS for matrix in layer] * REPEATS
    for tokens in TOKENS:
        by_shape = {(row["type"], row["n"], row["k"]): row for row in record["shapes"] if row["tokens"] == tokens}
        total = {key: sum(by_shape[matrix][key] for matrix in layers) / 1e3 for key in ("us", "now_us")}
        record[f"all layers, {tokens} tokens"] = {"ms": total["us"], "now_ms": total["now_us"]}
        print(f"{tokens} tokens, all layers: {total['us']:.2f} ms, now {total['now_us']:.2f}", flush=True)
    if given.out:
        write_text(given.out, json.dumps(record) + "\n", "the record")


if __name__ == "__main__":
    main()
