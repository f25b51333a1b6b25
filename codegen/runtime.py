"""The module a user trains: plain names outside, segments on local tensors inside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DistributedSampler

from autopar.codegen.batches import Batches, Bound
from autopar.codegen.communicator import Communicator
from autopar.codegen.executable import Executable, seeds_of
from autopar.codegen.first_order import first_order, no_backward
from autopar.codegen.groups import ParameterGroup, mangled, nested, wrap
from autopar.codegen.offers import meet
from autopar.codegen.outputs import output_of
from autopar.codegen.parameters import Stored, at_rest, load_plain, to_plain
from autopar.codegen.paths import Under
from autopar.codegen.sampler import sampler_over
from autopar.codegen.values import Values, seed_of_rank_zero, state_names
from autopar.core.errors import AutoparError
from autopar.passes.capture import COMPUTE_DTYPE
from autopar.passes.decision import Decision
from autopar.passes.strategies import Storage, storage_dims

Travels = tuple[tuple[int, ...], bool, torch.dtype]
"""The axes that parameters are gathered over, whether they are kept for the backward, and their dtype."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where a module runs: this rank's groups, torch's mesh, its device."""

    communicator: Communicator
    mesh: DeviceMesh
    device: torch.device
    constants: dict[int, dict[fx.Node, Tensor]] = field(default_factory=dict)


class Body(nn.Module):
    """All parameter groups and buffers; runs an executable. The root of FSDP2's modules."""

    def __init__(self, groups: dict[str, tuple[ParameterGroup, ...]], shared: tuple[ParameterGroup, ...],
                 buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.by_segment = groups
        self.shared = nn.ModuleList(shared)
        self.groups = nn.ModuleList(g for each in groups.values() for g in each)
        for name, buffer in buffers.items():
            self.register_buffer(mangled(name), buffer)

    def forward(self, executable: Executable, given: dict[fx.Node, Tensor], seed: tuple[int, int],
                device: torch.device) -> dict[fx.Node, Tensor]:
        count = len(executable.calls)
        seeds: tuple[tuple[Tensor, ...], ...] = tuple((one,) for one in seeds_of(*seed, count, device))
        if any(each.lowered.host_seeded for each in executable.calls):
            on_host = seeds_of(*seed, count, torch.device("cpu"))
            seeds = tuple((*one, other) if each.lowered.host_seeded else one
                          for one, other, each in zip(seeds, on_host, executable.calls, strict=True))

        def everything(held: dict[str, Tensor]) -> tuple[Any, ...]:
            return (executable.run(given, self._caller(executable, held, seeds)),)

        return nested(tuple(self.shared), everything, {}, ())[0]  # type: ignore[arg-type,return-value]

    def _caller(self, executable: Executable, shared: dict[str, Tensor],
                seeds: tuple[tuple[Tensor, ...], ...]) -> Any:
        def call(i: int, values: dict[fx.Node, Tensor]) -> tuple[Tensor, ...]:
            each = executable.calls[i]
            named = tuple(zip(each.segment.externals, each.parameters, strict=True))
            inputs = tuple(values[n] for n, name in named if not name)

            def run(held: dict[str, Tensor], *passed: Tensor) -> tuple[Tensor, ...]:
                rest = iter(passed)
                return each.run(*(held[name] if name else next(rest) for name in each.parameters), *seeds[i])

            read = {name: shared[name] for name in each.parameters if name in shared}  # FSDP2 gives others zeros
            return nested(self.by_segment.get(each.segment.name, ()), run, read, inputs)

        return call


class ParallelModule(nn.Module):
    """The plain model, running as its `plan` says. Made by `autopar.compile`."""

    plan: Any

    def __init__(self, plain: nn.Module, decision: Decision, site: Site, batches: Batches, values: Values) -> None:
        super().__init__()
        self._site, self._batches, self._decision = site, batches, decision
        self._names = [name for name, _ in plain.named_parameters()]
        self._stored = stored_parameters(plain, decision)
        self._buffer_names = [name for name, _ in plain.named_buffers()]
        self._state_names = state_names(plain)
        self._non_persistent_buffers_set = set(self._buffer_names) - self._state_names.keys()
        self._steps, self._seed = 0, seed_of_rank_zero(site.device)
        self._body = make_body(plain, decision, self._stored, site)
        self._owner = {name: group for group in self._body.modules() if isinstance(group, ParameterGroup)
                       for name in group.names}
        self._fill(values)
        self.train(plain.training)

    def _fill(self, values: Values) -> None:
        """Give parameters and buffers their first values, one after the other: no two whole parameters are held."""
        for name, parameter in self.named_parameters():
            load_plain(parameter, self._stored[name], values(name))
        for name, buffer in self.named_buffers():
            buffer.copy_(values(name))

    def adopt(self, originals: dict[str, nn.Parameter]) -> None:
        """Put the sharded parameters into these DTensor objects, which an optimizer may hold already."""
        for name, original in originals.items():
            group = self._owner[name]
            torch.utils.swap_tensors(original, group.parameter(name))
            group.register_parameter(mangled(name), original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's forward; the loss is the mean over the global batch on every rank, other outputs are
        DTensors where they are kept."""
        bound = self._batches.bind(args, kwargs, self.training, self._site.device)
        given = self._given(bound)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            values = self._body(bound.executable, given, (self._seed, self._steps), self._site.device)
        if not (self.training and torch.is_grad_enabled()):
            self._reshard()
        self._steps += self.training
        if dist.get_world_size() > 1:
            values = {node: first_order(value) for node, value in values.items()}
        if torch.is_grad_enabled() and not self.training and any(p.requires_grad for p in self.parameters()):
            values = {node: no_backward(value) for node, value in values.items()}
        return output_of(bound.executable, values, self._site.mesh)

    def _reshard(self) -> None:
        """Let go of what FSDP2 keeps gathered for a backward that will not come."""
        for module in self._body.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _given(self, bound: Bound) -> dict[fx.Node, Tensor]:
        program = bound.executable.decision.context.segmented.factored.program
        constants = self._site.constants.setdefault(id(program), {
            n: program.constants[n.name].to(self._site.device) for n in program.placeholders("constant")})
        buffers = {n: self.get_buffer_called(program.sources[n.name].name) for n in program.placeholders("buffer")}
        return {**constants, **buffers, **bound.inputs}

    def get_buffer_called(self, name: str) -> Tensor:
        """The buffer with the plain model's `name`."""
        found: Tensor = getattr(self._body, mangled(name))
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            names = self.__dict__.get("_state_names", {})
            return getattr(Under("", frozenset(names), lambda full: self._tensor(names[full])), name)

    def _tensor(self, name: str) -> Tensor:
        return self._owner[name].parameter(name) if name in self._owner else self.get_buffer_called(name)

    def children(self) -> Iterator[nn.Module]:
        """What all modules' own calls, such as `to`, go on to."""
        yield self._body

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """None: tensors have the plain model's names, as if all were this module's own."""
        return iter(())

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the plain model's names, each once."""
        for name in self._names:
            yield f"{prefix}.{name}" if prefix else name, self._owner[name].parameter(name)  # type: ignore[misc]

    def named_buffers(self, prefix: str = "", recurse: bool = True,
                      remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Buffers under the plain model's names."""
        for name in self._buffer_names:
            yield f"{prefix}.{name}" if prefix else name, self.get_buffer_called(name)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """What the plain model's has, in its names and shapes, parameters as DTensors."""
        held: dict[str, Any] = {n: to_plain(p, self._stored[n]) for n, p in self.named_parameters()}
        held |= {name: buffer.detach() for name, buffer in self.named_buffers()}
        return OrderedDict((name, held[first]) for name, first in self._state_names.items())

    def full_state_dict(self) -> dict[str, Tensor]:
        """The plain model's state dict, in host memory on rank 0, which the plain model loads; empty on other ranks.

        Collective; one whole parameter after the other is gathered.
        """
        meet("full_state_dict")
        state: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            value = to_plain(parameter, self._stored[name])
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if dist.get_rank() == 0:
                state[name] = whole.to("cpu", copy=True)
        if dist.get_rank():
            return {}
        state |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.named_buffers()}
        return OrderedDict((name, state[first]) for name, first in self._state_names.items())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load plain names and shapes, whole tensors or DTensors; one name of a tied parameter will do.

        Collective where there are DTensors. Raises AutoparError naming what doesn't fit, before anything is loaded.
        """
        given = {first: state_dict[name] for name, first in self._state_names.items() if name in state_dict}
        missing = [name for name, first in self._state_names.items() if first not in given]
        extra = [name for name in state_dict if name not in self._state_names]
        if strict and (missing or extra):
            raise AutoparError(f"state dict: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}; "
                               "pass strict=False to load what fits")
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, value in given.items():
            needed = self._stored[name].shape if name in self._stored else tuple(held[name].shape)
            if tuple(value.shape) != needed:
                raise AutoparError(f"{name} has shape {tuple(value.shape)} in the state dict, needed is {needed}")
        for name, value in given.items():  # in one order: DTensors are gathered on the way
            if name in self._stored:
                load_plain(held[name], self._stored[name], value)
            else:
                held[name].copy_(value)
        return nn.modules.module._IncompatibleKeys(missing, extra)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """Another model under the same plan, with parameters and buffers of its own; collective."""
        meet("copy.deepcopy")
        held = {name: to_plain(p, self._stored[name]) for name, p in self.named_parameters()} | dict(
            self.named_buffers())
        made = memo[id(self)] = self.beside(self._batches.plans.like.train(self.training), held.__getitem__)
        for mine, other in zip(self.parameters(), made.parameters(), strict=True):
            other.requires_grad_(mine.requires_grad)
        made.set_random_state(self.random_state())
        return made

    def beside(self, plain: nn.Module, values: Values) -> ParallelModule:
        """A model like `plain`, which is like this one, under the same plan; collective."""
        made = ParallelModule(plain, self._decision, self._site, self._batches, values)
        made.plan = self.plan
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise not_pickled(self)

    def plain_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter in the plain model; it may rest in another."""
        return self._stored[name].shape

    def sampler(self, dataset: Any, shuffle: bool = True, seed: int = 0,
                drop_last: bool = False) -> DistributedSampler[Any]:
        """torch's distributed sampler, with the same samples for ranks that the plan wants to have the same.

        A loader's batch size is the global one over the sampler's `num_replicas`.
        """
        cut = self._batches.plans.cut
        return sampler_over(cut, self._site.communicator, dataset, shuffle, seed, drop_last)

    def random_state(self) -> dict[str, int]:
        """What dropout is drawn from: the seed and the number of training steps so far."""
        return {"seed": self._seed, "steps": self._steps}

    def set_random_state(self, state: Mapping[str, int]) -> None:
        """Go on drawing where another `random_state()` was."""
        self._seed, self._steps = state["seed"], state["steps"]

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients so that their norm over all parameters is at most `max_norm`; returns the norm before."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        total = torch.zeros((), dtype=torch.float32, device=self._site.device)
        for grad in grads:
            part = grad.to_local() if isinstance(grad, DTensor) else grad
            total += part.float().square().sum() * _share(grad)
        dist.all_reduce(total)
        norm = total.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(scale)
        return norm

    def extra_repr(self) -> str:
        return f"mesh {self._site.communicator.mesh}, {len(self._names)} parameters"


def not_pickled(model: nn.Module) -> AutoparError:
    """What is said of a model that is to be pickled, as `torch.save(model)` does."""
    return AutoparError(f"a compiled model ({type(model).__name__}) is bound to its ranks and can't be pickled; save "
                        "model.full_state_dict(), or a checkpoint by autopar.save_checkpoint, and compile again")


def _share(grad: Tensor) -> float:
    """The inverse of how many ranks hold each element of `grad`."""
    if not isinstance(grad, DTensor):
        return 1.0 / dist.get_world_size()
    parts = [grad.device_mesh.size(i) for i, p in enumerate(grad.placements) if isinstance(p, Shard)]
    return float(torch.tensor(parts).prod()) / dist.get_world_size() if parts else 1.0 / dist.get_world_size()


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


def make_body(plain: nn.Module, decision: Decision, stored: dict[str, Stored], site: Site) -> Body:
    """Shards of the parameters of `plain`, wrapped for FSDP2 group by group, and its buffers, all without values.

    They are cut on meta, so that no more than this rank's part is ever allocated.
    """
    parameters = {name: at_rest(torch.empty_like(p, device="meta"), stored[name], site.mesh, p.requires_grad)
                  for name, p in plain.named_parameters()}
    owner = _owners(decision)
    members: dict[str, dict[Travels, dict[str, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        travels = stored[name].storage.gathered, stored[name].storage.kept, parameter.dtype
        members.setdefault(owner.get(name, ""), {}).setdefault(travels, {})[name] = parameter
    groups = {key: {way: ParameterGroup(held) for way, held in sets.items()} for key, sets in members.items()}
    shared = groups.pop("", {})
    buffers = {name: torch.empty_like(b, device=site.device) for name, b in plain.named_buffers()}
    body = Body({key: tuple(sets.values()) for key, sets in groups.items()}, tuple(shared.values()), buffers)
    every = [*shared.items(), *(item for sets in groups.values() for item in sets.items())]
    _wrap_all(body, every, stored, decision, site)
    for _, group in every:
        group.to_empty(device=site.device)
    return body


def _wrap_all(body: Body, groups: list[tuple[Travels, ParameterGroup]], stored: dict[str, Stored],
              decision: Decision, site: Site) -> None:
    gathered = [group for (axes, *_), group in groups if axes]
    if not gathered:
        return
    precision = decision.context.segmented.factored.program.precision
    dtype = COMPUTE_DTYPE[precision] if precision.endswith("-mixed") else None
    for group in gathered:
        wrap(group, {n: stored[n] for n in group.names}, decision.mesh, site.mesh, dtype, set())
    rest = {p for (axes, *_), group in groups if not axes for p in group.parameters()}
    wrap(body, {}, decision.mesh, site.mesh, dtype, rest)


def _owners(decision: Decision) -> dict[str, str]:
    """The segment that alone uses each parameter."""
    sources = decision.context.segmented.factored.program.sources
    users: dict[str, list[str]] = {}
    for segment in decision.context.segmented.segments:
        for node in segment.externals:
            if node in decision.storage:
                users.setdefault(sources[node.name].name, []).append(segment.name)
    return {name: segments[0] for name, segments in users.items() if len(segments) == 1}
