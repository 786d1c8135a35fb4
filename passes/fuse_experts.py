"""The experts of one token as `fuse_decode` rewrites them: a kernel that chooses, one for gates and values, one for the weighted sum.

Norms and the residual stream are `fuse_decode`'s own. What has another form stays as it is, for instance experts of floats.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kiln.custom_ops.experts.router import FLOATS
from kiln.custom_ops.markers import GATED
from kiln.custom_ops.weights.gemv import glu_fits
from kiln.passes import edit
from kiln.passes.edit import KILN

aten = torch.ops.aten


@dataclass(frozen=True)
class _Router:
    """route(factor * rms_norm(stream, scale, eps) @ matrix^T, used, renormalized), the weights times factors[chosen] if there are such."""

    stream: Node
    scale: Node
    eps: float
    factor: float
    matrix: Node
    used: int
    renormalized: bool
    factors: Node | None


@dataclass(frozen=True)
class _Experts:
    """The sum of down(activation(gate(h)) * up(h)) over the chosen experts, times their weights."""

    h: Node  # what they read
    gates: tuple[Any, ...]  # words and halves of gates and values in one matrix, then None twice; or of gates, then of values
    activation: str
    down: tuple[Any, ...]  # words and halves
    block_types: tuple[str, str]  # of gates and of down
    count: int
    router: _Router
    sum: Node
    beside: tuple[Node, Node] | None  # (y, gate), of y * sigmoid(h . gate), which `sum` has in it


def rewrite(fuser: Any, down: Node) -> None:
    """fuser: that of `fuse_decode`. down: a matmul with chosen experts, which may be the last of a layer's experts."""
    found = _experts(down)
    if found is None:
        return
    router, before = found.router, found.sum
    stream, weight, eps = _normed(found.h)
    own = [] if found.h in fuser.fixed or stream not in fuser.squares else [weight, fuser.terms]
    if own:
        fixed, squares = None, fuser.squares[stream]
        fuser.count("norms", weight)
    else:
        fixed, squares, _ = fuser.to_fixed(found.h, before)  # by its norm
    arguments = (fuser.exact(stream, before), squares, router.eps, router.scale, router.factor, router.matrix, router.used,
                 router.renormalized, router.factors, fuser.counters)  # fmt: skip
    value, gate = found.beside or (None, None)
    op = KILN.choose_experts_norm if own else KILN.choose_experts
    parts = fuser.emit(before, op.default, *arguments, *(own or ([gate] if found.beside else [])))
    chosen, weights, *rest = (fuser.emit(before, operator.getitem, parts, i) for i in range(3 if own else 2))
    gated = fuser.emit(before, KILN.expert_glu.default, rest[0] if own else fixed, *found.gates, found.block_types[0], chosen, found.count,
                       fuser.counters, squares, eps, found.activation)  # fmt: skip
    new = fuser.emit(before, KILN.expert_sum.default, gated, *found.down, found.block_types[1], chosen, weights, found.count,
                     fuser.counters, *([fuser.exact(value, before)] if found.beside else []))  # fmt: skip
    fuser.made.add(new)
    fuser.count("experts")
    if found.beside:
        fuser.count("shared gates", gate)
    fuser.places.append(fuser.name(found.down[0]).rpartition(".")[0] + ".experts")
    fuser.replace_rounded(found.sum, new)


def branches(branch: Node, eps: float) -> list[tuple[Node, Node]] | None:
    """(value, weight) of both, where `branch` is rms_norm(value, weight, eps) of one and of another, added up."""
    if not edit.is_call(branch, aten.add.Tensor) or len(branch.args) != 2:
        return None
    normed = [found for found in map(_normed, branch.args) if found and found[2] == eps]
    return [(value, weight) for value, weight, _ in normed] if len(normed) == 2 else None


def _normed(node: Any) -> tuple[Node, Node, float] | None:
    """(x, weight, eps) of an RMSNorm that has a weight."""
    return node.args[:3] if edit.is_call(node, KILN.rms_norm.default) and node.args[1] is not None else None


def _experts(down: Node) -> _Experts | None:
    activated, *down_weight, down_type, chosen, count = down.args
    activation = next((name for name, op in GATED.items() if edit.is_call(activated, op.default)), None)
    gates = activation and _gates(*activated.args)
    if not gates or gates[0].args[4:] != (chosen, count) or chosen.meta["val"].shape[0] != 1:
        return None
    given, *weight, block_type, _, _ = gates[0].args
    other = gates[1].args[1:3] if len(gates) > 1 else (None, None)
    rows = len(gates) * weight[0].meta["val"].shape[2] // count  # of an expert, gates and values
    h = _unconverted(given.args[0]) if edit.is_call(given, aten.unsqueeze.default) and given.args[1] == 1 else None
    end = _weighted_sum(down)
    norm = _normed(h)
    if end is None or norm is None or not glu_fits(rows):
        return None
    weights, total = end
    router = _router(chosen, weights)
    if router is None or router.stream is not norm[0] or router.eps != norm[2]:
        return None
    plain = router.scale is norm[1] and router.factor == 1.0  # the router reads what the gate beside it does
    beside = _beside(total, h) if plain else None
    whole = beside[0] if beside else total
    return _Experts(h, (*weight, *other), activation, tuple(down_weight), (block_type, down_type), count, router, whole,
                    beside[1:] if beside else None)  # fmt: skip


def _gates(gate: Any, up: Any) -> tuple[Node, ...] | None:
    """The matmul whose halves are gate and up, or the two that make them."""
    if edit.is_call(gate, operator.getitem) and edit.is_call(up, operator.getitem):
        (chunks, first), (other, second) = gate.args, up.args
        whole = chunks is other and (first, second) == (0, 1) and edit.is_call(chunks, aten.chunk.default) and chunks.args[1:] == (2, -1)
        return (chunks.args[0],) if whole and edit.is_call(chunks.args[0], KILN.expert_linear.default) else None
    both = edit.is_call(gate, KILN.expert_linear.default) and edit.is_call(up, KILN.expert_linear.default)
    if not both or gate.args[0] is not up.args[0] or gate.args[3:] != up.args[3:]:
        return None
    return (gate, up) if gate.args[1].meta["val"].shape == up.args[1].meta["val"].shape else None


def _weighted_sum(down: Node) -> tuple[Node, Node] | None:
    """(weights, the sum) of down * weights, summed over the experts."""
    product = _one_user(_converted(down), aten.mul.Tensor)
    if product is None or not edit.is_call(product.args[1], aten.unsqueeze.default) or product.args[1].args[1] != -1:
        return None
    total = _one_user(product, aten.sum.dim_IntList)
    return (product.args[1].args[0], _converted(total)) if total is not None and total.args[1:] == ([1],) else None


def _beside(total: Node, h: Node) -> tuple[Node, Node, Node] | None:
    """(the sum, y, gate) of total + y * sigmoid(h . gate)."""
    whole = _one_user(total, aten.add.Tensor)
    if whole is None or len(whole.args) != 2:
        return None
    product = _unconverted(whole.args[0] if whole.args[1] is total else whole.args[1])
    if not edit.is_call(product, aten.mul.Tensor) or not edit.is_call(product.args[1], aten.sigmoid.default):
        return None
    value, summed = product.args[0], product.args[1].args[0]
    if not edit.is_call(summed, aten.sum.dim_IntList) or summed.args[1:] != ([-1], True):
        return None
    weighted = summed.args[0]
    if not edit.is_call(weighted, aten.mul.Tensor) or _unconverted(weighted.args[0]) is not h or weighted.args[1].op != "placeholder":
        return None
    return whole, _unconverted(value), weighted.args[1]


def _router(chosen: Any, weights: Any) -> _Router | None:
    """What chose, if it did so by a norm of the residual stream that has a weight."""
    factors = None
    if edit.is_call(weights, aten.mul.Tensor) and edit.is_call(weights.args[1], aten.index.Tensor):
        weights, index = weights.args
        factors = index.args[0]
        if list(index.args[1]) != [chosen] or factors.op != "placeholder":
            return None
    for i, node in enumerate((chosen, weights)):
        if not edit.is_call(node, operator.getitem) or node.args[1] != i or not edit.is_call(node.args[0], KILN.route.default):
            return None
    if chosen.args[0] is not weights.args[0]:
        return None
    logits, used, renormalized = chosen.args[0].args
    product = _unconverted(logits)
    if not edit.is_call(product, aten.linear.default) or len(product.args) != 2:
        return None
    z, matrix = (_unconverted(a) for a in product.args)
    factor = 1.0
    if edit.is_call(z, aten.mul.Tensor) and isinstance(z.args[1], float):
        z, factor = z.args
    norm = _normed(z)
    if norm is None or matrix.op != "placeholder" or matrix.meta["val"].dtype not in FLOATS:
        return None
    return _Router(norm[0], norm[1], norm[2], factor, matrix, used, renormalized, factors)


def _users(node: Node) -> list[Node]:
    return [user for user in node.users if not edit.is_call(user, aten._assert_tensor_metadata.default)]


def _one_user(node: Node | None, target: Any) -> Node | None:
    users = _users(node) if node is not None else []
    return users[0] if len(users) == 1 and edit.is_call(users[0], target) else None


def _converted(node: Node) -> Node:
    """Its only reader, where that converts it to another dtype; else the node itself."""
    return _one_user(node, aten.to.dtype) or node


def _unconverted(node: Any) -> Any:
    while edit.is_call(node, aten.to.dtype):
        node = node.args[0]
    return node
