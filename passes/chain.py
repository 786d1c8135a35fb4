"""What a layer of a fused decode step does between two attentions becomes one kernel, `kiln::matmul_chain`.

After `fuse_decode` that is a sequence of ops: the output's projection, an `add_norm`, gates and values, down, an `add_norm`, and the next
layer's projections, which leave their parts to its attention. It is followed from the first matmul on. A sequence of another form stays,
and so does the last layer, after which comes the head.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from kiln.custom_ops.chain.chain import TERMS
from kiln.custom_ops.chain.cut import BITS, MOST_MATMULS, ROWS, flag_words
from kiln.custom_ops.weights import fixed_point
from kiln.custom_ops.weights.fixed_point import WIDE
from kiln.passes import edit
from kiln.passes.edit import KILN
from kiln.passes.records import Lowered, PassOptions, PassReport

FIRST = (KILN.fixed_linear.default, KILN.fixed_linear_squares.default)


@dataclass(frozen=True)
class Added:
    """An `add_norm` of a matmul's result: the stream before it, its weights, the root's eps, and what it gives."""

    node: Node
    stream: Node
    post: Node | None
    scale: Node | None
    weight: Node | None
    eps: float
    after: Node | None
    fixed: Node | None
    squares: Node | None


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if options.decode_kernel != "chain":
        return PassReport("chain", "off")
    ep = lowered.program
    if edit.drafts(ep) or not any(edit.is_call(n, KILN.add_norm.default) for n in ep.graph.nodes):
        return PassReport("chain", "not needed", note="a drafter" if edit.drafts(ep) else "no step of few tokens")
    names, places, matmuls = edit.states(ep), list[str](), 0
    device = edit.user_input(ep, "tokens").meta["val"].device
    flags = edit.zeros(ep, flag_words(), device)
    for node in list(ep.graph.nodes):
        if edit.is_call(node, *FIRST) and (found := chain_of(node)):  # one that was replaced has no readers, and so no form
            places.append(names[node.args[1]].rsplit(".", 2)[0] + ".chain")
            matmuls += len(found.matmuls)
            replace(ep, found, flags)
    if not places:
        ep.graph.erase_node(flags)
        return PassReport("chain", "not needed", note="no layer has the form")
    return PassReport("chain", "applied", tuple(places), f"{matmuls} matmuls in {len(places)} kernel{'s' if places[1:] else ''}")


@dataclass(frozen=True)
class Chain:
    """The ops between two attentions."""

    matmuls: list[Node]
    first: Added
    second: Added
    activation: str


def chain_of(matmul: Node) -> Chain | None:
    """That which begins with this matmul; None where something has another form or is read by others, too."""
    first = added(matmul)
    if first is None or None in (first.weight, first.after, first.fixed, first.squares):
        return None
    gates = only_reader(first.fixed)
    rooted = (first.squares, first.eps)
    if not edit.is_call(gates, KILN.fixed_glu.default) or gates.args[5:7] != rooted or not read_by(first.squares, gates):
        return None
    down = only_reader(gates)
    second = added(down) if edit.is_call(down, *FIRST) else None
    if second is None or None in (second.weight, second.after, second.fixed, second.squares) or second.eps != first.eps:
        return None
    last = list(second.fixed.users)
    rooted = (second.squares, second.eps)
    if not all(edit.is_call(n, KILN.fixed_partials.default) and n.args[0] is second.fixed and n.args[4:6] == rooted for n in last):
        return None
    if not read_by(second.squares, *last) or second.stream is not first.after or not read_by(first.after, second.node):
        return None
    matmuls = [matmul, gates, down, *last]
    whole = len(matmuls) <= MOST_MATMULS and all(multiplied(n) for n in matmuls) and (first.post is None) == (second.post is None)
    plain = all(len(n.args) == 5 and not n.kwargs for n in (matmul, down))  # no root of an earlier norm
    if not whole or not plain or fixed_point.form(matmul.args[0].meta["val"]) != (TERMS, WIDE):
        return None
    return Chain(matmuls, first, second, gates.args[7] if len(gates.args) > 7 else "gelu_tanh")


def added(matmul: Node) -> Added | None:
    """The `add_norm` that alone reads a matmul, of a branch that is normed by the sums of squares beside it or added as it is."""
    value, squares = matmul, None
    if edit.is_call(matmul, KILN.fixed_linear_squares.default):
        value, squares = (outputs(matmul).get(i) for i in range(2))
    node = only_reader(value)
    if not edit.is_call(node, KILN.add_norm.default) or node.args[1:3] != (value, squares) or node.args[0] is value:
        return None
    if squares is not None and not read_by(squares, node):
        return None
    stream, _, _, post, scale, weight, eps, terms = node.args
    given = outputs(node)
    return Added(node, stream, post, scale, weight, eps, *(given.get(i) for i in range(3))) if terms == TERMS else None


def outputs(node: Node) -> dict[int, Node]:
    """A call's results by their numbers, where each is taken once."""
    taken = [user for user in node.users if edit.is_call(user, operator.getitem)]
    found = {user.args[1]: user for user in taken}
    return found if len(found) == len(node.users) else {}


def only_reader(node: Node | None) -> Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def read_by(node: Node, *readers: Node) -> bool:
    """Nothing else reads it."""
    return set(node.users) <= set(readers)


def multiplied(matmul: Node) -> bool:
    """The kernel takes the matrix."""
    words, halves = (a.meta["val"] for a in matmul.args[1:3])
    return matmul.args[3] in BITS and words.shape[2] % ROWS == 0 and words.is_contiguous() and halves.is_contiguous()


def replace(ep: torch.export.ExportedProgram, chain: Chain, flags: Node) -> None:
    first, second = chain.first, chain.second
    words, halves = ([n.args[i] for n in chain.matmuls] for i in (1, 2))
    types = ",".join(n.args[3] for n in chain.matmuls)
    norms = (first.post, first.scale, first.weight, second.post, second.scale, second.weight)
    form = () if chain.activation == "gelu_tanh" else (chain.activation,)  # the op's default
    new = edit.emit(ep, second.node, KILN.matmul_chain.default, chain.matmuls[0].args[0], first.stream, words, halves, types, flags, *norms,
                    first.eps, *form)  # fmt: skip
    for i, old in enumerate((second.after, *chain.matmuls[3:])):
        old.replace_all_uses_with(edit.emit(ep, second.node, operator.getitem, new, i))
    ours = [*chain.matmuls, first.node, second.node]
    inside = {n for node in ours for n in (node, *(u for u in node.users if edit.is_call(u, operator.getitem)))}
    for node in reversed(list(ep.graph.nodes)):
        if node in inside:
            ep.graph.erase_node(node)
