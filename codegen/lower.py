"""Rewrite a segment for one device: local shapes, reshards where specs change, substitutes for special ops.

Values that rename others are made again from their base under each spec that is wanted, so a reshard happens
once a (value, target spec) and the renamings after it are free.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from autopar.codegen.collectives import ReduceGradients, Reshard
from autopar.codegen.communicator import Axes, Communicator
from autopar.codegen.draws import Samples
from autopar.codegen.site import Draws, Site
from autopar.codegen.substitute import substitute
from autopar.core.reshard import Price, cheapest_path
from autopar.core.spec import Spec
from autopar.passes.capture import COMPUTE_DTYPE
from autopar.passes.decision import Decision, cargo_of
from autopar.passes.factors import PERMUTED, SPLITS
from autopar.passes.functional import value_of
from autopar.passes.gathering import replicated_axes, with_summed
from autopar.passes.layout import from_base, local_factors, local_shape
from autopar.passes.ops import Op, OpOperand
from autopar.passes.segments import Segment

aten = torch.ops.aten
Sums = Literal["inside", "outside"]


@dataclass(frozen=True, eq=False)
class Lowered:
    """One segment on one device: `module` maps its externals and a seed to the values `exports`, in order.

    `host_seeded` ones take a seed in host memory besides, last. `sums` are for each external the axes over which its
    gradient is still to be summed.
    """

    segment: Segment
    module: fx.GraphModule
    exports: tuple[fx.Node, ...]
    host_seeded: bool = False
    sums: tuple[Axes, ...] = ()


@dataclass(frozen=True, eq=False)
class Target:
    """For what is lowered: the decision, this rank's groups, the price that chose the paths, the device, how attention
    draws its dropout, who sums the gradients of replicated parameters: the segment, or whoever runs it; and which
    samples of a batch a micro-batch's program has."""

    decision: Decision
    communicator: Communicator
    price: Price
    device: torch.device
    inputs: dict[fx.Node, Spec] = field(default_factory=dict)
    draws: Draws = "by element"
    sums: Sums = "inside"
    samples: Samples | None = None


def lower(segment: Segment, exports: tuple[fx.Node, ...], target: Target) -> Lowered:
    """The local program of `segment`; `exports` are the op results that others need."""
    return _Lowering(segment, target).run(exports)


class _Lowering:
    def __init__(self, segment: Segment, target: Target) -> None:
        self.segment, self.target = segment, target
        self.decision = target.decision
        self.context = self.decision.context
        self.factored = self.context.segmented.factored
        self.mesh = self.decision.mesh
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.sources: dict[fx.Node, Spec] = {}
        self.made: dict[tuple[fx.Node, Spec | None], fx.Node] = {}
        self.outside: dict[fx.Node, Axes] = {}
        ops = (self.context.segmented.ops[index] for index in segment.ops)
        self.place = {node: i for i, node in enumerate(node for op in ops for node in op.nodes)}

    def run(self, exports: tuple[fx.Node, ...]) -> Lowered:
        for node in self.segment.externals:
            placeholder = self.graph.placeholder(node.name)
            self.sources[node] = self._external_spec(node)
            self.made[node, self._base_spec(node)] = placeholder
        self.seeds = {"seed": self.graph.placeholder("seed"), "host_seed": self.graph.placeholder("host_seed")}
        self._receive_parameters()
        for index in self.segment.ops:
            self._lower_op(self.context.segmented.ops[index], index)
        outputs = tuple(self._output(node) for node in exports)
        self.graph.output(outputs)
        for (node, spec), made in self.made.items():
            made.meta.setdefault("lies", (node, spec))
        self.graph.eliminate_dead_code(_has_effect)
        host_seeded = bool(self.seeds["host_seed"].users)
        if not host_seeded:
            self.graph.erase_node(self.seeds["host_seed"])
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, self.segment.name)
        sums = tuple(self.outside.get(node, ()) for node in self.segment.externals)
        return Lowered(self.segment, module, exports, host_seeded, sums)

    def _external_spec(self, node: fx.Node) -> Spec:
        if node in self.decision.storage:
            return self.decision.storage[node].spec(self.context.rank(node), node in self.context.gradients)
        arrived = self.decision.arrival(node)
        return arrived if arrived is not None else self.target.inputs.get(node, Spec(((),) * self.context.rank(node)))

    def _output(self, node: fx.Node) -> fx.Node:
        """A value as its op makes it; those outputs of the program whole that are wanted so."""
        if any(self.factored.base(o)[0] is node for o in self.factored.program.whole_outputs()):
            return self._value(node, Spec(((),) * self.context.rank(node)))
        return self._value(node, self.decision.sources[self.factored.base(node)[0]])

    def _base_spec(self, node: fx.Node) -> Spec:
        """The spec of the value behind an external when the external arrives."""
        base, _ = self.factored.base(node)
        return self.decision.sources.get(base, self.sources[node])

    # Parameters

    def _receive_parameters(self) -> None:
        """Sum gradients of replicated parameters in one bucket a set of axes, then cast to the compute dtype.

        Sums that are left to whoever runs the segment are over the same axes for all uses of a parameter here.
        """
        buckets: dict[tuple[int, ...], list[tuple[fx.Node, Spec]]] = {}
        wanted: dict[fx.Node, dict[Spec, None]] = {}
        for index in self.segment.ops:
            op = self.context.segmented.ops[index]
            for operand in op.operands:
                base = self.factored.base(operand.node)[0]
                if base in self.decision.storage:
                    spec = self.context.wanted(op, operand, self.decision.assignments[index])
                    wanted.setdefault(base, {})[spec] = None
        for node, specs in wanted.items():
            start = self.sources[node]
            summed = {replicated_axes(start, spec) for spec in specs}
            if self.target.sums == "outside" and len(summed) == 1:
                (self.outside[node],) = summed
            for axes in (replicated_axes(start, spec) for spec in specs):
                bucket = buckets.setdefault(() if node in self.outside else axes, [])
                if (node, with_summed(start, axes)) not in bucket:
                    bucket.append((node, with_summed(start, axes)))
        arrived = {node: self.made[node, self.sources[node]] for node in wanted}
        for axes, members in buckets.items():
            self._receive_bucket(axes, members, [arrived[node] for node, _ in members])

    def _receive_bucket(self, axes: tuple[int, ...], members: list[tuple[fx.Node, Spec]], raw: list[fx.Node]) -> None:
        if axes:
            summed = self._call(ReduceGradients(axes, self.target.communicator), f"reduce_gradients_{_digits(axes)}",
                                (tuple(raw),))
            raw = [self.graph.call_function(operator.getitem, (summed, i)) for i in range(len(raw))]
        for (node, spec), placeholder in zip(members, raw, strict=True):
            value = value_of(node)
            assert value is not None
            shape = local_shape(self.factored, node, spec, self.mesh)
            cast = placeholder
            if value.dtype == COMPUTE_DTYPE[self.factored.program.precision]:
                cast = self.graph.call_function(aten.to.dtype, (placeholder, value.dtype))
            self.made[node, spec] = self.graph.call_function(aten.reshape.default, (cast, list(shape)))

    # Values

    def _value(self, node: fx.Node, wanted: Spec) -> fx.Node:
        """`node` when its base has the spec `wanted`."""
        if (node, wanted) not in self.made:
            inside = node in self.factored.aliases and node not in self.segment.externals
            self.made[node, wanted] = self._rename(node, wanted) if inside else self._reshard(node, wanted)
        return self.made[node, wanted]

    def _reshard(self, port: fx.Node, wanted: Spec) -> fx.Node:
        """An external or a value made here, when its base has the spec `wanted`."""
        source, target = self.sources[port], from_base(wanted, self.factored.base(port)[1])
        arrived = self._base_spec(port)
        if port in self.decision.storage:
            arrived = source = with_summed(source, replicated_axes(source, wanted))
        cargo = cargo_of(self.context, port)
        path = cheapest_path(source, target, self.mesh, cargo, self.target.price)
        assert math.isfinite(path.seconds), f"no way from {source} to {target} for {port}"
        if not path.steps:
            return self.made[port, arrived]
        value = value_of(port)
        assert value is not None
        module = Reshard(path.steps, local_factors(self.factored, port, source, self.mesh),
                         local_shape(self.factored, port, target, self.mesh), value.dtype, self.target.communicator)
        made = self._call(module, f"reshard_{port.name}", (self.made[port, arrived],))
        made.meta["reshard"] = (port in self.decision.storage, cargo.differentiable)
        return made

    def _rename(self, node: fx.Node, wanted: Spec) -> fx.Node:
        """Make a view, transpose or part again on local shapes; `wanted` is the base's spec."""
        source = self._value(self.factored.aliases[node].source, wanted)
        _, index = self.factored.base(node)
        if node.target is operator.getitem:
            return self.graph.call_function(operator.getitem, (self._split(node, source, wanted), node.args[1]))
        if node.target in PERMUTED or node.target in (aten.contiguous.default, aten.detach.default):
            return self.graph.call_function(node.target, (source, *node.args[1:]), dict(node.kwargs))
        shape = local_shape(self.factored, node, from_base(wanted, index), self.mesh)
        return self.graph.call_function(aten.reshape.default, (source, list(shape)))

    def _split(self, node: fx.Node, source: fx.Node, wanted: Spec) -> fx.Node:
        """The split that `node` is a part of, in parts as long as they are here."""
        split = node.args[0]
        assert isinstance(split, fx.Node) and split.target in SPLITS
        if (split, wanted) not in self.made:
            dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
            _, index = self.factored.base(node)
            part = local_shape(self.factored, node, from_base(wanted, index), self.mesh)
            args = (source, part[dim], dim)  # type: ignore[index]
            self.made[split, wanted] = self.graph.call_function(aten.split.Tensor, args)
        return self.made[split, wanted]

    # Ops

    def _lower_op(self, op: Op, index: int) -> None:
        assignment = self.decision.assignments[index]
        inside: dict[fx.Node, fx.Node] = {}
        for node in op.nodes:
            seen: dict[fx.Node, int] = {}

            def argument(n: fx.Node, seen: dict[fx.Node, int] = seen) -> fx.Node:
                if n in inside:
                    return inside[n]
                places = [o for o in op.operands if o.node is n]
                if not places:
                    return self._value(n, Spec(((),) * self.context.rank(n)))
                operand = places[min(seen.get(n, 0), len(places) - 1)]
                seen[n] = seen.get(n, 0) + 1
                return self._value(n, self.context.wanted(op, operand, assignment))

            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
            inside[node] = self._emit(node, args, kwargs, op, index)
        for result in op.results:
            self.sources[result.node] = self.decision.sources[result.node]
            self.made[result.node, self.sources[result.node]] = inside[result.node]

    def _emit(self, node: fx.Node, args: Any, kwargs: Any, op: Op, index: int) -> fx.Node:
        spec = self._spec_of(node, op, index)
        site = Site(node, op, self.decision.assignments[index], spec, self.factored, self.target.communicator,
                    self.target.draws, self.target.samples)
        module = substitute(site, self.place[node])
        if module is not None:
            kwargs = {**kwargs, **{name: seed for name, seed in self.seeds.items() if hasattr(module, f"takes_{name}")}}
            emitted = self._call(module, op.name, args, kwargs)
        else:
            args, kwargs = self._localize(node, args, kwargs, spec)
            emitted = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        emitted.meta["op"], emitted.meta["origin"] = index, node
        emitted.meta["part"] = next((k for k, result in enumerate(op.results) if result.node is node), None)
        return emitted

    def _spec_of(self, node: fx.Node, op: Op, index: int) -> Spec:
        """The spec of a value inside an op."""
        if node not in op.keys:
            return Spec(((),) * (self.context.rank(node) if value_of(node) is not None else 0))
        return self.context.emitted(op, OpOperand(node, op.keys[node]), self.decision.assignments[index])

    def _localize(self, node: fx.Node, args: Any, kwargs: Any, spec: Spec) -> tuple[Any, Any]:
        """Shapes and devices among the arguments as they are on this rank."""
        if node.target is aten.expand.default:
            args = (args[0], list(local_shape(self.factored, node, spec, self.mesh)))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.target.device}
        return args, kwargs

    def _call(self, module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        unique = name
        while hasattr(self.root, unique):
            stem, _, number = unique.rpartition("__")
            unique = f"{stem or unique}__{int(number) + 1 if stem else 1}"
        self.root.add_module(unique, module)
        return self.graph.call_module(unique, args, kwargs or {})


def _digits(axes: tuple[int, ...]) -> str:
    return "".join(map(str, axes))


def _has_effect(node: fx.Node) -> bool:
    """Whether `node` must stay though nothing reads it: it writes to a buffer."""
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
