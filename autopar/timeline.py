"""A step as rows of boxes, one row a device or a group of them: what a plan predicts, and what was seen of it.

    predicted(plan)             from its stages and schedule, or its segments forward and backward
    measured(plan, laps, step)  from when each rank was at what
    draw(plan, path)            as a page or a picture, by the path's ending
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

from autopar.core.errors import AutoparError
from autopar.core.schedules import PHASES, Action, Phase, Pipe, Schedule, Span, Timing, actions, played
from autopar.plan import GIB, Plan
from autopar.planned import PlannedSegment, PlannedStage

Kind = Literal["forward", "backward", "communication", "sending", "optimizer", "bubble"]
MOST_ROWS = 16
"""Devices without stages that have a row each: they all do the same."""


@dataclass(frozen=True, slots=True)
class Box:
    """Something that takes from `start_s` to `end_s`; `told` says what, `label` in a word that may stand inside.

    What is sent while a device goes on is beneath the others. `chunk` tells stages of one device apart.
    """

    kind: Kind
    start_s: float
    end_s: float
    told: str
    label: str = ""
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """What devices do, in order, and the bytes that each holds: from each moment on so many."""

    title: str
    boxes: tuple[Box, ...]
    memory: tuple[tuple[float, float], ...] = ()

    @property
    def peak(self) -> float:
        """The most bytes at once."""
        return max((nbytes for _, nbytes in self.memory), default=0.0)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A step of `step_s` seconds."""

    title: str
    rows: tuple[Row, ...]
    step_s: float

    @property
    def end_s(self) -> float:
        """When all is over: a step that was seen may have taken longer than most do."""
        return max(self.step_s, *(box.end_s for row in self.rows for box in row.boxes))

    @property
    def fullest(self) -> float:
        """The most bytes of any row, 0 where they are not told."""
        return max((row.peak for row in self.rows), default=0.0)


def draw(plan: Plan, path: Path | str, *more: Timeline) -> None:
    """Draw what is predicted, and `more` beneath it, to a page or a picture. Raises AutoparError where `path` ends
    otherwise or can't be written."""
    from autopar.timeline_page import page  # the picture's library is heavy
    from autopar.timeline_picture import picture
    makers = {".html": page, ".png": picture}
    kind = Path(path).suffix
    if kind not in makers:
        raise AutoparError(f"a timeline is to be written to {path}, needed is a name that ends in "
                           f"{' or '.join(makers)}, such as plan.html")
    makers[kind]((predicted(plan), *more), plan.summary(), Path(path))


def predicted(plan: Plan) -> Timeline:
    """What a plan predicts. Raises AutoparError where it does not tell of its segments."""
    if not plan.segments:
        raise AutoparError(f"the plan of {plan.model} does not tell of its segments, of which a timeline is made; make "
                           "the plan again")
    rows = tuple(_stage_rows(plan) if plan.stages else _rows(plan))
    return Timeline(f"predicted: {1e3 * plan.step_time_s:.3f} ms a step", rows, plan.step_time_s)


# With stages

def spans_of(plan: Plan) -> tuple[Span, ...]:
    """When a plan with stages does what."""
    stages = plan.stages
    timing = Timing(tuple(s.forward_s for s in stages), tuple(s.backward_s for s in stages),
                    tuple(s.sent_s for s in stages[:-1]))
    return played(cast(Schedule, plan.schedule), pipe_of(plan), timing)


def _stage_rows(plan: Plan) -> Iterator[Row]:
    spans, parts = spans_of(plan), list(_by_stage(plan))
    end = max(span.end_s for span in spans)
    for place, devices in enumerate(plan.pipelining.places):
        mine = [span for span in spans if span.device == place]
        boxes = [box for span in mine for box in _boxes(span, plan, parts[span.action.stage])]
        after = tuple(_finish(plan, end))
        yield Row(_devices(devices), (*boxes, *_bubbles(boxes, end), *after), _held(plan, parts, mine))


def _by_stage(plan: Plan) -> Iterator[tuple[PlannedSegment, ...]]:
    bounds = itertools.accumulate((stage.segments for stage in plan.stages), initial=0)
    for first, last in itertools.pairwise(bounds):
        yield plan.segments[first:last]


def _boxes(span: Span, plan: Plan, segments: Sequence[PlannedSegment]) -> Iterator[Box]:
    """An action as computing and the communication in it, and what it sends."""
    action, places = span.action, len(plan.pipelining.places)
    each = [segment.seconds(action.phase) for segment in segments]
    busy, total = sum(seconds[0] for seconds in each), sum(map(sum, each))
    turn = span.start_s + (span.end_s - span.start_s) * (busy / total if total else 1.0)
    told, chunk = _told(action), action.stage // places
    yield Box(action.phase, span.start_s, turn, told, str(action.micro), chunk)
    if turn < span.end_s:
        yield Box("communication", turn, span.end_s, f"communication in {told}")
    cut = action.stage if action.phase == "forward" else action.stage - 1
    if 0 <= cut < len(plan.stages) - 1 and plan.stages[cut].sent_s:
        other = action.stage + (1 if action.phase == "forward" else -1)
        yield Box("sending", span.end_s, span.end_s + plan.stages[cut].sent_s, f"to stage {other}: {told}")


def _bubbles(boxes: Sequence[Box], end: float) -> Iterator[Box]:
    """The waits between boxes."""
    busy = [box for box in boxes if box.kind != "sending"]
    edges = [0.0, *(edge for box in busy for edge in (box.start_s, box.end_s)), end]
    for start, until in zip(edges[::2], edges[1::2], strict=True):
        if until - start > 1e-9 * end:
            yield Box("bubble", start, until, "waits")


def _finish(plan: Plan, end: float) -> Iterator[Box]:
    """What is done once, after the last micro-batch."""
    turn = max(end, plan.step_time_s - plan.optimizer_s)
    if turn > end:
        yield Box("communication", end, turn, "sums of gradients, parameters gathered")
    if plan.step_time_s > turn:
        yield Box("optimizer", turn, plan.step_time_s, "optimizer")


def _held(plan: Plan, parts: Sequence[Sequence[PlannedSegment]], spans: Sequence[Span]) -> tuple[
        tuple[float, float], ...]:
    """Bytes of a device: what is there all the time, and micro-batches between forward and backward."""
    saved = [sum(segment.saved_bytes for segment in segments) for segments in parts]
    here: dict[int, PlannedStage] = {span.action.stage: plan.stages[span.action.stage] for span in spans}
    always = sum(stage.nbytes - stage.in_flight * saved[j] for j, stage in here.items())
    moves = sorted((span.start_s, saved[span.action.stage]) if span.action.phase == "forward"
                   else (span.end_s, -saved[span.action.stage]) for span in spans)
    return tuple(zip([0.0, *(at for at, _ in moves)],
                     itertools.accumulate((nbytes for _, nbytes in moves), initial=always), strict=True))


# Without

def _rows(plan: Plan) -> Iterator[Row]:
    boxes, memory = tuple(_segments(plan)), tuple(_filling(plan))
    if plan.devices > MOST_ROWS:
        yield Row(f"each of {plan.devices}", boxes, memory)
    else:
        yield from (Row(f"device {device}", boxes, memory) for device in range(plan.devices))


def _segments(plan: Plan) -> Iterator[Box]:
    """Segments forward, then backward, then the optimizer."""
    now = 0.0
    for phase, ordered in zip(PHASES, (plan.segments, plan.segments[::-1]), strict=True):
        for segment in ordered:
            busy, inline, exposed = segment.seconds(phase)
            told = f"{segment.name} {phase}"
            for kind, seconds, text in ((phase, busy, told), ("communication", inline, f"communication in {told}"),
                                        ("communication", exposed, f"parameters' communication beside {told}")):
                if seconds:
                    yield Box(cast(Kind, kind), now, now + seconds, text, _short(segment.name) if kind == phase else "")
                    now += seconds
    if plan.optimizer_s:
        yield Box("optimizer", now, now + plan.optimizer_s, "optimizer")


def _filling(plan: Plan) -> Iterator[tuple[float, float]]:
    """Bytes of a device: what segments keep comes forward, each backward has its own."""
    held = plan.memory.parameters + plan.memory.optimizer
    now = 0.0
    for segment in plan.segments:
        held += segment.saved_bytes
        yield now, held
        now += sum(segment.seconds("forward"))
    for segment in plan.segments[::-1]:
        yield now, segment.held_bytes
        now += sum(segment.seconds("backward"))
    yield now, plan.memory.parameters + plan.memory.optimizer + plan.memory.gradients


# Measured

class Lap(Protocol):
    """When a rank was at one of the things it does in a step: `place` is an action's number in its schedule, or a
    segment's."""

    @property
    def place(self) -> int: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def began(self) -> float: ...
    @property
    def seconds(self) -> float: ...


class Seen(Protocol):
    """What one rank saw of a step."""

    @property
    def laps(self) -> Sequence[Lap]: ...
    @property
    def step_s(self) -> float: ...


def draw_seen(plan: Plan, path: Path | str, ranks: Sequence[Seen]) -> None:
    """Draw what is predicted, and what each rank saw beneath it. Raises AutoparError."""
    draw(plan, path, measured(plan, [rank.laps for rank in ranks], max(rank.step_s for rank in ranks)))


def measured(plan: Plan, ranks: Sequence[Sequence[Lap]], step_s: float) -> Timeline:
    """What was seen of a step on each rank; between boxes is communication, and the wait for others."""
    if plan.stages:
        rows = tuple(_seen_row(_devices(devices), _acted(plan, place, ranks[devices[0]]), step_s)
                     for place, devices in enumerate(plan.pipelining.places))
    else:
        rows = tuple(_seen_row(f"device {rank}", _ran(plan, laps), step_s)
                     for rank, laps in enumerate(ranks[:MOST_ROWS]))
    return Timeline(f"measured: {1e3 * step_s:.3f} ms a step", rows, step_s)


def pipe_of(plan: Plan) -> Pipe:
    """The pipeline of a plan with stages."""
    return Pipe(len(plan.stages), len(plan.pipelining.places), plan.micro_batches)


def _acted(plan: Plan, place: int, laps: Sequence[Lap]) -> list[Box]:
    """The actions of one place of a pipeline."""
    pipe = pipe_of(plan)
    order = actions(cast(Schedule, plan.schedule), pipe, place)
    done = [(lap, order[lap.place]) for lap in laps]
    return [Box(lap.phase, lap.began, lap.began + lap.seconds, _told(action), str(action.micro),
                action.stage // pipe.devices) for lap, action in done]


def _ran(plan: Plan, laps: Sequence[Lap]) -> list[Box]:
    """The segments of one rank."""
    names = [segment.name for segment in plan.segments]
    return [Box(lap.phase, lap.began, lap.began + lap.seconds, f"{names[lap.place]} {lap.phase}",
                _short(names[lap.place])) for lap in laps]


def _seen_row(title: str, boxes: list[Box], step_s: float) -> Row:
    end = max((box.end_s for box in boxes), default=0.0)
    rest = (Box("optimizer", end, step_s, "sums of gradients, optimizer, next batch"),) if step_s > end else ()
    return Row(title, (*boxes, *_bubbles(boxes, end), *rest))


def _told(action: Action) -> str:
    return f"stage {action.stage} {action.phase}, micro-batch {action.micro}"


def _short(name: str) -> str:
    """The end of a segment's name, such as h_3."""
    return "_".join(name.split("_")[-2:])


def _devices(devices: Sequence[int]) -> str:
    first, *rest = devices
    if not rest:
        return f"device {first}"
    together = list(devices) == list(range(first, first + len(devices)))
    return f"devices {first}-{devices[-1]}" if together else f"devices {', '.join(map(str, devices))}"


def gib(nbytes: float) -> str:
    """Bytes as they stand beside a row."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / 2**20:.1f} MiB"
