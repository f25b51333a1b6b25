"""The best choices for a sharding instance, proven: presolve, bound, strike out, solve what is left.

    presolve     an instance with the same optimum and fewer choices
    raise_bound  a lower bound of its seconds, choices close to it, and prices
    survivors    the choices that a better solution may take: few, where the bound is close
    formulate    the integer model of those, solved by CBC or HiGHS
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from autopar.core.errors import AutoparError, Infeasible, Parts
from autopar.core.sharding import Instance, Solution, ledger, price
from autopar.solver.advice import missing_ways, no_seconds, ways_only
from autopar.solver.dual import Bound, raise_bound, survivors
from autopar.solver.model import Model
from autopar.solver.presolve import ALL_COSTS, Reduced, presolve, restrict
from autopar.solver.sharding import decode, formulate, formulate_bytes, taken_in

MOST_EXCLUDED = 32
"""How many solutions over the budget by less than the margin are ruled out, one by one, before giving up."""
NEAR = (5e-4, 2e-3)
"""The relative distances to the bound within which a solution is looked for first, with few choices left."""
WIDE = 1e-3
"""The relative distance of the best solution met to the bound from which a better one is looked for first."""
GIB = 2.0 ** 30
Kept = tuple[tuple[int, ...], ...]


def optimise(instance: Instance, solver: str = "cbc", limit_s: float | None = None) -> Solution:
    """The solution of least seconds, or the best found within `limit_s`. Raises Infeasible with what is needed."""
    found = improve(instance, math.inf, solver, limit_s)
    assert found is not None
    return found


def improve(instance: Instance, beat: float, solver: str = "cbc", limit_s: float | None = None) -> Solution | None:
    """As `optimise`; None as soon as no solution is proven to take fewer seconds than `beat`."""
    return finish(begin(instance, beat, solver, limit_s), beat, solver, limit_s)


def roughly(instance: Instance, solver: str = "cbc") -> tuple[tuple[int, ...], ...]:
    """The best choices met on the way to a bound, none where none fit. Raises Infeasible with what is needed."""
    begun = begin(instance, solver=solver)
    met = begun.bound.choices
    return () if met is None else (begun.reduced.restore(met),)


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """An instance that is presolved and bounded, which took `seconds`."""

    instance: Instance
    reduced: Reduced
    bound: Bound
    seconds: float


def begin(instance: Instance, enough: float = math.inf, solver: str = "cbc", limit_s: float | None = None) -> Begun:
    """Presolve and bound; a bound of `enough` seconds a step will do. Raises Infeasible with what is needed."""
    start = time.perf_counter()
    for node in instance.nodes:
        if not node.choices:
            raise Infeasible(f"{node.name} has no choice, needed is at least one; being replicated is always possible")
    reduced = presolve(instance)
    if len(ledger(instance).binding(instance.budget).table):
        needed = least_bytes(instance, solver)
        if needed > instance.budget:
            raise refusal(needed, instance.budget)
    bound = raise_bound(reduced.instance, solver, enough, None if limit_s is None else limit_s / 3)
    if math.isinf(bound.seconds):
        raise _no_way(instance, solver)
    return Begun(instance, reduced, bound, time.perf_counter() - start)


def finish(begun: Begun, beat: float, solver: str = "cbc", limit_s: float | None = None) -> Solution | None:
    """The solution, or None where the bound says that it does not take fewer seconds than `beat`.

    `limit_s` counts from the beginning. Raises AutoparError where that was too short for any.
    """
    bound, reduced, start = begun.bound, begun.reduced, time.perf_counter() - begun.seconds
    if bound.seconds >= beat:
        return None
    known, solved = _known(reduced.instance, bound, solver, limit_s), None
    for near in (*NEAR, math.inf):
        most = known.seconds if known else math.inf
        seconds = most if most < bound.seconds * (1.0 + 2.0 * near) else bound.seconds * (1.0 + near)
        kept = survivors(bound, seconds) if math.isfinite(seconds) else _all(reduced.instance)
        if not all(kept):
            continue  # marginals may prove more than the bound does: no solution is that near
        left = None if limit_s is None else max(0.1, limit_s - (time.perf_counter() - start))
        solved = _solved(reduced.instance, kept, solver, left)
        known = _better(solved, known)
        if seconds == most or (solved and solved.status == "optimal" and solved.seconds <= seconds):
            break  # whatever is left out takes longer than `seconds`
    if known is None:
        raise AutoparError(f"{solver} found no solution of {formulate(reduced.instance)} within {limit_s} s; allow it "
                           "more")
    least = min(known.seconds, max(solved.bound if solved else 0.0, bound.seconds))
    return Solution("optimal" if least == known.seconds else "feasible", reduced.restore(known.choices), known.seconds,
                    known.nbytes, least, time.perf_counter() - start)


def _known(instance: Instance, bound: Bound, solver: str, limit_s: float | None) -> Solution | None:
    """The best solution met on the way to the bound; where it is far from it, the best of the choices met."""
    known = None
    if bound.choices is not None:
        priced = price(instance, bound.choices)
        known = Solution("feasible", bound.choices, priced.seconds, priced.nbytes, bound.seconds, 0.0)
    if not bound.cuts or (known and known.gap <= WIDE):
        return known
    met = tuple(tuple(sorted({made.choices[n] for made in bound.cuts})) for n in range(len(instance.nodes)))
    combined = _solved(instance, met, solver, None if limit_s is None else limit_s / 3)
    return _better(replace(combined, bound=bound.seconds) if combined else None, known)


def _all(instance: Instance) -> Kept:
    return tuple(tuple(range(len(node.choices))) for node in instance.nodes)


def _better(one: Solution | None, other: Solution | None) -> Solution | None:
    """The one of fewer seconds, the first of equals."""
    found = [solution for solution in (one, other) if solution is not None]
    return min(found, key=lambda solution: solution.seconds, default=None)


def _solved(instance: Instance, kept: Kept, solver: str, limit_s: float | None) -> Solution | None:
    """The best solution among the choices `kept`, None where there is none or time was short."""
    few = restrict(instance, kept)
    model = formulate(few)
    for _ in range(MOST_EXCLUDED):
        outcome = model.solve(solver, limit_s)
        if outcome.status in ("infeasible", "unsolved"):
            return None
        solution = decode(few, outcome)
        if solution.nbytes <= instance.budget:
            return replace(solution, choices=Reduced(few, kept).restore(solution.choices))
        _exclude(model, solution.choices)
    raise AutoparError(f"{MOST_EXCLUDED} solutions exceed the budget, {instance.budget:.0f} bytes, by next to nothing; "
                       "lower it by a millionth")


def least_bytes(instance: Instance, solver: str = "cbc") -> float:
    """The smallest budget that has a solution, in bytes. Raises Infeasible when none has."""
    reduced = presolve(replace(no_seconds(instance), budget=math.inf), ALL_COSTS).instance
    outcome = formulate_bytes(reduced).solve(solver)
    if outcome.status == "infeasible":
        raise _no_way(instance, solver)
    return price(reduced, taken_in(reduced, outcome)).nbytes


def refusal(needed: float, budget: float, how: str = "", parts: Parts | None = None) -> Infeasible:
    """That a budget is too small; `how` says what was done to need no more than those `parts`."""
    return Infeasible(f"needs {needed / GIB:.3f} GiB a device ({needed:.0f} bytes){how}, budget {budget / GIB:.3f} GiB "
                      f"({budget:.0f} bytes); raise the budget, use more devices or a smaller batch", needed, parts)


def _no_way(instance: Instance, solver: str) -> Infeasible:
    """What stands in the way of any solution."""
    missing = missing_ways(instance, optimise(ways_only(instance), solver).choices)
    return Infeasible(f"no choice fits the connections: whatever is chosen, at least {len(missing)} cannot be made, "
                      f"such as {'; '.join(missing[:3])}; allow more choices there")


def _exclude(model: Model, choices: tuple[int, ...]) -> None:
    model.at_most([(model.variables[f"x({n},{c})"], 1.0) for n, c in enumerate(choices)], len(choices) - 1.0)
