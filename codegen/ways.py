"""The ways to run the calls of a program: what each keeps for its backward, and what that comes to in bytes.

Bytes are told from the graphs that run: a joint graph is traced once and cut for each set of values that is kept, by
the plan or, where that has none, by whoever runs the segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from autopar.codegen.arrivals import arrivals
from autopar.codegen.executable import Executable
from autopar.codegen.footprint import Footprint, Kernels, by_autograd, by_tape, footprint
from autopar.codegen.partitioned import Parts, compiled_footprint, interpreted_footprint
from autopar.codegen.private import cut_by_compiler, cut_joint, unwritten
from autopar.codegen.reprice import Memory, Tally, retained_by, tally_calls
from autopar.codegen.retained import Retained, fuses
from autopar.codegen.step_bytes import GRAIN, MOMENTS, Course, Moment
from autopar.passes.problem import Setting

BACKWARD: frozenset[Moment] = frozenset(("backward", "gathered again", "sent"))
TOLD: dict[Moment, str] = {"forward": "forward of {}", "gathered": "gathering for {}", "backward": "backward of {}",
                           "gathered again": "gathering for the backward of {}", "sent": "sending of gradients of {}"}
"""What moments of a segment are called where a plan tells them."""
Kept = tuple[str, ...] | None
"""Names as `codegen.marks` gives them; None where a plan leaves it to whoever runs the segment."""


@dataclass(frozen=True, eq=False)
class Ways:
    """The calls of an executable on meta, where they run compiled (`fused`) or op by op."""

    executable: Executable
    setting: Setting
    fused: bool
    _known: dict[tuple[int, Kept], Footprint] = field(default_factory=dict)

    @cached_property
    def tallies(self) -> list[Tally]:
        """What each call comes to."""
        return tally_calls(self.executable, self.setting)

    @cached_property
    def retained(self) -> list[Retained]:
        """What the backward of each call needs."""
        return retained_by(self.executable, self.setting, self.tallies, self.fused)

    @property
    def _alone(self) -> bool:
        """Whether one rank runs all, whose backward is autograd's own."""
        return self.setting.mesh.size == 1 and self.setting.stages == 1

    def footprint(self, place: int, kept: Kept) -> Footprint:
        """Bytes of a call that keeps what is called so."""
        key = id(self.executable.calls[place].lowered), kept
        if key not in self._known:
            plain = kept is None and not self.fused
            self._known[key] = self._op_by_op(place) if plain else self._cut(place, kept)
        return self._known[key]

    def footprints(self, kept: dict[str, tuple[str, ...]]) -> tuple[Footprint, ...]:
        """Of every call, by what segments keep."""
        return tuple(self.footprint(place, kept.get(call.segment.name))
                     for place, call in enumerate(self.executable.calls))

    def course(self) -> Course:
        """What there is whatever calls keep."""
        return Course(self.executable, tuple(each.results_bytes for each in self.footprints({})),
                      self.setting.optimizer.state_bytes)

    def _op_by_op(self, place: int) -> Footprint:
        """Bytes of a call that keeps what autograd does."""
        call, kind = self.executable.calls[place], "cuda" if self.fused else "cpu"
        given = arrivals(call.lowered, self.executable.decision, self.executable.target.inputs)
        run = Kernels(call.lowered.module, kind)
        backward = by_autograd if self._alone else by_tape
        return footprint(run, given, 1 + call.lowered.host_seeded, grain=GRAIN.get(kind, 1), backward=backward)

    def _cut(self, place: int, kept: Kept) -> Footprint:
        call, found, kind = self.executable.calls[place], self.retained[place].joint, "cuda" if self.fused else "cpu"
        if found is None:
            return self._op_by_op(place)
        with unwritten():
            if kept is None:
                parts = cut_by_compiler(found.module, found.outputs)
            else:
                parts = cut_joint(found.module, found.saved(frozenset(kept)), found.outputs)
        results = len(call.exports)
        made = Parts(*parts, results, len(call.segment.externals) + 1 + call.lowered.host_seeded,
                     found.outputs - results, self._alone)
        return (compiled_footprint if self.fused else interpreted_footprint)(made, GRAIN.get(kind, 1))


def ways_of(executable: Executable, setting: Setting, fused: bool | None = None,
            known: dict[tuple[int, Kept], Footprint] | None = None) -> Ways:
    """The ways to run a lowered program in a setting, `fused` or not; None: as is the default on the devices there.

    `known` are footprints of others of the same lowered segments.
    """
    return Ways(executable, setting, fuses(setting) if fused is None else fused, {} if known is None else known)


def bytes_by_call(ways: Ways, kept: dict[str, tuple[str, ...]]) -> tuple[tuple[float, float], ...]:
    """Of each call the bytes that are there from it on to its backward, and those of a device at the most, in its
    forward or its backward."""
    prints, course = ways.footprints(kept), ways.course()
    most = course.bytes_by_moment(prints).max(0, initial=0.0)
    return tuple((float(each.saved + sum(each.results_bytes)), float(nbytes))
                 for each, nbytes in zip(prints, most, strict=True))


def memory_of(ways: Ways, kept: dict[str, tuple[str, ...]], around: float | None) -> Memory:
    """Bytes of the fullest moment where segments keep what is called so; `around` is what the process takes besides."""
    prints, course = ways.footprints(kept), ways.course()
    held, saved = course.held.values(), np.cumsum([0.0, *(each.saved for each in prints)])
    moments = course.bytes_by_moment(prints)
    parameters, state = sum(h.parameter for h in held), sum(h.state for h in held)
    gradients = sum(h.gradient for h in held)
    if not moments.size or course.update >= moments.max():
        return Memory(parameters, gradients, state, course.rest - parameters - state, 0.0, around, "optimizer's step")
    k, place = np.unravel_index(int(moments.argmax()), moments.shape)
    due = float(course.gradients[place]) if MOMENTS[k] in BACKWARD else 0.0
    activations = course.rest - parameters - state + float(course.values[place] + saved[place])
    known = parameters + due + state + activations
    return Memory(parameters, due, state, activations, float(moments[k, place]) - known, around,
                  TOLD[MOMENTS[k]].format(ways.executable.calls[place].segment.name))
