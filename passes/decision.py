"""What has been decided for a program: an assignment for every op, a storage for every parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from autopar.core.mesh import Mesh
from autopar.core.reshard import Cargo
from autopar.core.spec import Spec, State
from autopar.passes.layout import based, carried, from_base, to_base, whole_bytes
from autopar.passes.ops import Op, OpOperand, is_parameter
from autopar.passes.segments import Segmented
from autopar.passes.strategies import (
    Assignment,
    Storage,
    differentiable,
    operand_spec,
    operand_states,
    result_spec,
    result_states,
)


@dataclass(frozen=True, eq=False)
class Context:
    """A segmented program with what every later step asks of it."""

    segmented: Segmented
    gradients: frozenset[fx.Node]
    producer: dict[fx.Node, int]

    def rank(self, node: fx.Node) -> int:
        """The number of flat factors of `node`."""
        return len(self.segmented.factored.flat(node))

    def through(self, op: Op) -> bool:
        """Whether a gradient flows through `op`."""
        return any(result.node in self.gradients for result in op.results)

    def wanted(self, op: Op, operand: OpOperand, assignment: Assignment) -> Spec:
        """The spec in which `op` wants the value that `operand` renames."""
        base, index = self.segmented.factored.base(operand.node)
        spec = operand_spec(op, operand, assignment, operand.node in self.gradients, self.rank(operand.node))
        return to_base(spec, index, self.rank(base))

    def emitted(self, op: Op, result: OpOperand, assignment: Assignment) -> Spec:
        """The spec in which `op` makes `result`."""
        return result_spec(op, result, assignment, result.node in self.gradients, self.rank(result.node))

    def wanted_states(self, op: Op, operand: OpOperand, place: tuple[int, ...]) -> dict[str, State]:
        """What an axis must do to the renaming of the operand's base whose flat factor i is the base's `place[i]`, by
        what the axis is assigned."""
        _, index = self.segmented.factored.base(operand.node)
        onward = {i: place.index(at) for i, at in enumerate(index) if at in place}
        return carried(operand_states(op, operand, operand.node in self.gradients), onward)

    def emitted_states(self, op: Op, result: OpOperand, place: tuple[int, ...]) -> dict[str, State]:
        """What an axis does to such a renaming of `result`, by what the axis is assigned."""
        onward = {at: i for i, at in enumerate(place)}
        return carried(result_states(op, result, result.node in self.gradients), onward)

    def parameters(self) -> dict[fx.Node, list[tuple[Op, OpOperand]]]:
        """Every parameter that is used, with its users; operands are on the parameter itself."""
        factored = self.segmented.factored
        users: dict[fx.Node, list[tuple[Op, OpOperand]]] = {}
        for op in self.segmented.ops:
            for operand in (based(factored, operand) for operand in op.operands):
                if is_parameter(operand.node, factored):
                    users.setdefault(operand.node, []).append((op, operand))
        return users


def context(segmented: Segmented) -> Context:
    """The context of a segmented program."""
    return Context(segmented, differentiable(segmented.factored), segmented.producer())


def cargo_of(ctx: Context, node: fx.Node) -> Cargo:
    """What resharding `node` moves."""
    factored = ctx.segmented.factored
    return Cargo(whole_bytes(factored, node), node in ctx.gradients, factored.refined(node))


@dataclass(frozen=True, eq=False)
class Decision:
    """`assignments[i]` for op i, `storage[n]` for parameter placeholder n.

    `kept[s]` is what segment s keeps for its backward, by the names of `codegen.marks`; of segments that are not in
    it, whoever runs them decides.
    """

    context: Context
    mesh: Mesh
    assignments: tuple[Assignment, ...]
    storage: dict[fx.Node, Storage]
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def arrival(self, node: fx.Node) -> Spec | None:
        """The spec in which `node`, an op's result or a renaming of one, comes out; None for other values."""
        base, index = self.context.segmented.factored.base(node)
        return from_base(self.sources[base], index) if base in self.sources else None

    @cached_property
    def sources(self) -> dict[fx.Node, Spec]:
        """The spec in which every op result comes out."""
        ops = self.context.segmented.ops
        return {r.node: self.context.emitted(op, r, a) for op, a in zip(ops, self.assignments, strict=True)
                for r in op.results}


def batch_axes(decision: Decision) -> tuple[int, ...]:
    """The axes over which some op that reads an input cuts the samples: ranks that differ along no other need the same
    ones."""
    factored = decision.context.segmented.factored
    inputs = set(factored.program.placeholders("input"))
    found: set[int] = set()
    for op, assignment in zip(decision.context.segmented.ops, decision.assignments, strict=True):
        if any(factored.base(operand.node)[0] in inputs for operand in op.operands):
            samples = {f.key for f in op.factors if f.role == "batch"}
            found.update(axis for axis, key in enumerate(assignment) if key in samples)
    return tuple(sorted(found))
