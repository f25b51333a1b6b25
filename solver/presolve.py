"""Smaller sharding instances with the same optimum, and the way back.

    equal specs        sources whose seconds agree for every target are one source; of a flow with one consumer also
                       targets whose seconds agree for every source (with several, two targets may be paid twice)
    unused specs       specs that no choice emits or wants have no row or column
    dominated choices  of two choices of a node that emit and want the same specs, one that is nowhere cheaper goes:
                       the step's seconds and bytes only grow with a choice's; bytes count where there is a budget
    outsized choices   what exceeds the budget even when every other node holds its least goes
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from autopar.core.sharding import Choice, Consumer, Flow, Instance, ledger

SECONDS, ALL_COSTS = 3, 7
"""How many of `Choice.costs` are seconds, and how many there are."""
ROUNDING = 1e-9
"""The fraction of the budget below which bytes are not told apart here."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Reduced:
    """`instance`, whose node n has as choice c what was choice `kept[n][c]` before."""

    instance: Instance
    kept: tuple[tuple[int, ...], ...]

    def restore(self, choices: tuple[int, ...]) -> tuple[int, ...]:
        """The choices as they were numbered before."""
        return tuple(kept[choice] for kept, choice in zip(self.kept, choices, strict=True))


def presolve(instance: Instance, counted: int | None = None) -> Reduced:
    """An instance with the same optimum and fewer specs and choices, or as many.

    The first `counted` costs of a choice make it better or worse; by default all that the budget makes count.
    """
    merged = _map_flows(instance, _merge_specs)
    roles = _roles(merged)
    bounded = math.isfinite(instance.budget)
    fitting = _fitting(merged) if bounded else [tuple(range(len(node.choices))) for node in merged.nodes]
    counted = counted or (ALL_COSTS if bounded else SECONDS)
    kept = tuple(_undominated(node.choices, role, fits, counted)
                 for node, role, fits in zip(merged.nodes, roles, fitting, strict=True))
    return Reduced(restrict(merged, kept), kept)


def _map_flows(instance: Instance, change: Callable[[Flow], Flow]) -> Instance:
    return replace(instance, segments=tuple(replace(segment, flows=tuple(change(flow) for flow in segment.flows))
                                            for segment in instance.segments))


def _merge_specs(flow: Flow) -> Flow:
    """`flow` with equal specs merged, unused ones left out and equal consumers counted once."""
    consumers = tuple(dict.fromkeys(flow.consumers))
    sources, wanted = sorted(set(flow.sources)), sorted({t for consumer in consumers for t in consumer.targets})
    def column(target: int) -> Hashable:
        return tuple((flow.forward[s][target], flow.backward[s][target]) for s in sources)
    def row(source: int) -> Hashable:
        return tuple((flow.forward[source][t], flow.backward[source][t]) for t in wanted)
    rows = _labels(sources, row)
    columns = _labels(wanted, column if len(consumers) == 1 else lambda target: target)
    def table(seconds: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(_pick(seconds[s], _first(columns)) for s in _first(rows))
    return replace(flow, sources=_pick(rows, flow.sources), forward=table(flow.forward), backward=table(flow.backward),
                   consumers=tuple(Consumer(c.node, _pick(columns, c.targets)) for c in consumers))


def _labels(keys: Iterable[int], content: Callable[[int], Hashable]) -> dict[int, int]:
    """A number for each key, equal for equal contents, counting from 0 in order of first occurrence."""
    seen: dict[Hashable, int] = {}
    return {key: seen.setdefault(content(key), len(seen)) for key in keys}


def _first(labels: dict[int, int]) -> tuple[int, ...]:
    """The first key of each label."""
    first: dict[int, int] = {}
    for key, label in labels.items():
        first.setdefault(label, key)
    return tuple(first.values())


def _pick(values: dict[int, Value] | tuple[Value, ...], where: Iterable[int]) -> tuple[Value, ...]:
    return tuple(values[i] for i in where)


def _roles(instance: Instance) -> list[list[tuple[int, ...]]]:
    """For each node the spec numbers, by choice, of every flow out of it and into it."""
    roles: list[list[tuple[int, ...]]] = [[] for _ in instance.nodes]
    for flow in (flow for segment in instance.segments for flow in segment.flows):
        roles[flow.producer].append(flow.sources)
        for consumer in flow.consumers:
            roles[consumer.node].append(consumer.targets)
    return roles


def _fitting(instance: Instance) -> list[tuple[int, ...]]:
    """The choices of each node that fit the budget while all others hold their least, or that hold the least."""
    bytes_of, fitting = ledger(instance), []
    least = [bytes_of.node(n).min(1) for n in range(len(instance.nodes))]
    room = instance.budget * (1.0 + ROUNDING) - np.sum(least, axis=0)
    for n in range(len(instance.nodes)):
        beyond = bytes_of.node(n) - least[n][:, None]
        fitting.append(tuple(int(c) for c in np.flatnonzero((beyond <= np.maximum(room, 0.0)[:, None]).all(0))))
    return fitting


def _undominated(choices: tuple[Choice, ...], roles: list[tuple[int, ...]], fitting: tuple[int, ...],
                 counted: int) -> tuple[int, ...]:
    """Those of the `fitting` choices to keep, ascending; of equal ones the first. The first `counted` costs count."""
    kept: dict[tuple[int, ...], list[int]] = {}
    figures = {c: choices[c].costs[:counted] for c in fitting}
    for c in sorted(fitting, key=lambda c: (figures[c], c)):
        rivals = kept.setdefault(tuple(role[c] for role in roles), [])
        if not any(all(map(operator.le, figures[rival], figures[c])) for rival in rivals):
            rivals.append(c)
    return tuple(sorted(c for rivals in kept.values() for c in rivals))


def restrict(instance: Instance, kept: tuple[tuple[int, ...], ...]) -> Instance:
    """`instance` with only the choices `kept` of each node."""
    nodes = tuple(replace(node, choices=_pick(node.choices, of)) for node, of in zip(instance.nodes, kept, strict=True))
    return _map_flows(replace(instance, nodes=nodes), lambda flow: _merge_specs(_keep(flow, kept)))


def _keep(flow: Flow, kept: tuple[tuple[int, ...], ...]) -> Flow:
    """`flow` for nodes that have only the choices `kept`."""
    consumers = tuple(Consumer(c.node, _pick(c.targets, kept[c.node])) for c in flow.consumers)
    return replace(flow, sources=_pick(flow.sources, kept[flow.producer]), consumers=consumers)
