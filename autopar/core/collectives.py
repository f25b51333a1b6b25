"""What collectives cost over a set of axes: the ring model of latency α and bandwidth B.

A collective of n devices takes `ROUNDS` rounds of n - 1 messages, each a n-th of `nbytes`, the bytes of the larger
of its two local tensors (the tensor of an all-reduce or all-to-all, a gather's output, a scatter's input):

    seconds = rounds · (n - 1) · (α + nbytes / (n · B))

α is the highest latency of the ring's links, B the lowest bandwidth. A group that spans hosts visits one host after
another, so it crosses each host's uplink once; the groups that cross one at the same time share it equally. In an
all-to-all each of a group's k devices on a host sends to the n - k elsewhere: k · (n - k) / (n - 1) times the load.

Groups that were measured take what they took. Of others the ring model's latency and seconds a byte are multiplied by
the median of what the measured groups of that collective took over what the model says of them: of those that span
hosts where these do, and of all where there are none.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from autopar.core.curves import Curve
from autopar.core.measured import Groups, Measured, parted
from autopar.core.mesh import Mesh
from autopar.core.reshard import MOVES_DATA, Primitive

ROUNDS: dict[Primitive, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
assert ROUNDS.keys() == MOVES_DATA


class Network(Protocol):
    """What is asked of a cluster: the host of each device, each host's uplink, the links between devices, what was
    measured."""

    @property
    def hosts(self) -> tuple[int, ...]: ...
    @property
    def uplink_bytes_per_s(self) -> tuple[float, ...]: ...
    @property
    def collectives(self) -> tuple[Measured, ...]: ...
    def latency(self, source: int, target: int) -> float: ...
    def bandwidth(self, source: int, target: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Rate:
    """Seconds of a collective: `fixed_s` + `s_per_byte` · bytes."""

    fixed_s: float
    s_per_byte: float

    def seconds(self, nbytes: float) -> float:
        """Seconds of a collective whose larger local tensor has `nbytes`."""
        return self.fixed_s + self.s_per_byte * nbytes


@dataclass(frozen=True, slots=True)
class Pricer:
    """Seconds of any collective over any axes of one mesh, each figure that of the worst group; see `reshard.Price`.

    Equal and hashed by `key`, which names cluster and mesh, so that it can be an argument of cached functions.
    """

    key: str
    rates: dict[tuple[Primitive, tuple[int, ...]], Rate | Curve] = field(compare=False, repr=False)

    def __call__(self, primitive: Primitive, axes: tuple[int, ...], nbytes: float) -> float:
        """Seconds; `axes` ascending, `nbytes` of the larger of the two local tensors."""
        return self.rates[primitive, axes].seconds(nbytes)


def inner_pricer(pricer: Pricer) -> Pricer:
    """The same seconds for a mesh without axis 0, along which as many meshes lie that all do the same at once."""
    inner = {(primitive, tuple(axis - 1 for axis in axes)): rate for (primitive, axes), rate in pricer.rates.items()
             if 0 not in axes}
    return Pricer(f"{pricer.key} inner", inner)


def stage_link(network: Network, pairs: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Seconds, and seconds a byte, of the slowest of messages that go from each first to each second device at once."""
    if not pairs:
        return 0.0, 0.0
    leaving = Counter(network.hosts[a] for a, b in pairs if network.hosts[a] != network.hosts[b])
    shared = (leaving[network.hosts[a]] / network.uplink_bytes_per_s[network.hosts[a]] for a, b in pairs
              if network.hosts[a] != network.hosts[b])
    return (max(network.latency(a, b) for a, b in pairs),
            max(itertools.chain((1.0 / network.bandwidth(a, b) for a, b in pairs), shared)))


def rates(network: Network, mesh: Mesh) -> dict[tuple[Primitive, tuple[int, ...]], Rate | Curve]:
    """The rate of every primitive over every set of axes, ascending."""
    measured = {(found.primitive, found.groups): found.curve for found in network.collectives}
    correct = corrections(network)
    found: dict[tuple[Primitive, tuple[int, ...]], Rate | Curve] = {}
    for axes in (axes for size in range(len(mesh.shape) + 1) for axes in itertools.combinations(mesh.axes, size)):
        groups = parted(mesh.groups(axes))
        crossing = _crosses(network, groups)
        for primitive, rate in ring_rates(network, groups):
            factor = correct.get((primitive, crossing), Correction(1.0, 1.0))
            found[primitive, axes] = measured.get((primitive, groups)) or factor.of(rate)
    return found


@dataclass(frozen=True, slots=True)
class Correction:
    """What a rate of the ring model is multiplied by."""

    latency: float
    s_per_byte: float

    def of(self, rate: Rate) -> Rate:
        """The rate, corrected."""
        return Rate(rate.fixed_s * self.latency, rate.s_per_byte * self.s_per_byte)


def corrections(network: Network) -> dict[tuple[Primitive, bool], Correction]:
    """By primitive that was measured, and by whether its groups span hosts: the medians of measured over modelled."""
    kinds: dict[tuple[Primitive, bool], list[Correction]] = {}
    for found in network.collectives:
        ring, curve = dict(ring_rates(network, found.groups))[found.primitive], found.curve
        ratio = Correction(curve.fixed_s / ring.fixed_s, curve.s_per_byte / ring.s_per_byte)
        kinds.setdefault((found.primitive, _crosses(network, found.groups)), []).append(ratio)
    every = {(primitive, crossing): kinds.get((primitive, crossing)) or kinds[primitive, not crossing]
             for primitive, _ in kinds for crossing in (False, True)}
    return {kind: Correction(statistics.median(ratio.latency for ratio in ratios),
                             statistics.median(ratio.s_per_byte for ratio in ratios)) for kind, ratios in every.items()}


def _crosses(network: Network, groups: Groups) -> bool:
    return any(len({network.hosts[device] for device in group}) > 1 for group in groups)


def ring_rates(network: Network, groups: Groups) -> Iterator[tuple[Primitive, Rate]]:
    """The ring model's rate of each primitive when all `groups`, of equal size, run it at once."""
    size = len(groups[0])
    links = {link for group in groups for link in _ring(network, group)}
    latency = max((network.latency(*link) for link in links), default=0.0)
    link = max((1.0 / network.bandwidth(*link) for link in links), default=0.0)
    ring, exchange = (max(link, _uplink_s_per_byte(network, groups, load)) for load in (_ring_load, _exchange_load))
    for primitive, count in ROUNDS.items():
        rounds = count * (size - 1)
        s_per_byte = exchange if primitive == "all_to_all" else ring
        yield primitive, Rate(rounds * latency, rounds / size * s_per_byte)


def _ring(network: Network, group: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The links of the ring through `group`, host by host; none for a group of one."""
    ordered = sorted(group, key=network.hosts.__getitem__)
    return ((a, b) for a, b in zip(ordered, ordered[1:] + ordered[:1], strict=True) if a != b)


def _ring_load(local: int, size: int) -> float:
    return 1.0


def _exchange_load(local: int, size: int) -> float:
    return local * (size - local) / (size - 1)


def _uplink_s_per_byte(network: Network, groups: Groups, load: Callable[[int, int], float]) -> float:
    """Seconds a byte on the busiest uplink; `load(members on the host, members)` is what a crossing group puts on it,
    in units of what one device sends."""
    busy: dict[int, float] = {}
    for group in groups:
        members = Counter(network.hosts[device] for device in group)
        for host, local in members.items():
            if local < len(group):
                busy[host] = busy.get(host, 0.0) + load(local, len(group))
    return max((units / network.uplink_bytes_per_s[host] for host, units in busy.items()), default=0.0)
