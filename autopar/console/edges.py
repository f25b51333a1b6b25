"""The edges of a sharding problem as text: what bringing each value from spec to spec costs.

Specs are written over the dims of the value, or over the factors of its dims where only those tell two of them apart;
`(Z0)` is a parameter that rests sharded over axis 0 and is gathered there for use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import cast

from torch import fx

from autopar.core.sharding import Flow, Segment
from autopar.core.spec import Spec
from autopar.passes.factors import Factored
from autopar.passes.layout import based
from autopar.passes.notation import merged
from autopar.passes.ops import Op, OpOperand
from autopar.passes.problem import Problem
from autopar.passes.strategies import Assignment, Storage

Users = Mapping[tuple[fx.Node, int], list[tuple[Op, OpOperand]]]
"""(value, node of the instance) -> the operands of that node's first op which read the value."""
Emitted = tuple[Spec, tuple[int, ...]]
"""A spec, and the axes over which a parameter is gathered to be in it."""
LEGEND = ("Edge costs in microseconds, forward and backward together. Rows: the specs in which the producer emits the "
          "value. Columns: those in which consumers want it. '-': there is no way.")


def edge_costs(problem: Problem) -> str:
    """One matrix for every value on its way into a segment."""
    values = {node.name: node for node in problem.context.segmented.factored.program.graph.nodes}
    users = _users(problem)
    matrices = (_matrix(problem, segment, flow, values[flow.name], users)
                for segment in problem.instance.segments for flow in segment.flows)
    return "\n\n".join([LEGEND, *matrices])


def _users(problem: Problem) -> Users:
    found: dict[tuple[fx.Node, int], list[tuple[Op, OpOperand]]] = {}
    factored = problem.context.segmented.factored
    for number, op in zip(problem.op_nodes, problem.context.segmented.ops, strict=True):
        for operand in op.operands:
            users = found.setdefault((based(factored, operand).node, number), [])
            if all(user is op for user, _ in users):
                users.append((op, operand))
    return found


def _matrix(problem: Problem, segment: Segment, flow: Flow, value: fx.Node, users: Users) -> str:
    nodes, factored = problem.instance.nodes, problem.context.segmented.factored
    rows, columns = dict(_sources(problem, flow, value)), dict(_targets(problem, flow, value, users))
    table = [["", *_texts(factored, value, columns)]]
    for source, text in zip(rows, _texts(factored, value, rows), strict=True):
        table.append([text, *(_microseconds(flow.forward[source][t] + flow.backward[source][t]) for t in columns)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    consumers = ", ".join(dict.fromkeys(nodes[consumer.node].name for consumer in flow.consumers))
    times = f", {segment.count} times" if segment.count > 1 else ""
    return "\n".join([f"{nodes[flow.producer].name} -> {consumers}  (into {segment.name}{times})", *lines])


def _sources(problem: Problem, flow: Flow, value: fx.Node) -> Iterator[tuple[int, Emitted]]:
    """The specs in which the producer emits the value, by number."""
    context = problem.context
    for source, option in zip(flow.sources, problem.options[flow.producer], strict=True):
        if isinstance(option, Storage):
            yield source, (option.spec(context.rank(value), False), option.gathered)
        else:
            op = context.segmented.ops[context.producer[value]]
            result = next(r for r in op.results if r.node is value)
            yield source, (context.emitted(op, result, cast(Assignment, option)), ())


def _targets(problem: Problem, flow: Flow, value: fx.Node, users: Users) -> Iterator[tuple[int, Emitted]]:
    """The specs in which consumers want the value, by number."""
    context, seen = problem.context, Counter[int]()
    for consumer in flow.consumers:
        reading = users.get((value, consumer.node), [])
        for target, option in zip(consumer.targets, problem.options[consumer.node], strict=True):
            whole = Spec(((),) * context.rank(value))  # as the program's output is wanted
            operand = reading[seen[consumer.node]] if reading else None
            yield target, (context.wanted(*operand, cast(Assignment, option)) if operand else whole, ())
        seen[consumer.node] += 1


def _texts(factored: Factored, value: fx.Node, specs: Mapping[int, Emitted]) -> list[str]:
    """The specs over the dims of `value`, or over their factors where that is what tells them apart."""
    by_dim = [_text(Spec(merged(factored, value, spec).dims, spec.partial, spec.grad_partial), gathered)
              for spec, gathered in specs.values()]
    return by_dim if len(set(by_dim)) == len(by_dim) else [_text(*emitted) for emitted in specs.values()]


def _text(spec: Spec, gathered: tuple[int, ...]) -> str:
    return (str(spec) + (f"(Z{''.join(map(str, gathered))})" if gathered else "")) or "scalar"


def _microseconds(seconds: float) -> str:
    if math.isinf(seconds):
        return "-"
    return f"{1e6 * seconds:.1f}" if seconds >= 0.05e-6 else "<0.1" if seconds else "0"
