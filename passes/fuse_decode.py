"""One token's layer in a few kernels: matmuls on fixed-point activations, and one kernel for what lies between two matmuls.

The residual stream and the results of matmuls stay in float32. An activation becomes fixed point (`custom_ops/weights/fixed_point.py`)
where it is made: in the norm, in gelu(gate) * value, or in the attention before the matmul. A matmul whose weight is not packed stays as
it is, and so does every neighbour of another form.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from kiln.custom_ops.markers import GATED
from kiln.custom_ops.weights.fixed_point import GROUP
from kiln.custom_ops.weights.gemv import COUNTERS, glu_fits
from kiln.passes import edit, fuse_experts
from kiln.passes.edit import KILN
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten
WITH_SQUARES = {KILN.fixed_linear.default: KILN.fixed_linear_squares.default,  # a matmul -> the same, with sums of squares of its result
                KILN.expert_sum.default: KILN.expert_sum_squares.default}  # fmt: skip
VIEWS = (aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints)


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.decode_bytes:
        return PassReport("fuse_decode", "off", note="the target's matmuls take activations as they are")
    ep = lowered.program
    if edit.user_input(ep, "tokens").meta["val"].shape[0] != 1:
        return PassReport("fuse_decode", "not needed", note="many tokens")
    packed = [n for n in ep.graph.nodes if edit.is_call(n, KILN.quantized_linear.default, KILN.expert_linear.default)]
    if not packed:
        return PassReport("fuse_decode", "not needed", note="no weight is packed")
    matmuls = [n for n in packed if edit.is_call(n, KILN.quantized_linear.default)]
    fuser = _Fuser(ep, options.decode_bytes)
    for matmul in packed:
        if edit.is_call(matmul, KILN.expert_linear.default):
            fuse_experts.rewrite(fuser, matmul)
        else:
            fuser.rewrite(matmul)
    fuser.drop_dead_matmuls()
    fuser.round_late()
    ep.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or bool(edit.written_args(n)))
    counts = ", ".join(f"{n} {name}" for name, n in fuser.counts.items())
    note = f"{options.decode_bytes} bytes an activation; {len(matmuls)} matmuls, {counts}"
    return PassReport("fuse_decode", "applied", tuple(dict.fromkeys(fuser.places)), note)


class _Fuser:
    def __init__(self, ep, terms: int):
        self.ep, self.terms = ep, terms
        self.float32: dict[Node, Node] = {}  # a node -> the same value before it was rounded
        self.fixed: dict[Node, tuple[Node, ...]] = {}  # a node -> its value in fixed point, and what its matmuls are scaled by
        self.squares: dict[Node, Node] = {}  # the residual stream -> sums of its squares
        self.names = edit.states(ep)
        self.places: list[str] = []  # that were rewritten, by the names of weights and layers
        self.counts = {"norms": 0, "gated": 0, "sliding": 0, "global": 0, "conversions": 0}
        self.partials: dict[Node, Node] = {}  # a matmul -> the same, to be summed by its reader
        self.tables: dict[tuple[Node, Node], tuple[Node, Node]] = {}
        self.sources: dict[Node, tuple[Node, Node]] = {}  # a cache of keys that a fused op writes -> the token's key and value
        self.made: list[Node] = []
        first = next(n for n in ep.graph.nodes if n.op != "placeholder")
        device = edit.user_input(ep, "tokens").meta["val"].device
        with ep.graph.inserting_before(first):
            self.counters = ep.graph.call_function(aten.zeros.default, ([COUNTERS],), {"dtype": torch.int32, "device": device})
        with edit.fake_mode(ep):
            self.counters.meta["val"] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def emit(self, before: Node, target, *args) -> Node:
        return edit.emit(self.ep, before, target, *args)

    def name(self, constant: Node) -> str:
        """A weight's name, without that of its plane."""
        return self.names[constant].rpartition(".")[0]

    def rewrite(self, matmul: Node) -> None:
        x, words, halves, block_type = matmul.args
        fixed, *root = self.to_fixed(x, matmul)
        new = self.emit(matmul, KILN.fixed_linear.default, fixed, words, halves, block_type, self.counters, *root)
        self.made.append(new)
        self.places.append(self.name(words))
        self.replace_rounded(matmul, new)

    def replace_rounded(self, old: Node, new: Node) -> None:
        """`old`, of any dtype, by `new`, the same in float32."""
        dtype = old.meta["val"].dtype
        rounded = new if dtype == torch.float32 else self.emit(old, aten.to.dtype, new, dtype)
        self.float32[rounded] = new
        edit.replace(self.ep, old, rounded)

    def count(self, name: str, *weights: Node) -> None:
        """What was rewritten once more, and the places of these weights."""
        self.counts[name] = self.counts.get(name, 0) + 1
        self.places += [self.name(weight) for weight in weights]

    def drop_dead_matmuls(self) -> None:
        for node in reversed(self.made):  # readers first
            self.ep.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or bool(edit.written_args(n)))
            if not node.users:
                self.ep.graph.erase_node(node)

    def round_late(self) -> None:
        """What still reads a value of which float32 is known reads that one, rounded: else the value would be computed twice."""
        at = {node: i for i, node in enumerate(self.ep.graph.nodes)}
        for node, exact in self.float32.items():
            if node not in at or exact not in at or node is exact or exact in node.args[:1] or node in exact.args[:1]:
                continue
            if later := [user for user in node.users if at[user] > at[exact]]:
                rounded = self.emit(exact.next, aten.to.dtype, exact, node.meta["val"].dtype)
                for user in later:
                    user.replace_input_with(node, rounded)

    # ---- values before rounding ----

    def exact(self, node: Node, before: Node) -> Node:
        """`node` in float32, from before it was rounded if that is known."""
        if node not in self.float32:
            source = node
            if edit.is_call(node, aten.to.dtype) and isinstance(node.args[0], Node) and node.args[0].meta["val"].dtype == torch.float32:
                source = node.args[0]
            elif node.meta["val"].dtype != torch.float32 and edit.is_call(node, aten.add.Tensor) and len(node.all_input_nodes) == 2:
                here = node.next  # readers between there and `before` take it, too
                source = self.emit(here, aten.add.Tensor, *(self.exact(part, here) for part in node.args))
            elif node.meta["val"].dtype != torch.float32:
                source = self.emit(before, aten.to.dtype, node, torch.float32)
            self.float32[node] = source
        return self.float32[node]

    def raw(self, node: Node, before: Node, in_parts: bool) -> Node:
        """The projection behind views and a split of it, float32 [S, heads * D], to be summed over S; S is 1 unless `in_parts`."""
        whole, begin, end = _projection(node)
        value = self.parts(whole, before) if in_parts else self.exact(whole, before)
        return value if begin is None else self.emit(before, aten.slice.Tensor, value, 1, begin, end)

    def parts(self, node: Node, before: Node) -> Node:
        """What sums to `node`: a matmul that leaves its sum to its reader, or the value itself."""
        matmul = self.exact(node, before)
        if not edit.is_call(matmul, KILN.fixed_linear.default):
            return matmul
        if matmul not in self.partials:
            fixed, words, halves, block_type, _, *root = matmul.args
            self.partials[matmul] = self.emit(matmul, KILN.fixed_partials.default, fixed, words, halves, block_type, *root)
        return self.partials[matmul]

    def with_squares(self, node: Node, before: Node) -> tuple[Node, Node]:
        """`node` in float32 and the sums of its squares, which a matmul leaves beside its result."""
        value = self.exact(node, before)
        if value.target not in WITH_SQUARES:
            return value, self.emit(before, aten.sum.dim_IntList, self.emit(before, aten.mul.Tensor, value, value), [1])
        both = self.emit(value, WITH_SQUARES[value.target], *value.args)
        return tuple(self.emit(value, operator.getitem, both, i) for i in range(2))

    # ---- values in fixed point ----

    def to_fixed(self, x: Node, before: Node) -> tuple[Node, ...]:
        """x in fixed point, and (squares, eps) where its matmuls are to be multiplied by their root."""
        if x not in self.fixed:
            self.fixed[x] = next(found for found in (rule(self, x, before) for rule in RULES) if found)
        return self.fixed[x]

    def converted(self, x: Node, before: Node) -> tuple[Node]:
        """What no other rule takes."""
        self.counts["conversions"] += 1
        return (self.emit(before, KILN.fixed_point.default, x, self.terms),)

    def norm(self, x: Node, before: Node) -> tuple[Node, Node, float] | None:
        """RMSNorm of the residual stream, with the branch that was added to it, its own norm and the stream's scale."""
        if not edit.is_call(x, KILN.rms_norm.default) or x.args[1] is None:
            return None
        y, weight, eps, _ = x.args
        if edit.is_call(y, aten.slice.Tensor) and y.meta["val"].shape == y.args[0].meta["val"].shape:
            y = y.args[0]
        self.count("norms", weight)
        return *(self.added(y, weight, eps, before) or self.unadded(y, weight, before)), eps

    def unadded(self, y: Node, weight: Node, before: Node) -> tuple[Node, Node]:
        both = self.emit(before, KILN.norm_fixed.default, self.exact(y, before), weight, self.terms)
        fixed, self.squares[y] = (self.emit(before, operator.getitem, both, i) for i in range(2))
        return fixed, self.squares[y]

    def stream(self, x: Node, before: Node) -> tuple[Node] | None:
        """The residual stream as it is, with the branch that was added to it."""
        found = self.added(x, None, None, before)
        return found and found[:1]

    def added(self, y: Node, weight: Node | None, eps: float | None, before: Node) -> tuple[Node, Node] | None:
        """y * weight in fixed point and sums of squares of y, a sum that is not known yet. eps: of the branch's norm; None: any."""
        added = None if y in self.float32 else _branch_added(y, eps)
        if added is None:
            return None
        stream, branch, post_weight, scale, eps = added
        stream, op = self.exact(stream, before), KILN.add_norm.default
        two = None if post_weight is None else fuse_experts.branches(branch, eps)
        if post_weight is None:
            branches = [self.exact(branch, before), None]
        elif two:
            op, branches = KILN.add_norm_two.default, [part for value, own in two for part in (*self.with_squares(value, before), own)]
            self.places += [self.name(own) for _, own in two]
        else:
            branches = [*self.with_squares(branch, before)]
        self.places += [] if post_weight is None else [self.name(post_weight)]
        all_three = self.emit(before, op, stream, *branches, post_weight, scale, weight, eps, self.terms)
        self.float32[y], fixed, self.squares[y] = (self.emit(before, operator.getitem, all_three, i) for i in range(3))
        return fixed, self.squares[y]

    def gated(self, x: Node, before: Node) -> tuple[Node] | None:
        """activation(gate) * value of the halves of one matmul."""
        activation = next((name for name, op in GATED.items() if edit.is_call(x, op.default)), None)
        if activation is None:
            return None
        halves = [a.args if edit.is_call(a, operator.getitem) else (None, None) for a in x.args]
        (chunks, first), (other, second) = halves
        if chunks is None or chunks is not other or (first, second) != (0, 1) or not edit.is_call(chunks, aten.chunk.default):
            return None
        matmul = self.float32.get(chunks.args[0])
        if matmul is None or not edit.is_call(matmul, KILN.fixed_linear.default) or not glu_fits(matmul.meta["val"].shape[1]):
            return None
        self.counts["gated"] += 1
        self.places.append(self.name(matmul.args[1]).rpartition(".")[0] + ".glu")
        if activation == "gelu_tanh":  # the op's default
            return (self.emit(before, KILN.fixed_glu.default, *matmul.args),)
        *given, squares, eps = (*matmul.args, *(None, 0.0)[len(matmul.args) - 5 :])
        return (self.emit(before, KILN.fixed_glu.default, *given, squares, eps, activation),)

    def per_layer(self, x: Node, before: Node) -> tuple[Node] | None:
        """gelu(gate) * value, the value a layer's own of a per-layer embedding."""
        if not edit.is_call(x, KILN.gelu_mul.default):
            return None
        gate, value = x.args
        matmul = self.float32.get(gate)
        if not edit.is_call(value, aten.select.int) or not edit.is_call(matmul, KILN.fixed_linear.default):
            return None
        self.counts["per-layer"] = self.counts.get("per-layer", 0) + 1
        self.places.append(self.name(matmul.args[1]).rpartition(".")[0] + ".per_layer")
        source, *index = value.args
        exact = self.emit(before, aten.select.int, self.exact(source, before), *index)
        return (self.emit(before, KILN.gate_fixed.default, self.parts(gate, before), exact, self.terms),)

    def delta(self, x: Node, before: Node) -> tuple[Node] | None:
        """silu(z) * rms_norm(o, weight), o what a delta rule's step reads: with the step, from the parts of all four projections."""
        found = _gated_step(x)
        if found is None:
            return None
        step, z, weight = found
        u, alpha, beta, conv, a, bias, conv_state, delta_state, pos, key_heads, eps = step.args
        projections = [self.raw(node, before, True) for node in (u, alpha, beta, z)]
        self.made.append(step)  # nothing reads it any more, and its states are written here
        self.places.append(edit.layer_part(self.ep, (conv,), "delta"))
        self.counts["delta"] = self.counts.get("delta", 0) + 1
        return (self.emit(before, KILN.delta_decode.default, *projections, conv, a, bias, weight, conv_state, delta_state, pos,
                          self.counters, key_heads, eps, self.terms),)  # fmt: skip

    def attention(self, x: Node, before: Node) -> tuple[Node] | None:
        """Attention of one token with the preparation of its queries, keys and values, and the cache's write."""
        x, gates = _ungated(x)
        call = _viewed(x)
        if edit.is_call(call, aten.to.dtype):  # from the cache's dtype to the activations'
            x = call.args[0]
            call = _viewed(x)
        if not edit.is_call(call, KILN.sliding_attention.default, KILN.global_attention.default, KILN.tq4_attention.default):
            return None
        q = _rotated(call.args[0])
        if q is None or q.gates is not gates:
            return None
        if edit.resolve(_key_cache(call)) in self.sources:
            return None if gates else self.reader(x, call, q, before)
        write = _write(call)
        if write is None:
            return None
        k, v = _rotated(_viewed(write.k)), _normed_value(write.v)
        if k is None or k.cos is not q.cos or k.sin is not q.sin or k.scale != 1 or k.neighbours != q.neighbours:
            return None
        if (k.weight is None) != (q.weight is None) or len({eps for eps in (q.eps, k.eps, v.eps) if eps is not None}) > 1:
            return None
        sliding = edit.is_call(call, KILN.sliding_attention.default)
        if sliding and (q.neighbours or q.weight is None or q.in_part or gates):
            return None  # a form that its kernel does not have
        eps = next((eps for eps in (q.eps, v.eps) if eps is not None), 0.0)
        first = min(write.nodes[0], before)  # a ring is written after the last of the layers that read it
        if not _projection(q.x)[0] < first:
            return None  # a layer that reads the cache of one that was left as it is
        self.places.append(edit.layer_part(self.ep, call.args, "attention"))
        self.sources[edit.resolve(_key_cache(call))] = write.k, write.v
        together = _projection(q.x)[0] is _projection(k.x)[0]  # matmuls of their own are split differently
        projections = [self.raw(n, first, parts) for n, parts in ((q.x, together), (k.x, together), (v.x, True))]
        shared = (*projections, q.weight, k.weight, *self.table(q.cos, q.sin))
        form = (q.scale, v.eps is not None) + (() if sliding else (q.neighbours,))
        form = () if form == (1.0, True, False)[: len(form)] and not gates else form  # the ops' defaults
        if edit.is_call(call, KILN.sliding_attention.default):
            _, _, _, k_ring, v_ring, pos, window = call.args
            self.counts["sliding"] += 1
            for node in write.nodes:
                self.ep.graph.erase_node(node)
            return (self.emit(before, KILN.sliding_decode.default, *shared, k_ring, v_ring, pos, window, eps, self.terms, *form),)
        self.counts["global"] += 1
        if edit.is_call(call, KILN.tq4_attention.default):
            for node in write.nodes:
                self.ep.graph.erase_node(node)
            gated = (0, True) if gates else ()
            return (self.emit(before, KILN.tq4_decode.default, *shared, *call.args[3:10], eps, self.terms, *form, *gated),)
        call.args = (*call.args[:-1], None)  # one token's position bounds the cache too, and needs no kernel to compute
        gated = (True,) if gates else ()
        prepared = self.emit(first, KILN.prepare_qkv.default, *shared, eps, call.meta["val"].dtype, *form, *gated)
        for i, old in enumerate((call.args[0], write.k, write.v)):
            old.replace_all_uses_with(self.emit(first, operator.getitem, prepared, i))
        if gates:
            return (self.emit(before, KILN.attention_gate_fixed.default, projections[0], call, self.terms),)
        return self.converted(x, before)

    def reader(self, x: Node, call: Node, q: _Rotated, before: Node) -> tuple[Node] | None:
        """Attention of one token over a cache that another layer's fused op has written its key and value to."""
        sliding = edit.is_call(call, KILN.sliding_attention.default)
        tq4 = edit.is_call(call, KILN.tq4_attention.default)
        if sliding or tq4:
            own = tuple(_viewed(a) for a in call.args[1:3])
            if own != tuple(_viewed(a) for a in self.sources[edit.resolve(_key_cache(call))]):
                return None
        if q.in_part or (sliding and (q.neighbours or q.weight is None)):
            return None  # a form that its kernel does not have
        self.places.append(edit.layer_part(self.ep, call.args, "attention"))
        self.counts["shared"] = self.counts.get("shared", 0) + 1
        at = before if sliding or tq4 else call
        shared = (self.raw(q.x, at, True), q.weight, *self.table(q.cos, q.sin))
        form = (q.scale,) if sliding else (q.scale, q.neighbours)
        form = () if form == (1.0, False)[: len(form)] else form  # the ops' defaults
        eps = q.eps or 0.0
        if sliding:
            return (self.emit(before, KILN.sliding_read.default, *shared, *call.args[3:7], eps, self.terms, *form),)
        if tq4:
            return (self.emit(before, KILN.tq4_read.default, *shared, *call.args[3:10], eps, self.terms, *form),)
        call.args = (*call.args[:-1], None)
        query = self.emit(call, KILN.prepare_q.default, *shared, eps, call.meta["val"].dtype, *form)
        call.args[0].replace_all_uses_with(query)
        return self.converted(x, before)

    def table(self, cos: Node, sin: Node) -> tuple[Node, Node]:
        """cos and sin from one kernel; as they are, every reader would compute its own."""
        if (cos, sin) not in self.tables:
            pos, inv_freq = edit.user_input(self.ep, "pos"), _frequencies(cos, sin, edit.user_input(self.ep, "pos"))
            if inv_freq is None:
                self.tables[cos, sin] = cos, sin
            else:
                first = min(cos, sin)
                both = self.emit(first, KILN.rope_table.default, pos, inv_freq)
                self.tables[cos, sin] = tuple(self.emit(first, operator.getitem, both, i) for i in range(2))
        return self.tables[cos, sin]


def _frequencies(cos: Node, sin: Node, pos: Node) -> Node | None:
    """The parameter inv_freq of cos(pos * inv_freq) and sin(pos * inv_freq)."""
    if not edit.is_call(cos, aten.cos.default) or not edit.is_call(sin, aten.sin.default) or cos.args[0] is not sin.args[0]:
        return None
    angle = cos.args[0]
    if not edit.is_call(angle, aten.mul.Tensor):
        return None
    position, inv_freq = angle.args
    while edit.is_call(position, aten.unsqueeze.default, aten.to.dtype):
        position = position.args[0]
    return inv_freq if position is pos and isinstance(inv_freq, Node) and inv_freq.op == "placeholder" else None


# In the order in which they are tried; each counts what it takes.
RULES = (_Fuser.norm, _Fuser.gated, _Fuser.per_layer, _Fuser.delta, _Fuser.attention, _Fuser.stream, _Fuser.converted)


class _Rotated:
    """rope(rms_norm(x, weight)), or rope(x) without weight and eps."""

    def __init__(self, node: Node):
        x, self.cos, self.sin, self.scale, self.neighbours = (*node.args, *(1.0, False)[len(node.args) - 3 :])  # defaults are left out
        self.x, self.weight, self.eps = _behind_conversion(x), None, None
        turned = 2 * self.cos.meta["val"].shape[-1]
        self.in_part = turned != x.meta["val"].shape[-1]
        if edit.is_call(self.x, KILN.rms_norm.default):
            self.x, self.weight, self.eps, _ = self.x.args
        self.gates = None  # of the heads' outputs, each behind its query in one projection
        if edit.is_call(self.x, operator.getitem) and self.x.args[1] == 0 and _is_halved(self.x.args[0]):
            self.gates = self.x.args[0]
            self.x = self.gates.args[0]
        self.supported = not self.in_part or (self.weight is not None and not self.neighbours and not turned & (turned - 1))


def _rotated(node: Node) -> _Rotated | None:
    if not edit.is_call(node, KILN.rope.default):
        return None
    found = _Rotated(node)
    return None if not found.supported or (found.eps is not None and found.weight is None) else found


def _is_halved(node: Node) -> bool:
    """`node` is the halves of each head, [T, heads, 2 D]."""
    return edit.is_call(node, aten.chunk.default) and node.args[1:] == (2, -1) and len(node.args[0].meta["val"].shape) == 3


def _ungated(x: Node) -> tuple[Node, Node | None]:
    """(output, gates) of x = output * sigmoid(the second of each two halves `gates`), else x and None."""
    product = _behind_conversion(x)
    if not edit.is_call(product, aten.mul.Tensor) or not edit.is_call(product.args[1], aten.sigmoid.default):
        return x, None
    gate = _viewed(_behind_conversion(product.args[1].args[0]))
    if not edit.is_call(gate, operator.getitem) or gate.args[1] != 1 or not _is_halved(gate.args[0]):
        return x, None
    return product.args[0], gate.args[0]


def _gated_step(x: Node) -> tuple[Node, Node, Node] | None:
    """(step, z, weight) of x = silu(z) * rms_norm(step, weight), each head by itself, where nothing else reads the step."""
    product = _viewed(x)
    if not edit.is_call(product, KILN.silu_mul.default):
        return None
    z, norm = product.args
    if not edit.is_call(norm, KILN.rms_norm.default) or not edit.is_call(norm.args[0], KILN.delta_step.default) or norm.args[1] is None:
        return None
    step, weight, eps, _ = norm.args
    alone = len(step.users) == 1 and eps == step.args[-1] and weight.meta["val"].shape[0] % GROUP == 0
    return (step, z, weight) if alone and z.meta["val"].shape == step.meta["val"].shape else None


class _NormedValue:
    """rms_norm(x), or x as it is, without eps."""

    def __init__(self, x: Node, eps: float | None):
        self.x, self.eps = x, eps


def _normed_value(node: Node) -> _NormedValue:
    node = _behind_conversion(_viewed(node))
    if edit.is_call(node, KILN.rms_norm.default) and node.args[1] is None:
        return _NormedValue(node.args[0], node.args[2])
    return _NormedValue(node, None)


def _behind_conversion(node: Node) -> Node:
    """What a value was before it took the cache's dtype."""
    return node.args[0] if edit.is_call(node, aten.to.dtype) else node


class _Writes:
    """The nodes that write a token's key and value to the caches of an attention, in graph order, and what they write."""

    def __init__(self, nodes: list[Node], k: Node, v: Node):
        self.nodes, self.k, self.v = nodes, k, v


def _key_cache(call: Node) -> Node:
    """What an attention reads earlier keys from: a ring, a global cache or codes."""
    return call.args[1 if edit.is_call(call, KILN.global_attention.default) else 3]


def _write(call: Node) -> _Writes | None:
    tq4 = edit.is_call(call, KILN.tq4_attention.default)
    ring = tq4 or edit.is_call(call, KILN.sliding_attention.default)
    caches = [edit.resolve(c) for c in (call.args[7:9] if tq4 else call.args[3:5] if ring else call.args[1:3])]
    writes = [[u for u in c.users if edit.is_call(u, aten.index_copy_.default)] for c in caches]
    if [len(w) for w in writes] != [1, 1]:
        return None
    (k_write,), (v_write,) = writes
    k, v = k_write.args[3], v_write.args[3]
    if ring:
        own = not k_write.users and not v_write.users and (_viewed(k), _viewed(v)) == tuple(_viewed(x) for x in call.args[1:3])
        pos = call.args[9 if tq4 else 5]
        if not own or not all(_at_slot(w, pos, caches[0].meta["val"].shape[0]) for w in (k_write, v_write)):
            return None
    nodes = [k_write, v_write]
    if tq4:
        encoded = [u for u in call.args[3].users if edit.is_call(u, KILN.tq4_write.default)]
        if len(encoded) != 1 or tuple(encoded[0].args[4:6]) != tuple(call.args[1:3]):
            return None
        nodes += encoded
    return _Writes(sorted(nodes), k, v)


def _at_slot(write: Node, pos: Node, slots: int) -> bool:
    """`write` puts the token into the ring's slot pos % slots."""
    return write.args[1] == 0 and edit.is_call(write.args[2], aten.remainder.Scalar) and write.args[2].args == (pos, slots)


def _projection(node: Node) -> tuple[Node, int | None, int | None]:
    """(projection, begin, end): what `node` is a view of, and the columns of it where it is split."""
    node = _viewed(node)
    if edit.is_call(node, operator.getitem):
        pieces, index = node.args
        if edit.is_call(pieces, aten.split_with_sizes.default, aten.split.sizes) and len(pieces.args[0].meta["val"].shape) == 2:
            sizes = pieces.args[1]
            begin = sum(sizes[:index])
            return pieces.args[0], begin, begin + sizes[index]
    return node, None, None


def _viewed(node: Node) -> Node:
    while edit.is_call(node, *VIEWS):
        node = node.args[0]
    return node


def _branch_added(y: Node, eps: float | None) -> tuple[Node, Node, Node | None, Node | None, float] | None:
    """(stream, branch, weight, scale, eps) of y = (stream + rms_norm(branch, weight, eps)) * scale, with or without norm and scale.

    eps: the only one that may be; None: any.
    """
    scale = None
    if edit.is_call(y, aten.to.dtype) and edit.is_call(y.args[0], aten.mul.Tensor):
        left, scale = y.args[0].args
        if not edit.is_call(left, aten.to.dtype) or not isinstance(scale, Node) or scale.op != "placeholder":
            return None
        y = left.args[0]
    if not edit.is_call(y, aten.add.Tensor) or len(y.args) != 2:
        return None
    stream, branch = y.args
    if not edit.is_call(branch, KILN.rms_norm.default):
        return stream, branch, None, scale, eps or 0.0
    if branch.args[1] is None or branch.args[2] != (branch.args[2] if eps is None else eps):
        return None
    return stream, branch.args[0], branch.args[1], scale, branch.args[2]
