"""Every global attention gets the filled length `pos[-1] + 1` as an int32 device scalar: it reads no more of the cache than is filled.

A step of several tokens needs none: each reads its own position.
"""

from __future__ import annotations

import torch

from kiln.passes import edit
from kiln.passes.edit import KILN, PassError
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten
ATTENTION = {KILN.global_attention.default: 4, KILN.tq4_attention.default: 10}  # where the length is among the arguments
ROWS = (KILN.global_rows.default, KILN.tq4_rows.default)


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.kv_len:
        return PassReport("kv_len", "off", note="attention sweeps the whole cache")
    ep = lowered.program
    calls = [n for n in ep.graph.nodes if edit.is_call(n, *ATTENTION) and n.args[ATTENTION[n.target]] is None]
    if not calls and (edit.drafts(ep) or any(edit.is_call(n, *ROWS) for n in ep.graph.nodes)):
        return PassReport("kv_len", "not needed", note="each token reads its own position")
    if not calls:
        raise PassError("pass kv_len: no global attention without a length found")
    first = calls[0]
    last = edit.emit(ep, first, aten.slice.Tensor, edit.user_input(ep, "pos"), 0, -1, 2**63 - 1)
    length = edit.emit(ep, first, aten.to.dtype, edit.emit(ep, first, aten.add.Tensor, last, 1), torch.int32)
    for call in calls:
        call.update_arg(ATTENTION[call.target], length)
    return PassReport("kv_len", "applied", tuple(edit.layer_part(ep, call.args, "attention") for call in calls))
