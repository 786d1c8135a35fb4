"""The gated delta rule for many tokens, in blocks of 64: matmuls within a block, and one state from block to block.

Within a block, with G the running sum of log decays and A[i, j] = beta_i (k_i . k_j) e^(G_i - G_j) for j < i: the changes of the state are
D = U - W S, U = (I + A)^-1 (beta v), W = (I + A)^-1 (beta e^G k), S the state before the block. Behind it the state is M S + B, with
M = e^G_end I - K^T W, B = K^T U and K = e^(G_end - G) k. So the states before all blocks are a scan over pairs (M, B), of which the number
of steps is the logarithm of the number of blocks: T is known only at run time, and no loop depends on it.
"""

from __future__ import annotations

import torch
from torch.library import triton_op

from kiln.custom_ops.delta import rule

BLOCK = 64
MOST = 1 << 22  # tokens, where nothing bounds them


def longest(tokens: int | torch.SymInt) -> int:
    """The most tokens that there can be."""
    if isinstance(tokens, int):
        return tokens
    node = tokens.node
    if node.expr.is_number:
        return int(node.expr)
    upper = node.shape_env.bound_sympy(node.expr).upper
    return int(upper) if upper.is_finite and upper <= MOST else MOST


def inverse(a: torch.Tensor) -> torch.Tensor:
    """(I + a)^-1 of strictly lower triangular a [batch, n, n], n a power of two: by halves, for powers of `a` would lose all digits."""
    n = a.shape[-1]
    found = torch.zeros_like(a) + torch.eye(n, dtype=a.dtype, device=a.device)
    size = 1
    while size < n:
        # of each square of two halves: [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]
        at = torch.arange(n, device=a.device) // size
        below = (at[:, None] % 2 == 1) & (at[:, None] == at[None] + 1)
        found = found - torch.bmm(found, torch.bmm(torch.where(below, a, 0.0), found))
        size *= 2
    return found


def reference(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
              conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int, eps: float) -> torch.Tensor:
    """The op in plain torch; arguments as `delta_chunk`. Batches are of blocks and value heads: number n * V + v of block n and head v."""
    tokens, device, (_, value_heads, key_dim, _) = u.shape[0], u.device, delta_state.shape
    empty = 0 if isinstance(tokens, int) else 1  # a size that may be 1 would be a case of its own where T is not known
    blocks = (tokens + BLOCK - 1) // BLOCK
    number = torch.arange((blocks + empty) * value_heads, device=device)
    i, head = torch.arange(BLOCK, device=device), number % value_heads
    index = (number // value_heads)[:, None] * BLOCK + i

    def cut(x: torch.Tensor) -> torch.Tensor:  # [T, V, ...] -> [batch, 64, ...]; behind the last token nothing happens: zeros
        held = (index < tokens)[(..., *[None] * (x.dim() - 2))]
        return torch.where(held, x[index.clamp(max=tokens - 1), head[:, None]], 0.0)

    q, k, v, g, b = map(cut, rule.heads(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps))
    total = torch.where(i[:, None] >= i, g[:, None, :], 0.0).sum(-1)  # G [batch, 64]
    decay = torch.where(i[:, None] >= i, total[:, :, None] - total[:, None, :], float("-inf")).exp()
    end = total[:, -1]
    mixed = torch.bmm(k, k.mT) * decay * b[..., None]
    solved = inverse(torch.where(i[:, None] > i, mixed, 0.0))
    given, seen = torch.bmm(solved, v * b[..., None]), torch.bmm(solved, k * (b * total.exp())[..., None])  # U, W
    late = (k * (end[:, None] - total).exp()[..., None]).mT  # K^T [batch, dk, 64]
    one = torch.eye(key_dim, dtype=k.dtype, device=device)
    through, added = end.exp()[:, None, None] * one - torch.bmm(late, seen), torch.bmm(late, given)  # M [.., dk, dk], B [.., dk, dv]

    step = 1
    while step * BLOCK < longest(tokens):  # each pair is joined with that of `step` blocks before it, which by then is of as many blocks
        held = (number >= step * value_heads)[:, None, None]
        other = (number - step * value_heads).clamp(min=0)
        added = torch.where(held, torch.bmm(through, added[other]) + added, added)
        through = torch.where(held, torch.bmm(through, through[other]), through)
        step *= 2
    first = rule.before(delta_state, pos)[head]
    ends = torch.bmm(through, first) + added  # the states behind the blocks
    rule.keep(delta_state, pos, ends[(blocks - 1) * value_heads + torch.arange(value_heads, device=device)])
    state = torch.where((number >= value_heads)[:, None, None], ends[(number - value_heads).clamp(min=0)], first)
    change = given - torch.bmm(seen, state)
    out = torch.bmm(q * total.exp()[..., None], state) + torch.bmm(torch.bmm(q, k.mT) * decay, change)
    token = torch.arange(tokens, device=device)[:, None]
    return out[token // BLOCK * value_heads + torch.arange(value_heads, device=device), token % BLOCK]


@triton_op("kiln::delta_chunk", mutates_args=("conv_state", "delta_state"))
def delta_chunk(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
                conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int, eps: float) -> torch.Tensor:
    """The rule for T tokens at pos [T], consecutive; arguments as `delta_step`, u [T, C], alpha and beta [T, V].

    The states are those before the first token, and then those after the last. Returns float32 [T, V, dv]; how tokens are cut into chunks
    changes no more than the rounding. Raises ValueError when a shape or dtype does not fit.
    """
    rule.check("delta_chunk", u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads)
    return reference(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps)
