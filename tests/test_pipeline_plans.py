"""Plans with stages: chosen where links are slow, placed where they hurt least, and what they claim verified."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.ranks import HandLayout
from autopar.plan import Plan
from autopar.planner import Request, solve, verify
from tests.programs import model_context


def hosts(count: int, each: int, slow: tuple[int, int] | None = None, rate: float = 3e7) -> Cluster:
    """Hosts of slow devices with slow links between them, those between two of them a hundred times as slow."""
    slow_device = replace(Cluster.preset("cpu:4").devices[0], launch_s=1e-7)
    base = replace(Cluster.preset(f"{count}x{each}xA100-80GB"), devices=(slow_device,) * (count * each))
    rates = tuple(tuple(3e10 if i == j else rate / 100 if slow in ((i, j), (j, i)) else rate for j in range(count))
                  for i in range(count))
    return replace(base, bytes_per_s=rates, uplink_bytes_per_s=(rate,) * count)


@cache
def automatic() -> Plan:
    """The best plan on two slowly linked devices."""
    return solve(model_context("gpt2"), hosts(2, 1), Request("gpt2", solver="highs"))[0]


def test_auto_cuts_into_stages_where_links_are_slow() -> None:
    context, cluster, plan = model_context("gpt2"), hosts(2, 1), automatic()
    alone, _ = solve(context, cluster, Request("gpt2", solver="highs", mesh=(2,)))
    assert plan.stages and plan.step_time_s < alone.step_time_s
    assert verify(plan, context, cluster) == pytest.approx((plan.step_time_s, plan.memory.total), rel=1e-6)
    assert Plan.from_json(plan.to_json()) == plan
    for j in range(len(plan.stages)):
        assert f"stage {j}: {plan.stages[j].first}" in plan.summary()


@pytest.mark.parametrize("mode", ["pp", "pp+zero", "pp+sequence"])
def test_no_mode_is_predicted_faster_than_auto(mode: str) -> None:
    found, _ = solve(model_context("gpt2"), hosts(2, 1), Request("gpt2", mode, solver="highs"))
    assert found.stages and automatic().step_time_s <= found.step_time_s * (1 + 1e-9)


def test_stages_keep_clear_of_a_slow_link() -> None:
    context, cluster = model_context("gpt2"), hosts(4, 1, slow=(0, 1))
    plan, _ = solve(context, cluster, Request("gpt2", "pp", solver="highs", stages=4, micro_batches=4))
    order = [stage.devices[0] for stage in plan.stages]
    assert {0, 1} not in [set(pair) for pair in itertools.pairwise(order)]
    assert verify(plan, context, cluster)[0] == pytest.approx(plan.step_time_s, rel=1e-6)


def test_a_layout_by_hand_is_taken_and_priced_beside_the_solvers() -> None:
    context, cluster = model_context("gpt2"), hosts(2, 2)
    across = HandLayout(((0, 2), (1, 3)), ((0, 1), (2, 3)))  # columns over the slow link, stages inside of hosts
    asked = Request("gpt2", "pp", solver="highs", stages=2, micro_batches=2)
    plans = [solve(context, cluster, replace(asked, layout=layout))[0]
             for layout in (across, HandLayout(((0, 1), (2, 3))), None)]
    assert [plan.pipelining.layout for plan in plans[:2]] == [(0, 1, 2, 3), (0, 2, 1, 3)]
    assert plans[2].step_time_s <= min(plan.step_time_s for plan in plans[:2]) * (1 + 1e-9)
    assert plans[0].step_time_s != pytest.approx(plans[1].step_time_s, rel=1e-3)
    assert verify(plans[1], context, cluster)[0] == pytest.approx(plans[1].step_time_s, rel=1e-6)


def test_stages_recompute_within_a_budget_and_never_exceed_it() -> None:
    context, cluster = model_context("gpt2"), hosts(2, 1)
    asked = Request("gpt2", "pp", solver="highs", stages=2, micro_batches=4)
    free = last = solve(context, cluster, asked)[0]
    for share in (0.9, 0.85):
        plan = solve(context, cluster, replace(asked, memory_budget=share * free.memory.total))[0]
        assert plan.memory.total <= share * free.memory.total and plan.step_time_s >= last.step_time_s * (1 - 1e-9)
        last = plan
    assert last.checkpoints and Plan.from_json(last.to_json()) == last
    assert verify(last, context, cluster)[0] == pytest.approx(last.step_time_s, rel=1e-6)


@pytest.mark.parametrize(("asked", "said"), [
    ({"stages": 4, "layout": HandLayout(((0, 1), (2, 3)))}, "ppranks have 2 ranks each, .* 4 stages; use .* pp=2"),
    ({"stages": 2, "layout": HandLayout(((0, 1), (2, 2)))}, r"ppranks miss ranks \[3\] and repeat \[2\]"),
    ({"mode": "ddp", "layout": HandLayout(((0,), (1,), (2,), (3,)))}, "ppranks have 1 rank each.*leave them out"),
    ({"stages": 3}, "3 stages do not divide the 4 devices .*; use one of 1, 2, 4"),
    ({"stages": 2, "micro_batches": 3}, "does not divide into 3 micro-batches; use a batch of 9, or 2"),
    ({"stages": 2, "mesh": (4,)}, "mesh 4 of a stage has 4 devices, the stages of .* have 2; use another mesh"),
    ({"micro_batches": 2, "mode": "ddp"}, "micro_batches is 2, .* without pp= has no stages .*; give pp="),
    ({"stages": 2, "pins": (("head", "x"),)}, "pins fix head, .*; leave pins out"),
])
def test_what_does_not_fit_is_refused_with_values_and_remedy(asked: dict[str, object], said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        solve(model_context("gpt2"), hosts(2, 2),
              Request("gpt2", **{"mode": "pp", "solver": "highs", **asked}))  # type: ignore[arg-type]
