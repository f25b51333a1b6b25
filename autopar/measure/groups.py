"""The collectives of every partition of the ranks that sets of axes of a mesh can make, all groups of it at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor

from autopar.codegen import private
from autopar.core.curves import Curve
from autopar.core.measured import Groups, Measured, parted
from autopar.core.mesh import Mesh, mesh_shapes
from autopar.core.reshard import Primitive
from autopar.measure.crew import PATIENCE, Crew
from autopar.measure.fit import fitted
from autopar.passes.modes import MOST_AXES

Run = Callable[[Tensor, int, str], object]


def _all_reduce(x: Tensor, ranks: int, group: str) -> object:
    return private.all_reduce(x, group)


def _all_gather(x: Tensor, ranks: int, group: str) -> object:
    return private.all_gather(x[:len(x) // ranks], ranks, group)


def _reduce_scatter(x: Tensor, ranks: int, group: str) -> object:
    return private.reduce_scatter(x, ranks, group)


def _all_to_all(x: Tensor, ranks: int, group: str) -> object:
    return private.all_to_all(x.view(ranks, -1), ranks, group)


RUN: dict[Primitive, Run] = {"all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter,
                             "all_to_all": _all_to_all}
"""What the runtime calls, on the larger of the two local tensors, flat and a multiple of the ranks."""


def partitions(ranks: int) -> tuple[Groups, ...]:
    """Every partition into groups of two ranks or more that a set of axes of some mesh makes of the ranks in order."""
    meshes = [Mesh(shape) for shape in mesh_shapes(ranks, MOST_AXES)]
    found = (parted(mesh.groups(axes)) for mesh in meshes for size in mesh.axes
             for axes in itertools.combinations(mesh.axes, size + 1))
    return tuple(sorted(dict.fromkeys(found), key=lambda groups: (len(groups), groups)))


def collectives(crew: Crew, groups: Groups, done: Callable[[], None]) -> list[Measured]:
    """Every primitive over `groups`; `done` after each. Collective."""
    mine, _ = dist.new_subgroups_by_enumeration([list(group) for group in groups], timeout=PATIENCE)
    assert mine is not None
    found = []
    for primitive in RUN:
        curve = _curve(crew, primitive, len(groups[0]), mine.group_name)
        found.append(Measured(primitive, groups, curve))
        done()
    crew.meet()
    dist.destroy_process_group(mine)
    return found


def _curve(crew: Crew, primitive: Primitive, ranks: int, group: str) -> Curve:
    def call_of(nbytes: int) -> Callable[[], object]:
        tensor = crew.noise(nbytes)
        return partial(RUN[primitive], tensor[:len(tensor) // ranks * ranks], ranks, group)
    return fitted(crew.points(crew.effort.group_bytes, call_of))
