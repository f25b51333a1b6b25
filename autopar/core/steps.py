"""Which single steps lead from which states of a tensor to which others, as arrays.

A step moves some axes together from one state to another. Where it takes them off a dim or puts them on one they are
the innermost there, so that parts stay contiguous. None of this depends on seconds, and of sizes only by the sets of
axes over which a dim can be cut evenly, so one graph serves many tensors on many meshes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.core.mesh import Mesh
from autopar.core.spec import State

States = tuple[State, ...]
"""What each axis does to a tensor."""
Ints = NDArray[np.int64]
_LOOSE: tuple[State, ...] = ("R", "P", "G")
_ON_DIM = 3
"""The kind of every dim, behind those of R, P and G: all dims cost the same."""


@dataclass(frozen=True, slots=True)
class Move:
    """What the price of a step depends on: its axes, states before and after, the axes that cut on both sides of it."""

    axes: tuple[int, ...]
    source: State
    target: State
    cut: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepGraph:
    """Edge e leads from state `origin[e]` to `target[e]` by the move `moves[move[e]]`; `number[states[i]]` is i.

    Edges lie in layers, from `layer[k]` to `layer[k + 1]`: one into each of the first states, in their order, which
    begins with those into which most edges lead.
    """

    states: tuple[States, ...]
    number: dict[States, int]
    origin: Ints
    target: Ints
    move: Ints
    moves: tuple[Move, ...]
    layer: tuple[int, ...]


Cuts = tuple[int, ...]
"""For each dim the sets of axes over which it may be cut, as bits: bit m for the axes that are the bits of m."""


@lru_cache(maxsize=4096)
def cuts(sizes: tuple[int, ...], shape: tuple[int, ...]) -> Cuts:
    """The sets of axes of a mesh of `shape` that cut each dim evenly."""
    mesh = Mesh(shape)
    parts = [mesh.extent(_members(m)) for m in range(2 ** len(shape))]
    return tuple(sum(1 << m for m, count in enumerate(parts) if size % count == 0) for size in sizes)


def any_cuts(rank: int, axes: int) -> Cuts:
    """Every set of axes for each of `rank` dims."""
    return (2 ** 2**axes - 1,) * rank


@lru_cache(maxsize=64)
def step_graph(axes: int, allowed: Cuts) -> StepGraph:
    """All states of a tensor whose dims may be cut as `allowed`, and the steps between them."""
    dims = [d for d, sets in enumerate(allowed) if sets > 1]
    options: list[State] = [*dims, *_LOOSE]
    digits = _digits(axes, [allowed[d] for d in dims])
    origin, target, move = (np.concatenate(parts) for parts in zip(*_edges(digits, len(dims)), strict=True))
    order, rank, layer = _layers(target, len(digits))
    _, first, move = np.unique(move, return_index=True, return_inverse=True)
    cut = _mask(digits < len(dims))
    moves = tuple(_move(digits[origin[e]], digits[target[e]], int(cut[origin[e]] & cut[target[e]]), options)
                  for e in first)
    states: list[States] = [()] * len(digits)
    for place, row in zip(rank.tolist(), digits.tolist(), strict=True):
        states[place] = tuple(options[digit] for digit in row)
    return StepGraph(tuple(states), {s: i for i, s in enumerate(states)}, rank[origin[order]], rank[target[order]],
                     move[order], moves, layer)


def _members(bits: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(bits.bit_length()) if bits >> axis & 1)


def _mask(chosen: NDArray[np.bool_]) -> Ints:
    """The axes chosen in each row (states, axes), as bits."""
    return chosen @ (1 << np.arange(chosen.shape[1]))


def _digits(axes: int, allowed: list[int]) -> Ints:
    """Every state as one digit an axis (states, axes): the place of a dim, then R, P and G."""
    found = np.indices((len(allowed) + len(_LOOSE),) * axes).reshape(axes, -1).T
    for digit, sets in enumerate(allowed):
        may = np.array([sets >> m & 1 for m in range(2**axes)], dtype=np.bool_)
        found = found[may[_mask(found == digit)]]
    return found


def _edges(digits: Ints, dims: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Origin, target and the code of the move of all edges, by the axes they move and where to."""
    axes, base = digits.shape[1], dims + len(_LOOSE)
    weight = base ** np.arange(axes)[::-1]
    code = digits @ weight
    place = np.full(base**axes, -1)
    place[code] = np.arange(len(digits))
    cut, kind = _mask(digits < dims), np.where(digits < dims, _ON_DIM, digits - dims)
    for size in range(1, axes + 1):
        for moved in itertools.combinations(range(axes), size):
            before = digits[:, moved[0]]
            behind = [axis for axis in range(moved[0], axes) if axis not in moved]
            together = (digits[:, list(moved)] == before[:, None]).all(1)
            free = together & ~((digits[:, behind] == before[:, None]).any(1) & (before < dims))
            for after in range(base):
                lies = (digits[:, behind] == after).any(1) & (after < dims)
                origin = np.flatnonzero(free & ~lies & (before != after))
                target = place[code[origin] + (after - before[origin]) * weight[list(moved)].sum()]
                origin, target = origin[target >= 0], target[target >= 0]
                kinds = kind[origin, moved[0]] * (_ON_DIM + 1) + (_ON_DIM if after < dims else after - dims)
                bits = sum(1 << axis for axis in moved)
                yield origin, target, ((bits << 4) + kinds << axes) + (cut[origin] & cut[target])


def _layers(target: Ints, states: int) -> tuple[Ints, Ints, tuple[int, ...]]:
    """The order of edges and the new number of each state that `StepGraph` wants, and where its layers begin."""
    entering = np.bincount(target, minlength=states)
    rank = np.empty(states, dtype=np.int64)
    rank[np.argsort(-entering, kind="stable")] = np.arange(states)
    by_target = np.argsort(rank[target], kind="stable")
    ends = rank[target[by_target]]
    depth = np.arange(len(ends)) - np.searchsorted(ends, ends)
    order = by_target[np.lexsort((ends, depth))]
    return order, rank, (0, *np.cumsum(np.bincount(depth)).tolist())


def _move(before: Ints, after: Ints, cut: int, options: list[State]) -> Move:
    axes = tuple(np.flatnonzero(before != after).tolist())
    return Move(axes, options[before[axes[0]]], options[after[axes[0]]], _members(cut))
