"""What is placed on a network, as `solver.layouts` sees it: links as tables, what is sent, rings inside of places."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from autopar.core.collectives import Network

Cells = tuple[int, ...]
Load = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Links:
    """The links among devices: seconds, seconds a byte, hosts numbered from 0 and seconds a byte of their uplinks."""

    latency: list[list[float]]
    inverse: list[list[float]]
    host: list[int]
    uplink: list[float]

    def cost(self, fixed: float, nbytes: float) -> list[list[float]]:
        """Seconds of `fixed` latencies and `nbytes` over each link."""
        return [[fixed * a + nbytes * b for a, b in zip(*rows, strict=True)]
                for rows in zip(self.latency, self.inverse, strict=True)]


def links_of(network: Network) -> Links:
    """The figures of a network as tables."""
    n, names = range(len(network.hosts)), sorted(set(network.hosts))
    return Links([[network.latency(a, b) if a != b else 0.0 for b in n] for a in n],
                 [[1.0 / network.bandwidth(a, b) if a != b else 0.0 for b in n] for a in n],
                 [names.index(h) for h in network.hosts], [1.0 / network.uplink_bytes_per_s[h] for h in names])


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes a device hands on from place to place: how often in all over each cut, and over the slowest alone."""

    nbytes: float
    each: float
    slowest: float = 0.0


NOTHING = Send(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Ring:
    """A collective inside of places: `fixed` times the worst latency and `nbytes` the worst seconds a byte; by cell of
    a place its group's cells before it; what a whole group puts on a host's uplink, by how many of it are there."""

    fixed: float
    nbytes: float
    size: int
    before: tuple[Cells, ...]
    load: Load


@dataclass(frozen=True, slots=True)
class Task:
    """`places` whose grids are `inner`, on devices of `classes`; `around` goes from the first place to the last;
    `floor` are seconds that any layout takes besides."""

    links: Links
    classes: tuple[Cells, ...]
    places: int
    inner: tuple[int, ...]
    send: Send
    around: Send
    rings: tuple[Ring, ...]
    floor: float

    @property
    def width(self) -> int:
        """Cells of a place."""
        return math.prod(self.inner)

    @property
    def size(self) -> int:
        """Cells of all places."""
        return self.places * self.width


@dataclass(frozen=True, slots=True)
class Cut:
    """Messages over a cut so far: the worst latency and seconds a byte, how many leave and come to each host."""

    latency: float
    inverse: float
    out: Load
    into: Load


@dataclass(frozen=True, slots=True)
class Rung:
    """The groups of a ring so far: the worst latency and seconds a byte, the load of each host's uplink."""

    latency: float
    inverse: float
    load: Load


@dataclass(frozen=True, slots=True)
class State:
    """A layout that is begun: its devices, those left of each class; seconds over the `cuts` that are whole, all
    together and the dearest; the cut that is begun and the rings."""

    cells: Cells
    left: tuple[int, ...]
    sum: float
    most: float
    cuts: int
    cut: Cut
    rungs: tuple[Rung, ...]


def more(load: Load, host: int, units: float) -> Load:
    """`load` with so many units more on a host."""
    return (*load[:host], load[host] + units, *load[host + 1:])


def lines(inner: tuple[int, ...]) -> tuple[Cells, ...]:
    """By cell of the first place those of no later class, as rows and columns may be renamed: the first cell, and on an
    axis through that the one before."""
    cells = list(itertools.product(*map(range, inner)))
    found: list[Cells] = []
    for cell in cells:
        used = [axis for axis, c in enumerate(cell) if c]
        before = [tuple(c - (axis == used[0]) for axis, c in enumerate(cell))] if len(used) == 1 else []
        found.append(tuple(dict.fromkeys(cells.index(c) for c in (*before, *(cells[:1] if used else [])))))
    return tuple(found)


MOST_TURNS = 720
"""Orders of a place's cells that are looked at to tell equal ones."""


def turns(inner: tuple[int, ...], around: Send) -> tuple[Cells, ...]:
    """The orders of a place's cells by which rows and columns are renamed, just the one that there is where they are
    too many; none where each place may be renamed by itself, as on one axis and with nothing that goes around."""
    if sum(size > 1 for size in inner) < 2 and not around.each:
        return ()
    cells = list(itertools.product(*map(range, inner)))
    if math.prod(math.factorial(size) for size in inner) > MOST_TURNS:
        return (tuple(range(len(cells))),)
    orders = itertools.product(*(itertools.permutations(range(size)) for size in inner))
    return tuple(tuple(cells.index(tuple(o[c] for o, c in zip(order, cell, strict=True))) for cell in cells)
                 for order in orders)
