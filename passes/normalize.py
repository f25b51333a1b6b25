"""Clean the exported graph: assertions, copies and casts to what a value already is go; in-place becomes functional.

Only updates of buffers stay in place: they are the program's side effects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autopar.passes.capture import Program

aten = torch.ops.aten
DROPPED = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
SAME_VALUE = {aten.alias.default, aten.detach_.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
CASTS = {aten.to.dtype_layout, aten.to.dtype, aten.to.device, aten.to.other, aten._to_copy.default}
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


@dataclass(frozen=True, slots=True)
class Normalize:
    """Program -> Program with fewer kinds of op, the same function."""

    def __call__(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            if node.op == "call_function":
                _simplify(node, program)
        _sweep(program)
        return program


def value_of(node: Any) -> Tensor | None:
    """The fake tensor a node makes, None where it makes something else."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def is_update(node: fx.Node, program: Program) -> bool:
    """Whether `node` writes to a buffer in place."""
    return (node.op == "call_function" and bool(node.args) and isinstance(node.args[0], fx.Node)
            and str(node.target).split(".")[1].endswith("_") and not str(node.target).split(".")[1].endswith("__")
            and node.args[0].op == "placeholder" and program.sources[node.args[0].name].kind == "buffer")


def _simplify(node: fx.Node, program: Program) -> None:
    if node.target in DROPPED:
        node.graph.erase_node(node)
    elif node.target in SAME_VALUE or (node.target in CASTS and _changes_nothing(node)) or _idle_dropout(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
    elif node.target in CASTS:
        _to_plain_cast(node)
    elif _functional(node.target) is not None and not is_update(node, program):
        _make_functional(node)


def _changes_nothing(node: fx.Node) -> bool:
    before, after = value_of(node.args[0]), value_of(node)
    return before is not None and after is not None and before.dtype == after.dtype


def _idle_dropout(node: fx.Node) -> bool:
    return node.target in DROPOUTS and bool(node.args[1] == 0.0 or not node.args[2])


def _to_plain_cast(node: fx.Node) -> None:
    value = value_of(node)
    assert value is not None
    node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], value.dtype), {}


def _functional(target: Any) -> Any:
    """`aten.relu_.default` -> `aten.relu.default`; None for what is functional already or has no such twin."""
    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    if not packet.endswith("_") or packet.startswith("_"):
        return None
    return getattr(getattr(aten, packet[:-1], None), overload, None)


def _make_functional(node: fx.Node) -> None:
    written = node.args[0]
    assert isinstance(written, fx.Node)
    node.target = _functional(node.target)
    after = False
    for user in list(node.graph.nodes):
        if after and written in user.all_input_nodes:
            user.replace_input_with(written, node)
        after = after or user is node


def _sweep(program: Program) -> None:
    """Drop what nothing needs; buffer updates are needed."""
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users and not is_update(node, program):
            node.graph.erase_node(node)
