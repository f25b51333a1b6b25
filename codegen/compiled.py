"""Segments compiled: each distinct one once, with static shapes, for all segments that are equal to it.

`torch.compile` traces a lowered segment whole. Its reshards, gradient sums and substitutes are autograd functions and
plain code around `_c10d_functional` ops, so collectives come into the forward and the backward graph like any other op
and Inductor may fuse what is around them. What FSDP2 gathers is gathered outside, and comes in as an argument. One
segment more is compiled for each further way that its arguments lie in memory, and when gradients are off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, fx

from autopar.codegen import private
from autopar.codegen.executable import Executable
from autopar.codegen.lower import Lowered
from autopar.codegen.replay import Launches
from autopar.core.errors import AutoparError

log = logging.getLogger("autopar")
Compiler = Literal["inductor", "inductor-no-graphs", "eager"]


@dataclass(eq=False)
class Progress:
    """How many of the `total` distinct segments are compiled, and the seconds that took. Rank 0 tells."""

    total: int
    done: int = 0
    seconds: float = 0.0

    def one_more(self, seconds: float) -> None:
        """Count one that took `seconds`, its first run included."""
        self.done, self.seconds = self.done + 1, self.seconds + seconds
        if dist.get_rank() == 0:
            log.info("compiled %d of %d segment classes, %.0f s", min(self.done, self.total), self.total, self.seconds)


class CompiledSegment:
    """Runs a lowered segment compiled by Inductor, forward and backward, at its first call."""

    def __init__(self, lowered: Lowered, progress: Progress) -> None:
        self.name, self.compilations = lowered.segment.name, 0
        self._progress = progress
        self._run = torch.compile(lowered.module.forward, backend=self._compile, fullgraph=True, dynamic=False)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the lowered module returns. Raises AutoparError where it can't be compiled."""
        before, start = self.compilations, time.perf_counter()
        try:
            found: tuple[Tensor, ...] = self._run(*inputs)
        except Exception as error:
            if not isinstance(error, private.compiler_errors()):
                raise
            reason = getattr(error, "inner_exception", error)
            said = str(reason).strip().partition("\n")[0]
            raise AutoparError(f"segment {self.name} can't be compiled ({type(reason).__name__}: {said}); pass "
                               "compiler=\"eager\" to run it as it is") from error
        if self.compilations > before:
            self._progress.one_more(time.perf_counter() - start)
        return found

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return private.inductor(graph, inputs)


def by_class(executable: Executable) -> Executable:
    """The executable with every distinct lowered segment compiled when it is first called."""
    distinct = {id(call.lowered): call.lowered for call in executable.calls}
    progress = Progress(len(distinct))
    made = {key: CompiledSegment(lowered, progress) for key, lowered in distinct.items()}
    return replace(executable, calls=tuple(replace(call, run=made[id(call.lowered)]) for call in executable.calls))


COMPILERS: dict[Compiler, Callable[[Executable], Executable]] = {
    "inductor": by_class, "inductor-no-graphs": by_class, "eager": lambda plain: plain}
"""By name, what a compiler makes of an executable."""
RECORDS: dict[Compiler, Launches] = {"inductor": "recorded", "inductor-no-graphs": "each", "eager": "each"}
"""By name, how steps are launched on GPUs."""


def compiler_for(device: torch.device, asked: Compiler | None) -> Compiler:
    """The compiler that is asked for, else the default of the device. Raises AutoparError where it can't run.

    Inductor writes Triton for GPUs. For CPUs it writes C++, to compile which takes longer than a test or a demo trains:
    the default there is "eager".
    """
    usable = device.type != "cuda" or private.triton_is_usable()
    if asked in ("inductor", "inductor-no-graphs") and not usable:
        raise AutoparError(f"compiler=\"{asked}\" needs Triton for {device}, and finds none "
                           "that is usable; install triton, or pass compiler=\"eager\"")
    return asked or ("inductor" if device.type == "cuda" and usable else "eager")
