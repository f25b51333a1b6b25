"""The best stages of `solver.assembly` where each stage has devices of its own: a shortest way with few crossings.

A stage j from position a to b takes the entries of least seconds that fit its budget: of all ways to run so many
segments of each run, those are kept that none beats in everything a stage counts (`fronts`). A way through the stages
has seconds summed, the slowest period and the last finish so far; the way is continued that may come to the least,

    sum + rest[j, a] + (M − 1) · max(period, slowest[j, a]) + max(finish, last[j, a]),

where rest, slowest and last are what the stages still to come take at least, each for itself, so that the first way
that arrives is the best (A*, Hart et al. 1968).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from autopar.core.assembly import Instance, Place, Run, Taken

Picks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Way:
    """What some segments come to: bytes, seconds a micro-batch and once a step, and how many of each entry, by run."""

    static: float
    saved: float
    working: float
    seconds: float
    step: float
    picks: Picks

    def beats(self, other: Way) -> bool:
        """Whether it is nowhere more."""
        return (self.seconds <= other.seconds and self.static <= other.static and self.saved <= other.saved
                and self.working <= other.working and self.step <= other.step)

    def fits(self, place: Place) -> bool:
        """Whether a place holds it."""
        return self.static + place.flight * self.saved + self.working <= place.budget


NONE = Way(0.0, 0.0, 0.0, 0.0, 0.0, ())


def unbeaten(ways: Sequence[Way]) -> list[Way]:
    """Those that no other beats, the fewest seconds first."""
    found: list[Way] = []
    for way in sorted(ways, key=lambda w: (w.seconds, w.saved, w.static, w.working, w.step)):
        if not any(other.beats(way) for other in found):
            found.append(way)
    return found


@dataclass(eq=False)
class Fronts:
    """The unbeaten ways of every number of segments; those that fit no place are left off."""

    instance: Instance

    def __post_init__(self) -> None:
        self.roomiest = [(place.flight, place.budget) for place in self.instance.places]
        self.runs: dict[tuple[int, int], list[Way]] = {}
        self.windows: dict[tuple[int, ...], list[Way]] = {}

    def of(self, counts: tuple[int, ...]) -> list[Way]:
        """The ways to run so many segments of each run."""
        if counts not in self.windows:
            found = [NONE]
            for r, n in enumerate(counts):
                mine = self._run(r, n)
                found = self._kept([_joined(a, b, (*a.picks, b.picks[0])) for a, b in itertools.product(found, mine)])
            self.windows[counts] = found
        return self.windows[counts]

    def _run(self, r: int, n: int) -> list[Way]:
        """The ways to run n segments of run r."""
        run = self.instance.runs[r]
        if n == 0:
            return [Way(0.0, 0.0, 0.0, 0.0, 0.0, ((0,) * len(run.entries),))]
        if (r, n) not in self.runs:
            self.runs[r, n] = self._kept([_joined(way, one, (_sum(way.picks[0], one.picks[0]),))
                                          for way in self._run(r, n - 1) for one in _singles(run)])
        return self.runs[r, n]

    def _kept(self, ways: list[Way]) -> list[Way]:
        return unbeaten([way for way in ways if any(way.static + flight * way.saved + way.working <= budget
                                                    for flight, budget in self.roomiest)])


def _joined(a: Way, b: Way, picks: Picks) -> Way:
    return Way(a.static + b.static, a.saved + b.saved, max(a.working, b.working), a.seconds + b.seconds,
               a.step + b.step, picks)


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sum, zip(a, b, strict=True)))


def _singles(run: Run) -> Iterator[Way]:
    for e, entry in enumerate(run.entries):
        picks = tuple(int(i == e) for i in range(len(run.entries)))
        yield Way(entry.static, entry.saved, entry.working, entry.forward + entry.backward, entry.step, (picks,))


@dataclass(frozen=True, slots=True)
class Arc:
    """A stage up to position `end`: what it adds to a step's sum, its period, its finish, and the way it is run."""

    end: int
    sum: float
    period: float
    finish: float
    way: Way


@dataclass(eq=False)
class Chain:
    """The stages of an instance as arcs from position to position."""

    instance: Instance

    def __post_init__(self) -> None:
        self.fronts = Fronts(self.instance)
        self.starts = tuple(itertools.accumulate((run.count for run in self.instance.runs), initial=0))
        self.known: dict[tuple[int, int], list[Arc]] = {}

    def arcs(self, j: int, start: int) -> list[Arc]:
        """The stages j that begin at a position, each way to run them that none beats in seconds and finish."""
        if (j, start) not in self.known:
            self.known[j, start] = list(self._arcs(j, start))
        return self.known[j, start]

    def _arcs(self, j: int, start: int) -> Iterator[Arc]:
        places, total = self.instance.places, self.starts[-1]
        most = total - (len(places) - 1 - j)
        for end in (total,) if j == len(places) - 1 else range(start + 1, most + 1):
            if self.instance.bond(end):
                continue
            fitting = [way for way in self.fronts.of(self._counts(start, end)) if way.fits(places[j])]
            if not fitting and j < len(places) - 1:
                return  # more segments are no smaller
            step = math.inf
            for way in fitting:  # the fewest seconds first
                if way.step < step:
                    step = way.step
                    yield self._arc(j, start, end, way)

    def _arc(self, j: int, start: int, end: int, way: Way) -> Arc:
        place, crossing = self.instance.places[j], self._crossing(j, end)
        seconds = place.slow * way.seconds
        return Arc(end, seconds + 2.0 * crossing + self._apart(start, end), seconds + place.wait * crossing, way.step,
                   way)

    def _counts(self, start: int, end: int) -> tuple[int, ...]:
        return tuple(max(0, min(end, b) - max(start, a)) for a, b in itertools.pairwise(self.starts))

    def _crossing(self, j: int, end: int) -> float:
        """Seconds one way over the cut behind stage j, which is at `end`."""
        if j == len(self.instance.places) - 1:
            return 0.0
        r = next(r for r, after in enumerate(self.starts[1:]) if end <= after)
        run, place = self.instance.runs[r], self.instance.places[j]
        return place.latency_s + place.s_per_byte * (run.after if end == self.starts[r + 1] else run.inside)

    def _apart(self, start: int, end: int) -> float:
        """Seconds of ties that the cut at `end` parts, and none before it does."""
        return sum(tie.seconds for tie in self.instance.ties
                   if start < self.starts[tie.first + 1] <= end <= self.starts[tie.second]) if (
                       end < self.starts[-1]) else 0.0

    @cached_property
    def rest(self) -> list[list[tuple[float, float, float]]]:
        """By stage and position the least sum, period and finish of the stages from there on, each for itself."""
        stages, total = len(self.instance.places), self.starts[-1]
        found = [[(math.inf,) * 3] * (total + 1) for _ in range(stages)] + [[(math.inf,) * 3] * total + [(0.0,) * 3]]
        for j in reversed(range(stages)):
            for start in range(j, total - (stages - 1 - j)) if j else (0,):
                arcs = [(arc, found[j + 1][arc.end]) for arc in self.arcs(j, start)]
                found[j][start] = (min((arc.sum + rest[0] for arc, rest in arcs), default=math.inf),
                                   min((max(arc.period, rest[1]) for arc, rest in arcs), default=math.inf),
                                   min((max(arc.finish, rest[2]) for arc, rest in arcs), default=math.inf))
        return found


@dataclass(frozen=True, slots=True)
class Label:
    """A way through the first stages, up to a position."""

    sum: float
    period: float
    finish: float
    end: int
    ways: tuple[Way, ...]


def best_chain(instance: Instance) -> Taken | None:
    """The stages of least seconds, None where none fit. Every stage has devices of its own."""
    assert instance.devices == len(instance.places), "stages share devices"
    chain, count = Chain(instance), itertools.count()
    heap = [(0.0, next(count), Label(0.0, 0.0, 0.0, 0, ()))]
    seen: dict[tuple[int, int], list[Label]] = {}
    while heap:
        _, _, label = heapq.heappop(heap)
        j = len(label.ways)
        if j == len(instance.places):
            return tuple(way.picks for way in label.ways)
        known = seen.setdefault((j, label.end), [])
        if any(a.sum <= label.sum and a.period <= label.period and a.finish <= label.finish for a in known):
            continue
        known.append(label)
        for arc in chain.arcs(j, label.end):
            more = Label(label.sum + arc.sum, max(label.period, arc.period), max(label.finish, arc.finish), arc.end,
                         (*label.ways, arc.way))
            if math.isfinite(chain.rest[j + 1][arc.end][0]):
                heapq.heappush(heap, (_bound(instance, chain, j + 1, more), next(count), more))
    return None


def _bound(instance: Instance, chain: Chain, j: int, label: Label) -> float:
    rest, slowest, last = chain.rest[j][label.end]
    return (label.sum + rest + (instance.micro_batches - 1) * max(label.period, slowest) + max(label.finish, last))
