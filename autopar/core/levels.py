"""How many of equal segments run at which level of recomputation: the numbers, and what a choice comes to.

Segments that are equal and follow each other are a `Stretch`; `counts[g][e]` of stretch g run as entry e of its menu.
Within a stretch those that keep less come first: there is the least to be held when they run backward, and between
its ends bytes along a stretch are never more than at the ends of the runs of one entry.

    bytes in moment k of a segment = first_k + place in its stretch · step_k + Σ_{those before} saved + extra_k
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A way to run a segment: bytes `saved` for its backward, `extras` it works with by moment, and the `seconds` of
    making again."""

    saved: float
    extras: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """`count` equal segments in a row. `menu` is sorted by bytes saved, the fewest first; by moment, `first` is what
    is there at the first of them whatever segments keep, and `step` how much more at each next one.
    """

    name: str
    count: int
    menu: tuple[Entry, ...]
    first: tuple[float, ...]
    step: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A step's stretches in order, the least bytes that it comes to whatever they do, and the budget."""

    stretches: tuple[Stretch, ...]
    least: float
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
    saved = 0.0
    yield step.least
    for stretch, row in zip(step.stretches, counts, strict=True):
        entries = [entry for entry, n in zip(stretch.menu, row, strict=True) for _ in range(n)]
        for place, entry in enumerate(entries):
            yield from (first + place * more + saved + extra
                        for first, more, extra in zip(stretch.first, stretch.step, entry.extras, strict=True))
            saved += entry.saved
