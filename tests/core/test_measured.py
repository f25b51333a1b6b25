"""Measured collectives: which groups they stand for, what meshes are priced by them, and files."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from autopar.core.cluster import Cluster
from autopar.core.curves import Curve
from autopar.core.errors import AutoparError
from autopar.core.measured import Groups, Measured
from autopar.core.mesh import Mesh
from autopar.core.reshard import Primitive

PAIRS: Groups = ((0, 1), (2, 3))
ALL: Groups = ((0, 1, 2, 3),)
CURVE = Curve((1e3, 1e6, 1e8), (5e-5, 1e-4, 9e-3), 0.01)


def measured(*found: tuple[Primitive, Groups, Curve]) -> Cluster:
    """Four GPUs of one host that were measured so."""
    return dataclasses.replace(Cluster.preset("4xH100"), collectives=tuple(Measured(*each) for each in found))


def test_what_was_measured_is_what_it_costs() -> None:
    cluster = measured(("all_reduce", PAIRS, CURVE))
    for nbytes in (0.0, 1e3, 5e5, 1e8, 1e9):
        assert cluster.collective_seconds("all_reduce", Mesh((2, 2)), (1,), nbytes) == CURVE.seconds(nbytes)


def test_groups_are_the_same_in_any_order() -> None:
    cluster = measured(("all_reduce", ((3, 2), (1, 0)), CURVE))
    assert cluster.collectives[0].groups == PAIRS
    turned = Mesh((2, 2), (2, 0, 3, 1))
    assert cluster.collective_seconds("all_reduce", turned, (0,), 1e6) == CURVE.seconds(1e6)


@pytest.mark.parametrize("primitive", ["all_gather", "reduce_scatter"])
def test_other_collectives_are_the_model_s(primitive: Primitive) -> None:
    cluster, plain = measured(("all_reduce", PAIRS, CURVE)), Cluster.preset("4xH100")
    found, wanted = (c.collective_seconds(primitive, Mesh((2, 2)), (1,), 1e6) for c in (cluster, plain))
    assert found == wanted


def test_other_groups_are_the_model_s_as_it_agrees_with_what_was_measured() -> None:
    cluster, plain = measured(("all_reduce", PAIRS, CURVE)), Cluster.preset("4xH100")
    def cost(where: Cluster, mesh: Mesh, axes: tuple[int, ...], nbytes: float) -> float:
        return where.collective_seconds("all_reduce", mesh, axes, nbytes)
    latency = CURVE.fixed_s / cost(plain, Mesh((2, 2)), (1,), 0.0)
    slope = CURVE.s_per_byte / (cost(plain, Mesh((2, 2)), (1,), 1.0) - cost(plain, Mesh((2, 2)), (1,), 0.0))
    for nbytes in (0.0, 1e8):
        modelled = cost(plain, Mesh((4,)), (0,), nbytes) - cost(plain, Mesh((4,)), (0,), 0.0)
        wanted = latency * cost(plain, Mesh((4,)), (0,), 0.0) + slope * modelled
        assert cost(cluster, Mesh((4,)), (0,), nbytes) == pytest.approx(wanted, rel=1e-6)


def test_groups_within_hosts_and_across_are_corrected_apart() -> None:
    within, across = Curve((1e3, 1e8), (1e-5, 1e-3)), Curve((1e3, 1e8), (4e-5, 1e-1))
    hosts = dataclasses.replace(Cluster.preset("2x2xH100"), collectives=(
        Measured("all_reduce", PAIRS, within), Measured("all_reduce", ((0, 2), (1, 3)), across)))
    assert hosts.collective_seconds("all_reduce", Mesh((2,), (0, 3)), (0,), 0.0) == pytest.approx(across.fixed_s)
    assert hosts.collective_seconds("all_reduce", Mesh((2,), (0, 1)), (0,), 0.0) == pytest.approx(within.fixed_s)


def test_groups_of_one_cost_nothing() -> None:
    cluster = measured(("all_reduce", ALL, CURVE))
    assert cluster.collective_seconds("all_reduce", Mesh((4, 1)), (1,), 1e6) == 0.0
    assert cluster.collective_seconds("all_reduce", Mesh((4, 1)), (), 1e6) == 0.0


def test_files_hold_what_was_measured() -> None:
    cluster = measured(("all_reduce", PAIRS, CURVE), ("all_to_all", ALL, CURVE))
    assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster
    assert cluster.key() != Cluster.preset("4xH100").key()


@pytest.mark.parametrize(("changed", "message"), [
    ({"primitive": "broadcast"}, "unknown collective 'broadcast'; known: all_gather"),
    ({"primitive": 3}, "'primitive' is 3"),
    ({"groups": [[0, 1], [2, 4]]}, "name devices 0 to 4, the cluster has 0 to 3"),
    ({"groups": [[0, 1], [1, 2]]}, "name each device once"), ({"groups": [[0], [1]]}, "groups of one size, at least 2"),
    ({"groups": [[0, 1], [2]]}, "groups of one size"), ({"groups": []}, "groups of one size"),
    ({"groups": [[0, "1"]]}, r"groups\[0\]\[1\] is '1'"), ({"groups": [3]}, r"groups\[0\] is 3"),
    ({"knot_s": [1e-5]}, "3 knot_bytes and 1 knot_s"), ({"knot_s": [1e-5, 1.0, 0.5]}, "never fall"),
    ({"misfit": None}, "'misfit' is None"),
])
def test_malformed_files_are_refused(changed: dict[str, Any], message: str) -> None:
    data = json.loads(json.dumps(measured(("all_reduce", PAIRS, CURVE)).to_json()))
    data["collectives"][0].update(changed)
    with pytest.raises(AutoparError, match=message):
        Cluster.from_json(data)


def test_nothing_is_measured_twice() -> None:
    with pytest.raises(AutoparError, match=r"all_reduce over groups \[\[0, 1\], \[2, 3\]\] is there 2 times"):
        measured(("all_reduce", PAIRS, CURVE), ("all_reduce", ((2, 3), (0, 1)), CURVE))


def test_files_of_before_are_refused_with_the_reason() -> None:
    with pytest.raises(AutoparError, match="'autopar cluster 1', needed is 'autopar cluster 2', which tells"):
        Cluster.from_json({"format": "autopar cluster 1"})
