"""The bound of seconds within a budget, against brute force over choices and what is kept."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from autopar.core.sharding import Instance, price
from autopar.solver.lagrange import Priced, bound_within, hull, priced, relaxed
from tests.solver.instances import INF, random_instance

Ended = tuple[float, float]
SEEDS = range(60)


def small(seed: int) -> tuple[Instance, frozenset[int]]:
    """An instance with moments, and the nodes whose results may be made again."""
    rng = random.Random(seed)
    instance = replace(random_instance(seed), budget=INF)
    nodes = tuple(replace(node, choices=node.choices[:3]) for node in instance.nodes[:4])
    few = len(nodes)
    segments = tuple(replace(s, nodes=tuple(n for n in s.nodes if n < few), flows=tuple(
        f for f in s.flows if f.producer < few and all(c.node < few for c in f.consumers)))
        for s in instance.segments)
    moments = tuple(replace(m, saved=m.saved[:few], gradients=m.gradients[:few],
                            parameters=tuple(n for n in m.parameters if n < few),
                            ops=tuple(n for n in m.ops if n < few)) for m in instance.moments)
    return Instance(nodes, segments, INF, moments), frozenset(n for n in range(few) if rng.random() < 0.5)


def every(instance: Instance, again: frozenset[int]) -> Iterator[Ended]:
    """(seconds, bytes at the last moment) of every choice and every set of results that are made again."""
    there = instance.moments[-1].saved if instance.moments else (0,) * len(instance.nodes)
    for taken in itertools.product(*(range(len(n.choices)) for n in instance.nodes)):
        for n_dropped in range(len(again) + 1):
            for dropped in itertools.combinations(sorted(again), n_dropped):
                nodes = tuple(replace(node, choices=tuple(
                    replace(c, backward=c.backward + c.forward, saved=0.0) for c in node.choices))
                    if n in dropped else node for n, node in enumerate(instance.nodes))
                nbytes = sum(node.count * node.choices[c].nbytes + there[n] * node.choices[c].saved
                             for n, (node, c) in enumerate(zip(nodes, taken, strict=True)))
                yield price(replace(instance, nodes=nodes), taken).seconds, nbytes


@pytest.mark.parametrize("solver", ["highs"])
def test_no_plan_is_below_the_bound(solver: str) -> None:
    close = bounded = 0
    for seed in SEEDS:
        instance, again = small(seed)
        ended = [each for each in every(instance, again) if math.isfinite(each[0])]
        if not ended:
            continue
        least, most = (pick(nbytes for _, nbytes in ended) for pick in (min, max))
        prices = hull(instance, again, (0.01, 0.1, 1.0, 10.0), solver)
        for made in prices:
            exact = min(seconds + made.rate * nbytes for seconds, nbytes in ended)
            assert made.least <= exact * (1.0 + 1e-9)
            close += made.least >= exact * (1.0 - 1e-3)
            bounded += 1
        for share in (0.0, 0.3, 1.0):
            budget = least + share * (most - least)
            best = min((seconds for seconds, nbytes in ended if nbytes <= budget), default=INF)
            assert bound_within(prices, budget) <= best * (1.0 + 1e-9)
    assert close > 0.8 * bounded


def test_bytes_for_nothing_are_the_plain_problem() -> None:
    instance, again = small(3)
    model, variants = relaxed(instance, again, 0.0)
    assert [len(node.choices) for node in model.nodes] == [len(each) for each in variants]
    assert isinstance(priced(instance, frozenset(), 0.0, "highs"), Priced)
