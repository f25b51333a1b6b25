"""A sharding instance at given prices as a network of tables, whose least sum is a lower bound of a step's seconds.

The two things that couple decisions beyond tables are priced. T ≥ compute + inline and T ≥ parameter communication
become, for a share μ ∈ [0, 1] of each segment and phase,

    T ≥ (1 − μ) · (compute + inline) + μ · parameter communication

to which the interference of parameter communication is added,

and the budget enters with λ ≥ 0 seconds a byte for each row r of the ledger: λ_r · (bytes_r − budget). At any
prices the least sum over choices is a bound, and for fixed choices the sum is linear in the prices (Lagrangian
relaxation: Geoffrion 1974).

A flow with several consumers is a table over them all, in which a pair of specs that several want counts once. Where
that would be too large its consumers are split in groups, each with its share of the flow: what all pay is never
less than what any group pays, so it is a bound still.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.core.sharding import INTERFERENCE, PHASES, Consumer, Flow, Instance, Ledger, Sums, ledger, sums
from autopar.solver.elimination import LIMIT, MOST_DIMS, Array, Elimination, Schedule, Scope, eliminate, schedule

TABLE_LIMIT = LIMIT // 2
"""The most entries of a flow's table."""


@dataclass(frozen=True, slots=True)
class Prices:
    """`hidden[g, p]` is μ of phase p of segment g, `byte[r]` is λ in seconds of row r of the ledger."""

    hidden: NDArray[np.float64]
    byte: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Group:
    """Some consumers of a flow, with their share of it; `scope` are the producer and their nodes, each once."""

    segment: int
    flow: Flow
    consumers: tuple[Consumer, ...]
    share: float
    scope: Scope


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """An instance, its ledger, its flows' groups, and how to eliminate its nodes."""

    instance: Instance
    bytes_of: Ledger
    groups: tuple[Group, ...]
    schedule: Schedule

    def at(self, prices: Prices) -> Elimination:
        """The least sum at given prices; less `λ · budget`, which does not depend on choices."""
        return eliminate(self.schedule, [*self._nodes(prices), *(self._table(group, prices) for group in self.groups)])

    def value(self, found: Elimination, prices: Prices) -> float:
        """The lower bound of a step's seconds that an elimination at `prices` proves."""
        return found.value - self.allowance(prices)

    def allowance(self, prices: Prices) -> float:
        """λ · budget."""
        return float(prices.byte.sum() * self.instance.budget) if prices.byte.any() else 0.0

    def _nodes(self, prices: Prices) -> Iterator[Array]:
        """What the choices of each node cost: optimizer, compute, bytes."""
        made = [np.array([node.count * choice.optimizer for choice in node.choices]) for node in self.instance.nodes]
        for g, segment in enumerate(self.instance.segments):
            for n in segment.nodes:
                choices = self.instance.nodes[n].choices
                for p, phase in enumerate(PHASES):
                    seconds = np.array([getattr(choice, phase) for choice in choices])
                    made[n] = made[n] + segment.count * (1.0 - prices.hidden[g, p]) * seconds
        for n, costs in enumerate(made):
            yield costs + prices.byte @ self.bytes_of.node(n) if prices.byte.any() else costs

    def _table(self, group: Group, prices: Prices) -> Array:
        """What a group pays for each combination of choices in its scope."""
        flow, count = group.flow, self.instance.segments[group.segment].count
        shares = prices.hidden[group.segment]
        weights = shares + INTERFERENCE if flow.parameter else 1.0 - shares
        ways = np.array((flow.forward, flow.backward))
        shut = np.isinf(ways).any(0)
        seconds = np.tensordot(group.share * count * weights, np.where(np.isinf(ways), 0.0, ways), 1)
        return _spread(group, np.where(shut, math.inf, seconds))


def network(instance: Instance) -> Network:
    """The network of an instance."""
    sizes = [len(node.choices) for node in instance.nodes]
    groups = tuple(group for g, segment in enumerate(instance.segments) for flow in segment.flows
                   for group in _groups(g, flow, sizes))
    scopes: list[Scope] = [*((n,) for n in range(len(sizes))), *(group.scope for group in groups)]
    return Network(instance, ledger(instance).binding(instance.budget), groups, schedule(sizes, scopes))


def _groups(segment: int, flow: Flow, sizes: list[int]) -> Iterator[Group]:
    """The consumers of a flow in as few groups as keep their tables small."""
    parts: list[list[Consumer]] = []
    for consumer in flow.consumers:
        for part in parts:
            scope = {flow.producer, *(c.node for c in (*part, consumer))}
            if len(scope) <= MOST_DIMS and math.prod(sizes[n] for n in scope) <= TABLE_LIMIT:
                part.append(consumer)
                break
        else:
            parts.append([consumer])
    for part in parts:
        ordered = tuple(dict.fromkeys((flow.producer, *(c.node for c in part))))
        yield Group(segment, flow, tuple(part), len(part) / len(flow.consumers), ordered)


def _spread(group: Group, seconds: Array) -> Array:
    """`seconds` (sources, targets) by choice of the nodes in the group's scope, each pair of specs counted once."""
    def along(n: int, specs: tuple[int, ...]) -> NDArray[np.intp]:
        place = group.scope.index(n)
        return np.array(specs).reshape([-1 if k == place else 1 for k in range(len(group.scope))])
    sources = along(group.flow.producer, group.flow.sources)
    wanted = [along(consumer.node, consumer.targets) for consumer in group.consumers]
    total = seconds[sources, wanted[0]]
    for k, targets in enumerate(wanted[1:], start=1):
        again = np.any(np.stack(np.broadcast_arrays(*(targets == earlier for earlier in wanted[:k]))), axis=0)
        total = total + np.where(again, 0.0, seconds[sources, targets])
    return np.asarray(total)


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What given choices cost at any prices: `sums[g, p]`, `optimizer` seconds, bytes of every row."""

    choices: tuple[int, ...]
    parts: tuple[tuple[Sums, ...], ...]
    optimizer: float
    nbytes: NDArray[np.float64]


def cut(net: Network, choices: tuple[int, ...]) -> Cut:
    """The cut that `choices` make."""
    instance = net.instance
    parts = tuple(tuple(sums(instance, segment, phase, choices) for phase in PHASES) for segment in instance.segments)
    optimizer = sum(node.count * node.choices[c].optimizer for node, c in zip(instance.nodes, choices, strict=True))
    return Cut(choices, parts, optimizer, net.bytes_of.of(choices))
