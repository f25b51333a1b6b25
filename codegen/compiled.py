"""Segments compiled: each distinct one once, with static shapes, for all segments that are equal to it.

`torch.compile` traces a lowered segment whole. Its reshards, gradient sums and substitutes are autograd functions and
plain code around `_c10d_functional` ops, so collectives come into the forward and the backward graph like any other op
and Inductor may fuse what is around them. What FSDP2 gathers is gathered outside, and comes in as an argument. One
segment more is compiled for each further way that its arguments lie in memory, and when gradients are off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, fx

from autopar.codegen import private
from autopar.codegen.attending import Chosen, chosen
from autopar.codegen.executable import Call, Executable
from autopar.codegen.joint import Cut
from autopar.codegen.lower import Lowered, Target
from autopar.codegen.marks import marked
from autopar.codegen.ranks import together
from autopar.codegen.replay import Launches
from autopar.core.errors import AutoparError

log = logging.getLogger("autopar")
Meet = Callable[[Callable[[], None]], None]
"""Runs what may raise, on all ranks that compile the same."""
Compiler = Literal["inductor", "inductor-no-cudagraphs", "eager"]


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

    def __init__(self, lowered: Lowered, progress: Progress, attention: Chosen, cut: Cut | None = None,
                 meet: Meet = together) -> None:
        self.name, self.compilations, self._ranks, self._cut = lowered.segment.name, 0, meet, cut
        self._progress, self._met, self._first, self._order = progress, set[bool](), False, attention.order
        module = attention.module if cut is None else marked(lowered)
        self._run = torch.compile(module.forward, backend=self._compile, fullgraph=True, dynamic=False)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the lowered module returns. Raises AutoparError where it can't be compiled.

        At the first call, with gradients or without, ranks tell each other before any of them runs what was compiled:
        where one alone can't compile it all raise.
        """
        before, start = self.compilations, time.perf_counter()
        self._first = torch.is_grad_enabled() not in self._met
        try:
            found: tuple[Tensor, ...] = self._run(*inputs)
        except Exception as error:
            told = self._told(error)
            if told is error:
                raise
            raise told from error
        self._meet(None)
        if self.compilations > before:
            self._progress.one_more(time.perf_counter() - start)
        return found

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        try:
            made = private.inductor(graph, inputs, self._order, self._cut)
        except Exception as error:
            self._meet(self._refusal(error))
            raise
        self._meet(None)
        return made

    def _meet(self, refusal: Exception | None) -> None:
        """Once a first call, on all ranks. Raises AutoparError where a rank has been refused."""
        if self._first:
            self._first = False
            self._met.add(torch.is_grad_enabled())
            self._ranks(partial(_raise, refusal))

    def _told(self, error: Exception) -> Exception:
        """What to raise for what came of a call."""
        reason = getattr(error, "inner_exception", error)
        if isinstance(reason, AutoparError):
            return reason
        told = self._refusal(error) if isinstance(error, private.compiler_errors()) else error
        self._meet(told)
        return told

    def _refusal(self, error: Exception) -> AutoparError:
        reason = getattr(error, "inner_exception", error)
        said = str(reason).strip().partition("\n")[0]
        refusal = AutoparError(f"segment {self.name} can't be compiled ({type(reason).__name__}: {said}); pass "
                               "compiler=\"eager\" to run it as it is")
        refusal.__cause__ = error
        return refusal


def _raise(refusal: Exception | None) -> None:
    if refusal is not None:
        raise refusal


class CutSegment:
    """Runs a lowered segment op by op, and keeps for its backward what `cut` says.

    It is traced once for each way that its arguments lie in memory; with gradients off it runs as it is.
    """

    def __init__(self, lowered: Lowered, cut: Cut) -> None:
        self._plain, self._module, self._cut = lowered.module, marked(lowered), cut
        self._known: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the lowered module returns."""
        if not torch.is_grad_enabled():
            plain: tuple[Tensor, ...] = self._plain(*inputs)
            return plain
        lie = tuple((x.shape, x.stride(), x.requires_grad) for x in inputs)
        if lie not in self._known:
            self._known[lie] = private.partitioned(self._module.forward, self._cut)
        return self._known[lie](*inputs)


def by_class(executable: Executable, meet: Meet = together) -> Executable:
    """The executable with every distinct lowered segment compiled when it is first called, where ranks `meet`, once for
    each set of values that it is to keep."""
    progress = Progress(len(_distinct(executable)))
    return _with(executable, {key: CompiledSegment(lowered, progress, _attention(lowered, executable.target),
                                                   None if key[1] is None else Cut(key[1]), meet)
                              for key, lowered in _distinct(executable).items()})


def _attention(lowered: Lowered, target: Target) -> Chosen:
    """The attention kernels of a segment, measured where there is a choice."""
    return chosen(lowered.module, target.decision) if target.device.type == "cuda" else Chosen(lowered.module)


def as_it_is(executable: Executable) -> Executable:
    """The executable run op by op; what is kept for its backward is autograd's own choice where the plan has none."""
    return _with(executable, {key: lowered.module if key[1] is None else CutSegment(lowered, Cut(key[1]))
                              for key, lowered in _distinct(executable).items()})


def _key(executable: Executable, call: Call) -> tuple[int, tuple[str, ...] | None]:
    """What calls that run the same code have in common."""
    return id(call.lowered), executable.decision.kept.get(call.segment.name)


def _distinct(executable: Executable) -> dict[tuple[int, tuple[str, ...] | None], Lowered]:
    return {_key(executable, call): call.lowered for call in executable.calls}


def _with(executable: Executable, made: Mapping[Any, Callable[..., tuple[Tensor, ...]]]) -> Executable:
    calls = (replace(call, run=made[_key(executable, call)]) for call in executable.calls)
    return replace(executable, calls=tuple(calls))


COMPILERS: dict[Compiler, Callable[[Executable], Executable]] = {
    "inductor": by_class, "inductor-no-cudagraphs": by_class, "eager": as_it_is}
"""By name, what a compiler makes of an executable."""
BY_STAGE: dict[Compiler, Callable[[Executable], Executable]] = {
    name: partial(by_class, meet=lambda act: act()) if name != "eager" else plain for name, plain in COMPILERS.items()}
"""The same for stages, whose segments other ranks do not compile: one that can't ends them all."""
RECORDS: dict[Compiler, Launches] = {"inductor": "recorded", "inductor-no-cudagraphs": "each", "eager": "each"}
"""By name, how steps are launched on GPUs."""


def compiler_for(device: torch.device, asked: Compiler | None) -> Compiler:
    """The compiler that is asked for, else the default of the device. Raises AutoparError where it can't run.

    Inductor writes Triton for GPUs. For CPUs it writes C++, to compile which takes longer than a test or a demo trains:
    the default there is "eager".
    """
    usable = device.type != "cuda" or private.triton_is_usable()
    if asked in ("inductor", "inductor-no-cudagraphs") and not usable:
        raise AutoparError(f"compiler=\"{asked}\" needs Triton for {device}, and finds none "
                           "that is usable; install triton, or pass compiler=\"eager\"")
    return asked or ("inductor" if device.type == "cuda" and usable else "eager")
