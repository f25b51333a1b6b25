"""Bytes that a device holds through a step: the footprints of its calls, one after another, and what surrounds them.

Forward, before call i: what rests, what earlier calls saved, values that are still to be read or were saved, and what
the call works with. Backward, of call i: what rests, what earlier calls saved, values that they and this one read,
gradients that are pending for values made earlier, gradients of parameters of later calls, and what the call works
with. Parameters that are gathered come and go as FSDP2 has them: a gather lands in one buffer and is copied out of it;
the next one in the backward is under way; gradients are summed in fp32 from a buffer that is held until the next sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from autopar.codegen.arrivals import arrivals
from autopar.codegen.executable import Executable
from autopar.codegen.footprint import Footprint, Kernels, footprint
from autopar.codegen.partitioned import compiled_footprint, parted
from autopar.passes.moments import Held, held

GRAIN = {"cuda": 512}
"""The bytes that an allocator rounds up to, by kind of device."""


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes at the fullest moment of each part of a step, and those that rest between steps with the batch."""

    rest: float
    forward: float
    backward: float
    update: float

    @property
    def peak(self) -> float:
        """The most at any moment."""
        return max(self.forward, self.backward, self.update)


def eager_footprints(executable: Executable, kind: str) -> dict[int, Footprint]:
    """Of each distinct lowered segment, by identity, run as it is on a device of `kind`. The executable is on meta."""
    found: dict[int, Footprint] = {}
    for call in executable.calls:
        if id(call.lowered) not in found:
            given = arrivals(call.lowered, executable.decision, executable.target.inputs)
            run = Kernels(call.lowered.module, kind)
            found[id(call.lowered)] = footprint(run, given, 1 + call.lowered.host_seeded, grain=GRAIN.get(kind, 1))
    return found


def compiled_footprints(executable: Executable, kind: str) -> dict[int, Footprint]:
    """The same, compiled by Inductor."""
    found: dict[int, Footprint] = {}
    for call in executable.calls:
        if id(call.lowered) not in found:
            given = arrivals(call.lowered, executable.decision, executable.target.inputs)
            parts = parted(Kernels(call.lowered.module, kind), given, 1 + call.lowered.host_seeded)
            found[id(call.lowered)] = compiled_footprint(parts, GRAIN.get(kind, 1))
    return found


def step_bytes(executable: Executable, footprints: dict[int, Footprint], state_bytes: float) -> StepBytes:
    """Through a step of training; `state_bytes` are an optimizer's for an element."""
    return _Step(executable, tuple(footprints[id(call.lowered)] for call in executable.calls), state_bytes).bytes()


@dataclass(frozen=True, eq=False)
class _Step:
    executable: Executable
    prints: tuple[Footprint, ...]
    state_bytes: float

    def bytes(self) -> StepBytes:
        places = range(len(self.prints))
        grads = sum(h.gradient for h in self.held.values())
        return StepBytes(self.rest, max(map(self._forward, places), default=0.0),
                         max(map(self._backward, places), default=0.0), self.rest + grads)

    @cached_property
    def held(self) -> dict[fx.Node, Held]:
        """What each parameter comes to."""
        decision = self.executable.decision
        return {node: held(decision.context, node, storage, decision.mesh, self.state_bytes)
                for node, storage in decision.storage.items()}

    @cached_property
    def rest(self) -> float:
        """Parameters, optimizer state, buffers, constants and the batch."""
        program = self.executable.decision.context.segmented.factored.program
        given: dict[fx.Node, float] = {}
        for call in self.executable.calls:
            came = arrivals(call.lowered, self.executable.decision, self.executable.target.inputs)
            given.update((node, each.nbytes) for node, each in zip(call.segment.externals, came, strict=True)
                         if node.op == "placeholder" and node not in self.held)
        unread = [n for n in program.placeholders("input") if n not in given and isinstance(n.meta.get("val"), Tensor)]
        return (sum(h.parameter + h.state for h in self.held.values()) + sum(given.values())
                + sum(_nbytes(n.meta["val"]) for n in unread if n.users))

    @cached_property
    def sizes(self) -> dict[fx.Node, float]:
        """Bytes of every value that a call makes; 0 for one in another's memory."""
        return {node: nbytes for call, each in zip(self.executable.calls, self.prints, strict=True)
                for node, nbytes in zip(call.exports, each.results_bytes, strict=True)}

    @cached_property
    def readers(self) -> dict[fx.Node, list[int]]:
        """The calls whose backward reads a value, ascending."""
        found: dict[fx.Node, list[int]] = {}
        for place, (call, each) in enumerate(zip(self.executable.calls, self.prints, strict=True)):
            externals = call.segment.externals
            read = [externals[i] for i in each.arguments if i < len(externals)]
            for node in [*read, *(call.exports[i] for i in each.results)]:
                if node in self.sizes and place not in found.get(node, []):
                    found.setdefault(node, []).append(place)
        return found

    @cached_property
    def made(self) -> dict[fx.Node, int]:
        """The call that makes a value."""
        return {node: place for place, call in enumerate(self.executable.calls) for node in call.exports}

    def _forward(self, place: int) -> float:
        gone = {node for freed in self.executable.freed[:place] for node in freed}
        outputs = set(self.executable.outputs)
        values = sum(size for node, size in self.sizes.items() if self.made[node] < place
                     and (node not in gone or node in outputs or any(r < place for r in self.readers.get(node, ()))))
        return self.rest + values + self._saved(place) + self.prints[place].forward + self._gathered(place, 2.0)

    def _backward(self, place: int) -> float:
        values = sum(self.sizes[node] for node, reads in self.readers.items() if min(reads) <= place)
        pending = sum(size for node, size in self.sizes.items()
                      if self.made[node] < place and any(r > place for r in self._users.get(node, ())))
        later = {node for call in self.executable.calls[place + 1:] for node in call.segment.externals}
        earlier = {node for call in self.executable.calls[:place + 1] for node in call.segment.externals}
        grads = sum(h.gradient for node, h in self.held.items() if node in later and node not in earlier)
        sums = self._scattered(place + 1) if place + 1 < len(self.prints) else 0.0
        under_way = self._used(place - 1, kept=False) if place else 0.0
        return (self.rest + values + self._saved(place) + pending + grads + sums + under_way
                + self.prints[place].backward + self._gathered(place, 1.0))

    @cached_property
    def _users(self) -> dict[fx.Node, list[int]]:
        """The calls that read a differentiable value."""
        found: dict[fx.Node, list[int]] = {}
        for place, call in enumerate(self.executable.calls):
            for node in call.segment.externals:
                if node in self.sizes and node in self.executable.decision.context.gradients:
                    found.setdefault(node, []).append(place)
        return found

    def _saved(self, place: int) -> float:
        """What the calls before `place` saved."""
        return sum(each.saved for each in self.prints[:place])

    def _gathered(self, place: int, times: float) -> float:
        """Gathered parameters that are there: those of the call, `times` over where they are just gathered, and those
        of earlier ones that are kept."""
        kept = {node for call in self.executable.calls[:place] for node in call.segment.externals
                if node in self.held and self.executable.decision.storage[node].kept}
        return (times * self._used(place, kept=False) + max(1.0, times) * self._used(place, kept=True)
                + sum(self._bytes(node) for node in kept - set(self.executable.calls[place].segment.externals)))

    def _used(self, place: int, kept: bool) -> float:
        """Bytes of the gathered parameters of a call."""
        storage = self.executable.decision.storage
        nodes = dict.fromkeys(n for n in self.executable.calls[place].segment.externals if n in storage)
        return sum(self._bytes(n) for n in nodes if storage[n].gathered and storage[n].kept is kept)

    def _bytes(self, node: fx.Node) -> float:
        """Of a parameter as it is used."""
        h = self.held[node]
        scattered = self._scattered_of(node)
        return h.copy if self.executable.decision.storage[node].kept else (h.working - scattered) / 2.0

    def _scattered(self, place: int) -> float:
        """The buffer from which the gradients of a call's gathered parameters are summed."""
        return sum(self._scattered_of(n) for n in dict.fromkeys(self.executable.calls[place].segment.externals)
                   if n in self.held)

    def _scattered_of(self, node: fx.Node) -> float:
        h, storage = self.held[node], self.executable.decision.storage[node]
        if not (storage.gathered and h.gradient):
            return 0.0
        parts = self.executable.decision.mesh.extent(storage.gathered)
        return h.gradient * parts


def _nbytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())
