"""The ranks of a pipeline: where each stands, what it holds, which groups it talks to, and its part of any program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.codegen.channels import Post, connect_cuts
from autopar.codegen.communicator import Axes, Communicator, Group, connect
from autopar.codegen.engine import Parameters
from autopar.codegen.executable import Executable
from autopar.codegen.holding import Holding
from autopar.codegen.kept import once
from autopar.codegen.offers import batched
from autopar.codegen.pipeline import Line, Pipeline, Staged
from autopar.codegen.stages import Stage, cut_at, stages_of
from autopar.codegen.values import held_by
from autopar.core.mesh import Mesh
from autopar.core.schedules import Pipe, Schedule
from autopar.passes.decision import Decision
from autopar.passes.micro import Micro


@dataclass(frozen=True, slots=True)
class Layout:
    """Stages that begin with the segments `starts`, on meshes of `shape`: stage v at place v modulo the number of
    `places`, each its devices in order."""

    starts: tuple[str, ...]
    shape: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    micro_batches: int
    schedule: Schedule

    @property
    def size(self) -> int:
        """Devices of a place."""
        return len(self.places[0])

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices, place by place."""
        return tuple(device for place in self.places for device in place)

    @property
    def pipe(self) -> Pipe:
        """The pipeline's stages and micro-batches."""
        return Pipe(len(self.starts), len(self.places), self.micro_batches)

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """The devices that hand values on to each other, from place to place."""
        return tuple(zip(*self.places, strict=True))

    @property
    def place(self) -> int:
        """The place of this rank."""
        return self.devices.index(dist.get_rank()) // self.size

    @property
    def whole(self) -> Mesh:
        """All devices, the places along the last axis."""
        return Mesh((*self.shape, len(self.places)), tuple(rank for column in self.columns for rank in column))


def device_mesh_of(layout: Layout, kind: str) -> DeviceMesh:
    """The torch mesh of this rank's stage; collective."""
    names = ("stage", *(f"a{axis}" for axis in range(len(layout.shape))))
    whole = torch.tensor(layout.places).reshape(len(layout.places), *layout.shape)
    return once(("stages", kind, layout.places, layout.shape),
                lambda: DeviceMesh(kind, whole, mesh_dim_names=names)[names[1:]])


def line_of(layout: Layout, device: torch.device) -> Line:
    """Where this rank stands; collective."""
    inside = [connect(Mesh(layout.shape, place)) for place in layout.places][layout.place]
    column = connect(Mesh((len(layout.places), layout.size), layout.devices), [(0,)]).group((0,))
    return Line(layout.place, column, inside, Post(connect_cuts(layout.columns, len(layout.starts), device), device))


@dataclass(frozen=True, eq=False)
class Staging:
    """This rank's part of any program of a pipelined model."""

    layout: Layout
    line: Line

    def staged(self, executable: Executable, micro: Micro, axes: Axes) -> Staged:
        """The stages of a lowered program that run here; ranks bring different samples along `axes` of the whole mesh.
        """
        decision, across = executable.decision, len(self.layout.shape)
        stages = here(every_stage(executable, self.layout), self.layout)
        placeholders = decision.context.segmented.factored.program.placeholders("input")
        samples = batched(placeholders)
        cut = frozenset(n for n, shape in zip(placeholders, samples.shapes, strict=True) if samples.has(shape))
        return Staged(decision, stages, self.layout.pipe, self.layout.schedule, micro.counts,
                      tuple(axis for axis in axes if axis < across), across in axes, cut)


def every_stage(executable: Executable, layout: Layout) -> tuple[Stage, ...]:
    """All stages of a lowered program."""
    names = [call.segment.name for call in executable.calls]
    return stages_of(executable, cut_at(layout.starts, names))


def here(stages: Sequence[Stage], layout: Layout) -> tuple[Stage, ...]:
    """Those of all stages that run on this rank."""
    return tuple(stages[layout.place::len(layout.places)])


def holding_of(plain: nn.Module, stages: Sequence[Stage], layout: Layout, line: Line) -> Holding:
    """What this rank holds of a model: what its stage reads, and what none reads on the first; collective."""
    readers: dict[str, list[int]] = {name: [] for name in held_by(plain)}
    for stage in stages:
        for name in _read(stage):
            readers[name].append(stage.index % len(layout.places))
    holders = {name: sorted(set(found)) or [0] for name, found in readers.items()}
    tellers = {name: layout.places[found[0]][0] for name, found in holders.items()
               if not any(0 in layout.places[place] for place in found)}
    shared, mine = _shared(holders, layout), here(stages, layout)

    def pipeline(bringing: Parameters, parameters: Callable[[], Any]) -> Pipeline:
        return Pipeline(line, bringing, lambda: dict(parameters()), shared)

    return Holding(frozenset(name for name, found in holders.items() if layout.place in found),
                   frozenset(call.segment.name for stage in mine for call in stage.executable.calls),
                   {name: len(found) * layout.size for name, found in holders.items()}, tellers, pipeline)


def _read(stage: Stage) -> list[str]:
    """The parameters and buffers that a stage reads, each once."""
    decision: Decision = stage.executable.decision
    sources = decision.context.segmented.factored.program.sources
    nodes = dict.fromkeys(n for call in stage.executable.calls for n in call.segment.externals if n.op == "placeholder")
    return list(dict.fromkeys(sources[n.name].name for n in nodes if sources[n.name].kind in ("parameter", "buffer")))


def _shared(holders: dict[str, list[int]], layout: Layout) -> dict[str, Group]:
    """For each parameter that several stages hold, the ranks that hold the same part of it; collective."""
    made: dict[tuple[int, ...], Communicator] = {}
    found = {}
    for name, places in holders.items():
        key = tuple(places)
        if len(key) > 1:
            if key not in made:
                devices = tuple(device for place in key for device in layout.places[place])
                made[key] = connect(Mesh((len(key), layout.size), devices), [(0,)])
            if layout.place in key:
                found[name] = made[key].group((0,))
    return found
