"""The graph of steps against a plain enumeration of what may move."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.core.mesh import Mesh
from autopar.core.spec import State
from autopar.core.steps import Cuts, States, StepGraph, any_cuts, cuts, step_graph

SHAPES = ((2,), (3, 2), (2, 4), (2, 3, 2))
SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=0, max_size=3).map(tuple)


def fits(states: States, sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether every dim divides into its parts."""
    mesh = Mesh(shape)
    return all(size % mesh.extent(tuple(a for a, s in enumerate(states) if s == dim)) == 0
               for dim, size in enumerate(sizes))


def innermost(states: States, moved: tuple[int, ...]) -> bool:
    dim = states[moved[0]]
    on_dim = tuple(a for a, state in enumerate(states) if state == dim)
    return not isinstance(dim, int) or on_dim[-len(moved):] == moved


def enumerated(sizes: tuple[int, ...], shape: tuple[int, ...]) -> dict[tuple[States, States], tuple[int, ...]]:
    """The axes that move in every single step, by the states before and after."""
    options: list[State] = [*range(len(sizes)), "R", "P", "G"]
    every = [s for s in itertools.product(options, repeat=len(shape)) if fits(s, sizes, shape)]
    found = {}
    for before, after in itertools.permutations(every, 2):
        moved = tuple(a for a, (b, c) in enumerate(zip(before, after, strict=True)) if b != c)
        together = len({before[a] for a in moved}) == len({after[a] for a in moved}) == 1
        if together and innermost(before, moved) and innermost(after, moved):
            found[before, after] = moved
    return found


def edges(graph: StepGraph) -> dict[tuple[States, States], int]:
    """The edges of a graph, by the states they join."""
    joined = zip(graph.origin.tolist(), graph.target.tolist(), strict=True)
    return {(graph.states[i], graph.states[j]): e for e, (i, j) in enumerate(joined)}


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from(SHAPES))
def test_steps_are_those_of_a_plain_enumeration(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    graph = step_graph(len(shape), cuts(sizes, shape))
    found, expected = edges(graph), enumerated(sizes, shape)
    assert len(found) == len(graph.origin)
    assert {ends: graph.moves[graph.move[e]].axes for ends, e in found.items()} == expected


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from(SHAPES))
def test_moves_tell_kinds_and_axes_that_cut_before_and_after(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    graph = step_graph(len(shape), cuts(sizes, shape))
    for (before, after), e in edges(graph).items():
        move = graph.moves[graph.move[e]]
        here, there = before[move.axes[0]], after[move.axes[0]]
        for told, state in ((move.source, here), (move.target, there)):
            assert told == state or (isinstance(told, int) and isinstance(state, int))
        both = zip(before, after, strict=True)
        assert move.cut == tuple(a for a, pair in enumerate(both) if all(isinstance(s, int) for s in pair))
    assert len(set(graph.moves)) == len(graph.moves)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from(SHAPES))
def test_layers_hold_one_edge_into_each_of_the_first_states(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    graph = step_graph(len(shape), cuts(sizes, shape))
    assert (graph.layer[0], graph.layer[-1]) == (0, len(graph.origin))
    for first, last in itertools.pairwise(graph.layer):
        assert graph.target[first:last].tolist() == list(range(last - first))
    assert [graph.number[states] for states in graph.states] == list(range(len(graph.states)))


@pytest.mark.parametrize(("sizes", "shape", "expected"), [
    ((6,), (2, 3), (0b1111,)),
    ((4, 3), (2, 3), (0b0011, 0b0101)),
    ((5,), (2, 3), (0b0001,)),
    ((), (2, 3), ()),
    ((4,), (2, 2, 2), (0b01111111,)),
])
def test_cuts(sizes: tuple[int, ...], shape: tuple[int, ...], expected: Cuts) -> None:
    assert cuts(sizes, shape) == expected


def test_any_cut() -> None:
    assert any_cuts(2, 2) == cuts((12, 12), (2, 3)) == (0b1111, 0b1111)
