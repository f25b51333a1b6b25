"""How many of equal segments recompute how much: least seconds within a budget of bytes.

    n[g,e] ∈ {0, 1, …}   so many segments of stretch g run as entry e of its menu, those that save least first
    y[g,e] ∈ {0, 1}      any does

    count   Σ_e n[g,e] = count of g,  n[g,e] ≤ count · y[g,e]
    last    base + Σ_{h<g} S_h + Σ_{d≤e} n[g,d] · (saved_d + copies) + Σ_{h>g} G_h
            + (count − Σ_{d≤e} n[g,d] + y[g,e]) · gradient + working + transient_e · y[g,e] ≤ budget
                                                                                 the last segment that runs as e
    first   base + Σ_{h<g} S_h + Σ_{d<e} n[g,d] · (saved_d + copies) + (saved_e + copies) · y[g,e] + Σ_{h>g} G_h
            + (count − Σ_{d<e} n[g,d]) · gradient + working + transient_e · y[g,e] ≤ budget      and the first one
    minimise Σ n · seconds

with S_h = Σ_d n[h,d] · (saved_d + copies) and G_h = count · gradient. Where no segment runs as e its rows say no more
than those of the entry before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from autopar.core.errors import Infeasible
from autopar.core.levels import Counts, Step, Stretch, bytes_of, seconds_of
from autopar.solver.model import Model, Outcome, Variable

Terms = list[tuple[Variable, float]]
GIB = 2.0**30


def formulate(step: Step) -> Model:
    """The model of the module docstring."""
    model, numbers = _draft(step)
    for terms, held in _rows(step, numbers, model):
        model.at_most([(x, nbytes / _scale(step)) for x, nbytes in terms], (step.budget - held) / _scale(step))
    seconds = [(n, entry.seconds) for stretch, row in zip(step.stretches, numbers, strict=True)
               for n, entry in zip(row, stretch.menu, strict=True)]
    model.unit = max((cost for _, cost in seconds), default=0.0) / 1e4 or 1.0
    model.minimise([(n, cost / model.unit) for n, cost in seconds])
    return model


def formulate_bytes(step: Step) -> Model:
    """The same rows, minimising what they come to."""
    model, numbers = _draft(step)
    most = model.amount("B")
    for terms, held in _rows(step, numbers, model):
        model.at_least([(most, 1.0), *((x, -nbytes / _scale(step)) for x, nbytes in terms)], held / _scale(step))
    model.unit = _scale(step)
    model.minimise([(most, 1.0)])
    return model


def _draft(step: Step) -> tuple[Model, list[list[Variable]]]:
    model = Model("levels")
    numbers = [[model.whole(f"n({g},{e})", stretch.count) for e in range(len(stretch.menu))]
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
    after = sum(stretch.count * stretch.gradient for stretch in step.stretches)
    yield [], step.base + after
    for g, (stretch, row) in enumerate(zip(step.stretches, numbers, strict=True)):
        after -= stretch.count * stretch.gradient
        within: Terms = []
        held = step.base + after + stretch.count * stretch.gradient + stretch.working
        for e, entry in enumerate(stretch.menu):
            any_, each = model.variables[f"y({g},{e})"], entry.saved + stretch.copies
            yield [*before, *_net(within, stretch), (any_, each + entry.transient)], held
            within.append((row[e], each))
            yield [*before, *_net(within, stretch), (any_, stretch.gradient + entry.transient)], held
        before += within


def _net(within: Terms, stretch: Stretch) -> Terms:
    """What those segments save less the gradients that are not there yet."""
    return [(n, each - stretch.gradient) for n, each in within]


def decode(step: Step, outcome: Outcome) -> Counts:
    """The counts of an outcome."""
    return tuple(tuple(round(outcome.values[f"n({g},{e})"]) for e in range(len(stretch.menu)))
                 for g, stretch in enumerate(step.stretches))


def solve(step: Step, solver: str = "cbc", limit_s: float | None = None) -> Counts:
    """The counts of least seconds. Raises Infeasible with the least budget that would do."""
    outcome = formulate(step).solve(solver, limit_s)
    if outcome.status in ("infeasible", "unsolved"):
        needed = bytes_of(step, decode(step, formulate_bytes(step).solve(solver, limit_s)))
        raise Infeasible(f"needs {needed / GIB:.3f} GiB a device ({needed:.0f} bytes) with everything made again that "
                         f"can be, budget {step.budget / GIB:.3f} GiB ({step.budget:.0f} bytes); raise the budget, use "
                         "more devices or a smaller batch", needed)
    found = decode(step, outcome)
    assert math.isclose(seconds_of(step, found), outcome.objective, rel_tol=1e-6, abs_tol=1e-9)
    return found
