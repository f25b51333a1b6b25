"""Buffers that a program writes to, and what has to come before what on their account."""

from __future__ import annotations

from torch import fx

from autopar.passes.capture import Program
from autopar.passes.factors import Factored
from autopar.passes.functional import is_update, updated, written, written_within

Accesses = dict[fx.Node, list[tuple[fx.Node, bool]]]
"""By buffer the calls that read it or write to it, in the program's order, and whether they write."""


def accesses(factored: Factored) -> Accesses:
    """Those of the buffers that are written; a renaming is no access, what reads it is."""
    found: Accesses = {buffer: [] for buffer in written(factored.program)}
    for node in factored.program.graph.nodes if found else ():
        if node.op == "call_function" and node not in factored.aliases:
            buffers = dict.fromkeys(buffer_of(n, factored) for n in node.all_input_nodes)
            for buffer in (b for b in buffers if b in found):
                found[buffer].append((node, writes(node, buffer, factored.program)))
    return found


def buffer_of(node: fx.Node, factored: Factored) -> fx.Node:
    """The placeholder whose memory `node` shares, itself where it is a value of its own."""
    base: fx.Node = updated(factored.base(node)[0]) if node in factored.dims else node
    return base


def writes(node: fx.Node, buffer: fx.Node, program: Program) -> bool:
    """Whether `node` writes to a buffer."""
    return (is_update(node, program) and updated(node) is buffer) or buffer in written_within(node)


def order(factored: Factored) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """By call those that have to run before it: before a read the last write, before a write all reads since, too."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for calls in accesses(factored).values():
        since: list[fx.Node] = []
        last: list[fx.Node] = []
        for node, writing in calls:
            found.setdefault(node, []).extend([*last, *(since if writing else ())])
            since, last = ([], [node]) if writing else ([*since, node], last)
    return {node: tuple(n for n in before if n is not node) for node, before in found.items()}
