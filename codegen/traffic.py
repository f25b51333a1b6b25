"""What a lowered program sends inside of its stages, by collective and axes: what a layout of devices goes by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from autopar.codegen.collectives import ReduceGradients, Reshard
from autopar.codegen.executable import Call, Executable
from autopar.codegen.reprice import Memory
from autopar.core.reshard import MOVES_DATA, Primitive
from autopar.passes.decision import Decision

Sent = tuple[Primitive, tuple[int, ...], float, float]
"""A collective over axes of a stage's mesh, the bytes of the larger of its local tensors, and how often a step."""


def traffic(executable: Executable, calls: Sequence[tuple[int, Memory]], micro_batches: int) -> list[Sent]:
    """What the calls of these numbers send in a step; a collective's bytes are the mean of those over the same axes."""
    total: dict[tuple[Primitive, tuple[int, ...]], tuple[float, float]] = {}
    for place, memory in calls:
        call = executable.calls[place]
        once = _once(call, memory, executable.decision)
        for primitive, axes, nbytes, times in itertools.chain(_inside(call, micro_batches), once):
            known = total.get((primitive, axes), (0.0, 0.0))
            total[primitive, axes] = known[0] + times * nbytes, known[1] + times
    return [(primitive, axes, nbytes / times, times) for (primitive, axes), (nbytes, times) in total.items()]


def _inside(call: Call, micro_batches: int) -> Iterator[Sent]:
    """What each micro-batch sends, forward and backward."""
    modules = dict(call.lowered.module.named_modules())
    for node in call.lowered.module.graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, Reshard):
            _, differentiable = node.meta["reshard"]
            for step, nbytes in zip(module.steps, module.nbytes, strict=True):
                for primitive in (step.forward, *((step.backward,) if differentiable else ())):
                    if primitive in MOVES_DATA:
                        yield primitive, step.axes, float(nbytes), float(micro_batches)


def _once(call: Call, memory: Memory, decision: Decision) -> Iterator[Sent]:
    """The sums of gradients, over the axes that have the same parameters."""
    reduced = {module.axes for module in call.lowered.module.modules() if isinstance(module, ReduceGradients)}
    gathered = {decision.storage[n].gathered for n in call.segment.externals if n in decision.storage}
    for axes in reduced:
        yield "all_reduce", axes, memory.gradients, 1.0
    for axes in gathered - {()}:
        yield "reduce_scatter", axes, memory.gradients, 1.0
        yield "all_gather", axes, memory.gradients, 1.0
