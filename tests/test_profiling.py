"""Plans from measured segments: they verify, are kept, and are measured again where what was kept is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.observed import Observed
from autopar.plan import Plan
from autopar.plan_cache import FOLDER
from autopar.planner import Request, solve, verify
from tests import builders
from tests.pool import Pool
from tests.programs import model_context

CLUSTER = "cpu:2"


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _compiled(rank: int, world_size: int, folder: str) -> tuple[dict[str, Any], list[str], float]:
    """The plan of a model compiled with measured costs, what was said meanwhile, and the loss."""
    case, said = builders.gpt2(), _Said()
    log, before = logging.getLogger("autopar"), os.environ.get(FOLDER, "")
    os.environ[FOLDER] = folder
    log.addHandler(said)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        made = autopar.compile(case.model, CLUSTER, inputs=case.inputs, precision="fp32", costs="measured")
        return made.plan.to_json(), said.lines, float(case.call(made))
    finally:
        log.removeHandler(said)
        log.setLevel(level)
        os.environ[FOLDER] = before


def test_measured_plans(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    (told, said, loss), (other, _, _) = pool(2).run(_compiled, str(tmp_path))
    plan = Plan.from_json(told)
    assert told == other
    assert loss == pytest.approx(float(builders.gpt2().plain_loss(builders.gpt2().model)), rel=1e-5)
    assert {each.segment for each in plan.observed} == {"between_0", "transformer_h_0", "between_3"}
    program = autopar.capture(builders.gpt2().model, ((), builders.gpt2().inputs), precision="fp32")
    assert verify(plan, program, Cluster.preset(CLUSTER))[0] == pytest.approx(plan.step_time_s, rel=1e-6)
    assert any("measured (1 of" in line for line in said)
    files = list((tmp_path / "segments").glob("*.json"))
    assert {each.variant for each in plan.observed} <= {path.stem for path in files}

    for path in files:
        path.write_text("{}")
    (_, said, _), _ = pool(2).run(_compiled, str(tmp_path))
    assert any("is measured again: 'format' is missing" in line for line in said)


def test_an_unwritable_folder_only_costs_time(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (told, said, _), _ = pool(2).run(_compiled, str(tmp_path / "file"))
    assert Plan.from_json(told).observed
    assert any("is not kept" in line for line in said)


@pytest.mark.parametrize("mode", ["ddp", "zero3", "1d", "auto"])
def test_factors_are_priced_as_they_are_solved(mode: str) -> None:
    context, where = model_context("gpt2"), builders.quick(2)
    observed = tuple(Observed(s.name, "", 2.0 + s.first, 3.0) for s in context.segmented.representatives.values())
    plan, _ = solve(context, where, Request("gpt2", mode, (2,), observed=observed))
    plain, _ = solve(context, where, Request("gpt2", mode, (2,)))
    assert verify(plan, context, where)[0] == pytest.approx(plan.step_time_s, rel=1e-6)
    assert plan.compute_s > 2.0 * plain.compute_s
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(AutoparError, match="the plan claims"):
        verify(replace(plan, observed=()), context, where)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_factors_that_none_can_be(factor: float) -> None:
    with pytest.raises(AutoparError, match="measure it again"):
        Observed("h_0", "", 1.0, factor)
