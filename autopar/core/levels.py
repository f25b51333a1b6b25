"""How many of equal segments run at which level of recomputation: the numbers, and what a choice comes to.

Segments that are equal and follow each other are a `Stretch`; `counts[g][e]` of stretch g run as entry e of its menu.
Within a stretch those that keep less come first: there is the least to be held when they run backward, and between
its ends bytes along a stretch are never more than at the ends of the runs of one entry.

    bytes in the backward of a segment = base + Σ_{it and those before} (saved + copies)
                                         + Σ_{it and those after} gradient + working + transient
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A way to run a segment: bytes `saved` for its backward and `transient` in it, `seconds` of making again."""

    saved: float
    transient: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """`count` equal segments in a row. `menu` is sorted by bytes saved, the fewest first; of each segment `copies`
    bytes are held from its forward to its backward whatever the entry, `gradient` from its backward on, `working`
    meanwhile.
    """

    name: str
    count: int
    menu: tuple[Entry, ...]
    copies: float = 0.0
    gradient: float = 0.0
    working: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """A step's stretches in order, bytes held all the time, and the budget."""

    stretches: tuple[Stretch, ...]
    base: float
    budget: float


Counts = tuple[tuple[int, ...], ...]


def seconds_of(step: Step, counts: Counts) -> float:
    """What is made again takes so long."""
    return sum(n * entry.seconds for stretch, row in zip(step.stretches, counts, strict=True)
               for n, entry in zip(row, stretch.menu, strict=True))


def bytes_of(step: Step, counts: Counts) -> float:
    """The bytes at the fullest moment, segment by segment."""
    return max(_moments(step, counts))


def _moments(step: Step, counts: Counts) -> Iterator[float]:
    segments = [(stretch, entry) for stretch, row in zip(step.stretches, counts, strict=True)
                for entry, n in zip(stretch.menu, row, strict=True) for _ in range(n)]
    gradients, saved = sum(stretch.gradient for stretch, _ in segments), 0.0
    yield step.base + gradients
    for stretch, entry in segments:
        saved += entry.saved + stretch.copies
        yield step.base + gradients + saved + stretch.working + entry.transient
        gradients -= stretch.gradient
