"""Global layers: the K and V caches become TQ4 caches with an exact window, their writes and their attention the TQ4 ops.

Codes are written before the attention, which reads the older part of a long chunk there; the exact window, a ring, is written after it, as
that of a sliding layer is: after the last attention where several layers read one cache. Sliding layers stay as they are. In a step of
several tokens codes and exact window are written before the first attention.

With a center (`PassOptions.key_center`) keys are coded less the mean of their head's first ones: one more cache, which the write makes.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from kiln.custom_ops.tq4.center import center_keys
from kiln.passes import edit
from kiln.passes.edit import KILN, PassError
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.turboquant:
        return PassReport("turboquant", "off", note="--turboquant switches it on")
    least = 4 * options.decode_rows[-1] if options.key_center else 1  # no step makes the center that it codes with
    if options.residual_length < least:
        raise PassError(f"pass turboquant: residual length {options.residual_length}; expected at least {least}")
    swap = _Swap(lowered.program, options)
    readers: dict[Node, list[Node]] = {}  # a cache's, in graph order
    for node in lowered.program.graph.nodes:
        if edit.is_call(node, KILN.global_attention.default, KILN.global_rows.default):
            readers.setdefault(edit.resolve(node.args[1]), []).append(node)
    places = tuple(place for calls in readers.values() for place in swap(calls))
    if not places and edit.drafts(lowered.program):
        return PassReport("turboquant", "not needed", note="the drafter reads no global cache")
    if not places:
        raise PassError("pass turboquant: no global attention over a cache found")
    center = f"keys less the mean of the first {center_keys(options.residual_length)}" if options.key_center else "keys as they are"
    return PassReport("turboquant", "applied", places, f"residual length {options.residual_length}, {center}")


class _Swap:
    def __init__(self, ep: ExportedProgram, options: PassOptions):
        self.ep, self.exact_window, self.ring_slots = ep, options.residual_length, options.residual_length + options.spare_slots
        self.centered = options.key_center
        self.places: dict[Node, tuple[Node, Node | None]] = {}  # positions -> their slots of the ring, and whose rows go there

    def emit(self, before: Node, target, *args) -> Node:
        return edit.emit(self.ep, before, target, *args)

    def __call__(self, readers: list[Node]) -> list[str]:
        """The places that were rewritten: attentions over one cache."""
        ep, attention = self.ep, readers[0]
        _, k_cache, v_cache, pos, row = (edit.resolve(a) for a in attention.args)
        by_row = edit.is_call(attention, KILN.global_rows.default)
        at, read = ([pos, row], 5) if by_row else ([pos], 4)
        buffers = edit.buffers(ep)
        if not {k_cache, v_cache} <= set(buffers):
            return []
        writes = [] if edit.drafts(ep) else [_only_write(c, readers) for c in (k_cache, v_cache)]  # a drafter's model writes them
        if None in writes or any(_position(write) != at for write in writes):
            return []
        if any([edit.resolve(a) for a in reader.args[1:read]] != [k_cache, v_cache, *at] for reader in readers):
            return []
        *lead, slots, kv_heads, head_dim = k_cache.meta["val"].shape
        if head_dim & (head_dim - 1) or not 64 <= head_dim <= 512:
            raise PassError(f"pass turboquant: {buffers[k_cache]} has head size {head_dim}; TQ4 needs a power of two from 64 to 512")
        dtype, device = k_cache.meta["val"].dtype, k_cache.meta["val"].device
        prefix, places = buffers[k_cache].rsplit(".", 1)[0], [edit.layer_part(ep, reader.args, "attention") for reader in readers]
        caches, rings = [], []
        for side in ("k", "v"):
            caches.append(edit.add_buffer(ep, f"{prefix}.{side}_codes", (*lead, kv_heads, slots, head_dim // 4), torch.int16, device))
            caches.append(edit.add_buffer(ep, f"{prefix}.{side}_scales", (*lead, kv_heads, slots), torch.float16, device))
            rings.append(edit.add_buffer(ep, f"{prefix}.{side}_exact", (*lead, self.ring_slots, kv_heads, head_dim), dtype, device))
        center: list[Node] = []
        if self.centered:
            center = [edit.add_buffer(ep, f"{prefix}.k_center", (*lead, kv_heads, head_dim), torch.float32, device)]
        late = (rings[0], self.exact_window) if center else ()  # what the write needs to code older keys
        own = [write.args[2 if by_row else 3] for write in writes]
        if by_row and writes:
            slot = self.row_place(pos, attention)
            for ring, x in zip(rings, own, strict=True):
                self.emit(attention, aten.index_put_.default, ring, [row, slot], x)
            self.emit(attention, KILN.tq4_write_rows.default, *caches, *own, *at, center, *late)
        elif writes:
            slot, last = self.place(pos, attention)
            self.emit(attention, KILN.tq4_write.default, *caches, *own, pos, center, *late)
        for reader in readers:
            q, *_, kv_len = reader.args
            if by_row:
                window = self.exact_window, *center
                edit.replace(ep, reader, self.emit(reader, KILN.tq4_rows.default, q, *caches, *rings, *at, *window))
                continue
            longer = () if self.ring_slots == self.exact_window and not center else (self.exact_window, *center)
            new = self.emit(reader, KILN.tq4_attention.default, q, *own, *caches, *rings, pos, kv_len, *longer)
            for ring, x in zip(rings, own, strict=True) if reader is readers[-1] else ():
                kept = x if last is None else self.emit(reader, aten.index.Tensor, x, [last])
                self.emit(reader, aten.index_copy_.default, ring, 0, slot, kept)
            edit.replace(ep, reader, new)
        for write in writes:
            ep.graph.erase_node(write)
        edit.remove_buffer(ep, k_cache)
        edit.remove_buffer(ep, v_cache)
        return places

    def place(self, pos: Node, before: Node) -> tuple[Node, Node | None]:
        """Each token's slot, and the index of the token whose row it writes: of those that share a slot the last; None for one token."""
        if pos not in self.places:
            last = None
            if pos.meta["val"].shape[0] != 1:
                ends = [self.emit(before, aten.slice.Tensor, pos, 0, *span) for span in ((0, 1), (-1, 2**63 - 1))]
                turns = self.emit(before, aten.floor_divide.default, self.emit(before, aten.sub.Tensor, ends[1], pos), self.ring_slots)
                index = self.emit(before, aten.sub.Tensor, pos, ends[0])
                last = self.emit(before, aten.add.Tensor, index, self.emit(before, aten.mul.Tensor, turns, self.ring_slots))
            self.places[pos] = self.emit(before, aten.remainder.Scalar, pos, self.ring_slots), last
        return self.places[pos]

    def row_place(self, pos: Node, before: Node) -> Node:
        """Each token's slot in its row's ring."""
        if pos not in self.places:
            self.places[pos] = self.emit(before, aten.remainder.Scalar, pos, self.ring_slots), None
        return self.places[pos][0]


def _position(write: Node) -> list[Node]:
    """[pos] of a write to the cache of one timeline, [pos, row] of one to those of several."""
    return [write.args[2]] if edit.is_call(write, aten.index_copy_.default) else list(write.args[1])[::-1]


def _only_write(cache: Node, readers: list[Node]) -> Node | None:
    """The one write along positions that fills `cache`, when nothing but it and, after it, the readers touch the cache."""
    writes = [u for u in cache.users if edit.is_call(u, aten.index_copy_.default) and u.args[1] == 0]
    writes += [u for u in cache.users if edit.is_call(u, aten.index_put_.default) and len(u.args) == 3 and len(u.args[1]) == 2]
    if len(writes) != 1:
        return None
    others = (set(cache.users) | set(writes[0].users)) - {writes[0], *readers}
    return None if others or not writes[0] < readers[0] else writes[0]
