"""Choosing the next token on the device: greedy, or temperature, top-k, top-p and Gumbel noise from a counter-based hash.

- Order: temperature, then top-k, then top-p over what top-k left.
- Tokens as probable as the last one kept are kept too, by top-k and by top-p: the kept set is {logit >= cut}.
- Probability mass is counted in integers, floor(2^40 exp((logit - max) / temperature)), so that a sum does not depend on its order.
  A token more than 27.8 nats below the best has mass 0; the noise, within -2.9 .. 16.7, could not make it win either.
- The noise depends on (seed, position, token id) alone: the same seed gives the same tokens on every target.
"""

from __future__ import annotations

from itertools import product

import torch
import triton

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget
from kiln.custom_ops.step.sample_kernels import LEAST_HEAT, kiln_choose, kiln_row_maxima, kiln_settle_bins, kiln_weigh_bins

CHUNK, WARPS = 1024, 4  # tokens and warps of a program that passes over the vocabulary
TILE, CHOOSE_WARPS = 512, 8  # listed tokens taken at a time, and warps, of the one program that chooses
BINS = 64
MASS_ONE = 1 << 40  # the mass of the best token; times 2^18 tokens it is far below 2^63
_LOW = 0xFFFFFFFF


def hash32(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers that mixes every bit into every other. int64 in 0 .. 2^32 - 1, and so is the result."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW
    x = (x ^ (x >> 15)) * 0x735A2D97 & _LOW  # both multipliers are below 2^31: no product overflows int64
    return x ^ (x >> 15)


def noise_bits(seed: torch.Tensor, pos: torch.Tensor, tokens: int) -> torch.Tensor:
    """32 random bits for each token id, int64 [tokens], from seed [1] and pos [1]."""
    key = hash32((seed & _LOW) ^ 0x1E3779B9)
    key = hash32(key ^ (seed >> 32 & _LOW))
    key = hash32(key ^ (pos & _LOW))
    # The key goes in twice, or else two streams would be permutations of each other.
    return hash32(hash32(torch.arange(tokens, device=seed.device) ^ key) ^ key)


def reference(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor,
              pos: torch.Tensor) -> torch.Tensor:
    """The op in plain torch, a row at a time; arguments as `sample`."""
    if logits.shape[0] > 1:
        rows = zip(*(t.split(1) for t in (logits, temperature, top_k, top_p, seed, pos)), strict=True)
        return torch.cat([reference(*row) for row in rows])
    row = logits[0]  # [V]
    vocab = row.shape[0]
    rate = 1.0 / torch.where(temperature > 0, temperature, 1.0).clamp(min=LEAST_HEAT.value)

    ordered = torch.sort(row, descending=True).values
    k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).to(torch.int64)
    in_top_k = ordered >= ordered[k - 1]
    mass = (torch.exp((ordered - ordered[0]) * rate) * MASS_ONE).to(torch.int64)
    mass = torch.where(in_top_k, mass, 0)
    above = torch.cumsum(mass, 0) - mass  # the mass of the more probable tokens
    target = (mass.sum() * top_p.to(torch.float64)).to(torch.int64).clamp(min=1)
    in_top_p = (above < target) | (top_p >= 1)
    cut = torch.where(in_top_k & in_top_p, ordered, ordered[0]).min()

    uniform = ((noise_bits(seed, pos, vocab) >> 9).to(torch.float32) + 0.5) * 2.0**-23  # exact, never 0 or 1
    score = (row - ordered[0]) * rate - torch.log(-torch.log(uniform))
    sampled = torch.where(row >= cut, score, -torch.inf).argmax()
    # the maximum is a number exactly where no logit is NaN or +inf and one is finite
    return torch.where(torch.isfinite(row.amax()), torch.where(temperature > 0, sampled, row.argmax()), -1)


@kernel_op("kiln::sample", mutates_args=())
def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor,
           pos: torch.Tensor) -> torch.Tensor:
    """A token id for each row, int64 [T], from logits [T, V] float32; -inf forbids a token. -1: a logit is NaN or +inf, or none is finite.

    temperature [T] float32: 0 or less takes the most probable token, of equals the lowest id; none counts as less than LEAST_HEAT.
    top_k [T] int32: 0 or less, or V or more, is off. top_p [T] float32: 1 or more is off; else the fewest most probable tokens
    whose mass reaches it, at least one. seed [T] int64; pos [T] int64, the position the logits belong to.
    None of them is read on the host, and no row depends on the others. Raises ValueError when a shape or dtype is another.
    """
    if logits.dim() != 2 or not logits.shape[0] or logits.dtype != torch.float32:
        raise ValueError(f"sample: logits is {logits.dtype} {tuple(logits.shape)}; expected float32 [T, V]")
    rows, vocab = logits.shape
    for name, value, dtype in (("temperature", temperature, torch.float32), ("top_k", top_k, torch.int32), ("top_p", top_p, torch.float32),
                               ("seed", seed, torch.int64), ("pos", pos, torch.int64)):
        if value.dtype != dtype or value.shape != (rows,):
            raise ValueError(f"sample: {name} is {value.dtype} {tuple(value.shape)}; expected {dtype} ({rows}{',' if rows == 1 else ''})")
    if not use_triton(logits):
        return reference(logits, temperature, top_k, top_p, seed, pos)
    device = logits.device
    chunks = triton.cdiv(vocab, CHUNK)
    best, sampled, masses, keys = (torch.empty(rows * n, dtype=torch.int64, device=device) for n in (chunks, chunks, BINS, vocab))
    counts, listed, tokens = (torch.empty(rows * n, dtype=torch.int32, device=device) for n in (BINS, 1, vocab))
    out = torch.empty(rows, dtype=torch.int64, device=device)
    logits = logits.contiguous()
    whole = {"BINS": BINS, "CHUNKS": triton.next_power_of_2(chunks), "MANY": rows > 1}
    limits = (temperature, top_k, top_p)
    kernel(kiln_row_maxima)[(chunks, rows)](logits, best, counts, masses, listed, vocab, BINS=BINS, CHUNK=CHUNK, MANY=rows > 1,
                                            num_warps=WARPS)
    kernel(kiln_weigh_bins)[(chunks, rows)](logits, best, *limits, counts, masses, vocab, chunks, **whole, CHUNK=CHUNK, num_warps=WARPS)
    kernel(kiln_settle_bins)[(chunks, rows)](logits, best, *limits, seed, pos, counts, masses, sampled, listed, keys, tokens, vocab, chunks,
                                             **whole, CHUNK=CHUNK, num_warps=WARPS)
    kernel(kiln_choose)[(1, rows)](best, *limits, seed, pos, counts, masses, sampled, listed, keys, tokens, out, vocab, chunks, **whole,
                                   TILE=TILE, num_warps=CHOOSE_WARPS)
    return out


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """The four launches for the model's vocabulary."""
    types = {
        "logits": "*fp32", "best": "*i64", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "seed": "*i64", "pos": "*i64",
        "counts": "*i32", "masses": "*i64", "sampled": "*i64", "listed": "*i32", "keys": "*i64", "tokens": "*i32", "out": "*i64",
        "vocab": "i32", "chunks": "i32",
    }
    vocab = model.vocab
    every = {"BINS": BINS, "CHUNK": CHUNK, "CHUNKS": vocab // CHUNK, "TILE": TILE}
    cases = []
    fns = ((kiln_row_maxima, WARPS), (kiln_weigh_bins, WARPS), (kiln_settle_bins, WARPS), (kiln_choose, CHOOSE_WARPS))
    for (fn, warps), many in product(fns, (False, True)):
        constants = every | {"MANY": many}
        signature = {name: types[name] for name in fn.arg_names if name in types}
        constexprs = {name: constants[name] for name in fn.arg_names if name in constants}
        name = f"{fn.__name__} {vocab}{', several rows' if many else ''}"
        cases.append(KernelCase(name, fn, signature, constexprs, {"num_warps": warps}, aligned=("vocab", "chunks")))
    return cases
