"""A budget too small is refused with the least that would do, and that one does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cli import main
from autopar.core.cluster import Cluster
from autopar.core.errors import Infeasible
from autopar.planner import Request, shapes_for, solve
from autopar.solver.optimise import optimise
from tests.programs import model_context
from tests.solver.instances import INF, least_seconds, random_instance

SOURCE = """\
import torch
from torch import nn

def build(batch=65536):
    return nn.Linear(16, 4), (torch.zeros(batch, 16), torch.zeros(batch, dtype=torch.long)), nn.functional.cross_entropy
"""


def refusal(request: Request) -> Infeasible:
    with pytest.raises(Infeasible) as refused:
        solve(model_context("mlp", "bf16-mixed"), Cluster.preset("cpu:4"), request)
    return refused.value


def test_on_one_device_a_plan_within_the_least_budget_is_proven_to_be_the_best() -> None:
    context, cluster = model_context("gpt2"), Cluster.preset("cpu:1")
    with pytest.raises(Infeasible) as refused:
        solve(context, cluster, Request("gpt2", memory_budget=1000.0))
    least = refused.value.least_budget_bytes
    plan, _ = solve(context, cluster, Request("gpt2", memory_budget=least))
    assert plan.status == "Optimal" and plan.checkpoints and plan.memory.device <= least


def test_the_least_budget_is_the_least_over_mesh_shapes_and_does() -> None:
    context, cluster = model_context("mlp", "bf16-mixed"), Cluster.preset("cpu:4")
    request = Request("mlp", memory_budget=1000.0)
    by_shape = [refusal(replace(request, mesh=shape)).least_budget_bytes for shape in shapes_for(request, cluster)]
    least = refusal(request).least_budget_bytes
    assert least == min(found for found in by_shape if found)
    plan, problem = solve(context, cluster, replace(request, memory_budget=least))
    assert problem.instance.budget == least and plan.memory.device <= least
    refusal(replace(request, memory_budget=least * (1 - 1e-6)))


@pytest.mark.parametrize("solver", ["cbc", "highs"])
def test_random_instances_are_refused_with_a_budget_that_does(solver: str) -> None:
    refused = 0
    for seed in range(40):
        instance = replace(random_instance(seed), budget=1.0)
        if least_seconds(replace(instance, budget=INF)) == INF:
            with pytest.raises(Infeasible) as without:
                optimise(instance, solver)
            assert without.value.least_budget_bytes is None
        elif least_seconds(instance) == INF:
            with pytest.raises(Infeasible) as found:
                optimise(instance, solver)
            least = found.value.least_budget_bytes
            assert least is not None and optimise(replace(instance, budget=least), solver).nbytes <= least
            refused += 1
    assert refused > 10


def test_the_command_prints_the_least_budget_and_exits_with_2(tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(SOURCE)
    given = ["--model", f"{tmp_path}/own.py:build", "--cluster", "cpu:2", "--json"]
    assert main([*given, "--memory-budget", "0.1MB"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found) == {"status", "least_budget_bytes", "reason"}
    assert found["status"] == "Infeasible" and found["reason"] in err and found["least_budget_bytes"] > 1e5
    assert main([*given, "--memory-budget", str(int(found["least_budget_bytes"]) + 1)]) == 0
