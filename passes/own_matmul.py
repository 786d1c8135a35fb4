"""On a GPU, matmuls with float weights become `kiln::matmul`: our kernels, compiled into the package."""

from __future__ import annotations

import torch
from torch.fx import Node

from kiln.passes import edit
from kiln.passes.edit import KILN
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if options.matmul == "blas":
        return PassReport("own_matmul", "off")
    ep = lowered.program
    linears = [n for n in ep.graph.nodes if edit.is_call(n, aten.linear.default) and len(n.args) == 2 and n.args[0].meta["val"].dim() == 2]
    names = edit.states(ep)
    places = tuple(_name(node.args[1], names) for node in linears)
    for node in linears:
        edit.replace(ep, node, edit.emit(ep, node, KILN.matmul.default, *node.args, True))
    return PassReport("own_matmul", "applied" if linears else "not needed", places)


def _name(weight: Node, names: dict[Node, str]) -> str:
    """The weight's name, behind a conversion."""
    while edit.is_call(weight, aten.to.dtype):
        weight = weight.args[0]
    return names.get(weight, weight.name).rpartition(".")[0]
