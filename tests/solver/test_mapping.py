"""Layouts equal brute force on random small networks; hand layouts are priced beside the solver's."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from autopar.core.cluster import Cluster
from autopar.core.ranks import HandLayout
from autopar.solver.grid import Send
from autopar.solver.mapping import Collective, Instance, place, price


def cluster_of(hosts: list[int], within: list[float], between: list[list[float]], uplinks: list[float]) -> Cluster:
    """Hosts of so many devices each; bytes a second within each and between them."""
    base, n = Cluster.preset(f"{sum(hosts)}xA100-80GB"), len(hosts)
    rates = tuple(tuple(within[i] if i == j else between[i][j] for j in range(n)) for i in range(n))
    where = tuple(h for h, count in enumerate(hosts) for _ in range(count))
    latency = tuple(tuple(5e-6 if i == j else 4e-5 for j in range(n)) for i in range(n))
    return replace(base, name="drawn", hosts=where, rows=where, latency_s=latency, bytes_per_s=rates,
                   uplink_bytes_per_s=tuple(uplinks))


def drawn(seed: int, hosts: list[int], shape: tuple[int, ...]) -> Instance:
    draw, n = random.Random(seed), len(hosts)
    between = [[0.0] * n for _ in range(n)]
    for i, j in itertools.combinations(range(n), 2):
        between[i][j] = between[j][i] = draw.uniform(0.1, 10) * 1e9
    uplinks = [max(row) for row in between]
    cluster = cluster_of(hosts, [draw.uniform(10, 300) * 1e9 for _ in hosts], between, uplinks)
    if draw.random() < 0.5:  # devices that are not numbered host by host
        order = list(range(sum(hosts)))
        draw.shuffle(order)
        where = tuple(cluster.hosts[d] for d in order)
        cluster = replace(cluster, hosts=where, rows=where)
    send = Send(draw.uniform(1, 50) * 1e6, 2.0, draw.uniform(0, 20))
    inner = tuple(range(1, len(shape)))
    around = Send(draw.uniform(1, 50) * 1e6, draw.choice([0.0, 0.0, 1.0, 20.0]))
    return Instance(cluster, shape, send, (Collective("all_reduce", inner, draw.uniform(0, 2) * 1e9, 1.0),), around)


def brute_force(instance: Instance) -> float:
    return min(price(instance, devices) for devices in itertools.permutations(range(instance.size)))


CASES = [([2, 2], (2, 2)), ([2, 3], (5, 1)), ([1, 2, 2], (5, 1)), ([2, 2, 2], (3, 2)), ([2, 2, 2], (2, 3)),
         ([3, 3], (3, 2))]


@pytest.mark.parametrize("seed", range(40))
def test_layouts_are_the_best_of_all(seed: int) -> None:
    """200 networks of four and five devices, 40 of six."""
    for i, (hosts, shape) in enumerate(CASES[:3]):
        for more in (0, 1000):
            instance = drawn(10 * seed + i + more, hosts, shape)
            found = place(instance)
            assert found.gap == 0.0
            assert found.seconds == pytest.approx(brute_force(instance), rel=1e-9)


@pytest.mark.parametrize(("hosts", "shape"), CASES[3:])
def test_six_devices(hosts: list[int], shape: tuple[int, ...]) -> None:
    for seed in range(2):
        instance = drawn(seed, hosts, shape)
        assert place(instance).seconds == pytest.approx(brute_force(instance), rel=1e-9)


def hetero() -> Cluster:
    """Three hosts of four devices: 9.4 Gb/s between two of them, 0.93 Gb/s to the third."""
    fast, slow = 9.4e9 / 8, 0.93e9 / 8
    return cluster_of([4, 4, 4], [12e9] * 3, [[fast, fast, slow], [fast, fast, slow], [slow, slow, slow]],
                      [fast, fast, slow])


FOUR = ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))
THREE = ((0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11))


def gpt(layers: int, batch: int, stages: int) -> Instance:
    """A GPT of width 1024, 1024 tokens a sample, fp16: a micro-batch of one sample a pipeline, one sum of gradients."""
    width = 12 // stages
    parts = max(1, batch // width)
    parameters = 12.0 * layers * 1024**2 / stages
    return Instance(hetero(), (stages, width), Send(2.0 * 1024 * 1024, 2.0, 2.0 * (parts - 1)),
                    (Collective("all_reduce", (1,), 2.0 * parameters, 1.0),))


@pytest.mark.parametrize("layers", [12, 24, 48])
def test_layouts_by_hand_are_never_better(layers: int) -> None:
    best = {}
    for batch in (12, 48, 192, 768):
        found = {stages: place(gpt(layers, batch, stages)) for stages in (2, 3, 4, 6)}
        for stages, columns in ((4, FOUR), (3, THREE)):
            instance = gpt(layers, batch, stages)
            by_hand = HandLayout(columns, tuple(zip(*columns, strict=True))).devices(instance.size)
            assert found[stages].seconds <= price(instance, by_hand) * (1 + 1e-9)
            assert found[stages].gap == 0.0
        stages = min(found, key=lambda stages: found[stages].seconds)
        best[batch] = stages, tuple(hetero().hosts[device] for device in found[stages].devices)
    assert len(set(best.values())) > 1, best  # what is best changes as the batch grows
