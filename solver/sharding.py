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
    remember   Σ_n count · bytes · x ≤ budget

    minimise   Σ_g count · Σ_p T[g,p] + Σ_n count · optimizer seconds · x

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
from dataclasses import dataclass, replace
from typing import Literal

from autopar.core.errors import AutoparError, Infeasible
from autopar.core.sharding import Flow, Instance, Node, Segment, Solution, price
from autopar.solver.advice import bytes_only, missing_ways, ways_only
from autopar.solver.flows import Pairs, Take, transport
from autopar.solver.model import Model, Outcome, Variable
from autopar.solver.presolve import presolve

Phase = Literal["forward", "backward"]
PHASES: tuple[Phase, ...] = ("forward", "backward")
Costs = list[tuple[Variable, float]]
LARGEST = 1e6
ROOM, MARGIN = 1e3, 1e-5
"""The scaled right side of the memory row, and what is added to it."""
MOST_EXCLUDED = 32
"""How many solutions over the budget by less than the margin are ruled out, one by one, before giving up."""
AGREEMENT = 1e-6
"""The relative difference allowed between the model's seconds and those of `core.sharding.price`."""
GIB = 2.0 ** 30


@dataclass(frozen=True, slots=True)
class Draft:
    """A model under construction, whose variable x[n,c] is `take[n][c]`."""

    instance: Instance
    model: Model
    take: Take


def formulate(instance: Instance) -> Model:
    """The model of the module docstring. Every node has a choice; seconds of compute and flows are not negative."""
    model = Model("sharding", max(_coefficients(instance), default=0.0) / LARGEST or 1.0)
    draft = Draft(instance, model, tuple(choose(model, n, node) for n, node in enumerate(instance.nodes)))
    objective = [(x, node.count * choice.optimizer / model.unit)
                 for node, taken in zip(instance.nodes, draft.take, strict=True)
                 for choice, x in zip(node.choices, taken, strict=True)]
    for g, segment in enumerate(instance.segments):
        objective += [(variable, segment.count * units) for variable, units in overlap(draft, g, segment)]
    remember(draft)
    model.minimise(objective)
    return model


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
    return total


def longest(model: Model, name: str, *sums: Costs) -> Costs:
    """One variable, no less than any of `sums`."""
    most = model.amount(name)
    for costs in sums:
        model.at_least([(most, 1.0), *((variable, -units) for variable, units in costs)], 0.0)
    return [(most, 1.0)]


def remember(draft: Draft) -> None:
    """The bytes of all nodes stay within the budget."""
    least = [node.count * min(choice.nbytes for choice in node.choices) for node in draft.instance.nodes]
    beyond = [(x, node.count * choice.nbytes - least[n]) for n, node in enumerate(draft.instance.nodes)
              for choice, x in zip(node.choices, draft.take[n], strict=True)]
    room = draft.instance.budget - sum(least)
    if math.isfinite(room):
        scale = ROOM / (abs(room) or max(nbytes for _, nbytes in beyond) or 1.0)
        draft.model.at_most([(x, nbytes * scale) for x, nbytes in beyond if nbytes], room * scale + MARGIN)


def decode(instance: Instance, outcome: Outcome) -> Solution:
    """The choices taken, priced anew; asserts that the model and `core.sharding.price` agree on the seconds."""
    taken = ([outcome.values[f"x({n},{c})"] for c in range(len(node.choices))] for n, node in enumerate(instance.nodes))
    choices = tuple(levels.index(max(levels)) for levels in taken)
    priced = price(instance, choices)
    assert math.isclose(priced.seconds, outcome.objective, rel_tol=AGREEMENT, abs_tol=1e-15), \
        f"the model says {outcome.objective} s, the formulas {priced.seconds} s"
    bound = priced.seconds if outcome.status == "optimal" else min(outcome.bound, priced.seconds)
    return Solution(outcome.status, choices, priced.seconds, priced.nbytes, bound, outcome.solve_seconds)


def optimise(instance: Instance, solver: str = "cbc", limit_s: float | None = None) -> Solution:
    """The solution of least seconds, or the best found within `limit_s`. Raises Infeasible with what is needed."""
    for node in instance.nodes:
        if not node.choices:
            raise Infeasible(f"{node.name} has no choice, needed is at least one; being replicated is always possible")
    reduced = presolve(instance)
    model = formulate(reduced.instance)
    for _ in range(MOST_EXCLUDED):
        outcome = model.solve(solver, limit_s)
        if outcome.status == "infeasible":
            raise _refusal(instance, solver)
        if outcome.status == "unsolved":
            raise AutoparError(f"{solver} found no solution of {model} within {limit_s} s; allow it more")
        solution = decode(reduced.instance, outcome)
        if solution.nbytes <= instance.budget:
            return replace(solution, choices=reduced.restore(solution.choices))
        _exclude(model, solution.choices)
    raise AutoparError(f"{MOST_EXCLUDED} solutions exceed the budget, {instance.budget:.0f} bytes, by next to nothing; "
                       "lower it by a millionth")


def least_bytes(instance: Instance, solver: str = "cbc") -> float:
    """The smallest budget that has a solution, in bytes. Raises Infeasible when none has."""
    return optimise(bytes_only(instance), solver).seconds


def _refusal(instance: Instance, solver: str) -> Infeasible:
    """Why there is no solution. Raises Infeasible where not even a budget without end would do."""
    if math.isfinite(instance.budget):
        needed = least_bytes(instance, solver)
        assert needed > instance.budget, f"{solver} finds nothing within {instance.budget} bytes, {needed} are enough"
        return Infeasible(f"needs {needed / GIB:.3f} GiB a device ({needed:.0f} bytes), budget "
                          f"{instance.budget / GIB:.3f} GiB ({instance.budget:.0f} bytes); raise the budget, use more "
                          "devices or a smaller batch", needed)
    missing = missing_ways(instance, optimise(ways_only(instance), solver).choices)
    return Infeasible(f"no choice fits the connections: whatever is chosen, at least {len(missing)} cannot be made, "
                      f"such as {'; '.join(missing[:3])}; allow more choices there")


def _exclude(model: Model, choices: tuple[int, ...]) -> None:
    model.at_most([(model.variables[f"x({n},{c})"], 1.0) for n, c in enumerate(choices)], len(choices) - 1.0)


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
