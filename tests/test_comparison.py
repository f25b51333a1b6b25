"""Every mode beside auto: none is faster, and those without a plan say why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autopar import comparison
from autopar.cli import main
from autopar.comparison import compare
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.passes.modes import MODES
from autopar.planner import Request, solve
from tests.builders import quick
from tests.programs import model_context

CONTEXT = "bf16-mixed"


def test_every_mode_has_seconds_or_a_reason() -> None:
    found = compare(model_context("mlp", CONTEXT), quick(4), Request("mlp"))
    assert list(found.seconds) == list(MODES)
    assert found.seconds["auto"] == found.plan.step_time_s
    assert found.plan.step_time_s == min(s for s in found.seconds.values() if s is not None)
    assert {mode for mode, seconds in found.seconds.items() if seconds is None} == set(found.reasons)
    assert "wants q x q x q devices" in found.reasons["3d"]
    assert f"3d           {found.reasons['3d']}" in str(found)


def test_a_mesh_is_kept_to() -> None:
    found = compare(model_context("mlp", CONTEXT), quick(4), Request("mlp", mesh=(2, 2)))
    assert found.plan.mesh == (2, 2)
    assert "not a mesh 2x2" in found.reasons["3d"]


def test_a_mode_asked_for_is_solved_alone() -> None:
    found = compare(model_context("mlp", CONTEXT), quick(4), Request("mlp", "ddp"))
    assert found.plan.mode == "ddp" and found.seconds["ddp"] == found.plan.step_time_s
    assert found.reasons["auto"] == "not solved, as mode ddp was asked for"


def test_auto_goes_to_the_mesh_of_a_faster_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one axis alone auto may lose to a mode on two."""
    def narrow(ctx, cluster, request, report=None):  # type: ignore[no-untyped-def]
        plan, problem = solve(ctx, cluster, replace(request, mesh=request.mesh or ((4,) if request.mode == "auto" else
                                                                                  None)))
        slow = replace(plan.seconds, step=2 * plan.seconds.step) if plan.mesh == (4,) else plan.seconds
        return replace(plan, seconds=slow), problem
    monkeypatch.setattr(comparison, "solve", narrow)
    found = compare(model_context("mlp", CONTEXT), quick(4), Request("mlp"))
    assert found.plan.mesh == (2, 2) and found.plan.mode == "auto"
    assert found.plan.step_time_s == min(s for s in found.seconds.values() if s is not None)


def test_auto_takes_the_plan_of_a_mode_that_time_left_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(ctx, cluster, request, report=None):  # type: ignore[no-untyped-def]
        plan, problem = solve(ctx, cluster, request)
        if request.mode != "auto":
            return plan, problem
        late = replace(plan.seconds, step=4 * plan.seconds.step)
        return replace(plan, seconds=late, gap=0.8, status="Feasible"), problem
    monkeypatch.setattr(comparison, "solve", hasty)
    found = compare(model_context("mlp", CONTEXT), quick(4), Request("mlp", mesh=(2, 2)))
    assert found.plan.mode == "auto" and found.plan.status == "Feasible"
    assert found.plan.step_time_s == found.seconds["auto"] == min(s for s in found.seconds.values() if s is not None)
    free, _ = solve(model_context("mlp", CONTEXT), quick(4), Request("mlp", mesh=(2, 2)))
    bound = 0.2 * 4 * free.step_time_s
    assert 0 < found.plan.gap < 1
    assert (1 - found.plan.gap) * found.plan.step_time_s == pytest.approx(min(bound, found.plan.step_time_s))


def test_auto_out_of_time_on_the_mesh_of_a_faster_mode_takes_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(ctx, cluster, request, report=None):  # type: ignore[no-untyped-def]
        if request.mode != "auto":
            return solve(ctx, cluster, request)
        if request.mesh is not None:
            raise AutoparError("no solution within 30 s")
        plan, problem = solve(ctx, cluster, replace(request, mesh=(2, 2)))
        return replace(plan, seconds=replace(plan.seconds, step=4 * plan.seconds.step)), problem
    monkeypatch.setattr(comparison, "solve", stuck)
    found = compare(model_context("mlp", CONTEXT), quick(4), Request("mlp"))
    assert (found.plan.mode, found.plan.mesh, found.plan.status, found.plan.gap) == ("auto", (4,), "Feasible", 1.0)
    assert found.problem.setting.mesh.shape == (4,)


def test_a_request_that_has_no_plan_is_refused() -> None:
    with pytest.raises(AutoparError, match="unknown solver"):
        compare(model_context("mlp", CONTEXT), Cluster.preset("cpu:2"), Request("mlp", solver="x"))


def test_the_command_tells_modes_as_text_and_as_json(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "own.py").write_text("""\
import torch
from torch import nn

def build(batch=64):
    return nn.Linear(16, 4), (torch.zeros(batch, 16), torch.zeros(batch, dtype=torch.long)), nn.functional.cross_entropy
""")
    given = ["--model", f"{tmp_path}/own.py:build", "--cluster", "cpu:2"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["modes"]) == set(MODES)
    assert {mode for mode, seconds in found["modes"].items() if seconds is None} == set(found["modes_reason"])
    assert found["modes"]["auto"] == found["step_time_s"]
    assert main([*given, "--modes"]) == 0
    said = capsys.readouterr().out
    assert f"\nstep by mode:\nauto         {1e3 * found['step_time_s']:.3f} ms\n" in said
