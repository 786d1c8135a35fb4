"""On the CPU matmuls with packed weights become `kiln::packed_linear`: the runner unpacks a weight where it multiplies by it.

As plain graph a weight would be written to memory in float32, seven times its bytes, and read again, for each step.
"""

from __future__ import annotations

import torch

from kiln.passes import edit
from kiln.passes.edit import KILN
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.reads_packed:
        return PassReport("packed_linear", "off")
    ep = lowered.program
    names = edit.states(ep)
    linears = [n for n in ep.graph.nodes if edit.is_call(n, KILN.quantized_linear.default)]
    places = tuple(names.get(node.args[1], node.name).rpartition(".")[0] for node in linears)
    for node in linears:
        x, words, halves, block_type = node.args
        dtype = node.meta["val"].dtype
        if dtype != torch.float32:
            x = edit.emit(ep, node, aten.to.dtype, x, torch.float32)
        product = edit.emit(ep, node, KILN.packed_linear.default, x, words, halves, block_type)
        edit.replace(ep, node, product if dtype == torch.float32 else edit.emit(ep, node, aten.to.dtype, product, dtype))
    return PassReport("packed_linear", "applied" if linears else "not needed", places)
