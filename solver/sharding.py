"""One choice for every node: least seconds a step within a budget of bytes a device.

    x[n,c] ∈ {0, 1}      node n takes choice c
    e[f,k,s,t] ≥ 0       consumer k of flow f has its value brought from source spec s to target spec t
    r[f,s,t] ≥ 0         flow f pays for bringing it from s to t
    T[g,p] ≥ 0           seconds of phase p ∈ {forward, backward} of segment g

    choose     Σ_c x[n,c] = 1                                                  for every node n
    carry      Σ_t e[f,k,s,t] = Σ_{c: sources[c] = s} x[producer,c]            for every flow, consumer k and s
               Σ_s e[f,k,s,t] = Σ_{c: targets[c] = t} x[node of k,c]           for every flow, consumer k and t
               e[f,k,s,t] = 0                                                  where the seconds are infinite
    pay_once   r[f,s,t] ≥ e[f,k,s,t]                                           for every k; one k alone has r = e
    overlap    T[g,p] ≥ Σ_n seconds_p · x + Σ_{f not of parameters} seconds_p · r
               T[g,p] ≥ Σ_{f of parameters} seconds_p · r                      where g has any, else T is the first sum
    remember   Σ_n bytes_r · x ≤ budget                                        for every row r of the ledger

    minimise   Σ_g count · Σ_p (T[g,p] + INTERFERENCE · Σ_{f of parameters} seconds_p · r)
               + Σ_n count · optimizer seconds · x

`carry` and `pay_once` are in `flows`. An e that x alone determines is no variable but that sum of x: where producer
and consumer are one node, and where there is one source or one target. With x integral every e is 0 or 1, so only x
is required to be.

Seconds are counted in units of which the largest coefficient has `LARGEST`, so that the solvers' absolute tolerances
mean nothing. Bytes are counted beyond each node's least, relative to the room that the budget leaves for them, plus
`MARGIN`: a solution that fills the budget exactly is never lost to rounding, and one that exceeds it by less than the
margin is ruled out when found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.core.sharding import (
    INTERFERENCE,
    PHASES,
    Flow,
    Instance,
    Ledger,
    Node,
    Phase,
    Segment,
    Solution,
    ledger,
    price,
)
from autopar.solver.advice import no_seconds
from autopar.solver.flows import Pairs, Take, transport
from autopar.solver.model import Model, Outcome, Variable

Costs = list[tuple[Variable, float]]
LARGEST = 1e6
ROOM, MARGIN = 1e3, 1e-5
"""The scaled right side of the memory row, and what is added to it."""
AGREEMENT = 1e-6
"""The relative difference allowed between the model's seconds and those of `core.sharding.price`."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A model under construction, whose variable x[n,c] is `take[n][c]`."""

    instance: Instance
    model: Model
    take: Take


def formulate(instance: Instance) -> Model:
    """The model of the module docstring. Every node has a choice; seconds of compute and flows are not negative."""
    model = Model("sharding", max(_coefficients(instance), default=0.0) / LARGEST or 1.0)
    draft, objective = _draft(model, instance)
    remember(draft)
    model.minimise(objective)
    return model


def formulate_bytes(instance: Instance) -> Model:
    """The same choices and ways, minimising B ≥ Σ_n bytes_r · x for every row r of the ledger, whatever the budget."""
    bytes_of = ledger(instance)
    model = Model("bytes", float(bytes_of.table.max(initial=1.0)) / LARGEST)
    draft, _ = _draft(model, no_seconds(instance))
    most = model.amount("B")
    for r in range(len(bytes_of.table)):
        beyond, least = _beyond(draft, bytes_of, r)
        model.at_least([(most, 1.0), *((x, -nbytes / model.unit) for x, nbytes in beyond)], least / model.unit)
    model.minimise([(most, 1.0)])
    return model


def _draft(model: Model, instance: Instance) -> tuple[Draft, Costs]:
    """The rows that both models have, and the units of a step."""
    draft = Draft(instance, model, tuple(choose(model, n, node) for n, node in enumerate(instance.nodes)))
    objective = [(x, node.count * choice.optimizer / model.unit)
                 for node, taken in zip(instance.nodes, draft.take, strict=True)
                 for choice, x in zip(node.choices, taken, strict=True)]
    for g, segment in enumerate(instance.segments):
        objective += [(variable, segment.count * units) for variable, units in overlap(draft, g, segment)]
    return draft, objective


def choose(model: Model, n: int, node: Node) -> tuple[Variable, ...]:
    """x[n,c], of which one is taken."""
    taken = tuple(model.choice(f"x({n},{c})") for c in range(len(node.choices)))
    model.equal([(x, 1.0) for x in taken], 1.0)
    return taken


def overlap(draft: Draft, g: int, segment: Segment) -> Costs:
    """The units of a segment's phases: T[g,p] where parameter communication may hide, else what cannot hide."""
    paid = [transport(draft.model, draft.take, flow, f"{g},{f}") for f, flow in enumerate(segment.flows)]
    total: Costs = []
    for phase in PHASES:
        visible, hidden = list(_compute(draft, segment, phase)), list[tuple[Variable, float]]()
        for flow, pairs in zip(segment.flows, paid, strict=True):
            (hidden if flow.parameter else visible).extend(_communication(draft, flow, pairs, phase))
        total += longest(draft.model, f"T({g},{phase})", visible, hidden) if hidden else visible
        total += [(variable, INTERFERENCE * units) for variable, units in hidden]
    return total


def longest(model: Model, name: str, *sums: Costs) -> Costs:
    """One variable, no less than any of `sums`."""
    most = model.amount(name)
    for costs in sums:
        model.at_least([(most, 1.0), *((variable, -units) for variable, units in costs)], 0.0)
    return [(most, 1.0)]


def remember(draft: Draft) -> None:
    """No row of the ledger exceeds the budget."""
    if math.isfinite(draft.instance.budget):
        bytes_of = ledger(draft.instance).binding(draft.instance.budget)
        for r in range(len(bytes_of.table)):
            beyond, least = _beyond(draft, bytes_of, r)
            room = draft.instance.budget - least
            scale = ROOM / (abs(room) or max(nbytes for _, nbytes in beyond) or 1.0)
            draft.model.at_most([(x, nbytes * scale) for x, nbytes in beyond if nbytes], room * scale + MARGIN)


def _beyond(draft: Draft, bytes_of: Ledger, r: int) -> tuple[Costs, float]:
    """The bytes of row r that each choice holds beyond the least of its node, and the least of all nodes."""
    rows = [bytes_of.node(n)[r] for n in range(len(draft.take))]
    beyond = [(x, float(nbytes - row.min())) for taken, row in zip(draft.take, rows, strict=True)
              for x, nbytes in zip(taken, row, strict=True)]
    return beyond, float(sum(row.min() for row in rows))


def decode(instance: Instance, outcome: Outcome) -> Solution:
    """The choices taken, priced anew; asserts that the model and `core.sharding.price` agree on the seconds."""
    choices = taken_in(instance, outcome)
    priced = price(instance, choices)
    assert math.isclose(priced.seconds, outcome.objective, rel_tol=AGREEMENT, abs_tol=1e-15), \
        f"the model says {outcome.objective} s, the formulas {priced.seconds} s"
    bound = priced.seconds if outcome.status == "optimal" else min(outcome.bound, priced.seconds)
    return Solution(outcome.status, choices, priced.seconds, priced.nbytes, bound, outcome.solve_seconds)


def taken_in(instance: Instance, outcome: Outcome) -> tuple[int, ...]:
    """The choices of an outcome."""
    taken = ([outcome.values[f"x({n},{c})"] for c in range(len(node.choices))] for n, node in enumerate(instance.nodes))
    return tuple(levels.index(max(levels)) for levels in taken)


def _coefficients(instance: Instance) -> Iterator[float]:
    """The finite coefficients of seconds a step."""
    for node in instance.nodes:
        yield from (node.count * choice.optimizer for choice in node.choices)
    for segment in instance.segments:
        for choice in (choice for n in segment.nodes for choice in instance.nodes[n].choices):
            yield segment.count * max(choice.forward, choice.backward)
        for row in (row for flow in segment.flows for row in (*flow.forward, *flow.backward)):
            yield segment.count * max((seconds for seconds in row if seconds < math.inf), default=0.0)


def _compute(draft: Draft, segment: Segment, phase: Phase) -> Iterator[tuple[Variable, float]]:
    for n in segment.nodes:
        for choice, x in zip(draft.instance.nodes[n].choices, draft.take[n], strict=True):
            yield x, (choice.forward if phase == "forward" else choice.backward) / draft.model.unit


def _communication(draft: Draft, flow: Flow, pairs: Pairs, phase: Phase) -> Iterator[tuple[Variable, float]]:
    table = flow.forward if phase == "forward" else flow.backward
    for (s, t), variables in pairs.items():
        if table[s][t]:
            yield from ((variable, table[s][t] / draft.model.unit) for variable in variables)
