"""Which physical device stands in which cell of a pipeline's grid: places along axis 0, a stage's mesh along others.

    seconds = each · Σ_cuts c + slowest · max_cuts c + Σ_collectives times · max_groups seconds of it + each · around

c are the seconds of the messages over one cut, all at once, as `core.collectives.stage_link` counts them, as are those
around, from the first place to the last, such as gradients of a weight that both have; and the seconds of a collective
those of its ring when all groups run it at once. All share the uplinks of hosts. Devices of one host whose links are
alike are interchangeable, so classes of devices are assigned and not devices.

`place` improves some layouts by exchanging devices and then searches all others (`solver.layouts`), which cuts off what
is no better for certain. A search that ends has proven its layout; one that is stopped tells the bound that it has.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.collectives import ROUNDS, Network, ring_rates, stage_link
from autopar.core.errors import AutoparError
from autopar.core.measured import parted
from autopar.core.mesh import Mesh
from autopar.core.reshard import Primitive
from autopar.solver.columns import ROUNDING
from autopar.solver.grid import NOTHING, Links, Ring, Send, Task, links_of
from autopar.solver.layouts import Search

Devices = tuple[int, ...]
Clock = Callable[[], float]
Array = NDArray[np.float64]
STARTS = 4
"""Layouts that are improved before others are searched."""
IMPROVING = 0.2
"""The part of the time that pricing them may take, and improving them."""


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over `axes` of the grid, `times` a step; bytes of the larger of its local tensors."""

    primitive: Primitive
    axes: tuple[int, ...]
    nbytes: float
    times: float


@dataclass(frozen=True, slots=True)
class Instance:
    """A grid of `shape`, what it sends, and the network it is placed on; `around` goes from the first place to the
    last."""

    network: Network
    shape: tuple[int, ...]
    send: Send
    collectives: tuple[Collective, ...]
    around: Send = NOTHING

    @property
    def size(self) -> int:
        """The number of cells."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Placed:
    """A layout, cell by cell in row-major order, its seconds and a proven lower bound of any's."""

    devices: Devices
    seconds: float
    bound: float

    @property
    def gap(self) -> float:
        """How far, as a fraction, it may be from the optimum."""
        return max(0.0, 1.0 - self.bound / self.seconds) if self.seconds else 0.0


def price(instance: Instance, devices: Devices) -> float:
    """Seconds of a layout; no solver involved."""
    width = instance.size // instance.shape[0]
    places = [devices[j:j + width] for j in range(0, len(devices), width)]
    cuts = [_cut(instance.network, a, b, instance.send.nbytes) for a, b in itertools.pairwise(places)]
    sent = instance.send.each * sum(cuts) + instance.send.slowest * max(cuts, default=0.0)
    mesh = Mesh(instance.shape, devices)
    sent += instance.around.each * _cut(instance.network, devices[:width], devices[-width:], instance.around.nbytes)
    return sent + sum(_collective(instance, each, mesh.groups(each.axes)) for each in instance.collectives)


def _cut(network: Network, left: Devices, right: Devices, nbytes: float) -> float:
    """Seconds over one cut."""
    alpha, beta = stage_link(network, tuple(zip(left, right, strict=True)))
    return alpha + beta * nbytes


def _collective(instance: Instance, each: Collective, groups: Sequence[Devices]) -> float:
    rates = dict(ring_rates(instance.network, parted(groups)))
    return each.times * rates[each.primitive].seconds(each.nbytes)


# Search


def classes_of(links: Links) -> tuple[tuple[int, ...], ...]:
    """Devices that may be exchanged: on one host, with equal links to each other and to every other, and as they stand
    in rings, which visit a host's devices by their numbers: none of the host is between them whose links are others."""
    figures = np.array((links.latency, links.inverse))
    hosts = defaultdict[int, list[int]](list)
    for device, host in enumerate(links.host):
        hosts[host].append(device)
    found: list[list[int]] = []
    for mine in hosts.values():
        even, here = _even(figures, mine), list[list[int]]()
        for device in mine:
            home = next((each for each in here if _alike(figures, each[0], device)
                         and (even or not any(each[-1] < d < device for d in mine))), None)
            here.append([device]) if home is None else home.append(device)
        found += here
    return tuple(map(tuple, sorted(found)))


def _alike(figures: Array, a: int, b: int) -> bool:
    """Whether two devices have equal links to each other and to every other."""
    others = np.delete(np.arange(figures.shape[1]), [a, b])
    return bool((figures[:, a, b] == figures[:, b, a]).all()
                and (figures[:, a, others] == figures[:, b, others]).all()
                and (figures[:, others, a] == figures[:, others, b]).all())


def _even(figures: Array, mine: list[int]) -> bool:
    """Whether all links inside of a host are equal."""
    inside = figures[:, mine][:, :, mine][:, ~np.eye(len(mine), dtype=bool)]
    return bool((inside == inside[:, :1]).all())


def starts(instance: Instance, classes: Sequence[Sequence[int]]) -> Iterator[Devices]:
    """Layouts to begin with: devices as they are numbered, hosts along the places in every order, hosts across them."""
    size, places = instance.size, instance.shape[0]
    width = size // places
    yield tuple(range(size))
    for order in itertools.islice(itertools.permutations(classes), 720):
        line = [d for each in order for d in each]
        yield tuple(line)
        yield tuple(line[c * places + j] for j in range(places) for c in range(width))


def place(instance: Instance, limit_s: float = 10.0, clock: Clock = time.perf_counter) -> Placed:
    """The best layout, proven where the search ends within `limit_s` as `clock` counts them."""
    end = clock() + limit_s
    if len(instance.network.hosts) != instance.size:
        raise AutoparError(f"the grid has {instance.size} cells, the network {len(instance.network.hosts)} devices; "
                           "use a grid of as many")
    links = links_of(instance.network)
    classes = classes_of(links)
    search = Search(_task(instance, links, classes), lambda devices: price(instance, devices), end, clock)
    soon = Until(clock, clock() + IMPROVING * limit_s)
    for devices in _good_starts(instance, classes, soon):
        each = Until(clock, clock() + IMPROVING * limit_s / STARTS)
        search.known(_improved(instance, classes, devices, each))
    search.run()
    return Placed(search.devices, search.best, min([search.best, *search.open]))


@dataclass(frozen=True, slots=True)
class Until:
    """A time on a clock."""

    clock: Clock
    end: float

    @property
    def over(self) -> bool:
        """Whether it is past."""
        return self.clock() > self.end


def _good_starts(instance: Instance, classes: Sequence[Devices], until: Until) -> list[Devices]:
    """The best layouts of those that there is time to price."""
    found = list[tuple[float, Devices]]()
    for devices in starts(instance, classes):
        found.append((price(instance, devices), devices))
        if until.over:
            break
    return [devices for _, devices in sorted(dict.fromkeys(found))[:STARTS]]


def _improved(instance: Instance, classes: Sequence[Devices], devices: Devices, until: Until) -> Devices:
    """`devices` with pairs of them exchanged as long as that is better."""
    home = {d: k for k, each in enumerate(classes) for d in each}
    best, better = price(instance, devices), True
    while better:
        better = False
        for i, j in itertools.combinations(range(len(devices)), 2):
            if until.over:
                return devices
            if home[devices[i]] != home[devices[j]]:
                other = list(devices)
                other[i], other[j] = devices[j], devices[i]
                seconds = price(instance, tuple(other))
                if seconds < best * (1.0 - ROUNDING):
                    best, devices, better = seconds, tuple(other), True
    return devices


def _task(instance: Instance, links: Links, classes: tuple[Devices, ...]) -> Task:
    places, *inner = instance.shape
    inside = [each for each in instance.collectives if 0 not in each.axes]
    across = [(each, Mesh(instance.shape).groups(each.axes)) for each in instance.collectives if 0 in each.axes]
    floor = sum(_collective(instance, each, groups) for each, groups in across if len(groups) == 1)
    return Task(links, classes, places, tuple(inner) or (1,), instance.send,
                instance.around, tuple(_ring(each, tuple(inner)) for each in inside), floor)


def _ring(each: Collective, inner: tuple[int, ...]) -> Ring:
    mesh = Mesh((1, *inner))
    group = {cell: members for members in mesh.groups(each.axes) for cell in members}
    size = mesh.extent(each.axes)
    rounds = ROUNDS[each.primitive] * (size - 1)
    return Ring(each.times * rounds, each.times * rounds / size * each.nbytes, size,
                tuple(tuple(c for c in group[cell] if c < cell) for cell in range(mesh.size)),
                tuple(local * (size - local) / (size - 1) if each.primitive == "all_to_all" else 1.0
                      for local in range(size)))
