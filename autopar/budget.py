"""Recomputation for a decided sharding: what every segment keeps, so that a step stays within its budget.

Each lowered segment has a menu of what to keep (`solver.checkpoint`), of which the counts of equal segments are chosen
(`solver.levels`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from autopar.codegen.executable import Call, Executable, build, offline
from autopar.codegen.lower import Target
from autopar.codegen.reprice import Memory, copied, reprice, retained_by, tally_calls
from autopar.codegen.retained import Retained, fuses
from autopar.codegen.site import Draws
from autopar.core.checkpoint import Kept, Local
from autopar.core.errors import Infeasible
from autopar.core.levels import Counts, Entry, Step, Stretch
from autopar.core.sharding import Instance, Priced, price
from autopar.passes.decision import Decision
from autopar.passes.moments import Held, held
from autopar.passes.problem import Problem, Setting
from autopar.solver.checkpoint import menu
from autopar.solver.levels import solve
from autopar.solver.optimise import begin, least_bytes, optimise, roughly

PART = 0.1
"""Of results' bytes, what is kept where shardings are sought that go with recomputation."""
SHARES = (1e-6, 0.25, 0.6)
"""The budgets that they are sought within, from the least to what the fastest takes."""
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Menus:
    """The calls of a program in stretches, `menus[g]` what each entry of stretch g keeps."""

    executable: Executable
    step: Step
    stretches: tuple[tuple[str, ...], ...]
    menus: tuple[tuple[Kept, ...], ...]

    def kept(self, counts: Counts) -> dict[str, tuple[str, ...]]:
        """What each segment keeps, those that keep less first."""
        found: dict[str, tuple[str, ...]] = {}
        for names, kept, row in zip(self.stretches, self.menus, counts, strict=True):
            entries = [entry for entry, n in zip(kept, row, strict=True) for _ in range(n)]
            found.update((name, entry.names) for name, entry in zip(names, entries, strict=True))
        return found


@dataclass(frozen=True, eq=False)
class Within:
    """A decision that is within its budget, lowered and priced."""

    executable: Executable
    priced: Priced
    memory: Memory


def recomputing(decision: Decision, setting: Setting, solver: str = "cbc") -> Within:
    """`decision` with what each segment keeps, the fastest within the budget. Raises Infeasible."""
    made = menus(decision, setting, solver)
    found = replace(decision, kept=made.kept(solve(made.step, solver)))
    executable = replace(made.executable, target=replace(made.executable.target, decision=found))
    priced, memory = reprice(executable, setting)
    assert memory.total <= setting.budget * (1.0 + ROUNDING), f"{memory.total} bytes, budget {setting.budget}"
    return Within(executable, priced, memory)


def best_within(problem: Problem, solver: str, beat: float, limit_s: float) -> Within | None:
    """The fastest of some shardings with what they keep, None where none takes fewer seconds than `beat`.

    The shardings do not depend on the budget, so that more of it is never slower. Raises Infeasible with the least
    budget that would do.
    """
    found: Within | None = None
    refusals: list[Infeasible] = []
    fits = False
    for choices in shardings(problem.instance, solver, limit_s):
        try:
            made = recomputing(problem.decide(choices), problem.setting, solver)
        except Infeasible as refusal:
            refusals.append(refusal)
            continue
        fits = True
        if made.priced.seconds < min(beat, found.priced.seconds if found else math.inf):
            found = made
    if not fits:
        raise min(refusals, key=lambda refusal: refusal.least_budget_bytes or math.inf)
    return found


def least_seconds(instance: Instance, solver: str) -> float:
    """A bound of any plan's seconds within the budget: of one that keeps nothing and makes nothing again."""
    nodes = tuple(replace(node, choices=tuple(replace(c, saved=0.0) for c in node.choices)) for node in instance.nodes)
    try:
        return begin(replace(instance, nodes=nodes), solver=solver).bound.seconds
    except Infeasible:
        return math.inf


def shardings(instance: Instance, solver: str, limit_s: float) -> Iterator[tuple[int, ...]]:
    """Choices that may be good with recomputation, whatever the budget; of those that come to the same one.

    The best without a budget, and good ones within some, from the least on, where results take a part of their bytes
    and their making is done twice.
    """
    free, known = replace(instance, budget=math.inf), set[Priced]()
    for choices in _sought(free, solver, limit_s):
        priced = price(free, choices)
        if priced not in known:
            known.add(priced)
            yield choices


def _sought(free: Instance, solver: str, limit_s: float) -> Iterator[tuple[int, ...]]:
    best = optimise(free, solver, limit_s).choices
    yield best
    nodes = tuple(replace(node, choices=tuple(
        replace(c, saved=c.saved * PART, backward=c.backward + c.forward * (c.saved > 0.0)) for c in node.choices))
        for node in free.nodes)
    twice = replace(free, nodes=nodes)
    least, most = least_bytes(twice, solver), price(twice, best).nbytes
    for share in SHARES if most > least * (1.0 + ROUNDING) else ():
        with contextlib.suppress(Infeasible):
            yield from roughly(replace(twice, budget=least + share * (most - least)), solver)


def menus(decision: Decision, setting: Setting, solver: str = "cbc") -> Menus:
    """The menus of every stretch of equal segments."""
    marked = replace(decision, kept=dict.fromkeys((s.name for s in decision.context.segmented.segments), ()))
    executable = lowered(marked, setting)
    tallies = tally_calls(executable, setting)
    accounts = _Accounts(executable, setting)
    every = retained_by(executable, setting, tallies)
    locals_ = accounts.counted(every)
    found: list[tuple[list[int], float, float, float]] = []
    for place, tally in enumerate(tallies):
        figures = accounts.copies(place), accounts.gradient(place), tally.working + accounts.working(place)
        alike = found and locals_[found[-1][0][-1]] is locals_[place] and found[-1][1:] == figures
        if alike:
            found[-1][0].append(place)
        else:
            found.append(([place], *figures))
    share = {id(local): 1.0 / len(locals_) for local in locals_}
    share[id(locals_[-1])] = 1.0  # its backward runs where most is held
    known = {id(local): tuple(sorted(menu(local, share[id(local)], solver), key=lambda kept: kept.nbytes))
             for local in {id(local): local for local in locals_}.values()}
    kept = tuple(known[id(locals_[places[0]])] for places, *_ in found)
    counted = [(every[places[0]].local, locals_[places[0]]) for places, *_ in found]
    names = tuple(tuple(executable.calls[place].segment.name for place in places) for places, *_ in found)
    stretches = tuple(Stretch(each[0], len(each), tuple(_entry(k, *of) for k in entries), *figures)
                      for each, entries, of, (_, *figures) in zip(names, kept, counted, found, strict=True))
    return Menus(executable, Step(stretches, accounts.base, setting.budget), names, kept)


def _entry(kept: Kept, local: Local, counted: Local) -> Entry:
    """What keeping comes to; a result that the next segment counts is there in the backward of its own too."""
    twice = sum(local.values[v].nbytes - counted.values[v].nbytes for v in kept.saved
                if local.values[v].name in kept.names)
    return Entry(kept.nbytes, kept.transient + twice, kept.seconds)


def lowered(decision: Decision, setting: Setting) -> Executable:
    """The program of a decision for one device, connected to nobody, drawing as it does on the devices there."""
    draws: Draws = "by kernel" if fuses(setting) else "by element"
    return build(Target(decision, offline(setting.mesh), setting.price, torch.device("meta"), {}, draws, "outside"))


class _Accounts:
    """Who counts which bytes, so that what several segments hold counts once and equal ones count alike."""

    def __init__(self, executable: Executable, setting: Setting) -> None:
        self.executable, decision = executable, executable.decision
        self.held: dict[fx.Node, Held] = {
            node: held(decision.context, node, storage, decision.mesh, setting.optimizer.state_bytes)
            for node, storage in decision.storage.items()}
        self.read = [[n for n in dict.fromkeys(call.segment.externals) if n in self.held] for call in executable.calls]
        self.first = {n: place for place, nodes in reversed(list(enumerate(self.read))) for n in nodes}
        self.last = {n: place for place, nodes in enumerate(self.read) for n in nodes}
        unread = sum(h.gradient for node, h in self.held.items() if node not in self.last)
        self.base = unread + sum(h.parameter + h.state for h in self.held.values())
        self.crossing: dict[int, float] = {}

    def gradient(self, place: int) -> float:
        """Bytes of gradients that come to be in the backward of a call."""
        return sum(self.held[n].gradient for n in self.read[place] if self.last[n] == place)

    def working(self, place: int) -> float:
        """Bytes of parameters that are there while a call runs."""
        return sum(self.held[n].working for n in self.read[place])

    def copies(self, place: int) -> float:
        """Bytes held from a call's forward to its backward whatever it keeps: FSDP2's, and what several calls take."""
        decision = self.executable.decision
        return self.crossing.get(place, 0.0) + sum(
            self.held[n].copy for n in self.read[place] if self.first[n] == place and copied(decision, n))

    def counted(self, every: list[Retained]) -> list[Local]:
        """What each call needs, values that cross segments counted by one of those that hold them.

        By the one that takes it, or where several do by the one that makes it, then whatever is kept.
        """
        calls, takers = self.executable.calls, dict[fx.Node | None, list[int]]()
        for place, (call, retained) in enumerate(zip(calls, every, strict=True)):
            for name in retained.entering:
                takers.setdefault(retained.identity(call, name), []).append(place)
        always = {identity for identity, places in takers.items()
                  if len(places) > 1 or _needed(every[places[0]], calls[places[0]], identity)}
        bases = [[every[place].base(n) for n in call.exports] for place, call in enumerate(calls)]
        makers = {place: [n for n in made if len(takers.get(n, ())) > 1] for place, made in enumerate(bases)}
        for place, made in makers.items():
            for node in made:
                taker = takers[node][0]
                self.crossing[place] = self.crossing.get(place, 0.0) + _size(every[taker], calls[taker], node)
        elsewhere: dict[int, set[str]] = {}
        for call, retained in zip(calls, every, strict=True):
            at = {name: retained.identity(call, name) for name in (*retained.leaving, *retained.entering)}
            free = {name for name in retained.leaving if at[name] in always}
            free |= {name for name in retained.entering if len(takers.get(at[name], ())) > 1}
            elsewhere.setdefault(id(retained.local), free).intersection_update(free)
        cache = {id(r.local): _without(r.local, elsewhere[id(r.local)]) for r in every}
        return [cache[id(r.local)] for r in every]


def _without(local: Local, names: set[str]) -> Local:
    """`local` in which values of these names take no memory."""
    return replace(local, values=tuple(replace(v, nbytes=0.0) if v.name in names else v for v in local.values))


def _needed(retained: Retained, call: Call, identity: fx.Node | None) -> bool:
    """Whether the backward needs a value that comes in whatever is kept."""
    return any(value.needed and retained.identity(call, value.name) is identity
               for value in retained.local.values if value.name in retained.entering)


def _size(retained: Retained, call: Call, identity: fx.Node) -> float:
    return next(value.nbytes for value in retained.local.values if value.name in retained.entering
                and retained.identity(call, value.name) is identity)
