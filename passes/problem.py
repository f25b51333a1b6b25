"""From an annotated program to the numbers of a sharding problem, and from its solution to a decision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import fx

from autopar.core.cluster import Cluster
from autopar.core.collectives import inner_pricer
from autopar.core.device import Device
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.core.observed import Factors
from autopar.core.reshard import Cargo, Price, routes
from autopar.core.routes import Seconds
from autopar.core.sharding import Choice, Consumer, Flow, Instance, Node, Segment
from autopar.core.spec import Spec, State, from_states
from autopar.core.steps import States
from autopar.passes.choices import op_choices, scaled, storage_choices
from autopar.passes.costs import Optimizer, slowest
from autopar.passes.decision import Context, Decision
from autopar.passes.exchanges import with_exchanges
from autopar.passes.gathering import Together, Travel, latency_share, parameter_seconds
from autopar.passes.modes import Mode
from autopar.passes.moments import moments
from autopar.passes.ops import Op
from autopar.passes.outline import OUTPUT, Arrival, Key, Outline, Run, outline
from autopar.passes.strategies import Assignment, Storage, assignments, storages

Table = tuple[tuple[float, ...], ...]
Tables = tuple[Table, Table]
"""Seconds forward and backward."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Where and how a program is to run: mesh, cluster, optimizer, mode, bytes a device may hold.

    `pinned` fixes how parameters rest, by placeholder name, as an evaluation program must; `allowed` are the only
    assignments of some ops, by name; `factors` are what was measured of classes of segments. The mesh is that of one of
    `stages`, whose devices, stage by stage, are `layout`; the program is one of `micro_batches`. `budgets` are by
    device where they differ.
    """

    mesh: Mesh
    cluster: Cluster
    mode: Mode
    optimizer: Optimizer
    budget: float = float("inf")
    pinned: dict[str, Storage] = field(default_factory=dict)
    allowed: dict[str, tuple[Assignment, ...]] = field(default_factory=dict)
    factors: Factors = field(default_factory=dict)
    stages: int = 1
    micro_batches: int = 1
    layout: tuple[int, ...] = ()
    budgets: tuple[float, ...] = ()

    @cached_property
    def price(self) -> Price:
        """Seconds of a collective; of stages, of all of them at once."""
        if self.stages == 1:
            return self.cluster.pricer(self.mesh)
        return inner_pricer(self.cluster.pricer(Mesh((self.stages, *self.mesh.shape), self.layout)))

    def budget_of(self, devices: tuple[int, ...]) -> float:
        """Bytes that each of some devices may hold: all as many, or by what they have."""
        return min(self.budgets[d] for d in devices) if self.budgets else self.budget

    @cached_property
    def device(self) -> Device:
        """What ops are priced on: a plan is as slow as its slowest device."""
        return slowest(self.cluster.devices)


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """The value that a flow brings, and what the numbers of its source and target specs stand for."""

    value: fx.Node
    sources: tuple[Spec, ...] | tuple[Storage, ...]
    targets: tuple[Spec, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """A sharding instance; `assigned[n]` or `stored[n]` are what the choices of node n stand for.

    `ends[g][f]` are those of flow f of segment g.
    """

    context: Context
    setting: Setting
    instance: Instance
    op_nodes: tuple[int, ...]
    parameter_nodes: dict[fx.Node, int]
    assigned: dict[int, tuple[Assignment, ...]]
    stored: dict[int, tuple[Storage, ...]]
    ends: tuple[tuple[Ends, ...], ...]

    def decide(self, choices: tuple[int, ...]) -> Decision:
        """What a choice for every node means for the program."""
        ops = tuple(self.assigned[n][choices[n]] for n in self.op_nodes)
        stored = {node: self.stored[n][choices[n]] for node, n in self.parameter_nodes.items()}
        return Decision(self.context, self.setting.mesh, ops, stored)


def build(context: Context, setting: Setting) -> Problem:
    """The sharding problem of a program in a setting. Raises AutoparError when the mode can't apply."""
    return _Builder(context, setting, outline(context)).build()


@dataclass(frozen=True, eq=False)
class _Builder:
    """Collects the numbers of one problem; `number[key]` is the node that decides what `key` names."""

    context: Context
    setting: Setting
    outline: Outline
    nodes: list[Node] = field(default_factory=list)
    number: dict[Key, int] = field(default_factory=dict)
    assigned: dict[Key, tuple[Assignment, ...]] = field(default_factory=dict)
    stored: dict[Key, tuple[Storage, ...]] = field(default_factory=dict)
    tables: dict[Key, Tables] = field(default_factory=dict)
    travels: dict[Key, Travel] = field(default_factory=dict)

    def build(self) -> Problem:
        """Ops and parameters first, then what flows between them."""
        self.assigned[OUTPUT] = (("R",) * len(self.setting.mesh.shape),)
        self._add_node(OUTPUT, "output", [Choice("R")], 1)
        for key, (op, count) in self.outline.ops.items():
            self._add_op(key, op, count)
        for key, (node, count) in self.outline.parameters.items():
            self._add_parameter(key, node, count)
        made = [[flow for arrival in run.arrivals for flow in self._flows(arrival, self._together(run))]
                for run in self.outline.runs]
        segments = tuple(Segment(run.name, run.count, tuple(self.number[key] for key in run.ops),
                                 tuple(flow for flow, _ in flows))
                         for run, flows in zip(self.outline.runs, made, strict=True))
        instance = Instance(tuple(self.nodes), segments, self.setting.budget,
                            moments(self.context, self.outline, self.number))
        return Problem(
            self.context, self.setting, instance,
            tuple(self.number[key] for key in self.outline.op_keys),
            {node: self.number[self.outline.homes[node]] for node in self.outline.users},
            {self.number[key]: options for key, options in self.assigned.items() if key != OUTPUT},
            {self.number[key]: options for key, options in self.stored.items()},
            tuple(tuple(ends for _, ends in flows) for flows in made))

    def _add_node(self, key: Key, name: str, choices: list[Choice], count: int) -> None:
        assert choices, f"{name} has no choice"
        self.number[key] = len(self.nodes)
        self.nodes.append(Node(name, tuple(choices), count))

    def _add_op(self, key: Key, op: Op, count: int) -> None:
        mesh = self.setting.mesh
        options = self.setting.allowed.get(op.name) or tuple(
            assignments(op, mesh, self.setting.mode, self.context.through(op)))
        self.assigned[key] = options
        choices = scaled(op_choices(self.context, op, options, mesh, self.setting.device), self._factor(key))
        self._add_node(key, op.name, with_exchanges(op, choices, options, mesh, self.setting.price), count)

    def _factor(self, key: Key) -> tuple[float, float]:
        """What the seconds of an op, by its key, are to be multiplied by."""
        _, class_id, _ = key
        assert isinstance(class_id, int)
        return self.setting.factors.get(self.context.segmented.class_name(class_id), (1.0, 1.0))

    def _add_parameter(self, key: Key, node: fx.Node, count: int) -> None:
        factored, mesh = self.context.segmented.factored, self.setting.mesh
        pinned = self.setting.pinned.get(node.name)
        options = (pinned,) if pinned else tuple(
            storages(factored, node, self.outline.users[node], mesh, self.setting.mode))
        self.stored[key] = options
        choices = storage_choices(self.context, node, options, mesh, self.setting.optimizer, self.setting.device)
        self._add_node(key, factored.program.sources[node.name].name, choices, count)

    def _flows(self, arrival: Arrival, together: Together) -> Iterator[tuple[Flow, Ends]]:
        """A value that ops make is one flow, a parameter one of what may hide behind compute and one of what may not.

        Of several who read it what may hide is more: what they share is done once.
        """
        specs: dict[States, int] = {}
        consumers = tuple(Consumer(self.number[reader.key], self._numbered(reader.key, reader.states, specs))
                          for reader in arrival.readers)
        targets, rank = tuple(specs), len(arrival.cargo.sizes)
        wanted = tuple(from_states(states, rank) for states in targets)
        name, producer = arrival.value.name, self.number[arrival.producer]
        if arrival.states is None:
            stored = self.stored[arrival.producer]
            sources, ends = tuple(range(len(stored))), Ends(arrival.value, stored, wanted)
            travel = self._travel(stored, targets, arrival.cargo, together)
            hidden = Flow(name, producer, sources, consumers, *_tables(*travel.hidden), True)
            yield from _shared(hidden, ends, travel) if len(consumers) > 1 else [(hidden, ends)]
            yield Flow(name, producer, sources, consumers, *_tables(*travel.inline)), ends
        else:
            made: dict[States, int] = {}
            sources = self._numbered(arrival.producer, arrival.states, made)
            ends = Ends(arrival.value, tuple(from_states(states, rank) for states in made), wanted)
            table = self._value_table(tuple(made), targets, arrival.cargo)
            yield Flow(name, producer, sources, consumers, *table), ends

    def _numbered(self, key: Key, states: dict[str, State], specs: dict[States, int]) -> tuple[int, ...]:
        """The number of the spec that each assignment of an op leads to; new ones are added to `specs`."""
        found = (tuple(map(states.__getitem__, assignment)) for assignment in self.assigned[key])
        return tuple(specs.setdefault(spec, len(specs)) for spec in found)

    def _value_table(self, sources: tuple[States, ...], targets: tuple[States, ...],
                     cargo: Cargo) -> Tables:
        if (sources, targets, cargo) not in self.tables:
            ways = routes(len(cargo.sizes), self.setting.mesh, cargo, self.setting.price)
            self.tables[sources, targets, cargo] = _tables(*ways.seconds(sources, targets))
        return self.tables[sources, targets, cargo]

    def _together(self, run: Run) -> Together:
        plain = self.context.segmented.factored.program.precision in ("fp32", "bf16")
        return Together(1.0 if plain else 2.0, latency_share(run.parameters), self.setting.micro_batches)

    def _travel(self, stored: tuple[Storage, ...], targets: tuple[States, ...], cargo: Cargo,
                together: Together) -> Travel:
        key = (stored, targets, cargo, together)
        if key not in self.travels:
            mesh, price = self.setting.mesh, self.setting.price
            self.travels[key] = parameter_seconds(stored, targets, cargo, mesh, price, together)
        return self.travels[key]


def _shared(hidden: Flow, ends: Ends, travel: Travel) -> Iterator[tuple[Flow, Ends]]:
    """What all consumers of a parameter share, as a flow to the first, and for the storages that are alike in which
    axes are summed over for whom, what those share that want the same."""
    first = hidden.consumers[0]
    forward, backward = _tables(*travel.gathers)
    once = (Consumer(first.node, (0,) * len(first.targets)),)
    yield replace(hidden, consumers=once, forward=forward, backward=backward), replace(ends, targets=ends.targets[:1])
    for summed in dict.fromkeys(travel.summed):
        number = {axes: j for j, axes in enumerate(dict.fromkeys(summed))}
        places = [summed.index(axes) for axes in number]
        alike = np.array([[each == summed] for each in travel.summed])
        consumers = tuple(Consumer(each.node, tuple(number[summed[t]] for t in each.targets))
                          for each in hidden.consumers)
        forward, backward = _tables(*(np.where(alike, side[:, places], 0.0) for side in travel.sums))
        if any(map(any, backward)):
            yield (replace(hidden, consumers=consumers, forward=forward, backward=backward),
                   replace(ends, targets=tuple(ends.targets[place] for place in places)))


def _tables(forward: Seconds, backward: Seconds) -> Tables:
    return tuple(map(tuple, forward.tolist())), tuple(map(tuple, backward.tolist()))


def batch_of(context: Context) -> int:
    """The samples of a program's batch: the first dim of its first input."""
    program = context.segmented.factored.program
    tensors = [n.meta["val"] for n in program.placeholders("input") if isinstance(n.meta.get("val"), torch.Tensor)]
    return int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 1


def check_batch(context: Context, setting: Setting) -> None:
    """Raises AutoparError when the mode shards the batch and the batch does not divide."""
    batch = batch_of(context)
    always = tuple(a for a, axis in enumerate(setting.mode.on(setting.mesh.shape)) if axis.batch_always)
    parts = setting.mesh.extent(always)
    if batch % parts:
        raise AutoparError(f"the batch of {batch} does not divide over {parts} devices, as mode {setting.mode.name} "
                           f"needs; use a batch of {-(-batch // parts) * parts} or another mode")
