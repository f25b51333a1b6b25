"""Changes of spec, as the cheapest sequence of one-step conversions.

A step moves some axes together from one state to another. What it does to the value and to the gradient
are two look-ups in one table, the second on the dual states in reverse:

    PRIMITIVE[value before, value after]      forward
    PRIMITIVE[grad after, grad before]        backward
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from autopar.core.mesh import Mesh
from autopar.core.routes import Routes
from autopar.core.spec import Spec, State, from_states
from autopar.core.steps import Cuts, StepGraph, any_cuts, cuts, step_graph

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


@dataclass(frozen=True, slots=True)
class Cargo:
    """What is resharded: bytes of the whole tensor, whether a gradient comes back, and the sizes of its dims.

    Without `sizes` any dim may be cut into any number of parts on the way.
    """

    nbytes: float
    differentiable: bool = True
    sizes: tuple[int, ...] = ()


def step_seconds(step: Step, parts: int, cargo: Cargo, price: Price) -> tuple[float, float]:
    """Seconds forward and backward; `parts` into which the tensor is cut where it is larger, before or after."""
    def seconds(primitive: Primitive) -> float:
        return price(primitive, step.axes, cargo.nbytes / parts) if primitive in MOVES_DATA else 0.0
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


def cheapest_path(source: Spec, target: Spec, mesh: Mesh, cargo: Cargo, price: Price) -> Path:
    """The path from `source` to `target` of fewest seconds, forward and backward together, then fewest steps."""
    axes = len(mesh.shape)
    found = routes(len(source.dims), mesh, cargo, price)
    edges = found.edges(source.states(axes), target.states(axes))
    if edges is None:
        return NO_PATH
    steps = tuple(_step(found.graph, edge) for edge in edges)
    return Path(steps, float(found.forward[edges].sum()), float(found.backward[edges].sum()))


def routes(rank: int, mesh: Mesh, cargo: Cargo, price: Price) -> Routes:
    """The cheapest paths between all specs of a tensor of `rank` dims, as states of axes."""
    axes = len(mesh.shape)
    allowed = cuts(cargo.sizes, mesh.shape) if cargo.sizes else any_cuts(rank, axes)
    return _routes(allowed, mesh, cargo.nbytes, cargo.differentiable, price)


@lru_cache(maxsize=128)
def _routes(allowed: Cuts, mesh: Mesh, nbytes: float, differentiable: bool, price: Price) -> Routes:
    """`routes` of any tensor whose dims may be cut as `allowed`."""
    graph, cargo = step_graph(len(mesh.shape), allowed), Cargo(nbytes, differentiable)
    seconds = [step_seconds(Step(move.axes, move.source, move.target), mesh.extent(move.cut), cargo, price)
               for move in graph.moves]
    forward, backward = np.array(seconds).T
    return Routes(graph, forward[graph.move], backward[graph.move])


def _step(graph: StepGraph, edge: int) -> Step:
    before, after = graph.states[graph.origin[edge]], graph.states[graph.target[edge]]
    axes = graph.moves[graph.move[edge]].axes
    return Step(axes, before[axes[0]], after[axes[0]])


def spec_after(step: Step, spec: Spec, axes: int) -> Spec:
    """The spec that `step` leaves."""
    states = spec.states(axes)
    return from_states(tuple(step.target if a in step.axes else states[a] for a in range(axes)), len(spec.dims))
