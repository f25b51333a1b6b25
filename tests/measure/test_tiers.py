"""Hosts and equal links, recognised in matrices of pairs."""

from __future__ import annotations

import random

import pytest

from autopar.measure.pairs import Links
from autopar.measure.tiers import Hosts, hosts_of, recognised

WITHIN, ACROSS = 52e9, 5.8e9


def measured(hosts: Hosts, noise: float = 0.0, slow: tuple[int, int] | None = None) -> Links:
    """What pairs of such hosts would be measured as; `slow` is one pair as slow as those across."""
    generator = random.Random(1)
    def figure(i: int, j: int, within: float, across: float) -> float:
        if i == j:
            return 0.0
        near = hosts[i] == hosts[j] and {i, j} != set(slow or ())
        return (within if near else across) * generator.uniform(1 - noise, 1 + noise)
    ranks = range(len(hosts))
    return Links(tuple(tuple(figure(i, j, 1e-5, 3e-5) for j in ranks) for i in ranks),
                 tuple(tuple(figure(i, j, WITHIN, ACROSS) for j in ranks) for i in ranks))


@pytest.mark.parametrize("hosts", [
    (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 0, 0), (0, 0), (0, 0, 0, 1), (0, 0, 1, 1, 2, 2),
    (0, 1, 2, 0, 1, 2), (0,) * 8 + (1,) * 8,
])
@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_hosts(hosts: Hosts, noise: float) -> None:
    found = recognised(measured(hosts, noise))
    assert found.hosts == found.rows == hosts
    rates = found.links.bytes_per_s
    assert len(rates) == max(hosts) + 1
    assert all(rates[h][k] == pytest.approx(WITHIN if h == k else ACROSS, rel=noise + 1e-9)
               for h in range(len(rates)) for k in range(len(rates)) if h != k or len(rates) < len(hosts))
    assert len({rates[h][k] for h in range(len(rates)) for k in range(len(rates))}) <= 2, "equal links are equal"


def test_links_of_a_host_that_differ_keep_a_row_each() -> None:
    links = measured((0, 0, 1, 1), 0.3)
    found = recognised(links)
    assert (found.hosts, found.rows) == ((0, 0, 1, 1), (0, 1, 2, 3))
    assert all(found.links.bytes_per_s[i][j] == links.bytes_per_s[i][j] for i in range(4) for j in range(4) if i != j)
    assert all(found.links.bytes_per_s[i][i] > 0 and found.links.latency_s[i][i] > 0 for i in range(4))


@pytest.mark.parametrize("hosts", [(0, 0, 0, 0), (0,) * 6])
def test_one_slow_link_makes_no_host(hosts: Hosts) -> None:
    found = recognised(measured(hosts, slow=(1, 2)))
    assert found.hosts == hosts
    assert found.rows == tuple(range(len(hosts)))
    assert found.links.bytes_per_s[1][2] == ACROSS


@pytest.mark.parametrize("seed", range(20))
def test_links_that_vary_make_no_hosts_beside_a_far_slower_one(seed: int) -> None:
    generator = random.Random(seed)
    pairs = {(i, j): generator.uniform(0.5e9, 3e9) for i in range(4) for j in range(i)} | {(2, 1): 12.5e6}
    rates = tuple(tuple(pairs.get((max(i, j), min(i, j)), 0.0) for j in range(4)) for i in range(4))
    assert hosts_of(rates) == (0, 0, 0, 0)


def test_the_steepest_border_counts() -> None:
    """Pairs of cards joined twice as fast as others of a host, hosts ten times slower."""
    def rate(i: int, j: int) -> float:
        return 250e9 if i // 2 == j // 2 else 100e9 if i // 4 == j // 4 else 10e9
    assert hosts_of(tuple(tuple(rate(i, j) for j in range(8)) for i in range(8))) == (0, 0, 0, 0, 1, 1, 1, 1)
