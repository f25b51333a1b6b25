"""Bytes that compiled code holds while it runs an aten graph: what Inductor writes to memory, and for how long.

Pointwise ops and reductions that follow each other without another kernel between them are one kernel; of what is made
in it only what is read outside of it comes to memory. A pointwise value of few inputs is made again where it is read.
Views are the memory they look at. A kernel of pointwise ops may write over a value of the same bytes that nothing reads
any more. What the graph is given is let go after its last reader, or held by the caller throughout.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from autopar.codegen.live import rounded
from autopar.codegen.rooms import ROOMS, room_of

aten, prims = torch.ops.aten, torch.ops.prims
FEW = 4
"""The most values in memory that a pointwise value is made again from, rather than kept: Inductor's threshold."""
Same = Mapping[fx.Node, fx.Node]
_VIEWS = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze",
          "squeeze", "alias", "detach", "as_strided", "split", "split_with_sizes", "unbind", "view_as", "diagonal",
          "wait_tensor", "_reshape_alias"}
_INLINE = {"convert_element_type", "clone", "_to_copy", "to", "where", "full", "full_like", "iota", "arange",
           "embedding", "index", "gather", "scalar_tensor", "constant_pad_nd", "empty", "zeros", "ones", "copy", "fma",
           "cat", "slice_scatter", "lift_fresh_copy", "zeros_like", "ones_like", "bernoulli", "scatter"}
"""Ops that Inductor computes within a kernel as it does pointwise ones, though they have no such tag."""
_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "var_mean", "var", "any", "all", "argmax", "argmin", "prod",
               "prepare_softmax_online"}


def name_of(node: fx.Node) -> str:
    """The op's name without namespace and overload."""
    return node.target._schema.name.rpartition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def is_view(node: fx.Node) -> bool:
    """Whether `node` looks at memory of its first input."""
    return node.target is operator.getitem or name_of(node) in _VIEWS


def is_pointwise(node: fx.Node) -> bool:
    """Whether Inductor computes `node` element by element."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.pointwise in tags or name_of(node) in _INLINE


def is_reduction(node: fx.Node) -> bool:
    """Whether `node` is a reduction in a kernel that others may join."""
    return name_of(node) in _REDUCTIONS


def nbytes_of(value: object, grain: int) -> int:
    """Bytes of a node's value, all tensors of it."""
    found = value if isinstance(value, tuple | list) else [value]
    return sum(rounded(x.untyped_storage().nbytes() if x.numel() else 0, grain) for x in found if isinstance(x, Tensor))


def room(node: fx.Node, fused: bool) -> int:
    """Bytes that an op works in besides."""
    name = name_of(node)
    if name not in ROOMS:
        return 0
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    return int(room_of(name, args, fused))


@dataclass(eq=False)
class Kernels:
    """A graph cut into kernels: which one each value is made in, what each reads from memory, what it writes."""

    graph: fx.Graph
    outputs: frozenset[fx.Node]
    base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    kernel: dict[fx.Node, int] = field(default_factory=dict)
    reads: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    stored: set[fx.Node] = field(default_factory=set)
    _level: dict[fx.Node, int] = field(default_factory=dict)
    _leader: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def find(self, node: fx.Node) -> fx.Node:
        """The node that stands for the kernel of `node`."""
        while self._leader[node] is not node:
            node = self._leader[node]
        return node

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """What `node` reads, views seen through."""
        return list(dict.fromkeys(self.base[n] for n in node.all_input_nodes if n in self.base))


def kernels_of(graph: fx.Graph, same: Same) -> Kernels:
    """Cut a graph into kernels."""
    ends = next(n for n in graph.nodes if n.op == "output")
    found = Kernels(graph, frozenset())
    found.base.update(bases_of(graph, same))
    found.outputs = frozenset(found.base[n] for n in ends.all_input_nodes)
    ops = [n for n in graph.nodes if n.op == "call_function" and found.base[n] is n]
    for node in ops:
        _join(found, node)
    for node in ops:
        _store(found, node)
    return found


def _join(found: Kernels, node: fx.Node) -> None:
    """Put a node into the kernel of its inputs where they can be one."""
    fusable = is_pointwise(node) or is_reduction(node)
    inputs = [n for n in found.inputs(node) if n in found._level]
    level = 0
    for n in inputs:
        apart = not fusable or not (is_pointwise(n) or is_reduction(n))
        level = max(level, found._level[n] + apart)
    found._level[node], found._leader[node] = level, node
    if fusable:
        for n in inputs:
            if (is_pointwise(n) or is_reduction(n)) and found._level[n] == level:
                found._leader[found.find(n)] = node


def _store(found: Kernels, node: fx.Node) -> None:
    """Decide whether a value comes to memory."""
    users = {found.find(u) if u in found._leader else u for u in _users(found, node)}
    leaves: frozenset[fx.Node] = frozenset()
    for n in found.inputs(node):
        leaves |= frozenset([n]) if n in found.stored or n not in found._leader else found.reads[n]
    found.reads[node] = leaves
    outside = users - {found.find(node)}
    extern = any(u in found._leader and not (is_pointwise(u) or is_reduction(u)) for u in _users(found, node))
    again = is_pointwise(node) and len(leaves) <= FEW and not extern
    own_kernel = not is_pointwise(node) and not is_reduction(node)
    if node in found.outputs or own_kernel or extern or (outside and not again):
        found.stored.add(node)


def _users(found: Kernels, node: fx.Node) -> list[fx.Node]:
    """The ops that read a value, views seen through."""
    users: list[fx.Node] = []
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user.op == "call_function" and found.base.get(user) is found.base[node] and user is not node:
            pending += user.users
        else:
            users.append(user)
    return users


@dataclass(frozen=True)
class Inputs:
    """What becomes of a graph's inputs: those that are `held` by others do not count, `lasting` ones count to the end,
    of those that are the `same` memory as others only these count, and all that are left go after their last reader."""

    held: Collection[fx.Node] = ()
    lasting: Collection[fx.Node] = ()
    same: Same = field(default_factory=dict)


def peak(graph: fx.Graph, inputs: Inputs, grain: int = 1) -> int:
    """The most bytes at any time in memory while `graph` runs."""
    found = kernels_of(graph, inputs.same)
    stay = {*found.outputs, *inputs.lasting}
    order = [n for n in graph.nodes if n.op == "call_function" and n in found.stored]
    placeholders = [n for n in graph.nodes if n.op == "placeholder" and found.base[n] is n]
    size = {n: nbytes_of(n.meta.get("val"), grain) for n in [*order, *placeholders]}
    last = _last_reads(found, order)
    alive = {n: size[n] for n in placeholders if n not in inputs.held}
    now = most = sum(alive.values())
    for place, node in enumerate(order):
        dying = [n for n in list(alive) if last.get(n, -1) <= place and n not in stay]
        written_over = is_pointwise(node) and name_of(node) != "clone" and any(
            size[n] == size[node] and n.op != "placeholder" and last.get(n) == place for n in dying)
        most = max(most, now + (0 if written_over else size[node]) + room(node, fused=True))
        now += size[node]
        alive[node] = size[node]
        for n in dying:
            now -= alive.pop(n)
    return most


def _last_reads(found: Kernels, order: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """The place in order of the last stored value whose kernel reads each value in memory."""
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(order):
        for read in found.reads[node]:
            last[read] = place
        last.setdefault(node, place)
    return last


def plain_peak(graph: fx.Graph, inputs: Inputs, grain: int = 1) -> int:
    """The same where ops run one by one: each stores what it makes, and what the graph is given stays till the end."""
    base = bases_of(graph, inputs.same)
    order = [n for n in graph.nodes if n.op == "call_function" and base[n] is n]
    place = {n: i for i, n in enumerate(order)}
    ends = {base[n] for n in graph.output_node().all_input_nodes}
    last = dict(place)
    now = 0
    for node in graph.nodes:
        own = node.op == "placeholder" and node not in inputs.held and base[node] is node
        now += nbytes_of(node.meta.get("val"), grain) if own else 0
        for read in node.all_input_nodes if node in place else ():
            last[base[read]] = place[node]
    dying: dict[int, int] = {}
    for node in order:
        if node not in ends:
            dying[last[node]] = dying.get(last[node], 0) + nbytes_of(node.meta.get("val"), grain)
    most = now
    for i, node in enumerate(order):
        now += nbytes_of(node.meta.get("val"), grain)
        most = max(most, now + room(node, fused=False))
        now -= dying.get(i, 0)
    return most


def bases_of(graph: fx.Graph, same: Same | None = None) -> dict[fx.Node, fx.Node]:
    """By node the one whose memory it looks at; inputs that are the `same` memory as others look at theirs."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        own = node.op in ("placeholder", "get_attr") or not is_view(node) or not node.all_input_nodes
        base[node] = (same or {}).get(node, node) if own else base[node.all_input_nodes[0]]
    return base


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory alone `node` looks at: of an op with several results the one that it is."""
    while node.op == "call_function" and is_view(node) and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem and not is_view(source):
            return node
        node = source
    return node
