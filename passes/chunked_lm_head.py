"""Where a target materializes the dequantized head, it is computed in chunks along N, each within a byte budget.

262,144 x 5,376 in float32 is 5.6 GB; a chunk is a view of the packed planes, so nothing is copied but what is being multiplied.
"""

from __future__ import annotations

import torch

from kiln.passes import edit
from kiln.passes.edit import KILN, PassError
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten
HEADS = ("token_embd", "output")


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.materializes_head:
        return PassReport("chunked_lm_head", "not needed", note="the target's kernels read the packed head in place")
    ep = lowered.program
    names = edit.states(ep)
    heads = [n for n in ep.graph.nodes if (_packed(n, names) or _float(n, names))]
    if not heads:
        raise PassError("pass chunked_lm_head: no head found (a linear over token_embd or output)")
    chunked = []
    for head in heads:
        n, k = head.meta["val"].shape[-1], head.args[0].meta["val"].shape[-1]
        rows = chunk_rows(k, options.materialized_head_budget)
        if rows >= n or _is_plain(head) or options.reads_packed and _packed(head, names):
            continue
        chunked.append(_name(head, names))
        emit = _packed_chunk if _packed(head, names) else _float_chunk
        pieces = [emit(ep, head, a, min(a + rows, n)) for a in range(0, n, rows)]
        edit.replace(ep, head, edit.emit(ep, head, aten.cat.default, pieces, -1))
    edit.drop_dead(ep)
    if not chunked:
        fits = f"the dequantized head fits the budget of {options.materialized_head_budget} bytes"
        note = "the packed head is multiplied where it lies" if options.reads_packed and _packed(heads[0], names) else fits
        return PassReport("chunked_lm_head", "not needed", note=note)
    return PassReport("chunked_lm_head", "applied", tuple(chunked), f"{rows} rows a chunk")


def chunk_rows(k: int, budget: int) -> int:
    """Rows of a head [N, k] that are dequantized at once, within `budget` bytes of float32."""
    return max(32, budget // (4 * k) // 32 * 32)


def _name(node, names) -> str:
    weight = node.args[1] if edit.is_call(node, KILN.quantized_linear.default) else _weight(node)
    return names.get(weight, "").rpartition(".")[0]


def _is_head(node, names) -> bool:
    return _name(node, names).rpartition(".")[2] in HEADS  # a drafter's has a prefix


def _packed(node, names) -> bool:
    return edit.is_call(node, KILN.quantized_linear.default) and _is_head(node, names)


def _float(node, names) -> bool:
    return edit.is_call(node, aten.linear.default) and _is_head(node, names)


def _weight(node):
    weight = node.args[1]
    return weight.args[0] if edit.is_call(weight, aten.to.dtype) else weight


def _is_plain(node) -> bool:
    """A float head that is not converted is not materialized."""
    return edit.is_call(node, aten.linear.default) and _weight(node).meta["val"].dtype == node.args[1].meta["val"].dtype


def _packed_chunk(ep, head, a: int, b: int):
    x, words, halves, block_type = head.args
    words, halves = (edit.emit(ep, head, aten.slice.Tensor, t, 2, a, b) for t in (words, halves))
    return edit.emit(ep, head, KILN.quantized_linear.default, x, words, halves, block_type)


def _float_chunk(ep, head, a: int, b: int):
    rows = edit.emit(ep, head, aten.slice.Tensor, _weight(head), 0, a, b)
    dtype = head.args[1].meta["val"].dtype
    return edit.emit(ep, head, aten.linear.default, head.args[0], edit.emit(ep, head, aten.to.dtype, rows, dtype))
