"""What the step would cost if one op were cut otherwise and all else stayed as planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from autopar import pipelines
from autopar.arguments import ClusterLike
from autopar.core.errors import AutoparError
from autopar.core.sharding import price
from autopar.passes.capture import Program
from autopar.passes.decision import Context, Decision
from autopar.passes.notation import op_called, strategy_text
from autopar.passes.problem import Problem, build
from autopar.passes.strategies import Assignment
from autopar.plan import GIB, Plan
from autopar.planner import decision_of, origin_of, setting_of

Choice = TypeVar("Choice")
PriceOf = Callable[[tuple[int, ...]], tuple[float, float]]
"""Seconds of a step and bytes of a device, of choices."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to cut the op: seconds of the whole step, infinite where a value has no way, and bytes of a device."""

    assignment: Assignment
    strategy: str
    seconds: float
    nbytes: float
    planned: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """All ways to cut an op in the plan's mode, the quickest step first. The op stands for `times` equal ones, which
    are decided alike and so change together."""

    op: str
    times: int
    alternatives: tuple[Alternative, ...]

    @property
    def planned(self) -> Alternative:
        """What the plan says."""
        return next(a for a in self.alternatives if a.planned)

    def __str__(self) -> str:
        width = max(len(a.strategy) for a in self.alternatives)
        inner = max(len(",".join(a.assignment)) for a in self.alternatives)
        alike = f" and its equals, {self.times} in all" if self.times > 1 else ""
        return "\n".join([f"{self.op}{alike}, all else as planned; the step and bytes a device with each alternative:",
                          *(self._line(a, width, inner) for a in self.alternatives)])

    def _line(self, alternative: Alternative, width: int, inner: int) -> str:
        about = f"  {alternative.strategy:<{width}}  {','.join(alternative.assignment):<{inner}}"
        if math.isinf(alternative.seconds):
            return f"{about}  no way for a value it takes or makes"
        more = 1e3 * (alternative.seconds - self.planned.seconds)
        told = "as planned" if alternative.planned else f"{more:+.3f} ms"
        return f"{about}  {1e3 * alternative.seconds:10.3f} ms  {alternative.nbytes / GIB:8.3f} GiB  {told}"


def explain(plan: Plan, program: Program | Context, cluster: ClusterLike, op: str) -> Explanation:
    """What each alternative for the op called `op` would have cost.

    Raises AutoparError for an unknown op, or a plan for another model or cluster.
    """
    whole, place = origin_of(plan, program, cluster)
    ctx = pipelines.MicroContexts(whole).of(plan.micro_batches)[0] if plan.stages else whole
    index = op_called(ctx, op)
    problem = build(ctx, pipelines.deciding(setting_of(plan, place)))
    chosen = choices_of(problem, decision_of(plan, ctx))
    node = problem.op_nodes[index]
    price_of = _in_stages(plan, problem) if plan.stages else _at_once(plan, problem, chosen)
    found = []
    for choice, assignment in enumerate(problem.assigned[node]):
        seconds, nbytes = price_of((*chosen[:node], choice, *chosen[node + 1:]))
        found.append(Alternative(assignment, strategy_text(ctx, ctx.segmented.ops[index], assignment), seconds, nbytes,
                                 choice == chosen[node]))
    found.sort(key=lambda a: (a.seconds, not a.planned, a.nbytes))
    return Explanation(op, problem.instance.nodes[node].count, tuple(found))


def _at_once(plan: Plan, problem: Problem, chosen: tuple[int, ...]) -> PriceOf:
    """Prices by the problem's formulas."""
    base = price(problem.instance, chosen)

    def price_of(choices: tuple[int, ...]) -> tuple[float, float]:
        priced = price(problem.instance, choices)
        return priced.seconds, plan.memory.total + priced.nbytes - base.nbytes
    return price_of


def _in_stages(plan: Plan, problem: Problem) -> PriceOf:
    """Prices of what is lowered, in the plan's stages."""
    def price_of(choices: tuple[int, ...]) -> tuple[float, float]:
        roughly = price(problem.instance, choices)
        if math.isinf(roughly.seconds):
            return roughly.seconds, roughly.nbytes
        return pipelines.recomputed(plan.pipelining, problem.decide(choices), problem.setting)
    return price_of


def choices_of(problem: Problem, decision: Decision) -> tuple[int, ...]:
    """The choices that come to a decision: the inverse of `Problem.decide`. Raises AutoparError when none do."""
    chosen = [0] * len(problem.instance.nodes)
    ops = zip(problem.context.segmented.ops, problem.op_nodes, decision.assignments, strict=True)
    for op, node, assignment in ops:
        chosen[node] = _place(op.name, assignment, problem.assigned[node])
    for parameter, node in problem.parameter_nodes.items():
        chosen[node] = _place(parameter.name, decision.storage[parameter], problem.stored[node])
    again = problem.decide(tuple(chosen))
    if (again.assignments, again.storage) != (decision.assignments, decision.storage):
        raise AutoparError("the plan decides equal layers differently; it was edited or made by another version: plan "
                           "again")
    return tuple(chosen)


def _place(name: str, planned: Choice, choices: Sequence[Choice]) -> int:
    if planned not in choices:
        raise AutoparError(f"the plan's choice for {name}, {planned}, is none of its mode's; it was edited or made by "
                           "another version: plan again")
    return choices.index(planned)
