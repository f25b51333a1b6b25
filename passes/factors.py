"""Break every dim into atomic factors, so that a view is only a renaming.

GPT-2's fused projection is 3·heads·head_dim, a flattened token dim is batch·sequence. Dims that an op ties
together (the same letter of its rule, the same elements of a view) are unified: where their factors differ in
size the larger one is split, everywhere at once. Shards attach to factors.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.passes.capture import Program
from autopar.passes.functional import is_update, value_of, written
from autopar.passes.rules.nodes import shape, tensor_operands
from autopar.passes.rules.notation import Rule, is_unit
from autopar.passes.rules.table import rule_of

aten = torch.ops.aten
IN_ORDER = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unflatten.int, aten.contiguous.default,
    aten.clone.default, aten.detach.default,
}
PERMUTED = {aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default,
            aten.matrix_H.default}
SPLITS = {aten.split.Tensor, aten.chunk.default}


@dataclass(slots=True, eq=False)
class Atom:
    """A factor while it is being found: merged into `same`, or split into `parts` (outer, inner)."""

    size: int
    same: Atom | None = None
    parts: tuple[Atom, Atom] | None = None


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Alias:
    """A value that holds the elements of `source`; flat factor i of it is flat factor `index[i]` of the source."""

    source: fx.Node
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """A program with the factors of every dim: ids per dim, whose sizes are in `sizes`.

    `rules` holds the rule of each op that has one; `aliases` the values that are renamings of others;
    `selected` the factors that some split takes apart, which can't be sharded.
    """

    program: Program
    dims: dict[fx.Node, tuple[tuple[int, ...], ...]]
    sizes: tuple[int, ...]
    rules: dict[fx.Node, Rule]
    aliases: dict[fx.Node, Alias]
    selected: frozenset[int]

    def flat(self, node: fx.Node) -> tuple[int, ...]:
        """The factors of `node`, outermost dim first."""
        return tuple(f for dim in self.dims[node] for f in dim)

    def refined(self, node: fx.Node) -> tuple[int, ...]:
        """The sizes of the factors of `node`."""
        return tuple(self.sizes[f] for f in self.flat(node))

    def base(self, node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
        """The value that `node` renames, and where each flat factor of `node` is in it."""
        index = tuple(range(len(self.flat(node))))
        while node in self.aliases:
            alias = self.aliases[node]
            node, index = alias.source, tuple(alias.index[i] for i in index)
        return node, index


@dataclass(slots=True)
class _Analysis:
    dims: dict[fx.Node, Dims] = field(default_factory=dict)
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    aliases: dict[fx.Node, fx.Node] = field(default_factory=dict)
    selected: list[Atom] = field(default_factory=list)


def analyse(program: Program) -> Factored:
    """Find the factors of every dim of every tensor of `program`."""
    found, buffers = _Analysis(), written(program)
    for node in program.graph.nodes:
        if value_of(node) is None:
            continue
        found.dims[node] = tuple(_fresh(size) for size in shape(node))
        if node.op == "call_function" and not is_update(node, program) and (
                _keeps(node, buffers, found) or not _rename(node, found)):
            _apply_rule(node, found)
    return _freeze(program, found)


def _keeps(node: fx.Node, buffers: frozenset[fx.Node], found: _Analysis) -> bool:
    """Whether `node` is a copy that has to be made, as what it copies is written later."""
    source = node.args[0] if node.target is aten.clone.default else None
    while source in found.aliases:
        source = found.aliases[source]  # type: ignore[index]
    return source in buffers


def _fresh(size: int) -> Dim:
    return (Atom(size),) if size != 1 else ()


def leaves(dim: Dim) -> list[Atom]:
    """The atoms a dim is made of now."""
    out: list[Atom] = []
    for atom in map(_merged, dim):
        out += leaves(atom.parts) if atom.parts else [atom]
    return out


def _merged(atom: Atom) -> Atom:
    """What `atom` is now. The way there is halved for the next: over a hundred layers it grows with each."""
    while atom.same is not None:
        atom.same = atom.same.same or atom.same
        atom = atom.same
    return atom


def unify(left: Dim, right: Dim) -> bool:
    """Make two runs of factors with the same product the same; False where their sizes do not nest."""
    a, b = leaves(left), leaves(right)
    while a and b:
        first, second = a.pop(0), b.pop(0)
        if first is second:
            continue
        if first.size == second.size:
            second.same = first
        elif first.size % second.size == 0:
            a = [*leaves(_split(first, second.size)), *a]
            b = [second, *b]
        elif second.size % first.size == 0:
            a = [first, *a]
            b = [*leaves(_split(second, first.size)), *b]
        else:
            return False
        a, b = leaves(tuple(a)), leaves(tuple(b))
    return not a and not b


def _split(atom: Atom, outer: int) -> Dim:
    atom.parts = (Atom(outer), Atom(atom.size // outer))
    return (atom,)


def _rename(node: fx.Node, found: _Analysis) -> bool:
    """Treat `node` as a renaming of its operand, if it is one whose factors nest."""
    if node.target in IN_ORDER:
        return _rename_in_order(node, found)
    if node.target in PERMUTED:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        order = permutation(node)
        if not all(unify(found.dims[node][i], found.dims[source][j]) for i, j in enumerate(order)):
            return False
        found.aliases[node] = source
        return True
    return node.target is operator.getitem and _rename_part(node, found)


def _rename_in_order(node: fx.Node, found: _Analysis) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = found.dims[source], found.dims[node]
    if not unify(sum(after, ()), sum(before, ())):
        return False
    found.aliases[node] = source
    return True


def permutation(node: fx.Node) -> tuple[int, ...]:
    """The dim of the operand that each dim of a transposed result is."""
    rank = len(shape(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return tuple(d % rank for d in dims)
    if node.target is aten.transpose.int:
        i, j = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
        return tuple(order)
    return tuple(reversed(order))


def split_dim(node: fx.Node) -> int:
    """The dim that a split or chunk node takes apart."""
    source = node.args[0]
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return int(dim) % len(shape(source))


def _rename_part(node: fx.Node, found: _Analysis) -> bool:
    """One of the equal parts of a split: the split dim's outermost factor, the part's number, is dropped."""
    split = node.args[0]
    if not isinstance(split, fx.Node) or split.target not in SPLITS:
        return False
    source = split.args[0]
    assert isinstance(source, fx.Node)
    dim = split_dim(split)
    parts = {tuple(v.shape) for v in split.meta["val"]}
    if len(parts) != 1:
        return False
    number = Atom(len(split.meta["val"]))
    for i, (after, before) in enumerate(zip(found.dims[node], found.dims[source], strict=True)):
        if not unify((number, *after) if i == dim and number.size > 1 else after, before):
            return False
    found.selected.append(number)
    found.aliases[node] = source
    return True


def _apply_rule(node: fx.Node, found: _Analysis) -> None:
    rule = rule_of(node)
    operands = tensor_operands(node)
    if rule is None:
        return
    bound, results = rule.bind(tuple(len(shape(n)) for n in operands), (len(shape(node)),))
    named: dict[str, Dim] = {}
    pairs = [(b.letters, found.dims[n]) for b, n in zip(bound, operands, strict=True) if b.letters is not None]
    for letters, dims in [*pairs, (results[0], found.dims[node])]:
        for letter, dim in zip(letters, dims, strict=True):
            if not is_unit(letter) and not unify(named.setdefault(letter, dim), dim):
                return
    found.rules[node] = rule


def _freeze(program: Program, found: _Analysis) -> Factored:
    ids: dict[int, int] = {}
    sizes: list[int] = []

    def identify(atom: Atom) -> int:
        if id(atom) not in ids:
            ids[id(atom)] = len(sizes)
            sizes.append(atom.size)
        return ids[id(atom)]

    dims = {n: tuple(tuple(identify(a) for a in leaves(dim)) for dim in ds) for n, ds in found.dims.items()}
    selected = frozenset(identify(a) for atom in found.selected for a in leaves((atom,)))
    aliases = {node: Alias(source, _index(node, source, dims)) for node, source in found.aliases.items()}
    return Factored(program, dims, tuple(sizes), found.rules, aliases, selected)


def _index(node: fx.Node, source: fx.Node, dims: dict[fx.Node, Any]) -> tuple[int, ...]:
    """Where each flat factor of `node` is among those of `source`."""
    before = dims[source]
    starts = [sum(len(dim) for dim in before[:i]) for i in range(len(before))]
    if node.target in PERMUTED:
        return tuple(starts[j] + k for j in permutation(node) for k in range(len(before[j])))
    flat = range(sum(map(len, before)))
    if node.target is operator.getitem:
        split = node.args[0]
        assert isinstance(split, fx.Node)
        dim = split_dim(split)
        dropped = len(before[dim]) - len(dims[node][dim])
        return tuple(i for i in flat if not starts[dim] <= i < starts[dim] + dropped)
    return tuple(flat)


def whole_size(factored: Factored, node: fx.Node) -> int:
    """The number of elements of `node`."""
    return math.prod(factored.refined(node))
