"""What of a model a rank holds: its parts of parameters, in groups that travel together, and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.codegen.communicator import Communicator
from autopar.codegen.engine import Parameters
from autopar.codegen.groups import ParameterGroup, mangled, wrap
from autopar.codegen.parameters import Stored, at_rest
from autopar.codegen.replay import Launches
from autopar.codegen.travel import Member, Unit
from autopar.codegen.values import held_by
from autopar.passes.capture import COMPUTE_DTYPE
from autopar.passes.decision import Decision
from autopar.passes.strategies import Storage, storage_dims

Travels = tuple[tuple[int, ...], bool, torch.dtype]
"""The axes that parameters are gathered over, whether they are kept for the backward, and their dtype."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where a module runs: this rank's groups, torch's mesh, its device; how steps are launched."""

    communicator: Communicator
    mesh: DeviceMesh
    device: torch.device
    launches: Launches = "each"
    constants: dict[int, dict[fx.Node, Tensor]] = field(default_factory=dict)


class Body(nn.Module):
    """All parameter groups and buffers."""

    def __init__(self, groups: tuple[ParameterGroup, ...], buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        for name, buffer in buffers.items():
            self.register_buffer(mangled(name), buffer)


@dataclass(frozen=True, eq=False)
class Holding:
    """What of a model this rank holds: `names` of parameters and buffers, the `segments` that run here.

    `ranks` counts by parameter the ranks that hold some of it, `tellers` has the first of them where that is not rank
    0; `pipeline(parameters, named_parameters)` makes what runs a program, where there are stages.
    """

    names: frozenset[str]
    segments: frozenset[str]
    ranks: dict[str, int]
    tellers: dict[str, int]
    pipeline: Callable[[Parameters, Callable[[], Any]], Callable[..., Any]] | None = None


def whole_holding(plain: nn.Module, decision: Decision) -> Holding:
    """Everything, on every rank."""
    names = frozenset(held_by(plain))
    segments = frozenset(segment.name for segment in decision.context.segmented.segments)
    return Holding(names, segments, dict.fromkeys(names, dist.get_world_size()), {})


def stored_parameters(plain: nn.Module, decision: Decision) -> dict[str, Stored]:
    """How each parameter rests; one that the program does not use is whole everywhere."""
    factored = decision.context.segmented.factored
    nodes = {factored.program.sources[n.name].name: n for n in decision.storage}
    found = {}
    for name, parameter in plain.named_parameters():
        shape = tuple(parameter.shape)
        if name in nodes:
            node = nodes[name]
            dims, sizes = storage_dims(factored, node), factored.refined(node)
            found[name] = Stored(name, shape, dims, sizes, decision.storage[node])
        else:
            whole = Storage(("R",) * len(decision.mesh.shape))
            found[name] = Stored(name, shape, tuple((i,) for i in range(len(shape))), shape, whole)
    return found


def make_body(plain: nn.Module, decision: Decision, stored: dict[str, Stored], site: Site, holding: Holding) -> Body:
    """Shards of the parameters that are held, group by group, and buffers, all without values.

    They are cut on meta, so that no more than this rank's part is ever allocated.
    """
    parameters = {name: at_rest(torch.empty_like(p, device="meta"), stored[name], site.mesh, p.requires_grad)
                  for name, p in plain.named_parameters() if name in holding.names}
    owner = _owners(decision, holding.segments)
    members: dict[tuple[str, Travels], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        travels = stored[name].storage.gathered, stored[name].storage.kept, parameter.dtype
        members.setdefault((owner.get(name, ""), travels), {})[name] = parameter
    groups = [(travels, ParameterGroup(held)) for (_, travels), held in members.items()]
    body = Body(tuple(group for _, group in groups), {
        name: torch.empty_like(b, device=site.device) for name, b in plain.named_buffers() if name in holding.names})
    for (axes, *_), group in groups:
        if axes:
            wrap(group, {n: stored[n] for n in group.names}, decision.mesh, site.mesh)
        group.to_empty(device=site.device)
    return body


def units_of(owners: Mapping[str, ParameterGroup], stored: Mapping[str, Stored], decision: Decision,
             site: Site) -> dict[str, Unit]:
    """By name of a parameter that is gathered from others what it travels with."""
    precision = decision.context.segmented.factored.program.precision
    made: dict[str, Unit] = {}
    for group in dict.fromkeys(owners.values()):
        storage = stored[group.names[0]].storage
        over = site.communicator.group(storage.gathered)
        if over.size > 1:
            members = tuple(Member(n, stored[n].used_shape(decision.mesh), stored[n].gather_dim(decision.mesh),
                                   over.size) for n in group.names)
            rests = group.parameter(group.names[0]).dtype
            mixed = precision.endswith("-mixed") and rests.is_floating_point
            unit = Unit(group, members, over, COMPUTE_DTYPE[precision] if mixed else rests,
                        torch.float32 if mixed else rests, storage.kept)
            made |= dict.fromkeys(group.names, unit)
    return made


def _owners(decision: Decision, here: frozenset[str]) -> dict[str, str]:
    """The segment that alone uses each parameter, of those that run here."""
    sources = decision.context.segmented.factored.program.sources
    users: dict[str, list[str]] = {}
    for segment in decision.context.segmented.segments:
        for node in segment.externals:
            if node in decision.storage and segment.name in here:
                users.setdefault(sources[node.name].name, []).append(segment.name)
    return {name: segments[0] for name, segments in users.items() if len(segments) == 1}
