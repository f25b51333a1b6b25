"""Changes of spec, as the cheapest sequence of one-step conversions.

A step moves some axes together from one state to another. What it does to the value and to the gradient
are two look-ups in one table, the second on the dual states in reverse:

    PRIMITIVE[value before, value after]      forward
    PRIMITIVE[grad after, grad before]        backward
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, State, from_states

Kind = Literal["S", "R", "P"]
Primitive = Literal["identity", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "slice", "mask", "pad"]
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


def local_parts(states: tuple[State, ...], mesh: Mesh) -> int:
    """Into how many parts a tensor in `states` is cut."""
    return math.prod(size for size, state in zip(mesh.shape, states, strict=True) if isinstance(state, int))


@dataclass(frozen=True, slots=True)
class Cargo:
    """What is resharded: bytes of the whole tensor, and whether a gradient comes back."""

    nbytes: float
    differentiable: bool = True


def step_seconds(step: Step, parts: tuple[int, int], cargo: Cargo, price: Price) -> tuple[float, float]:
    """Seconds forward and backward; `parts` into which the tensor is cut before and after."""
    def seconds(primitive: Primitive) -> float:
        return price(primitive, step.axes, cargo.nbytes / min(parts)) if primitive in MOVES_DATA else 0.0
    return seconds(step.forward), seconds(step.backward) if cargo.differentiable else 0.0


def _steps(states: tuple[State, ...], goal: tuple[State, ...]) -> Iterator[tuple[Step, tuple[State, ...]]]:
    """The one-step conversions from `states` that keep every axis in its source, its goal or replicated."""
    axes = range(len(states))
    for size in range(1, len(states) + 1):
        for moved in itertools.combinations(axes, size):
            source = states[moved[0]]
            if any(states[axis] != source for axis in moved) or not _innermost(states, moved):
                continue
            for target in {goal[moved[0]], "R"} - {source}:
                after = tuple(target if axis in moved else states[axis] for axis in axes)
                allowed = target == "R" or all(goal[axis] == target for axis in moved)
                if allowed and _possible(source, target) and _innermost(after, moved):
                    yield Step(moved, source, target), after


def _innermost(states: tuple[State, ...], moved: tuple[int, ...]) -> bool:
    """Whether `moved` are the innermost axes of the dim they shard, so that parts stay contiguous."""
    dim = states[moved[0]]
    if not isinstance(dim, int):
        return True
    return all(axis in moved for axis, state in enumerate(states) if state == dim and axis > moved[0])


def _possible(source: State, target: State) -> bool:
    forward, backward = (_value(source), _value(target)), (_gradient(target), _gradient(source))
    return forward in PRIMITIVE and backward in PRIMITIVE


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


def cheapest_path(source: Spec, target: Spec, mesh: Mesh, cargo: Cargo, price: Price) -> Path:
    """The path from `source` to `target` of fewest seconds, forward and backward together, then fewest steps."""
    return _cheapest(source.states(len(mesh.shape)), target.states(len(mesh.shape)), mesh, cargo, price)


@lru_cache(maxsize=200_000)
def _cheapest(start: tuple[State, ...], goal: tuple[State, ...], mesh: Mesh, cargo: Cargo, price: Price) -> Path:
    order = itertools.count()
    queue = [(0.0, 0, next(order), start, Path((), 0.0, 0.0))]
    done: set[tuple[State, ...]] = set()
    while queue:
        _, _, _, states, path = heapq.heappop(queue)
        if states == goal:
            return path
        if states in done:
            continue
        done.add(states)
        for step, after in _steps(states, goal):
            parts = local_parts(states, mesh), local_parts(after, mesh)
            forward, backward = step_seconds(step, parts, cargo, price)
            longer = Path((*path.steps, step), path.forward + forward, path.backward + backward)
            heapq.heappush(queue, (longer.seconds, len(longer.steps), next(order), after, longer))
    return NO_PATH


def spec_after(step: Step, spec: Spec, axes: int) -> Spec:
    """The spec that `step` leaves."""
    states = spec.states(axes)
    return from_states(tuple(step.target if a in step.axes else states[a] for a in range(axes)), len(spec.dims))
