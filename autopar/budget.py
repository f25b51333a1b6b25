"""Recomputation for a decided sharding: what every segment keeps, so that a step stays within its budget.

Each lowered segment has a menu of what to keep (`solver.checkpoint`), of which the counts of equal segments are chosen
(`solver.levels`). Bytes are those of the graphs that run (`codegen.ways`), moment by moment of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from autopar.again import trimmed
from autopar.codegen.executable import Executable, build, offline
from autopar.codegen.footprint import Footprint
from autopar.codegen.lower import Lowered, Target
from autopar.codegen.reprice import Memory, reprice
from autopar.codegen.retained import Retained, fuses
from autopar.codegen.site import Draws
from autopar.codegen.step_bytes import Course, extras
from autopar.codegen.surrounding import surrounding_bytes
from autopar.codegen.ways import Ways, memory_of, ways_of
from autopar.core.checkpoint import Kept, Local
from autopar.core.errors import Infeasible, Parts
from autopar.core.levels import Counts, Entry, Step, Stretch, seconds_of
from autopar.core.sharding import Instance, price
from autopar.core.sharding import Priced as Price
from autopar.passes.decision import Decision
from autopar.passes.problem import Problem, Setting
from autopar.solver.checkpoint import menu
from autopar.solver.lagrange import bound_within, hull
from autopar.solver.levels import least_counts, least_seconds, solve
from autopar.solver.optimise import least_bytes, optimise, refusal, roughly

RATES = (0.02, 0.1, 0.3, 1.0, 4.0, 100.0)
"""Prices of memory at which shardings are sought, in seconds a byte, over the fastest step's for all that it holds."""
PART = 0.1
"""Of results' bytes, what is kept where the shardings that hold least are sought among those that recompute."""
SLACK = 1e-6
"""By what part of the least bytes these may exceed it."""
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Menus:
    """The calls of a program in stretches; `names[g][e]` is what entry e of stretch g keeps."""

    ways: Ways
    step: Step
    stretches: tuple[tuple[str, ...], ...]
    names: tuple[tuple[tuple[str, ...], ...], ...]

    def kept(self, counts: Counts) -> dict[str, tuple[str, ...]]:
        """What each segment keeps, those that keep less first."""
        found: dict[str, tuple[str, ...]] = {}
        for segments, names, row in zip(self.stretches, self.names, counts, strict=True):
            entries = [entry for entry, n in zip(names, row, strict=True) for _ in range(n)]
            found.update(zip(segments, entries, strict=True))
        return found


@dataclass(frozen=True, eq=False)
class Within:
    """A decision that is within its budget, lowered and priced."""

    executable: Executable
    priced: Price
    memory: Memory
    bound: float
    """Of the seconds of this sharding, whatever is kept."""


@dataclass(frozen=True, eq=False)
class Lowerings:
    """The ways to run decisions of one program on one cluster, each lowered and traced once.

    So is every segment that decisions have in common: `segments` are as `build` knows them, `prints` as `Ways` does,
    `menus` what is worth keeping of a segment that needs so much.
    """

    known: dict[Any, Ways] = field(default_factory=dict)
    segments: dict[Any, Lowered] = field(default_factory=dict)
    prints: dict[Any, Footprint] = field(default_factory=dict)
    menus: dict[tuple[Local, float], tuple[Kept, ...]] = field(default_factory=dict)

    def ways(self, decision: Decision, setting: Setting) -> Ways:
        """Those of `decision`, whatever it keeps."""
        key = decision.mesh.shape, decision.assignments, tuple(decision.storage.values())
        if key not in self.known:
            self.known[key] = ways_of(lowered(decision, setting, self.segments), setting, known=self.prints)
        return self.known[key]

    def plain(self, decision: Decision, setting: Setting) -> Memory:
        """Bytes where it is left to whoever runs the segments what they keep."""
        return memory_of(self.ways(decision, setting), {}, surrounding_bytes(setting))


def recomputing(decision: Decision, setting: Setting, lowerings: Lowerings, solver: str = "cbc") -> Within:
    """`decision` with what each segment keeps, the fastest within the budget; as it is where that fits.

    Raises Infeasible.
    """
    ways, plain = lowerings.ways(decision, setting), lowerings.plain(decision, setting)
    if plain.device <= setting.budget:
        priced = reprice(ways.executable, setting)[0]
        return Within(ways.executable, priced, plain, priced.seconds)
    made = menus(ways, setting.budget - (plain.around or 0.0), lowerings.menus, solver)
    try:
        counts = solve(made.step, solver)
    except Infeasible:
        least = memory_of(ways, made.kept(least_counts(made.step, solver)), plain.around)
        fewest = min(least, plain, key=lambda memory: memory.device)
        raise refusal(fewest.device, setting.budget, " with everything made again that can be",
                      Parts(fewest.parameters + fewest.optimizer + fewest.gradients,
                            fewest.activations + fewest.transient, fewest.around or 0.0)) from None
    kept = made.kept(counts)
    executable = replace(ways.executable, target=replace(ways.executable.target, decision=replace(decision, kept=kept)))
    memory = memory_of(ways, kept, plain.around)
    assert memory.device <= setting.budget * (1.0 + ROUNDING), f"{memory.device} bytes, budget {setting.budget}"
    priced = reprice(executable, setting)[0]
    saved = seconds_of(made.step, counts) - least_seconds(made.step, solver)
    return Within(executable, priced, memory, priced.seconds - max(0.0, saved))


@dataclass(frozen=True, eq=False)
class Found:
    """The fastest decision within a budget, None where none is faster than what is known, and a bound of any.

    Where no decision was found that fits, `refusal` says what the least budget of those tried is.
    """

    within: Within | None
    bound: float
    refusal: Infeasible | None = None


def best_within(problem: Problem, lowerings: Lowerings, solver: str, beat: float) -> Found:
    """The fastest of some shardings with what they keep, where they take fewer seconds than `beat`.

    The shardings are those that bytes at prices of all sizes lead to, whatever the budget, so that more of it is never
    slower.
    """
    free = replace(problem.instance, budget=math.inf)
    first = optimise(free, solver).choices
    made, refused = _tried(problem, first, lowerings, solver)
    if problem.setting.mesh.size == 1:  # whatever is chosen, one device does all
        return Found(made if made and made.priced.seconds < beat else None, made.bound if made else math.inf,
                     *refused)
    prices = hull(*trimmed(problem, lowerings.ways(problem.decide(first), problem.setting)), RATES, solver)
    best = made
    met = [each.choices for each in prices if each.choices is not None]
    for choices in _others(free, [*met, *_smallest(free, solver)], first):
        if best and price(free, choices).seconds >= min(beat, best.priced.seconds):
            continue
        made, refusals = _tried(problem, choices, lowerings, solver)
        refused += refusals
        best = made if made and (best is None or made.priced.seconds < best.priced.seconds) else best
    around = surrounding_bytes(problem.setting)
    bound = bound_within(prices, problem.setting.budget - around)
    if best is None:
        return Found(None, bound, min(refused, key=lambda refusal: refusal.least_budget_bytes or math.inf))
    return Found(best if best.priced.seconds < beat else None, min(bound, best.priced.seconds))


def _tried(problem: Problem, choices: tuple[int, ...], lowerings: Lowerings, solver: str,
           ) -> tuple[Within | None, list[Infeasible]]:
    try:
        return recomputing(problem.decide(choices), problem.setting, lowerings, solver), []
    except Infeasible as refused:
        return None, [refused]


def _smallest(free: Instance, solver: str) -> Iterator[tuple[int, ...]]:
    """Choices that hold about the least: of all results, and of a part of those where their making is done twice."""
    nodes = tuple(replace(node, choices=tuple(
        replace(c, saved=c.saved * PART, backward=c.backward + c.forward * (c.saved > 0.0)) for c in node.choices))
        for node in free.nodes)
    for instance in (free, replace(free, nodes=nodes)):
        yield from roughly(replace(instance, budget=least_bytes(instance, solver) * (1.0 + SLACK)), solver)


def _others(free: Instance, met: list[tuple[int, ...]], first: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Choices that are not `first`, the quickest first, those once that come to the same."""
    known = {price(free, first)}
    for choices in sorted(met, key=lambda choices: price(free, choices).seconds):
        if price(free, choices) not in known:
            known.add(price(free, choices))
            yield choices


def menus(ways: Ways, budget: float, choices: dict[tuple[Local, float], tuple[Kept, ...]],
          solver: str = "cbc") -> Menus:
    """The menus of every stretch of equal segments; `budget` is what is left for the step itself.

    `choices` are what is known to be worth keeping, to which what is found is added.
    """
    calls, course = ways.executable.calls, ways.course()
    fixed = np.stack(course.fixed)
    known: dict[int, tuple[tuple[tuple[str, ...], Entry], ...]] = {}
    for place, call in reversed(list(enumerate(calls))):  # the last one's backward runs where most is held
        if id(call.lowered) not in known:
            need = _own(ways.retained[place]), 1.0 if place == len(calls) - 1 else 1.0 / len(calls)
            if need not in choices:
                choices[need] = menu(*need, solver)
            known[id(call.lowered)] = _menu(ways, place, choices[need])
    places = _stretches(ways, fixed)
    menus_ = tuple(known[id(calls[each[0]].lowered)] for each in places)
    names = tuple(tuple(calls[place].segment.name for place in each) for each in places)
    step = Step(tuple(
        Stretch(segments[0], len(each), tuple(entry for _, entry in entries), tuple(fixed[:, each[0]].tolist()),
                tuple((fixed[:, each[-1]] - fixed[:, each[-2]]).tolist() if len(each) > 1 else [0.0] * len(fixed)))
        for segments, each, entries in zip(names, places, menus_, strict=True)), _least(course), budget)
    return Menus(ways, step, names, tuple(tuple(kept for kept, _ in entries) for entries in menus_))


def _least(course: Course) -> float:
    return max(course.rest, course.update)


def _stretches(ways: Ways, fixed: np.ndarray) -> list[range]:
    """Places of equal calls in a row along which what is there whatever they keep grows evenly."""
    calls, found = ways.executable.calls, list[range]()
    for place, call in enumerate(calls):
        last = found[-1] if found else range(0)
        alike = len(last) > 0 and calls[last[0]].lowered is call.lowered
        even = len(last) < 2 or np.allclose(fixed[:, place] - fixed[:, place - 1],
                                            fixed[:, last[1]] - fixed[:, last[0]], rtol=0.0, atol=0.5)
        if alike and even:
            found[-1] = range(last[0], place + 1)
        else:
            found.append(range(place, place + 1))
    return found


def _menu(ways: Ways, place: int, choices: tuple[Kept, ...]) -> tuple[tuple[tuple[str, ...], Entry], ...]:
    """What a call may keep, the fewest bytes first, without what another one is better than in every way."""
    found: dict[Entry, tuple[str, ...]] = {}
    for kept in choices:
        each = ways.footprint(place, kept.names)
        found.setdefault(Entry(float(each.saved), extras(each), kept.seconds), kept.names)
    best = [entry for entry in found if not any(_covers(other, entry) for other in found if other != entry)]
    return tuple((found[entry], entry) for entry in sorted(best, key=lambda e: (e.saved, e.seconds)))


def _covers(one: Entry, other: Entry) -> bool:
    """Whether `one` is nowhere worse."""
    return one.saved <= other.saved and one.seconds <= other.seconds and all(
        a <= b for a, b in zip(one.extras, other.extras, strict=True))


def _own(retained: Retained) -> Local:
    """What a segment needs; values that cross segments are held whatever it keeps, and take no memory of its own."""
    crossing = {*retained.entering, *retained.leaving}
    return replace(retained.local, values=tuple(replace(v, nbytes=0.0) if v.name in crossing else v
                                                for v in retained.local.values))


def lowered(decision: Decision, setting: Setting, known: dict[Any, Lowered] | None = None) -> Executable:
    """The program of a decision for one device, connected to nobody, drawing as it does on the devices there; `known`
    as in `build`."""
    draws: Draws = "by kernel" if fuses(setting) else "by element"
    return build(Target(decision, offline(setting.mesh), setting.price, torch.device("meta"), {}, draws, "outside"),
                 known)
