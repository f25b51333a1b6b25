"""The ops the solver decides on: one node each, or a cluster of nodes that will run as one kernel.

A cluster is a chain of pointwise nodes of one shape, or of all that one module does without a contraction: a norm
written out, a rotary embedding. Renamings are no ops: an operand that is a view refers to the value it renames.
"""

from __future__ import annotations

import heapq
import itertools
import operator
import re
from dataclasses import dataclass

import torch
from torch import fx

from autopar.passes.buffers import order
from autopar.passes.factors import SPLITS, Factored
from autopar.passes.functional import is_update, value_of
from autopar.passes.modes import Role
from autopar.passes.rules.nodes import call_of, shape, tensor_operands
from autopar.passes.rules.notation import is_unit
from autopar.passes.rules.table import CONTRACTIONS, is_pointwise

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of an op: its key (letter, numbered where the letter has several), size and what sharding it means.

    `role` is batch for the leading dim of the inputs, data for their other dims, model for all else.
    """

    key: str
    size: int
    shardable: bool
    summed: bool
    special: bool
    role: Role


@dataclass(frozen=True, slots=True, eq=False)
class OpOperand:
    """A tensor an op reads: the factor key of each flat factor of `node`; `keys` None where it is passed whole."""

    node: fx.Node
    keys: tuple[str, ...] | None
    additive: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """`nodes` in order; `operands` from outside, `results` that are used outside, as (node, factor keys).

    `keys` has the factor keys of every node that has a rule.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    operands: tuple[OpOperand, ...]
    results: tuple[OpOperand, ...]
    factors: tuple[Factor, ...]
    keys: dict[fx.Node, tuple[str, ...]]

    @property
    def block(self) -> str:
        """The repeated block it belongs to."""
        return block_of(self.main)

    @property
    def has_rule(self) -> bool:
        """Whether it can be sharded at all."""
        return self.main in self.keys

    @property
    def main(self) -> fx.Node:
        """The node the op is named after: its last."""
        return self.nodes[-1]

    @property
    def contraction(self) -> bool:
        """Whether it is a matmul-like op, printed as `output = input X weight`."""
        return self.main.target in CONTRACTIONS

    def factor(self, key: str) -> Factor:
        """The factor called `key`."""
        return next(f for f in self.factors if f.key == key)


LOCAL = {
    aten.slice.Tensor, aten.cat.default, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.softmax.int,
    aten.log_softmax.int, aten.expand.default, aten.roll.default, aten.slice_scatter.default,
    aten.select_scatter.default,
}
"""Ops that join a cluster of their module although they are not pointwise."""
Before = dict[fx.Node, tuple[fx.Node, ...]]
"""By node those that have to run before it, besides those that it reads."""
_BLOCK = re.compile(r"^(?:.*?\.)??\d+(?=\.|$)")


def block_of(node: fx.Node) -> str:
    """The repeated block `node` belongs to: its module path up to the first number, empty outside of blocks."""
    found = _BLOCK.match(node.meta.get("path", ""))
    return found[0] if found else ""


def make_ops(factored: Factored) -> tuple[Op, ...]:
    """All ops of the program in an order in which every operand comes first."""
    before = order(factored)
    clusters = _sorted(_clusters(factored, before), before)
    roles = factor_roles(factored)
    names = unique([_name(cluster, factored) for cluster in clusters])
    return tuple(_make_op(name, cluster, factored, roles) for name, cluster in zip(names, clusters, strict=True))


def factor_roles(factored: Factored) -> dict[int, Role]:
    """The role of each factor of the inputs; all others are model factors."""
    tensors = [n for n in factored.program.placeholders("input") if value_of(n) is not None and shape(n)]
    size = shape(tensors[0])[0] if tensors else 0
    data: dict[int, Role] = {f: "data" for n in tensors for dim in factored.dims[n] for f in dim}
    return data | {f: "batch" for n in tensors if shape(n)[0] == size for f in factored.dims[n][0]}


def _clusters(factored: Factored, before: Before) -> list[list[fx.Node]]:
    ancestors: dict[fx.Node, int] = {}
    bit = {node: 1 << i for i, node in enumerate(factored.program.graph.nodes)}
    member: dict[fx.Node, list[fx.Node]] = {}
    for node in factored.program.graph.nodes:
        ancestors[node] = 0
        for source in (*node.all_input_nodes, *before.get(node, ())):
            ancestors[node] |= ancestors[source] | bit[source]
        if node.op != "call_function" or node in factored.aliases or _is_alias_split(node, factored):
            continue
        if node.target is operator.getitem:
            member[node] = member[node.args[0]]
            member[node].append(node)
            continue
        cluster = [node]
        for candidate in _joinable(node, member, factored):
            union = sorted([*cluster, *candidate], key=lambda n: bit[n])
            if _convex(union, before, ancestors, bit):
                cluster = union
        for n in cluster:
            member[n] = cluster
    return list({id(cluster): cluster for cluster in member.values()}.values())


def _is_alias_split(node: fx.Node, factored: Factored) -> bool:
    return node.target in SPLITS and all(user in factored.aliases for user in node.users)


def _joinable(node: fx.Node, member: dict[fx.Node, list[fx.Node]], factored: Factored) -> list[list[fx.Node]]:
    """The clusters that feed `node` directly and run in one kernel with it."""
    feeding = {id(member[n]): member[n] for n in node.all_input_nodes if n in member}
    return [c for c in feeding.values() if _one_shape([*c, node], factored) or _one_module([*c, node], factored)]


def _one_shape(nodes: list[fx.Node], factored: Factored) -> bool:
    """Pointwise nodes of one block and one shape."""
    first = nodes[0]
    return all(is_pointwise(n) and _fusable(n, factored) and factored.dims[n] == factored.dims[first]
               and block_of(n) == block_of(first) for n in nodes)


def _one_module(nodes: list[fx.Node], factored: Factored) -> bool:
    """Nodes of one module that move or reduce along dims they keep whole, or are pointwise."""
    path = nodes[0].meta.get("path")
    return all((is_pointwise(n) or n.target in LOCAL) and _fusable(n, factored) and n.meta.get("path") == path
               and all(_distinct(factored.flat(v)) for v in (n, *tensor_operands(n))) for n in nodes)


def _distinct(factors: tuple[int, ...]) -> bool:
    return len(set(factors)) == len(factors)


def _fusable(node: fx.Node, factored: Factored) -> bool:
    return node in factored.rules and not factored.rules[node].special and not is_update(node, factored.program)


def _convex(cluster: list[fx.Node], before: Before, ancestors: dict[fx.Node, int], bit: dict[fx.Node, int]) -> bool:
    """Whether no path leaves the cluster and comes back."""
    inside = sum(bit[n] for n in cluster)
    outside = (source for n in cluster for source in (*n.all_input_nodes, *before.get(n, ()))
               if not bit[source] & inside)
    return all(not (ancestors[source] & inside) for source in outside)


def _sorted(clusters: list[list[fx.Node]], before: Before) -> list[list[fx.Node]]:
    """Topological order, as near to program order as can be."""
    place = {n: i for i, n in enumerate(next(iter(clusters))[0].graph.nodes)} if clusters else {}
    owner = {n: i for i, cluster in enumerate(clusters) for n in cluster}
    needs = [{owner[s] for s in _sources(cluster, before, owner)} - {i} for i, cluster in enumerate(clusters)]
    users: list[list[int]] = [[] for _ in clusters]
    for i, sources in enumerate(needs):
        for source in sources:
            users[source].append(i)
    waiting = [len(sources) for sources in needs]
    ready = [(place[clusters[i][-1]], i) for i, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(clusters[i])
        for user in users[i]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (place[clusters[user][-1]], user))
    assert len(order) == len(clusters), "pointwise clusters form a cycle"
    return order


def _sources(cluster: list[fx.Node], before: Before, owner: dict[fx.Node, int]) -> set[fx.Node]:
    """The op nodes a cluster reads from, seen through renamings, and those that come before it."""
    found: set[fx.Node] = set()
    queue = [s for n in cluster for s in (*n.all_input_nodes, *before.get(n, ()))]
    while queue:
        source = queue.pop()
        if source in owner:
            found.add(source)
        else:
            queue += source.all_input_nodes
    return found


def _make_op(name: str, cluster: list[fx.Node], factored: Factored, roles: dict[int, Role]) -> Op:
    tensors = [n for n in cluster if value_of(n) is not None]
    if len(tensors) > 1 and all(n in factored.rules for n in cluster):
        return _make_cluster(name, cluster, factored, roles)
    inside = set(cluster)
    bound: dict[tuple[fx.Node, tuple[str, ...] | None], OpOperand] = {}
    keyed: dict[str, tuple[int, ...]] = {}
    makes_several = {call_of(n) for n in cluster if n.target is operator.getitem and n in factored.rules}
    for node in (n for n in cluster if n not in makes_several):
        for operand in _bound_operands(node, factored, keyed):
            if operand.node not in inside:
                bound.setdefault((operand.node, operand.keys), operand)
    results = [n for n in cluster if value_of(n) is not None and any(user not in inside for user in n.users)]
    bound_results = tuple(OpOperand(n, _result_keys(n, factored, keyed)) for n in results)
    factors = _factors(cluster, factored, keyed, roles)
    keys = {n: _result_keys(n, factored, keyed) or () for n in cluster if n in factored.rules}
    return Op(name, tuple(cluster), tuple(bound.values()), bound_results, factors, keys)


def _make_cluster(name: str, cluster: list[fx.Node], factored: Factored, roles: dict[int, Role]) -> Op:
    """An op of several nodes, whose factors are those of the program, numbered as they come."""
    number: dict[int, str] = {}

    def keys(node: fx.Node) -> tuple[str, ...]:
        return tuple(number.setdefault(f, f"f{len(number)}") for f in factored.flat(node))

    inside = set(cluster)
    operands = {n: OpOperand(n, keys(n)) for node in cluster for n in tensor_operands(node) if n not in inside}
    every = {node: keys(node) for node in cluster}
    results = tuple(OpOperand(n, every[n]) for n in cluster if any(user not in inside for user in n.users))
    whole = _whole_atoms(cluster, list(operands), factored)
    free = set.intersection(*({*factored.flat(r.node)} for r in results)) - whole - factored.selected
    factors = tuple(Factor(key, factored.sizes[f], f in free, False, False, roles.get(f, "model"))
                    for f, key in number.items())
    return Op(name, tuple(cluster), tuple(operands.values()), results, factors, every)


def _whole_atoms(cluster: list[fx.Node], operands: list[fx.Node], factored: Factored) -> set[int]:
    """The factors that some node of a cluster wants whole or sums over, or that are inner ones of a parameter's dim."""
    whole: set[int] = set()
    for node in cluster:
        read = tensor_operands(node)
        bound, results = factored.rules[node].bind(tuple(len(shape(n)) for n in read), (len(shape(node)),))
        for operand, n in zip(bound, read, strict=True):
            for letter, dim in zip(operand.letters or (), factored.dims[n], strict=True):
                if letter in factored.rules[node].whole or letter not in results[0]:
                    whole.update(dim)
        named = zip(results[0], factored.dims[node], strict=True)
        whole.update(f for letter, dim in named if letter in factored.rules[node].whole for f in dim)
    for n in operands:
        if is_parameter(factored.base(n)[0], factored):
            free = ([f for f in dim if f not in factored.selected] for dim in factored.dims[n])
            whole.update(f for dim in free for f in dim[1:])
    return whole


def _bound_operands(node: fx.Node, factored: Factored, keyed: dict[str, tuple[int, ...]]) -> list[OpOperand]:
    """The operands of `node` with factor keys; fills `keyed` with the factors of each letter."""
    operands = tensor_operands(node)
    if node not in factored.rules:
        return [OpOperand(n, None) for n in operands]
    bound, results = factored.rules[node].bind(tuple(len(shape(n)) for n in operands), (len(shape(node)),))
    for letters, n in [*((b.letters, n) for b, n in zip(bound, operands, strict=True)), (results[0], node)]:
        for letter, dim in zip(letters or (), factored.dims[n], strict=False):
            if not is_unit(letter) and (dim or letter not in keyed):
                keyed.setdefault(letter, dim)
    return [OpOperand(n, _keys(b.letters, n, factored), b.additive) for b, n in zip(bound, operands, strict=True)]


def _keys(letters: tuple[str, ...] | None, node: fx.Node, factored: Factored) -> tuple[str, ...] | None:
    if letters is None:
        return None
    pairs = zip(letters, factored.dims[node], strict=True)
    return tuple(_key(letter, i, len(dim)) for letter, dim in pairs for i in range(len(dim)))


def _key(letter: str, index: int, count: int) -> str:
    return letter if count == 1 else f"{letter}_{index}"


def _result_keys(node: fx.Node, factored: Factored, keyed: dict[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    if node not in factored.rules:
        return None
    operands = tensor_operands(node)
    _, results = factored.rules[node].bind(tuple(len(shape(n)) for n in operands), (len(shape(node)),))
    assert all(is_unit(letter) or letter in keyed for letter in results[0])
    return _keys(results[0], node, factored)


def _factors(cluster: list[fx.Node], factored: Factored, keyed: dict[str, tuple[int, ...]],
             roles: dict[int, Role]) -> tuple[Factor, ...]:
    if cluster[-1] not in factored.rules:
        return ()
    rules = [factored.rules[n] for n in cluster if n in factored.rules]
    whole, special = (frozenset().union(*sets) for sets in zip(*((r.whole, r.special) for r in rules), strict=True))
    in_parameters = _parameter_letters(cluster, factored)
    last = cluster[-1]
    kept = set(_result_keys(last, factored, keyed) or ())
    found = []
    for letter, dim in keyed.items():
        free = [i for i, f in enumerate(dim) if f not in factored.selected]
        for i, atom in enumerate(dim):
            key = _key(letter, i, len(dim))
            outermost = i in free and (letter not in in_parameters or i == free[0])
            found.append(Factor(key, factored.sizes[atom], outermost and letter not in whole, key not in kept,
                                letter in special, roles.get(atom, "model")))
    return tuple(found)


def _parameter_letters(cluster: list[fx.Node], factored: Factored) -> set[str]:
    """The letters that occur in a parameter operand: of their factors only the outermost is ever sharded."""
    found: set[str] = set()
    for node in (n for n in cluster if n in factored.rules):
        operands = tensor_operands(node)
        bound, _ = factored.rules[node].bind(tuple(len(shape(n)) for n in operands), (len(shape(node)),))
        for operand, n in zip(bound, operands, strict=True):
            if is_parameter(factored.base(n)[0], factored) and operand.letters:
                found.update(operand.letters)
    return found


def is_parameter(node: fx.Node, factored: Factored) -> bool:
    """Whether `node` stands for a parameter."""
    return node.op == "placeholder" and factored.program.sources[node.name].kind == "parameter"


def _name(cluster: list[fx.Node], factored: Factored) -> str:
    last = cluster[-1]
    path = str(last.meta.get("path", "")).replace(".", "_")
    op = str(call_of(last).target).removeprefix("aten.").removeprefix("autopar.").partition(".")[0].strip("_")
    if is_update(last, factored.program):
        return f"{path}_{op}"
    owns = any(is_parameter(factored.base(n)[0], factored) for n in tensor_operands(last))
    if path and (owns or last.meta.get("leaf")):
        return path
    return f"{path}_{op}" if path else op


def unique(names: list[str]) -> list[str]:
    """The names, numbered where one occurs again."""
    used: set[str] = set()
    taken = set(names)
    found = []
    for name in names:
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        free = name if name not in used else next(n for n in numbered if n not in used | taken)
        used.add(free)
        found.append(free)
    return found
