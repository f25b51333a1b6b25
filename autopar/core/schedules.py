"""In which order a pipeline's stages run their micro-batches: what runs, and what predictions and drawings are made of.

Of S stages on P devices (or groups of them), stage v is on device v mod P; without interleaving S = P. A schedule gives
for each device the actions in their order:

    gpipe        all forwards, then all backwards; a stage keeps M micro-batches
    1f1b         S - 1 - j forwards ahead, then one forward and one backward in turn; stage j keeps min(M, S - j)
    interleaved  1f1b over V = S / P stages a device, P micro-batches of one stage after those of the other
    looped       S = P + 1: the last stage is with the first, so that what embedding and head share has one owner; the
                 order is that of a play in which a backward goes first, then the latest stage

Sources: Huang et al. 2019 (gpipe), Narayanan et al. 2019 (1f1b), Narayanan et al. 2021 (interleaved).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from autopar.core.errors import AutoparError, UnknownName

Schedule = Literal["gpipe", "1f1b", "interleaved", "looped"]
Phase = Literal["forward", "backward"]
PHASES: tuple[Phase, ...] = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Action:
    """One micro-batch through one stage, forward or backward."""

    phase: Phase
    stage: int
    micro: int


@dataclass(frozen=True, slots=True)
class Pipe:
    """`stages` on `devices`, `micro_batches` a step."""

    stages: int
    devices: int
    micro_batches: int

    def __post_init__(self) -> None:
        if min(self.devices, self.micro_batches) < 1 or self.stages < self.devices:
            raise AutoparError(f"{self.stages} stages on {self.devices} devices with {self.micro_batches} micro-batches"
                               ": needed are a stage on each device and at least one micro-batch")

    @property
    def chunks(self) -> int:
        """Stages a device, of the device that has most."""
        return -(-self.stages // self.devices)


def _gpipe(pipe: Pipe, device: int) -> list[Action]:
    every = range(pipe.micro_batches)
    stages = range(device, pipe.stages, pipe.devices)
    return [*(Action("forward", stage, m) for stage in stages for m in every),
            *(Action("backward", stage, m) for stage in reversed(stages) for m in every)]


def _alternating(forwards: Sequence[Action], backwards: Sequence[Action], ahead: int) -> list[Action]:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return [*forwards[:ahead], *steady, *backwards[len(forwards) - ahead:]]


def _one_forward_one_backward(pipe: Pipe, device: int) -> list[Action]:
    every = range(pipe.micro_batches)
    ahead = min(pipe.micro_batches, pipe.stages - 1 - device)
    return _alternating([Action("forward", device, m) for m in every], [Action("backward", device, m) for m in every],
                        ahead)


def _interleaved(pipe: Pipe, device: int) -> list[Action]:
    p, v, total = pipe.devices, pipe.chunks, pipe.micro_batches * pipe.chunks
    places = [(k // p % v, k // (p * v) * p + k % p) for k in range(total)]
    forwards = [Action("forward", chunk * p + device, m) for chunk, m in places]
    backwards = [Action("backward", (v - 1 - chunk) * p + device, m) for chunk, m in places]
    return _alternating(forwards, backwards, min(total, (p - 1 - device) * 2 + (v - 1) * p))


SHORT = 0.1
"""The nominal length of the last stage, by which the first is shorter; of others 1, of backwards twice as much."""
SPARE = 2
"""Micro-batches that a stage may keep beyond those that stages from it on could work on: they bridge its waits."""


def _looped(pipe: Pipe, device: int) -> list[Action]:
    return [span.action for span in _looped_play(pipe) if span.device == device]


@lru_cache(maxsize=64)
def _looped_play(pipe: Pipe) -> tuple[Span, ...]:
    """A play of nominal lengths: of what is ready a device does a backward first, then the latest stage."""
    length = [1.0 - SHORT] + [1.0] * (pipe.stages - 2) + [SHORT]
    left = {Action(phase, stage, m) for phase in ("forward", "backward") for stage in range(pipe.stages)
            for m in range(pipe.micro_batches)}
    timing = Timing(tuple(length), tuple(2.0 * each for each in length), (0.0,) * (pipe.stages - 1))
    ends, free, kept = dict[Action, float](), [0.0] * pipe.devices, [0] * pipe.stages
    following: dict[tuple[Phase, int], int] = {
        (phase, stage): 0 for phase in PHASES for stage in range(pipe.stages)}
    spans: list[Span] = []
    while len(spans) < len(left):
        best: tuple[float, int, int, Action] | None = None
        for (phase, stage), m in following.items():
            ready = _ready(Action(phase, stage, m), pipe, timing, ends) if m < pipe.micro_batches else None
            if ready is None or (phase == "forward" and kept[stage] > pipe.stages + SPARE - stage):
                continue
            start = max(ready, free[stage % pipe.devices])
            rank = (start, 0 if phase == "backward" else 1, -stage, Action(phase, stage, m))
            best = rank if best is None or rank[:3] < best[:3] else best
        assert best is not None, f"{pipe} waits for itself"
        action, device = best[3], best[3].stage % pipe.devices
        free[device] = ends[action] = best[0] + timing.seconds(action)
        kept[action.stage] += 1 if action.phase == "forward" else -1
        following[action.phase, action.stage] += 1
        spans.append(Span(action, device, best[0], free[device]))
    return tuple(sorted(spans, key=lambda span: (span.start_s, span.end_s)))


_MAKERS: dict[Schedule, Callable[[Pipe, int], list[Action]]] = {
    "gpipe": _gpipe, "1f1b": _one_forward_one_backward, "interleaved": _interleaved,
    "looped": _looped}
SCHEDULES: tuple[Schedule, ...] = tuple(_MAKERS)


def check_schedule(name: str, pipe: Pipe) -> None:
    """Raises AutoparError where a pipe can't run by the schedule called `name`."""
    if name not in _MAKERS:
        raise UnknownName("schedule", name, list(_MAKERS))
    if name == "1f1b" and pipe.chunks > 1:
        raise AutoparError(f"schedule 1f1b has one stage a device, here are {pipe.chunks}; use interleaved")
    if name in ("gpipe", "interleaved") and pipe.stages % pipe.devices:
        raise AutoparError(f"schedule {name} has as many stages on each device, here are {pipe.stages} on "
                           f"{pipe.devices}; use looped, or stages that divide by the devices")
    if name == "looped" and pipe.stages != pipe.devices + 1:
        raise AutoparError(f"schedule looped has one stage more than devices, here are {pipe.stages} on "
                           f"{pipe.devices}; use 1f1b or interleaved")
    if name == "interleaved" and pipe.micro_batches % pipe.devices:
        raise AutoparError(f"schedule interleaved wants micro-batches that divide by the {pipe.devices} devices of the "
                           f"pipeline, here are {pipe.micro_batches}; use "
                           f"{-(-pipe.micro_batches // pipe.devices) * pipe.devices}, or 1f1b")


def _source(action: Action, pipe: Pipe) -> Action | None:
    """The action of another stage that makes what an action takes, None where it takes nothing from another."""
    stage = action.stage + (-1 if action.phase == "forward" else 1)
    return Action(action.phase, stage, action.micro) if 0 <= stage < pipe.stages else None


@lru_cache(maxsize=64)
def arrivals(name: Schedule, pipe: Pipe,
             phases: tuple[Phase, ...] = PHASES) -> tuple[tuple[tuple[Action, ...], ...], ...]:
    """By device and place in its order, the actions whose values begin to come before the one there.

    Devices go in rounds, an action each where it can be: what one sends in a round the other begins to receive before
    the next. So no device waits for ever, not even one that waits for all its messages, sent ones too, before it
    computes: those of the rounds before have been begun at both ends. Of `phases` alone where others are left out.
    """
    orders = [[a for a in actions(name, pipe, device) if a.phase in phases] for device in range(pipe.devices)]
    found: list[list[list[Action]]] = [[[] for _ in order] for order in orders]
    takers = {_source(a, pipe): a for order in orders for a in order}
    places, done = [0] * pipe.devices, set[Action | None]([None])
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        going = {device: order[place] for device, (place, order) in enumerate(zip(places, orders, strict=True))
                 if place < len(order) and _source(order[place], pipe) in done}
        assert going, f"{pipe} waits for itself"
        for device in going:
            places[device] += 1
        done.update(going.values())
        for device, taker in ((device, takers.get(action)) for device, action in going.items()):
            if taker is not None and (other := taker.stage % pipe.devices) != device:
                found[other][places[other]].append(taker)
    return tuple(tuple(map(tuple, each)) for each in found)


@lru_cache(maxsize=256)
def actions(name: Schedule, pipe: Pipe, device: int) -> tuple[Action, ...]:
    """What a device does, in order. Raises AutoparError where the schedule can't be."""
    check_schedule(name, pipe)
    return tuple(_MAKERS[name](pipe, device))


def in_flight(name: Schedule, pipe: Pipe, stage: int) -> int:
    """The most micro-batches that a stage keeps at once."""
    most = now = 0
    for action in actions(name, pipe, stage % pipe.devices):
        if action.stage == stage:
            now += 1 if action.phase == "forward" else -1
            most = max(most, now)
    return most


@dataclass(frozen=True, slots=True)
class Span:
    """When an action runs, in seconds from the start of the step."""

    action: Action
    device: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each stage forward and backward, and of bringing a micro-batch over each cut, one way each."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    sent: tuple[float, ...]

    def seconds(self, action: Action) -> float:
        """Seconds of an action."""
        return (self.forward if action.phase == "forward" else self.backward)[action.stage]


def played(name: Schedule, pipe: Pipe, timing: Timing) -> tuple[Span, ...]:
    """When each action runs, each as soon as its device is free and what it needs has come."""
    queues = [list(actions(name, pipe, device)) for device in range(pipe.devices)]
    places, free, ends = [0] * pipe.devices, [0.0] * pipe.devices, dict[Action, float]()
    spans: list[Span] = []
    while any(place < len(queue) for place, queue in zip(places, queues, strict=True)):
        before = len(spans)
        for device, queue in enumerate(queues):
            while places[device] < len(queue):
                action = queue[places[device]]
                ready = _ready(action, pipe, timing, ends)
                if ready is None:
                    break
                start = max(free[device], ready)
                free[device] = ends[action] = start + timing.seconds(action)
                spans.append(Span(action, device, start, free[device]))
                places[device] += 1
        assert len(spans) > before, f"schedule {name} of {pipe} waits for itself"
    return tuple(spans)


def _ready(action: Action, pipe: Pipe, timing: Timing, ends: dict[Action, float]) -> float | None:
    """When what an action needs has come, None where that is not known yet."""
    before = _source(action, pipe)
    if before is None:
        return 0.0 if action.phase == "forward" else ends.get(Action("forward", action.stage, action.micro))
    return ends[before] + timing.sent[min(before.stage, action.stage)] if before in ends else None
