"""Timelines: what a plan predicts and what was seen, row by row, to the second and the byte of the plan."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar.core.errors import AutoparError
from autopar.plan import Plan
from autopar.timeline import Row, draw, measured, predicted
from tests.builders import gpt2, quick
from tests.pool import Pool

WAYS: list[dict[str, Any]] = [
    {"mode": "pp", "pp": 4, "micro_batches": 4}, {"mode": "pp1d", "pp": 2, "tp": 2, "micro_batches": 2},
    {"mode": "zero2"}, {"mode": "1d"}]


@cache
def planned(number: int) -> Plan:
    case = gpt2(layers=3)
    return autopar.plan(case.model, quick(4), inputs=case.inputs, precision="fp32", solver="highs", **WAYS[number])


def busy(row: Row, *kinds: str) -> float:
    return sum(box.end_s - box.start_s for box in row.boxes if box.kind in kinds)


@pytest.mark.parametrize("number", range(len(WAYS)))
def test_rows_are_the_plans_step(number: int) -> None:
    plan = planned(number)
    found = predicted(plan)
    assert len(found.rows) == (len(plan.pipelining.places) or 4)
    for row in found.rows:
        boxes = sorted((box for box in row.boxes if box.kind != "sending"), key=lambda box: box.start_s)
        assert all(a.end_s == pytest.approx(b.start_s) for a, b in itertools.pairwise(boxes))
        assert boxes[0].start_s == 0.0 and boxes[-1].end_s == pytest.approx(plan.step_time_s)
    most = max(row.peak for row in found.rows)
    assert 0.9 * plan.memory.total <= most <= plan.memory.total * (1 + 1e-9)


@pytest.mark.parametrize("number", [0, 1])
def test_stages_run_every_micro_batch(number: int) -> None:
    plan = planned(number)
    for place, row in enumerate(predicted(plan).rows):
        stages = plan.stages[place::len(plan.pipelining.places)]
        each = sum(stage.forward_s + stage.backward_s for stage in stages)
        once = plan.step_time_s - max(box.end_s for box in row.boxes if box.kind in ("forward", "backward", "bubble"))
        inside = busy(row, "forward", "backward", "communication", "optimizer") - once
        assert inside == pytest.approx(plan.micro_batches * each)
        labels = [box.label for box in row.boxes if box.kind == "forward"]
        assert sorted(labels) == sorted(len(stages) * list(map(str, range(plan.micro_batches))))


def test_segments_come_forward_and_backward() -> None:
    row, plan = predicted(planned(2)).rows[0], planned(2)
    assert busy(row, "forward", "backward") == pytest.approx(plan.compute_s)
    assert busy(row, "communication") == pytest.approx(plan.communication_s)
    told = [box.told for box in row.boxes if box.kind == "forward"]
    assert told == [f"{segment.name} forward" for segment in plan.segments]


def test_pages_and_pictures(tmp_path: Path) -> None:
    planned(0).timeline(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert text.count("<svg") == text.count("</svg>") == 1 and "stage 2 backward, micro-batch 3" in text
    pytest.importorskip("matplotlib")
    planned(2).timeline(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"plan.html", "plan.png"}


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AutoparError, match=r"ends in \.html or \.png"):
        draw(planned(0), tmp_path / "plan.gif")
    with pytest.raises(AutoparError, match="does not tell of its segments"):
        dataclasses.replace(planned(0), segments=()).timeline(tmp_path / "plan.html")


def test_plans_tell_their_segments(tmp_path: Path) -> None:
    planned(1).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == planned(1)


def seen(rank: int, world_size: int, folder: str, options: dict[str, Any]) -> tuple[str, Any, Any]:
    """What is said before any step, a report after some, and what was seen."""
    case = gpt2()
    model: Any = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32", solver="highs",
                                 **options)
    with pytest.raises(AutoparError) as refused:
        model.timeline(Path(folder) / "early.html")
    for _ in range(4):
        case.call(model).backward()
    model.timeline(Path(folder) / "step.html")
    return str(refused.value), model.report(), (model.plan, model._sight.seen(model._site.device))


@pytest.mark.dist
@pytest.mark.parametrize("options", [{"mode": "pp", "micro_batches": 4}, {"mode": "ddp"}], ids=str)
def test_a_step_that_was_seen(pool: Callable[[int], Pool], tmp_path: Path, options: dict[str, Any]) -> None:
    found = pool(2).run(seen, str(tmp_path), options)
    assert all("train for three steps" in refused for refused, _, _ in found)
    text = (tmp_path / "step.html").read_text()
    assert text.count("<svg") == 2 and "measured: " in text and not (tmp_path / "early.html").exists()
    plan = found[0][2][0]
    below = measured(plan, [sight.laps for _, _, (_, sight) in found], 1.0)
    for row, (_, report, (_, sight)) in zip(below.rows, found, strict=True):
        assert busy(row, "forward", "backward") == pytest.approx(sum(lap.seconds for lap in sight.laps))
        assert sum(line.measured_s for line in report.lines) == pytest.approx(sum(lap.seconds for lap in sight.laps))
        assert {line.calls for line in report.lines} == {4} or not plan.stages
        assert not math.isnan(report.step[1])
