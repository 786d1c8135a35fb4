"""Global layers: the K and V caches become TQ4 caches with an exact window, their writes and their attention the TQ4 ops.

Codes are written before the attention, which reads the older part of a long chunk there; the exact window, a ring, is written after it, as
that of a sliding layer is. Sliding layers stay as they are.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from kiln.passes import edit
from kiln.passes.edit import KILN, PassError
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.turboquant:
        return PassReport("turboquant", "off", note="--turboquant switches it on")
    if options.residual_length < 1:
        raise PassError(f"pass turboquant: residual length {options.residual_length}; expected at least 1")
    swap = _Swap(lowered.program, options.residual_length)
    calls = [n for n in lowered.program.graph.nodes if edit.is_call(n, KILN.global_attention.default)]
    places = tuple(place for place in map(swap, calls) if place)
    if not places:
        raise PassError("pass turboquant: no global attention over a cache found")
    return PassReport("turboquant", "applied", places, f"residual length {options.residual_length}")


class _Swap:
    def __init__(self, ep: ExportedProgram, exact_window: int):
        self.ep, self.exact_window = ep, exact_window
        self.places: dict[Node, tuple[Node, Node | None]] = {}  # positions -> their slots of the ring, and whose rows go there

    def emit(self, before: Node, target, *args) -> Node:
        return edit.emit(self.ep, before, target, *args)

    def __call__(self, attention: Node) -> str | None:
        """The place that was rewritten."""
        ep = self.ep
        q, k_cache, v_cache, pos, kv_len = (edit.resolve(a) for a in attention.args)
        buffers = edit.buffers(ep)
        writes = [_only_write(c, attention) for c in (k_cache, v_cache)] if {k_cache, v_cache} <= set(buffers) else [None, None]
        if None in writes or not writes[0].args[2] is writes[1].args[2] is pos:
            return None
        slots, kv_heads, head_dim = k_cache.meta["val"].shape
        if head_dim & (head_dim - 1) or not 64 <= head_dim <= 512:
            raise PassError(f"pass turboquant: {buffers[k_cache]} has head size {head_dim}; TQ4 needs a power of two from 64 to 512")
        dtype, device = k_cache.meta["val"].dtype, k_cache.meta["val"].device
        prefix, place = buffers[k_cache].rsplit(".", 1)[0], edit.layer_part(ep, attention.args, "attention")
        caches, rings = [], []
        for side in ("k", "v"):
            caches.append(edit.add_buffer(ep, f"{prefix}.{side}_codes", (kv_heads, slots, head_dim // 4), torch.int16, device))
            caches.append(edit.add_buffer(ep, f"{prefix}.{side}_scales", (kv_heads, slots), torch.float16, device))
            rings.append(edit.add_buffer(ep, f"{prefix}.{side}_exact", (self.exact_window, kv_heads, head_dim), dtype, device))
        own = [write.args[3] for write in writes]
        slot, last = self.place(pos, attention)
        self.emit(attention, KILN.tq4_write.default, *caches, *own, pos)
        new = self.emit(attention, KILN.tq4_attention.default, q, *own, *caches, *rings, pos, kv_len)
        for ring, x in zip(rings, own, strict=True):
            kept = x if last is None else self.emit(attention, aten.index.Tensor, x, [last])
            self.emit(attention, aten.index_copy_.default, ring, 0, slot, kept)
        edit.replace(ep, attention, new)
        for write in writes:
            ep.graph.erase_node(write)
        edit.remove_buffer(ep, k_cache)
        edit.remove_buffer(ep, v_cache)
        return place

    def place(self, pos: Node, before: Node) -> tuple[Node, Node | None]:
        """Each token's slot, and the index of the token whose row it writes: of those that share a slot the last; None for one token."""
        if pos not in self.places:
            last = None
            if pos.meta["val"].shape[0] != 1:
                ends = [self.emit(before, aten.slice.Tensor, pos, 0, *span) for span in ((0, 1), (-1, 2**63 - 1))]
                turns = self.emit(before, aten.floor_divide.default, self.emit(before, aten.sub.Tensor, ends[1], pos), self.exact_window)
                index = self.emit(before, aten.sub.Tensor, pos, ends[0])
                last = self.emit(before, aten.add.Tensor, index, self.emit(before, aten.mul.Tensor, turns, self.exact_window))
            self.places[pos] = self.emit(before, aten.remainder.Scalar, pos, self.exact_window), last
        return self.places[pos]


def _only_write(cache: Node, attention: Node) -> Node | None:
    """The one index_copy_ along dimension 0 that fills `cache`, when nothing but it and `attention` touches the cache."""
    writes = [u for u in cache.users if edit.is_call(u, aten.index_copy_.default) and u.args[1] == 0]
    if len(writes) != 1:
        return None
    readers = (set(cache.users) | set(writes[0].users)) - {writes[0], attention}
    return None if readers else writes[0]
