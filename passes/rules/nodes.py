"""What rules ask of a node: its tensors, their shapes, its arguments.

A result of an op that makes several, which the graph takes by its number, answers as the op itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from autopar.passes.functional import value_of
from autopar.passes.rules.notation import Rule, letters

RuleMaker = Callable[[fx.Node], Rule | None]


def call_of(node: fx.Node) -> fx.Node:
    """The call that makes `node`: another node where that makes several tensors."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of `node` in order of appearance, repeated if passed twice."""
    found: list[fx.Node] = []
    call = call_of(node)
    fx.map_arg((call.args, call.kwargs), lambda n: found.append(n) if value_of(n) is not None else None)
    return found


def shape(node: Any) -> tuple[int, ...]:
    """The global shape of the tensor `node` makes."""
    value = value_of(node)
    assert value is not None, f"{node} makes no tensor"
    return tuple(value.shape)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    call = call_of(node)
    return call.args[position] if len(call.args) > position else call.kwargs.get(name, default)


def named(node: fx.Node, name: str) -> Any:
    """The argument of a call that its op's schema calls `name`, or its default."""
    call = call_of(node)
    for position, declared in enumerate(call.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            given = None if declared.kwarg_only else position
            return argument(call, len(call.args) if given is None else given, name, declared.default_value)
    raise AssertionError(f"{call.target} has no argument {name}")


def operand_shape(node: fx.Node, position: int = 0) -> tuple[int, ...]:
    """The global shape of a tensor among the arguments."""
    return shape(call_of(node).args[position])


def dims_of(given: Any, rank: int) -> list[int]:
    """The dims that an argument names, one, several or by None all, counted from the front."""
    every = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    return [dim % max(rank, 1) for dim in every]


def names_of(rank: int) -> list[str]:
    """A letter for each dim of a result."""
    return letters("o", rank)


def joined(names: list[str]) -> str:
    """The letters of one operand."""
    return " ".join(names)


def attention_dropout(node: fx.Node) -> float:
    """The rate at which the attention `node` drops its weights."""
    rate: float = argument(node, 4, "dropout_p", 0.0)
    return rate
