"""All that a layer of a decode step does between two attentions, as one persistent kernel (`chain.cu`): four matmuls or five.

The output's projection, gates and values, down, and the next layer's projections, of one matrix or of two of different types; between
them norms, residual stream and activation. Weights depend on nothing, so each warp has the next ones on their way across the boundaries of
matmuls, and before it waits for the attention. Between two matmuls all thread blocks meet, so all of them have to run at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.chain.cut import BITS, MOST_MATMULS, Cut, cut_for, flag_words, follows
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, MAX_ROWS, Geometry
from kiln.custom_ops.gpu.cuda_source import cuda_source, made_from
from kiln.custom_ops.gpu.early import early, waits
from kiln.custom_ops.gpu.launch import kernel
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget, current_target
from kiln.custom_ops.markers import GATED
from kiln.custom_ops.step import add_norm
from kiln.custom_ops.weights import fixed_point, gemv
from kiln.custom_ops.weights.fixed_point import WIDE
from kiln.custom_ops.weights.gemv import GLU_ENDS
from kiln.custom_ops.weights.packed import check_weight

SOURCE_FILE = "chain/chain.cu"
TERMS = 2  # bytes of an activation


def reference(x: torch.Tensor, stream: torch.Tensor, words: Sequence[torch.Tensor], halves: Sequence[torch.Tensor], types: Sequence[str],
              post0: torch.Tensor | None, scale0: torch.Tensor | None, weight0: torch.Tensor, post1: torch.Tensor | None,
              scale1: torch.Tensor | None, weight1: torch.Tensor, eps: float,
              activation: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The op in plain torch: the references of the ops that it stands for, one after another; arguments as `matmul_chain`."""
    weights = list(zip(words, halves, types, strict=True))

    def added(to: torch.Tensor, y: torch.Tensor, post: torch.Tensor | None, scale: torch.Tensor | None, weight: torch.Tensor) -> tuple:
        squares = None if post is None else gemv.squares_of(y)
        return add_norm.reference(to, y, squares, post, scale, weight, eps, TERMS)

    between, normed, squares = added(stream, gemv.reference(x, *weights[0], None, eps), post0, scale0, weight0)
    gate, value = gemv.reference(normed, *weights[1], squares, eps).chunk(2, dim=-1)
    inner = fixed_point.quantize(GATED[activation](gate, value), TERMS)
    after, normed, squares = added(between, gemv.reference(inner, *weights[2], None, eps), post1, scale1, weight1)
    return after, [gemv.reference(normed, *weight, squares, eps).unsqueeze(0) for weight in weights[3:]]


@waits(*(f"{plane}{i}" for i in range(MOST_MATMULS) for plane in ("words", "halves")))
@triton.jit
def kiln_chain(given, stream_in, between, stream_out, post0, scale0, weight0, post1, scale1, weight1, words0, halves0, words1, halves1,
               words2, halves2, words3, halves3, words4, halves4, parts, rows, flags, out, out_more, SOURCE: tl.constexpr):
    """The stub of `chain.cu`. Grid (BLOCKS)."""
    made_from(SOURCE)
    tl.store(between, 0)
    tl.store(stream_out, 0)
    tl.store(parts, 0)
    tl.store(rows, 0)
    tl.store(flags, 0)
    tl.store(out, 0)
    tl.store(out_more, 0)


def source(cut: Cut, d: int, eps: float, post: bool, silu: bool, scales: tuple[bool, bool], target: GpuTarget) -> str:
    """The constant SOURCE of a launch."""
    return cuda_source(SOURCE_FILE, threads=cut.threads, shared=cut.shared, EARLY=early(target), WIDTH=d, EPS=eps,
                       POST=post, SILU=silu, SCALE0=scales[0], SCALE1=scales[1], **cut.defines)  # fmt: skip


def matrices_of(words: Sequence[torch.Tensor], types: Sequence[str]) -> list[tuple[int, int, int]]:
    """(n, k, bits) of each."""
    return [(w.shape[2], w.shape[0] * WIDE, BITS[block_type]) for w, block_type in zip(words, types, strict=True)]


def _launch(x, stream, words, halves, types, flags, post0, scale0, weight0, post1, scale1, weight1, eps: float,
            activation: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    (tokens, d), target = stream.shape, current_target()
    cut = cut_for(matrices_of(words, types), tokens, target)
    if flags.numel() < flag_words(len(words)):
        raise ValueError(f"matmul_chain: {flags.numel()} flags; {len(words)} matmuls take {flag_words(len(words))}")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    results = [empty(cut.parts(m), tokens, m.n) for m in cut.matmuls[cut.results :]]
    more = results[1] if results[1:] else empty(1)
    between, after = empty(tokens, d), empty(tokens, d)
    parts, rows = empty(cut.parts_floats), empty(max(cut.rows_words, 1), dtype=torch.int32)
    planes = [plane for pair in zip(words, halves, strict=True) for plane in pair]
    planes += planes[:2] * (MOST_MATMULS - len(words))
    norms = [weight0 if t is None else t for t in (post0, scale0, weight0, post1, scale1, weight1)]
    text = source(cut, d, eps, post0 is not None, activation == "silu", (scale0 is not None, scale1 is not None), target)
    kernel(kiln_chain)[(cut.thread_blocks,)](x, stream, between, after, *norms, *planes, parts, rows, flags, results[0], more, SOURCE=text)
    return after, results


def _check(x: torch.Tensor, stream: torch.Tensor, words: Sequence[torch.Tensor], halves: Sequence[torch.Tensor], types: Sequence[str],
           norms: dict[str, torch.Tensor | None], activation: str) -> None:
    if activation not in GLU_ENDS:
        raise ValueError(f"matmul_chain: activation {activation!r}; expected {' or '.join(GLU_ENDS)}")
    if len({len(words), len(halves), len(types)}) > 1 or len(words) not in (4, MOST_MATMULS) or not set(types) <= set(BITS):
        counts = f"{len(words)} words, {len(halves)} halves, types {', '.join(types)}"
        raise ValueError(f"matmul_chain: {counts}; expected 4 or {MOST_MATMULS} of each, of {' or '.join(BITS)}")
    for w, h, block_type in zip(words, halves, types, strict=True):
        check_weight("matmul_chain", w, h, block_type)
        if not (w.is_contiguous() and h.is_contiguous()):
            strides = f"words have strides {w.stride()}, halves {h.stride()}"
            raise ValueError(f"matmul_chain: {block_type} {strides}; expected contiguous planes")
    matrices = matrices_of(words, types)
    if not follows(matrices) or any(n % gemv.GROUP for n, _, _ in matrices):
        shapes = ", ".join(f"[{n}, {k}]" for n, k, _ in matrices)
        raise ValueError(f"matmul_chain: matrices {shapes}; expected [D, A], [2 F, D], [D, F], [N, D], rows multiples of {gemv.GROUP}")
    d, k = matrices[0][:2]
    fixed_point.check("matmul_chain", x, k)
    if fixed_point.form(x) != (TERMS, WIDE):
        raise ValueError(f"matmul_chain: x has the form {fixed_point.form(x)}; expected {TERMS} bytes and extents of {WIDE}")
    if stream.dtype != torch.float32 or stream.shape != (x.shape[0], d) or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"matmul_chain: stream is {stream.dtype} {tuple(stream.shape)}, x has {x.shape[0]} tokens; "
                         f"expected float32 [T, {d}] of 1 to {MAX_ROWS}")  # fmt: skip
    optional = ("post0", "post1", "scale0", "scale1")
    wrong = {name: t for name, t in norms.items() if (t is None and name not in optional) or
             (t is not None and (t.dtype != torch.float32 or t.shape != ((1,) if name.startswith("scale") else (d,))))}  # fmt: skip
    if wrong or (norms["post0"] is None) != (norms["post1"] is None):
        shapes = ", ".join(f"{name} {None if t is None else tuple(t.shape)}" for name, t in norms.items())
        raise ValueError(f"matmul_chain: {shapes}; expected float32 ({d},), scales (1,) or none; both post norms or none")


@kernel_op("kiln::matmul_chain", mutates_args=("flags",))
def matmul_chain(x: torch.Tensor, stream: torch.Tensor, words: list[torch.Tensor], halves: list[torch.Tensor], block_types: str,
                 flags: torch.Tensor, post0: torch.Tensor | None, scale0: torch.Tensor | None, weight0: torch.Tensor,
                 post1: torch.Tensor | None, scale1: torch.Tensor | None, weight1: torch.Tensor, eps: float,
                 activation: str = "gelu_tanh") -> list[torch.Tensor]:
    """[stream', parts of W3 y, parts of W4 y], the last where there is a W4, of 1 to 8 tokens:

        between = (stream + RMSNorm(W0 x) * post0) * scale0,   x1 = RMSNorm(between) * weight0
        gate, value = W1 x1,                                   x2 = activation(gate) * value
        stream' = (between + RMSNorm(W2 x2) * post1) * scale1, y = RMSNorm(stream') * weight1

    Without post norms a branch is added as it is. x: T rows in fixed point of two bytes and extents of 256; stream float32 [T, D]; words
    and halves: packed matrices [N, K] of `block_types`, Q4_K or Q6_K with commas between; post and weight float32 [D], scale [1] or None.
    Parts are those of `fixed_partials`: float32 [P, N] of one token, [P, T, N] of several. flags: int32 zeros, `cut.flag_words`; all
    of them are zeros again afterwards. No token's bits depend on the others. ValueError when a shape or type does not fit.
    """
    types = block_types.split(",")
    norms = {"post0": post0, "scale0": scale0, "weight0": weight0, "post1": post1, "scale1": scale1, "weight1": weight1}
    _check(x, stream, words, halves, types, norms, activation)
    if x.is_cuda:
        after, parts = _launch(x, stream, words, halves, types, flags, **norms, eps=eps, activation=activation)
    else:
        after, parts = reference(x, stream, words, halves, types, **norms, eps=eps, activation=activation)
    return [after, *(p.flatten(0, 1) if x.shape[0] == 1 else p for p in parts)]


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """Every distinct chain between two layers of the model as Q4_K_M, of one token, of four and of eight; by day one of four matmuls."""
    pointers = dict.fromkeys(kiln_chain.arg_names[:-1], "*fp32") | {"given": "*i32", "rows": "*i32", "flags": "*i32"}
    pointers |= {f"words{i}": "*i32" for i in range(MOST_MATMULS)} | {f"halves{i}": "*fp16" for i in range(MOST_MATMULS)}
    cases: dict[str, KernelCase] = {}
    layers = model.layer_matrices("q4_k_m")
    for layer, following in pairwise(layers):
        own = {m.name: m for m in layer}
        chain = [own[name] for name in ("attn_output", "ffn_gate_up", "ffn_down")] + [m for m in following if m.end == "split"]
        matrices = [(m.n, m.k, BITS[m.block_type]) for m in chain]
        shown = ", ".join(f"{m.block_type} {m.n}x{m.k}" for m in chain)
        for tokens in (1, 4, 8):
            cut = cut_for(matrices, tokens, target)
            text = source(cut, model.hidden, EPS, model.post_norms, model.activation == "silu", (False, True), target)
            by_day = tokens == 1 and len(chain) < MOST_MATMULS and not any(case.targets for case in cases.values())
            targets = (90,) if by_day else ()
            case = KernelCase(f"chain {shown}, {tokens} tokens", kiln_chain, pointers, {"SOURCE": text}, targets=targets)
            cases.setdefault(text, case)
    return list(cases.values())
