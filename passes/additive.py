"""Which samples of a batch may be ones that count for nothing.

A program whose loss is made of mean cross entropies, and in which nothing else mixes samples, takes a smaller batch
than it was planned for: the rows that lack are copies of others, whose targets are the index that cross entropy
ignores. They move neither the sum nor the count, so that loss and gradients are those of the real rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autopar.passes.decision import Context
from autopar.passes.evaluate import evaluate
from autopar.passes.factors import Factored
from autopar.passes.functional import is_update, value_of
from autopar.passes.ops import Op, factor_roles
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.losses import MEAN
from autopar.passes.rules.nodes import argument

aten = torch.ops.aten
CROSS_ENTROPY = {aten.cross_entropy_loss.default, LINEAR_CROSS_ENTROPY}
"""Their targets, reductions and ignored targets are at the same places among their arguments."""
MIXING = {aten.batch_norm.default}
"""Ops that keep the dim of samples and mix them all the same, where it is special to them."""
CARRIED = {aten.slice.Tensor, aten.pad.default, aten.constant_pad_nd.default, aten.cat.default, aten.to.dtype,
           aten.slice_scatter.default, aten.select_scatter.default, aten.select.int, aten.roll.default,
           aten.expand.default}
"""Ops whose result holds the numbers of their operand, as renamings do."""
ASKED = {aten.eq.Scalar, aten.ne.Scalar, aten.ge.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.masked_fill.Scalar,
         aten.masked_fill.Tensor, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.self}
"""Ops that take any number, the ignored one included, and by which models put another in its place."""


@dataclass(frozen=True, slots=True, eq=False)
class Additive:
    """By input, the target that makes its sample count for nothing; `obstacle` says why there is none, else empty."""

    marks: dict[fx.Node, int]
    obstacle: str = ""


class _Obstacle(Exception):
    """Why samples can't be added."""


def additive(ctx: Context) -> Additive:
    """How to add samples to a program's batch that count for nothing."""
    factored = ctx.segmented.factored
    batch = frozenset(f for f, role in factor_roles(factored).items() if role == "batch")
    try:
        if factored.program.lying:
            raise _Obstacle("its outputs are kept, and they would be among them")
        losses = [op.main for op in ctx.segmented.ops if _reduces(op, ctx, batch)]
        if not losses:
            raise _Obstacle("no loss is a mean cross entropy over the samples")
        marks: dict[fx.Node, int] = {}
        for loss in losses:
            source, mark = _mark(loss, factored)
            if marks.setdefault(source, mark) != mark:
                raise _Obstacle(f"losses ignore different targets of {source.name}")
        for source in marks:
            _check_uses(source, factored)
    except _Obstacle as obstacle:
        return Additive({}, str(obstacle))
    return Additive(marks)


def _reduces(op: Op, ctx: Context, batch: frozenset[int]) -> bool:
    """Whether `op` is a loss over the samples. Raises _Obstacle where it mixes them in another way."""
    factored = ctx.segmented.factored
    over = [f for f in op.factors if f.role == "batch"]
    reads = any(batch & set(factored.flat(operand.node)) for operand in op.operands)
    if not reads:
        return False
    name = f"{op.name} ({str(op.main.target).removeprefix('aten.')})"
    if not over or is_update(op.main, factored.program):
        raise _Obstacle(f"{name} may mix samples")
    whole = any(not f.shardable for f in over)
    if op.main.target in CROSS_ENTROPY and not whole and _counts(op.main):
        return True
    if whole or any(f.summed for f in over) or (op.main.target in MIXING and any(f.special for f in over)):
        raise _Obstacle(f"{name} mixes samples")
    return False


def _counts(loss: fx.Node) -> bool:
    """Whether a cross entropy is a mean over the targets it counts, which numbers of classes can be left out of."""
    target = value_of(loss.args[1])
    assert target is not None
    return argument(loss, 3, "reduction", MEAN) == MEAN and not target.is_floating_point()


def _mark(loss: fx.Node, factored: Factored) -> tuple[fx.Node, int]:
    """The input that the targets of a loss come from, and what in it makes them ignored."""
    mark = int(argument(loss, 4, "ignore_index", -100))
    needed: set[fx.Node] = set()
    left = [loss.args[1]]
    while left:
        node = left.pop()
        assert isinstance(node, fx.Node)
        left += [n for n in node.all_input_nodes if n not in needed]
        needed.add(node)
    given = [n for n in needed if n.op == "placeholder" and factored.program.sources[n.name].kind != "constant"]
    if len(given) != 1 or factored.program.sources[given[0].name].kind != "input":
        raise _Obstacle(f"the targets of the loss come from {', '.join(n.name for n in given) or 'no input'}, not from "
                        "one input alone")
    values: dict[fx.Node, Any] = {n: factored.program.constants[n.name] for n in needed if n.op == "placeholder"
                                  and n is not given[0]}
    value = value_of(given[0])
    assert value is not None
    values[given[0]] = torch.full(value.shape, mark, dtype=value.dtype)
    for node in (n for n in factored.program.graph.nodes if n in needed and n.op == "call_function"):
        values[node] = evaluate(node, *fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__))
    found = values[loss.args[1]]  # type: ignore[index]
    if not isinstance(found, Tensor) or not bool((found == mark).all()):
        raise _Obstacle(f"{given[0].name} has no value that the loss ignores")
    return given[0], mark


def _check_uses(source: fx.Node, factored: Factored) -> None:
    """Raises _Obstacle where something may take the mark for a number to count or to look up with."""
    seen, left = {source}, [source]
    while left:
        for user in left.pop().users:
            if user in seen or user.target in ASKED or user.target in CROSS_ENTROPY:
                continue
            if user.op == "call_function" and user not in factored.aliases and user.target not in CARRIED:
                raise _Obstacle(f"{source.name} is read by {user.meta.get('path') or 'the forward'} "
                                f"({str(user.target).removeprefix('aten.')}) besides the loss")
            seen.add(user)
            left.append(user)
