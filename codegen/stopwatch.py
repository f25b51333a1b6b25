"""When each segment of one pass ran, by the device's clock: what a report sets beside the prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from autopar.core.sharding import PHASES, Phase

Mark = Callable[[], float]
"""Seconds since whenever, once the device has got there."""


@dataclass(frozen=True, slots=True)
class Lap:
    """One call in one phase: seconds that it ran, and from the start of the pass to when it began."""

    place: int
    phase: Phase
    began: float
    seconds: float


@dataclass(eq=False)
class Stopwatch:
    """Marks around the calls of one pass on `device`, from its making on; reading them waits for the device."""

    device: torch.device
    marks: list[tuple[int, Phase, Mark, Mark]] = field(default_factory=list)
    origin: torch.cuda.Event | None = None
    start: Mark = field(init=False)

    def __post_init__(self) -> None:
        self.start = self._mark()

    @contextmanager
    def over(self, place: int, phase: Phase) -> Iterator[None]:
        """Around what call `place` runs."""
        start = self._mark()
        yield
        self.marks.append((place, phase, start, self._mark()))

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            now = time.perf_counter()
            return lambda: now
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        origin = self.origin = self.origin or event
        return lambda: 1e-3 * origin.elapsed_time(event)

    def laps(self) -> list[Lap]:
        """All calls that ran, in order."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first = self.start()
        return [Lap(place, phase, start() - first, end() - start()) for place, phase, start, end in self.marks]


def between(laps: list[Lap]) -> dict[Phase, float]:
    """Seconds of each phase, from its first call to its last, in which no call ran."""
    found: dict[Phase, float] = {}
    for phase in PHASES:
        mine = [lap for lap in laps if lap.phase == phase]
        if mine:
            span = max(lap.began + lap.seconds for lap in mine) - min(lap.began for lap in mine)
            found[phase] = span - sum(lap.seconds for lap in mine)
    return found
