"""Ops pinned to strategies: kept to, or refused with what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autopar import api
from autopar.cli import main
from autopar.console.options import parse_options
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, Infeasible
from autopar.core.mesh import Mesh
from autopar.passes.modes import mode_called
from autopar.passes.notation import strategy_text
from autopar.passes.pins import PinRefused, allowed
from autopar.plan import Plan
from autopar.planner import Request, solve, verify
from tests.programs import model_context

CLUSTER = Cluster.preset("cpu:4")
FC, OTHER = "transformer_h_0_mlp_c_fc", "transformer_h_1_mlp_c_fc"


def planned(*pins: tuple[str, str], mesh: tuple[int, ...] | None = (4,), budget: float | None = None) -> Plan:
    request = Request("gpt2", mesh=mesh, memory_budget=budget, solver="highs", pins=pins)
    return solve(model_context("gpt2", "bf16-mixed"), CLUSTER, request)[0]


def strategies(plan: Plan) -> dict[str, str]:
    return {op.name: op.strategy for op in plan.ops}


def texts(name: str, mesh: tuple[int, ...]) -> set[str]:
    context = model_context("gpt2", "bf16-mixed")
    problem = solve(context, CLUSTER, Request("gpt2", mesh=mesh, solver="highs"))[1]
    index = [op.name for op in context.segmented.ops].index(name)
    return {strategy_text(context, context.segmented.ops[index], a) for a in problem.assigned[problem.op_nodes[index]]}


def test_every_text_of_an_op_can_be_pinned() -> None:
    free, known = planned(), texts(FC, (4,))
    assert len(known) >= 4
    for text in known:
        plan = planned((FC, text))
        assert strategies(plan)[FC] == strategies(plan)[OTHER] == text
        assert plan.step_time_s >= free.step_time_s * (1 - 1e-9)
        verify(plan, model_context("gpt2", "bf16-mixed"), CLUSTER)


def test_pinning_what_is_planned_changes_nothing() -> None:
    free = planned(mesh=(2, 2))
    pins = tuple((op.name, op.strategy) for op in free.ops[:12] if op.strategy)
    assert planned(*pins, mesh=(2, 2)).step_time_s == pytest.approx(free.step_time_s, rel=1e-9)


def test_a_pin_is_read_with_any_spaces_and_on_any_of_equal_layers() -> None:
    plan = planned((OTHER, " RS0=RR x  RS0 "))
    assert strategies(plan)[FC] == "RS0 = RR X RS0"


def test_a_pin_chooses_the_mesh_that_has_it() -> None:
    assert planned((FC, "S0S1 = S0R X RS1"), mesh=None).mesh == (2, 2)


@pytest.mark.parametrize(("pins", "message"), [
    ([("h_0_mlp_c_fc", "RR = RR X RR")], r"no op is called 'h_0_mlp_c_fc'; near it are .*transformer_h_0_mlp_c_fc"),
    ([(FC, "S0S1 = S0R X RS1")], r"mesh 4: op \S+c_fc can't be pinned to 'S0S1 = S0R X RS1' in mode auto; it can be "
                                 r".*'S0R = S0R X RR'"),
    ([(FC, "S0R = S0R X RR"), (OTHER, "RS0 = RR X RS0")], r"op \S+h_1_mlp_c_fc can't be pinned to .*it can be 'S0R"),
])
def test_pins_that_do_not_fit_are_refused(pins: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(AutoparError, match=message) as refusal:
        planned(*pins)
    assert not isinstance(refusal.value, Infeasible)


def test_pins_are_kept_to_the_mode() -> None:
    with pytest.raises(PinRefused, match="in mode ddp"):
        allowed(model_context("gpt2", "bf16-mixed"), Mesh((4,)), mode_called("ddp"), ((FC, "RS0 = RR X RS0"),))


def test_infeasible_together_is_told_with_the_pins() -> None:
    said = r"with \S+c_fc pinned to RR = RR X RR: needs .* a device on mesh 4, the budget is 1000 bytes"
    with pytest.raises(Infeasible, match=said) as refusal:
        planned((FC, "RR = RR X RR"), budget=1000.0)
    least = refusal.value.least_budget_bytes
    assert least is not None and strategies(planned((FC, "RR = RR X RR"), budget=least))[FC] == "RR = RR X RR"


def test_pins_of_the_call_and_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = nn.Linear(16, 4), (torch.zeros(64, 16), torch.zeros(64, dtype=torch.long))
    plan = api.plan(model, "cpu:2", inputs=inputs, loss_fn=nn.functional.cross_entropy,
                    pins={"linear": "RR(P0) = RS0 X S0R"})
    assert strategies(plan)["linear"] == "RR(P0) = RS0 X S0R"
    with pytest.raises(AutoparError, match="give one of them"):
        api.compile(model, "cpu:2", plan=plan, pins={"linear": "RR = RR X RR"})
    (tmp_path / "own.py").write_text("""\
import torch
from torch import nn

def build(batch=64):
    return nn.Linear(16, 4), (torch.zeros(batch, 16), torch.zeros(batch, dtype=torch.long)), nn.functional.cross_entropy
""")
    given = ["--model", f"{tmp_path}/own.py:build", "--cluster", "cpu:2"]
    assert main([*given, "--pin", "linear=RS0 = RR X RS0", "--pin", "cross_entropy_loss=R = RR"]) == 0
    out = capsys.readouterr().out
    assert "\nlinear              RS0 = RR X RS0\ncross_entropy_loss  R = RR\n" in out
    assert main([*given, "--pin", "linear=S9"]) == 2
    assert "op linear can't be pinned to 'S9'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "linear", "=RR", "linear= "])
def test_what_is_no_pin_is_refused(text: str) -> None:
    with pytest.raises(AutoparError, match="is not of the form"):
        parse_options(["--model", "gpt2", "--pin", text])


def test_pins_of_the_command_are_read() -> None:
    found = parse_options(["--model", "gpt2", "--pin", "a=S0 = R", "--pin", "b = S1"])
    assert found.pins == (("a", "S0 = R"), ("b", "S1"))
    assert parse_options(["--model", "gpt2"]).pins == ()
