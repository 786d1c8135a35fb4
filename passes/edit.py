"""What every pass needs to edit an ExportedProgram: buffers by name, new nodes with their fake values, aliases."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

KILN = torch.ops.kiln


class PassError(Exception):
    """A pass or the verifier refuses the graph; the message names the pass and the node."""


def is_call(node: Any, *targets: Callable) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def fake_mode(ep: ExportedProgram) -> FakeTensorMode:
    for node in ep.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise PassError("the graph has no tensor")


def states(ep: ExportedProgram, *kinds: InputKind) -> dict[Node, str]:
    """Placeholders of parameters and/or buffers -> their fully qualified names, in graph order."""
    names = {s.arg.name: s.target for s in ep.graph_signature.input_specs if s.kind in (kinds or (InputKind.PARAMETER, InputKind.BUFFER))}
    return {n: names[n.name] for n in ep.graph.nodes if n.op == "placeholder" and n.name in names}


def buffers(ep: ExportedProgram) -> dict[Node, str]:
    return states(ep, InputKind.BUFFER)


def user_input(ep: ExportedProgram, name: str) -> Node:
    names = {s.arg.name for s in ep.graph_signature.input_specs if s.kind == InputKind.USER_INPUT}
    for node in ep.graph.nodes:
        if node.op == "placeholder" and node.name == name and name in names:
            return node
    raise PassError(f"the graph has no input named {name}; it has {sorted(names)}")


def has_input(ep: ExportedProgram, name: str) -> bool:
    return any(s.kind == InputKind.USER_INPUT and s.arg.name == name for s in ep.graph_signature.input_specs)


def drafts(ep: ExportedProgram) -> bool:
    """The graph of a drafter, which reads its model's caches up to `last` and writes none."""
    return has_input(ep, "last")


def symbolic(size: int | torch.SymInt) -> bool:
    """The size is still free: nothing has fixed it at a number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def bounds(size: torch.SymInt) -> tuple[int, int]:
    """The smallest and the largest value that a free size still may have."""
    found = size.node.shape_env.bound_sympy(size.node.expr)
    return int(found.lower), int(found.upper)


def layer_part(ep: ExportedProgram, args: Iterable[Any], part: str) -> str:
    """`blk.3.PART`, 3 the layer whose weights made the first of `args`; without such weights that of the first cache among them. What is
    before the name of a drafter's layer stays."""
    args = list(args)
    named = {n: found[1] for n, name in states(ep, InputKind.PARAMETER).items() if (found := re.match(r"((?:\w+\.)?blk\.\d+)\.", name))}
    seen: set[Node] = set()
    level = [a for a in args[:1] if isinstance(a, Node)]
    while level:  # the nearest: what lies further back is of earlier layers
        if found := [named[n] for n in level if n in named]:
            return f"{found[0]}.{part}"
        seen.update(level)
        level = list(dict.fromkeys(n for node in level for n in node.all_input_nodes if n not in seen))
    caches = buffers(ep)
    cache = next((caches[a] for a in map(resolve, args) if a in caches), part)
    return ".".join((*cache.split(".")[:2], part)) if cache.startswith("blk.") else part


def written_args(node: Node) -> list[Node]:
    """The arguments an op writes in place, by its schema."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    written = []
    for i, arg in enumerate(node.target._schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = node.kwargs.get(arg.name, node.args[i] if i < len(node.args) else None)
            written += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)]
    return written


def root(node: Node) -> Node:
    """The node whose memory `node` is (through in-place results and views); itself when it is new memory."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        if not returns or returns[0].alias_info is None:
            break
        source = next((a for a, s in zip(node.args, node.target._schema.arguments, strict=False) if s.alias_info is not None), None)
        if not isinstance(source, Node):
            break
        node = source
    return node


def is_in_place_result(node: Node) -> bool:
    """`node` is the very tensor it wrote to, not a view of it."""
    return bool(written_args(node)) and bool(node.target._schema.returns)


def resolve(node: Any) -> Any:
    """A buffer read through the result of an in-place write is that buffer."""
    while isinstance(node, Node) and is_in_place_result(node):
        node = written_args(node)[0]
    return node


def emit(ep: ExportedProgram, before: Node, target: Callable, *args: Any, **kwargs: Any) -> Node:
    """A new call before `before`, its fake value computed from its arguments."""
    with ep.graph.inserting_before(before):
        node = ep.graph.call_function(target, args, kwargs)
    value, named = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with fake_mode(ep), torch.no_grad():
        node.meta["val"] = target(*value, **named)
    return node


def zeros(ep: ExportedProgram, count: int, device: torch.device) -> Node:
    """int32 zeros before all other calls: for what is zero again after each call that writes it."""
    first = next(n for n in ep.graph.nodes if n.op != "placeholder")
    return emit(ep, first, torch.ops.aten.zeros.default, [count], dtype=torch.int32, device=device)


def replace(ep: ExportedProgram, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    ep.graph.erase_node(old)


def add_buffer(ep: ExportedProgram, fqn: str, like: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Node:
    """A new persistent buffer, shape only."""
    if fqn in ep.state_dict:
        raise PassError(f"buffer {fqn} exists already")
    anchor = next(n for n in ep.graph.nodes if n.op == "placeholder")
    name = "b_" + fqn.replace(".", "_")
    with fake_mode(ep):
        value = torch.zeros(like, dtype=dtype, device=device)
    with ep.graph.inserting_before(anchor):
        node = ep.graph.placeholder(name)
    node.meta["val"] = value
    ep.graph_signature.input_specs.insert(0, InputSpec(InputKind.BUFFER, TensorArgument(node.name), fqn, persistent=True))
    ep.state_dict[fqn] = value
    return node


def remove_buffer(ep: ExportedProgram, node: Node) -> None:
    fqn = buffers(ep)[node]
    if node.users:
        raise PassError(f"buffer {fqn} is still read by {', '.join(u.name for u in node.users)}")
    specs = ep.graph_signature.input_specs
    specs[:] = [s for s in specs if s.arg.name != node.name]
    del ep.state_dict[fqn]
    ep.graph.erase_node(node)


def drop_dead(ep: ExportedProgram, pure: Container[Node] = ()) -> None:
    """Erase what nobody reads, in one sweep from the end; of calls that write only those of `pure`, whose writes say nothing."""
    for node in reversed(ep.graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and (node in pure or not written_args(node)):
            ep.graph.erase_node(node)


def finish(ep: ExportedProgram) -> None:
    ep.graph.lint()
    ep.graph_module.recompile()
