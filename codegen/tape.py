"""The backward of a lowered program: segment by segment in reverse, gradients summed while the ones before run.

A forward is one node of autograd's graph, whatever it runs: parameters at rest go in, outputs come out, and nothing is
in a parameter's `.grad` until the backward of an output brings it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from autopar.codegen import private
from autopar.codegen.communicator import Axes
from autopar.codegen.control import all_there
from autopar.codegen.engine import Engine, Parameters, Seeds
from autopar.codegen.executable import Call, Values
from autopar.codegen.stopwatch import Stopwatch
from autopar.codegen.travel import send_whole
from autopar.core.errors import AutoparError
from autopar.core.sharding import Phase

IN_FLIGHT = 2
"""Segments whose gradients may be under way before the device waits for the oldest."""


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
    versions: dict[str, tuple[int, int]] = field(default_factory=dict)
    watch: Stopwatch | None = None

    def around(self, place: int, phase: Phase) -> AbstractContextManager[None]:
        """What goes around what a call runs: a stopwatch, where one is held."""
        return nullcontext() if self.watch is None else self.watch.over(place, phase)

    def record(self, place: int, leaves: dict[fx.Node, Tensor], parameters: dict[str, Tensor],
               made: dict[fx.Node, Tensor]) -> None:
        """Note a call."""
        flows = [{key: x for key, x in found.items() if x.requires_grad} for found in (leaves, parameters, made)]
        self.calls.append(Taped(place, *flows))  # type: ignore[arg-type]
        for unit in self.engine.units[place]:
            for member in unit.members:
                self.versions.setdefault(member.name, self.engine.parameters.version(member.name))

    def check(self) -> None:
        """Raises AutoparError where a parameter that is to be gathered again is no longer what it was."""
        for name, version in self.versions.items():
            if self.engine.parameters.version(name) != version:
                raise AutoparError(f"parameter {name} was changed between a forward and its backward, for which it is "
                                   "gathered again; call backward before the optimizer's step")

    def backward(self, grads: Values, keep: bool) -> dict[str, Tensor]:
        """The gradient of each parameter's part on this rank, of outputs whose gradients are `grads`.

        `keep` records for another backward.
        """
        self.check()
        sums = Sums(self.engine.parameters)
        _Backward(self, dict(grads), self.engine.learns(grads), sums).run(keep, last=True)
        return sums.finish()

    def part(self, grads: Values, sums: Sums, last: bool) -> Values:
        """The gradients of what the forward was given; those of parameters are added to `sums`, which sends for them
        in the `last` of several backwards."""
        backward = _Backward(self, dict(grads), self.engine.learns(grads), sums)
        backward.run(False, last)
        return backward.waiting


@dataclass(eq=False)
class Sums:
    """Gradients of parameters: what is due to be summed over ranks, what is under way, what has come.

    Where backwards are `several` what they bring is added up in the dtype that ranks' gradients are summed in.
    """

    parameters: Parameters
    several: bool = False
    due: dict[Axes, dict[str, Tensor]] = field(default_factory=dict)
    flying: list[list[Iterator[None]]] = field(default_factory=list)
    found: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, axes: Axes, grad: Tensor) -> None:
        """Add to the gradient of a parameter, which is to be summed over `axes`."""
        mine = self.due.setdefault(axes, {})
        if name in mine:
            mine[name] = mine[name] + grad
        else:
            unit = self.parameters.units.get(name)
            mine[name] = grad.to(unit.sum_dtype) if self.several and unit is not None else grad

    def send(self, ready: frozenset[str]) -> None:
        """Begin to sum the gradients of those that are `ready`, and wait for those that were begun some time ago."""
        flights = [flight for axes in self.due for flight in self._flights(axes, ready)]
        old = len(self.flying) - IN_FLIGHT + 1
        going = [_advanced(each) if i < old else each for i, each in enumerate(self.flying)]
        self.flying = [each for each in (*going, _advanced(flights)) if each]

    def _flights(self, axes: Axes, ready: frozenset[str]) -> Iterator[Iterator[None]]:
        grads, units = self.due[axes], self.parameters.units
        over = self.parameters.communicator.group(axes)
        now = [name for name in grads if name in ready]
        for unit in dict.fromkeys(units[name] for name in now if name in units):
            yield unit.send({m.name: grads.pop(m.name) for m in unit.members if m.name in grads}, over, self.found)
        yield send_whole({name: grads.pop(name) for name in now if name not in units}, over, self.found)

    def finish(self) -> dict[str, Tensor]:
        """All gradients, by parameter."""
        while self.flying:
            self.flying = [each for each in map(_advanced, self.flying) if each]
        return {name: _added(parts) for name, parts in self.found.items()}


@dataclass(eq=False)
class _Backward:
    """One backward; gradients of values wait for the call that made them."""

    tape: Tape
    waiting: dict[fx.Node, Tensor]
    learns: frozenset[str]
    sums: Sums

    def run(self, keep: bool, last: bool) -> None:
        """Call by call in reverse."""
        engine, calls = self.tape.engine, self.tape.calls
        for i in reversed(range(len(calls))):
            taped = calls[i]
            for unit in engine.units[taped.place]:
                unit.arrive()
            engine.begin(taped.place - 1)
            self._call(taped, keep)
            if not keep:
                calls.pop()
            if last:
                self.sums.send(engine.ready_after(taped.place))
            engine.let_go_after(taped.place)
            del taped

    def _call(self, taped: Taped, keep: bool) -> None:
        """The gradients of one call."""
        made = {node: x for node, x in taped.made.items() if node in self.waiting}
        grads = [self.waiting.pop(node) for node in made]
        wanted = {name: x for name, x in taped.parameters.items() if name in self.learns}
        leaves = [*taped.leaves.values(), *wanted.values()]
        if not made or not leaves:
            return
        with self.tape.around(taped.place, "backward"):
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                tuple(made.values()), leaves, grads, retain_graph=keep, allow_unused=True)
        for node, grad in zip(taped.leaves, found, strict=False):
            if grad is not None:
                self.waiting[node] = self.waiting[node] + grad if node in self.waiting else grad
        over = _over(self.tape.engine.executable.calls[taped.place])
        for (name, x), grad in zip(wanted.items(), found[len(taped.leaves):], strict=True):
            self.sums.add(name, over[name], torch.zeros_like(x) if grad is None else grad.resolve_conj())


def _over(call: Call) -> dict[str, Axes]:
    """By parameter of a call the axes over which gradients that it brings are still to be summed."""
    sums = call.lowered.sums or ((),) * len(call.parameters)
    return {name: axes for name, axes in zip(call.parameters, sums, strict=True) if name}


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
        ctx.step, ctx.names, ctx.over = step, names, False
        ctx.specs = tuple(map(rest_of, parameters))
        values = step.forward()
        nodes += values
        ctx.nodes = tuple(values)
        outputs = tuple(value.detach() for value in values.values())
        ctx.mark_non_differentiable(*(o for o, v in zip(outputs, values.values(), strict=True) if not v.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.over:
            raise AutoparError("a second backward through one forward, whose values are gone with the first; give "
                               "retain_graph=True to the first one")
        ctx.over = not private.keeps_graph()
        given = {node: grad for node, grad in zip(ctx.nodes, grads, strict=True) if grad is not None}
        with all_there():
            found = ctx.step.backward(given, private.keeps_graph())
        resting = (at_rest(found.get(name), spec) for name, spec in zip(ctx.names, ctx.specs, strict=True))
        return None, None, None, *resting


def rest_of(parameter: Tensor) -> Any:
    """How a parameter lies, None for one that is no DTensor."""
    return private.spec_of(parameter) if isinstance(parameter, DTensor) else None


def at_rest(grad: Tensor | None, spec: Any) -> Tensor | None:
    """A gradient's part here as its parameter lies, which is as `spec` says."""
    return grad if grad is None or spec is None else private.distributed(grad.contiguous(), spec)
