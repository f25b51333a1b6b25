"""Contiguous stages of least seconds a step within each device's bytes: how many segments of each run, by which entry.

A program is a sequence of runs r of n_r equal segments. Stage j of S takes n[j,r,e] segments of run r by its entry e.

    n[j,r,e] ∈ {0, 1, …, n_r}      segments
    s[j,r], d[j,r] ∈ {0, 1}        run r is begun, and done, by the end of stage j
    P, Y ≥ 0                       the slowest stage's seconds a micro-batch, and once a step

    all_placed  Σ_{j,e} n[j,r,e] = n_r                                              for every run r
    no_idle     Σ_{r,e} n[j,r,e] ≥ 1                                                for every stage j
    in_order    N[j,r] = Σ_{i ≤ j, e} n[i,r,e]
                n_r · d[j,r] ≤ N[j,r] ≤ n_r − 1 + d[j,r]                            d tells what is done
                s[j,r] ≤ N[j,r] ≤ n_r · s[j,r]                                      s tells what is begun
                s[j,r+1] ≤ d[j,r]                                                   runs are begun one by one
    crossing    c[j] = α_j + β_j · Σ_r (inside_r · (s[j,r] − d[j,r]) + after_r · (d[j,r] − s[j,r+1]))   seconds one way
    slowest     P ≥ Σ_{j on device} (T[j] + wait_j · c[j]),  T[j] = slow_j · Σ (forward_e + backward_e) · n[j,r,e]
    finishing   Y ≥ Σ_{j on device} Σ step_e · n[j,r,e]
    remember    Σ_{j on device} (Σ (static_e + flight_j · saved_e) · n[j,r,e] + w[j]) ≤ budget of the device,
                w[j] ≥ working_e for every entry there
    tied        t ≥ d[j,a] − s[j,b] for tied runs a < b: there is a stage by whose end a is done and b not begun;
                where the last stage is with the first: t ≥ 1 − d[0,a] and t ≥ s[S−2,b], a is on the first and b on
                the last

    bonded      for a bond of segments a to b no cut is between them, z[j] ∈ {0, 1}:
                (b + 1) · z[j] ≤ Σ_r N[j,r] ≤ a + (Σ_r n_r − a) · z[j]                 for every stage j but the last

    minimise    Σ_j (T[j] + 2 c[j]) / V + (M − 1 / V) · P + Y + Σ_tied seconds · t

`wait_j` is what of a transfer shows in each period: with k = S − j stages from j on, 1F1B has k micro-batches on their
way and back, which take k periods and cross k − 1 cuts twice: 2 (k − 1) / k. Sum and period are those of 1F1B and GPipe
(Narayanan et al. 2019). Interleaving V stages a device (Narayanan et al. 2021) a device has V · M actions each way, and
the first one waits for S − V of 1 / V of them: V is 1 but for that.

Where each stage has devices of its own `solver.chain` finds the same optimum in less time, and this is its twin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.core.assembly import Assembled, Instance, price
from autopar.core.errors import Infeasible
from autopar.solver.chain import best_chain
from autopar.solver.model import Model, Outcome, Variable

GIB = 2.0**30
LARGEST = 1e6
AGREEMENT = 1e-6
Terms = list[tuple[Variable, float]]


# The model


@dataclass(frozen=True, slots=True)
class Draft:
    """A model under construction; `n[j][r][e]`, `begun[j][r]` and `done[j][r]` are its variables."""

    instance: Instance
    model: Model
    n: tuple[tuple[tuple[Variable, ...], ...], ...]
    begun: tuple[tuple[Variable, ...], ...]
    done: tuple[tuple[Variable, ...], ...]


def formulate(instance: Instance) -> Model:
    """The model of the module docstring."""
    unit = max((e.forward + e.backward + e.step for run in instance.runs for e in run.entries), default=1.0) or 1.0
    model = Model("assembly", unit)
    stages, runs = range(len(instance.places)), range(len(instance.runs))
    n = tuple(tuple(tuple(model.whole(f"n({j},{r},{e})", instance.runs[r].count)
                          for e in range(len(instance.runs[r].entries))) for r in runs) for j in stages)
    begun, done = (tuple(tuple(model.choice(f"{name}({j},{r})") for r in runs) for j in stages) for name in "sd")
    draft = Draft(instance, model, n, begun, done)
    all_placed(draft)
    no_idle(draft)
    in_order(draft)
    remember(draft)
    bonded(draft)
    one = model.amount("1")
    model.equal([(one, 1.0)], 1.0)
    model.minimise([*_sums(draft), *_period(draft), *_finish(draft), *_ties(draft)])
    return model


def all_placed(draft: Draft) -> None:
    """Every segment is on some stage."""
    for r, run in enumerate(draft.instance.runs):
        draft.model.equal([(x, 1.0) for stage in draft.n for x in stage[r]], run.count)


def no_idle(draft: Draft) -> None:
    """Every stage has a segment."""
    for stage in draft.n:
        draft.model.at_least([(x, 1.0) for entries in stage for x in entries], 1.0)


def in_order(draft: Draft) -> None:
    """What is begun and done by the end of each stage, each run after the one before."""
    for j, r in itertools.product(range(len(draft.n)), range(len(draft.instance.runs))):
        count, begun, done = draft.instance.runs[r].count, draft.begun[j][r], draft.done[j][r]
        so_far = [(x, 1.0) for stage in draft.n[:j + 1] for x in stage[r]]
        draft.model.at_least([*so_far, (done, -count)], 0.0)
        draft.model.at_most([*so_far, (done, -1.0)], count - 1.0)
        draft.model.at_least([*so_far, (begun, -1.0)], 0.0)
        draft.model.at_most([*so_far, (begun, -count)], 0.0)
        if r + 1 < len(draft.instance.runs):
            draft.model.at_most([(draft.begun[j][r + 1], 1.0), (done, -1.0)], 0.0)


def remember(draft: Draft) -> None:
    """No device holds more than its budget; in GiB."""
    for device in range(draft.instance.devices):
        budget = draft.instance.places[device].budget
        if math.isfinite(budget):
            draft.model.at_most([term for j in draft.instance.on(device) for term in _held(draft, j)], budget / GIB)


def bonded(draft: Draft) -> None:
    """No cut is inside of a bond."""
    total = draft.instance.segments
    for (i, bond), j in itertools.product(enumerate(draft.instance.bonds), range(len(draft.n) - 1)):
        beyond = draft.model.choice(f"z({i},{j})")
        so_far = [(x, 1.0) for stage in draft.n[:j + 1] for entries in stage for x in entries]
        draft.model.at_least([*so_far, (beyond, -(bond.last + 1.0))], 0.0)
        draft.model.at_most([*so_far, (beyond, float(bond.first - total))], bond.first)


def _held(draft: Draft, j: int) -> Terms:
    """The GiB of stage j."""
    place, stage, working = draft.instance.places[j], draft.n[j], draft.model.amount(f"w({j})")
    for run, entries in zip(draft.instance.runs, stage, strict=True):
        for e, (entry, x) in enumerate(zip(run.entries, entries, strict=True)):
            if entry.working:
                used = draft.model.choice(f"u({j},{run.name},{e})")
                draft.model.at_most([(x, 1.0), (used, -run.count)], 0.0)
                draft.model.at_least([(working, 1.0), (used, -entry.working / GIB)], 0.0)
    held = [(x, (entry.static + place.flight * entry.saved) / GIB)
            for run, entries in zip(draft.instance.runs, stage, strict=True)
            for entry, x in zip(run.entries, entries, strict=True)]
    return [*held, (working, 1.0)]


def _seconds(draft: Draft, j: int) -> Terms:
    """T[j] in the model's unit."""
    slow = draft.instance.places[j].slow / draft.model.unit
    return [(x, slow * (entry.forward + entry.backward)) for run, entries in
            zip(draft.instance.runs, draft.n[j], strict=True) for entry, x in zip(run.entries, entries, strict=True)]


def _crossing(draft: Draft, j: int, share: float) -> Terms:
    """`share` · c[j] in the model's unit."""
    if j == len(draft.n) - 1:
        return []
    place = draft.instance.places[j]
    found: Terms = [(draft.model.variables["1"], share * place.latency_s / draft.model.unit)]
    for r, run in enumerate(draft.instance.runs):
        inside, after = (share * place.s_per_byte * nbytes / draft.model.unit for nbytes in (run.inside, run.after))
        found += [(draft.begun[j][r], inside), (draft.done[j][r], after - inside)]
        if r + 1 < len(draft.instance.runs):
            found.append((draft.begun[j][r + 1], -after))
    return found


def _sums(draft: Draft) -> Iterator[tuple[Variable, float]]:
    share = 1.0 / draft.instance.chunks
    for j in range(len(draft.n)):
        yield from ((x, share * units) for x, units in [*_seconds(draft, j), *_crossing(draft, j, 2.0)])


def _period(draft: Draft) -> Terms:
    slowest = draft.model.amount("P")
    for device in range(draft.instance.devices):
        terms = [(x, -units) for j in draft.instance.on(device)
                 for x, units in [*_seconds(draft, j), *_crossing(draft, j, draft.instance.places[j].wait)]]
        draft.model.at_least([(slowest, 1.0), *terms], 0.0)
    return [(slowest, draft.instance.micro_batches - 1.0 / draft.instance.chunks)]


def _finish(draft: Draft) -> Terms:
    last = draft.model.amount("Y")
    for device in range(draft.instance.devices):
        terms = [(x, -entry.step / draft.model.unit) for j in draft.instance.on(device)
                 for run, entries in zip(draft.instance.runs, draft.n[j], strict=True)
                 for entry, x in zip(run.entries, entries, strict=True)]
        draft.model.at_least([(last, 1.0), *terms], 0.0)
    return [(last, 1.0)]


def _ties(draft: Draft) -> Iterator[tuple[Variable, float]]:
    for i, tie in enumerate(draft.instance.ties):
        apart = draft.model.amount(f"t({i})")
        if draft.instance.looped:
            draft.model.at_least([(apart, 1.0), (draft.done[0][tie.first], 1.0)], 1.0)
            draft.model.at_least([(apart, 1.0), (draft.begun[-2][tie.second], -1.0)], 0.0)
            yield apart, tie.seconds / draft.model.unit
            continue
        for begun, done in zip(draft.begun, draft.done, strict=True):
            draft.model.at_least([(apart, 1.0), (done[tie.first], -1.0), (begun[tie.second], 1.0)], 0.0)
        yield apart, tie.seconds / draft.model.unit


def decode(instance: Instance, outcome: Outcome) -> Assembled:
    """The stages taken, priced anew; asserts that the model and `price` agree."""
    taken = tuple(tuple(tuple(round(outcome.values[f"n({j},{r},{e})"]) for e in range(len(run.entries)))
                        for r, run in enumerate(instance.runs)) for j in range(len(instance.places)))
    priced = price(instance, taken)
    assert math.isclose(priced.seconds, outcome.objective, rel_tol=AGREEMENT, abs_tol=1e-12), \
        f"the model says {outcome.objective} s, the formulas {priced.seconds} s"
    return Assembled(taken, priced, priced.seconds if outcome.status == "optimal" else min(outcome.bound,
                                                                                          priced.seconds))


def assemble(instance: Instance, solver: str = "cbc", limit_s: float | None = None) -> Assembled:
    """The best stages. Raises Infeasible where there are more stages than segments, or none fits in memory."""
    if len(instance.places) > instance.segments:
        raise Infeasible(f"{len(instance.places)} stages are asked for, the program has {instance.segments} "
                         f"segments to cut between; use at most {instance.segments} stages")
    _check_bonds(instance)
    if instance.devices < len(instance.places):
        return solved(instance, solver, limit_s)
    taken = best_chain(instance)
    if taken is None:
        raise _refusal(instance)
    priced = price(instance, taken)
    return Assembled(taken, priced, priced.seconds)


def _check_bonds(instance: Instance) -> None:
    """Raises Infeasible where there are more stages than parts that bonds leave."""
    parting = [bond for p in range(1, instance.segments) if (bond := instance.bond(p))]
    most = instance.segments - len(parting)
    if len(instance.places) > most:
        names = ", ".join(dict.fromkeys(bond.name for bond in parting))
        raise Infeasible(f"{len(instance.places)} stages are asked for, and of {instance.segments} segments "
                         f"{len(parting) + 1} go together as they share buffers that the forward writes ({names}); use "
                         f"at most {most} stages")


def solved(instance: Instance, solver: str = "cbc", limit_s: float | None = None) -> Assembled:
    """The best stages by the model of the module docstring. Raises Infeasible."""
    _check_bonds(instance)
    outcome = formulate(instance).solve(solver, limit_s)
    if outcome.status == "infeasible":
        raise _refusal(instance)
    if outcome.status == "unsolved":
        raise Infeasible(f"no stages were found within {limit_s} s; allow more time, or use fewer stages")
    return decode(instance, outcome)


def _refusal(instance: Instance) -> Infeasible:
    """That a stage holds too much whatever it takes."""
    budget = max(place.budget for place in instance.places)
    least = sum(run.count * min(e.static + e.saved for e in run.entries) for run in instance.runs)
    needed = least / len(instance.places)
    return Infeasible(f"needs {needed / GIB:.3f} GiB a device or more in {len(instance.places)} stages, budget "
                      f"{budget / GIB:.3f} GiB; raise the budget, use more stages or more micro-batches", needed)
