"""No KV byte exists while compiling: the caches become shapes, and a plan by which the runner makes them at load."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor

from kiln.passes import edit
from kiln.passes.edit import PassError
from kiln.passes.records import Lowered, PassOptions, PassReport, buffer


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    ep = lowered.program
    freed = 0
    for node, fqn in edit.buffers(ep).items():
        value = ep.state_dict[fqn]
        if not isinstance(value, FakeTensor):
            freed += value.untyped_storage().nbytes()
            ep.state_dict[fqn] = node.meta["val"]
        lowered.kv.append(buffer(fqn, value.dtype, tuple(value.shape)))
    if not lowered.kv:
        raise PassError("pass free_kv_buffers: the graph has no cache")
    return PassReport("free_kv_buffers", "applied", tuple(b.name for b in lowered.kv), f"{freed} bytes freed")
