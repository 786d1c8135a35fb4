"""The gated delta rule for many tokens, in blocks: matmuls within a block, and one state from block to block.

Within a block, with G the running sum of log decays and A[i, j] = beta_i (k_i . k_j) e^(G_i - G_j) for j < i: the changes of the state are
D = U - W S, U = (I + A)^-1 (beta v), W = (I + A)^-1 (beta e^G k), S the state before the block. Behind it the state is M S + B, with
M = e^G_end I - K^T W, B = K^T U and K = e^(G_end - G) k. So the states before all blocks are a scan over pairs (M, B), of which the number
of steps is the logarithm of the number of blocks: T is known only at run time, and no loop depends on it.
"""

from __future__ import annotations

import torch
import triton

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.delta import rule
from kiln.custom_ops.delta.kernels import kiln_delta_blocks, kiln_delta_heads, kiln_delta_outputs, kiln_delta_states
from kiln.custom_ops.geometry import EPS, GEMMA4_31B, Geometry
from kiln.custom_ops.gpu.launch import kernel, use_triton
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.tables import nearest
from kiln.custom_ops.gpu.target import GpuTarget, current_target

BLOCK = 64  # tokens, of the reference
BLOCKS = {80: 32, 86: 32, 90: 64}  # of the kernels, by architecture: the matrices of a block lie in registers
ROWS = 16  # tokens of a program that makes heads
COLUMNS, OUT_COLUMNS, WARPS = 32, 64, 4  # of a head's state that a program carries through the blocks; of a block's outputs
BLOCK_WARPS, PIECE = 4, 16  # of the matmuls within a block, columns at a time
PRECISION = "tf32x3"  # of products of float32 on tensor cores: three terms, about 1e-6
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


@kernel_op("kiln::delta_chunk", mutates_args=("conv_state", "delta_state"))
def delta_chunk(u: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, conv: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor,
                conv_state: torch.Tensor, delta_state: torch.Tensor, pos: torch.Tensor, key_heads: int, eps: float) -> torch.Tensor:
    """The rule for T tokens at pos [T], consecutive; arguments as `delta_step`, u [T, C], alpha and beta [T, V].

    The states are those before the first token, and then those after the last. Returns float32 [T, V, dv]; how tokens are cut into chunks
    changes no more than the rounding. Raises ValueError when a shape or dtype does not fit.
    """
    rule.check("delta_chunk", u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads)
    if not use_triton(u):
        return reference(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps)
    return _launch(u.contiguous(), alpha.contiguous(), beta.contiguous(), conv, a, dt_bias, conv_state, delta_state, pos, key_heads, eps)


def _launch(u, alpha, beta, conv, a, dt_bias, conv_state, delta_state, pos, key_heads: int, eps: float) -> torch.Tensor:
    tokens, (_, value_heads, key_dim, value_dim), block = u.shape[0], delta_state.shape, kernel_block(current_target())
    rule.check_kernel_shapes(key_dim, value_dim)
    constants = rule.constants(conv_state, delta_state, key_heads)
    heads = {name: value for name, value in constants.items() if name != "TAPS"}
    blocks, columns = triton.cdiv(tokens, block), min(COLUMNS, value_dim)

    def empty(*shape: int | torch.SymInt) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    q, k, v = empty(tokens, key_heads, key_dim), empty(tokens, key_heads, key_dim), empty(tokens, value_heads, value_dim)
    kept = empty(*conv_state.shape[1:])
    kernel(kiln_delta_heads)[(triton.cdiv(tokens, ROWS), 2 * key_heads + value_heads)](
        u, conv, conv_state, pos, q, k, v, kept, tokens, EPS=eps, **constants, WIDE=max(key_dim, value_dim), ROWS=ROWS, num_warps=4
    )
    given, seen, mixed, total = (empty(blocks, value_heads, block, *last) for last in ((value_dim,), (key_dim,), (block,), ()))
    kernel(kiln_delta_blocks)[(blocks, value_heads)](
        q, k, v, alpha, beta, a, dt_bias, given, seen, mixed, total, tokens, **heads, BLOCK=block,
        PIECE=min(PIECE, key_dim, value_dim), PRECISION=PRECISION, num_warps=BLOCK_WARPS, num_stages=1
    )
    out, states = empty(tokens, value_heads, value_dim), empty(blocks, value_heads, key_dim, value_dim)
    kernel(kiln_delta_states)[(value_heads, value_dim // columns)](
        k, given, seen, total, kept, states, conv_state, delta_state, pos, tokens, **constants, BLOCK=block, BV=columns,
        PRECISION=PRECISION, num_warps=WARPS, num_stages=1
    )  # fmt: skip
    wide = min(OUT_COLUMNS, value_dim)
    kernel(kiln_delta_outputs)[(blocks, value_heads, value_dim // wide)](
        q, given, mixed, total, states, out, tokens, **heads, BLOCK=block, BV=wide, PIECE=min(PIECE, key_dim), PRECISION=PRECISION,
        num_warps=WARPS, num_stages=1
    )  # fmt: skip
    return out


def kernel_block(target: GpuTarget) -> int:
    """Tokens of a kernel's block."""
    return BLOCKS[nearest(BLOCKS, target)]


def kernel_cases(target: GpuTarget, model: Geometry = GEMMA4_31B) -> list[KernelCase]:
    """At the heads of the hybrids, activations of both dtypes."""
    cases: list[KernelCase] = []
    block = kernel_block(target)
    floats = ("conv_ptr", "a_ptr", "bias_ptr", "conv_state_ptr", "delta_state_ptr", "out_ptr", "q_ptr", "k_ptr", "v_ptr", "kept_ptr",
              "given_ptr", "change_ptr", "states_ptr", "seen_ptr", "mixed_ptr", "total_ptr")  # fmt: skip
    for model in rule.HYBRIDS:
        for dtype in ("*fp32", "*bf16"):
            given = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("u_ptr", "alpha_ptr", "beta_ptr"), dtype)
            given |= {"pos_ptr": "*i64", "tokens": "i32"}
            constants = rule.shape_constants(*model.delta)
            heads = {name: value for name, value in constants.items() if name != "TAPS"}
            for fn, own, options in (
                (kiln_delta_heads, {**constants, "EPS": EPS, "ROWS": ROWS, "WIDE": max(model.delta[2:4])}, {"num_warps": 4}),
                (kiln_delta_blocks, {**heads, "BLOCK": block, "PIECE": PIECE, "PRECISION": PRECISION},
                 {"num_warps": BLOCK_WARPS, "num_stages": 1}),
                (kiln_delta_states, {**constants, "BLOCK": block, "BV": COLUMNS, "PRECISION": PRECISION},
                 {"num_warps": WARPS, "num_stages": 1}),
                (kiln_delta_outputs, {**heads, "BLOCK": block, "BV": OUT_COLUMNS, "PIECE": PIECE, "PRECISION": PRECISION},
                 {"num_warps": WARPS, "num_stages": 1}),
            ):  # fmt: skip
                types = {name: given[name] for name in fn.arg_names if name not in own}
                targets = (90,) if model is rule.HYBRIDS[0] else ()  # the other has the same heads, fewer of them
                cases.append(KernelCase(f"{fn.__name__} {model.name} {dtype}", fn, types, own, options, targets))
    return cases
