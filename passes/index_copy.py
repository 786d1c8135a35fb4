"""Cache writes `cache[pos] = x` and `cache[a:b] = x` become `index_copy_` along the position dimension.

A step of several tokens writes `cache[row, pos] = x`: two indices and no broadcasting, which stays as it is.

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
        if by_row := _row_put(node, buffers):
            places.append(by_row)
            continue
        write = _index_put(node, buffers) or _slice_copy(ep, node, buffers)
        if write is None:
            continue
        cache, dim, index, value = write
        if value.meta["val"].dim() < cache.meta["val"].dim():
            value = edit.emit(ep, node, aten.view.default, value, _region(cache, dim, 1))
        new = edit.emit(ep, node, aten.index_copy_.default, cache, dim, index, value)
        edit.replace(ep, node, new)
        places.append(buffers[cache])
    edit.drop_dead(ep)
    if not places and edit.drafts(ep):
        return PassReport("index_copy", "not needed", note="a drafter writes no cache")
    if not places:
        raise edit.PassError("pass index_copy: no cache write found; the model must write its caches with cache[pos] = x")
    return PassReport("index_copy", "applied", tuple(places))


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


def _row_put(node: Node, buffers) -> str | None:
    """The cache [B, slots, ...] that two indices [M] write to, of exactly its dtype and shape."""
    if not edit.is_call(node, aten.index_put_.default) or len(node.args) > 3 or node.kwargs or len(node.args[1]) != 2:
        return None
    cache, indices, value = edit.resolve(node.args[0]), node.args[1], node.args[2]
    if cache not in buffers or any(i is None or i.meta["val"].dtype != torch.int64 or i.meta["val"].dim() != 1 for i in indices):
        return None
    tokens, written, given = len(indices[0].meta["val"]), cache.meta["val"], value.meta["val"]
    fits = len(indices[1].meta["val"]) == tokens and given.dtype == written.dtype and given.shape == (tokens, *written.shape[2:])
    return buffers[cache] if fits else None


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
