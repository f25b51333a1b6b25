"""Rules of losses: rows may be cut, and classes where the rest of a row is asked of the other ranks."""

from __future__ import annotations

from torch import fx

from autopar.passes.functional import value_of
from autopar.passes.rules.nodes import argument, shape
from autopar.passes.rules.notation import Rule, letters, rule

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
