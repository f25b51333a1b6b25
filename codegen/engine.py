"""Runs a lowered program: its segments in order, parameters brought just ahead of them, and its backward in reverse.

Each segment runs on leaves of its own, so that autograd records it alone, and its backward is taken when its turn has
come. The order of everything is the program's: while a segment runs, the next one's parameters are gathered and the
last ones' gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from autopar.codegen import private
from autopar.codegen.communicator import Axes, Communicator
from autopar.codegen.executable import Call, Executable, Values
from autopar.codegen.groups import ParameterGroup
from autopar.codegen.parameters import locals_of
from autopar.codegen.travel import Unit, local_of, send_whole
from autopar.core.errors import AutoparError

IN_FLIGHT = 2
"""Segments whose gradients may be under way before the device waits for the oldest."""
Seeds = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, eq=False)
class Parameters:
    """Where the parameters of a model are: those that are gathered in their units, all in the group that holds them."""

    owners: Mapping[str, ParameterGroup]
    units: Mapping[str, Unit]
    communicator: Communicator

    def at_home(self, name: str) -> Tensor:
        """A parameter that rests as it is used, as a leaf of autograd's graph."""
        parameter = self.owners[name].parameter(name)
        return local_of(parameter).requires_grad_(parameter.requires_grad)

    def parameter(self, name: str) -> Tensor:
        """The parameter at rest."""
        return self.owners[name].parameter(name)


@dataclass(frozen=True, eq=False)
class Engine:
    """An executable with its parameters."""

    executable: Executable
    parameters: Parameters

    @cached_property
    def units(self) -> tuple[tuple[Unit, ...], ...]:
        """By call the units that it uses."""
        known = self.parameters.units
        return tuple(tuple(dict.fromkeys(known[name] for name in call.parameters if name in known))
                     for call in self.executable.calls)

    @cached_property
    def uses(self) -> dict[int, tuple[int, int]]:
        """By `id` of a unit the first and the last call that uses it."""
        found: dict[int, tuple[int, int]] = {}
        for place, units in enumerate(self.units):
            for unit in units:
                found[id(unit)] = found.get(id(unit), (place, place))[0], place
        return found

    def learns(self, outputs: Iterable[fx.Node]) -> frozenset[str]:
        """The parameters that a gradient of `outputs` comes to, on every rank alike."""
        context = self.executable.decision.context
        sources = context.segmented.factored.program.sources
        waiting, seen = [node for node in outputs if node in context.gradients], set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [n for n in node.all_input_nodes if n in context.gradients]
        return frozenset(sources[node.name].name for node in seen if node in self.executable.decision.storage)

    def run(self, given: Values, seeds: Seeds, tape: Tape | None) -> Values:
        """The program's outputs; with a `tape` what its backward needs is recorded there."""
        for unit in dict.fromkeys(unit for units in self.units for unit in units):
            unit.leave()

        def call(place: int, values: Values) -> tuple[Tensor, ...]:
            held: dict[str, Tensor] = {}
            for unit in self.units[place]:
                held.update(unit.arrive())
            self._begin(place + 1)
            made = self._segment(place, values, held, seeds[place], tape)
            for unit in self.units[place]:
                self._after(unit, place, tape)
            return made

        return self.executable.run(given, call)

    def alone(self, given: Values, seeds: Seeds) -> Values:
        """As `run` on one rank, which autograd records as it does any program: its gradients have gradients."""
        assert not self.parameters.units, "one rank gathers nothing"
        names = tuple(dict.fromkeys(name for call in self.executable.calls for name in call.parameters if name))
        held = dict(zip(names, locals_of([self.parameters.parameter(name) for name in names]), strict=True))

        def call(place: int, values: Values) -> tuple[Tensor, ...]:
            each = self.executable.calls[place]
            inputs = [held[name] if name else values[node]
                      for node, name in zip(each.segment.externals, each.parameters, strict=True)]
            return each.run(*inputs, *seeds[place])

        return self.executable.run(given, call)

    def _begin(self, place: int) -> None:
        if 0 <= place < len(self.units):
            for unit in self.units[place]:
                unit.begin()

    def _after(self, unit: Unit, place: int, tape: Tape | None) -> None:
        """Let a unit go that is not used again soon: what the backward begins with stays."""
        last = self.uses[id(unit)][1]
        stays = tape is not None and (unit.kept or last == len(self.units) - 1)
        if place == last and not stays:
            unit.leave()

    def _segment(self, place: int, values: Values, held: Mapping[str, Tensor], seeds: tuple[Tensor, ...],
                 tape: Tape | None) -> tuple[Tensor, ...]:
        call = self.executable.calls[place]
        parameters = {name: held[name] if name in held else self.parameters.at_home(name)
                      for name in call.parameters if name}
        leaves = {node: _leaf(values[node], tape) for node, name in zip(call.segment.externals, call.parameters,
                                                                        strict=True) if not name}
        inputs = [parameters[name] if name else leaves[node]
                  for node, name in zip(call.segment.externals, call.parameters, strict=True)]
        made = call.run(*inputs, *seeds)
        if tape is not None:
            tape.record(place, leaves, parameters, dict(zip(call.exports, made, strict=True)))
        return made


def _leaf(value: Tensor, tape: Tape | None) -> Tensor:
    return value.detach().requires_grad_() if tape is not None and value.requires_grad else value


@dataclass(frozen=True, eq=False)
class Taped:
    """One call as it ran: what it read, by value and by parameter, and what it made, each where a gradient flows."""

    place: int
    leaves: dict[fx.Node, Tensor]
    parameters: dict[str, Tensor]
    made: dict[fx.Node, Tensor]


@dataclass(eq=False)
class Tape:
    """A forward pass as it was recorded, for its backward."""

    engine: Engine
    calls: list[Taped] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)

    def record(self, place: int, leaves: dict[fx.Node, Tensor], parameters: dict[str, Tensor],
               made: dict[fx.Node, Tensor]) -> None:
        """Note a call."""
        flows = [{key: x for key, x in found.items() if x.requires_grad} for found in (leaves, parameters, made)]
        self.calls.append(Taped(place, *flows))  # type: ignore[arg-type]
        for unit in self.engine.units[place]:
            for member in unit.members:
                self.versions.setdefault(member.name, self._version(member.name))

    def _version(self, name: str) -> int:
        return local_of(self.engine.parameters.parameter(name))._version

    def check(self) -> None:
        """Raises AutoparError where a parameter that is to be gathered again is no longer what it was."""
        for name, version in self.versions.items():
            if self._version(name) != version:
                raise AutoparError(f"parameter {name} was changed between a forward and its backward, for which it is "
                                   "gathered again; call backward before the optimizer's step")

    def backward(self, grads: Values, keep: bool) -> dict[str, Tensor]:
        """The gradient of each parameter's part on this rank, of outputs whose gradients are `grads`.

        `keep` records for another backward.
        """
        self.check()
        return _Backward(self, dict(grads), self.engine.learns(grads)).run(keep)


@dataclass(eq=False)
class _Backward:
    """One backward: gradients of values that wait for the call that made them, sums that are under way."""

    tape: Tape
    waiting: dict[fx.Node, Tensor]
    learns: frozenset[str]
    found: dict[str, list[Tensor]] = field(default_factory=dict)
    due: dict[Axes, dict[str, Tensor]] = field(default_factory=dict)
    flying: list[list[Iterator[None]]] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.tape.engine

    def run(self, keep: bool) -> dict[str, Tensor]:
        calls = self.tape.calls
        for i in reversed(range(len(calls))):
            taped = calls[i]
            units = self.engine.units[taped.place]
            for unit in units:
                unit.arrive()
            self.engine._begin(taped.place - 1)
            self._call(taped, keep)
            if not keep:
                calls.pop()
            self._send(taped.place)
            for unit in units:
                if self.engine.uses[id(unit)][0] == taped.place:
                    unit.leave()
            del taped
        while self.flying:
            self.flying = [each for each in map(_advanced, self.flying) if each]
        return {name: _added(parts) for name, parts in self.found.items()}

    def _call(self, taped: Taped, keep: bool) -> None:
        """The gradients of one call."""
        made = {node: x for node, x in taped.made.items() if node in self.waiting}
        grads = [self.waiting.pop(node) for node in made]
        wanted = {name: x for name, x in taped.parameters.items() if name in self.learns}
        leaves = [*taped.leaves.values(), *wanted.values()]
        if not made or not leaves:
            return
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            tuple(made.values()), leaves, grads, retain_graph=keep, allow_unused=True)
        for node, grad in zip(taped.leaves, found, strict=False):
            if grad is not None:
                self.waiting[node] = self.waiting[node] + grad if node in self.waiting else grad
        over = self._over(self.engine.executable.calls[taped.place])
        for (name, x), grad in zip(wanted.items(), found[len(taped.leaves):], strict=True):
            given = torch.zeros_like(x) if grad is None else grad
            mine = self.due.setdefault(over[name], {})
            mine[name] = mine[name] + given if name in mine else given

    def _over(self, call: Call) -> dict[str, Axes]:
        """By parameter of a call the axes over which gradients that it brings are still to be summed."""
        sums = call.lowered.sums or ((),) * len(call.parameters)
        return {name: axes for name, axes in zip(call.parameters, sums, strict=True) if name}

    def _send(self, place: int) -> None:
        """Begin to sum gradients that are whole now, and wait for those that were begun some calls ago."""
        flights: list[Iterator[None]] = []
        for axes, grads in self.due.items():
            over = self.engine.parameters.communicator.group(axes)
            units = dict.fromkeys(self.engine.parameters.units[n] for n in grads if n in self.engine.parameters.units)
            for unit in units:
                if self.engine.uses[id(unit)][0] == place:
                    mine = {m.name: grads.pop(m.name) for m in unit.members if m.name in grads}
                    flights.append(unit.send(mine, over, self.found))
            home = {name: grads.pop(name) for name in tuple(grads) if name not in self.engine.parameters.units}
            flights.append(send_whole(home, over, self.found))
        old = len(self.flying) - IN_FLIGHT + 1
        going = [_advanced(each) if i < old else each for i, each in enumerate(self.flying)]
        self.flying = [each for each in (*going, _advanced(flights)) if each]


def _advanced(flights: Iterable[Iterator[None]]) -> list[Iterator[None]]:
    """Those of `flights` that are not over after one step more."""
    return [flight for flight in flights if next(flight, flight) is None]


def _added(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@dataclass(eq=False)
class Pass:
    """One forward of an engine, and its backward."""

    engine: Engine
    given: Values
    seeds: Seeds
    tape: Tape = field(init=False)

    def __post_init__(self) -> None:
        self.tape = Tape(self.engine)

    def forward(self) -> Values:
        """The outputs."""
        with torch.enable_grad():
            return self.engine.run(self.given, self.seeds, self.tape)

    def backward(self, grads: Values, keep: bool) -> dict[str, Tensor]:
        """As `Tape.backward`."""
        return self.tape.backward(grads, keep)


class Stepping(Protocol):
    """What runs a forward, and a backward when its turn has come."""

    def forward(self) -> Values: ...
    def backward(self, grads: Values, keep: bool) -> dict[str, Tensor]: ...


def stepped(step: Stepping, parameters: Mapping[str, Tensor]) -> Values:
    """The outputs of `step.forward()`, from which `step.backward` brings gradients to `parameters`."""
    nodes: list[fx.Node] = []
    made = Step.apply(step, nodes, tuple(parameters), *parameters.values())  # type: ignore[no-untyped-call]
    return dict(zip(nodes, made, strict=True))


class Step(torch.autograd.Function):
    """A whole forward as one node of autograd's graph: parameters at rest to outputs."""

    @staticmethod
    def forward(ctx: Any, step: Stepping, nodes: list[fx.Node], names: tuple[str, ...],
                *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.step, ctx.names = step, names
        ctx.specs = tuple(private.spec_of(p) if isinstance(p, DTensor) else None for p in parameters)
        values = step.forward()
        nodes += values
        ctx.nodes = tuple(values)
        outputs = tuple(value.detach() for value in values.values())
        ctx.mark_non_differentiable(*(o for o, v in zip(outputs, values.values(), strict=True) if not v.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {node: grad for node, grad in zip(ctx.nodes, grads, strict=True) if grad is not None}
        found = ctx.step.backward(given, private.keeps_graph())
        at_rest = (_at_rest(found.get(name), spec) for name, spec in zip(ctx.names, ctx.specs, strict=True))
        return None, None, None, *at_rest


def _at_rest(grad: Tensor | None, spec: Any) -> Tensor | None:
    return grad if grad is None or spec is None else private.distributed(grad.contiguous(), spec)
