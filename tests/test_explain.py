"""What alternatives would have cost, and where plans differ."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.cli import main
from autopar.console.report import explanation_fields
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.explanation import Alternative, Explanation, choices_of, explain
from autopar.passes.decision import Decision
from autopar.passes.notation import op_text, strategy_text
from autopar.passes.problem import build
from autopar.plan import Plan
from autopar.planner import Request, decision_of, price_lowered, setting_of, solve
from tests.builders import quick
from tests.programs import model_context

MESHES = [(4,), (2, 2)]
CLUSTER = quick(4)


@cache
def planned(name: str, mesh: tuple[int, ...], mode: str = "auto") -> Plan:
    return solve(model_context(name, "bf16-mixed"), CLUSTER, Request(name, mode, mesh, solver="highs"))[0]


def explained(name: str, mesh: tuple[int, ...], op: str, mode: str = "auto") -> Explanation:
    return explain(planned(name, mesh, mode), model_context(name, "bf16-mixed"), CLUSTER, op)


def some_ops(name: str) -> list[str]:
    ops = [op.name for op in model_context(name, "bf16-mixed").segmented.ops]
    return [*ops[:3], *ops[len(ops) // 2:len(ops) // 2 + 2], ops[-1]]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_the_planned_one_is_the_plan_and_none_is_quicker(name: str, mesh: tuple[int, ...]) -> None:
    plan = planned(name, mesh)
    strategies = {op.name: op.strategy for op in plan.ops}
    for op in some_ops(name):
        found = explained(name, mesh, op)
        assert sum(a.planned for a in found.alternatives) == 1
        assert found.planned.seconds == pytest.approx(plan.step_time_s, rel=1e-6)
        assert (found.planned.nbytes, found.planned.strategy) == (plan.memory.total, strategies[op])
        assert all(a.seconds >= found.planned.seconds * (1 - 1e-9) for a in found.alternatives)
        assert [a.seconds for a in found.alternatives] == sorted(a.seconds for a in found.alternatives)


@pytest.mark.parametrize("asked", [{"stages": 2, "mesh": (1, 2)}, {"stages": 4}], ids=str)
def test_stages_are_priced_as_they_are_planned(asked: dict[str, Any]) -> None:
    context = model_context("gpt2", "bf16-mixed")
    plan, _ = solve(context, CLUSTER, Request("gpt2", "pp1d" if "mesh" in asked else "pp", solver="highs",
                                              micro_batches=2, **asked))
    found = explain(plan, context, CLUSTER, "transformer_h_0_mlp_c_fc")
    planned = plan.step_time_s, plan.memory.total
    assert (found.planned.seconds, found.planned.nbytes) == pytest.approx(planned, rel=1e-6)
    assert (len(found.alternatives) > 1) == (plan.mesh != (1,)) and all(a.nbytes > 0 for a in found.alternatives)


def test_alternatives_cost_what_their_lowered_programs_do() -> None:
    context, plan = model_context("gpt2", "bf16-mixed"), planned("gpt2", (4,))
    decision, setting = decision_of(plan, context), setting_of(plan, CLUSTER)
    found = explained("gpt2", (4,), "transformer_h_0_mlp_c_fc")
    assert found.times == 2
    equals = {i for i, op in enumerate(context.segmented.ops) if op.name.endswith("_mlp_c_fc")}
    finite = [a for a in found.alternatives if math.isfinite(a.seconds)]
    assert len(finite) > 2
    for alternative in finite:
        assigned = tuple(alternative.assignment if i in equals else a for i, a in enumerate(decision.assignments))
        priced, memory = price_lowered(Decision(context, decision.mesh, assigned, decision.storage), setting)
        assert (priced.seconds, memory.total) == pytest.approx((alternative.seconds, alternative.nbytes), rel=1e-6)


def test_a_way_that_is_missing_is_told_in_words_and_as_null() -> None:
    one = Alternative(("n",), "RS0 = RR X RS0", 0.002, 2.0**30, True)
    found = Explanation("up", 1, (one, Alternative(("k",), "RR(P0)", math.inf, 1.0, False)))
    assert str(found).splitlines()[1:] == [
        "  RS0 = RR X RS0  n       2.000 ms     1.000 GiB  as planned",
        "  RR(P0)          k  no way for a value it takes or makes"]
    assert [a["step_time_s"] for a in explanation_fields(found)["alternatives"]] == [0.002, None]


def test_choices_are_the_inverse_of_decide() -> None:
    context = model_context("gpt2", "bf16-mixed")
    plan = planned("gpt2", (2, 2))
    problem = build(context, setting_of(plan, CLUSTER))
    decision = decision_of(plan, context)
    assert problem.decide(choices_of(problem, decision)).assignments == decision.assignments


def test_texts_are_those_of_the_plan() -> None:
    context, plan = model_context("gpt2", "bf16-mixed"), planned("gpt2", (2, 2))
    decision = decision_of(plan, context)
    for index, (op, told) in enumerate(zip(context.segmented.ops, plan.ops, strict=True)):
        assert told.strategy == op_text(decision, index) == strategy_text(context, op, told.assignment)


def test_it_prints_a_line_an_alternative() -> None:
    found = explained("gpt2", (4,), "transformer_h_1_mlp_c_fc")
    title, *lines = str(found).splitlines()
    assert title.startswith("transformer_h_1_mlp_c_fc and its equals, 2 in all, all else as planned")
    assert len(lines) == len(found.alternatives)
    assert [line.endswith("as planned") for line in lines] == [a.planned for a in found.alternatives]


def test_unknown_ops_and_foreign_plans_are_refused() -> None:
    context, plan = model_context("gpt2", "bf16-mixed"), planned("gpt2", (4,))
    with pytest.raises(AutoparError, match=r"no op is called 'h_0_mlp_c_fc'; near it are .*transformer_h_0_mlp_c_fc"):
        autopar.explain(plan, context, CLUSTER, "h_0_mlp_c_fc")
    with pytest.raises(AutoparError, match="plan is for cluster"):
        explain(plan, context, Cluster.preset("4xH100"), "transformer_h_0_mlp_c_fc")
    with pytest.raises(AutoparError, match="plan is for program"):
        explain(plan, model_context("mlp", "bf16-mixed"), CLUSTER, "transformer_h_0_mlp_c_fc")
    with pytest.raises(AutoparError, match=r"precision bf16-mixed, .* in fp32; .*precision='bf16-mixed'"):
        explain(plan, model_context("gpt2", "fp32"), CLUSTER, "transformer_h_0_mlp_c_fc")


def test_a_default_plan_goes_with_a_default_capture_and_a_cluster_as_text(tmp_path: Path) -> None:
    model, inputs = torch.nn.Linear(8, 8), (torch.ones(4, 8), torch.zeros(4, 8))
    plan: Plan = autopar.plan(model, "cpu:2", inputs=inputs, loss_fn=torch.nn.functional.mse_loss)
    program = autopar.capture(model, (inputs, {}), loss_fn=torch.nn.functional.mse_loss)
    assert plan.explain(program, "cpu:2", plan.ops[0].name).planned.seconds == pytest.approx(plan.step_time_s, rel=1e-6)
    assert plan.verify(program, "cpu:2")[0] == pytest.approx(plan.step_time_s, rel=1e-6)
    plan.emit(tmp_path / "step.py", program, "cpu:2")
    for given, said in (((program, 3), "cluster is 3"), ((model, "cpu:2"), "program is Linear")):
        with pytest.raises(AutoparError, match=said):
            plan.verify(*given)


def test_equal_layers_planned_apart_are_refused() -> None:
    plan = planned("gpt2", (4,), "zero3")
    ops = tuple(replace(op, assignment=("R",)) if op.name == "transformer_h_1_mlp_c_fc" else op for op in plan.ops)
    context = model_context("gpt2", "bf16-mixed")
    with pytest.raises(AutoparError, match=r"is none of its mode's|decides equal layers differently"):
        explain(replace(plan, ops=ops), context, CLUSTER, "transformer_h_0_mlp_c_fc")
    wide = replace(plan, ops=ops, mode="auto")
    with pytest.raises(AutoparError, match="decides equal layers differently"):
        explain(wide, context, CLUSTER, "transformer_h_0_mlp_c_fc")


# Differences

def test_a_plan_does_not_differ_from_itself() -> None:
    plan = planned("gpt2", (4,))
    found = plan.diff(plan)
    assert (found.words, found.ops, found.parameters) == ((), (), ())
    assert found.seconds == (plan.step_time_s,) * 2
    assert str(found).splitlines()[:2] == ["no ops differ", "no parameters differ"]


def test_what_differs_is_named_with_both_sides() -> None:
    first, second = planned("gpt2", (4,), "ddp"), planned("gpt2", (4,), "zero3")
    found = first.diff(second)
    assert [str(word) for word in found.words] == ["mode: ddp | zero3"]
    assert found.ops == ()
    assert {change.name for change in found.parameters} == {p.name for p in first.parameters}
    assert (found.nbytes, found.seconds[1]) == ((first.memory.total, second.memory.total), second.step_time_s)
    assert "\nno ops differ\n" in f"\n{found}" and f"{len(first.parameters)} parameters differ:" in str(found)


def test_ops_that_one_plan_lacks_are_told() -> None:
    found = planned("mlp", (4,)).diff(planned("gpt2", (2, 2)))
    assert {"model", "mesh"} == {word.name for word in found.words}
    gone = {change.name for change in found.ops if change.right is None}
    assert gone == {op.name for op in planned("mlp", (4,)).ops} - {op.name for op in planned("gpt2", (2, 2)).ops}
    assert " | none" in str(found)


# The command

SOURCE = """\
import torch
from torch import nn

def build(batch=64):
    layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return layers, (torch.zeros(batch, 16), torch.zeros(batch, dtype=torch.long)), nn.functional.cross_entropy
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path: Path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(SOURCE)
    return ["--model", f"{path}:build", "--cluster", "2xA100-80GB"]


def test_the_command_explains(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*given, "--explain", "first"]) == 2
    said = capsys.readouterr().err
    assert "no op is called 'first'; near it are " in said
    name = said.partition("near it are ")[2].partition(",")[0]
    assert main([*given, "--explain", name]) == 0
    text = capsys.readouterr().out
    assert f"\n\n{name}, all else as planned; the step and bytes a device with each alternative:\n" in text
    assert main([*given, "--explain", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["explanation"]["op"] == name
    told = [a for a in found["explanation"]["alternatives"] if a["planned"]]
    assert [a["step_time_s"] for a in told] == pytest.approx([found["step_time_s"]])
