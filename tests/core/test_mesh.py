"""Meshes: coordinates, groups and shapes against their definitions."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh, mesh_shapes, parse_mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """Up to 3 axes of up to 3 devices, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    return Mesh(shape, tuple(draw(st.permutations(range(math.prod(shape))))))


@given(meshes())
def test_devices_fill_the_grid_in_row_major_order(mesh: Mesh) -> None:
    cells = list(itertools.product(*map(range, mesh.shape)))
    assert [mesh.coordinate(device) for device in mesh.devices] == cells


@given(meshes(), st.data())
def test_groups_differ_along_their_axes_only(mesh: Mesh, data: st.DataObject) -> None:
    axes = tuple(sorted(data.draw(st.sets(st.sampled_from(list(mesh.axes))))))
    groups = mesh.groups(axes)
    assert sorted(itertools.chain(*groups)) == sorted(mesh.devices)
    for group in groups:
        cells = [mesh.coordinate(device) for device in group]
        assert len({tuple(c for axis, c in enumerate(cell) if axis not in axes) for cell in cells}) == 1
        along = [tuple(cell[axis] for axis in axes) for cell in cells]
        assert along == list(itertools.product(*(range(mesh.shape[axis]) for axis in axes)))
        assert len(group) == mesh.extent(axes)


@pytest.mark.parametrize(("axes", "groups"), [
    ((), ((0,), (1,), (2,), (3,), (4,), (5,))),
    ((0,), ((0, 3), (1, 4), (2, 5))),
    ((1,), ((0, 1, 2), (3, 4, 5))),
    ((0, 1), ((0, 1, 2, 3, 4, 5),)),
])
def test_groups_of_a_2x3_mesh(axes: tuple[int, ...], groups: tuple[tuple[int, ...], ...]) -> None:
    assert Mesh((2, 3)).groups(axes) == groups


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_text_reads_back(shape: list[int]) -> None:
    mesh = Mesh(tuple(shape))
    assert parse_mesh(str(mesh)) == mesh


@pytest.mark.parametrize("text", ["", "x", "4x", "4x-2", "4x2.0", "0x2", "four", "4*2", "4x\N{SUPERSCRIPT TWO}"])
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(AutoparError, match="mesh"):
        parse_mesh(text)


@pytest.mark.parametrize(("shape", "devices"), [
    ((), ()), ((2, 0), ()), ((2,), (0,)), ((2,), (1, 1)), ((2,), (0, 1, 2)),
])
def test_bad_grid_is_refused(shape: tuple[int, ...], devices: tuple[int, ...]) -> None:
    with pytest.raises(AutoparError, match="mesh"):
        Mesh(shape, devices)


@pytest.mark.parametrize("devices", [2, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("most_axes", [1, 2, 3])
def test_mesh_shapes_are_all_factorings(devices: int, most_axes: int) -> None:
    factors = range(2, devices + 1)
    wanted = [shape for axes in range(1, most_axes + 1) for shape in itertools.product(factors, repeat=axes)
              if math.prod(shape) == devices]
    assert sorted(mesh_shapes(devices, most_axes)) == sorted(wanted)


def test_one_device_is_a_mesh_of_one_axis() -> None:
    assert mesh_shapes(1, 3) == ((1,),)
