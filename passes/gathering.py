"""What it costs to bring parameters from how they rest to how ops want them.

The gathers and gradient sums of a segment travel together, so each of its parameters pays its bytes at the rate of a
large message, whatever its own size, and an equal share of the latency. That is the latency over all axes, whichever it
travels over: what takes its own way saves the others nothing. What is left to do from spec to spec is done, and priced,
as any reshard: in line with what waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from autopar.core.mesh import Mesh
from autopar.core.reshard import Cargo, Price, Primitive, routes
from autopar.core.routes import Seconds
from autopar.core.spec import Spec
from autopar.core.steps import States
from autopar.passes.strategies import Storage

Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Together:
    """How parameters travel: gradient bytes over parameter bytes, the share of a collective's latency of each, and how
    often a step gathers those that are not kept."""

    reduce_scale: float
    latency_share: float
    times: int = 1


def latency_share(parameters: int) -> float:
    """The share of each of so many parameters of a segment."""
    return 1.0 / max(1, parameters)


LARGE_BYTES = 2.0**26
"""The bytes of a message that is large, about those of a segment's parameters."""


def shared_seconds(price: Price, mesh: Mesh, primitive: Primitive, axes: Axes, nbytes: float, share: float) -> float:
    """Seconds of part of a large collective over `axes`, which pays a `share` of the latency of one over all axes.

    Linear in bytes, so that parts come to the whole whatever the curve of seconds by bytes.
    """
    if not axes:
        return 0.0
    latency = share * price(primitive, tuple(mesh.axes), 0.0)
    s_per_byte = (price(primitive, axes, 2.0 * LARGE_BYTES) - price(primitive, axes, LARGE_BYTES)) / LARGE_BYTES
    return s_per_byte * nbytes + latency


Pair = tuple[Seconds, Seconds]
"""Seconds forward and backward."""


@dataclass(frozen=True, slots=True)
class Travel:
    """Seconds of a parameter by how it rests: of the gathers and scattered sums that all share who read it in a segment
    (stored, 1), of the sums over further axes (stored, targets), and of the reshards that are left (stored, targets),
    which do not hide. `summed[i][j]` are those axes of storage i and target j: what is summed over the same axes is
    summed once."""

    gathers: Pair
    sums: Pair
    inline: Pair
    summed: tuple[tuple[Axes, ...], ...]

    @property
    def hidden(self) -> Pair:
        """What may hide, for a target alone."""
        return self.gathers[0] + self.sums[0], self.gathers[1] + self.sums[1]


def parameter_seconds(stored: Sequence[Storage], targets: Sequence[States], cargo: Cargo, mesh: Mesh, price: Price,
                      together: Together) -> Travel:
    """What brings a parameter from each storage to each target.

    A gathered parameter is gathered again in the backward unless it is kept. Its gradient is scattered before it is
    summed over further axes, which then have a part of it to sum.
    """
    bandwidth = _bandwidth(cargo, mesh, price, together)
    partial = [tuple(axis for axis, state in enumerate(states) if state == "G") for states in targets]
    asked = {axes: i for i, axes in enumerate(dict.fromkeys(partial))}
    starts: dict[States, int] = {}
    row, found = np.zeros((len(stored), len(asked)), dtype=np.intp), []
    forward, backward, sums = np.zeros((len(stored), 1)), np.zeros((len(stored), 1)), np.zeros(row.shape)
    for i, storage in enumerate(stored):
        used, axes = storage.used(cargo.differentiable), storage.gathered
        parts = math.prod(size for size, state in zip(mesh.shape, used, strict=True) if isinstance(state, int))
        gather = bandwidth("all_gather", axes, parts)
        again = 0.0 if storage.kept else together.times * gather
        forward[i] = gather if storage.kept else again
        backward[i] = again + bandwidth("reduce_scatter", axes, parts) if cargo.differentiable else 0.0
        for j, wanted in enumerate(asked):
            summed = tuple(axis for axis in wanted if used[axis] == "R")
            sums[i, j] = bandwidth("all_reduce", summed, parts * mesh.extent(axes))
            start = tuple("G" if axis in summed else state for axis, state in enumerate(used))
            row[i, j] = starts.setdefault(start, len(starts))
        found.append(tuple(tuple(axis for axis in wanted if used[axis] == "R") for wanted in partial))
    way = routes(len(cargo.sizes), mesh, cargo, price).seconds(list(starts), targets)
    column = [asked[axes] for axes in partial]
    taken = row[:, column], np.arange(len(targets))
    return Travel((forward, backward), (np.zeros((len(stored), len(targets))), sums[:, column]),
                  (way[0][taken], way[1][taken]), tuple(found))


def _bandwidth(cargo: Cargo, mesh: Mesh, price: Price, together: Together) -> Callable[[Primitive, Axes, int], float]:
    """Seconds of a collective of a parameter that is cut into so many parts besides."""
    @cache
    def seconds(primitive: Primitive, axes: Axes, parts: int) -> float:
        nbytes = cargo.nbytes / parts * (1.0 if primitive == "all_gather" else together.reduce_scale)
        return shared_seconds(price, mesh, primitive, axes, nbytes, together.latency_share)
    return seconds


def replicated_axes(start: Spec, target: Spec) -> Axes:
    """The axes on which a replicated parameter's gradients are partial and have to be summed."""
    return tuple(axis for axis in target.grad_partial if start.state(axis) == "R")


def with_summed(spec: Spec, axes: Axes) -> Spec:
    """`spec` on the far side of the sum of gradients over `axes`."""
    return Spec(spec.dims, spec.partial, tuple(sorted({*spec.grad_partial, *axes})))
