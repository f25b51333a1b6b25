"""Runs a lowered program: its segments in order, the parameters of each gathered while the one before it runs.

What the backward needs is told to a recorder, `tape.Tape`; each segment then runs on leaves of its own, so that
autograd records it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from torch import Tensor, fx

from autopar.codegen.communicator import Communicator
from autopar.codegen.executable import Executable, Values
from autopar.codegen.groups import ParameterGroup
from autopar.codegen.parameters import locals_of
from autopar.codegen.travel import Unit, local_of
from autopar.core.sharding import Phase

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

    def version(self, name: str) -> tuple[int, int]:
        """How often a parameter, and its part here, has been written to: what is written through the one does not
        always count for the other."""
        parameter = self.parameter(name)
        return parameter._version, local_of(parameter)._version


class Recorder(Protocol):
    """Who is told what a call read, by value and by parameter, and what it made."""

    def record(self, place: int, leaves: dict[fx.Node, Tensor], parameters: dict[str, Tensor],
               made: dict[fx.Node, Tensor]) -> None: ...

    def around(self, place: int, phase: Phase) -> AbstractContextManager[None]: ...


Held = Literal["for a turn", "for a step"]
"""How long parameters stay that were gathered: until they are not needed soon, or until they are released."""


@dataclass(frozen=True, eq=False)
class Engine:
    """An executable with its parameters, which may be run several times in a step where they are held for it."""

    executable: Executable
    parameters: Parameters
    held: Held = "for a turn"

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

    def ready_after(self, place: int) -> frozenset[str]:
        """The parameters whose gradients are whole once the backward of call `place` is done, at home or gathered."""
        units = self.parameters.units
        return frozenset(name for name in self.executable.calls[place].parameters if name and (
            name not in units or self.uses[id(units[name])][0] == place))

    def let_go_after(self, place: int) -> None:
        """Let the units go that no earlier call uses, unless they are held."""
        for unit in self.units[place]:
            if self.held == "for a turn" and self.uses[id(unit)][0] == place:
                unit.leave()

    def learns(self, outputs: Iterable[fx.Node]) -> frozenset[str]:
        """The parameters that a gradient of `outputs` comes to, on every rank alike."""
        asked = frozenset(outputs)
        if asked not in self._learnt:
            self._learnt[asked] = self._learn(asked)
        return self._learnt[asked]

    @cached_property
    def _learnt(self) -> dict[frozenset[fx.Node], frozenset[str]]:
        return {}

    def _learn(self, outputs: Iterable[fx.Node]) -> frozenset[str]:
        context = self.executable.decision.context
        sources = context.segmented.factored.program.sources
        waiting, seen = [node for node in outputs if node in context.gradients], set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [n for n in node.all_input_nodes if n in context.gradients]
        return frozenset(sources[node.name].name for node in seen if node in self.executable.decision.storage)

    def run(self, given: Values, seeds: Seeds, tape: Recorder | None) -> Values:
        """The program's outputs; with a `tape` what its backward needs is recorded there."""
        if self.held == "for a turn":
            self.release()

        def call(place: int, values: Values) -> tuple[Tensor, ...]:
            held: dict[str, Tensor] = {}
            for unit in self.units[place]:
                held.update(unit.arrive())
            self.begin(place + 1)
            made = self._segment(place, values, held, seeds[place], tape)
            for unit in self.units[place]:
                self._after(unit, place, tape)
            return made

        return self.executable.run(given, call)

    def release(self) -> None:
        """Let go of all that is gathered: parameters may have changed."""
        for unit in dict.fromkeys(unit for units in self.units for unit in units):
            unit.leave()

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

    def begin(self, place: int) -> None:
        """Send for what a call uses, if there is such a call."""
        if 0 <= place < len(self.units):
            for unit in self.units[place]:
                unit.begin()

    def _after(self, unit: Unit, place: int, tape: Recorder | None) -> None:
        """Let a unit go that is not used again soon: what the backward begins with stays."""
        last = self.uses[id(unit)][1]
        stays = self.held == "for a step" or (
            tape is not None and (unit.kept or last == len(self.units) - 1))
        if place == last and not stays:
            unit.leave()

    def _segment(self, place: int, values: Values, held: Mapping[str, Tensor], seeds: tuple[Tensor, ...],
                 tape: Recorder | None) -> tuple[Tensor, ...]:
        call = self.executable.calls[place]
        parameters = {name: held[name] if name in held else self.parameters.at_home(name)
                      for name in call.parameters if name}
        leaves = {node: _leaf(values[node], tape) for node, name in zip(call.segment.externals, call.parameters,
                                                                        strict=True) if not name}
        inputs = [parameters[name] if name else leaves[node]
                  for node, name in zip(call.segment.externals, call.parameters, strict=True)]
        with tape.around(place, "forward") if tape is not None else nullcontext():
            made = call.run(*inputs, *seeds)
        if tape is not None:
            tape.record(place, leaves, parameters, dict(zip(call.exports, made, strict=True)))
        return made


def _leaf(value: Tensor, tape: Recorder | None) -> Tensor:
    return value.detach().requires_grad_() if tape is not None and value.requires_grad else value
