"""The partitions of ranks that axes of meshes can make."""

from __future__ import annotations

import itertools

import pytest

from autopar.core.measured import parted
from autopar.core.mesh import Mesh, mesh_shapes
from autopar.core.reshard import MOVES_DATA
from autopar.measure.groups import RUN, partitions


def test_of_four() -> None:
    assert partitions(4) == (((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3)))


def test_of_two_and_three() -> None:
    assert partitions(2) == (((0, 1),),)
    assert partitions(3) == (((0, 1, 2),),)


@pytest.mark.parametrize(("ranks", "count"), [(8, 7), (6, 5), (16, 15)])
def test_each_once_and_every_mesh_s(ranks: int, count: int) -> None:
    found = partitions(ranks)
    assert len(found) == len(set(found)) == count
    for shape in mesh_shapes(ranks, 3):
        for size in range(1, len(shape) + 1):
            for axes in itertools.combinations(range(len(shape)), size):
                assert parted(Mesh(shape).groups(axes)) in found


def test_every_collective_is_measured() -> None:
    assert RUN.keys() == MOVES_DATA
