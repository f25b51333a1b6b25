"""What one segment keeps for its backward, where a byte has a price: least seconds of making again and bytes paid for.

    K[m] ∈ {0, 1}     what is called m is kept; 1 for fixed names
    s[v] ≥ 0          value v is in memory from the forward to the backward
    r[v] ≥ 0          value v is made again
    R[o] ≥ 0          op o makes something again
    z[o,u] ≥ 0        op o reads value u from memory to do so

    have     s[v] + r[v] ≥ 1                for every v that the backward needs
    follow   s[u] + r[u] ≥ r[v]             for every input u of v
    agree    s[v] ≤ K[m],  r[v] ≤ 1 − K[m]  where v is called m
    run      R[o] ≥ r[v]                    where o makes v
    read     z[o,u] ≥ r[v] − r[u]           for every read and every v that o makes of u, ≥ r[v] where it is always read

    minimise Σ_o seconds · R + Σ_v write · r + Σ_{o,u} seconds · z
             + price · (Σ_v bytes · s + share · Σ_{v that lands} bytes · r)

With K integral the least s, r, R and z are 0 or 1, so only K is required to be. `share` is how much a byte that is
there only while the segment's backward runs counts beside one that is kept: of many segments one runs at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.core.checkpoint import Kept, Local, keep
from autopar.solver.model import Model, Outcome, Variable

LARGEST = 1e4
AGREEMENT = 1e-6


@dataclass(frozen=True, slots=True)
class Priced:
    """A segment, and what a byte of it costs: `price` in seconds a byte."""

    local: Local
    price: float
    share: float = 1.0

    def seconds(self, kept: Kept) -> float:
        """What the model minimises."""
        return kept.seconds + self.price * (kept.nbytes + self.share * kept.transient)


@dataclass(frozen=True, slots=True)
class Draft:
    """A model under construction: K by name, s and r by value."""

    priced: Priced
    model: Model
    kept: dict[str, Variable]
    saved: tuple[Variable, ...]
    again: tuple[Variable, ...]


def formulate(priced: Priced) -> Model:
    """The model of the module docstring."""
    model = Model("checkpoint", _unit(priced))
    values = range(len(priced.local.values))
    draft = Draft(priced, model, {name: model.choice(f"K({i})") for i, name in enumerate(priced.local.names)},
                  tuple(model.amount(f"s({v})") for v in values), tuple(model.amount(f"r({v})") for v in values))
    have(draft)
    follow(draft)
    agree(draft)
    cost = [*run(draft), *_bytes(draft)]
    model.minimise([(variable, seconds / model.unit) for variable, seconds in cost])
    return model


def have(draft: Draft) -> None:
    """What the backward needs is there."""
    for v, value in enumerate(draft.priced.local.values):
        if value.needed:
            draft.model.at_least([(draft.saved[v], 1.0), (draft.again[v], 1.0)], 1.0)


def follow(draft: Draft) -> None:
    """What is made again has its inputs."""
    for v, value in enumerate(draft.priced.local.values):
        for u in value.inputs:
            draft.model.at_least([(draft.saved[u], 1.0), (draft.again[u], 1.0), (draft.again[v], -1.0)], 0.0)


def agree(draft: Draft) -> None:
    """Values of one name are kept together or not at all."""
    for v, value in enumerate(draft.priced.local.values):
        if value.name in draft.kept:
            draft.model.at_most([(draft.saved[v], 1.0), (draft.kept[value.name], -1.0)], 0.0)
            draft.model.at_most([(draft.again[v], 1.0), (draft.kept[value.name], 1.0)], 1.0)
        else:
            draft.model.at_most([(draft.again[v], 1.0)], 0.0)


def run(draft: Draft) -> list[tuple[Variable, float]]:
    """The seconds of making again; adds `run` and `read`."""
    local, model = draft.priced.local, draft.model
    ops = [model.amount(f"R({o})") for o in range(len(local.seconds))]
    cost = [*zip(ops, local.seconds, strict=True)]
    for v, value in enumerate(local.values):
        model.at_least([(ops[value.op], 1.0), (draft.again[v], -1.0)], 0.0)
        cost.append((draft.again[v], value.write))
    for i, read in enumerate(local.reads):
        reads = model.amount(f"z({i})")
        beside = [] if read.always else [(draft.again[read.value], 1.0)]
        for v, value in enumerate(local.values):
            if value.op == read.op and read.value in value.inputs:
                model.at_least([(reads, 1.0), (draft.again[v], -1.0), *beside], 0.0)
        cost.append((reads, read.seconds))
    return cost


def _bytes(draft: Draft) -> list[tuple[Variable, float]]:
    """The price of what is kept and of what lands."""
    price, share = draft.priced.price, draft.priced.share
    kept = [(draft.saved[v], price * value.nbytes) for v, value in enumerate(draft.priced.local.values)]
    return kept + [(draft.again[v], price * share * value.nbytes)
                   for v, value in enumerate(draft.priced.local.values) if value.lands]


def _unit(priced: Priced) -> float:
    """The seconds that 1 in the objective stands for."""
    local = priced.local
    figures = [*local.seconds, *(read.seconds for read in local.reads), *(value.write for value in local.values),
               *(priced.price * value.nbytes for value in local.values)]
    return max(figures, default=0.0) / LARGEST or 1.0


def decode(priced: Priced, outcome: Outcome) -> Kept:
    """What is kept; asserts that the model and `core.checkpoint.keep` agree on what that comes to."""
    names = (name for i, name in enumerate(priced.local.names) if outcome.values[f"K({i})"] > 0.5)
    found = keep(priced.local, frozenset(names))
    assert math.isclose(priced.seconds(found), outcome.objective, rel_tol=AGREEMENT, abs_tol=1e-12), \
        f"the model says {outcome.objective} s, the formulas {priced.seconds(found)} s"
    return found


def solve(priced: Priced, solver: str = "cbc") -> Kept:
    """The best to keep at a price."""
    return decode(priced, formulate(priced).solve(solver))


def menu(local: Local, share: float = 1.0, solver: str = "cbc", most: int = 12) -> tuple[Kept, ...]:
    """At most about `most` choices that are best at some price, the fewest seconds first.

    Between two neighbours the price is tried at which they are as good as each other, until nothing better is found
    (Eisner and Severance 1976).
    """
    if not local.names:
        return (keep(local, frozenset()),)
    everything, nothing = keep(local, frozenset(local.names)), keep(local, frozenset())
    scale = (nothing.seconds or 1.0) / (everything.nbytes or 1.0)
    found = [solve(Priced(local, scale * factor, share), solver) for factor in (1e-6, 1e6)]
    open_ = [(found[0], found[1])]
    while open_ and len(found) < most:
        open_.sort(key=lambda pair: _weight(pair[1], share) - _weight(pair[0], share))
        fast, small = open_.pop(0)
        saved, lost = _weight(fast, share) - _weight(small, share), small.seconds - fast.seconds
        if saved <= 0.0 or lost <= 0.0:
            continue
        priced = Priced(local, lost / saved, share)
        between = solve(priced, solver)
        if priced.seconds(between) < priced.seconds(fast) * (1.0 - AGREEMENT):
            found.append(between)
            open_ += [(fast, between), (between, small)]
    return tuple(dict.fromkeys(sorted(found, key=lambda kept: (kept.seconds, kept.nbytes))))


def _weight(kept: Kept, share: float) -> float:
    return kept.nbytes + share * kept.transient
