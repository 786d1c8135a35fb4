"""The legal graph: checked after export and after every pass."""

from __future__ import annotations

import operator

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from kiln.passes import edit
from kiln.passes.edit import PassError

_HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose"}
_PYTHON = {
    getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "le", "lt", "ge", "gt", "eq", "ne")
}


Known = dict[Node, tuple]  # a call that was found right -> what that rests on: operator, arguments, fake values


def verify(ep: ExportedProgram, stage: str, known: Known | None = None) -> None:
    """Legal ops, shapes that recompute to what the nodes say, exactly the buffers mutated, no aliasing.

    known: of the graph's last verification, brought up to date; calls for which nothing has changed are not computed again.
    Raises PassError naming the stage and the node.
    """
    known = {} if known is None else known
    _signature(ep, stage)
    for node in ep.graph.nodes:
        if node.op == "call_function":
            rests_on = (node.target, node.args, node.kwargs, node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes))
            if _same(rests_on, known.get(node, ())):
                continue
            _legal(node, stage)
            _shape(ep, node, stage)
            known[node] = rests_on
        elif node.op not in ("placeholder", "output"):
            raise PassError(f"{stage}: {node.op} node {node.name} is not legal")
    _mutations(ep, stage)
    _aliases(ep, stage)


def _same(a: tuple, b: tuple) -> bool:
    """Each the very same object: a node's tuple of arguments is made anew when one of them changes."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _signature(ep: ExportedProgram, stage: str) -> None:
    placeholders = [n.name for n in ep.graph.nodes if n.op == "placeholder"]
    specs = [s.arg.name for s in ep.graph_signature.input_specs]
    if placeholders != specs:
        raise PassError(f"{stage}: placeholders and signature disagree: {sorted(set(placeholders) ^ set(specs)) or 'order'}")
    names = list(edit.states(ep).values())
    if len(names) != len(set(names)):
        raise PassError(f"{stage}: two placeholders name the same state")
    if set(names) != set(ep.state_dict):
        raise PassError(f"{stage}: state and placeholders disagree: {sorted(set(names) ^ set(ep.state_dict))}")


def _legal(node: Node, stage: str) -> None:
    target = node.target
    if target in _PYTHON:
        return
    if not isinstance(target, torch._ops.OpOverload):
        raise PassError(f"{stage}: {node.name} calls {target}, which is no operator")
    if target.namespace not in ("aten", "kiln"):
        raise PassError(f"{stage}: {node.name} calls {target}; only aten and kiln operators are legal")
    if target.overloadpacket.__name__ in _HOST_READS:
        raise PassError(f"{stage}: {node.name} ({target}) reads device memory on the host")


def _shape(ep: ExportedProgram, node: Node, stage: str) -> None:
    if node.target in _PYTHON:
        return
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        with edit.fake_mode(ep), torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function node's
    except Exception as e:
        raise PassError(f"{stage}: {node.name} ({node.target}) takes no such arguments: {str(e).splitlines()[0]}") from e
    got = value if isinstance(value, (tuple, list)) else (value,)
    said = node.meta.get("val")
    said = said if isinstance(said, (tuple, list)) else (said,)
    for g, s in zip(got, said, strict=True):
        if isinstance(g, torch.Tensor) and (_dims(g) != _dims(s) or g.dtype != s.dtype or g.device != s.device):
            raise PassError(f"{stage}: {node.name} ({node.target}) gives {_text(g)}, the graph says {_text(s)}")


def _dims(t: torch.Tensor) -> list[str]:
    return [str(d) for d in t.shape]


def _text(t: torch.Tensor) -> str:
    return f"{t.dtype}[{', '.join(_dims(t))}] on {t.device}" if isinstance(t, torch.Tensor) else str(t)


def _mutations(ep: ExportedProgram, stage: str) -> None:
    buffers = edit.buffers(ep)
    mutated = set()
    for node in ep.graph.nodes:
        for arg in edit.written_args(node):
            target = edit.root(arg)
            if target not in buffers:
                if target.op == "placeholder":
                    raise PassError(f"{stage}: {node.name} writes to {target.name}, which is no buffer")
                continue  # a temporary
            mutated.add(target)
    if edit.drafts(ep):
        if mutated:
            raise PassError(f"{stage}: a drafter writes {sorted(buffers[b] for b in mutated)}, which are its model's")
    elif mutated != set(buffers):
        raise PassError(f"{stage}: buffers never written: {sorted(buffers[b] for b in set(buffers) - mutated)}")


def _aliases(ep: ExportedProgram, stage: str) -> None:
    outputs = next(n for n in ep.graph.nodes if n.op == "output").args[0]
    for out in outputs:
        if isinstance(out, Node) and edit.root(out).op == "placeholder":
            raise PassError(f"{stage}: output {out.name} is memory of {edit.root(out).name}")
