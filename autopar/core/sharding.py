"""The numbers a sharding problem is made of; no model, no tensors, so that it can be solved by brute force too.

A `Node` is something to decide once (an op, a parameter, an input), standing for `count` equal ones. A
`Flow` is one value on its way into one segment: its producer emits it in a spec, each consumer wants one,
and every distinct (source, target) pair that occurs is paid once, whatever the number of consumers. A
`Segment` is the part of the step in which parameter communication can hide behind compute.

    step seconds = Σ_segments count · Σ_{phase ∈ forward, backward} (max(compute + inline, parameter communication)
                                                                     + INTERFERENCE · parameter communication)
                 + Σ_nodes count · optimizer seconds
    bytes        = max_moments Σ_nodes (count · held + kept in moment · saved + reduced in moment · gradient)
                   + Σ_{parameters there} working + max_{ops there} working  ≤  budget

A `Moment` is the backward of one segment: results saved by it and by those before it are still there, gradients of
parameters that it and those after it use are there already. Without moments the bytes are those held all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Phase = Literal["forward", "backward"]
PHASES: tuple[Phase, ...] = ("forward", "backward")
INTERFERENCE = 0.02
"""The part of parameter communication that shows even where it hides: it takes memory bandwidth, cores and launches
from what hides it. A rough figure; above 0, so that of plans which hide all of it the one that sends less is taken."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to do one node: seconds of compute, with what is sent inside of it, and of its optimizer step, and bytes
    on a device.

    `nbytes` are held all the time, `saved` from the forward to the backward of its segment, `gradient` from the
    backward on, `working` while its segment runs.
    """

    name: str
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    nbytes: float = 0.0
    saved: float = 0.0
    gradient: float = 0.0
    working: float = 0.0

    @property
    def costs(self) -> tuple[float, ...]:
        """Every figure; the fewer the better."""
        return (self.forward, self.backward, self.optimizer, self.nbytes, self.saved, self.gradient, self.working)


@dataclass(frozen=True, slots=True)
class Node:
    """A decision among `choices`, made once for `count` equal nodes."""

    name: str
    choices: tuple[Choice, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class Consumer:
    """`node` wants the value in spec number `targets[c]` when it takes its choice c."""

    node: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """A value from `producer`, emitted in spec number `sources[c]` under the producer's choice c.

    `forward[s][t]` and `backward[s][t]` are the seconds from source spec s to target spec t, infinite where
    there is no way. `parameter` communication may hide behind compute; other communication may not.
    """

    name: str
    producer: int
    sources: tuple[int, ...]
    consumers: tuple[Consumer, ...]
    forward: tuple[tuple[float, ...], ...]
    backward: tuple[tuple[float, ...], ...]
    parameter: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` equal runs of the program: the nodes computed in it and the flows into it."""

    name: str
    count: int
    nodes: tuple[int, ...]
    flows: tuple[Flow, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """The backward of one segment: how many of the `count` of node n have results kept and gradients made.

    Of `parameters`, nodes too, all working bytes are there, of `ops` those of one at a time.
    """

    name: str
    saved: tuple[int, ...]
    gradients: tuple[int, ...]
    parameters: tuple[int, ...] = ()
    ops: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """A sharding problem; `budget` in bytes a device."""

    nodes: tuple[Node, ...]
    segments: tuple[Segment, ...]
    budget: float = float("inf")
    moments: tuple[Moment, ...] = ()


Bytes = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Ledger:
    """Bytes by what there may be at once: row r, choice c of node n is `table[r, first[n] + c]`.

    A row is a moment and one of its ops. What is held on a device is the largest row's sum.
    """

    first: tuple[int, ...]
    table: Bytes

    def of(self, choices: tuple[int, ...]) -> Bytes:
        """The bytes of every row under `choices`."""
        return np.asarray(self.table[:, [start + c for start, c in zip(self.first, choices, strict=True)]].sum(1))

    def node(self, n: int) -> Bytes:
        """The bytes that the choices of node n add to every row (rows, choices)."""
        return self.table[:, self.first[n]:(*self.first, self.table.shape[1])[n + 1]]

    def binding(self, budget: float) -> Ledger:
        """The rows that can exceed `budget`, without those that another one never falls below."""
        most = sum((self.node(n).max(1) for n in range(len(self.first))), np.zeros(len(self.table)))
        table = self.table[most > budget]
        below = (table[:, None, :] <= table[None, :, :]).all(2)
        covered = below & ~(below.T & np.tri(len(table), dtype=bool))
        return Ledger(self.first, table[~covered.any(1)])


def ledger(instance: Instance) -> Ledger:
    """All rows of bytes of an instance; one, of what is held all the time, where it has no moments."""
    first = tuple(int(n) for n in np.cumsum([0, *(len(node.choices) for node in instance.nodes)])[:-1])
    held = np.array([node.count * choice.nbytes for node in instance.nodes for choice in node.choices])
    rows = [row for moment in instance.moments for row in _rows(instance, moment, first, held)]
    return Ledger(first, np.stack(rows or [held]))


def _rows(instance: Instance, moment: Moment, first: tuple[int, ...], held: Bytes) -> Iterator[Bytes]:
    """The rows of one moment."""
    row = held.copy()
    for n, node in enumerate(instance.nodes):
        at = slice(first[n], first[n] + len(node.choices))
        row[at] += [moment.saved[n] * c.saved + moment.gradients[n] * c.gradient for c in node.choices]
        if n in moment.parameters:
            row[at] += [c.working for c in node.choices]
    for n in moment.ops:
        with_one = row.copy()
        with_one[first[n]:first[n] + len(instance.nodes[n].choices)] += [c.working for c in instance.nodes[n].choices]
        yield with_one
    if not moment.ops:
        yield row


@dataclass(frozen=True, slots=True)
class Solution:
    """`choices[n]` is the choice of node n; `bound` is a proven lower bound of the step's seconds."""

    status: str
    choices: tuple[int, ...]
    seconds: float
    nbytes: float
    bound: float
    solve_seconds: float

    @property
    def gap(self) -> float:
        """How far, as a fraction, the solution may be from the optimum."""
        return 0.0 if self.seconds <= self.bound else (self.seconds - self.bound) / self.seconds


@dataclass(frozen=True, slots=True)
class Priced:
    """What a choice for every node comes to, in seconds a step and bytes a device."""

    compute: float
    inline: float
    exposed: float
    optimizer: float
    nbytes: float

    @property
    def seconds(self) -> float:
        """Seconds a step."""
        return self.compute + self.inline + self.exposed + self.optimizer


@dataclass(frozen=True, slots=True)
class Sums:
    """The seconds of one phase of one segment."""

    work: float
    inline: float
    hidden: float

    @property
    def exposed(self) -> float:
        """What shows of the parameter communication."""
        return max(0.0, self.hidden - self.work - self.inline) + INTERFERENCE * self.hidden


def sums(instance: Instance, segment: Segment, phase: Phase, choices: tuple[int, ...]) -> Sums:
    """What a phase of `segment` consists of under `choices`."""
    work = sum(getattr(instance.nodes[n].choices[choices[n]], phase) for n in segment.nodes)
    inline = sum(_flow_seconds(f, choices, phase) for f in segment.flows if not f.parameter)
    return Sums(work, inline, sum(_flow_seconds(f, choices, phase) for f in segment.flows if f.parameter))


def price(instance: Instance, choices: tuple[int, ...]) -> Priced:
    """Evaluate the formulas of the module docstring for given choices; no solver involved."""
    compute = inline = exposed = 0.0
    for segment in instance.segments:
        for phase in PHASES:
            found = sums(instance, segment, phase, choices)
            compute += segment.count * found.work
            inline += segment.count * found.inline
            exposed += segment.count * found.exposed
    optimizer = sum(node.count * node.choices[c].optimizer for node, c in zip(instance.nodes, choices, strict=True))
    return Priced(compute, inline, exposed, optimizer, held_bytes(instance, choices))


def held_bytes(instance: Instance, choices: tuple[int, ...]) -> float:
    """The bytes a device holds at its fullest moment."""
    taken = [node.choices[c] for node, c in zip(instance.nodes, choices, strict=True)]
    held = sum(node.count * c.nbytes for node, c in zip(instance.nodes, taken, strict=True))
    return held + max((_moment_bytes(moment, taken) for moment in instance.moments), default=0.0)


def _moment_bytes(moment: Moment, taken: list[Choice]) -> float:
    kept = sum(moment.saved[n] * c.saved + moment.gradients[n] * c.gradient for n, c in enumerate(taken))
    running = max((taken[n].working for n in moment.ops), default=0.0)
    return kept + running + sum(taken[n].working for n in moment.parameters)


def _flow_seconds(flow: Flow, choices: tuple[int, ...], phase: str) -> float:
    source = flow.sources[choices[flow.producer]]
    targets = {consumer.targets[choices[consumer.node]] for consumer in flow.consumers}
    table = flow.forward if phase == "forward" else flow.backward
    return sum(table[source][target] for target in targets)
