"""Bounds, and the choices they strike out, against trying everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from autopar.core.sharding import INTERFERENCE, price
from autopar.solver import elimination, network
from autopar.solver.dual import cut, free, raise_bound, survivors
from autopar.solver.network import Prices
from autopar.solver.optimise import NEAR, begin, optimise
from tests.solver.instances import EXACT, INF, least_seconds, random_instance


def random_prices(net: network.Network, seed: int) -> Prices:
    rng, flat = np.random.default_rng(seed), free(net)
    return Prices(rng.random(flat.hidden.shape), rng.random(flat.byte.shape) * 1e-8)


@pytest.mark.parametrize("limit", [elimination.LIMIT, 8])
def test_at_any_prices_the_least_sum_is_a_bound(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of at most `limit` entries, so that flows are split and variables copied; inexact sums only bound."""
    monkeypatch.setattr(elimination, "LIMIT", limit)
    monkeypatch.setattr(network, "TABLE_LIMIT", limit)
    for seed in range(200):
        instance = random_instance(seed)
        net = network.network(instance)
        prices = random_prices(net, seed)
        found = net.at(prices)
        best = least_seconds(instance)
        assert net.value(found, prices) <= best * (1 + EXACT) + 1e-12
        if net.schedule.exact and limit > 8 and found.value < INF:
            made = cut(net, found.choices())
            shares = prices.hidden
            total = made.optimizer + float(prices.byte @ made.nbytes) + sum(
                segment.count * ((1 - shares[g, p]) * (part.work + part.inline)
                                 + (shares[g, p] + INTERFERENCE) * part.hidden)
                for g, segment in enumerate(instance.segments) for p, part in enumerate(made.parts[g]))
            assert found.value == pytest.approx(total, rel=EXACT)


@pytest.mark.parametrize("limit", [elimination.LIMIT, 8])
def test_what_a_better_solution_may_take_survives(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "LIMIT", limit)
    monkeypatch.setattr(network, "TABLE_LIMIT", limit)
    struck = 0
    for seed in range(60):
        instance = random_instance(seed)
        bound = raise_bound(instance, "highs")
        every = list(itertools.product(*(range(len(node.choices)) for node in instance.nodes)))
        priced = [(price(instance, taken), taken) for taken in every]
        fitting = [(p.seconds, taken) for p, taken in priced if p.nbytes <= instance.budget and p.seconds < INF]
        best = min(fitting, default=(INF, ()))[0]
        assert bound.seconds <= best * (1 + EXACT)
        if not fitting or math.isinf(bound.seconds):
            continue
        known = sorted(fitting)[len(fitting) // 2][0]
        kept = survivors(bound, known)
        assert all(c in kept[n] for seconds, taken in fitting if seconds <= known for n, c in enumerate(taken))
        struck += sum(len(node.choices) - len(some) for node, some in zip(instance.nodes, kept, strict=True))
    assert struck > 20


def test_the_optimum_is_found_where_bounds_are_loose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables so small that a choice's least sum may prove more than the bound does."""
    monkeypatch.setattr(elimination, "LIMIT", 8)
    monkeypatch.setattr(network, "TABLE_LIMIT", 8)
    nothing_near = 0
    for seed in range(200):
        instance = random_instance(seed)
        best = least_seconds(instance)
        if math.isinf(best):
            continue
        found = optimise(instance, "highs")
        assert (found.status, found.seconds) == ("optimal", pytest.approx(best, rel=EXACT))
        bound = begin(instance, solver="highs").bound
        nothing_near += not all(survivors(bound, bound.seconds * (1.0 + NEAR[0])))
    assert nothing_near > 0
