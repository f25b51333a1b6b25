"""Plans for clusters whose collectives were measured, with curves that no single line fits."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from autopar.core.cluster import Cluster
from autopar.core.curves import Curve
from autopar.core.measured import Groups, Measured
from autopar.core.reshard import Primitive
from autopar.measure.groups import RUN, partitions
from autopar.planner import Request, solve, verify
from tests.programs import model_context

SLOW = 100.0


def bent(scale: float) -> Curve:
    """Flat, then steep, then less so."""
    return Curve((1e3, 1e4, 1e5, 1e8), (scale * 1e-5, scale * 1.1e-5, scale * 1e-4, scale * 2e-2), 0.04)


@cache
def cluster(slow: Groups = ()) -> Cluster:
    """Four devices with every collective measured; those over `slow` take long."""
    def one(primitive: Primitive, groups: Groups) -> Measured:
        return Measured(primitive, groups, bent(len(groups[0]) * (SLOW if groups == slow else 1.0)))
    found = tuple(one(primitive, groups) for primitive in RUN for groups in partitions(4))
    return dataclasses.replace(Cluster.preset("cpu:4"), collectives=found)


@pytest.mark.parametrize(("mode", "mesh"), [
    ("ddp", (4,)), ("zero2", (4,)), ("zero3", (4,)), ("1d", (4,)), ("zero+1d", (2, 2)), ("2d", (2, 2)), ("auto", None),
])
def test_plans_verify(mode: str, mesh: tuple[int, ...] | None) -> None:
    context = model_context("gpt2")
    plan, _ = solve(context, cluster(), Request("gpt2", mode, mesh, solver="highs"))
    assert verify(plan, context, cluster()) == pytest.approx((plan.seconds.step, plan.memory.total), rel=1e-6)


@pytest.mark.parametrize("slow", [((0, 1), (2, 3)), ((0, 2), (1, 3))])
def test_groups_that_take_long_take_longer(slow: Groups) -> None:
    context, request = model_context("gpt2"), Request("gpt2", "zero+1d", (2, 2), solver="highs")
    fast, hindered = (solve(context, where, request)[0] for where in (cluster(), cluster(slow)))
    assert hindered.seconds.step > fast.seconds.step
