"""Cheapest ways against Floyd and Warshall's algorithm on random seconds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.routes import Routes, Seconds
from autopar.core.steps import StepGraph, any_cuts, cuts, step_graph

GRAPHS = (step_graph(1, any_cuts(2, 1)), step_graph(2, any_cuts(2, 2)), step_graph(2, cuts((2, 6), (2, 3))),
          step_graph(3, any_cuts(1, 3)))
KINDS = ("any", "ties", "zeros", "holes", "nothing")


def seconds(graph: StepGraph, kind: str, seed: int) -> Seconds:
    """Of each edge, by its move."""
    rng = np.random.default_rng(seed)
    each = {"any": rng.random(len(graph.moves)), "ties": rng.integers(1, 4, len(graph.moves)) * 0.1,
            "zeros": rng.integers(0, 2, len(graph.moves)) * 40.0, "nothing": np.zeros(len(graph.moves)),
            "holes": np.where(rng.random(len(graph.moves)) < 0.7, np.inf, rng.random(len(graph.moves)))}[kind]
    return np.asarray(each[graph.move])


def all_pairs(routes: Routes) -> tuple[Seconds, Seconds]:
    """Fewest seconds, and fewest edges among ways of those, by Floyd and Warshall."""
    size = len(routes.graph.states)
    best, edges = np.full((size, size), math.inf), np.full((size, size), math.inf)
    np.fill_diagonal(best, 0.0)
    np.fill_diagonal(edges, 0.0)
    for i, j, weight in zip(routes.graph.origin, routes.graph.target, routes.forward + routes.backward, strict=True):
        best[i, j], edges[i, j] = weight, 1.0
    for k in range(size):
        through, count = best[:, k, None] + best[k], edges[:, k, None] + edges[k]
        same = np.isclose(through, best, rtol=1e-9, atol=1e-12) & (count < edges)
        better = np.isfinite(through) & ((through < best * (1 - 1e-9) - 1e-12) | same)
        best, edges = np.where(better, through, best), np.where(better, count, edges)
    return best, edges


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRAPHS), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_ways_take_fewest_seconds_then_fewest_steps(graph: StepGraph, kind: str, seed: int) -> None:
    found = Routes(graph, seconds(graph, kind, seed), seconds(graph, kind, seed + 1))
    forward, backward = found.seconds(graph.states, graph.states)
    best, edges = all_pairs(found)
    np.testing.assert_allclose(forward + backward, best, rtol=1e-9, atol=1e-12)
    for i, source in enumerate(graph.states):
        for j, target in enumerate(graph.states):
            way = found.edges(source, target)
            assert (math.inf if way is None else len(way)) == (edges[i, j] if math.isfinite(best[i, j]) else math.inf)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRAPHS), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_tables_agree_with_ways_walked(graph: StepGraph, kind: str, seed: int) -> None:
    found = Routes(graph, seconds(graph, kind, seed), seconds(graph, kind, seed + 1))
    rng = random.Random(seed)
    sources, targets = (rng.choices(graph.states, k=9) for _ in range(2))
    forward, backward = found.seconds(sources, targets)
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            way = found.edges(source, target)
            if way is None:
                assert (forward[i, j], backward[i, j]) == (math.inf, math.inf)
                continue
            here = graph.number[source]
            for edge in way:
                assert here == graph.origin[edge]
                here = int(graph.target[edge])
            assert here == graph.number[target]
            assert forward[i, j] == pytest.approx(found.forward[way].sum(), rel=1e-12)
            assert backward[i, j] == pytest.approx(found.backward[way].sum(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_before_changes_nothing(kind: str) -> None:
    graph = GRAPHS[1]
    costs = seconds(graph, kind, 1), seconds(graph, kind, 2)
    whole = Routes(graph, *costs).seconds(graph.states, graph.states)
    piecewise = Routes(graph, *costs)
    rows = [piecewise.seconds([source], graph.states) for source in reversed(graph.states)][::-1]
    assert np.array_equal(whole[0], np.concatenate([forward for forward, _ in rows]))
    assert np.array_equal(whole[1], np.concatenate([backward for _, backward in rows]))
