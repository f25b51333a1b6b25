"""Seconds and bytes of one lowered segment on this rank's device, forward and backward, collectives left out.

The host queues a whole run before the device begins it, so that seconds on GPUs are the device's own; what the host
takes is told apart. Values are random, of the shapes that come in; indices are of the vocabulary that they look up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autopar.codegen.arrivals import Arrival, arrivals
from autopar.codegen.executable import Call, Executable
from autopar.passes.decision import Decision
from autopar.passes.functional import value_of
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.nodes import shape

aten = torch.ops.aten
FEWEST, MOST, ENOUGH_S = 3, 12, 0.25
WARMUP = 3
HEAD_START = 1.5
"""How much longer than the host needs for a run the device is kept waiting before it."""
Runs = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Trial:
    """Seconds of the device forward and backward, and of the host for both; on GPUs bytes as `codegen.footprint` tells
    them: kept for the backward with results, and the most in each phase."""

    forward_s: float
    backward_s: float
    host_s: float
    saved: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0


def trial(call: Call, executable: Executable, device: torch.device) -> Trial:
    """What one run of `call` takes; its program is lowered for one rank alone."""
    decision, inputs = executable.decision, executable.target.inputs
    seeds = [torch.zeros((), dtype=torch.int64, device=device)]
    if call.lowered.host_seeded:
        seeds.append(torch.zeros((), dtype=torch.int64))
    came = zip(call.segment.externals, arrivals(call.lowered, decision, inputs), strict=True)
    arguments = [_value(node, each, call, decision, device) for node, each in came]
    once = _Once(call.run, [*arguments, *seeds])
    for _ in range(WARMUP):
        once.forward()
        once.backward()
    return (_on_gpu if device.type == "cuda" else _on_host)(once)


class _Once:
    """One run, forward and then backward; gradients come to rest in the arguments and are let go."""

    def __init__(self, run: Runs, arguments: list[Tensor]) -> None:
        self.run, self.arguments = run, arguments
        self.results: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def forward(self) -> None:
        self.results = list(self.run(*self.arguments))

    def backward(self) -> None:
        ends = [x for x in self.results if x.requires_grad]
        if len(self.gradients) != len(ends):
            self.gradients = [torch.full_like(x, 1e-3) for x in ends]
        self.results = []
        if ends:
            torch.autograd.backward(ends, self.gradients)
        del ends
        for argument in self.arguments:
            argument.grad = None


def _times(once_s: float) -> int:
    return max(FEWEST, min(MOST, round(ENOUGH_S / max(once_s, 1e-6))))


def _on_host(once: _Once) -> Trial:
    found: list[tuple[float, float]] = []
    wanted = FEWEST
    while len(found) < wanted:
        start = time.perf_counter()
        once.forward()
        middle = time.perf_counter()
        once.backward()
        end = time.perf_counter()
        found.append((middle - start, end - middle))
        wanted = _times(found[0][0] + found[0][1])
    forward, backward = (statistics.median(side) for side in zip(*found, strict=True))
    return Trial(forward, backward, forward + backward)


def _on_gpu(once: _Once) -> Trial:
    host_s = _host_seconds(once)
    found: list[tuple[float, float]] = []
    wanted = FEWEST
    while len(found) < wanted:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda._sleep(round(HEAD_START * host_s * _cycles_per_s()))
        marks[0].record()
        once.forward()
        marks[1].record()
        once.backward()
        marks[2].record()
        torch.cuda.synchronize()
        found.append((1e-3 * marks[0].elapsed_time(marks[1]), 1e-3 * marks[1].elapsed_time(marks[2])))
        wanted = _times(sum(found[0]) + HEAD_START * host_s)
    forward, backward = (statistics.median(side) for side in zip(*found, strict=True))
    return Trial(forward, backward, host_s, *_bytes(once))


def _host_seconds(once: _Once) -> float:
    """Until the host has queued a run, the device being slower or idle."""
    found = []
    for _ in range(FEWEST):
        torch.cuda.synchronize()
        start = time.perf_counter()
        once.forward()
        once.backward()
        found.append(time.perf_counter() - start)
    return min(found)


def _cycles_per_s() -> float:
    return 1e3 * torch.cuda.get_device_properties().clock_rate if hasattr(
        torch.cuda.get_device_properties(), "clock_rate") else 2e9


def _bytes(once: _Once) -> tuple[int, int, int]:
    """Saved with results, and the most of the forward and of the backward, beside arguments."""
    torch.cuda.synchronize()
    once.gradients = []
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once.forward()
    saved, forward = torch.cuda.memory_allocated() - held, torch.cuda.max_memory_allocated() - held
    torch.cuda.reset_peak_memory_stats()
    once.backward()
    backward = torch.cuda.max_memory_allocated() - held
    once.gradients = []
    return saved, forward, backward


def _value(node: fx.Node, arrival: Arrival, call: Call, decision: Decision, device: torch.device) -> Tensor:
    """A value for an external: a constant's own where it comes whole, else a random one."""
    program = decision.context.segmented.factored.program
    known = program.constants.get(node.name)
    if known is not None and tuple(known.shape) == arrival.shape:
        return known.to(device)
    if arrival.dtype.is_floating_point:
        made = torch.randn(arrival.shape, device=device).mul_(0.05).to(arrival.dtype)
        return made.requires_grad_(arrival.differentiable)
    if arrival.dtype == torch.bool:
        return torch.ones(arrival.shape, dtype=torch.bool, device=device)
    return torch.randint(words(call, decision), arrival.shape, dtype=arrival.dtype, device=device)


def words(call: Call, decision: Decision) -> int:
    """The least vocabulary that the call's ops look up or score, 1 where they do neither."""
    found = []
    for index in call.segment.ops:
        main = decision.context.segmented.ops[index].main
        first = value_of(main.args[0]) if main.args else None
        if first is not None and main.target is aten.embedding.default:
            found.append(first.shape[0])
        if first is not None and main.target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default):
            found.append(first.shape[1])
        if main.target is LINEAR_CROSS_ENTROPY:
            found.append(shape(main.args[2])[0])
    return min(found, default=1)
