"""What a training run prints, on rank 0 alone: a line that moves in a terminal, else a line now and then."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence

import torch.distributed as dist
from budget import Budget
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import nn

from autopar import Plan

LINE_SECONDS = 5.0
OPS_SHOWN = 4
RECENT = 10
"""Steps over which the speed and the last loss are averaged."""
CURVE_WIDTH, CURVE_HEIGHT = 64, 8
INK = "'-."
"""High, middle and low in a line of the curve."""


class Display:
    """Prints on rank 0, nothing elsewhere. `unit` is what a step has `per_step` of, such as tokens."""

    def __init__(self, unit: str, per_step: int) -> None:
        self.losses: list[float] = []
        self._unit, self._per_step = unit, per_step
        self._console = Console(quiet=dist.get_rank() != 0, highlight=False, markup=False, soft_wrap=True)
        self._bar = Progress(BarColumn(10), TextColumn("{task.description}"), console=self._console, transient=True)
        self._task = self._bar.add_task("", total=1.0)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._last_line, self._spent, self._timed = 0.0, 0.0, 0

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text)

    def plan(self, plan: Plan, model: nn.Module) -> None:
        """Which model, where, and how."""
        count = sum(p.numel() for p in model.parameters())
        world, mesh = dist.get_world_size(), "x".join(map(str, plan.mesh))
        self.say(f"model  {plan.model}, {count / 1e6:.2f} million parameters, on {world} rank{'s' * (world > 1)}")
        self.say(f"plan   mode {plan.mode}, mesh {mesh} of {plan.cluster}, {plan.precision}, solved in "
                 f"{plan.solve_s:.1f} s; predicted {1e3 * plan.seconds.step:.0f} ms a step, "
                 f"{plan.memory.total / 2**20:.0f} MiB a rank")
        shown = [op for op in plan.ops if " X " in op.strategy]
        width = max(len(op.name) for op in shown[:OPS_SHOWN])
        for op in shown[:OPS_SHOWN]:
            self.say(f"         {op.name:<{width}}  {op.strategy}")
        self.say(f"         and {len(plan.ops) - OPS_SHOWN} more (--plan-out FILE saves them all)")

    def begin(self) -> None:
        """Show the moving line, in a terminal."""
        if self._console.is_terminal and not self._console.quiet:
            self._bar.start()

    def step(self, budget: Budget, loss: float, seconds: float) -> None:
        """A step was made in `seconds`. The first one warms up and does not count for the speed."""
        self.losses.append(loss)
        if self._timed:
            self._spent += seconds
            self._recent.append(seconds)
        self._timed += 1
        text = (f"step {budget.step:>5}   loss {mean(self.losses[-RECENT:]):.3f}   {self._speed(self._recent):>7} "
                f"{self._unit}/s   {clock(budget.seconds)} elapsed   {clock(budget.seconds_left)} left")
        if self._console.is_terminal:
            self._bar.update(self._task, description=text, completed=budget.fraction)
        elif self._timed == 1 or time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(text)

    def end(self, held_out: str, stopped: bool) -> bool:
        """The curve and the summary; whether the loss fell."""
        if self._bar.live.is_started:
            self._bar.stop()
        if not self._timed:
            self.say("no step made: the run had reached its --steps or --minutes already")
            return True
        first, last = self.losses[0], mean(self.losses[-min(RECENT, max(1, len(self.losses) // 2)):])
        self.say("")
        for line in curve(self.losses):
            self.say(line)
        speed = self._speed([self._spent / max(1, self._timed - 1)])
        self.say(f"{'stopped by Ctrl-C: ' * stopped}loss {first:.2f} -> {last:.2f}, {held_out}, {speed} {self._unit}/s")
        if last >= first:
            self.say("the loss did not fall; try a lower --lr or more --steps")
        return last < first

    def _speed(self, seconds: Sequence[float]) -> str:
        return f"{self._per_step * len(seconds) / sum(seconds):,.0f}" if sum(seconds) else "-"


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def clock(seconds: float) -> str:
    """Minutes and seconds, `1:05`."""
    return "-:--" if math.isnan(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def curve(values: Sequence[float], width: int = CURVE_WIDTH, height: int = CURVE_HEIGHT) -> list[str]:
    """The values from left to right as a drawing of `height` lines in plain ASCII, several to a column if need be."""
    columns = min(width, len(values))
    means = [mean(values[len(values) * i // columns:len(values) * (i + 1) // columns]) for i in range(columns)]
    low, high = min(means), max(means)
    levels = len(INK) * height - 1
    places = [divmod(round((high - m) / (high - low or 1.0) * levels), len(INK)) for m in means]
    labels = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    lines = ["".join(INK[level] if at == row else " " for at, level in places).rstrip() for row in range(height)]
    return [f"{labels.get(row, ''):>6} |{line}" for row, line in enumerate(lines)] + [f"{'+':>8}{'-' * columns}"]
