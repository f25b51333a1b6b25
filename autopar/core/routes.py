"""Cheapest ways from some states of a tensor to all others, by Bellman and Ford's algorithm on many sources at once.

Of the ways of fewest seconds, forward and backward together, the one of fewest steps is taken, and of those the first
in the order of the graph's edges. Ways are found when a source is first asked for and remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.core.steps import States, StepGraph

Seconds = NDArray[np.float64]
_HERE, _NO_WAY = -1, -2
"""Instead of the edge by which a state is reached: it is the source, or there is no way to it."""
_STEP = 2.0**-40
"""What a step counts for in the search, as a share of the dearest: far below what matters, far above rounding."""
_BLOCK = 64
"""Sources searched from at once: few enough for the seconds of all states to stay in cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Ways on a graph whose edge e takes `forward[e]` and `backward[e]` seconds, infinite where it can't be used.

    `entry[i][j]` is the last edge on the way from state i to state j.
    """

    graph: StepGraph
    forward: Seconds
    backward: Seconds
    entry: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def seconds(self, sources: Sequence[States], targets: Sequence[States]) -> tuple[Seconds, Seconds]:
        """Forward and backward (sources, targets), both infinite where there is no way."""
        starts, ends = ([self.graph.number[states] for states in side] for side in (sources, targets))
        self._find(starts)
        entries = np.concatenate([self.entry[i] for i in starts])
        row = (np.arange(len(starts)) * len(self.graph.states))[:, None]
        here = np.broadcast_to(np.array(ends), (len(starts), len(ends)))
        # One complex number holds the seconds forward and backward of an edge; the last two stand for _NO_WAY, _HERE.
        each = np.empty(len(self.forward) + 2, dtype=np.complex128)
        each.real, each.imag = (np.append(side, [np.inf, 0.0]) for side in (self.forward, self.backward))
        total = np.zeros(here.shape, dtype=np.complex128)
        edge = entries[row + here]
        while (edge != _HERE).any():
            total += each[edge]
            here = np.where(edge < 0, np.array(starts)[:, None], self.graph.origin[edge])
            edge = entries[row + here]
        return total.real, total.imag

    def edges(self, source: States, target: States) -> list[int] | None:
        """The edges of the way from `source` to `target`, None where there is none."""
        start, here = self.graph.number[source], self.graph.number[target]
        self._find([start])
        found: list[int] = []
        while here != start:
            edge = int(self.entry[start][here])
            if edge == _NO_WAY:
                return None
            found.append(edge)
            here = int(self.graph.origin[edge])
        return found[::-1]

    def _find(self, starts: list[int]) -> None:
        """Remember the ways from states number `starts`."""
        fresh = list(dict.fromkeys(i for i in starts if i not in self.entry))
        together = self.forward + self.backward
        usable = together[np.isfinite(together)]
        weight = together + _STEP * (usable.max(initial=0.0) or 1.0)
        for block in range(0, len(fresh), _BLOCK):
            sources = fresh[block:block + _BLOCK]
            self.entry.update(zip(sources, _entries(self.graph, weight, sources), strict=True))


def _entries(graph: StepGraph, weight: Seconds, sources: list[int]) -> NDArray[np.int32]:
    """The last edge on the way from each of `sources` to every state (sources, states)."""
    layers = [(slice(first, last), graph.origin[first:last], weight[first:last, None])
              for first, last in zip(graph.layer, graph.layer[1:], strict=False)]
    reached = np.full((len(graph.states), len(sources)), np.inf)
    reached[sources, np.arange(len(sources))] = 0.0
    before = np.zeros_like(reached)
    while not np.array_equal(before, reached):
        before = reached.copy()
        for _, origin, seconds in layers:
            into = reached[:len(origin)]
            np.minimum(into, reached[origin] + seconds, out=into)
    entry = np.where(np.isinf(reached), np.int32(_NO_WAY), np.int32(_HERE))
    for edges, origin, seconds in reversed(layers):
        into = reached[:len(origin)]
        by = (reached[origin] + seconds == into) & np.isfinite(into)
        np.copyto(entry[:len(origin)], np.arange(edges.start, edges.stop, dtype=np.int32)[:, None], where=by)
    return np.ascontiguousarray(entry.T)
