"""Plans kept between runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import autopar
from autopar.api import arguments
from autopar.core.cluster import Cluster
from autopar.passes.capture import capture
from autopar.passes.decision import Context
from autopar.plan_cache import FOLDER, place, solve_or_recall
from autopar.planner import Request, prepare
from tests import builders

CLUSTER = Cluster.preset("cpu:2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def context() -> Context:
    case = builders.mlp()
    return prepare(capture(case.model, arguments(case.inputs), "fp32", case.loss_fn))


def test_a_plan_is_found_again(folder: Path, context: Context) -> None:
    told: list[str] = []
    first = solve_or_recall(context, CLUSTER, Request("mlp"), told.append)
    assert not any("made before" in line for line in told)
    again = solve_or_recall(context, CLUSTER, Request("another name"), told.append)
    assert again == replace(first, model="another name")
    assert "made before" in told[-1]
    assert len(list(folder.rglob("*.json"))) == 1


@pytest.mark.parametrize("request_", [Request("mlp", "ddp"), Request("mlp", optimizer="sgd"),
                                      Request("mlp", memory_budget=1e12), Request("mlp", mesh=(2,))])
def test_another_request_is_another_plan(request_: Request, folder: Path, context: Context) -> None:
    assert place(context, CLUSTER, request_) != place(context, CLUSTER, Request("mlp"))
    assert place(context, Cluster.preset("cpu:4"), Request("mlp")) != place(context, CLUSTER, Request("mlp"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{\"format\": \"autopar plan 3\"}"])
def test_what_is_no_plan_is_made_anew(text: str, folder: Path, context: Context) -> None:
    first = solve_or_recall(context, CLUSTER, Request("mlp"))
    path = place(context, CLUSTER, Request("mlp"))
    assert path is not None
    path.write_text(text)
    assert replace(solve_or_recall(context, CLUSTER, Request("mlp")), solve_s=first.solve_s) == first
    assert path.read_text() != text


def test_a_plan_whose_claims_do_not_hold_is_made_anew(folder: Path, context: Context) -> None:
    first = solve_or_recall(context, CLUSTER, Request("mlp"))
    path = place(context, CLUSTER, Request("mlp"))
    assert path is not None
    replace(first, seconds=replace(first.seconds, step=first.seconds.step / 2)).save(path)
    assert solve_or_recall(context, CLUSTER, Request("mlp")).seconds == first.seconds


def test_nothing_is_kept_where_that_is_off_or_impossible(folder: Path, context: Context,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "off")
    assert place(context, CLUSTER, Request("mlp")) is None
    solve_or_recall(context, CLUSTER, Request("mlp"))
    (folder / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(folder / "file"))
    assert solve_or_recall(context, CLUSTER, Request("mlp")).status == "Optimal"
    assert not list(folder.rglob("*.json"))


def test_compile_and_plan_read_what_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = builders.mlp()
    first = autopar.plan(case.model, "cpu:2", inputs=case.inputs, loss_fn=case.loss_fn)
    monkeypatch.setattr("autopar.plan_cache.solve", None)
    assert autopar.plan(case.model, "cpu:2", inputs=case.inputs, loss_fn=case.loss_fn) == first


def test_a_plan_checks_and_explains_itself(context: Context) -> None:
    case = builders.mlp()
    program = capture(case.model, arguments(case.inputs), "fp32", case.loss_fn)
    plan = autopar.plan(case.model, CLUSTER, inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32")
    assert plan.verify(program, CLUSTER) == pytest.approx((plan.step_time_s, plan.memory_bytes["peak"]), rel=1e-6)
    op = plan.ops[0].name
    assert plan.explain(context, CLUSTER, op).planned.seconds == pytest.approx(plan.step_time_s, rel=1e-6)
