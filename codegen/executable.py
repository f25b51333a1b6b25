"""A decided program lowered for one device, and the loop that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.lower import Lowered, Target, lower
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec
from autopar.passes.decision import Decision
from autopar.passes.ops import Op
from autopar.passes.segments import Segment

Values = dict[fx.Node, Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """One segment of the program: which lowered module runs it, what goes in and which values come out."""

    segment: Segment
    lowered: Lowered
    exports: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Executable:
    """The calls of a program in order. `freed[i]` are the values no call after i reads."""

    decision: Decision
    calls: tuple[Call, ...]
    freed: tuple[tuple[fx.Node, ...], ...]

    def run(self, given: Values, seed: Tensor, call: Callable[..., tuple[Tensor, ...]]) -> Values:
        """The program's outputs; `given` are inputs, constants and buffers, `call(i, values, seed)` runs segment i."""
        values = dict(given)
        outputs = set(self.outputs)
        for i, each in enumerate(self.calls):
            made = call(i, values, seed)
            values.update(zip(each.exports, made, strict=True))
            for node in self.freed[i]:
                if node not in outputs:
                    values.pop(node, None)
        return {node: values[node] for node in outputs}

    @property
    def outputs(self) -> list[fx.Node]:
        """The values the program returns."""
        factored = self.decision.context.segmented.factored
        return [factored.base(o)[0] for o in factored.program.outputs if isinstance(o, fx.Node)]


def offline(mesh: Mesh) -> Communicator:
    """A communicator of the mesh's first device that connects to nobody: enough to lower and to price."""
    sets = [()]
    for axis in mesh.axes:
        sets += [(*axes, axis) for axes in sets]  # type: ignore[misc]
    return Communicator(mesh, {axes: Group("", 0, tuple(range(mesh.extent(axes)))) for axes in sets})


def build(target: Target) -> Executable:
    """Lower every class of the program once for each way its inputs come in."""
    segmented = target.decision.context.segmented
    exported = _exported(target.decision)
    places = _places(segmented.ops, segmented.segments, exported)
    cache: dict[Any, Lowered] = {}
    calls = []
    for segment in segmented.segments:
        exports = tuple(segmented.ops[segment.first + i].results[j].node for i, j in places[segment.class_id])
        key = (segment.class_id, _arrivals(segment, target), _returned(exports, target.decision))
        if key not in cache:
            cache[key] = lower(segment, exports, target)
        calls.append(Call(segment, cache[key], exports))
    return Executable(target.decision, tuple(calls), _freed(tuple(calls)))


def _exported(decision: Decision) -> set[fx.Node]:
    """The op results that another segment or the caller reads."""
    factored = decision.context.segmented.factored
    outputs = {factored.base(o)[0] for o in factored.program.outputs if isinstance(o, fx.Node)}
    return outputs | {n for s in decision.context.segmented.segments for n in s.externals if n in decision.sources}


def _places(ops: tuple[Op, ...], segments: tuple[Segment, ...],
            exported: set[fx.Node]) -> dict[int, list[tuple[int, int]]]:
    """By class, (op, result) of everything that some segment of the class exports."""
    found: dict[int, dict[tuple[int, int], None]] = {}
    for segment in segments:
        places = found.setdefault(segment.class_id, {})
        for i in segment.ops:
            for j, result in enumerate(ops[i].results):
                if result.node in exported:
                    places[i - segment.first, j] = None
    return {class_id: sorted(places) for class_id, places in found.items()}


def _arrivals(segment: Segment, target: Target) -> tuple[Any, ...]:
    """In which spec each external comes, which with the class makes the local program."""
    decision = target.decision
    return tuple(decision.sources.get(n) or decision.storage.get(n) or target.inputs.get(n) for n in segment.externals)


def _returned(exports: tuple[fx.Node, ...], decision: Decision) -> tuple[bool, ...]:
    factored = decision.context.segmented.factored
    outputs = {factored.base(o)[0] for o in factored.program.outputs if isinstance(o, fx.Node)}
    return tuple(node in outputs for node in exports)


def _freed(calls: tuple[Call, ...]) -> tuple[tuple[fx.Node, ...], ...]:
    last: dict[fx.Node, int] = {}
    for i, call in enumerate(calls):
        last.update(dict.fromkeys((*call.segment.externals, *call.exports), i))
    return tuple(tuple(n for n, i in last.items() if i == place) for place in range(len(calls)))


def batch_spec(rank: int, mesh: Mesh) -> Spec:
    """An input of which every rank brings its own part of the batch."""
    return Spec((tuple(mesh.axes), *((),) * (rank - 1)))


def seed_of(base: int, step: int, segment: int, device: torch.device) -> Tensor:
    """The seed of one segment in one step."""
    return torch.tensor((base * 1_000_003 + step) * 1_009 + segment, dtype=torch.int64, device=device)
