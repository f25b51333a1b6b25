"""A plan's prediction beside what was seen of it: by class of segments, and of the whole step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch

from autopar.codegen.executable import build, offline
from autopar.codegen.lower import Target
from autopar.codegen.reprice import Tally, tally_calls
from autopar.codegen.sight import Seen
from autopar.codegen.stopwatch import Lap, between
from autopar.core.schedules import Action, Schedule, actions
from autopar.core.sharding import PHASES, Phase
from autopar.passes.decision import Decision
from autopar.passes.problem import Setting
from autopar.plan import GIB, Plan
from autopar.timeline import pipe_of, spans_of

TELLING = 1.25
"""How far a figure must be from its prediction to be pointed out."""


@dataclass(frozen=True, slots=True)
class Line:
    """One class of segments in one phase: calls, and seconds of all of them, with what they send inside; NaN where not
    seen."""

    segment: str
    phase: Phase
    calls: int
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """`lines` by class, or stage of this rank, and phase; `exposed` and `step` are (predicted, measured) seconds,
    `peak` such bytes.

    Exposed is what shows of parameters' communication: measured, all that passes between segments, with the wait for
    the host; with stages it is the wait between micro-batches. NaN where nothing was seen.
    """

    mesh: str
    lines: tuple[Line, ...]
    exposed: tuple[float, float]
    step: tuple[float, float]
    peak: tuple[float, float]

    def __str__(self) -> str:
        width = max((len(line.segment) for line in self.lines), default=8)
        head = f"{'segment':<{width}}  {'phase':<8} calls  predicted ms  measured ms"
        rows = [f"{line.segment:<{width}}  {line.phase:<8} {line.calls:>5}  {1e3 * line.predicted_s:>12.3f}  "
                f"{_ms(line.measured_s):>11}{_pointed(line.predicted_s, line.measured_s)}" for line in self.lines]
        told = [("between segments", *self.exposed), (f"step on mesh {self.mesh}", *self.step)]
        rows += [f"{name}: predicted {1e3 * predicted:.3f} ms, measured {_ms(measured)}{_pointed(predicted, measured)}"
                 for name, predicted, measured in told]
        seen = "not told by this device" if math.isnan(self.peak[1]) else f"{self.peak[1] / GIB:.3f} GiB"
        return "\n".join([head, *rows, f"peak memory: predicted {self.peak[0] / GIB:.3f} GiB, measured {seen}"])


def _ms(seconds: float) -> str:
    return "not seen" if math.isnan(seconds) else f"{1e3 * seconds:.3f}"


def _pointed(predicted: float, measured: float) -> str:
    if math.isnan(measured) or not predicted or 1 / TELLING <= measured / predicted <= TELLING:
        return ""
    return f"  ({measured / predicted:.2f}x)"


def reporter(plan: Plan, decision: Decision, setting: Setting) -> Callable[[Seen], Report]:
    """What makes a report of what was seen of a plan without stages."""
    def report(seen: Seen) -> Report:
        executable = build(Target(decision, offline(setting.mesh), setting.price, torch.device("meta")))
        tallies = tally_calls(executable, setting)
        segmented = decision.context.segmented
        names = [segmented.class_name(call.segment.class_id) for call in executable.calls]
        gaps = between(seen.laps)
        return Report("x".join(map(str, plan.mesh)), _lines(names, tallies, seen.laps),
                      (plan.exposed_s, sum(gaps.values()) if gaps else math.nan), (plan.step_time_s, seen.step_s),
                      (plan.memory_bytes["peak"], seen.peak))
    return report


def stage_reporter(plan: Plan, place: int) -> Callable[[Seen], Report]:
    """What makes a report of what a rank at a place of a pipeline saw."""
    def report(seen: Seen) -> Report:
        order = actions(cast(Schedule, plan.schedule), pipe_of(plan), place)
        mine = [span for span in spans_of(plan) if span.device == place]
        waits = max(span.end_s for span in mine) - sum(span.end_s - span.start_s for span in mine)
        laps, waited = seen.laps, math.nan
        if laps:
            waited = max(lap.began + lap.seconds for lap in laps) - sum(lap.seconds for lap in laps)
        return Report("x".join(map(str, plan.mesh)) + f" of {len(plan.pipelining.places)} places",
                      tuple(_stage_lines(plan, order, laps)), (waits, waited), (plan.step_time_s, seen.step_s),
                      (plan.memory_bytes["peak"], seen.peak))
    return report


def _stage_lines(plan: Plan, order: tuple[Action, ...], laps: list[Lap]) -> Iterator[Line]:
    for stage in dict.fromkeys(action.stage for action in order):
        for phase in PHASES:
            places = {i for i, action in enumerate(order) if (action.stage, action.phase) == (stage, phase)}
            each = plan.stages[stage].forward_s if phase == "forward" else plan.stages[stage].backward_s
            seen = sum(lap.seconds for lap in laps if lap.place in places) if laps else math.nan
            yield Line(f"stage {stage}", phase, len(places), len(places) * each, seen)


def _lines(names: list[str], tallies: list[Tally], laps: list[Lap]) -> tuple[Line, ...]:
    seen = {(lap.place, lap.phase): lap.seconds for lap in laps}
    found = []
    for phase in PHASES:
        for name in dict.fromkeys(names):
            places = [place for place, each in enumerate(names) if each == name]
            sums = [getattr(tallies[place], phase).sums for place in places]
            measured = sum(seen.get((place, phase), 0.0) for place in places) if laps else math.nan
            found.append(Line(name, phase, len(places), sum(s.work + s.inline for s in sums), measured))
    return tuple(found)
