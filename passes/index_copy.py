"""Cache writes `cache[pos] = x`, `cache[a:b] = x` and `cache[row, pos] = x` become `index_copy_` along the position dimension, the last
along the positions of all rows, row * slots + pos of a view.

index_copy_ needs no broadcasting and no accumulate path, and is the one form of write that later passes look for.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from kiln.passes import edit
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    ep = lowered.program
    buffers = edit.buffers(ep)
    places = []
    for node in list(ep.graph.nodes):
        write = _index_put(node, buffers) or _slice_copy(ep, node, buffers) or _row_put(ep, node, buffers)
        if write is None:
            continue
        cache, dim, index, value = write
        written = buffers[edit.root(cache)]
        if value.meta["val"].dim() < cache.meta["val"].dim():
            value = edit.emit(ep, node, aten.view.default, value, _region(cache, dim, 1))
        new = edit.emit(ep, node, aten.index_copy_.default, cache, dim, index, value)
        edit.replace(ep, node, new if cache in buffers else edit.root(cache))
        places.append(written)
    ep.graph.eliminate_dead_code(is_impure_node=_impure)
    if not places:
        raise edit.PassError("pass index_copy: no cache write found; the model must write its caches with cache[pos] = x")
    return PassReport("index_copy", "applied", tuple(places))


def _impure(node: Node) -> bool:
    return node.op in ("placeholder", "output") or bool(edit.written_args(node))


def _index_put(node: Node, buffers) -> tuple | None:
    if not edit.is_call(node, aten.index_put_.default):
        return None
    cache, indices, value = edit.resolve(node.args[0]), node.args[1], node.args[2]
    accumulate = len(node.args) > 3 and node.args[3] or node.kwargs.get("accumulate", False)
    used = [i for i, index in enumerate(indices) if index is not None]
    if cache not in buffers or accumulate or len(used) != 1:
        return None
    dim = used[0]
    index = indices[dim]
    if index.meta["val"].dtype != torch.int64 or index.meta["val"].dim() != 1 or not _fills(cache, dim, index.meta["val"].shape[0], value):
        return None
    return cache, dim, index, value


def _row_put(ep, node: Node, buffers) -> tuple | None:
    """cache [B, slots, ...], two indices [M]."""
    if not edit.is_call(node, aten.index_put_.default) or len(node.args) > 3 or node.kwargs or len(node.args[1]) != 2:
        return None
    cache, indices, value = edit.resolve(node.args[0]), node.args[1], node.args[2]
    if cache not in buffers or any(i is None or i.meta["val"].dtype != torch.int64 or i.meta["val"].dim() != 1 for i in indices):
        return None
    (row, pos), (batch, slots, *rest) = indices, cache.meta["val"].shape
    tokens = pos.meta["val"].shape[0]
    if cache.meta["val"].dim() < 2 or row.meta["val"].shape[0] != tokens or value.meta["val"].dtype != cache.meta["val"].dtype:
        return None
    if [*value.meta["val"].shape] not in ([tokens, *rest], rest if tokens == 1 else None):
        return None
    flat = edit.emit(ep, node, aten.view.default, cache, [batch * slots, *rest])
    index = edit.emit(ep, node, aten.add.Tensor, edit.emit(ep, node, aten.mul.Tensor, row, slots), pos)
    return flat, 0, index, value


def _slice_copy(ep, node: Node, buffers) -> tuple | None:
    if not edit.is_call(node, aten.copy_.default) or not edit.is_call(node.args[0], aten.slice.Tensor):
        return None
    window, value = node.args[0], node.args[1]
    source, dim, start, end, step = (*window.args, *(0, None, None, 1)[len(window.args) - 1 :])
    cache = edit.resolve(source)
    if cache not in buffers or step != 1 or not _fills(cache, dim, window.meta["val"].shape[dim], value):
        return None
    device = cache.meta["val"].device
    with ep.graph.inserting_before(node):
        index = ep.graph.call_function(aten.arange.start, (start or 0, end), {"dtype": torch.int64, "device": device})
    length = torch.fx.node.map_arg((start or 0, end), lambda n: n.meta["val"])
    with edit.fake_mode(ep):
        index.meta["val"] = torch.arange(*length, dtype=torch.int64, device=device)
    return cache, dim, index, value


def _region(cache: Node, dim: int, length) -> list:
    shape = list(cache.meta["val"].shape)
    shape[dim] = length
    return shape


def _fills(cache: Node, dim: int, length, value: Node) -> bool:
    """`value` has exactly the shape of the written region, but for leading ones, which Python's indexing strips: nothing is broadcast."""
    region, v = [str(d) for d in _region(cache, dim, length)], value.meta["val"]
    shape = [str(d) for d in v.shape]
    missing = len(region) - len(shape)
    return v.dtype == cache.meta["val"].dtype and region == ["1"] * missing + shape
