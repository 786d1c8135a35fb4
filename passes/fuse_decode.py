"""The layer of a decode step in a few kernels: matmuls on fixed-point activations, and one kernel for what lies between two matmuls.

The residual stream and the results of matmuls stay in float32. An activation becomes fixed point (`custom_ops/weights/fixed_point.py`)
where it is made: in the norm, in gelu(gate) * value, or in the attention before the matmul. A matmul whose weight is not packed stays as
it is, and so does every neighbour of another form.

A step of several tokens takes the same rules: its ops compute each token as those of one token do, and its attention writes all keys first.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from kiln.custom_ops.markers import GATED
from kiln.custom_ops.weights.gemv import COUNTERS, glu_fits
from kiln.passes import edit, fuse_experts
from kiln.passes.decode_patterns import (
    Rotated,
    branch_added,
    center_of,
    exact_window_of,
    frequencies,
    gated_step,
    key_cache,
    normed_value,
    projection,
    rotated,
    ungated,
    viewed,
    writes_of,
)
from kiln.passes.edit import KILN, PassError
from kiln.passes.records import Lowered, PassOptions, PassReport

aten = torch.ops.aten
WITH_SQUARES = {KILN.fixed_linear.default: KILN.fixed_linear_squares.default,  # a matmul -> the same, with sums of squares of its result
                KILN.expert_sum.default: KILN.expert_sum_squares.default}  # fmt: skip
# An attention -> the op that also prepares and writes, the one that reads what another layer wrote, and its arguments that they take:
# caches, positions, rows, window. Of `global_...` none does so.
FUSED = {KILN.sliding_attention.default: (KILN.sliding_decode.default, KILN.sliding_read.default, slice(3, 7)),
         KILN.tq4_attention.default: (KILN.tq4_decode.default, KILN.tq4_read.default, slice(3, 10)),
         KILN.sliding_rows.default: (KILN.sliding_decode_rows.default, KILN.sliding_read_rows.default, slice(1, 6)),
         KILN.tq4_rows.default: (KILN.tq4_decode_rows.default, KILN.tq4_read_rows.default, slice(1, 10))}  # fmt: skip
SLIDING = (KILN.sliding_attention.default, KILN.sliding_rows.default)
GLOBAL = (KILN.global_attention.default, KILN.global_rows.default)
# What the compiler, or a library, adds up in an order that may depend on the number of rows.
IN_ANY_ORDER = (
    KILN.rms_norm.default, KILN.quantized_linear.default, KILN.expert_linear.default, KILN.route.default, KILN.sliding_rows.default,
    KILN.tq4_rows.default, aten.linear.default, aten.mm.default, aten.matmul.default, aten.bmm.default, aten.addmm.default,
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.softmax.int, aten.cumsum.default,
)  # fmt: skip


def run(lowered: Lowered, options: PassOptions) -> PassReport:
    if not options.decode_bytes:
        return PassReport("fuse_decode", "off", note="the target's matmuls take activations as they are")
    ep = lowered.program
    if edit.user_input(ep, "tokens").meta["val"].shape[0] != 1 and not edit.has_input(ep, "row"):
        return PassReport("fuse_decode", "not needed", note="many tokens")
    packed = [n for n in ep.graph.nodes if edit.is_call(n, KILN.quantized_linear.default, KILN.expert_linear.default)]
    if not packed:
        return PassReport("fuse_decode", "not needed", note="no weight is packed")
    matmuls = [n for n in packed if edit.is_call(n, KILN.quantized_linear.default)]
    fuser = _Fuser(ep, options)
    for matmul in packed:
        if edit.is_call(matmul, KILN.expert_linear.default):
            fuse_experts.rewrite(fuser, matmul)
        else:
            fuser.rewrite(matmul)
    fuser.round_late()  # while what is known in float32 is there, read or not
    edit.drop_dead(ep, fuser.made)  # a matmul's counters are back at zero when it is done
    # A drafter's bits are in no text, nor are those of the rows that only it is given.
    text = () if edit.drafts(ep) else (n for n in ep.graph.nodes if any(user.op != "output" for user in n.users))
    if fuser.several and (left := next((n for n in text if edit.is_call(n, *IN_ANY_ORDER)), None)):
        raise PassError(f"pass fuse_decode: {left.name} ({left.target}) of several tokens may add up in another order than of one")
    counts = ", ".join(f"{n} {name}" for name, n in fuser.counts.items())
    note = f"{options.decode_bytes} bytes an activation; {len(matmuls)} matmuls, {counts}"
    return PassReport("fuse_decode", "applied", tuple(dict.fromkeys(fuser.places)), note)


class _Fuser:
    def __init__(self, ep, options: PassOptions):
        self.ep, self.terms = ep, options.decode_bytes
        self.several = edit.has_input(ep, "row")  # tokens, each of one of several rows of caches
        many = options.decode_rows[-1] > 1 or self.several
        # Matmuls may add up in an order of their own where no step of several tokens, beside, has to have the same bits.
        self.alone = {} if many else {"alone": True}
        # Several tokens of one row read its window together; of several rows, most are of different ones.
        self.slots = {"slots": True} if many and options.rows == 1 else {}
        self.float32: dict[Node, Node] = {}  # a node -> the same value before it was rounded
        self.fixed: dict[Node, tuple[Node, ...]] = {}  # a node -> its value in fixed point, and what its matmuls are scaled by
        self.squares: dict[Node, Node] = {}  # the residual stream -> sums of its squares
        self.names = edit.states(ep)
        self.places: list[str] = []  # that were rewritten, by the names of weights and layers
        self.counts = {"norms": 0, "gated": 0, "sliding": 0, "global": 0, "conversions": 0}
        self.partials: dict[Node, Node] = {}  # a matmul -> the same, to be summed by its reader
        self.tables: dict[tuple[Node, Node], tuple[Node, Node]] = {}
        self.sources: dict[Node, tuple[Node, Node]] = {}  # a cache of keys that a fused op writes -> the token's key and value
        self.made: set[Node] = set()  # matmuls
        first = next(n for n in ep.graph.nodes if n.op != "placeholder")
        device = edit.user_input(ep, "tokens").meta["val"].device
        with ep.graph.inserting_before(first):
            self.counters = ep.graph.call_function(aten.zeros.default, ([COUNTERS],), {"dtype": torch.int32, "device": device})
        with edit.fake_mode(ep):
            self.counters.meta["val"] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def emit(self, before: Node, target, *args, **kwargs) -> Node:
        return edit.emit(self.ep, before, target, *args, **kwargs)

    def name(self, constant: Node) -> str:
        """A weight's name, without that of its plane."""
        return self.names[constant].rpartition(".")[0]

    def rewrite(self, matmul: Node) -> None:
        x, words, halves, block_type = matmul.args
        fixed, *root = self.to_fixed(x, matmul)
        new = self.emit(matmul, KILN.fixed_linear.default, fixed, words, halves, block_type, self.counters, *root, **self.alone)
        self.made.add(new)
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
        """The projection behind views and a split of it, float32 [S, heads * D], to be summed over S; S is 1 unless `in_parts`. Of several
        tokens [S, T, heads * D]."""
        whole, begin, end = projection(node)
        value = self.parts(whole, before) if in_parts else self.exact(whole, before)
        if self.several and len(value.meta["val"].shape) == 2:  # [T, N], or of one token [S, N]
            one = whole.meta["val"].shape[0] == 1
            value = self.emit(before, aten.unsqueeze.default, value, int(one))
        return value if begin is None else self.emit(before, aten.slice.Tensor, value, 1 + self.several, begin, end)

    def parts(self, node: Node, before: Node) -> Node:
        """What sums to `node`: a matmul that leaves its sum to its reader, or the value itself."""
        matmul = self.exact(node, before)
        if not edit.is_call(matmul, KILN.fixed_linear.default):
            return matmul
        if matmul not in self.partials:
            fixed, words, halves, block_type, _, *root = matmul.args
            self.partials[matmul] = self.emit(matmul, KILN.fixed_partials.default, fixed, words, halves, block_type, *root, **matmul.kwargs)
        return self.partials[matmul]

    def with_squares(self, node: Node, before: Node) -> tuple[Node, Node]:
        """`node` in float32 and the sums of its squares, which a matmul leaves beside its result."""
        value = self.exact(node, before)
        if value.target not in WITH_SQUARES:
            return value, self.emit(before, aten.sum.dim_IntList, self.emit(before, aten.mul.Tensor, value, value), [1])
        both = self.emit(value, WITH_SQUARES[value.target], *value.args, **value.kwargs)
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
        added = None if y in self.float32 else branch_added(y, eps)
        if added is None:
            return None
        stream, branch, post_weight, scale, eps = added
        two = None if post_weight is None else fuse_experts.branches(branch, eps)
        if self.several and post_weight is not None and (two or self.exact(branch, before).target not in WITH_SQUARES):
            return None  # a sum of squares that the compiler orders, by the number of tokens
        stream, op = self.exact(stream, before), KILN.add_norm.default
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
            return (self.emit(before, KILN.fixed_glu.default, *matmul.args, **matmul.kwargs),)
        *given, squares, eps = (*matmul.args, *(None, 0.0)[len(matmul.args) - 5 :])
        return (self.emit(before, KILN.fixed_glu.default, *given, squares, eps, activation, **matmul.kwargs),)

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
        found = gated_step(x)
        if found is None:
            return None
        step, z, weight = found
        u, alpha, beta, conv, a, bias, conv_state, delta_state, pos, key_heads, eps = step.args
        projections = [self.raw(node, before, True) for node in (u, alpha, beta, z)]
        self.made.add(step)  # nothing reads it any more, and its states are written here
        self.places.append(edit.layer_part(self.ep, (conv,), "delta"))
        self.counts["delta"] = self.counts.get("delta", 0) + 1
        return (self.emit(before, KILN.delta_decode.default, *projections, conv, a, bias, weight, conv_state, delta_state, pos,
                          self.counters, key_heads, eps, self.terms),)  # fmt: skip

    def attention(self, x: Node, before: Node) -> tuple[Node] | None:
        """Attention with the preparation of its queries, keys and values, and the cache's write."""
        x, gates = ungated(x)
        call = viewed(x)
        if edit.is_call(call, aten.to.dtype):  # from the cache's dtype to the activations'
            x = call.args[0]
            call = viewed(x)
        if not edit.is_call(call, *FUSED, *GLOBAL):
            return None
        q = rotated(call.args[0])
        if q is None or q.gates is not gates or (self.several and (gates or q.in_part)):
            return None
        if edit.resolve(key_cache(call)) in self.sources or edit.drafts(self.ep):
            return None if gates else self.reader(x, call, q, before)
        write = writes_of(call)
        if write is None:
            return None
        k, v = rotated(viewed(write.k)), normed_value(write.v)
        if k is None or k.cos is not q.cos or k.sin is not q.sin or k.scale != 1 or k.neighbours != q.neighbours:
            return None
        if (k.weight is None) != (q.weight is None) or len({eps for eps in (q.eps, k.eps, v.eps) if eps is not None}) > 1:
            return None
        sliding = edit.is_call(call, *SLIDING)
        if sliding and (q.neighbours or q.weight is None or q.in_part or gates):
            return None  # a form that its kernel does not have
        eps = next((eps for eps in (q.eps, v.eps) if eps is not None), 0.0)
        first = min(write.nodes[0], before)  # of one token a ring is written after the last of the layers that read it
        if not projection(q.x)[0] < first:
            return None  # a layer that reads the cache of one that was left as it is
        self.places.append(edit.layer_part(self.ep, call.args, "attention"))
        self.sources[edit.resolve(key_cache(call))] = write.k, write.v
        together = projection(q.x)[0] is projection(k.x)[0]  # matmuls of their own are split differently
        projections = [self.raw(n, first, parts) for n, parts in ((q.x, together), (k.x, together), (v.x, True))]
        shared = (*projections, q.weight, k.weight, *self.table(q.cos, q.sin))
        form = (q.scale, v.eps is not None) + (() if sliding else (q.neighbours,))
        form = () if form == (1.0, True, False)[: len(form)] else form  # the ops' defaults
        gated = {"gated": True} if gates else {}
        self.counts["sliding" if sliding else "global"] += 1
        if call.target in FUSED:
            for node in write.nodes:
                edit.replace(self.ep, node, edit.resolve(node)) if node.users else self.ep.graph.erase_node(node)
            op, _, given = FUSED[call.target]
            more = exact_window_of(call) | gated | (self.slots if sliding else {})
            made = () if sliding else (center_of(call),)
            return (self.emit(before, op, *shared, *map(edit.resolve, call.args[given]), eps, self.terms, *made, *form, **more),)
        self.bounded(call)
        prepared = self.emit(first, KILN.prepare_qkv.default, *shared, eps, call.meta["val"].dtype, *form, **gated)
        for i, old in enumerate((call.args[0], write.k, write.v)):
            old.replace_all_uses_with(self.emit(first, operator.getitem, prepared, i))
        if gates:
            return (self.emit(before, KILN.attention_gate_fixed.default, projections[0], call, self.terms),)
        return self.converted(x, before)

    def reader(self, x: Node, call: Node, q: Rotated, before: Node) -> tuple[Node] | None:
        """Attention over a cache that another layer's fused op has written the tokens' keys and values to."""
        sliding, fused = edit.is_call(call, *SLIDING), call.target in FUSED
        if fused and not self.several:
            own = tuple(viewed(a) for a in call.args[1:3])
            if own != tuple(viewed(a) for a in self.sources[edit.resolve(key_cache(call))]):
                return None
        if q.in_part or (sliding and (q.neighbours or q.weight is None)):
            return None  # a form that its kernel does not have
        self.places.append(edit.layer_part(self.ep, call.args, "attention"))
        self.counts["shared"] = self.counts.get("shared", 0) + 1
        at = before if fused else call
        shared = (self.raw(q.x, at, True), q.weight, *self.table(q.cos, q.sin))
        form = (q.scale,) if sliding else (q.scale, q.neighbours)
        form = () if form == (1.0, False)[: len(form)] else form  # the ops' defaults
        eps = q.eps or 0.0
        if fused:
            _, op, given = FUSED[call.target]
            center = center_of(call)
            more = exact_window_of(call) | ({"k_center": center[0]} if center else {}) | (self.slots if sliding else {})
            return (self.emit(before, op, *shared, *map(edit.resolve, call.args[given]), eps, self.terms, *form, **more),)
        self.bounded(call)
        query = self.emit(call, KILN.prepare_q.default, *shared, eps, call.meta["val"].dtype, *form)
        call.args[0].replace_all_uses_with(query)
        return self.converted(x, before)

    def bounded(self, call: Node) -> None:
        """One token's position bounds the cache as its length does, and needs no kernel to compute."""
        if edit.is_call(call, KILN.global_attention.default):
            call.args = (*call.args[:-1], None)

    def table(self, cos: Node, sin: Node) -> tuple[Node, Node]:
        """cos and sin from one kernel; as they are, every reader would compute its own."""
        if (cos, sin) not in self.tables:
            found = frequencies(cos, sin)
            if found is None:
                self.tables[cos, sin] = cos, sin
            else:
                first = min(cos, sin)
                both = self.emit(first, KILN.rope_table.default, *found)
                self.tables[cos, sin] = tuple(self.emit(first, operator.getitem, both, i) for i in range(2))
        return self.tables[cos, sin]


# In the order in which they are tried; each counts what it takes.
RULES = (_Fuser.norm, _Fuser.gated, _Fuser.per_layer, _Fuser.delta, _Fuser.attention, _Fuser.stream, _Fuser.converted)
