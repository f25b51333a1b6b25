"""Clean the exported graph: assertions, copies and casts to what a value already is go, then it is made functional."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.passes.capture import Program
from autopar.passes.composites import TakeApart
from autopar.passes.functional import Functionalize, inline, is_update, value_of
from autopar.passes.rules.losses import MEAN, POINTWISE, SUM, terms
from autopar.passes.rules.nodes import argument, named

aten = torch.ops.aten
DROPPED = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
SAME_STORAGE = {aten.alias.default, aten.detach_.default, aten.lift_fresh.default}
COPIES = {aten.lift_fresh_copy.default}
CASTS = {aten.to.dtype_layout, aten.to.dtype, aten.to.device, aten.to.other, aten.type_as.default}
COPYING_CASTS = {aten._to_copy.default}
SPARSE: dict[Any, int] = {aten.embedding.default: 4, aten.embedding_bag.default: 5}
"""Where it stands whether gradients are sparse, which parameters that are cut can't have."""
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


@dataclass(frozen=True, slots=True)
class Normalize:
    """Program -> Program with fewer kinds of op, the same function.

    What shares storage with its operand goes before writes are made functional, copies go after.
    """

    def __call__(self, program: Program) -> Program:
        inline(program.graph)
        for node in _calls(program):
            _drop_if(node, node.target in DROPPED)
            _bypass_if(node, node.target in SAME_STORAGE or (node.target in CASTS and _keeps_dtype(node)))
        TakeApart()(program)
        Functionalize()(program)
        for node in _calls(program):
            if node.target in CASTS | COPYING_CASTS and not _keeps_dtype(node):
                _to_plain_cast(node)
            _bypass_if(node, node.target in COPIES | COPYING_CASTS or _idle_dropout(node))
            if node.target in SPARSE:
                _make_dense(node)
        for node in _calls(program):
            if _is_mean(node) and _sums_safely(node):
                _to_sum(node)
        _sweep(program)
        return program


def _calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _drop_if(node: fx.Node, useless: bool) -> None:
    if useless:
        node.graph.erase_node(node)


def _bypass_if(node: fx.Node, useless: bool) -> None:
    """Let users read the operand instead."""
    if useless:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _make_dense(node: fx.Node) -> None:
    place = SPARSE[node.target]
    if len(node.args) > place:
        node.args = (*node.args[:place], False, *node.args[place + 1:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "sparse"}


def _keeps_dtype(node: fx.Node) -> bool:
    before, after = value_of(node.args[0]), value_of(node)
    return before is not None and after is not None and before.dtype == after.dtype


def _idle_dropout(node: fx.Node) -> bool:
    return node.target in DROPOUTS and bool(node.args[1] == 0.0 or not node.args[2])


def _sums_safely(node: fx.Node) -> bool:
    """Whether a sum of as many elements is in range, as it may not be in fp16."""
    value = value_of(node.args[0])
    return value is not None and value.dtype in (torch.float64, torch.float32, torch.bfloat16)


def _is_mean(node: fx.Node) -> bool:
    if node.target in POINTWISE:
        return bool(named(node, "reduction") == MEAN)
    return node.target is aten.mean.default and not node.kwargs


def _to_sum(node: fx.Node) -> None:
    """A mean of everything as a sum over a number: parts of the sum are partial sums, parts of a mean are not."""
    with node.graph.inserting_before(node):
        total = node.graph.call_function(*_sum_of(node))
    total.meta = dict(node.meta)
    count = math.prod(terms(node))
    node.target, node.args, node.kwargs = aten.div.Tensor, (total, float(max(1, count))), {}


def _sum_of(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The sum whose mean `node` makes."""
    if node.target not in POINTWISE:
        return aten.sum.default, (node.args[0],), {}
    place, declared = POINTWISE[node.target], node.target._schema.arguments  # type: ignore[union-attr]
    before = [argument(node, i, declared[i].name, declared[i].default_value) for i in range(place)]
    kwargs = {name: value for name, value in node.kwargs.items() if name in {a.name for a in declared[place + 1:]}}
    return node.target, (*before, SUM, *node.args[place + 1:]), kwargs


def _to_plain_cast(node: fx.Node) -> None:
    value = value_of(node)
    assert value is not None
    node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], value.dtype), {}


def _sweep(program: Program) -> None:
    """Drop what nothing needs; buffer updates are needed."""
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users and not is_update(node, program):
            node.graph.erase_node(node)
