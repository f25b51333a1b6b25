"""How decisions print: `S01R = S01R X RR` for an op, `S0R` for a parameter at rest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import fx

from autopar.core.errors import AutoparError
from autopar.core.spec import Spec
from autopar.passes.decision import Context, Decision
from autopar.passes.factors import Factored
from autopar.passes.layout import from_base
from autopar.passes.ops import Op, OpOperand
from autopar.passes.strategies import Assignment, gather_dim, storage_dims


def merged(factored: Factored, node: fx.Node, spec: Spec) -> Spec:
    """A spec over flat factors as one over the tensor's dims."""
    axes = iter(spec.dims)
    dims = tuple(tuple(sorted(a for _ in dim for a in next(axes))) for dim in factored.dims[node])
    return Spec(dims, spec.partial)


def op_called(context: Context, name: str) -> int:
    """The number of the op called `name`. Raises AutoparError with names like it when there is none."""
    names = [op.name for op in context.segmented.ops]
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.5) or names[:3]
        raise AutoparError(f"no op is called {name!r}; near it are {', '.join(near)}; a plan prints all {len(names)}")
    return names.index(name)


def op_text(decision: Decision, index: int) -> str:
    """What a decision makes of op `index`, as `strategy_text`."""
    return strategy_text(decision.context, decision.context.segmented.ops[index], decision.assignments[index])


def strategy_text(context: Context, op: Op, assignment: Assignment) -> str:
    """`output = input X weight` with (batch, channel) and (in, out) for matmul-like ops, specs by dim for others."""
    if op.contraction and len(op.results) == 1:
        return _contraction_text(op, assignment)
    factored = context.segmented.factored
    made = [_text(merged(factored, r.node, context.emitted(op, r, assignment))) for r in op.results]
    read = [_text(_operand_spec(context, op, o, assignment)) for o in op.operands if o.node in context.gradients]
    return f"{', '.join(made)} = {', '.join(read)}" if read else ", ".join(made)


def _text(spec: Spec) -> str:
    """The notation; of a scalar, which has no dims to name, `R` before its partial sums."""
    return str(spec) if spec.dims else f"R{spec}"


def _operand_spec(context: Context, op: Op, operand: OpOperand, assignment: Assignment) -> Spec:
    factored = context.segmented.factored
    wanted = context.wanted(op, operand, assignment)
    _, place = factored.base(operand.node)
    return merged(factored, operand.node, from_base(wanted, place))


def _contraction_text(op: Op, assignment: Assignment) -> str:
    left, right = [o for o in op.operands if not o.additive][:2]
    result = op.results[0]
    columns = [k for k in result.keys or () if k in (right.keys or ()) and k not in (left.keys or ())]
    rows = [k for k in result.keys or () if k not in columns]
    inner = [k for k in right.keys or () if k not in columns and k not in rows]

    def axes(keys: Iterable[str]) -> tuple[int, ...]:
        wanted = set(keys)
        return tuple(a for a, key in enumerate(assignment) if key in wanted)

    partial = axes(inner)
    output, first, second = (Spec((axes(rows), axes(columns)), partial), Spec((axes(rows), axes(inner))),
                             Spec((axes(inner), axes(columns))))
    return f"{output} = {first} X {second}"


def parameter_text(decision: Decision, node: fx.Node) -> str:
    """The spec of a parameter at rest, over the dims it is stored in."""
    factored, storage, mesh = decision.context.segmented.factored, decision.storage[node], decision.mesh
    dims = storage_dims(factored, node)
    sizes = factored.refined(node)
    axes: list[list[int]] = [[] for _ in dims]
    for axis, state in enumerate(storage.states):
        if isinstance(state, int):
            axes[next(d for d, dim in enumerate(dims) if state in dim)].append(axis)
    if storage.gathered and dims:
        axes[gather_dim(dims, sizes, storage, mesh) or 0] += storage.gathered
    return str(Spec(tuple(tuple(sorted(a)) for a in axes)))

