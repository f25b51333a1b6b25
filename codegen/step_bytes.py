"""Bytes that a device holds through a step: the footprints of its calls, one after another, and what surrounds them.

Forward, in call i: what rests, what earlier calls saved and made, and what the call works with. Backward, in call i:
what rests, what calls up to it saved and made, gradients that wait for values made earlier, gradients of parameters of
later calls, and what the call works with. Gathered parameters come and go as `codegen.engine` and `codegen.tape` have
them: those of the next call are under way in a buffer while one runs, and gradients of the last few are being summed.

    bytes in moment k of call p = fixed_k[p] + Σ_{q < p} saved of q + extra_k of p's footprint
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
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
Array = NDArray[np.float64]
Moment = Literal["forward", "gathered", "backward", "gathered again", "sent"]
MOMENTS: tuple[Moment, ...] = ("forward", "gathered", "backward", "gathered again", "sent")
"""Of each call: its forward, the gathering before that, its backward, the gathering before that, gradients on their way
when it is done."""


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


def extras(each: Footprint) -> tuple[float, ...]:
    """What a call with that footprint holds in each of `MOMENTS` beside what is there whatever it does."""
    read = sum(size for i, size in enumerate(each.results_bytes) if i in each.results)
    return float(each.forward), 0.0, float(each.backward - read), float(each.saved - read), 0.0


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


def by_call(executable: Executable, footprints: dict[int, Footprint]) -> tuple[Footprint, ...]:
    """The footprint of each call."""
    return tuple(footprints[id(call.lowered)] for call in executable.calls)


def step_bytes(executable: Executable, prints: Sequence[Footprint], state_bytes: float) -> StepBytes:
    """Through a step of training whose calls have those footprints; `state_bytes` are an optimizer's for an element."""
    course = Course(executable, tuple(each.results_bytes for each in prints), state_bytes)
    most = course.bytes_by_moment(prints).max(1, initial=0.0)
    return StepBytes(course.rest, float(max(most[:2])), float(max(most[2:])), course.update)


@dataclass(frozen=True, eq=False)
class Course:
    """What there is in each moment of each call, whatever calls keep; `results` are the bytes of what each makes."""

    executable: Executable
    results: tuple[tuple[int, ...], ...]
    state_bytes: float

    def bytes_by_moment(self, prints: Sequence[Footprint]) -> Array:
        """Bytes in every moment of every call: (moments, calls)."""
        saved = np.cumsum([0.0, *(each.saved for each in prints)])[:-1]
        beside: Array = np.array([extras(each) for each in prints]).reshape(-1, len(MOMENTS)).T
        found: Array = np.stack(self.fixed) + saved + beside
        return found

    @cached_property
    def fixed(self) -> tuple[Array, ...]:
        """By moment, what is there in each call but for what calls save and work with."""
        forward = self.rest + self.values + self._here
        after = self.rest + self._values_after + self._here + self.gradients + self._coming_back
        before = after - self._coming_back + self._waiting
        return (forward + self._coming, forward + self._own, before + self._coming_back, before + self._own_back,
                after + self._waiting_after + self._sent)

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
        batch = [n for n in program.placeholders("input") if isinstance(n.meta.get("val"), Tensor) and n.users]
        unread = [n for n in batch if n not in given]
        return (sum(h.parameter + h.state for h in self.held.values()) + sum(given.values())
                + sum(_nbytes(n.meta["val"]) for n in unread) + sum(_before_cast(n.meta["val"]) for n in batch))

    @cached_property
    def update(self) -> float:
        """While the optimizer steps."""
        return self.rest + sum(h.gradient for h in self.held.values())

    @cached_property
    def sizes(self) -> dict[fx.Node, float]:
        """Bytes of every value that a call makes; 0 for one in another's memory."""
        return {node: nbytes for call, each in zip(self.executable.calls, self.results, strict=True)
                for node, nbytes in zip(call.exports, each, strict=True)}

    @cached_property
    def made(self) -> dict[fx.Node, int]:
        """The call that makes a value."""
        return {node: place for place, call in enumerate(self.executable.calls) for node in call.exports}

    @cached_property
    def last(self) -> dict[fx.Node, int]:
        """The last call that reads a value through which a gradient flows."""
        gradients = self.executable.decision.context.gradients
        return {node: place for place, call in enumerate(self.executable.calls) for node in call.segment.externals
                if node in self.sizes and node in gradients}

    @cached_property
    def uses(self) -> dict[fx.Node, tuple[int, int]]:
        """Each parameter that is used, with the first and the last call that uses it."""
        found = dict[fx.Node, tuple[int, int]]()
        for place, call in enumerate(self.executable.calls):
            for node in call.segment.externals:
                if node in self.held:
                    found[node] = found.get(node, (place, place))[0], place
        return found

    @cached_property
    def gathered(self) -> dict[fx.Node, tuple[int, int]]:
        """Those that are gathered."""
        decision = self.executable.decision
        return {node: used for node, used in self.uses.items()
                if decision.mesh.extent(decision.storage[node].gathered) > 1}

    def _spread(self, spans: Iterable[tuple[float, int, int]]) -> Array:
        """Bytes by call of what is there from one call to another, both counted."""
        found = np.zeros(len(self.executable.calls) + 1)
        for nbytes, first, last in spans:
            if first <= last:
                found[max(first, 0)] += nbytes
                found[last + 1] -= nbytes
        return np.cumsum(found)[:-1]

    @property
    def _end(self) -> int:
        return len(self.executable.calls) - 1

    @cached_property
    def values(self) -> Array:
        """What calls before each made: all of it is held for their backwards."""
        return self._spread((size, self.made[n] + 1, self._end) for n, size in self.sizes.items())

    @cached_property
    def _values_after(self) -> Array:
        """The same with what the call itself made."""
        return self._spread((size, self.made[n], self._end) for n, size in self.sizes.items())

    @cached_property
    def _here(self) -> Array:
        """Gathered parameters that are there."""
        return self._spread((self._whole(n), first, self._end if self._stays(n) else last)
                            for n, (first, last) in self.gathered.items())

    @cached_property
    def _coming(self) -> Array:
        """Those of the next call."""
        return self._spread((self._whole(n), first - 1, first - 1) for n, (first, _) in self.gathered.items() if first)

    @cached_property
    def _own(self) -> Array:
        """The buffer of those that a call begins with."""
        return self._spread((self._whole(n), first, first) for n, (first, _) in self.gathered.items())

    @cached_property
    def _coming_back(self) -> Array:
        """In the backward, those of the call before."""
        return self._spread((self._whole(n), last + 1, last + 1) for n, (_, last) in self.gathered.items()
                            if not self._stays(n))

    @cached_property
    def _own_back(self) -> Array:
        return self._spread((self._whole(n), last, last) for n, (_, last) in self.gathered.items()
                            if not self._stays(n))

    @cached_property
    def _waiting(self) -> Array:
        """Gradients that later calls brought to values that were made before each."""
        return self._spread((self.sizes[n], self.made[n] + 1, last - 1) for n, last in self.last.items())

    @cached_property
    def _waiting_after(self) -> Array:
        """The same with those that the call itself brings."""
        return self._spread((self.sizes[n], self.made[n] + 1, last) for n, last in self.last.items())

    @cached_property
    def gradients(self) -> Array:
        """Of parameters of later calls: those that are summed, those being summed, and those still to be added to."""
        done = self._spread((self.held[n].gradient, 0, first - 1) for n, (first, _) in self.uses.items())
        due = self._spread((self._whole(n) if n in self.gathered else self.held[n].gradient, first, last - 1)
                           for n, (first, last) in self.uses.items() if self.held[n].gradient)
        flying = self._spread((self._flying(p), p - IN_FLIGHT + 1, p - 1) for p in range(self._end + 1))
        return done + due + flying

    @cached_property
    def _sent(self) -> Array:
        """The gradients that a call brings to parameters, beside the buffers from which they are summed."""
        return np.array([self._sent_by(place) for place in range(self._end + 1)])

    def _sent_by(self, place: int) -> float:
        gathered = [n for n in self._learning(place) if n in self.gathered]
        return (sum(self._whole(n) * (1.0 + (self._widening(n) if self.gathered[n][0] == place else 0.0))
                    for n in gathered)
                + sum(self.held[n].gradient * (1.0 + _copies(n) * summed)
                      for n, summed in self._at_home(place).items()))

    def _stays(self, node: fx.Node) -> bool:
        """Whether a gathered parameter stays between the forward and the backward."""
        return self.executable.decision.storage[node].kept or self.gathered[node][1] == self._end

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


def _before_cast(tensor: Tensor) -> float:
    """Bytes of an input in fp32, as it is given, where it is cast for the program and so there twice; else 0."""
    narrow = tensor.dtype.is_floating_point and tensor.element_size() < MASTER_BYTES
    return float(tensor.numel() * MASTER_BYTES) if narrow else 0.0


def _nbytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())
