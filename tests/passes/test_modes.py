"""Modes on meshes of one to four axes, each condition written out a second time."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import cache

import pytest

from autopar.api import arguments
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, UnknownName
from autopar.core.mesh import Mesh
from autopar.passes.capture import capture
from autopar.passes.decision import Context
from autopar.passes.modes import MODES, MOST_AXES, mode_called
from autopar.plan import Plan
from autopar.planner import Request, prepare, solve, verify
from tests.builders import mlp

Shape = tuple[int, ...]
ONE_KIND = ("auto", "ddp", "zero1", "zero2", "zero3", "1d", "sequence", "pp", "pp+zero", "pp+sequence")
TAKES: dict[str, Callable[[Shape], bool]] = {
    **dict.fromkeys(ONE_KIND, lambda _: True),
    "zero+1d": lambda shape: len(shape) == 2 and min(shape) > 1,
    "2d": lambda shape: len(shape) == 2 and shape[0] == shape[1] > 1,
    "2.5d": lambda shape: len(shape) == 3 and shape[1] == shape[2] > 1,
    "3d": lambda shape: len(shape) == 3 and shape[0] == shape[1] == shape[2] > 1,
    "pp1d": lambda shape: len(shape) == 2 and shape[1] > 1,
}
TAKES |= {f"pp{mode}": TAKES[mode] for mode in ("2d", "2.5d", "3d")}
ALONE = [mode for mode in MODES if not MODES[mode].staged]
SHAPES = [shape for axes in range(1, 5) for shape in itertools.product(range(1, 5), repeat=axes)]


def test_every_mode_is_tried() -> None:
    assert set(TAKES) == set(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_takes_the_meshes_it_is_defined_on(mode: str) -> None:
    for shape in SHAPES:
        if TAKES[mode](shape):
            assert len(MODES[mode].on(shape)) == len(shape)
        else:
            said = f"{'x'.join(map(str, shape))} of {math.prod(shape)}"
            with pytest.raises(AutoparError, match=rf"mode {re.escape(mode)} wants .*, not a mesh {said}; use "):
                MODES[mode].on(shape)


def grids(mode: str, devices: int) -> set[Shape]:
    """All meshes of two and three axes on so many devices that a mode takes."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    return {shape for axes in (2, 3) for shape in itertools.product(divisors, repeat=axes)
            if math.prod(shape) == devices and TAKES[mode](shape)}


@pytest.mark.parametrize("mode", MODES)
def test_shapes_that_are_searched_are_those_it_takes(mode: str) -> None:
    """Modes of one kind of axis search fewer than they take."""
    for devices in range(1, 70):
        if mode in ONE_KIND:
            assert all(math.prod(shape) == devices for shape in MODES[mode].shapes_for(devices))
        elif wanted := grids(mode, devices):
            assert set(MODES[mode].shapes_for(devices)) == wanted
        else:
            with pytest.raises(AutoparError, match=rf"{re.escape(mode)} wants .*, the cluster has {devices}; use "):
                MODES[mode].shapes_for(devices)


@pytest.mark.parametrize(("mode", "mesh", "message"), [
    ("2d", (2, 4), "mode 2d wants q x q devices (4, 9, 16, ...), not a mesh 2x4 of 8; use 4 devices (2x2) or 9 devices "
                   "(3x3), or another mode"),
    ("2d", (16,), "mode 2d wants q x q devices (4, 9, 16, ...), not a mesh 16 of 16; use mesh 4x4, or another mode"),
    ("2.5d", (2, 4, 2), "mode 2.5d wants depth x q x q devices (4, 8, 12, ...), not a mesh 2x4x2 of 16; use mesh 4x2x2 "
                        "or 1x4x4, or another mode"),
    ("3d", (2, 2), "mode 3d wants q x q x q devices (8, 27, 64, ...), not a mesh 2x2 of 4; use 8 devices (2x2x2), or "
                   "another mode"),
    ("zero+1d", (2, 2, 2), "mode zero+1d wants two axes, so a number of devices that is no prime, not a mesh 2x2x2 of "
                           "8; use mesh 2x4 or 4x2, or another mode"),
    ("ddp", (2, 2, 2, 2, 2), "mesh 2x2x2x2x2 has 5 axes, a mesh has 1 to 4; join some, such as 16x2"),
])
def test_a_mesh_that_does_not_fit_is_refused_with_values_and_remedy(mode: str, mesh: Shape, message: str) -> None:
    with pytest.raises(AutoparError) as refusal:
        mode_called(mode).on(mesh)
    assert str(refusal.value) == message


@pytest.mark.parametrize(("mode", "devices", "message"), [
    ("2d", 8, "the cluster has 8; use 4 devices (2x2) or 9 devices (3x3), or another mode"),
    ("2.5d", 2, "the cluster has 2; use 4 devices (1x2x2), or another mode"),
    ("3d", 1, "the cluster has 1; use 8 devices (2x2x2), or another mode"),
    ("3d", 64**3 - 1, "use 250047 devices (63x63x63) or 262144 devices (64x64x64), or another mode"),
    ("zero+1d", 7, "use 6 devices (2x3 or 3x2) or 8 devices (2x4 or 4x2), or another mode"),
])
def test_a_number_of_devices_that_does_not_fit_is_refused(mode: str, devices: int, message: str) -> None:
    with pytest.raises(AutoparError) as refusal:
        mode_called(mode).shapes_for(devices)
    assert str(refusal.value).endswith(message)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(UnknownName, match="unknown mode '4d'"):
        mode_called("4d")


MESHES = [(8,), (4, 2), (2, 2, 2), (2, 2, 2, 2), (2, 2), (1, 2, 2)]


@cache
def perceptron() -> Context:
    """Its batch of 16 divides over 16 devices."""
    case = mlp(16)
    return prepare(capture(case.model, arguments(case.inputs), "fp32", case.loss_fn))


@cache
def planned(mode: str, mesh: Shape) -> Plan:
    return solve(perceptron(), Cluster.preset(f"cpu:{Mesh(mesh).size}"), Request("mlp", mode, mesh, solver="highs"))[0]


SLOW = {(mode, (2, 2, 2, 2)) for mode in ("auto", "1d", "sequence")}


@pytest.mark.parametrize(("mode", "mesh"), [
    pytest.param(mode, mesh, marks=pytest.mark.slow if (mode, mesh) in SLOW else (), id=f"{mode}-{Mesh(mesh)}")
    for mode in ALONE for mesh in MESHES if TAKES[mode](mesh)])
def test_plans_on_one_to_four_axes_verify(mode: str, mesh: Shape) -> None:
    plan = planned(mode, mesh)
    assert plan.mesh == mesh and len(mesh) <= MOST_AXES
    found = verify(plan, perceptron(), Cluster.preset(f"cpu:{Mesh(mesh).size}"))
    assert found == pytest.approx((plan.step_time_s, plan.memory.total), rel=1e-6)
    if ("auto", mesh) not in SLOW:
        assert planned("auto", mesh).step_time_s <= plan.step_time_s * (1 + 1e-9)


@pytest.mark.parametrize("mesh", [(8,), (2, 2)], ids=str)
def test_zero1_decides_as_zero2(mesh: Shape) -> None:
    first, second = planned("zero1", mesh), planned("zero2", mesh)
    assert (first.ops, first.parameters, first.seconds, first.memory) == (
        second.ops, second.parameters, second.seconds, second.memory)
    assert {p.storage for p in first.parameters} == {",".join("K" for _ in mesh)}
