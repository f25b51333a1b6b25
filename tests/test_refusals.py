"""Why no mesh shape has a plan: one short line with the least budget, the shape that reaches it and the remedy."""

from __future__ import annotations

import pytest

from autopar.core.errors import AutoparError, Infeasible
from autopar.core.mesh import Mesh
from autopar.passes.pins import PinRefused
from autopar.refusals import merged

ONE, TWO, THREE = Mesh((8,)), Mesh((4, 2)), Mesh((2, 4))
PINS = (("up", "S0R = S0R X RR"),)
REMEDY = "raise the budget, use more devices or a smaller batch"


@pytest.mark.parametrize(("refusals", "pins", "least", "said"), [
    ([(ONE, Infeasible("long", 5 * 2**30))], (), 5 * 2**30,
     f"needs 5.000 GiB (5368709120 bytes) a device on mesh 8, the budget is 1.000 MiB (1048576 bytes); {REMEDY}"),
    ([(ONE, Infeasible("a", 7e6)), (TWO, Infeasible("b", 3e6)), (THREE, Infeasible("c", 4e6))], (), 3e6,
     f"needs 2.861 MiB (3000000 bytes) a device on mesh 4x2, the least of 3 mesh shapes, the budget is 1.000 MiB "
     f"(1048576 bytes); {REMEDY}"),
    ([(ONE, Infeasible("no way")), (TWO, Infeasible("b", 900.0))], PINS, 900.0,
     f"with up pinned to S0R = S0R X RR: needs 900 bytes a device on mesh 4x2, the least of 2 mesh shapes, the budget "
     f"is 1.000 MiB (1048576 bytes); {REMEDY}"),
    ([(ONE, PinRefused("up can't")), (TWO, Infeasible("no way"))], PINS, None,
     "with up pinned to S0R = S0R X RR: mesh 4x2: no way; no plan on 8 either"),
    ([(ONE, Infeasible("no way"))], (), None, "mesh 8: no way"),
])
def test_infeasible(refusals: list[tuple[Mesh, AutoparError]], pins: tuple[tuple[str, str], ...], least: float | None,
                    said: str) -> None:
    found = merged(refusals, pins, 2.0**20)
    assert isinstance(found, Infeasible)
    assert (str(found), found.least_budget_bytes) == (said, least)


def test_pins_that_no_shape_takes() -> None:
    refused: list[tuple[Mesh, AutoparError]] = [(mesh, PinRefused("op up can't be S9")) for mesh in (ONE, TWO, THREE)]
    found = merged(refused, PINS, 1.0)
    assert not isinstance(found, Infeasible)
    assert str(found) == "mesh 8: op up can't be S9; no plan on 4x2, 2x4 either"
    assert str(merged(refused * 2, PINS, 1.0)) == "mesh 8: op up can't be S9; no plan on 4x2, 2x4, 8 and 2 more either"
