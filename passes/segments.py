"""Cut the program into segments, and find which are structurally equal.

A segment is a run of ops of one block (`h.0`, `layer1.2`), or a stretch between two. Equal segments form a
class: their ops correspond position by position, so a class is decided, lowered and compiled once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.core.errors import CaptureError
from autopar.passes.capture import Program
from autopar.passes.factors import Factored, analyse
from autopar.passes.functional import value_of
from autopar.passes.modes import Role
from autopar.passes.ops import Op, block_of, factor_roles, make_ops, unique
from autopar.passes.rules.nodes import named
from autopar.passes.strategies import differentiable

aten = torch.ops.aten


REPLAYED = {aten.dropout.default, aten.rand.default, aten.scaled_dot_product_attention.default}
"""Random ops that have a substitute which draws by global element."""
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
"""Ops that are random only where they drop out between their layers."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Ops `first` to `last` - 1 of the program; `externals` are the values it reads from outside, in order of use.

    A renaming made outside of the segment is an external itself, not the value it renames.
    """

    name: str
    first: int
    last: int
    externals: tuple[fx.Node, ...]
    class_id: int

    @property
    def ops(self) -> range:
        """The indices of its ops."""
        return range(self.first, self.last)

    def port(self, node: fx.Node, factored: Factored) -> fx.Node:
        """Where `node` comes into the segment, or the value made in it that `node` renames."""
        while node not in self.externals and node in factored.aliases:
            node = factored.aliases[node].source
        return node


@dataclass(frozen=True, slots=True, eq=False)
class Segmented:
    """A factored program as ops in segments; the first segment of each class represents it."""

    factored: Factored
    ops: tuple[Op, ...]
    segments: tuple[Segment, ...]

    @property
    def representatives(self) -> dict[int, Segment]:
        """The first segment of each class."""
        found: dict[int, Segment] = {}
        for segment in self.segments:
            found.setdefault(segment.class_id, segment)
        return found

    def class_name(self, class_id: int) -> str:
        """The name of the first segment of a class."""
        return self.representatives[class_id].name

    def producer(self) -> dict[fx.Node, int]:
        """Which op makes each result."""
        return {result.node: i for i, op in enumerate(self.ops) for result in op.results}


def segment_program(factored: Factored) -> Segmented:
    """Make ops, cut them into segments and number the classes of equal ones."""
    ops, gradients, roles = make_ops(factored), differentiable(factored), factor_roles(factored)
    runs = [list(run) for _, run in itertools.groupby(range(len(ops)), key=lambda i: ops[i].block)]
    numbers: dict[Any, int] = {}
    segments: list[Segment] = []
    names = unique([ops[run[0]].block.replace(".", "_") or f"between_{i}" for i, run in enumerate(runs)])
    for name, run in zip(names, runs, strict=True):
        externals, signature = _signature([ops[i] for i in run], factored, gradients, roles)
        class_id = numbers.setdefault(signature, len(numbers))
        segments.append(Segment(name, run[0], run[-1] + 1, externals, class_id))
    return Segmented(factored, ops, tuple(segments))


def _signature(ops: list[Op], factored: Factored, gradients: frozenset[fx.Node],
               roles: dict[int, Role]) -> tuple[tuple[fx.Node, ...], Any]:
    """The values read from outside and a hashable description that equal segments share."""
    place: dict[fx.Node, Any] = {n: ("op", i, j) for i, op in enumerate(ops) for j, n in enumerate(op.nodes)}
    externals: dict[fx.Node, int] = {}

    def outside(node: fx.Node) -> bool:
        base = factored.base(node)[0]
        return base not in place and base.op == "call_function" and block_of(node) != ops[0].block

    def refer(node: fx.Node) -> Any:
        if node in place:
            return place[node]
        if node in factored.aliases and not outside(node):
            return ("alias", str(node.target), plain_arguments(node), refer(factored.aliases[node].source))
        if node.op == "call_function" and value_of(node) is None:
            return ("list", str(node.target), plain_arguments(node))
        number = externals.setdefault(node, len(externals))
        value = value_of(node)
        assert value is not None
        kind = factored.program.sources[node.name].kind if node.op == "placeholder" else "value"
        dims = tuple(tuple((factored.sizes[f], roles.get(f)) for f in dim) for dim in factored.dims[node])
        return ("external", number, kind, dims, str(value.dtype), tuple(value.shape), node in gradients)

    described: list[Any] = []
    for op in ops:
        for node in op.nodes:
            described.append((str(node.target), plain_arguments(node), tuple(refer(n) for n in node.all_input_nodes)))
        described.append((op.factors, tuple((refer(o.node), o.keys, o.additive) for o in op.operands),
                          tuple((refer(r.node), r.keys) for r in op.results)))
    return tuple(externals), tuple(described)


def plain_arguments(node: fx.Node) -> str:
    """The arguments of a node with its tensors' names left out."""
    return str(fx.map_arg((node.args, dict(node.kwargs)), lambda _: "tensor"))


def _drops_out(node: fx.Node) -> bool:
    return bool(named(node, "train") and named(node, "dropout") and named(node, "num_layers") > 1)


def annotate(program: Program) -> Segmented:
    """Factors, ops and segments of a captured program. Raises CaptureError for random ops that can't be replayed."""
    for node in program.graph.nodes:
        tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else []
        if node.target in RECURRENT and _drops_out(node):
            raise CaptureError(f"{node.meta.get('path') or 'the forward'} is a recurrent layer that drops out "
                               f"{named(node, 'dropout')} of what its own layers pass on, with random numbers that "
                               "would differ between ranks; give it dropout=0, or use one such layer after another "
                               "with nn.Dropout between them")
        if torch.Tag.nondeterministic_seeded in tags and node.target not in REPLAYED | RECURRENT:
            raise CaptureError(f"{node.meta.get('path') or 'the forward'} calls {node.target}, whose random numbers "
                               "would differ between ranks; draw them with torch.rand or dropout")
    return segment_program(analyse(program))
