"""What `fuse_decode` looks for in a decode graph: projections, norms, rotary embeddings, caches and what writes them."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from kiln.custom_ops.weights.fixed_point import GROUP
from kiln.passes import edit
from kiln.passes.edit import KILN

aten = torch.ops.aten
ROWS = (KILN.sliding_rows.default, KILN.global_rows.default, KILN.tq4_rows.default)  # of several tokens
VIEWS = (aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints)


class Rotated:
    """rope(rms_norm(x, weight)), or rope(x) without weight and eps."""

    def __init__(self, node: Node):
        x, self.cos, self.sin, self.scale, self.neighbours = (*node.args, *(1.0, False)[len(node.args) - 3 :])  # defaults are left out
        self.x, self.weight, self.eps = behind_conversion(x), None, None
        turned = 2 * self.cos.meta["val"].shape[-1]
        self.in_part = turned != x.meta["val"].shape[-1]
        if edit.is_call(self.x, KILN.rms_norm.default):
            self.x, self.weight, self.eps, _ = self.x.args
        self.gates = None  # of the heads' outputs, each behind its query in one projection
        if edit.is_call(self.x, operator.getitem) and self.x.args[1] == 0 and is_halved(self.x.args[0]):
            self.gates = self.x.args[0]
            self.x = self.gates.args[0]
        self.supported = not self.in_part or (self.weight is not None and not self.neighbours and not turned & (turned - 1))


def rotated(node: Node) -> Rotated | None:
    if not edit.is_call(node, KILN.rope.default):
        return None
    found = Rotated(node)
    return None if not found.supported or (found.eps is not None and found.weight is None) else found


def is_halved(node: Node) -> bool:
    """`node` is the halves of each head, [T, heads, 2 D]."""
    return edit.is_call(node, aten.chunk.default) and node.args[1:] == (2, -1) and len(node.args[0].meta["val"].shape) == 3


def ungated(x: Node) -> tuple[Node, Node | None]:
    """(output, gates) of x = output * sigmoid(the second of each two halves `gates`), else x and None."""
    product = behind_conversion(x)
    if not edit.is_call(product, aten.mul.Tensor) or not edit.is_call(product.args[1], aten.sigmoid.default):
        return x, None
    gate = viewed(behind_conversion(product.args[1].args[0]))
    if not edit.is_call(gate, operator.getitem) or gate.args[1] != 1 or not is_halved(gate.args[0]):
        return x, None
    return product.args[0], gate.args[0]


def gated_step(x: Node) -> tuple[Node, Node, Node] | None:
    """(step, z, weight) of x = silu(z) * rms_norm(step, weight), each head by itself, where nothing else reads the step."""
    product = viewed(x)
    if not edit.is_call(product, KILN.silu_mul.default):
        return None
    z, norm = product.args
    if not edit.is_call(norm, KILN.rms_norm.default) or not edit.is_call(norm.args[0], KILN.delta_step.default) or norm.args[1] is None:
        return None
    step, weight, eps, _ = norm.args
    alone = len(step.users) == 1 and eps == step.args[-1] and weight.meta["val"].shape[0] % GROUP == 0
    return (step, z, weight) if alone and z.meta["val"].shape == step.meta["val"].shape else None


class NormedValue:
    """rms_norm(x), or x as it is, without eps."""

    def __init__(self, x: Node, eps: float | None):
        self.x, self.eps = x, eps


def normed_value(node: Node) -> NormedValue:
    node = behind_conversion(viewed(node))
    if edit.is_call(node, KILN.rms_norm.default) and node.args[1] is None:
        return NormedValue(node.args[0], node.args[2])
    return NormedValue(node, None)


def behind_conversion(node: Node) -> Node:
    """What a value was before it took the cache's dtype."""
    return node.args[0] if edit.is_call(node, aten.to.dtype) else node


class Writes:
    """The nodes that write a token's key and value to the caches of an attention, in graph order, and what they write."""

    def __init__(self, nodes: list[Node], k: Node, v: Node):
        self.nodes, self.k, self.v = nodes, k, v


def key_cache(call: Node) -> Node:
    """What an attention reads earlier keys from: a ring, a global cache or codes."""
    return call.args[1 if edit.is_call(call, KILN.global_attention.default, *ROWS) else 3]


def exact_window_of(call: Node) -> dict[str, int]:
    """Of an attention of one token over TQ4, where it says more than its ring."""
    return {"exact_window": call.args[11]} if edit.is_call(call, KILN.tq4_attention.default) and len(call.args) > 11 else {}


def center_of(call: Node) -> list[Node]:
    """The key center of an attention over TQ4, if it has one."""
    at = 12 if edit.is_call(call, KILN.tq4_attention.default) else 10 if edit.is_call(call, KILN.tq4_rows.default) else len(call.args)
    return [edit.resolve(call.args[at])] if at < len(call.args) else []


def writes_of(call: Node) -> Writes | None:
    if edit.is_call(call, *ROWS):
        return writes_of_rows(call)
    tq4 = edit.is_call(call, KILN.tq4_attention.default)
    ring = tq4 or edit.is_call(call, KILN.sliding_attention.default)
    caches = [edit.resolve(c) for c in (call.args[7:9] if tq4 else call.args[3:5] if ring else call.args[1:3])]
    writes = [[u for u in c.users if edit.is_call(u, aten.index_copy_.default)] for c in caches]
    if [len(w) for w in writes] != [1, 1]:
        return None
    (k_write,), (v_write,) = writes
    k, v = k_write.args[3], v_write.args[3]
    if ring:
        own = not k_write.users and not v_write.users and (viewed(k), viewed(v)) == tuple(viewed(x) for x in call.args[1:3])
        pos = call.args[9 if tq4 else 5]
        if not own or not all(at_slot(w, pos, caches[0].meta["val"].shape[0]) for w in (k_write, v_write)):
            return None
    nodes = [k_write, v_write]
    if tq4:
        encoded = [u for u in call.args[3].users if edit.is_call(u, KILN.tq4_write.default)]
        if len(encoded) != 1 or tuple(encoded[0].args[4:6]) != tuple(call.args[1:3]):
            return None
        nodes += encoded
    return Writes(sorted(nodes), k, v)


def writes_of_rows(call: Node) -> Writes | None:
    """Of an attention of several tokens: all are written before it."""
    tq4, full = edit.is_call(call, KILN.tq4_rows.default), edit.is_call(call, KILN.global_rows.default)
    caches = [edit.resolve(c) for c in call.args[5 if tq4 else 1 :][:2]]
    pos, row = call.args[7:9] if tq4 else call.args[3:5]
    writes = [[u for u in c.users if edit.is_call(u, aten.index_put_.default)] for c in caches]
    if [len(w) for w in writes] != [1, 1] or any(len(w.args) != 3 or len(w.args[1]) != 2 or w.args[1][0] is not row for (w,) in writes):
        return None
    (k_write,), (v_write,) = writes
    slots = caches[0].meta["val"].shape[1]
    at = [w.args[1][1] for w in (k_write, v_write)]
    if not all(a is pos if full else edit.is_call(a, aten.remainder.Scalar) and a.args == (pos, slots) for a in at):
        return None
    k, v = k_write.args[2], v_write.args[2]
    nodes = [k_write, v_write]
    if tq4:
        encoded = [u for u in edit.resolve(call.args[1]).users if edit.is_call(u, KILN.tq4_write_rows.default)]
        if len(encoded) != 1 or tuple(encoded[0].args[4:8]) != (k, v, pos, row):
            return None
        nodes += encoded
    if any(not edit.is_call(user, *ROWS) for write in writes for node in write for user in node.users):
        return None
    return Writes(sorted(nodes), k, v)


def at_slot(write: Node, pos: Node, slots: int) -> bool:
    """`write` puts the token into the ring's slot pos % slots."""
    return write.args[1] == 0 and edit.is_call(write.args[2], aten.remainder.Scalar) and write.args[2].args == (pos, slots)


def projection(node: Node) -> tuple[Node, int | None, int | None]:
    """(projection, begin, end): what `node` is a view of, and the columns of it where it is split."""
    node = viewed(node)
    if edit.is_call(node, operator.getitem):
        pieces, index = node.args
        if edit.is_call(pieces, aten.split_with_sizes.default, aten.split.sizes) and len(pieces.args[0].meta["val"].shape) == 2:
            sizes = pieces.args[1]
            begin = sum(sizes[:index])
            return pieces.args[0], begin, begin + sizes[index]
    return node, None, None


def viewed(node: Node) -> Node:
    while edit.is_call(node, *VIEWS):
        node = node.args[0]
    return node


def branch_added(y: Node, eps: float | None) -> tuple[Node, Node, Node | None, Node | None, float] | None:
    """(stream, branch, weight, scale, eps) of y = (stream + rms_norm(branch, weight, eps)) * scale, with or without norm and scale.

    eps: the only one that may be; None: any.
    """
    scale = None
    if edit.is_call(y, aten.to.dtype) and edit.is_call(y.args[0], aten.mul.Tensor):
        left, scale = y.args[0].args
        if not edit.is_call(left, aten.to.dtype) or not isinstance(scale, Node) or scale.op != "placeholder":
            return None
        y = left.args[0]
    if not edit.is_call(y, aten.add.Tensor) or len(y.args) != 2:
        return None
    stream, branch = y.args
    if not edit.is_call(branch, KILN.rms_norm.default):
        return stream, branch, None, scale, eps or 0.0
    if branch.args[1] is None or branch.args[2] != (branch.args[2] if eps is None else eps):
        return None
    return stream, branch.args[0], branch.args[1], scale, branch.args[2]


def frequencies(cos: Node, sin: Node) -> tuple[Node, Node] | None:
    """(pos, inv_freq) of cos(pos * inv_freq) and sin(pos * inv_freq): integers, and a parameter."""
    if not edit.is_call(cos, aten.cos.default) or not edit.is_call(sin, aten.sin.default) or cos.args[0] is not sin.args[0]:
        return None
    angle = cos.args[0]
    if not edit.is_call(angle, aten.mul.Tensor):
        return None
    position, inv_freq = angle.args
    while edit.is_call(position, aten.unsqueeze.default, aten.to.dtype):
        position = position.args[0]
    known = position.meta["val"].dtype == torch.int64 and len(position.meta["val"].shape) == 1
    return (position, inv_freq) if known and isinstance(inv_freq, Node) and inv_freq.op == "placeholder" else None
