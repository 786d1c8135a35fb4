"""The key center of TQ4: of each KV head the mean of its first keys, which is taken off every key before coding.

What all keys share says nothing to a softmax, but is a part of the length that a code's error is a share of. A center of `center_keys`
first keys is made whenever the last of them is written. A key is coded when it is the oldest in the exact window of the step's query, from
the ring of exact keys: by then the center is known, whatever number of tokens a step has, and a step that is made again, after a rewind,
codes the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln.custom_ops.gpu.early import wait_for_earlier_kernels, waits

TOGETHER = tl.constexpr(8)  # loads under way of a sum over keys


def center_keys(exact_window: int) -> int:
    """How many first keys make a center. The first key is coded a quarter of the window later: a step has no more tokens than that."""
    return exact_window * 3 // 4


def check_center(op: str, k_center: torch.Tensor | None, k_codes: torch.Tensor, exact_window: int, k_exact: torch.Tensor | None,
                 tokens: int = 1) -> None:
    """ValueError unless k_center is [.., KV, D], as k_codes [.., KV, S, D/4] has them, and the ring and window go with it, or it is None.

    tokens: of a step that writes all keys before it codes one.
    """
    if k_center is None:
        return
    shape = (*k_codes.shape[:-2], 4 * k_codes.shape[-1])
    if k_center.shape != shape or k_center.dtype != torch.float32:
        raise ValueError(f"{op}: k_center is {k_center.dtype} {tuple(k_center.shape)}; expected float32 {shape}")
    slots = 0 if k_exact is None else k_exact.shape[-3]
    if not 2 <= exact_window <= slots:
        given = f"an exact window of {exact_window} in a ring of {slots} slots"
        raise ValueError(f"{op}: {given}; with a center expected at least 2, and no more")
    most = exact_window - center_keys(exact_window)
    if tokens > most:
        raise ValueError(f"{op}: a step of {tokens} tokens could code with a center that it makes; a window of {exact_window} takes {most}")


def one_or_none(op: str, center: list[torch.Tensor]) -> torch.Tensor | None:
    """The center of an op that writes to it, or None; ValueError for several."""
    if len(center) > 1:
        raise ValueError(f"{op}: {len(center)} centers; expected one or none")
    return center[0] if center else None


def added_by_halves(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, in an order that no compiler, number of threads or shape beside it changes."""
    while x.shape[0] > 1:
        half, odd = divmod(x.shape[0], 2)
        sums = x[:half] + x[half : 2 * half]
        x = torch.cat([sums, x[-1:]]) if odd else sums
    return x[0]


def center_of_chunk(k: torch.Tensor, k_exact: torch.Tensor, k_center: torch.Tensor, pos: torch.Tensor, count: int) -> torch.Tensor:
    """The center [KV, D] after a chunk, from the one before: k [T, KV, D] at pos, earlier keys in the ring [R, KV, D]."""
    at = torch.arange(count, device=pos.device)
    own = k[(at - pos[:1]).clamp(min=0).minimum(pos[-1:] - pos[:1])]
    mean = added_by_halves(torch.where((at < pos[:1])[:, None, None], k_exact[:count], own).to(torch.float32)) / count
    made = (pos[:1] < count) & (pos[-1:] >= count - 1)
    return torch.where(made[:, None], mean, k_center)


def keys_to_code(k: torch.Tensor, k_exact: torch.Tensor, k_center: torch.Tensor, pos: torch.Tensor,
                 exact_window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys that a chunk codes, less the center, float32 [T, KV, D], and their positions; where one is negative its key is no key."""
    late = pos - (exact_window - 1)
    keys = k_exact[late % k_exact.shape[0]]
    if not isinstance(k.shape[0], int) or k.shape[0] != 1:  # one token's own key is not the oldest
        keys = torch.where((late < pos[:1])[:, None, None], keys, k[(late - pos[:1]).clamp(min=0)])
    return keys.to(torch.float32) - k_center, late


@triton.jit
def late_key(pos, EXACT_WINDOW: tl.constexpr):
    """The position of the key that a query at pos is the last to read exactly; negative: there is none."""
    return pos - (EXACT_WINDOW - 1)


@triton.jit
def center_of(ring_ptr, own_ptr, first, COUNT: tl.constexpr, KV: tl.constexpr, D: tl.constexpr):
    """The mean of the keys of positions 0 .. COUNT - 1, float32 [D], added up in their order: below `first` in a ring's slots, the others
    the rows of own_ptr.
    """
    dim = tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for n in tl.range(0, COUNT, TOGETHER, num_stages=1):
        for i in tl.static_range(TOGETHER):
            p = n + i
            key = tl.where(p < first, ring_ptr, own_ptr) + tl.where(p < first, p, p - first) * (KV * D)
            total += tl.load(key + dim, p < COUNT, other=0.0).to(tl.float32)
    return total * (1.0 / COUNT)


@waits()
@triton.jit
def kiln_tq4_center(center_ptr, k_ptr, k_ring_ptr, pos_ptr, tokens, COUNT: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
                      EARLY: tl.constexpr):
    """The center of a KV head, where the chunk has the last of its keys. k_ptr [T, KV, D]; the past is in k_ring_ptr. Grid (KV)."""
    wait_for_earlier_kernels(EARLY)
    first = tl.load(pos_ptr).to(tl.int32)
    if (first < COUNT) & (first + tokens >= COUNT):
        at = tl.program_id(0) * D
        tl.store(center_ptr + at + tl.arange(0, D), center_of(k_ring_ptr + at, k_ptr + at, first, COUNT, KV, D))
