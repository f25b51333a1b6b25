"""From an annotated program to the numbers of a sharding problem, and from its solution to a decision."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh
from autopar.core.reshard import Cargo, Price, Primitive, cheapest_path
from autopar.core.sharding import Choice, Consumer, Flow, Instance, Node, Segment
from autopar.core.spec import Spec
from autopar.passes.costs import MASTER_BYTES, Optimizer, Work, work_of
from autopar.passes.decision import Context, Decision, cargo_of
from autopar.passes.layout import from_base, itemsize, local_bytes, local_shape, whole_bytes
from autopar.passes.modes import Mode
from autopar.passes.ops import Op, is_parameter
from autopar.passes.rules.table import shape, tensor_operands
from autopar.passes.segments import Segment as ProgramSegment
from autopar.passes.segments import plain_arguments
from autopar.passes.strategies import Assignment, Storage, assignments, storages

Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Setting:
    """Where and how a program is to run: mesh, cluster, optimizer, mode, bytes a device may hold.

    `pinned` fixes how parameters rest, by placeholder name, as an evaluation program must; `allowed` are the only
    assignments of some ops, by name.
    """

    mesh: Mesh
    cluster: Cluster
    mode: Mode
    optimizer: Optimizer
    budget: float = float("inf")
    pinned: dict[str, Storage] = field(default_factory=dict)
    allowed: dict[str, tuple[Assignment, ...]] = field(default_factory=dict)

    @cached_property
    def price(self) -> Price:
        """Seconds of a collective."""
        return self.cluster.pricer(self.mesh)


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


def op_work(context: Context, op: Op, assignment: Assignment, mesh: Mesh) -> Work:
    """The local work of `op` under `assignment`."""
    factored = context.segmented.factored
    read = [(o.node, from_base(context.wanted(op, o, assignment), factored.base(o.node)[1])) for o in op.operands]
    operands = [local_shape(factored, node, spec, mesh) for node, spec in read]
    if not op.has_rule:
        operands = [shape(node) for node in tensor_operands(op.main)]
    nbytes = sum(local_bytes(factored, node, spec, mesh) for node, spec in dict.fromkeys(read))
    results = [(r.node, context.emitted(op, r, assignment)) for r in op.results]
    nbytes += sum(local_bytes(factored, node, spec, mesh) for node, spec in results)
    main = local_shape(factored, *results[0], mesh) if results else ()
    return work_of(op.main, operands, main, nbytes, compute_dtype(op))


def compute_dtype(op: Op) -> torch.dtype:
    """The dtype `op` computes in: its result's."""
    value = op.main.meta["val"]
    return value.dtype if isinstance(value, torch.Tensor) else torch.float32


def parameter_seconds(storage: Storage, target: Spec, cargo: Cargo, setting: Setting,
                      reduce_scale: float = 1.0) -> tuple[float, float]:
    """Seconds forward and backward from how a parameter rests to `target`.

    Gathers and gradient sums of a segment travel together, so they are priced by bandwidth alone. A gathered
    parameter is gathered again in the backward. `reduce_scale` is gradient bytes over parameter bytes.
    """
    axes, trained = storage.gathered, cargo.differentiable
    start = storage.spec(len(target.dims), trained)
    nbytes = cargo.nbytes / setting.mesh.extent(start.axes)
    forward = _bandwidth(setting.price, "all_gather", axes, nbytes)
    again = 0.0 if storage.kept else forward
    backward = again + _bandwidth(setting.price, "reduce_scatter", axes, reduce_scale * nbytes) if trained else 0.0
    summed = replicated_axes(start, target)
    backward += _bandwidth(setting.price, "all_reduce", summed, reduce_scale * nbytes)
    path = cheapest_path(with_summed(start, summed), target, setting.mesh, cargo, setting.price)
    return forward + path.forward, backward + path.backward


def kept_bytes(context: Context, node: fx.Node, storage: Storage, mesh: Mesh) -> float:
    """Bytes of a parameter that is gathered once and kept until the backward, in the compute dtype."""
    if not storage.kept:
        return 0.0
    spec = storage.spec(context.rank(node), trained=False)
    return whole_bytes(context.segmented.factored, node) / mesh.extent(spec.axes)


def replicated_axes(start: Spec, target: Spec) -> tuple[int, ...]:
    """The axes on which a replicated parameter's gradients are partial and have to be summed."""
    return tuple(axis for axis in target.grad_partial if start.state(axis) == "R")


def with_summed(spec: Spec, axes: tuple[int, ...]) -> Spec:
    """`spec` on the far side of the sum of gradients over `axes`."""
    return Spec(spec.dims, spec.partial, tuple(sorted({*spec.grad_partial, *axes})))


def _bandwidth(price: Price, primitive: Primitive, axes: tuple[int, ...], nbytes: float) -> float:
    return price(primitive, axes, nbytes) - price(primitive, axes, 0.0) if axes else 0.0


def build(context: Context, setting: Setting) -> Problem:
    """The sharding problem of a program in a setting. Raises AutoparError when the mode can't apply."""
    return _Builder(context, setting).build()


class _Builder:
    """Collects nodes and flows; one object a problem."""

    def __init__(self, context: Context, setting: Setting) -> None:
        self.context, self.setting = context, setting
        self.factored = context.segmented.factored
        self.nodes: list[Node] = []
        self.assigned: dict[int, tuple[Assignment, ...]] = {}
        self.stored: dict[int, tuple[Storage, ...]] = {}
        self.ends: list[tuple[Ends, ...]] = []
        self.number: dict[Key, int] = {}
        self.segment_of = {i: s for s in context.segmented.segments for i in s.ops}
        self.counts = Counter(s.class_id for s in context.segmented.segments)
        self.users = context.parameters()
        self.home = self._homes()
        self.reduce_scale = 1.0 if context.segmented.factored.program.precision in ("fp32", "bf16") else 2.0

    def build(self) -> Problem:
        self._add_node(("output",), "output", [Choice("R")], 1)
        for segment in self.context.segmented.representatives.values():
            for place, index in enumerate(segment.ops):
                self._add_op(("op", segment.class_id, place), self.context.segmented.ops[index], segment)
        for node in self.users:
            self._add_parameter(node)
        segments = tuple(self._segment(group) for group in self._variants())
        instance = Instance(tuple(self.nodes), segments, self.setting.budget)
        ops = tuple(self._op_node(i) for i in range(len(self.context.segmented.ops)))
        parameters = {node: self.number[self.home[node]] for node in self.users}
        return Problem(self.context, self.setting, instance, ops, parameters, self.assigned, self.stored,
                       tuple(self.ends))

    def _add_node(self, key: Key, name: str, choices: list[Choice], count: int) -> int:
        assert choices, f"{name} has no choice"
        self.number[key] = len(self.nodes)
        self.nodes.append(Node(name, tuple(choices), count))
        return self.number[key]

    def _add_op(self, key: Key, op: Op, segment: ProgramSegment) -> None:
        through = any(r.node in self.context.gradients for r in op.results)
        options = self.setting.allowed.get(op.name) or tuple(
            assignments(op, self.setting.mesh, self.setting.mode, through))
        choices = [self._op_choice(op, a, through) for a in options]
        self.assigned[self._add_node(key, op.name, choices, self.counts[segment.class_id])] = options

    def _op_choice(self, op: Op, assignment: Assignment, through: bool) -> Choice:
        work = op_work(self.context, op, assignment, self.setting.mesh)
        device = self.setting.cluster.devices[0]
        saved = sum(local_bytes(self.factored, r.node, self.context.emitted(op, r, assignment), self.setting.mesh)
                    for r in op.results if r.node in self.context.gradients)
        return Choice(",".join(assignment), work.forward_seconds(device),
                      work.backward_seconds(device) if through else 0.0, 0.0, saved)

    def _homes(self) -> dict[fx.Node, Key]:
        """Parameters at one place of equal segments are decided together, shared ones alone."""
        first: dict[fx.Node, Key] = {}
        for segment in self.context.segmented.segments:
            for place, node in enumerate(segment.externals):
                if is_parameter(node, self.factored):
                    first.setdefault(node, ("parameter", segment.class_id, place))
        uses = Counter((s.class_id, n) for s in self.context.segmented.segments for n in s.externals)
        places = Counter(first.values())
        return {n: key if places[key] == self.counts[key[1]] and sum(uses[c, n] for c in self.counts) == 1  # type: ignore[index]
                else ("parameter", n.name) for n, key in first.items()}

    def _add_parameter(self, node: fx.Node) -> None:
        key = self.home[node]
        if key in self.number:
            return
        pinned = self.setting.pinned.get(node.name)
        options = (pinned,) if pinned else tuple(
            storages(self.factored, node, self.users[node], self.setting.mesh, self.setting.mode))
        choices = [self._storage_choice(node, storage) for storage in options]
        count = sum(other == key for other in self.home.values())
        name = self.factored.program.sources[node.name].name
        self.stored[self._add_node(key, name, choices, count)] = options

    def _storage_choice(self, node: fx.Node, storage: Storage) -> Choice:
        elements = whole_bytes(self.factored, node) / itemsize(node) / storage.resting_parts(self.setting.mesh)
        trained = node in self.context.gradients
        optimizer, device = self.setting.optimizer, self.setting.cluster.devices[0]
        seconds = elements * optimizer.step_bytes / device.memory_bytes_per_s if trained else 0.0
        held = MASTER_BYTES * (2 if trained else 1) + (optimizer.state_bytes if trained else 0.0)
        kept = kept_bytes(self.context, node, storage, self.setting.mesh)
        return Choice(str(storage), 0.0, 0.0, seconds, elements * held + kept)

    def _op_node(self, index: int) -> int:
        segment = self.segment_of[index]
        return self.number["op", segment.class_id, index - segment.first]

    def _variants(self) -> list[list[ProgramSegment]]:
        """Segments grouped by class and by who makes what they read."""
        groups: dict[Key, list[ProgramSegment]] = {}
        for segment in self.context.segmented.segments:
            groups.setdefault((segment.class_id, *map(self._origin, segment.externals)), []).append(segment)
        return list(groups.values())

    def _origin(self, node: fx.Node) -> object:
        if node in self.context.producer:
            return self._op_node(self.context.producer[node]), self._result_place(node)
        if node in self.factored.aliases:
            chain = []
            while node in self.factored.aliases:
                chain.append((str(node.target), plain_arguments(node)))
                node = self.factored.aliases[node].source
            return (self._origin(node), *chain)
        return self.number[self.home[node]] if node in self.home else "given"

    def _result_place(self, node: fx.Node) -> int:
        op = self.context.segmented.ops[self.context.producer[node]]
        return [r.node for r in op.results].index(node)

    def _segment(self, group: list[ProgramSegment]) -> Segment:
        segment = group[0]
        consumers: dict[fx.Node, list[Consumer]] = {}
        wanted: dict[fx.Node, dict[Spec, int]] = {}
        for place in segment.ops:
            op, number = self.context.segmented.ops[place], self._op_node(place)
            for operand in op.operands:
                port = segment.port(operand.node, self.factored)
                base, index = self.factored.base(port)
                if base not in self.context.producer and base not in self.users:
                    continue
                specs = wanted.setdefault(port, {})
                asked = [from_base(self.context.wanted(op, operand, a), index) for a in self.assigned[number]]
                targets = tuple(specs.setdefault(spec, len(specs)) for spec in asked)
                consumers.setdefault(port, []).append(Consumer(number, targets))
        for base in self._outputs(segment):
            specs = wanted.setdefault(base, {})
            whole = Spec(((),) * self.context.rank(base))
            target = specs.setdefault(whole, len(specs))
            consumers.setdefault(base, []).append(Consumer(self.number["output",], (target,)))
        made = [self._flow(port, found, list(wanted[port])) for port, found in consumers.items()]
        self.ends.append(tuple(ends for _, ends in made))
        flows = tuple(flow for flow, _ in made)
        return Segment(segment.name, len(group), tuple(self._op_node(i) for i in segment.ops), flows)

    def _outputs(self, segment: ProgramSegment) -> list[fx.Node]:
        made = {r.node for i in segment.ops for r in self.context.segmented.ops[i].results}
        bases = [self.factored.base(o)[0] for o in self.factored.program.outputs if isinstance(o, fx.Node)]
        return [base for base in dict.fromkeys(bases) if base in made]

    def _flow(self, port: fx.Node, consumers: list[Consumer], targets: list[Spec]) -> tuple[Flow, Ends]:
        cargo = cargo_of(self.context, port)
        base, index = self.factored.base(port)
        if base in self.users:
            number = self.number[self.home[base]]
            table = [[parameter_seconds(s, t, cargo, self.setting, self.reduce_scale) for t in targets]
                     for s in self.stored[number]]
            sources = tuple(range(len(table)))
            ends = Ends(port, self.stored[number], tuple(targets))
        else:
            number = self._op_node(self.context.producer[base])
            op = self.context.segmented.ops[self.context.producer[base]]
            result = op.results[self._result_place(base)]
            specs: dict[Spec, int] = {}
            made = [from_base(self.context.emitted(op, result, a), index) for a in self.assigned[number]]
            sources = tuple(specs.setdefault(spec, len(specs)) for spec in made)
            mesh, price = self.setting.mesh, self.setting.price
            paths = [[cheapest_path(s, t, mesh, cargo, price) for t in targets] for s in specs]
            table = [[(path.forward, path.backward) for path in row] for row in paths]
            ends = Ends(port, tuple(specs), tuple(targets))
        forward = tuple(tuple(f for f, _ in row) for row in table)
        backward = tuple(tuple(b for _, b in row) for row in table)
        return Flow(port.name, number, sources, tuple(consumers), forward, backward, base in self.users), ends


def check_batch(context: Context, setting: Setting) -> None:
    """Raises AutoparError when the mode shards the batch and the batch does not divide."""
    program = context.segmented.factored.program
    tensors = [n.meta["val"] for n in program.placeholders("input") if isinstance(n.meta.get("val"), torch.Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    always = tuple(a for a, axis in enumerate(setting.mode.on(setting.mesh.shape)) if axis.batch_always)
    parts = setting.mesh.extent(always)
    if batch % parts:
        raise AutoparError(f"the batch of {batch} does not divide over {parts} devices, as mode {setting.mode.name} "
                           f"needs; use a batch of {-(-batch // parts) * parts} or another mode")
