"""What rules ask of a node: its tensors, their shapes, its arguments."""

from __future__ import annotations

from typing import Any

from torch import fx

from autopar.passes.functional import value_of


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of `node` in order of appearance, repeated if passed twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) if value_of(n) is not None else None)
    return found


def shape(node: Any) -> tuple[int, ...]:
    """The global shape of the tensor `node` makes."""
    value = value_of(node)
    assert value is not None, f"{node} makes no tensor"
    return tuple(value.shape)


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
