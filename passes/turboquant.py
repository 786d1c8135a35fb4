"""Global layers: the K and V caches become TQ4 caches, their writes and their attention the TQ4 ops. Sliding layers stay as they are."""

from __future__ import annotations

import torch
from torch.fx import Node

import passes.edit as edit
from passes.edit import KILN, PassError
from passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.turboquant:
        return PassReport("turboquant", "off", note="--turboquant switches it on")
    ep = lowered.program
    matches = sum(_swap(ep, node) for node in list(ep.graph.nodes) if edit.is_call(node, KILN.global_attention.default))
    if not matches:
        raise PassError("pass turboquant: no global attention over a cache found")
    return PassReport("turboquant", "applied", matches)


def _swap(ep, attention: Node) -> bool:
    q, k_cache, v_cache, pos, kv_len = (edit.resolve(a) for a in attention.args)
    buffers = edit.buffers(ep)
    writes = [_only_write(c, attention) for c in (k_cache, v_cache)] if {k_cache, v_cache} <= set(buffers) else [None, None]
    if None in writes or writes[0].args[2] is not writes[1].args[2]:
        return False
    slots, kv_heads, head_dim = k_cache.meta["val"].shape
    if head_dim & (head_dim - 1) or not 64 <= head_dim <= 512:
        raise PassError(f"pass turboquant: {buffers[k_cache]} has head size {head_dim}; TQ4 needs a power of two from 64 to 512")
    device = k_cache.meta["val"].device
    prefix = buffers[k_cache].rsplit(".", 1)[0]
    caches = []
    for side in ("k", "v"):
        caches.append(edit.add_buffer(ep, f"{prefix}.{side}_codes", (kv_heads, slots, head_dim // 4), torch.int16, device))
        caches.append(edit.add_buffer(ep, f"{prefix}.{side}_scales", (kv_heads, slots), torch.float16, device))
    edit.emit(ep, attention, KILN.tq4_write.default, *caches, writes[0].args[3], writes[1].args[3], writes[0].args[2])
    edit.replace(ep, attention, edit.emit(ep, attention, KILN.tq4_attention.default, q, *caches, pos, kv_len))
    for write in writes:
        ep.graph.erase_node(write)
    edit.remove_buffer(ep, k_cache)
    edit.remove_buffer(ep, v_cache)
    return True


def _only_write(cache: Node, attention: Node) -> Node | None:
    """The one index_copy_ along dimension 0 that fills `cache`, when nothing but it and `attention` touches the cache."""
    writes = [u for u in cache.users if edit.is_call(u, aten.index_copy_.default) and u.args[1] == 0]
    if len(writes) != 1:
        return None
    readers = (set(cache.users) | set(writes[0].users)) - {writes[0], attention}
    return None if readers else writes[0]
