"""The choice of experts: for each token those of the largest probabilities, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.geometry import GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import GpuTarget

MOST_EXPERTS = 1024  # a program has a token's whole row
COUNTED = tl.constexpr(128)  # experts of which each is compared with each; of more, which would spill, the largest are found by turns
WARPS = 4


def reference(logits: torch.Tensor, used: int, renormalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in plain torch; arguments as `route`."""
    rest = torch.softmax(logits, -1)
    number = torch.arange(rest.shape[1], device=rest.device)
    chosen, weights = [], []
    for _ in range(used):
        largest = rest.amax(-1, keepdim=True)
        one = torch.where(rest == largest, number, rest.shape[1] - 1).amin(-1, keepdim=True)  # of NaN the last
        chosen.append(one)
        weights.append(rest.gather(1, one))
        rest = torch.where(number == one, -1.0, rest)
    weight = torch.cat(weights, 1)
    return torch.cat(chosen, 1), weight / weight.sum(-1, keepdim=True) if renormalized else weight


@triton.jit
def choose(logits, factors, chosen, weights, EXPERTS: tl.constexpr, PADDED: tl.constexpr, USED: tl.constexpr, RENORMALIZED: tl.constexpr):
    """One token's choice: chosen [USED], weights [USED], each times the expert's element of factors [PADDED]."""
    expert = tl.arange(0, PADDED)
    here = expert < EXPERTS
    x = tl.load(logits + expert, here, other=float("-inf"), cache_modifier=".cg")
    p = tl.exp(x - tl.max(x, 0))
    p /= tl.sum(p, 0)
    # ordered as p is, of equal ones the lower number first, NaN before all: no two are equal
    bits = (p.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    key = tl.where(here, (bits << 32) | (PADDED - expert), -1)
    if PADDED <= COUNTED:  # an expert's slot is the number of those before it
        slot = tl.sum((key[None, :] > key[:, None]).to(tl.int32), 1)
    else:
        slot = tl.zeros((PADDED,), tl.int32) + USED
        for u in tl.static_range(USED):
            first = key == tl.max(key, 0)
            slot = tl.where(first, u, slot)
            key = tl.where(first, -1, key)
    taken = here & (slot < USED)
    if RENORMALIZED:
        p /= tl.sum(tl.where(taken, p, 0.0), 0)
    tl.store(chosen + slot, expert.to(tl.int64), taken)
    tl.store(weights + slot, p * factors, taken)


@triton.jit
def kiln_route(logits, chosen, weights, EXPERTS: tl.constexpr, PADDED: tl.constexpr, USED: tl.constexpr, RENORMALIZED: tl.constexpr):
    """Grid (T)."""
    token = tl.program_id(0).to(tl.int64)
    ones = tl.zeros((PADDED,), tl.float32) + 1.0
    choose(logits + token * EXPERTS, ones, chosen + token * USED, weights + token * USED, EXPERTS, PADDED, USED, RENORMALIZED)


def constants(experts: int, used: int, renormalized: bool) -> dict[str, int | bool]:
    return {"EXPERTS": experts, "PADDED": triton.next_power_of_2(experts), "USED": used, "RENORMALIZED": renormalized}


@kernel_op("kiln::route", mutates_args=())
def route(logits: torch.Tensor, used: int, renormalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] float32 -> the `used` experts of the largest softmax, int64 [T, used], and their probabilities, float32 [T, used].

    Largest first; of equal ones the lower number first. renormalized: the probabilities of a token are divided by their sum. A token whose
    logits are not numbers gets experts that exist and weights that are NaN. Raises ValueError when a shape or dtype does not fit.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or not 1 <= used <= logits.shape[1] <= MOST_EXPERTS:
        expected = f"float32 [T, {used} .. {MOST_EXPERTS}]"
        raise ValueError(f"route: logits are {logits.dtype} {tuple(logits.shape)}, {used} are used; expected {expected}")
    if not use_triton(logits):
        return reference(logits, used, renormalized)
    logits = logits.contiguous()
    shape = (logits.shape[0], used)
    chosen = torch.empty(shape, dtype=torch.int64, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    kernel(kiln_route)[(logits.shape[0],)](logits, chosen, weights, **constants(logits.shape[1], used, renormalized), num_warps=WARPS)
    return chosen, weights


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """Of 128 experts 8, as the models that we know have."""
    types = {"logits": "*fp32", "chosen": "*i64", "weights": "*fp32"}
    return [KernelCase("route 8 of 128", kiln_route, types, constants(128, 8, True), {"num_warps": WARPS})]
