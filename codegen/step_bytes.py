"""Bytes that a device holds through a step: the footprints of its calls, one after another, and what surrounds them.

Forward, in call i: what rests, what earlier calls saved and made, what the call works with. Backward, in call i: what
rests, what calls up to it saved and made, gradients that wait for values made earlier, gradients of parameters of later
calls, and what the call works with. Gathered parameters come and go as `codegen.engine` and `codegen.tape` have them:
those of the next call are under way in a buffer while one runs, and gradients of the last few are being summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from autopar.codegen.arrivals import arrivals
from autopar.codegen.executable import Executable
from autopar.codegen.footprint import Footprint, Kernels, footprint
from autopar.codegen.partitioned import compiled_footprint, parted
from autopar.codegen.tape import IN_FLIGHT
from autopar.passes.costs import MASTER_BYTES
from autopar.passes.layout import itemsize, whole_bytes
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
    def made(self) -> dict[fx.Node, int]:
        """The call that makes a value."""
        return {node: place for place, call in enumerate(self.executable.calls) for node in call.exports}

    @cached_property
    def users(self) -> dict[fx.Node, list[int]]:
        """The calls that read a value through which a gradient flows, ascending."""
        found: dict[fx.Node, list[int]] = {}
        for place, call in enumerate(self.executable.calls):
            for node in call.segment.externals:
                if node in self.sizes and node in self.executable.decision.context.gradients:
                    found.setdefault(node, []).append(place)
        return found

    @cached_property
    def gathered(self) -> dict[fx.Node, tuple[int, int]]:
        """Each parameter that is gathered, with the first and the last call that uses it."""
        storage, found = self.executable.decision.storage, dict[fx.Node, tuple[int, int]]()
        for place, call in enumerate(self.executable.calls):
            for node in call.segment.externals:
                if node in storage and self.executable.decision.mesh.extent(storage[node].gathered) > 1:
                    found[node] = found.get(node, (place, place))[0], place
        return found

    def _values(self, place: int) -> float:
        """What calls before `place` made: all of it is held for their backwards."""
        return sum(size for node, size in self.sizes.items() if self.made[node] < place)

    def _saved(self, place: int) -> float:
        """What the calls before `place` saved."""
        return sum(each.saved for each in self.prints[:place])

    def _forward(self, place: int) -> float:
        here = sum(self._whole(n) for n, (first, last) in self.gathered.items()
                   if first <= place and (place <= last or self._stays(n)))
        coming = sum(self._whole(n) for n, (first, _) in self.gathered.items() if first == place + 1)
        own = sum(self._whole(n) for n, (first, _) in self.gathered.items() if first == place)
        given = self.rest + self._values(place) + self._saved(place) + here
        return given + max(coming + self.prints[place].forward, own)

    def _stays(self, node: fx.Node) -> bool:
        """Whether a gathered parameter stays between the forward and the backward."""
        return self.executable.decision.storage[node].kept or self.gathered[node][1] == len(self.prints) - 1

    def _backward(self, place: int) -> float:
        here = sum(self._whole(n) for n, (first, last) in self.gathered.items()
                   if first <= place and (place <= last or self._stays(n)))
        coming = sum(self._whole(n) for n, (_, last) in self.gathered.items()
                     if last == place - 1 and not self._stays(n))
        own = sum(self._whole(n) for n, (_, last) in self.gathered.items() if last == place and not self._stays(n))
        given = self.rest + self._values(place + 1) + self._saved(place) + here + self._gradients(place)
        read = sum(size for i, size in enumerate(self.prints[place].results_bytes) if i in self.prints[place].results)
        before = given + self._waiting(place, place + 1) - read
        return max(before + coming + self.prints[place].backward, before + own + self.prints[place].saved,
                   given + self._waiting(place, place) + coming + self._sent(place))

    def _waiting(self, place: int, since: int) -> float:
        """Gradients that calls from `since` on brought to values that were made before `place`."""
        return sum(size for node, size in self.sizes.items()
                   if self.made[node] < place and any(reader >= since for reader in self.users.get(node, ())))

    def _sent(self, place: int) -> float:
        """The gradients that a call brings to parameters, beside the buffers from which they are summed."""
        gathered = [n for n in self._learning(place) if n in self.gathered]
        return (sum(self._whole(n) * (1.0 + (self._widening(n) if self.gathered[n][0] == place else 0.0))
                    for n in gathered)
                + sum(self.held[n].gradient * (1.0 + _copies(n) * summed)
                      for n, summed in self._at_home(place).items()))

    def _learning(self, place: int) -> list[fx.Node]:
        """The parameters that a call brings gradients to."""
        return [n for n in dict.fromkeys(self.executable.calls[place].segment.externals)
                if n in self.held and self.held[n].gradient]

    def _at_home(self, place: int) -> dict[fx.Node, bool]:
        """Those of them that rest as they are used, and whether their gradients are summed over ranks."""
        call = self.executable.calls[place]
        over = dict(zip(call.segment.externals, call.lowered.sums, strict=False))
        return {n: self.executable.decision.mesh.extent(over.get(n, ())) > 1
                for n in self._learning(place) if n not in self.gathered}

    def _gradients(self, place: int) -> float:
        """Of parameters of later calls: those that are summed, those being summed, and those still to be added to."""
        later = {n for call in self.executable.calls[place + 1:] for n in call.segment.externals if n in self.held}
        waiting = {n for call in self.executable.calls[:place + 1] for n in call.segment.externals}
        done = sum(self.held[n].gradient for n in later - waiting)
        due = sum(self._whole(n) if n in self.gathered else self.held[n].gradient for n in later & waiting)
        return done + due + sum(self._flying(i) for i in range(place + 1, min(place + IN_FLIGHT, len(self.prints))))

    def _flying(self, place: int) -> float:
        """What is held while gradients that a call brought are summed: themselves, and what they were packed into."""
        whole = sum(self._whole(n) * self._widening(n) for n in self._learning(place)
                    if n in self.gathered and self.gathered[n][0] == place)
        return whole + sum(self.held[n].gradient for n, summed in self._at_home(place).items() if summed)

    def _whole(self, node: fx.Node) -> float:
        """Bytes of a gathered parameter, in the dtype that is computed in."""
        decision = self.executable.decision
        factored = decision.context.segmented.factored
        spec = decision.storage[node].spec(decision.context.rank(node), trained=False)
        return whole_bytes(factored, node) / decision.mesh.extent(spec.axes)

    def _widening(self, node: fx.Node) -> float:
        """How many times larger its gradient is where that is summed."""
        if not self.held[node].gradient:
            return 0.0
        mixed = self.executable.decision.context.segmented.factored.program.precision.endswith("-mixed")
        return MASTER_BYTES / itemsize(node) if mixed else 1.0


def _copies(node: fx.Node) -> float:
    """How often a gradient is copied into a bucket: first by itself where it may lie channels last."""
    return 2.0 if len(node.meta["val"].shape) > 2 else 1.0


def _nbytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())
