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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from autopar.core.collectives import ROUNDS, Network, ring_rates, stage_link
from autopar.core.errors import AutoparError
from autopar.core.measured import parted
from autopar.core.mesh import Mesh
from autopar.core.reshard import Primitive
from autopar.solver.columns import ROUNDING
from autopar.solver.grid import NOTHING, Ring, Send, Task, links_of
from autopar.solver.layouts import Search

Devices = tuple[int, ...]
Clock = Callable[[], float]
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


def classes_of(network: Network, devices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Devices that may be exchanged: on one host, with equal links to each other and to every other, and as they stand
    in rings, which visit a host's devices by their numbers: none of the host is between them whose links are others."""
    found: list[list[int]] = []
    for device in devices:
        home = next((each for each in found if _alike(network, each[0], device, devices)
                     and (_even(network, device, devices) or not _between(network, each, device, devices))), None)
        found.append([device]) if home is None else home.append(device)
    return tuple(map(tuple, found))


def _alike(network: Network, a: int, b: int, devices: Sequence[int]) -> bool:
    def links(one: int, other: int) -> tuple[float, ...]:
        return tuple(figure for d in devices if d not in (a, b) for figure in (
            network.latency(one, d), network.bandwidth(one, d), network.latency(d, one), network.bandwidth(d, one)))
    return (network.hosts[a] == network.hosts[b] and links(a, b) == links(b, a)
            and network.bandwidth(a, b) == network.bandwidth(b, a) and network.latency(a, b) == network.latency(b, a))


def _between(network: Network, alike: Sequence[int], device: int, devices: Sequence[int]) -> bool:
    return any(alike[-1] < d < device and network.hosts[d] == network.hosts[device] for d in devices)


def _even(network: Network, device: int, devices: Sequence[int]) -> bool:
    """Whether all links inside of a device's host are equal."""
    mine = [d for d in devices if network.hosts[d] == network.hosts[device]]
    return len({(network.latency(a, b), network.bandwidth(a, b)) for a, b in itertools.permutations(mine, 2)}) <= 1


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
    classes = classes_of(instance.network, range(instance.size))
    search = Search(_task(instance, classes), lambda devices: price(instance, devices), end, clock)
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


def _task(instance: Instance, classes: tuple[Devices, ...]) -> Task:
    places, *inner = instance.shape
    inside = [each for each in instance.collectives if 0 not in each.axes]
    across = [(each, Mesh(instance.shape).groups(each.axes)) for each in instance.collectives if 0 in each.axes]
    floor = sum(_collective(instance, each, groups) for each, groups in across if len(groups) == 1)
    return Task(links_of(instance.network), classes, places, tuple(inner) or (1,), instance.send,
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
