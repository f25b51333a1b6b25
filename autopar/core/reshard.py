"""Changes of spec, as the cheapest sequence of one-step conversions.

A step moves some axes together from one state to another. What it does to the value and to the gradient
are two look-ups in one table, the second on the dual states in reverse:

    PRIMITIVE[value before, value after]      forward
    PRIMITIVE[grad after, grad before]        backward
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, State, from_states

Kind = Literal["S", "R", "P"]
Primitive = Literal["identity", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "slice", "mask", "pad"]
States = tuple[State, ...]
"""What each axis does to a tensor."""
Price = Callable[[Primitive, tuple[int, ...], float], float]
"""(primitive, axes, bytes of the larger of its two local tensors) -> seconds."""

PRIMITIVE: dict[tuple[Kind, Kind], Primitive] = {
    ("R", "R"): "identity",
    ("P", "P"): "identity",
    ("P", "R"): "all_reduce",
    ("P", "S"): "reduce_scatter",
    ("S", "R"): "all_gather",
    ("S", "S"): "all_to_all",
    ("R", "S"): "slice",
    ("R", "P"): "mask",
    ("S", "P"): "pad",
}
MOVES_DATA: frozenset[Primitive] = frozenset({"all_reduce", "reduce_scatter", "all_gather", "all_to_all"})


@dataclass(frozen=True, slots=True)
class Step:
    """`axes` move together from state `source` to state `target` (dims are indices into the tensor's dims)."""

    axes: tuple[int, ...]
    source: State
    target: State

    @property
    def forward(self) -> Primitive:
        """What happens to the value."""
        return PRIMITIVE[_value(self.source), _value(self.target)]

    @property
    def backward(self) -> Primitive:
        """What happens to the gradient."""
        return PRIMITIVE[_gradient(self.target), _gradient(self.source)]


def _value(state: State) -> Kind:
    return "S" if isinstance(state, int) else "P" if state == "P" else "R"


def _gradient(state: State) -> Kind:
    return "S" if isinstance(state, int) else "P" if state == "G" else "R"


def local_parts(states: States, mesh: Mesh) -> int:
    """Into how many parts a tensor in `states` is cut."""
    return math.prod(size for size, state in zip(mesh.shape, states, strict=True) if isinstance(state, int))


@dataclass(frozen=True, slots=True)
class Cargo:
    """What is resharded: bytes of the whole tensor, whether a gradient comes back, and the sizes of its dims.

    Without `sizes` any dim may be cut into any number of parts on the way.
    """

    nbytes: float
    differentiable: bool = True
    sizes: tuple[int, ...] = ()


def step_seconds(step: Step, parts: tuple[int, int], cargo: Cargo, price: Price) -> tuple[float, float]:
    """Seconds forward and backward; `parts` into which the tensor is cut before and after."""
    def seconds(primitive: Primitive) -> float:
        return price(primitive, step.axes, cargo.nbytes / min(parts)) if primitive in MOVES_DATA else 0.0
    return seconds(step.forward), seconds(step.backward) if cargo.differentiable else 0.0


@dataclass(frozen=True, slots=True)
class Path:
    """The steps of one reshard and their seconds; `seconds` is infinite when there is no way."""

    steps: tuple[Step, ...]
    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        """Forward plus backward."""
        return self.forward + self.backward


NO_PATH = Path((), math.inf, math.inf)
_STEP = 1e-15
"""Seconds a step counts for in the search, so that of equal ways the shortest is found."""


def cheapest_path(source: Spec, target: Spec, mesh: Mesh, cargo: Cargo, price: Price) -> Path:
    """The path from `source` to `target` of fewest seconds, forward and backward together, then fewest steps."""
    axes = len(mesh.shape)
    table = _table(len(source.dims), mesh, cargo, price)
    return _walk(table, source.states(axes), target.states(axes))


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """All pairs: `following[i, j]` is the state after i on the way to j, `steps` the single steps between states."""

    number: dict[States, int]
    states: tuple[States, ...]
    following: NDArray[np.int32]
    steps: dict[tuple[int, int], Path]
    found: dict[tuple[States, States], Path]


def _walk(table: _Table, start: States, goal: States) -> Path:
    """The path from the table, remembered."""
    if (start, goal) not in table.found:
        here, end = table.number[start], table.number[goal]
        path = Path((), 0.0, 0.0)
        while here != end and path is not NO_PATH:
            there = int(table.following[here, end])
            step = table.steps.get((here, there), NO_PATH)
            path = Path((*path.steps, *step.steps), path.forward + step.forward, path.backward + step.backward)
            path, here = (path, there) if step is not NO_PATH else (NO_PATH, end)
        table.found[start, goal] = path
    return table.found[start, goal]


@lru_cache(maxsize=512)
def _table(rank: int, mesh: Mesh, cargo: Cargo, price: Price) -> _Table:
    """Cheapest ways between all specs of a tensor of `rank` dims, by Floyd and Warshall's algorithm."""
    options: list[State] = [*range(rank), "R", "P", "G"]
    states = tuple(s for s in itertools.product(options, repeat=len(mesh.shape)) if _divides(s, mesh, cargo.sizes))
    number = {s: i for i, s in enumerate(states)}
    seconds = np.full((len(states), len(states)), math.inf)
    following = np.tile(np.arange(len(states), dtype=np.int32), (len(states), 1))
    np.fill_diagonal(seconds, 0.0)
    steps: dict[tuple[int, int], Path] = {}
    for before in states:
        for step, after in _steps(before, options):
            if after in number:
                parts = local_parts(before, mesh), local_parts(after, mesh)
                pair = number[before], number[after]
                steps[pair] = Path((step,), *step_seconds(step, parts, cargo, price))
                seconds[pair] = steps[pair].seconds + _STEP
    for middle in range(len(states)):
        through = seconds[:, middle, None] + seconds[None, middle, :]
        better = through < seconds
        np.copyto(seconds, through, where=better)
        np.copyto(following, following[:, middle, None], where=better)
    return _Table(number, states, following, steps, {})


def _divides(states: States, mesh: Mesh, sizes: tuple[int, ...]) -> bool:
    cut: dict[int, int] = {}
    for size, state in zip(mesh.shape, states, strict=True):
        if isinstance(state, int):
            cut[state] = cut.get(state, 1) * size
    return not sizes or all(sizes[dim] % parts == 0 for dim, parts in cut.items())


def _steps(states: States, options: list[State]) -> Iterator[tuple[Step, States]]:
    """The one-step conversions from `states`."""
    axes = range(len(states))
    for size in range(1, len(states) + 1):
        for moved in itertools.combinations(axes, size):
            source = states[moved[0]]
            if any(states[axis] != source for axis in moved) or not _innermost(states, moved):
                continue
            for target in options:
                after = tuple(target if axis in moved else states[axis] for axis in axes)
                if target != source and _possible(source, target) and _innermost(after, moved):
                    yield Step(moved, source, target), after


def _innermost(states: States, moved: tuple[int, ...]) -> bool:
    """Whether `moved` are the innermost axes of the dim they shard, so that parts stay contiguous."""
    dim = states[moved[0]]
    if not isinstance(dim, int):
        return True
    return all(axis in moved for axis, state in enumerate(states) if state == dim and axis > moved[0])


def _possible(source: State, target: State) -> bool:
    forward, backward = (_value(source), _value(target)), (_gradient(target), _gradient(source))
    return forward in PRIMITIVE and backward in PRIMITIVE


def spec_after(step: Step, spec: Spec, axes: int) -> Spec:
    """The spec that `step` leaves."""
    states = spec.states(axes)
    return from_states(tuple(step.target if a in step.axes else states[a] for a in range(axes)), len(spec.dims))
