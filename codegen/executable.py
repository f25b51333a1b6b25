"""A decided program lowered for one device, and the loop that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.draws import SEED_BITS
from autopar.codegen.lower import Lowered, Target, lower
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec
from autopar.passes.decision import Decision
from autopar.passes.factors import Factored
from autopar.passes.segments import Segment, plain_arguments

Values = dict[fx.Node, Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """One segment of the program: as it is lowered, which values come out, and what runs it.

    `run` is the lowered module or what a compiler made of it. `parameters` has the name of each external that is a
    parameter, and "" for the others.
    """

    segment: Segment
    lowered: Lowered
    exports: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Executable:
    """The calls of a program in order. `freed[i]` are the values no call after i reads.

    Of a part of a program `results` are the values it brings, and `first` is the number of its first call.
    """

    target: Target
    calls: tuple[Call, ...]
    freed: tuple[tuple[fx.Node, ...], ...]
    results: tuple[fx.Node, ...] | None = None
    first: int = 0

    @property
    def decision(self) -> Decision:
        """What it was lowered from."""
        return self.target.decision

    def run(self, given: Values, call: Callable[[int, Values], tuple[Tensor, ...]]) -> Values:
        """The program's outputs; `given` are inputs, constants and buffers, `call(i, values)` runs segment i."""
        values = dict(given)
        outputs = set(self.outputs)
        for i, each in enumerate(self.calls):
            made = call(i, values)
            values.update(zip(each.exports, made, strict=True))
            for node in self.freed[i]:
                if node not in outputs:
                    values.pop(node, None)
        return {node: values[node] for node in outputs if node in values}

    @property
    def outputs(self) -> list[fx.Node]:
        """The values the program returns: those behind what is whole, and what is left as it lies."""
        if self.results is not None:
            return list(self.results)
        factored = self.decision.context.segmented.factored
        return [*(factored.base(o)[0] for o in factored.program.whole_outputs()), *factored.program.lying_outputs()]


def offline(mesh: Mesh) -> Communicator:
    """A communicator of the mesh's first device that connects to nobody: enough to lower and to price."""
    sets = [()]
    for axis in mesh.axes:
        sets += [(*axes, axis) for axes in sets]  # type: ignore[misc]
    return Communicator(mesh, {axes: Group("", 0, tuple(range(mesh.extent(axes))), axes) for axes in sets})


def build(target: Target, known: dict[Any, Lowered] | None = None) -> Executable:
    """Lower every class of the program once for each way its inputs come in and its results go out.

    `known` are those of other decisions on the same program for the same device, to which new ones are added.
    """
    decision = target.decision
    exported = _exported(decision)
    cache: dict[Any, Lowered] = {} if known is None else known
    calls = []
    for segment in decision.context.segmented.segments:
        exports = exported.get(segment.name, {})
        assigned = tuple(decision.assignments[i] for i in segment.ops)
        key = (decision.mesh.shape, segment.class_id, assigned, _arrivals(segment, target), tuple(exports.values()))
        if key not in cache:
            cache[key] = lower(segment, tuple(exports), target)
        calls.append(Call(segment, cache[key], tuple(exports), _parameters(segment, decision), cache[key].module))
    return Executable(target, tuple(calls), _freed(tuple(calls)))


def _parameters(segment: Segment, decision: Decision) -> tuple[str, ...]:
    sources = decision.context.segmented.factored.program.sources
    return tuple(sources[n.name].name if n in decision.storage else "" for n in segment.externals)


def _exported(decision: Decision) -> dict[str, dict[fx.Node, Any]]:
    """By segment, the values that another segment or the caller reads, each with its place in the segment."""
    segmented = decision.context.segmented
    factored, producer = segmented.factored, decision.context.producer
    owner = {i: segment for segment in segmented.segments for i in segment.ops}
    outputs = [factored.base(o)[0] for o in factored.program.whole_outputs()]
    left = [*(n for s in segmented.segments for n in s.externals), *factored.program.lying_outputs()]
    read = [n for n in left if factored.base(n)[0] in producer]
    found: dict[str, list[tuple[Any, fx.Node]]] = {}
    for node in dict.fromkeys([*outputs, *read]):
        base = factored.base(node)[0]
        index = producer[base]
        result = [r.node for r in segmented.ops[index].results].index(base)
        place = (index - owner[index].first, result, _chain(node, factored), node in outputs)
        found.setdefault(owner[index].name, []).append((place, node))
    ordered = {name: sorted(each, key=lambda e: str(e[0])) for name, each in found.items()}
    return {name: {node: place for place, node in each} for name, each in ordered.items()}


def _chain(node: fx.Node, factored: Factored) -> tuple[str, ...]:
    """How a renaming comes about from the value that it renames."""
    steps = []
    while node in factored.aliases:
        steps.append(f"{node.target} {plain_arguments(node)}")
        node = factored.aliases[node].source
    return tuple(steps)


def _arrivals(segment: Segment, target: Target) -> tuple[Any, ...]:
    """In which spec each external comes, which with the class makes the local program."""
    decision = target.decision
    return tuple(decision.arrival(n) or decision.storage.get(n) or target.inputs.get(n) for n in segment.externals)


def _freed(calls: tuple[Call, ...]) -> tuple[tuple[fx.Node, ...], ...]:
    last: dict[fx.Node, int] = {}
    for i, call in enumerate(calls):
        last.update(dict.fromkeys((*call.segment.externals, *call.exports), i))
    return tuple(tuple(n for n, i in last.items() if i == place) for place in range(len(calls)))


def batch_spec(rank: int, axes: tuple[int, ...]) -> Spec:
    """An input whose samples are cut over `axes`."""
    return Spec((axes, *((),) * (rank - 1)))


@dataclass(frozen=True, slots=True)
class Turn:
    """When random numbers are drawn: in which step of a model of seed `base`, for which of its micro-batches."""

    base: int
    step: int
    micro: int = 0


def seeds_for(executable: Executable, turn: Turn, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
    """What each call takes behind its externals: a seed, and one in host memory where it asks."""
    first, count = executable.first, executable.first + len(executable.calls)
    seeds: tuple[tuple[Tensor, ...], ...] = tuple((one,) for one in seeds_of(turn, count, device)[first:])
    if any(each.lowered.host_seeded for each in executable.calls):
        on_host = seeds_of(turn, count, torch.device("cpu"))[first:]
        seeds = tuple((*one, other) if each.lowered.host_seeded else one
                      for one, other, each in zip(seeds, on_host, executable.calls, strict=True))
    return seeds


def seeds_of(turn: Turn, segments: int, device: torch.device) -> tuple[Tensor, ...]:
    """The seed of each segment, made on the device: a copy from the host would wait for its work.

    Every other place in memory is left out: compiled code copies arguments that are not aligned to 16 bytes.
    """
    first = (turn.base * 1_000_003 + turn.step) * 1_009 % 2 ** (SEED_BITS - 1) + (turn.micro << SEED_BITS)
    return torch.arange(first, first + segments, device=device).repeat_interleave(2)[::2].unbind()
