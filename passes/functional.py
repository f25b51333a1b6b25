"""Calls of subgraphs are inlined, and writes in place become new values.

A write through a view (`shifted[:, 1:] = ids`) becomes a new value of everything the view looks at. Only plain
updates of buffers stay in place: they are the program's side effects.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autopar.core.errors import CaptureError
from autopar.passes.capture import Program

aten = torch.ops.aten


def value_of(node: Any) -> Tensor | None:
    """The fake tensor a node makes, None where it makes something else."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def is_update(node: fx.Node, program: Program) -> bool:
    """Whether `node` writes to a buffer in place."""
    written: Any = node
    while isinstance(written, fx.Node) and written.op == "call_function" and mutates(written.target):
        written = written.args[0]
    return (written is not node and isinstance(written, fx.Node) and written.op == "placeholder"
            and program.sources[written.name].kind == "buffer")


def _updated(node: Any) -> Any:
    """The buffer that `node` is an update of, itself where it is none."""
    while isinstance(node, fx.Node) and node.op == "call_function" and mutates(node.target):
        node = node.args[0]
    return node


def mutates(target: Any) -> bool:
    """Whether `target` writes to its first argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def emit(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call before a node, with the value and path it needs."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta = {"val": target(*values[0], **values[1]), "path": before.meta.get("path", ""), "leaf": False}
    return node


@dataclass(frozen=True, slots=True)
class Functionalize:
    """Program -> Program in which every node is a value of its own."""

    def __call__(self, program: Program) -> Program:
        current: dict[fx.Node, fx.Node] = {}
        for node in list(program.graph.nodes):
            if node.op == "call_function" and isinstance(node.kwargs.get("out"), fx.Node):
                _write_out(node)
        for node in list(program.graph.nodes):
            for old in node.all_input_nodes:
                if old in current:
                    node.replace_input_with(old, _latest(old, current))
            if node.op == "call_function" and mutates(node.target) and not is_update(node, program):
                _write(node, program, current)
        for node in list(program.graph.nodes):
            if node.target is aten.copy_.default and _updated(node.args[1]) is _updated(node) and not node.users:
                program.graph.erase_node(node)  # a buffer to itself: `self.steps += 1` is an update and an assignment
        return program


def _latest(node: fx.Node, current: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in current:
        node = current[node]
    return node


# Subgraphs

def inline(graph: fx.Graph) -> None:
    """Replace calls of subgraphs under a gradient switch by their nodes; where the switch is off their results are
    detached, and so is what they write to buffers.

    Raises CaptureError where one is under autocast: its casts are in no graph.
    """
    for node in list(graph.nodes):
        wrapped = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if wrapped not in _SWITCHED:
            continue
        enabled, submodule, *operands = _SWITCHED[wrapped](node)
        assert graph.owning_module is not None
        inner: Any = graph.owning_module.get_submodule(submodule.target)
        values = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], operands, strict=True))
        with graph.inserting_before(node):
            made = graph.graph_copy(inner.graph, values)
        for copied in values.values():
            if isinstance(copied, fx.Node):
                copied.meta.setdefault("path", node.meta.get("path", ""))
                if not enabled and copied.op == "call_function" and mutates(copied.target):
                    _detach_read(copied)
        results = list(made) if isinstance(made, (tuple, list)) else [made]
        results = [r if enabled else emit(node, aten.detach.default, r) for r in results]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        graph.erase_node(submodule)


def _detach_read(node: fx.Node) -> None:
    """Let a call that writes to a tensor read others detached."""
    written = node.kwargs.get("out", node.args[0])
    read = [x for x in dict.fromkeys(node.all_input_nodes) if x is not written and value_of(x) is not None]
    for x in read:
        node.replace_input_with(x, emit(node, aten.detach.default, x))


def _without_autocast(node: fx.Node) -> tuple[Any, ...]:
    device, dtype, enabled, _, submodule, *operands = node.args
    if enabled:
        raise CaptureError(f"{node.meta.get('path') or 'the forward'} switches autocast to {dtype} on for {device}, "
                           "which can't be traced; leave it out and give precision=\"bf16-mixed\" or \"fp16-mixed\"")
    return True, submodule, *operands


_SWITCHED: dict[str, Callable[[fx.Node], tuple[Any, ...]]] = {
    "wrap_with_set_grad_enabled": lambda node: node.args, "wrap_with_autocast": _without_autocast}
"""By the name of what calls a subgraph: whether gradients flow, the subgraph, its operands."""


# Writes

def _reshaped(base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    return emit_after(new, aten.reshape.default, new, list(base.meta["val"].shape))


def _permuted(base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    order = [d % base.meta["val"].ndim for d in view.args[1]]  # type: ignore[union-attr]
    return emit_after(new, aten.permute.default, new, [order.index(i) for i in range(len(order))])


def _scattered(target: Any) -> Callable[[fx.Node, fx.Node, fx.Node], fx.Node]:
    return lambda base, new, view: emit_after(new, target, base, new, *view.args[1:], **view.kwargs)


WRITTEN_BACK: dict[Any, Callable[[fx.Node, fx.Node, fx.Node], fx.Node]] = {
    aten.slice.Tensor: _scattered(aten.slice_scatter.default),
    aten.select.int: _scattered(aten.select_scatter.default),
    aten.transpose.int: lambda base, new, view: emit_after(new, aten.transpose.int, new, *view.args[1:]),
    aten.t.default: lambda base, new, view: emit_after(new, aten.t.default, new),
    aten.permute.default: _permuted,
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim,
                     aten.squeeze.default, aten.flatten.using_ints), _reshaped),
}
"""How a new value of a view makes a new value of what it looks at: (base, new, view) -> new base."""
OPAQUE_VIEWS = {aten.expand.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int, operator.getitem}


def emit_after(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call right after a node."""
    return emit(node.next, target, *args, **kwargs)


def _write(node: fx.Node, program: Program, current: dict[fx.Node, fx.Node]) -> None:
    """Turn an in-place call into a value and let everything later see it."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    fresh = _as_value(node, written)
    root, view = written, fresh
    while root.op == "call_function" and (root.target in WRITTEN_BACK or root.target in OPAQUE_VIEWS):
        current[root] = view
        base = root.args[0]
        assert isinstance(base, fx.Node)
        if root.target in OPAQUE_VIEWS:
            raise CaptureError(f"{node.meta.get('path') or 'the forward'} writes in place through {root.target}, which "
                               "can't be traced; write to a new tensor there, or clone the view first")
        view = WRITTEN_BACK[root.target](_latest(base, current), view, root)
        root = base
    _check_written(node, _detached_from(root), program)
    current[root] = view
    _refresh_views(root, view, current)


def _write_out(node: fx.Node) -> None:
    """`div.out(x, y, out=buffer)` as a value, which is then copied to where it was to be written."""
    kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
    wanted = [argument.name for argument in node.target._schema.arguments if argument.name != "out"]  # type: ignore[union-attr]
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    overloads = [getattr(packet, name) for name in packet.overloads()]
    value = emit(node, next(each for each in overloads if [a.name for a in each._schema.arguments] == wanted),
                 *node.args, **kwargs)
    emit(node, aten.copy_.default, node.kwargs["out"], value)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _detached_from(node: fx.Node) -> fx.Node:
    """What `node` shares its memory with through `detach`."""
    while node.target is aten.detach.default and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _check_written(node: fx.Node, root: fx.Node, program: Program) -> None:
    """Raises CaptureError where a write to `root` is one that can't be a new value."""
    source = program.sources[root.name] if root.op == "placeholder" else None
    if source is not None and source.kind == "parameter":
        raise CaptureError(f"{node.meta.get('path') or 'the forward'} writes to parameter {source.name} in place "
                           f"({node.target}), which can't be traced; do so outside of the forward, after the "
                           "optimizer's step")
    if source is not None and source.kind == "buffer":
        raise CaptureError(f"{node.meta.get('path') or 'the forward'} writes to a part of {source.name} in place, "
                           "which can't be traced; assign all of it")


def _as_value(node: fx.Node, written: fx.Node) -> fx.Node:
    """`node` as a call that returns what it would have written."""
    shape, dtype = list(written.meta["val"].shape), written.meta["val"].dtype
    if node.target is aten.copy_.default:
        source = emit(node, aten.expand.default, node.args[1], shape)
        fresh = source if source.meta["val"].dtype == dtype else emit(node, aten.to.dtype, source, dtype)
        node.replace_all_uses_with(fresh)
        node.graph.erase_node(node)
        return fresh
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    functional = getattr(getattr(aten, packet.rstrip("_"), None), overload, None)
    if functional is None:
        raise CaptureError(f"{node.meta.get('path') or 'the forward'} calls {node.target}, which has no form that "
                           "makes a new value; use an op that has one there")
    node.target = functional
    return node


def _refresh_views(root: fx.Node, new: fx.Node, current: dict[fx.Node, fx.Node]) -> None:
    """Views made before the write look at the new value from now on."""
    stale = [root]
    for node in list(root.graph.nodes):
        if node is new:
            return
        viewing = node.op == "call_function" and (node.target in WRITTEN_BACK or node.target in OPAQUE_VIEWS)
        if viewing and node.args[0] in stale:
            stale.append(node)
            if node not in current:
                args = fx.map_arg(node.args, lambda n: _latest(n, current))
                with new.graph.inserting_after(_last_of(new, current)):
                    fresh = new.graph.call_function(node.target, args, dict(node.kwargs))
                fresh.meta = dict(node.meta)
                current[node] = fresh


def _last_of(new: fx.Node, current: dict[fx.Node, fx.Node]) -> fx.Node:
    """The last node made for a write so far: views are renewed in order after it."""
    order = {n: i for i, n in enumerate(new.graph.nodes)}
    made = {new, *current.values()} & order.keys()
    return max((n for n in made if order[n] >= order[new]), key=order.__getitem__)
