"""The module a user trains: plain names outside, segments on local tensors inside."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DistributedSampler

from autopar.codegen.batches import Batches, Bound
from autopar.codegen.control import all_there
from autopar.codegen.engine import Engine, Parameters
from autopar.codegen.executable import Executable, Turn, Values, seeds_for
from autopar.codegen.first_order import first_order, no_backward
from autopar.codegen.groups import ParameterGroup, mangled
from autopar.codegen.holding import Holding, Site, make_body, stored_parameters, units_of, whole_holding
from autopar.codegen.offers import meet
from autopar.codegen.outputs import output_of
from autopar.codegen.parameters import load_plain, to_plain
from autopar.codegen.paths import Under
from autopar.codegen.ranks import on_rank_zero, told_by_all
from autopar.codegen.replay import Replays
from autopar.codegen.sampler import sampler_over
from autopar.codegen.sight import Seen, Sight
from autopar.codegen.surroundings import Compiled, apart
from autopar.codegen.tape import Pass, stepped
from autopar.codegen.values import Values as FirstValues
from autopar.codegen.values import as_on, held_by, seed_of_rank_zero, state_names
from autopar.core.errors import AutoparError
from autopar.passes.decision import Decision


class ParallelModule(Compiled):
    """The plain model, running as its `plan` says. Made by `autopar.compile`."""

    plan: Any
    reporter: Callable[[Seen], Any] | None = None
    drawer: Callable[[Any, list[Seen]], None] | None = None

    def __init__(self, plain: nn.Module, decision: Decision, site: Site, batches: Batches, values: FirstValues,
                 holding: Holding | None = None) -> None:
        super().__init__()
        self._site, self._batches, self._decision = site, batches, decision
        self._holding = holding or whole_holding(plain, decision)
        self._every = {name: (tuple(t.shape), t.dtype) for name, t in held_by(plain).items()}
        self._names = [name for name, _ in plain.named_parameters() if name in self._holding.names]
        self._stored = stored_parameters(plain, decision)
        self._buffer_names = [name for name, _ in plain.named_buffers() if name in self._holding.names]
        self._state_names = state_names(plain)
        self._non_persistent_buffers_set = set(self._buffer_names) - self._state_names.keys()
        self._steps, self._seed = 0, seed_of_rank_zero(site.device)
        self._body = make_body(plain, decision, self._stored, site, self._holding)
        self._owner = {name: group for group in self._body.modules() if isinstance(group, ParameterGroup)
                       for name in group.names}
        self._parameters_at = Parameters(self._owner, units_of(self._owner, self._stored, decision, site),
                                         site.communicator)
        self._engines: dict[int, Engine] = {}
        self._sight = Sight()
        self._pipeline = self._holding.pipeline and self._holding.pipeline(self._parameters_at, self.named_parameters)
        self._replays = Replays() if site.launches == "recorded" and site.device.type == "cuda" else None
        self._fill(values)
        self.train(plain.training)

    def _fill(self, values: FirstValues) -> None:
        """Give parameters and buffers their first values, one after the other: no two whole parameters are held."""
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name in self._every:  # on ranks that do not hold it too: values may come from another rank
            value = values(name)
            if name in held and name in self._stored:
                load_plain(held[name], self._stored[name], value)
            elif name in held:
                held[name].copy_(value)

    def adopt(self, originals: dict[str, nn.Parameter]) -> None:
        """Put the sharded parameters into these DTensor objects, which an optimizer may hold already."""
        for name, original in originals.items():
            group = self._owner[name]
            torch.utils.swap_tensors(original, group.parameter(name))
            group.register_parameter(mangled(name), original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's forward; the loss is the mean over the global batch on every rank, other outputs are
        DTensors where they are kept."""
        with apart(self._site.device, self._batches.plans.program.precision), all_there():
            return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self._batches.bind(args, kwargs, self.training, self._site.device)
        values = self._run(bound.executable, self._given(bound))
        self._steps += self.training
        if dist.get_world_size() > 1:
            values = {node: first_order(value) for node, value in values.items()}
        if torch.is_grad_enabled() and not self.training and any(p.requires_grad for p in self.parameters()):
            values = {node: no_backward(value) for node, value in values.items()}
        return output_of(bound.executable, values, self._site.mesh)

    def _run(self, executable: Executable, given: Values) -> Values:
        """The outputs of a program, for autograd to come back to where the model trains."""
        if self._pipeline is not None:
            with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
                watch = self._sight.begin(self._site.device) if torch.is_grad_enabled() else None
                return self._pipeline(  # type: ignore[no-any-return]
                    executable, given, Turn(self._seed, self._steps), watch)
        engine = self._engines.setdefault(id(executable), Engine(executable, self._parameters_at))
        seeds = seeds_for(executable, Turn(self._seed, self._steps), self._site.device)
        if not (self.training and torch.is_grad_enabled()):
            with torch.no_grad():
                return engine.run(given, seeds, None)
        if self._replays is not None:
            step = self._sight.look(self._replays.step(engine, given, seeds), self._site.device)
            return stepped(step, dict(self.named_parameters()))
        if dist.get_world_size() == 1:
            return engine.alone(given, seeds)
        step = self._sight.look(Pass(engine, given, seeds), self._site.device)
        return stepped(step, dict(self.named_parameters()))

    def _given(self, bound: Bound) -> dict[fx.Node, Tensor]:
        program = bound.executable.decision.context.segmented.factored.program
        constants = self._site.constants.setdefault(id(program), {
            n: program.constants[n.name].to(self._site.device) for n in program.placeholders("constant")})
        buffers = {n: self.get_buffer_called(program.sources[n.name].name) for n in program.placeholders("buffer")
                   if program.sources[n.name].name in self._holding.names}
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
        return OrderedDict((name, held[first]) for name, first in self._state_names.items() if first in held)

    @all_there()
    def full_state_dict(self) -> dict[str, Tensor]:
        """The plain model's state dict, in host memory on rank 0, which the plain model loads; empty on other ranks.

        Collective; one whole parameter after the other is gathered.
        """
        meet("full_state_dict")
        state: dict[str, Tensor] = {}
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, (shape, dtype) in self._every.items():
            own = held.get(name)
            value = to_plain(own, self._stored[name]) if own is not None and name in self._stored else own
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            teller = self._holding.tellers.get(name, 0)
            if teller:
                like = torch.empty(shape, dtype=dtype, device=self._site.device) if whole is None else whole
                whole = as_on(teller, like, self._site.device)
            if dist.get_rank() == 0 and whole is not None:
                state[name] = whole.detach().to("cpu", copy=True)
        if dist.get_rank():
            return {}
        return OrderedDict((name, state[first]) for name, first in self._state_names.items())

    @all_there()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load plain names and shapes, whole tensors or DTensors; one name of a tied parameter will do.

        Collective where there are DTensors. Raises AutoparError naming what doesn't fit, before anything is loaded.
        """
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        given = {first: state_dict[name] for name, first in self._state_names.items() if name in state_dict}
        missing = [name for name, first in self._state_names.items() if first in held and first not in given]
        extra = [name for name in state_dict if name not in self._state_names]
        if strict and (missing or extra):
            raise AutoparError(f"state dict: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}; "
                               "pass strict=False to load what fits")
        for name, value in given.items():
            needed = self._every[name][0]
            if tuple(value.shape) != needed:
                raise AutoparError(f"{name} has shape {tuple(value.shape)} in the state dict, needed is {needed}")
        for name, value in given.items():  # in one order: DTensors are gathered on the way
            if name not in held:
                continue
            if name in self._stored:
                load_plain(held[name], self._stored[name], value)
            else:
                held[name].copy_(value)
        return nn.modules.module._IncompatibleKeys(missing, extra)

    @all_there()
    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """Another model under the same plan, with parameters and buffers of its own; collective."""
        meet("copy.deepcopy")
        held = {name: to_plain(p, self._stored[name]) for name, p in self.named_parameters()} | dict(
            self.named_buffers())
        plain = self._batches.plans.like.train(self.training)
        made = memo[id(self)] = self.beside(plain, lambda name: held[name] if name in held else torch.empty(0))
        for mine, other in zip(self.parameters(), made.parameters(), strict=True):
            other.requires_grad_(mine.requires_grad)
        made.set_random_state(self.random_state())
        return made

    def beside(self, plain: nn.Module, values: FirstValues) -> ParallelModule:
        """A model like `plain`, which is like this one, under the same plan; collective."""
        made = ParallelModule(plain, self._decision, self._site, self._batches, values, self._holding)
        made.plan, made.reporter, made.drawer = self.plan, self.reporter, self.drawer
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

    def report(self) -> Any:
        """What was predicted of a step beside what was seen of it, by class of segments: print it after some steps.

        Segments are timed in the second step, steps from one forward to the next. Raises AutoparError where there is
        nothing to compare.
        """
        if self.reporter is None or dist.get_world_size() == 1:
            raise AutoparError("a report tells of segments, which run on one rank otherwise than they are priced; "
                               "compile for two ranks or more")
        return self.reporter(self._sight.seen(self._site.device))

    def timeline(self, path: Any) -> None:
        """Draw a step as it was predicted and, beneath it, as it was seen on each rank, to a page (`.html`) or a
        picture (`.png`) that rank 0 writes; collective. Raises AutoparError, before two steps too."""
        meet("timeline")
        seen = self._sight.seen(self._site.device)
        ranks = told_by_all(seen)

        def draw() -> str:
            if self.drawer is None or not all(each.laps for each in ranks) or math.isnan(seen.step_s):
                raise AutoparError("nothing was seen of a step yet; train for three steps on two ranks or more, then "
                                   "draw the timeline")
            self.drawer(path, ranks)
            return ""
        on_rank_zero(draw)

    def random_state(self) -> dict[str, int]:
        """What dropout is drawn from: the seed and the number of training steps so far."""
        return {"seed": self._seed, "steps": self._steps}

    def set_random_state(self, state: Mapping[str, int]) -> None:
        """Go on drawing where another `random_state()` was."""
        self._seed, self._steps = state["seed"], state["steps"]

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients so that their norm over all parameters is at most `max_norm`; returns the norm before."""
        found = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        grads = list(found.values())
        total = torch.zeros((), dtype=torch.float32, device=self._site.device)
        for name, grad in found.items():
            part = grad.to_local() if isinstance(grad, DTensor) else grad
            total += part.float().square().sum() * _share(grad, self._holding.ranks[name])
        with all_there():
            dist.all_reduce(total)
        norm = total.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(scale)
        return norm

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of all the model's parameters and buffers, those on other ranks too."""
        return tuple(self._every)

    def extra_repr(self) -> str:
        return f"mesh {self._site.communicator.mesh}, {len(self._names)} parameters"


def not_pickled(model: nn.Module) -> AutoparError:
    """What is said of a model that is to be pickled, as `torch.save(model)` does."""
    return AutoparError(f"a compiled model ({type(model).__name__}) is bound to its ranks and can't be pickled; save "
                        "model.full_state_dict(), or a checkpoint by autopar.save_checkpoint, and compile again")


def _share(grad: Tensor, ranks: int) -> float:
    """The inverse of how many ranks hold each element of `grad`, of which `ranks` hold some."""
    if not isinstance(grad, DTensor):
        return 1.0 / ranks
    return math.prod(grad.device_mesh.size(i) for i, p in enumerate(grad.placements) if isinstance(p, Shard)) / ranks
