"""The process groups of a mesh, seen from one rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from autopar.codegen.kept import once
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh

Axes = tuple[int, ...]
Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that differ from this one along some axes only; this one has part `index`.

    `name` is torch's, empty over axes of extent 1, where nothing is ever sent. torch numbers the ranks of a
    group by ascending global rank, whatever the mesh (2.13 can keep an order, 2.11 cannot): part i is with number
    `order[i]`. `axes` are those of the mesh.
    """

    name: str
    index: int
    order: tuple[int, ...]
    axes: Axes = ()

    @property
    def size(self) -> int:
        """The number of ranks, and of parts."""
        return len(self.order)

    @property
    def parts(self) -> tuple[int, ...]:
        """The part that each number of the group has: the inverse of `order`."""
        return tuple(self.order.index(number) for number in range(self.size))


@dataclass(frozen=True, slots=True)
class Communicator:
    """This rank's groups on `mesh`, by axes ascending; none when the rank is not on it."""

    mesh: Mesh
    groups: Mapping[Axes, Group]

    def group(self, axes: Axes) -> Group:
        """The group along `axes`; this rank alone when there are none."""
        if not axes:
            return Group("", 0, (0,))
        assert axes in self.groups, f"no group over axes {axes} of mesh {self.mesh}, only over {list(self.groups)}"
        return self.groups[axes]


def connect(mesh: Mesh, sets: Iterable[Axes] | None = None) -> Communicator:
    """The communicator of this rank, with a group for each of `sets` of axes (all sets when omitted).

    A device of `mesh` is a rank of the default process group, whose backend the groups share. Collective: every rank
    of the world calls it with the same arguments, on the mesh or not. Raises AutoparError without process group, or
    when it is too small.
    """
    if not dist.is_initialized():
        raise AutoparError(f"mesh {mesh} needs {mesh.size} running ranks, found no process group: "
                           "call autopar.init() first")
    if max(mesh.devices) >= dist.get_world_size():
        raise AutoparError(f"mesh {mesh} uses rank {max(mesh.devices)}, the process group has ranks 0 to "
                           f"{dist.get_world_size() - 1}: start as many processes as the plan has devices")
    made: dict[tuple[Ranks, ...], str] = {}
    groups: dict[Axes, Group] = {}
    for axes in _every_set(mesh) if sets is None else sets:
        members = mesh.groups(axes)
        if members not in made:
            made[members] = _start(members)
        mine = next((ranks for ranks in members if dist.get_rank() in ranks), None)
        if mine is not None:
            groups[axes] = _group(made[members], mine, axes)
    return Communicator(mesh, groups)


def _every_set(mesh: Mesh) -> Iterable[Axes]:
    return itertools.chain.from_iterable(itertools.combinations(mesh.axes, n + 1) for n in mesh.axes)


def _start(members: tuple[Ranks, ...]) -> str:
    """Open the process groups of `members`; the name of this rank's, empty if it has none or needs none."""
    if len(members[0]) == 1:
        return ""
    if len(members[0]) == dist.get_world_size():
        return _name(dist.group.WORLD)
    return once(("groups", members),
                lambda: _name(dist.new_subgroups_by_enumeration([list(ranks) for ranks in members])[0]))


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


def _group(name: str, ranks: Ranks, axes: Axes) -> Group:
    numbers = sorted(ranks)
    return Group(name, ranks.index(dist.get_rank()), tuple(numbers.index(rank) for rank in ranks), axes)
