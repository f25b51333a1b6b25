"""Many ranks in one process: a thread each, whose collectives hand tensors over in memory.

Everything but the transport is the real thing: lowered modules, reshards, substitutes, autograd. Gradients of CPU
tensors are computed on the thread that asks for them, so collectives of the backward meet like those of the forward.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.codegen import private
from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.executable import Executable, build
from autopar.codegen.lower import Target
from autopar.core.cluster import Cluster
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, State
from autopar.passes.decision import Context, Decision
from autopar.passes.ops import is_parameter
from autopar.passes.strategies import storage_dims

Result = TypeVar("Result")
PATIENCE_SECONDS = 30.0
FLOOR = 1e-3
CPU = torch.device("cpu")


@dataclass
class Meeting:
    """Where the ranks of a group meet: each brings a tensor and sees what all have brought."""

    size: int
    barrier: threading.Barrier = field(init=False)
    brought: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=PATIENCE_SECONDS)
        self.brought = [torch.empty(0)] * self.size

    def exchange(self, index: int, x: Tensor) -> list[Tensor]:
        self.brought[index] = x
        self.barrier.wait()
        seen = list(self.brought)
        self.barrier.wait()
        return seen


class Network:
    """The meetings of one simulation, by the ranks that meet."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        sets = [axes for n in mesh.axes for axes in itertools.combinations(mesh.axes, n + 1)]
        self.members = {axes: mesh.groups(axes) for axes in sets}
        self.meetings = {str(ranks): Meeting(len(ranks)) for groups in self.members.values() for ranks in groups}

    def communicator(self, rank: int) -> Communicator:
        """The groups of `rank`; a group's name tells its members and this rank's place."""
        groups = {}
        for axes, members in self.members.items():
            ranks = next(ranks for ranks in members if rank in ranks)
            groups[axes] = Group(f"{ranks}@{ranks.index(rank)}", ranks.index(rank), tuple(range(len(ranks))), axes)
        return Communicator(self.mesh, groups)

    def abort(self) -> None:
        for meeting in self.meetings.values():
            meeting.barrier.abort()

    def meet(self, x: Tensor, group: str) -> tuple[int, list[Tensor]]:
        members, _, index = group.rpartition("@")
        return int(index), self.meetings[members].exchange(int(index), x.detach())

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return torch.stack(self.meet(x, group)[1]).sum(0).to(x.dtype)

    def all_gather(self, x: Tensor, ranks: int, group: str) -> Tensor:
        return torch.cat(self.meet(x, group)[1])

    def reduce_scatter(self, x: Tensor, ranks: int, group: str) -> Tensor:
        index, parts = self.meet(x, group)
        return torch.stack([part.chunk(ranks)[index] for part in parts]).sum(0)

    def all_to_all(self, x: Tensor, ranks: int, group: str) -> Tensor:
        index, parts = self.meet(x, group)
        return torch.stack([part[index] for part in parts])


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


def simulate(mesh: Mesh, act: Callable[[Communicator], Result]) -> list[Result]:
    """What `act` returns on every rank of `mesh`, all running at once; the first failure is raised."""
    network = Network(mesh)
    failures: list[BaseException] = []

    def run(rank: int) -> Result:
        try:
            return act(network.communicator(rank))
        except BaseException as failure:
            failures.append(failure)
            network.abort()
            raise

    ops = {name: getattr(network, name) for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")}
    with mock.patch.multiple(private, **ops):
        futures = [_threads(mesh.size).submit(run, rank) for rank in mesh.devices]
        for future in futures:
            future.exception()
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


@dataclass(frozen=True, eq=False)
class Trial:
    """What ranks found, put together: outputs, gradients by placeholder, buffers by placeholder."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def simulated(decision: Decision, given: dict[str, Tensor], seed: int = 0) -> Trial:
    """Lower `decision` for every rank, run it forward and backward on `given`, whole tensors by placeholder.

    The gradient fed to each output is `cotangent` of its shape. Asserts that ranks agree where specs say so.
    """
    mesh = decision.mesh
    price = Cluster.preset(f"cpu:{mesh.size}").pricer(mesh)

    def act(communicator: Communicator) -> tuple[list[Tensor], dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
        executable = build(Target(decision, communicator, price, CPU))
        coordinate = mesh.coordinate(rank_of(communicator))
        leaves = _leaves(decision, given, coordinate)
        outputs = run(executable, leaves, seed)
        backward(outputs)
        return [o.detach() for o in outputs], {n: _gradient(x) for n, x in leaves.items() if x.requires_grad}, leaves

    found = simulate(mesh, act)
    specs = {n: resting(decision, n) for n in found[0][1]}
    gradients = {n.name: whole([grads[n] for _, grads, _ in found], duals(spec, mesh), mesh, decision, n)
                 for n, spec in specs.items()}
    buffers = {n.name: agreed([leaves[n] for _, _, leaves in found])
               for n in decision.context.segmented.factored.program.placeholders("buffer") if n.users}
    return Trial([agreed([o[i] for o, _, _ in found]) for i in range(len(found[0][0]))], gradients, buffers)


def rank_of(communicator: Communicator) -> int:
    """The rank whose groups these are."""
    mesh = communicator.mesh
    return mesh.groups(tuple(mesh.axes))[0][communicator.group(tuple(mesh.axes)).index]


def run(executable: Executable, values: dict[fx.Node, Tensor], seed: int) -> list[Tensor]:
    """The outputs of an executable whose parameters are as they are used, no FSDP2 around."""
    def call(i: int, known: dict[fx.Node, Tensor]) -> tuple[Tensor, ...]:
        each = executable.calls[i]
        return each.run(*(known[n] for n in each.segment.externals), torch.tensor(seed + i))

    results = executable.run(values, call)
    return [results[n] for n in executable.outputs]


def cotangent(shape: tuple[int, ...]) -> Tensor:
    """A gradient to start from that no symmetry hides: 1 for a scalar."""
    return torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape) if shape else torch.ones(())


def backward(outputs: list[Tensor]) -> None:
    """Gradients of all outputs that have one."""
    live = [o for o in outputs if o.requires_grad]
    torch.autograd.backward(live, [cotangent(tuple(o.shape)).to(o.dtype) for o in live])


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _leaves(decision: Decision, given: dict[str, Tensor], coordinate: tuple[int, ...]) -> dict[fx.Node, Tensor]:
    factored = decision.context.segmented.factored
    leaves: dict[fx.Node, Tensor] = {}
    for node in (n for n in factored.program.graph.nodes if n.op == "placeholder" and n.name in given and n.users):
        x = given[node.name].detach().clone()
        if is_parameter(node, factored) and node in decision.storage:
            x = cut(x.reshape(factored.refined(node)), resting(decision, node), decision.mesh, coordinate)
            x = x.reshape(_stored_shape(decision, node, x)).contiguous()
        leaves[node] = x.requires_grad_(node in decision.context.gradients)
    return leaves


def _stored_shape(decision: Decision, node: fx.Node, refined: Tensor) -> list[int]:
    dims = storage_dims(decision.context.segmented.factored, node)
    return [math.prod(refined.shape[i] for i in dim) for dim in dims]


def resting(decision: Decision, node: fx.Node) -> Spec:
    """The spec in which a placeholder comes in, over its flat factors."""
    rank = decision.context.rank(node)
    if node in decision.storage:
        return decision.storage[node].spec(rank, node in decision.context.gradients)
    return Spec(((),) * rank)


def cut(refined: Tensor, spec: Spec, mesh: Mesh, coordinate: tuple[int, ...]) -> Tensor:
    """The part of a whole tensor, seen in its flat factors, that the device at `coordinate` holds."""
    for dim, axes in enumerate(spec.dims):
        for axis in axes:
            refined = refined.chunk(mesh.shape[axis], dim)[coordinate[axis]]
    return refined


def duals(spec: Spec, mesh: Mesh) -> tuple[State, ...]:
    """The states of the gradient of a value in `spec`."""
    dual: dict[State, State] = {"R": "R", "P": "R", "G": "P"}
    return tuple(dual.get(state, state) for state in spec.states(len(mesh.shape)))


def whole(parts: list[Tensor], states: tuple[State, ...], mesh: Mesh, decision: Decision, node: fx.Node) -> Tensor:
    """The whole of what the ranks hold in `states`: shards joined, partial sums summed, the rest agreed upon."""
    factored = decision.context.segmented.factored
    sizes = list(factored.refined(node))
    for axis, state in enumerate(states):
        if isinstance(state, int):
            sizes[state] //= mesh.shape[axis]
    cells = {mesh.coordinate(rank): part.reshape(sizes) for rank, part in zip(mesh.devices, parts, strict=True)}
    for axis in reversed(mesh.axes):
        grouped: dict[tuple[int, ...], list[Tensor]] = {}
        for cell in sorted(cells):
            grouped.setdefault(cell[:axis], []).append(cells[cell])
        cells = {cell: _joined(found, states[axis]) for cell, found in grouped.items()}
    value = node.meta["val"]
    return cells[()].reshape(value.shape)


def _joined(parts: list[Tensor], state: State) -> Tensor:
    if isinstance(state, int):
        return torch.cat(parts, state)
    return torch.stack(parts).sum(0) if state == "P" else agreed(parts)


def agreed(parts: list[Tensor]) -> Tensor:
    """The tensor that all ranks have alike."""
    for rank, part in enumerate(parts):
        assert torch.equal(part, parts[0]), f"rank {rank} differs by {(part - parts[0]).abs().max()} from rank 0"
    return parts[0].detach()


def everything_differentiable(context: Context) -> Context:
    """The same context, in which gradients flow to float inputs as they do to parameters."""
    found: set[fx.Node] = set()
    factored = context.segmented.factored
    for node in factored.program.graph.nodes:
        kind = factored.program.sources[node.name].kind if node.op == "placeholder" else ""
        values = pytree.tree_leaves(node.meta.get("val"))
        floats = any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
        if floats and (kind in ("parameter", "input") or any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return Context(context.segmented, frozenset(found), context.producer)


def reference(context: Context, module: Callable[..., Any], given: dict[str, Tensor]) -> Trial:
    """The same trial of the plain `module`, called with all of `given` in order."""
    nodes = {n.name: n for n in context.segmented.factored.program.graph.nodes if n.name in given}
    leaves = {name: x.detach().clone().requires_grad_(nodes[name] in context.gradients) for name, x in given.items()}
    outputs = [o for o in pytree.tree_leaves(module(*leaves.values())) if isinstance(o, Tensor)]
    backward(outputs)
    buffers = {n.name: leaves[n.name] for n in context.segmented.factored.program.placeholders("buffer") if n.users}
    return Trial([o.detach() for o in outputs],
                 {name: _gradient(x) for name, x in leaves.items() if x.requires_grad}, buffers)


def materials(context: Context, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """What a model's program is run on, by placeholder: its parameters, buffers and constants, and these inputs."""
    program = context.segmented.factored.program
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    leaves = iter(pytree.tree_leaves(inputs))

    def material(node: fx.Node) -> Tensor:
        source = program.sources[node.name]
        if source.kind == "input":
            return next(leaves)  # type: ignore[no-any-return]
        return program.constants[node.name] if source.kind == "constant" else held[source.name]

    return {n.name: material(n).detach() for n in program.graph.nodes if n.op == "placeholder"}


def step_of(context: Context, model: nn.Module, loss: Tensor) -> Trial:
    """The trial that the plain `model` has made once its `loss` has been computed."""
    program = context.segmented.factored.program
    loss.backward()
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gradients = {n.name: _gradient(held[program.sources[n.name].name]) for n in context.parameters()}
    buffers = {n.name: held[program.sources[n.name].name] for n in program.placeholders("buffer") if n.users}
    return Trial([loss.detach()], gradients, buffers)


def assert_same(found: Trial, wanted: Trial, tolerance: float) -> None:
    """Outputs, gradients and buffers agree to `tolerance`, relative to each tensor's largest entry.

    Of gradients that are next to nothing beside the others only noise is left, which counts by their largest.
    """
    assert found.gradients.keys() == wanted.gradients.keys()
    floor = FLOOR * max((float(g.abs().max()) for g in wanted.gradients.values()), default=0.0)
    for i, (mine, theirs) in enumerate(zip(found.outputs, wanted.outputs, strict=True)):
        _assert_close(f"output {i}", mine, theirs, tolerance, floor)
    for name, theirs in wanted.gradients.items():
        _assert_close(f"gradient of {name}", found.gradients[name], theirs, tolerance, floor)
    for name, theirs in wanted.buffers.items():
        _assert_close(f"buffer {name}", found.buffers[name], theirs, tolerance, floor)


def _assert_close(what: str, mine: Tensor, theirs: Tensor, tolerance: float, floor: float) -> None:
    assert mine.shape == theirs.shape, f"{what} has shape {tuple(mine.shape)}, wanted {tuple(theirs.shape)}"
    scale = max(float(theirs.abs().max()), floor)
    error = float((mine.double() - theirs.double()).abs().max())
    assert error <= tolerance * scale, f"{what} is off by {error:.3g} of {scale:.3g}"
