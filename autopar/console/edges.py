"""The edges of a sharding problem as text: what bringing each value from spec to spec costs.

Specs are written over the dims of the value, or over the factors of its dims where only those tell two of them apart;
`(Z0)` is a parameter that rests sharded over axis 0 and is gathered there for each use, `(K0)` one kept once gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from autopar.core.sharding import Flow, Segment
from autopar.core.spec import Spec
from autopar.listing import gathered
from autopar.passes.factors import Factored
from autopar.passes.notation import merged
from autopar.passes.problem import Ends, Problem
from autopar.passes.strategies import Storage

LEGEND = ("Edge costs in microseconds, forward and backward together. Rows: the specs in which the producer emits the "
          "value. Columns: those in which consumers want it. '-': there is no way.")


def edge_costs(problem: Problem) -> str:
    """One matrix for every value on its way into a segment."""
    matrices = (_matrix(problem, segment, flow, ends)
                for segment, described in zip(problem.instance.segments, problem.ends, strict=True)
                for flow, ends in zip(segment.flows, described, strict=True))
    return "\n\n".join([LEGEND, *matrices])


def _matrix(problem: Problem, segment: Segment, flow: Flow, ends: Ends) -> str:
    nodes, factored = problem.instance.nodes, problem.context.segmented.factored
    table = [["", *_texts(factored, ends.value, ends.targets)]]
    for source, text in enumerate(_texts(factored, ends.value, ends.sources)):
        seconds = zip(flow.forward[source], flow.backward[source], strict=True)
        table.append([text, *(_microseconds(forward + backward) for forward, backward in seconds)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    consumers = ", ".join(dict.fromkeys(nodes[consumer.node].name for consumer in flow.consumers))
    times = f", {segment.count} times" if segment.count > 1 else ""
    return "\n".join([f"{nodes[flow.producer].name} -> {consumers}  (into {segment.name}{times})", *lines])


def _texts(factored: Factored, value: fx.Node, ends: Iterable[Spec | Storage]) -> list[str]:
    """What is told of each spec, over the dims of `value` unless that is the same of two."""
    specs = [(end.spec(len(factored.flat(value)), False), gathered(str(end))) if isinstance(end, Storage) else (end, "")
             for end in ends]
    by_dim = [_text(Spec(merged(factored, value, spec).dims, spec.partial, spec.grad_partial), resting)
              for spec, resting in specs]
    return by_dim if len(set(by_dim)) == len(by_dim) else [_text(*end) for end in specs]


def _text(spec: Spec, resting: str) -> str:
    return f"{spec}{resting}" or "scalar"


def _microseconds(seconds: float) -> str:
    if math.isinf(seconds):
        return "-"
    return f"{1e6 * seconds:.1f}" if seconds >= 0.05e-6 else "<0.1" if seconds else "0"
