"""Rules of losses: rows may be cut, and classes where the rest of a row is asked of the other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.passes.functional import value_of
from autopar.passes.rules.moves import aligned, pointwise
from autopar.passes.rules.nodes import argument, call_of, named, names_of, shape, tensor_operands
from autopar.passes.rules.notation import Rule, letters, rule

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
"""A loss's `reduction`."""


def row_letters(dims: int) -> list[str]:
    """The letters of the dims of a loss's rows, of logits of so many dims: all but the classes'."""
    return ["t", *letters("s", dims - 2)]


def cross_entropy(node: fx.Node) -> Rule | None:
    """Classes may be cut where targets are numbers of classes and all weigh the same.

    A mean is (partial sum, whole count).
    """
    logits, target, weight = shape(node.args[0]), value_of(node.args[1]), argument(node, 2, "weight", None)
    if len(logits) < 2 or target is None:
        return None
    numbered, reduction = not target.is_floating_point(), argument(node, 3, "reduction", MEAN)
    names = row_letters(len(logits))
    rows, whole = " ".join(names), " ".join([names[0], "c", *names[1:]])
    operands = f"{whole}, {rows if numbered else whole}" + ("" if weight is None else ", c")
    special = (["c"] if numbered and weight is None else []) + (names if reduction == MEAN else [])
    return rule(f"{operands} -> {rows if reduction == NONE else ''}", whole="" if "c" in special else "c",
                special=" ".join(special))


def nll(node: fx.Node) -> Rule | None:
    """The same of log-probabilities: classes are whole."""
    found = cross_entropy(node)
    return None if found is None else Rule(found.notation, found.whole | {"c"}, found.special - {"c"})


def linear_cross_entropy(node: fx.Node) -> Rule:
    """Rows and classes may be cut as in cross entropy, whose logits are each of whole rows and columns."""
    bias = "" if argument(node, 5, "bias", None) is None else ", n"
    mean = argument(node, 3, "reduction", MEAN) == MEAN
    return rule(f"t k, t, n k{bias} ->", whole="k", special="t n" if mean else "n")


POINTWISE: dict[Any, int] = {
    aten.mse_loss.default: 2, aten.l1_loss.default: 2, aten.smooth_l1_loss.default: 2, aten.huber_loss.default: 2,
    aten.kl_div.default: 2, aten.soft_margin_loss.default: 2, aten.binary_cross_entropy.default: 3,
    aten.binary_cross_entropy_with_logits.default: 4,
}
"""Losses whose every term depends on one element of each operand, and where their `reduction` is."""


def pointwise_loss(node: fx.Node) -> Rule | None:
    """Terms or their sum; a mean has no rule, it is made a sum over a number before.

    None where input and target are broadcast: torch's backward is not to be relied on there.
    """
    reduction, (left, right) = named(node, "reduction"), tensor_operands(node)[:2]
    if shape(left) != shape(right):
        return None
    if reduction == NONE:
        return pointwise(node)
    if reduction == MEAN:
        return None
    whole = terms(node)
    names = names_of(len(whole))
    return rule(f"{', '.join(aligned(shape(n), whole, names) for n in tensor_operands(node))} ->")


def terms(node: fx.Node) -> tuple[int, ...]:
    """The shape of the terms of a pointwise loss: that of its operands, broadcast."""
    return tuple(torch.broadcast_shapes(*map(shape, tensor_operands(call_of(node)))))
