"""Hosts, recognised by their links: what is fast within and slow between.

Pairs of ranks are sorted by bandwidth. Where it falls by more than APART from one to the next there may be a border
between tiers: ranks joined by faster pairs are then hosts, if every two ranks of a host are joined so and the links
between hosts don't differ by more than the border. One slow link among many fast ones makes none. The steepest border
that makes hosts is taken; without one all is one host.

Where the links of a tier are alike, each is the median of its tier and a row of the matrices is a host; else every
device has a row.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

from autopar.measure.pairs import Links, Matrix

APART = 2.0
"""How many times faster the links within hosts are at least."""
ALIKE = 1.25
"""How many times faster the fastest link of a tier may be than the slowest for them to count as alike."""
Hosts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tiers:
    """The hosts of the ranks, their rows, and the matrices between rows, as a Cluster has them."""

    hosts: Hosts
    rows: tuple[int, ...]
    links: Links


def recognised(links: Links) -> Tiers:
    """The tiers of measured links."""
    ranks = range(len(links.bytes_per_s))
    hosts = hosts_of(links.bytes_per_s)
    kinds = [[(i, j) for i, j in itertools.permutations(ranks, 2) if (hosts[i] == hosts[j]) is within]
             for within in (True, False)]
    if all(_alike(links.bytes_per_s, pairs) for pairs in kinds):
        return Tiers(hosts, hosts, Links(*(_by_host(figures, max(hosts) + 1, kinds)
                                           for figures in (links.latency_s, links.bytes_per_s))))
    return Tiers(hosts, tuple(ranks), Links(_with_diagonal(links.latency_s, min(_off_diagonal(links.latency_s))),
                                            _with_diagonal(links.bytes_per_s, max(_off_diagonal(links.bytes_per_s)))))


def hosts_of(bytes_per_s: Matrix) -> Hosts:
    """The host of each rank, numbered in the order of their first ranks."""
    ranks = range(len(bytes_per_s))
    pairs = {(i, j): (bytes_per_s[i][j] * bytes_per_s[j][i]) ** 0.5 for i, j in itertools.combinations(ranks, 2)}
    rates = sorted(pairs.values())
    borders = sorted(((fast / slow, fast) for slow, fast in itertools.pairwise(rates) if fast / slow > APART),
                     reverse=True)
    for border, fast in borders:
        found = _joined(len(ranks), [pair for pair, rate in pairs.items() if rate >= fast])
        within, between = ([rate for (i, j), rate in pairs.items() if (found[i] == found[j]) is same]
                           for same in (True, False))
        if between and min(within) >= fast and max(between) <= border * min(between):
            return found
    return (0,) * len(ranks)


def _joined(ranks: int, pairs: list[tuple[int, int]]) -> Hosts:
    """The connected parts of a graph, numbered in the order of their first ranks."""
    part = list(range(ranks))
    for i, j in pairs:
        part = [part[i] if p == part[j] else p for p in part]
    number = {p: n for n, p in enumerate(dict.fromkeys(part))}
    return tuple(number[p] for p in part)


def _alike(figures: Matrix, pairs: list[tuple[int, int]]) -> bool:
    found = [figures[i][j] for i, j in pairs]
    return not found or max(found) <= ALIKE * min(found)


def _by_host(figures: Matrix, hosts: int, kinds: list[list[tuple[int, int]]]) -> Matrix:
    """The median of each tier, or of the other where hosts are single devices."""
    found = [statistics.median(figures[i][j] for i, j in pairs) if pairs else 0.0 for pairs in kinds]
    within, between = (figure or max(found) for figure in found)
    return tuple(tuple(within if h == k else between for k in range(hosts)) for h in range(hosts))


def _off_diagonal(figures: Matrix) -> list[float]:
    return [figure for i, row in enumerate(figures) for j, figure in enumerate(row) if i != j]


def _with_diagonal(figures: Matrix, own: float) -> Matrix:
    return tuple((*row[:i], own, *row[i + 1:]) for i, row in enumerate(figures))
