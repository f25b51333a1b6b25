"""The numbers a sharding problem is made of; no model, no tensors, so that it can be solved by brute force too.

A `Node` is something to decide once (an op, a parameter, an input), standing for `count` equal ones. A
`Flow` is one value on its way into one segment: its producer emits it in a spec, each consumer wants one,
and every distinct (source, target) pair that occurs is paid once, whatever the number of consumers. A
`Segment` is the part of the step in which parameter communication can hide behind compute.

    step seconds = Σ_segments count · Σ_{phase ∈ forward, backward} max(compute + inline, parameter communication)
                 + Σ_nodes count · optimizer seconds
    bytes        = Σ_nodes count · bytes  ≤  budget
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to do one node: seconds of compute and of its optimizer step, bytes held on a device."""

    name: str
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    nbytes: float = 0.0


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
class Instance:
    """A sharding problem; `budget` in bytes a device."""

    nodes: tuple[Node, ...]
    segments: tuple[Segment, ...]
    budget: float = float("inf")


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


def price(instance: Instance, choices: tuple[int, ...]) -> Priced:
    """Evaluate the formulas of the module docstring for given choices; no solver involved."""
    compute = inline = exposed = 0.0
    for segment in instance.segments:
        for phase in ("forward", "backward"):
            work = sum(getattr(instance.nodes[n].choices[choices[n]], phase) for n in segment.nodes)
            blocking = sum(_flow_seconds(f, choices, phase) for f in segment.flows if not f.parameter)
            hidden = sum(_flow_seconds(f, choices, phase) for f in segment.flows if f.parameter)
            compute += segment.count * work
            inline += segment.count * blocking
            exposed += segment.count * max(0.0, hidden - work - blocking)
    taken = [(node.count, node.choices[c]) for node, c in zip(instance.nodes, choices, strict=True)]
    return Priced(compute, inline, exposed, sum(count * c.optimizer for count, c in taken),
                  sum(count * c.nbytes for count, c in taken))


def _flow_seconds(flow: Flow, choices: tuple[int, ...], phase: str) -> float:
    source = flow.sources[choices[flow.producer]]
    targets = {consumer.targets[choices[consumer.node]] for consumer in flow.consumers}
    table = flow.forward if phase == "forward" else flow.backward
    return sum(table[source][target] for target in targets)
