"""A plan's ops as lines: what is alike once, parameters told where they rest cut."""

from __future__ import annotations

from functools import cache

import pytest

from autopar.core.cluster import Cluster
from autopar.listing import listing
from autopar.plan import Plan
from autopar.planned import PlannedOp, PlannedParameter
from autopar.planner import Request, solve
from tests.programs import model_context


def ops(*given: tuple[str, str, str]) -> list[PlannedOp]:
    """(name, segment, strategy) of each; the assignment is the strategy's first letters."""
    return [PlannedOp(name, segment, (strategy[:2],), strategy) for name, segment, strategy in given]


def layers(*strategies: str) -> list[PlannedOp]:
    return ops(*((f"h_{i}_fc", f"h_{i}", strategy) for i, strategy in enumerate(strategies)))


def weights(*found: tuple[str, str, str]) -> list[PlannedParameter]:
    return [PlannedParameter(*each) for each in found]


def test_layers_alike_print_once() -> None:
    assert listing(layers("S0R", "S0R", "S0R"), []) == "h_0 to h_2, 3 layers alike:\nh_0_fc  S0R"


def test_a_layer_apart_breaks_a_run() -> None:
    assert listing(layers("S0R", "S0R", "RR", "S0R"), []).splitlines() == [
        "h_0 to h_1, 2 layers alike:", "h_0_fc  S0R", "h_2_fc  RR", "h_3_fc  S0R"]


def test_what_prints_alike_but_is_assigned_otherwise_is_apart() -> None:
    first, second = layers("S0R", "S0R")
    other = PlannedOp(second.name, second.segment, ("e1",), second.strategy)
    assert listing([first, other], []).splitlines() == ["h_0_fc  S0R", "h_1_fc  S0R"]


def test_parameters_that_rest_otherwise_keep_layers_apart() -> None:
    found = listing(layers("S0R", "S0R"), weights(("h.0.fc.weight", "Z", "S0R"), ("h.1.fc.weight", "R", "RR")))
    assert found.splitlines() == ["h_0_fc  S0R  weight S0R (Z0) at rest", "h_1_fc  S0R"]


@pytest.mark.parametrize(("storage", "spec", "told"), [
    ("Z", "S0R", "weight S0R (Z0) at rest"),
    ("K,R", "S0R", "weight S0R (K0) at rest"),
    ("Z,Z", "S01R", "weight S01R (Z01) at rest"),
    ("0,Z", "S0S1", "weight S0S1 (Z1) at rest"),
    ("0,1", "S0S1", "weight S0S1 at rest"),
    ("R,R", "RR", ""),
    ("R", "", ""),
])
def test_how_a_parameter_rests(storage: str, spec: str, told: str) -> None:
    found = listing(layers("S0R"), weights(("h.0.fc.weight", storage, spec)))
    assert found == f"h_0_fc  S0R  {told}".rstrip()


def test_parameters_of_a_module_that_rest_alike_are_told_together() -> None:
    found = listing(layers("S0R"), weights(("h.0.fc.weight", "Z", "S0"), ("h.0.fc.bias", "Z", "S0")))
    assert found == "h_0_fc  S0R  weight and bias S0 (Z0) at rest"


def test_parameters_of_no_op_follow() -> None:
    found = listing(layers("S0R"), weights(("embeddings.position", "Z", "S0R"), ("embeddings.token", "R", "RR")))
    assert found.splitlines() == ["h_0_fc  S0R", "embeddings.position  S0R (Z0) at rest"]


def test_ops_without_a_strategy_are_left_out() -> None:
    assert listing(ops(("made", "h_0", ""), ("h_0_fc", "h_0", "S0R")), []) == "h_0_fc  S0R"
    assert listing([], []) == ""


@cache
def planned(mode: str) -> Plan:
    return solve(model_context("gpt2"), Cluster.preset("cpu:4"), Request("gpt2", mode, (4,), solver="highs"))[0]


@pytest.mark.parametrize("mode", ["ddp", "zero3", "1d", "auto"])
def test_every_op_and_every_cut_parameter_of_a_plan_is_told(mode: str) -> None:
    plan = planned(mode)
    lines = listing(plan.ops, plan.parameters).splitlines()
    names = [line.split()[0] for line in lines if not line.endswith("layers alike:")]
    second = [op.name for op in plan.ops if op.segment == "transformer_h_1"]
    assert second and names == [op.name for op in plan.ops if op.strategy and op.name not in second]
    assert all(f"{op.name} " in f"{line} " and op.strategy in line for op in plan.ops if op.name in names
               for line in lines if line.split()[0] == op.name)
    cut = [p for p in plan.parameters if set(p.spec) != {"R"} and ".h.1." not in p.name]
    told = " ".join(lines).count(" at rest"), {p.name.rpartition(".")[0] for p in cut}
    assert told[0] == len(told[1])


def test_zero3_tells_compute_and_storage_apart() -> None:
    text = listing(planned("zero3").ops, planned("zero3").parameters)
    assert "transformer_h_0_mlp_c_proj                         S0R = S0R X RR" in text
    line = next(line for line in text.splitlines() if line.startswith("transformer_h_0_mlp_c_proj "))
    assert line.endswith("weight S0R (Z0), bias S0 (Z0) at rest")
