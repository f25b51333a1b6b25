"""Rules of ops that reduce dims."""

from __future__ import annotations

from torch import fx

from autopar.passes.rules.nodes import call_of, dims_of, joined, named, names_of, operand_shape
from autopar.passes.rules.notation import Rule, letters, rule


def summed(node: fx.Node) -> Rule | None:
    """A sum of shards is a partial sum."""
    names, after, _ = _reduced(node)
    return rule(f"{joined(names)} -> {joined(after)}")


def reduced(node: fx.Node) -> Rule | None:
    """A reduction that is no sum wants its dims whole (mean, amax, var, max with its place)."""
    names, after, gone = _reduced(node)
    return rule(f"{joined(names)} -> {joined(after)}", whole=joined(gone))


def _reduced(node: fx.Node) -> tuple[list[str], list[str], list[str]]:
    """The letters of the operand, of the result, and those that are reduced."""
    rank = len(operand_shape(node))
    names, dims = names_of(rank), set(dims_of(named(node, "dim"), rank))
    keep = named(node, "keepdim")
    after = ["1" if i in dims else n for i, n in enumerate(names) if keep or i not in dims]
    return names, after, [names[i] for i in sorted(dims)]


def compared(node: fx.Node) -> Rule | None:
    """A reduction of two tensors of one shape to one value along a dim, which is whole (cosine similarity)."""
    first, second = operand_shape(node), operand_shape(node, 1)
    if first != second:
        return None
    names, dim = names_of(len(first)), dims_of(named(node, "dim"), len(first))[0]
    left = joined(names)
    return rule(f"{left}, {left} -> {joined([n for i, n in enumerate(names) if i != dim])}", whole=names[dim])


def sum_all(node: fx.Node) -> Rule | None:
    """A sum of everything."""
    return None if call_of(node).kwargs else rule(f"{joined(letters('i', len(operand_shape(node))))} ->")
