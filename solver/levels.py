"""How many of equal segments recompute how much: least seconds within a budget of bytes.

    n[g,e] ∈ {0, 1, …}   so many segments of stretch g run as entry e of its menu, those that save least first
    y[g,e] ∈ {0, 1}      any does

    count   Σ_e n[g,e] = count of g,  n[g,e] ≤ count · y[g,e]
    last    first_k + step_k · (Σ_{d≤e} n[g,d] − 1) + Σ_{h<g} S_h + Σ_{d≤e} n[g,d] · saved_d
            + (extra_k,e − saved_e) · y[g,e] − slack_g · (1 − y[g,e]) ≤ budget     the last segment that runs as e
    first   first_k + step_k · Σ_{d<e} n[g,d] + Σ_{h<g} S_h + Σ_{d<e} n[g,d] · saved_d
            + extra_k,e · y[g,e] − slack_g · (1 − y[g,e]) ≤ budget                 and the first one
    minimise Σ n · seconds

for every moment k, with S_h = Σ_d n[h,d] · saved_d. slack_g is what makes rows of an entry that no segment runs as say
no more than those of the entry before. Moments that another one never falls below have no rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from autopar.core.errors import Infeasible
from autopar.core.levels import Counts, Entry, Step, Stretch, bytes_of, seconds_of
from autopar.solver.model import Model, Outcome, Variable

Terms = list[tuple[Variable, float]]
Numbers = Literal["whole", "in parts"]
GIB = 2.0**30


def formulate(step: Step, numbers_are: Numbers = "whole") -> Model:
    """The model of the module docstring; with numbers in parts segments may run between two entries."""
    model, numbers = _draft(step, numbers_are)
    for terms, held in _rows(step, numbers, model):
        model.at_most([(x, nbytes / _scale(step)) for x, nbytes in terms], (step.budget - held) / _scale(step))
    seconds = [(n, entry.seconds) for stretch, row in zip(step.stretches, numbers, strict=True)
               for n, entry in zip(row, stretch.menu, strict=True)]
    model.unit = max((cost for _, cost in seconds), default=0.0) / 1e4 or 1.0
    model.minimise([(n, cost / model.unit) for n, cost in seconds])
    return model


def formulate_bytes(step: Step) -> Model:
    """The same rows, minimising what they come to."""
    model, numbers = _draft(step, "whole")
    most = model.amount("B")
    for terms, held in _rows(step, numbers, model):
        model.at_least([(most, 1.0), *((x, -nbytes / _scale(step)) for x, nbytes in terms)], held / _scale(step))
    model.unit = _scale(step)
    model.minimise([(most, 1.0)])
    return model


def _draft(step: Step, numbers_are: Numbers) -> tuple[Model, list[list[Variable]]]:
    model = Model("levels")
    make = {"whole": model.whole, "in parts": model.amount}[numbers_are]
    numbers = [[make(f"n({g},{e})", float(stretch.count)) for e in range(len(stretch.menu))]
               for g, stretch in enumerate(step.stretches)]
    for g, (stretch, row) in enumerate(zip(step.stretches, numbers, strict=True)):
        model.equal([(n, 1.0) for n in row], stretch.count)
        for e, n in enumerate(row):
            model.at_most([(n, 1.0), (model.choice(f"y({g},{e})"), -float(stretch.count))], 0.0)
    return model, numbers


def _scale(step: Step) -> float:
    """The bytes that 1 in a row stands for."""
    return max((entry.saved for stretch in step.stretches for entry in stretch.menu), default=0.0) / 1e3 or 1.0


def _rows(step: Step, numbers: list[list[Variable]], model: Model) -> Iterator[tuple[Terms, float]]:
    """What may be the fullest moments: what counts for them, and what is there anyway."""
    before: Terms = []
    yield [], step.least
    for g, (stretch, row) in enumerate(zip(step.stretches, numbers, strict=True)):
        slack = _slack(stretch)
        for e, entry in enumerate(stretch.menu):
            any_ = model.variables[f"y({g},{e})"]
            for k in _fullest(stretch, entry):
                first, more, extra = stretch.first[k], stretch.step[k], entry.extras[k]
                earlier = [(n, each.saved + more) for n, each in zip(row[:e], stretch.menu, strict=False)]
                yield [*before, *earlier, (any_, slack + extra)], first - slack
                here = [*earlier, (row[e], entry.saved + more)]
                yield [*before, *here, (any_, slack + extra - entry.saved)], first - more - slack
        before += [(n, each.saved) for n, each in zip(row, stretch.menu, strict=True)]


def _slack(stretch: Stretch) -> float:
    """By how much at most the rows of an entry that none runs as would exceed those of the one before."""
    return max(0.0, *(entry.saved - extra + abs(more) for entry in stretch.menu
                      for extra, more in zip(entry.extras, stretch.step, strict=True)))


def _fullest(stretch: Stretch, entry: Entry) -> list[int]:
    """The moments of segments that run as an entry which no other one covers, at the stretch's first and last."""
    ends = [(first + extra, first + (stretch.count - 1) * more + extra)
            for first, more, extra in zip(stretch.first, stretch.step, entry.extras, strict=True)]
    return [k for k, (here, there) in enumerate(ends) if not any(
        other[0] >= here and other[1] >= there and (other != (here, there) or j < k)
        for j, other in enumerate(ends) if j != k)]


def decode(step: Step, outcome: Outcome) -> Counts:
    """The counts of an outcome."""
    return tuple(tuple(round(outcome.values[f"n({g},{e})"]) for e in range(len(stretch.menu)))
                 for g, stretch in enumerate(step.stretches))


def least_seconds(step: Step, solver: str = "cbc") -> float:
    """A bound of the seconds of any counts, also of ways to run a segment that lie between those of its menu."""
    outcome = formulate(step, "in parts").solve(solver)
    return outcome.bound if outcome.status != "infeasible" else math.inf


def least_counts(step: Step, solver: str = "cbc") -> Counts:
    """The counts of least bytes, whatever the budget."""
    return decode(step, formulate_bytes(step).solve(solver))


def solve(step: Step, solver: str = "cbc", limit_s: float | None = None) -> Counts:
    """The counts of least seconds. Raises Infeasible with the least budget that would do."""
    outcome = formulate(step).solve(solver, limit_s)
    if outcome.status in ("infeasible", "unsolved"):
        needed = bytes_of(step, least_counts(step, solver))
        raise Infeasible(f"needs {needed / GIB:.3f} GiB a device ({needed:.0f} bytes) with everything made again that "
                         f"can be, budget {step.budget / GIB:.3f} GiB ({step.budget:.0f} bytes); raise the budget, use "
                         "more devices or a smaller batch", needed)
    found = decode(step, outcome)
    assert math.isclose(seconds_of(step, found), outcome.objective, rel_tol=1e-6, abs_tol=1e-9)
    return found
