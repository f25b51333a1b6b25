"""Contiguous stages of a program in numbers: what segments cost, where stages run, and what a choice comes to.

The formulas are those of `solver.assembly`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One way to run a segment: seconds a micro-batch, seconds once a step; bytes a device holds of it all the time,
    for each micro-batch on its way, and while it runs."""

    forward: float
    backward: float
    step: float = 0.0
    static: float = 0.0
    saved: float = 0.0
    working: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """`count` equal segments in a row; bytes that a device sends over a cut between two of them and behind the last."""

    name: str
    count: int
    entries: tuple[Entry, ...]
    inside: float = 0.0
    after: float = 0.0


@dataclass(frozen=True, slots=True)
class Tie:
    """Runs whose parameters are one: seconds a step, and bytes, where they are on different stages."""

    first: int
    second: int
    seconds: float
    nbytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Bond:
    """Segments `first` to `last` that one stage runs, as they share the buffer `name`, which is written."""

    first: int
    last: int
    name: str

    def parted(self, position: int) -> bool:
        """Whether a cut before the segment at a position parts them."""
        return self.first < position <= self.last


@dataclass(frozen=True, slots=True)
class Place:
    """A stage's devices: bytes each may hold, seconds there over seconds of an entry, micro-batches kept; seconds and
    seconds a byte of the links to the next stage."""

    budget: float = math.inf
    slow: float = 1.0
    flight: int = 1
    latency_s: float = 0.0
    s_per_byte: float = 0.0
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Instance:
    """An assembly problem: runs in order, a place a stage, micro-batches a step; stage j is on device j mod `devices`,
    of which there are as many as stages, one less, or for interleaving an equal part."""

    runs: tuple[Run, ...]
    places: tuple[Place, ...]
    micro_batches: int
    ties: tuple[Tie, ...] = ()
    devices: int = 0
    bonds: tuple[Bond, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", self.devices or len(self.places))
        stages = len(self.places)
        assert stages == self.devices + 1 or stages % self.devices == 0, f"{stages} stages on {self.devices}"

    def on(self, device: int) -> range:
        """The stages on a device."""
        return range(device, len(self.places), self.devices)

    @property
    def looped(self) -> bool:
        """Whether the last stage is with the first, all others apart."""
        return len(self.places) == self.devices + 1

    @property
    def chunks(self) -> int:
        """V: stages a device that run in turn."""
        return 1 if self.looped else len(self.places) // self.devices

    def bond(self, position: int) -> Bond | None:
        """What a cut before the segment at a position would part, None where nothing."""
        return next((bond for bond in self.bonds if bond.parted(position)), None)

    @property
    def segments(self) -> int:
        """The number of segments of all runs."""
        return sum(run.count for run in self.runs)


Taken = tuple[tuple[tuple[int, ...], ...], ...]
"""taken[j][r][e]: how many segments of run r stage j runs by entry e."""


@dataclass(frozen=True, slots=True)
class Priced:
    """What an assembly comes to: a step's seconds and their parts; by stage seconds a micro-batch and bytes, by device
    bytes."""

    seconds: float
    period: float
    finish: float
    sent: float
    stages: tuple[float, ...]
    nbytes: tuple[float, ...]
    crossing: tuple[float, ...]
    held: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Assembled:
    """The stages taken, their price, and a proven lower bound of any's seconds."""

    taken: Taken
    priced: Priced
    bound: float

    @property
    def gap(self) -> float:
        """How far, as a fraction, it may be from the optimum."""
        return max(0.0, 1.0 - self.bound / self.priced.seconds) if self.priced.seconds else 0.0


def waits(stages: int) -> tuple[float, ...]:
    """`wait_j` of the module docstring."""
    return tuple(2.0 * (k - 1) / k for k in range(stages, 0, -1))


def price(instance: Instance, taken: Taken) -> Priced:
    """The formulas of the module docstring for given stages; no solver involved."""
    seconds, nbytes, finish = [], [], []
    for place, stage in zip(instance.places, taken, strict=True):
        used = [(entry, n) for run, ns in zip(instance.runs, stage, strict=True)
                for entry, n in zip(run.entries, ns, strict=True) if n]
        seconds.append(place.slow * sum((e.forward + e.backward) * n for e, n in used))
        finish.append(sum(e.step * n for e, n in used))
        nbytes.append(sum((e.static + place.flight * e.saved) * n for e, n in used)
                      + max((e.working for e, _ in used), default=0.0))
    crossing = [_crossed(instance, taken, j) for j in range(len(taken) - 1)]
    period = max(sum(seconds[j] + instance.places[j].wait * [*crossing, 0.0][j] for j in instance.on(device))
                 for device in range(instance.devices))
    last = max(sum(finish[j] for j in instance.on(device)) for device in range(instance.devices))
    apart = sum(tie.seconds for tie in instance.ties if _apart(instance, taken, tie))
    sent = 2.0 * sum(crossing)
    chunks = instance.chunks
    total = (sum(seconds) + sent) / chunks + (instance.micro_batches - 1 / chunks) * period + last + apart
    held = tuple(sum(nbytes[j] for j in instance.on(device)) for device in range(instance.devices))
    return Priced(total, period, last + apart, sent, tuple(seconds), tuple(nbytes), tuple(crossing), held)


def _crossed(instance: Instance, taken: Taken, j: int) -> float:
    """Seconds one way over the cut behind stage j."""
    place = instance.places[j]
    for r in reversed(range(len(instance.runs))):
        done = sum(sum(stage[r]) for stage in taken[:j + 1])
        if done:
            run = instance.runs[r]
            return place.latency_s + place.s_per_byte * (run.after if done == run.count else run.inside)
    raise AssertionError(f"nothing is before cut {j}")


def _apart(instance: Instance, taken: Taken, tie: Tie) -> bool:
    if instance.looped:
        return sum(taken[0][tie.first]) < instance.runs[tie.first].count or any(sum(stage[tie.second])
                                                                               for stage in taken[:-1])
    last = max(j for j, stage in enumerate(taken) if sum(stage[tie.first]))
    return last < min(j for j, stage in enumerate(taken) if sum(stage[tie.second]))
