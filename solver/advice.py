"""Why a sharding instance has no solution, asked by solving easier instances.

`no_seconds` keeps the connections and bytes and counts no seconds, for the least budget. `ways_only` allows
every connection and counts those without a way as a second each: its optimum is the fewest that stand in the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from autopar.core.sharding import Flow, Instance

Table = tuple[tuple[float, ...], ...]


def no_seconds(instance: Instance) -> Instance:
    """The same decisions and bytes, in which nothing costs a second."""
    return _recount(instance, lambda seconds: seconds if math.isinf(seconds) else 0.0)


def ways_only(instance: Instance) -> Instance:
    """The same decisions without a budget, in which a connection without a way costs a second and all else nothing."""
    return replace(_recount(instance, lambda seconds: 1.0 if math.isinf(seconds) else 0.0), budget=math.inf)


def _recount(instance: Instance, way: Callable[[float], float]) -> Instance:
    def table(seconds: Table) -> Table:
        return tuple(tuple(map(way, row)) for row in seconds)
    def flow(old: Flow) -> Flow:
        return replace(old, forward=table(old.forward), backward=table(old.backward), parameter=False)
    nodes = tuple(replace(node, choices=tuple(replace(c, forward=0.0, backward=0.0, optimizer=0.0)
                                              for c in node.choices)) for node in instance.nodes)
    segments = tuple(replace(segment, flows=tuple(map(flow, segment.flows))) for segment in instance.segments)
    return replace(instance, nodes=nodes, segments=segments)


def missing_ways(instance: Instance, choices: tuple[int, ...]) -> list[str]:
    """The connections without a way under `choices`, in words."""
    def taken(n: int) -> str:
        return f"{instance.nodes[n].name} ({instance.nodes[n].choices[choices[n]].name})"
    return [f"{flow.name} from {taken(flow.producer)} to {taken(consumer.node)}"
            for segment in instance.segments for flow in segment.flows for consumer in flow.consumers
            if not _has_way(flow, flow.sources[choices[flow.producer]], consumer.targets[choices[consumer.node]])]


def _has_way(flow: Flow, source: int, target: int) -> bool:
    return flow.forward[source][target] + flow.backward[source][target] < math.inf
