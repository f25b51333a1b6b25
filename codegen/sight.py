"""What is seen of a model while it trains: one pass segment by segment, and how far apart steps are."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from autopar.codegen.stopwatch import Lap, Stopwatch
from autopar.codegen.tape import Pass, Stepping

WATCHED, STEPS = 2, 21
"""The pass that is watched; steps that are remembered."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a model's training: when each call of one pass ran, the median step, the device's peak bytes.

    NaN where there is none.
    """

    laps: list[Lap]
    step_s: float
    peak: float


@dataclass(eq=False)
class Sight:
    """Looks at the first passes of an engine, and at when steps begin."""

    passes: int = 0
    watch: Stopwatch | None = None
    began: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))

    def look(self, step: Stepping, device: torch.device) -> Stepping:
        """`step`, watched if it is the pass to watch."""
        watch = self.begin(device)
        if watch is not None and isinstance(step, Pass):
            step.tape.watch = watch
        return step

    def begin(self, device: torch.device) -> Stopwatch | None:
        """A stopwatch for a pass that begins, if it is the one to watch: one after all is compiled, before any is
        recorded."""
        self.passes += 1
        self.began.append(time.perf_counter())
        self.watch = Stopwatch(device) if self.passes == WATCHED else self.watch
        return self.watch if self.passes == WATCHED else None

    def seen(self, device: torch.device) -> Seen:
        """What there is to tell by now."""
        gaps = [after - before for before, after in itertools.pairwise(self.began)]
        gaps = gaps[-(self.passes - WATCHED):] if self.passes > WATCHED else []
        peak = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else math.nan
        return Seen(self.watch.laps() if self.watch else [], statistics.median(gaps) if gaps else math.nan, peak)
