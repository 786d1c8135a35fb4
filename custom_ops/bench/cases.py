"""What `python -m kiln.custom_ops.bench` times: an op at the shapes of a model, with its reference and what it must move and compute.

Here the ops that read weights or logits; those that read caches are in `attention_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kiln.custom_ops import (
    geometry,
    ops,  # noqa: F401
)
from kiln.custom_ops.geometry import CONTEXT, EPS, EXACT_WINDOW, Geometry, Heads, Matrix
from kiln.custom_ops.markers import rms_norm
from kiln.custom_ops.step import add_norm, sample
from kiln.custom_ops.weights import embedding, fixed_point, linear
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.gemv import COUNTERS
from kiln.custom_ops.weights.layouts import dequantize

Tensors = tuple[torch.Tensor, ...]
kiln = torch.ops.kiln

REFERENCE_ROWS = 8192  # of a matrix dequantized at a time
ROUNDED = 6e-3  # relative error that rounding to bfloat16 on the way allows
FIXED = 1e-4  # that two bytes an activation do
TERMS = 2  # bytes of an activation of a decode step
EXACT = 0.0


@dataclass(frozen=True)
class Case:
    """One call of one op. `arguments` draws its tensors on the generator's device, `call` is what is timed.

    `result` takes what `call` returned, and the arguments, to the tensor that is compared with `reference(*arguments)`.
    `copy` makes the arguments of another call that finds nothing of this one in the cache.
    """

    op: str
    shape: str
    bytes: int  # that must cross memory, each once
    flops: int
    limit: float  # relative error allowed
    arguments: Callable[[torch.Generator], Tensors]
    call: Callable[..., Any]
    reference: Callable[..., torch.Tensor]
    copy: Callable[[Tensors, torch.Generator], Tensors]
    result: Callable[[Any, Tensors], torch.Tensor] = lambda out, arguments: out
    group: str = ""  # sums are shown for each group, `count` calls of each case
    count: int = 0

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


@dataclass(frozen=True)
class Workload:
    """What is timed of a model of one mix."""

    matrices: tuple[Matrix, ...]
    head: Matrix
    sliding: Heads | None
    window: int
    full: Heads  # the global layers
    depths: tuple[int, ...]  # of decode; every second one, and the last, of prefill
    chunks: tuple[int, ...]  # tokens of a prefill call; the last one is used for attention
    exact_window: int = EXACT_WINDOW  # of the TQ4 caches
    together: tuple[int, ...] = (2, 4, 8)  # tokens of a step of several


def workload(model: Geometry, mix: str) -> Workload:
    *matrices, head = model.matrices(mix)
    dense = tuple(m for m in matrices if m.n * m.k)  # where all of a layer are experts
    return Workload(dense, head, model.sliding, model.window, model.full, (128, 512, 2048, 8192, 32768, CONTEXT), (512, 2048))


GEMMA4_31B = workload(geometry.GEMMA4_31B, "q4_k_m")
PLAIN_STEP = "attention and cache writes of a decode step, global layers apart"
STEP = "norms and sliding attention of a fused decode step"


def clone(*which: int) -> Callable[[Tensors, torch.Generator], Tensors]:
    """A copy that shares all arguments but these."""
    return lambda arguments, g: tuple(t.clone() if i in which else t for i, t in enumerate(arguments))


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=g.device).normal_(0, scale, generator=g)


def packed(block_type: str, n: int, k: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words and halves of a matrix [n, k]: any bits are a valid block."""
    layout = LAYOUTS[block_type]
    blocks = k // layout.block
    words = torch.randint(-(1 << 31), 1 << 31, (blocks, layout.words, n), generator=g, device=g.device, dtype=torch.int32)
    halves = torch.empty((blocks, layout.halves, n), dtype=torch.float16, device=g.device).uniform_(0, 1e-2, generator=g)
    if layout.scales == "e8m0":
        return words, torch.randint(118, 124, (blocks, 1, n), generator=g, device=g.device, dtype=torch.int16) * 257
    return words, halves if layout.halves_dtype == "float16" else halves.view(torch.int16)


# ---- matmuls and rows of packed matrices ----


def matmul_case(op: str, m: Matrix, tokens: int, dtype: torch.dtype, limit: float, group: str) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        return (normal(g, tokens, m.k, dtype=dtype), *packed(m.block_type, m.n, m.k, g))

    def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        parts = ((words[:, :, i : i + REFERENCE_ROWS], halves[:, :, i : i + REFERENCE_ROWS]) for i in range(0, m.n, REFERENCE_ROWS))
        return torch.cat([x.float() @ dequantize(m.block_type, *part) for part in parts], 1)

    return Case(
        op=f"{op} {m.block_type}",
        shape=f"[{tokens}, {m.k}] x {m.n}",
        bytes=linear.bytes_moved(m.block_type, tokens, m.n, m.k, dtype.itemsize),
        flops=linear.flops(tokens, m.n, m.k),
        limit=limit,
        arguments=arguments,
        call=lambda x, words, halves: kiln.quantized_linear(x, words, halves, m.block_type),
        reference=reference,
        copy=clone(1, 2),
        group=group,
        count=m.count,
    )


def fixed_bytes(count: int) -> int:
    """Bytes of `count` activations in fixed point."""
    extent = fixed_point.extent_of(count)
    return 4 * (count // extent) * fixed_point.extent_words(TERMS, extent)


def of_tokens(tokens: int) -> str:
    """What a group's name of one token is followed by for several; see `harness.group_lines`."""
    return f", {tokens} tokens" if tokens > 1 else ""


def fixed_case(m: Matrix, tokens: int = 1, at_once: int | None = None) -> Case:
    """The matmul as a fused decode step does it: after a norm, and gated, left in parts to attention or the head's; or before a norm.

    at_once: of the activations, see `fixed_point.extent_of`.
    """
    end = {"glu": "fixed_glu", "sum": "fixed_linear", "squares": "fixed_linear_squares", "split": "fixed_partials"}[m.end]

    def arguments(g: torch.Generator) -> Tensors:
        x = fixed_point.quantize(normal(g, tokens, m.k, dtype=torch.float32), TERMS, at_once)
        pieces = m.k // add_norm.PIECE
        squares = normal(g, *((pieces,) if tokens == 1 else (tokens, pieces)), dtype=torch.float32).square()
        return (x, *packed(m.block_type, m.n, m.k, g), torch.zeros(COUNTERS, dtype=torch.int32, device=g.device), squares)

    def call(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, counters: torch.Tensor, squares: torch.Tensor) -> Any:
        if end == "fixed_partials":
            return kiln.fixed_partials(x, words, halves, m.block_type, squares, EPS, alone=tokens == 1)
        scaled = () if end == "fixed_linear_squares" else (squares, EPS)
        return getattr(kiln, end)(x, words, halves, m.block_type, counters, *scaled, alone=tokens == 1)

    def reference(x: torch.Tensor, words: torch.Tensor, halves: torch.Tensor, counters: torch.Tensor,
                  squares: torch.Tensor) -> torch.Tensor:
        parts = ((words[:, :, i : i + REFERENCE_ROWS], halves[:, :, i : i + REFERENCE_ROWS]) for i in range(0, m.n, REFERENCE_ROWS))
        y = torch.cat([fixed_point.dequantize(x) @ dequantize(m.block_type, *part) for part in parts], 1)
        if end == "fixed_linear_squares":
            return torch.cat((y, y.square().sum(1, keepdim=True)), 1)
        y = y * add_norm.root(squares, m.k, EPS)
        if end != "fixed_glu":
            return y
        gate, value = y.chunk(2, -1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * value

    def result(out: Any, arguments: Tensors) -> torch.Tensor:
        if end == "fixed_linear_squares":
            return torch.cat((out[0], out[1].sum(-1).view(tokens, 1)), 1)
        return fixed_point.dequantize(out) if end == "fixed_glu" else out.sum(0).view(tokens, m.n) if end == "fixed_partials" else out

    written = fixed_bytes(m.n // 2) if end == "fixed_glu" else 4 * m.n
    return Case(
        op=f"{end} {m.block_type}",
        shape=f"{m.k} x {m.n}{of_tokens(tokens)}",
        bytes=linear.bytes_moved(m.block_type, 0, m.n, m.k) + tokens * (fixed_bytes(m.k) + written),
        flops=linear.flops(tokens, m.n, m.k),
        limit=FIXED if end == "fixed_glu" else 1e-5,
        arguments=arguments,
        call=call,
        reference=reference,
        copy=clone(1, 2),
        result=result,
        group=f"matmuls of a fused decode step{of_tokens(tokens)}",
        count=m.count,
    )


def fixed_cases(work: Workload) -> list[Case]:
    return [fixed_case(m) for m in (*work.matrices, work.head)]


def fixed_rows_cases(work: Workload) -> list[Case]:
    return [fixed_case(m, tokens) for tokens in work.together for m in (*work.matrices, work.head)]


def add_norm_case(work: Workload) -> Case:
    d = work.head.k

    def arguments(g: torch.Generator) -> Tensors:
        vectors = [normal(g, *shape, dtype=torch.float32) for shape in ((1, d), (1, d), (d,), (d,))]
        squares = vectors[1].square().unflatten(1, (-1, 64)).sum((0, 2))  # as the matmul before leaves them
        return (*vectors, torch.full((1,), 0.5, device=g.device), squares)

    def call(x: torch.Tensor, branch: torch.Tensor, post_weight: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
             squares: torch.Tensor) -> Tensors:
        return kiln.add_norm(x, branch, squares, post_weight, scale, weight, EPS, TERMS)

    def result(out: Tensors, arguments: Tensors) -> torch.Tensor:
        return torch.cat((out[0], fixed_point.dequantize(out[1]) * add_norm.root(out[2], d, EPS)))

    def reference(x: torch.Tensor, branch: torch.Tensor, post_weight: torch.Tensor, weight: torch.Tensor,
                  scale: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        stream = (x.double() + rms_norm(branch, post_weight, EPS, torch.float64)) * scale
        return torch.cat((stream, rms_norm(stream, weight, EPS, torch.float64)))

    return Case(
        op="add_norm",
        shape=f"{d}",
        bytes=4 * 5 * d + fixed_bytes(d),
        flops=0,
        limit=FIXED,
        arguments=arguments,
        call=call,
        reference=reference,
        copy=clone(0, 1, 2, 3),
        result=result,
        group=STEP,
        count=2 * (work.full.layers + (work.sliding.layers if work.sliding else 0)),
    )


def gemv_cases(work: Workload) -> list[Case]:
    """Every matrix times one token, not fused; the head's activations are float32."""
    group = "matmuls of a decode step"
    cases = [matmul_case("gemv", m, 1, torch.bfloat16, ROUNDED, group) for m in work.matrices]
    return [*cases, matmul_case("gemv", work.head, 1, torch.float32, 1e-5, group)]


def linear_cases(work: Workload) -> list[Case]:
    return [
        matmul_case("linear", m, tokens, torch.bfloat16, ROUNDED, f"matmuls of {tokens} tokens, the head apart")
        for tokens in work.chunks
        for m in work.matrices
    ]


def embedding_case(m: Matrix, tokens: int) -> Case:
    def ids(g: torch.Generator) -> torch.Tensor:
        return torch.randint(m.n, (tokens,), generator=g, device=g.device)

    return Case(
        op=f"embedding {m.block_type}",
        shape=f"{tokens} of {m.n}, {m.k}",
        bytes=tokens * (m.k // LAYOUTS[m.block_type].block * LAYOUTS[m.block_type].block_bytes + 4 * m.k),
        flops=0,
        limit=EXACT,
        arguments=lambda g: (ids(g), *packed(m.block_type, m.n, m.k, g)),
        call=lambda rows, words, halves: kiln.quantized_embedding(rows, words, halves, m.block_type),
        reference=lambda rows, words, halves: embedding.reference(rows, words, halves, m.block_type),
        copy=lambda arguments, g: (ids(g), *arguments[1:]),  # other rows of the same table
    )


# ---- logits ----


def sample_case(vocab: int, label: str, temperature: float, top_k: int, top_p: float) -> Case:
    def arguments(g: torch.Generator) -> Tensors:
        values = ((temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32), (7, torch.int64), (100, torch.int64))
        limits = (torch.tensor([value], dtype=dtype, device=g.device) for value, dtype in values)
        return (normal(g, 1, vocab, dtype=torch.float32, scale=3.0), *limits)

    return Case(
        op="sample",
        shape=f"{label} of {vocab}",
        bytes=4 * vocab,
        flops=0,
        limit=EXACT,
        arguments=arguments,
        call=kiln.sample,
        reference=sample.reference,
        copy=clone(0),
        group=PLAIN_STEP if label == "greedy" else "",
        count=1,
    )
