"""What a report of a compiled model tells: its prediction beside what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import autopar
from autopar.codegen.stopwatch import Lap, between
from autopar.core.errors import AutoparError
from autopar.report import Line, Report
from tests import builders
from tests.pool import Pool


def _reports(rank: int, world_size: int) -> tuple[Any, Any]:
    """A report before any step and one after four."""
    case = builders.gpt2()
    made: Any = autopar.compile(case.model, f"cpu:{world_size}", inputs=case.inputs, precision="fp32")
    before = made.report()
    for _ in range(4):
        case.call(made).backward()
    return before, made.report()


def test_after_some_steps(pool: Callable[[int], Pool]) -> None:
    (before, after), _ = pool(2).run(_reports)
    assert all(math.isnan(line.measured_s) for line in before.lines) and math.isnan(before.step[1])
    assert {(line.segment, line.phase, line.calls) for line in after.lines} >= {
        ("transformer_h_0", "forward", 2), ("transformer_h_0", "backward", 2), ("between_0", "forward", 1)}
    assert all(line.measured_s > 0.0 for line in after.lines)
    measured = sum(line.measured_s for line in after.lines) + after.exposed[1]
    assert 0.0 < measured < 10 * after.step[1]
    assert "transformer_h_0" in str(after) and "peak memory: predicted" in str(after)


def _alone(rank: int, world_size: int) -> str:
    case = builders.mlp()
    made: Any = autopar.compile(case.model, f"cpu:{world_size}", inputs=case.inputs, loss_fn=case.loss_fn,
                                precision="fp32")
    with pytest.raises(AutoparError) as refused:
        made.report()
    return str(refused.value)


def test_on_one_rank(pool: Callable[[int], Pool]) -> None:
    assert "compile for two ranks or more" in pool(1).run(_alone)[0]


def test_time_between_calls() -> None:
    laps = [Lap(0, "forward", 1.0, 0.5), Lap(1, "forward", 2.0, 1.0), Lap(1, "backward", 5.0, 1.0)]
    assert between(laps) == {"forward": 0.5, "backward": 0.0}


def test_what_is_off_is_pointed_out() -> None:
    said = str(Report("2", (Line("h_0", "forward", 3, 1e-3, 2e-3), Line("h_0", "backward", 3, 1e-3, 1.1e-3)),
                      (0.0, math.nan), (4e-3, 4e-3), (2.0**30, math.nan)))
    assert "(2.00x)" in said and said.count("x)") == 1 and "not seen" in said and "not told by this device" in said
