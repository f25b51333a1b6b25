"""Random clusters of several tiers with uneven links, and random traffic on them."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

from autopar.core.cluster import Cluster
from autopar.solver.grid import Send
from autopar.solver.mapping import Collective, Instance

Matrix = tuple[tuple[float, ...], ...]
SMALL = 16
"""Devices up to which hosts are uneven."""


def cluster(draw: random.Random, devices: int, noise: float) -> Cluster:
    """One to six hosts of unequal size in one or two racks, some of islands of faster links, pairs of hosts unlike each
    other; one in two is not numbered host by host. Each pair of devices is off by up to `noise`, a fraction. More than
    `SMALL` devices are on four to sixteen hosts of equal size, without islands, numbered host by host."""
    many = devices > SMALL
    hosts = _equal(draw, devices) if many else _hosts(draw, devices)
    racks = {host: draw.randrange(2) for host in sorted(set(hosts))}
    islands = [(host, draw.randrange(2)) if not many and draw.random() < 0.5 else (host, 0) for host in hosts]
    inside, island = draw.uniform(8, 30) * 1e9, draw.uniform(50, 300) * 1e9
    near, far = draw.uniform(1, 25) * 1e9, draw.uniform(0.1, 1) * 1e9
    pairs = {pair: draw.uniform(0.5, 1.0) for pair in itertools.combinations(sorted(set(hosts)), 2)}

    def rate(a: int, b: int) -> float:
        if hosts[a] == hosts[b]:
            return island if islands[a] == islands[b] else inside
        pair = min(hosts[a], hosts[b]), max(hosts[a], hosts[b])
        return pairs[pair] * (near if racks[hosts[a]] == racks[hosts[b]] else far)

    rates, latency = [[rate(a, a)] * devices for a in range(devices)], [[5e-6] * devices for _ in range(devices)]
    for a, b in itertools.combinations(range(devices), 2):
        rates[a][b] = rates[b][a] = rate(a, b) * draw.uniform(1 - noise, 1 + noise)
        latency[a][b] = latency[b][a] = 5e-6 if hosts[a] == hosts[b] else 4e-5
    uplinks = [draw.uniform(1, 2) * max([r for a in range(devices) for b, r in enumerate(rates[a])
                                         if hosts[a] == h != hosts[b]], default=1e9) for h in sorted(set(hosts))]
    base = Cluster.preset(f"{devices}xA100-80GB")
    return replace(base, name="drawn", hosts=hosts, rows=tuple(range(devices)), latency_s=_frozen(latency),
                   bytes_per_s=_frozen(rates), uplink_bytes_per_s=tuple(uplinks))


def _equal(draw: random.Random, devices: int) -> tuple[int, ...]:
    size = devices // draw.choice([4, 8, 16])
    return tuple(d // size for d in range(devices))


def _hosts(draw: random.Random, devices: int) -> tuple[int, ...]:
    count = draw.randint(1, min(6, devices // 2))
    cuts = sorted(draw.sample(range(1, devices), count - 1))
    sizes = [b - a for a, b in itertools.pairwise((0, *cuts, devices))]
    hosts = [h for h, size in enumerate(sizes) for _ in range(size)]
    if draw.random() < 0.5:
        draw.shuffle(hosts)
    return tuple(hosts)


def _frozen(table: list[list[float]]) -> Matrix:
    return tuple(map(tuple, table))


def shapes(devices: int) -> list[tuple[int, ...]]:
    """Grids of two or more places, with one or two axes in each."""
    flat = [(p, devices // p) for p in range(2, devices + 1) if devices % p == 0]
    return flat + [(p, a, w // a) for p, w in flat for a in range(2, w) if w % a == 0]


def instance(seed: int, devices: int, noise: float = 0.0) -> Instance:
    """A grid on a random cluster: micro-batches from place to place, gradients summed over each axis, and over the last
    one of two activations too, so that no two axes carry as much."""
    draw = random.Random(seed)
    network, shape = cluster(draw, devices, noise), draw.choice(shapes(devices))
    send = Send(10 ** draw.uniform(5, 8), 2.0, draw.uniform(0, 32))
    sums = [Collective("all_reduce", (axis,), 10 ** draw.uniform(6, 9.5), 1.0) for axis in range(1, len(shape))]
    inner = [Collective("all_reduce", (len(shape) - 1,), send.nbytes, math.ceil(draw.uniform(1, 200)))]
    return Instance(network, shape, send, tuple(sums + (inner if len(shape) == 3 else [])))


def sizes(draw: random.Random, most: int) -> int:
    """A number of devices with a grid of its own, at most so many."""
    return draw.choice([n for n in range(4, most + 1) if any(n % p == 0 for p in range(2, n))])
