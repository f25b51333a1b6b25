"""Which physical device stands in which cell of a pipeline's grid: places along axis 0, a stage's mesh along others.

    seconds = Σ_sends (each · Σ_cuts c + slowest · max_cuts c) + Σ_collectives times · max_groups seconds of it

c are the seconds of the messages over one cut, all at once, as `core.collectives.stage_link` counts them, and the
seconds of a collective those of its ring when all groups run it at once; both share the uplinks of hosts. Devices of
one host whose links are alike are interchangeable, so classes of devices are assigned and not devices.

`place` branches over cells, place by place, in the order of what each class costs next, and cuts a branch off where
what is certain already, with the least that any cut still to come can cost, is no less than the best known (a class
that is still to be used is come to from another, of as many at once as there are columns); and where as many devices of
each class were used before, the last place was the same, and nothing of what costs depend on was more: the cuts' sum
and maximum, the rings' links, the groups that cross each host's uplink. Cells of a first place are in ascending order
where the mesh has one axis: columns may be renamed. A search that ends has proven its layout; one that is stopped tells
the bound that it has.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from autopar.core.collectives import Network, ring_rates, stage_link
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.core.reshard import Primitive

Devices = tuple[int, ...]
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes a device hands on from place to place: how often in all over each cut, and over the slowest alone."""

    nbytes: float
    each: float
    slowest: float


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over `axes` of the grid, `times` a step; bytes of the larger of its local tensors."""

    primitive: Primitive
    axes: tuple[int, ...]
    nbytes: float
    times: float


@dataclass(frozen=True, slots=True)
class Instance:
    """A grid of `shape`, what it sends, and the network it is placed on."""

    network: Network
    shape: tuple[int, ...]
    sends: tuple[Send, ...]
    collectives: tuple[Collective, ...]

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
    cuts = [_cut(instance, devices[j * width:(j + 1) * width], devices[(j + 1) * width:(j + 2) * width])
            for j in range(instance.shape[0] - 1)]
    sent: float = sum(send.each * sum(each) + send.slowest * max(each, default=0.0)
               for send, each in zip(instance.sends, zip(*cuts, strict=True) if cuts else [()] * len(instance.sends),
                                     strict=True))
    mesh = Mesh(instance.shape, devices)
    return float(sent) + sum(_collective(instance, each, mesh.groups(each.axes)) for each in instance.collectives)


def _cut(instance: Instance, left: Devices, right: Devices) -> tuple[float, ...]:
    """Seconds over one cut of every send."""
    alpha, beta = stage_link(instance.network, tuple(zip(left, right, strict=True)))
    return tuple(alpha + beta * send.nbytes for send in instance.sends)


def _collective(instance: Instance, each: Collective, groups: Sequence[Devices]) -> float:
    rates = dict(ring_rates(instance.network, tuple(groups)))
    return each.times * rates[each.primitive].seconds(each.nbytes)


def check_layout(instance: Instance, columns: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> Devices:
    """The layout of a hand-written one: `columns` are the ranks of each pipeline (`ppranks`), `groups` those that hold
    the same stage (`dpranks`). Raises AutoparError unless every rank is in one of each, and no two share both."""
    size, places = instance.size, instance.shape[0]
    for name, lists in (("ppranks", columns), ("dpranks", groups)):
        ranks = [rank for each in lists for rank in each]
        lacking, twice = sorted(set(range(size)) - set(ranks)), sorted(r for r, n in Counter(ranks).items() if n > 1)
        if lacking or twice or len(ranks) != size:
            raise AutoparError(f"{name} miss ranks {lacking or 'none'} and repeat {twice or 'none'}, of 0 to "
                               f"{size - 1}; name each once")
        if len({len(each) for each in lists}) != 1:
            raise AutoparError(f"{name} have lists of {sorted({len(each) for each in lists})} ranks; make them equally "
                               "long")
    if len(columns[0]) != places:
        raise AutoparError(f"ppranks have {len(columns[0])} ranks each, the plan has {places} stages; use as many")
    by_place = {frozenset(column[j] for column in columns): j for j in range(places)}
    wrong = [list(group) for group in groups if frozenset(group) not in by_place]
    if wrong:
        raise AutoparError(f"dpranks {wrong[0]} are no ranks of one stage of ppranks; groups of the two must be "
                           "orthogonal: rank i of every pipeline together")
    return tuple(column[j] for j in range(places) for column in columns)


# Search


def classes_of(network: Network, devices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Devices that may be exchanged: on one host, with equal links to each other and to every other."""
    found: list[list[int]] = []
    for device in devices:
        home = next((each for each in found if _alike(network, each[0], device, devices)), None)
        found.append([device]) if home is None else home.append(device)
    return tuple(map(tuple, found))


def _alike(network: Network, a: int, b: int, devices: Sequence[int]) -> bool:
    def links(one: int, other: int) -> tuple[float, ...]:
        return tuple(figure for d in devices if d not in (a, b) for figure in (
            network.latency(one, d), network.bandwidth(one, d), network.latency(d, one), network.bandwidth(d, one)))
    return (network.hosts[a] == network.hosts[b] and links(a, b) == links(b, a)
            and network.bandwidth(a, b) == network.bandwidth(b, a) and network.latency(a, b) == network.latency(b, a))


@dataclass(eq=False)
class _Search:
    instance: Instance
    classes: tuple[tuple[int, ...], ...]
    end: float
    best: float = math.inf
    devices: Devices = ()
    open: list[float] = field(default_factory=list)
    seen: dict[tuple[object, ...], list[tuple[float, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.width = self.instance.size // self.instance.shape[0]
        every = [d for each in self.classes for d in each]
        links = [(self.instance.network.latency(a, b), self.instance.network.bandwidth(a, b))
                 for a, b in itertools.permutations(every, 2)]
        self.least = tuple(min((alpha + send.nbytes / rate for alpha, rate in links), default=0.0)
                           for send in self.instance.sends)
        network = self.instance.network
        self.entries = [tuple(min((network.latency(a, b) + send.nbytes / network.bandwidth(a, b)
                                   for b in each for a in every if a not in each), default=0.0)
                              for send in self.instance.sends) for each in self.classes]
        self.home = {d: k for k, each in enumerate(self.classes) for d in each}
        self.hosts = sorted(set(self.instance.network.hosts))
        self.floor = [self._least_of(each) for each in self.instance.collectives]

    def _least_of(self, each: Collective) -> float:
        """The least seconds that any group of a collective's size could take on links as good as the best."""
        mesh = Mesh(self.instance.shape)
        size, network = mesh.extent(each.axes), self.instance.network
        every = [d for one in self.classes for d in one]
        most = Counter(network.hosts[d] for d in every).most_common(1)[0][1]
        pairs = [(a, b) for a, b in itertools.permutations(every, 2)
                 if size <= most or network.hosts[a] != network.hosts[b]] if size > 1 else []
        if len(mesh.groups(each.axes)) == 1:
            return _collective(self.instance, each, mesh.groups(each.axes))
        if not pairs:
            return 0.0
        rounds = (2 if each.primitive == "all_reduce" else 1) * (size - 1)
        latency = min(network.latency(a, b) for a, b in pairs)
        return each.times * rounds * (latency + each.nbytes / size * min(1 / network.bandwidth(a, b) for a, b in pairs))

    def known(self, devices: Devices) -> None:
        """Take a layout if it is the best so far."""
        seconds = price(self.instance, devices)
        if seconds < self.best:
            self.best, self.devices = seconds, devices

    def certain(self, cells: tuple[int, ...]) -> float:
        """Seconds that a layout which begins with `cells` takes at least."""
        done, places = len(cells) // self.width, self.instance.shape[0]
        cuts = [_cut(self.instance, cells[j * self.width:(j + 1) * self.width],
                     cells[(j + 1) * self.width:(j + 2) * self.width]) for j in range(done - 1)]
        half = cells[done * self.width:]
        if half and done:
            cuts.append(_cut(self.instance, cells[(done - 1) * self.width:(done - 1) * self.width + len(half)], half))
        total = 0.0
        for i, send in enumerate(self.instance.sends):
            crossed = [cut[i] for cut in cuts] + self._ahead(i, cells, places - 1 - len(cuts))
            total += send.each * sum(crossed) + send.slowest * max(crossed, default=0.0)
        for floor, each in zip(self.floor, self.instance.collectives, strict=True):
            whole = [g for g in self._groups(each, done) if g] if 0 not in each.axes else []
            cells_of = tuple(tuple(cells[c] for c in group) for group in whole)
            total += max(floor, _collective(self.instance, each, cells_of) if cells_of else 0.0)
        return total

    def _ahead(self, i: int, cells: tuple[int, ...], cuts: int) -> list[float]:
        """The least that each of the cuts still to come takes for send i."""
        if not cuts or len(cells) < self.width:
            return [self.least[i]] * cuts
        used = {self.home[d] for d in cells}
        come_to = sorted((entry[i] for k, entry in enumerate(self.entries) if k not in used), reverse=True)
        certain = come_to[len(cells) % self.width and self.width::self.width][:cuts] if len(cells) % self.width else \
            come_to[::self.width][:cuts]
        return [max(self.least[i], each) for each in certain] + [self.least[i]] * (cuts - len(certain))

    def _groups(self, each: Collective, done: int) -> list[tuple[int, ...]]:
        """The cells of a collective's groups in the first places."""
        if not done:
            return []
        return list(Mesh((done, *self.instance.shape[1:])).groups(each.axes))

    def run(self, cells: tuple[int, ...], used: tuple[int, ...]) -> None:
        """Try all layouts that begin with `cells`, of which `used` are of each class."""
        if len(cells) == self.instance.size:
            self.known(cells)
            return
        if time.perf_counter() > self.end:
            self.open.append(self.certain(cells))
            return
        if cells and len(cells) % self.width == 0 and self._dominated(cells, used):
            return
        options = [(self.certain((*cells, each[used[k]])), k) for k, each in enumerate(self.classes)
                   if used[k] < len(each) and self._in_order(cells, k)]
        for bound, k in sorted(options):
            if bound < self.best * (1.0 - ROUNDING):
                self.run((*cells, self.classes[k][used[k]]), tuple(n + (i == k) for i, n in enumerate(used)))

    def _dominated(self, cells: tuple[int, ...], used: tuple[int, ...]) -> bool:
        """Whether another way to the same state costs no more, whatever follows; keeps this one else."""
        last = tuple(self.home[d] for d in cells[-self.width:])
        costs = self._costs(cells)
        known = self.seen.setdefault((used, last), [])
        if any(all(a <= b for a, b in zip(other, costs, strict=True)) for other in known):
            return True
        known.append(costs)
        return False

    def _costs(self, cells: tuple[int, ...]) -> tuple[float, ...]:
        """All that the seconds of a layout that begins with whole places depend on, each the less the better."""
        done, network = len(cells) // self.width, self.instance.network
        cuts = [_cut(self.instance, cells[j * self.width:(j + 1) * self.width],
                     cells[(j + 1) * self.width:(j + 2) * self.width]) for j in range(done - 1)]
        found = [figure for i in range(len(self.instance.sends))
                 for figure in (sum(cut[i] for cut in cuts), max((cut[i] for cut in cuts), default=0.0))]
        for each in (one for one in self.instance.collectives if 0 not in one.axes):
            groups = [tuple(cells[c] for c in group) for group in self._groups(each, done)]
            rates = dict(ring_rates(network, tuple(groups)))[each.primitive]
            crossing = Counter(host for group in groups for host in {network.hosts[d] for d in group}
                               if len({network.hosts[d] for d in group}) > 1)
            found += [rates.fixed_s, rates.s_per_byte, *(float(crossing[host]) for host in self.hosts)]
        return tuple(found)

    def _in_order(self, cells: tuple[int, ...], k: int) -> bool:
        if not 0 < len(cells) < self.width or len(self.instance.shape) > 2:
            return True
        return k >= next(i for i, each in enumerate(self.classes) if cells[-1] in each)


def starts(instance: Instance, classes: Sequence[Sequence[int]]) -> Iterator[Devices]:
    """Layouts to begin with: devices as they are numbered, hosts along the places in every order, hosts across them."""
    size, places = instance.size, instance.shape[0]
    width = size // places
    yield tuple(range(size))
    for order in itertools.islice(itertools.permutations(classes), 720):
        line = [d for each in order for d in each]
        yield tuple(line)
        yield tuple(line[c * places + j] for j in range(places) for c in range(width))


def place(instance: Instance, limit_s: float = 10.0) -> Placed:
    """The best layout, proven where the search ends within `limit_s`."""
    if len(instance.network.hosts) != instance.size:
        raise AutoparError(f"the grid has {instance.size} cells, the network {len(instance.network.hosts)} devices; "
                           "use a grid of as many")
    classes = classes_of(instance.network, range(instance.size))
    search = _Search(instance, classes, time.perf_counter() + limit_s)
    for devices in starts(instance, classes):
        search.known(devices)
    search.run((), (0,) * len(classes))
    return Placed(search.devices, search.best, min([search.best, *search.open]))
