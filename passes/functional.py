"""Calls of subgraphs are inlined, and writes in place become new values.

A write through a view (`shifted[:, 1:] = ids`) becomes a new value of everything the view looks at. So does one to a
buffer, and what reads it afterwards reads that value; the last is written to the buffer, which is the program's side
effect. Where nothing else reads or writes a buffer its update stays as it is, and so it does where batch norm, which
writes in its own ways, has the buffer too.
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
_NORMS = {aten.batch_norm.default, aten.instance_norm.default}
"""Both with running statistics as arguments 3 and 4, which they write to where argument 5 is true."""


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


def updated(node: Any) -> Any:
    """What `node` is an update of, itself where it is none."""
    while isinstance(node, fx.Node) and node.op == "call_function" and mutates(node.target):
        node = node.args[0]
    return node


def written_within(node: fx.Node) -> tuple[fx.Node, ...]:
    """The running statistics that a norm writes to, though its schema does not say so."""
    if node.target not in _NORMS or not node.args[5]:
        return ()
    return tuple(n for n in node.args[3:5] if isinstance(n, fx.Node))


def written(program: Program) -> frozenset[fx.Node]:
    """The buffers that a program writes to."""
    updates = {updated(node) for node in program.graph.nodes if is_update(node, program)}
    return frozenset(updates.union(*map(written_within, program.graph.nodes)))


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
        for node in list(program.graph.nodes):
            if node.op == "call_function" and isinstance(node.kwargs.get("out"), fx.Node):
                _write_out(node)
            if node.target is aten.copy_.default and updated(node.args[1]) is updated(node) and not node.users:
                program.graph.erase_node(node)  # a buffer to itself: `self.steps += 1` is an update and an assignment
        writes = _Writes(program)
        for node in list(program.graph.nodes):
            for old in node.all_input_nodes:
                if old in writes.current:
                    node.replace_input_with(old, _latest(old, writes.current))
            if node.op == "call_function" and mutates(node.target) and updated(node) not in writes.kept:
                writes.write(node)
        writes.finish()
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
_LOOKS = {*WRITTEN_BACK, *OPAQUE_VIEWS}
_VIEWS = {*_LOOKS, aten.detach.default}
"""The views through which writes are followed; the same with what detaches, which only buffers are followed through."""


def emit_after(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call right after a node."""
    return emit(node.next, target, *args, **kwargs)


class _Writes:
    """Writes become values: `current` has what took a value's place, `stands` whose value one is, of buffers, and
    `kept` the buffers whose updates stay in place."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.current: dict[fx.Node, fx.Node] = {}
        self.stands: dict[fx.Node, fx.Node] = {}
        within = {n for node in program.graph.nodes for n in written_within(node)}
        self.kept = {n for n in program.placeholders("buffer") if n in within or _alone(n)}

    def write(self, node: fx.Node) -> None:
        """Turn an in-place call into a value and let everything later see it."""
        written = node.args[0]
        assert isinstance(written, fx.Node)
        view = _as_value(node, written)
        root = written
        while (base := self._behind(root)) is not None:
            if root.target in OPAQUE_VIEWS:
                raise CaptureError(f"{node.meta.get('path') or 'the forward'} writes in place through {root.target}, "
                                   "which can't be traced; write to a new tensor there, or clone the view first")
            self.current[root] = view
            if root.target in WRITTEN_BACK and root not in self.stands:
                view = WRITTEN_BACK[root.target](_latest(base, self.current), view, root)
            root = base
        _check_written(node, updated(_detached_from(root)), self.program, self.kept)
        _check_apart(node, root)
        self.current[root] = view
        stale = [root, *(value for value, buffer in self.stands.items() if buffer is root)]
        if self._buffer(root):
            self.stands[view] = root
        _refresh_views(stale, view, self.current)

    def finish(self) -> None:
        """Write to each buffer what it is in the end."""
        for buffer in self.program.placeholders("buffer"):
            if buffer in self.current:
                last = _latest(buffer, self.current)
                read = emit_after(last, aten.detach.default, last)
                written = emit_after(read, aten.copy_.default, buffer, read)
                read.meta["path"] = written.meta["path"] = last.meta.get("path", "")

    def _behind(self, node: fx.Node) -> fx.Node | None:
        """What `node` shares its memory with: of views their base, of values and detached ones of buffers those."""
        if node in self.stands:
            return self.stands[node]
        if node.op == "call_function" and (node.target in _LOOKS or (
                node.target is aten.detach.default and self._buffer(node))):
            return node.args[0]  # type: ignore[return-value]
        return None

    def _buffer(self, node: Any) -> bool:
        """Whether `node` shares its memory with a buffer."""
        while node not in self.stands and node.op == "call_function" and (
                node.target in _VIEWS or mutates(node.target)):
            node = node.args[0]
        return node in self.stands or (node.op == "placeholder" and self.program.sources[node.name].kind == "buffer")


def _alone(buffer: fx.Node) -> bool:
    """Whether a buffer is updated by one call, and nothing reads it or what that returns."""
    users = list(buffer.users)
    return (len(users) == 1 and mutates(users[0].target) and not users[0].users and users[0].args[0] is buffer
            and buffer not in users[0].args[1:])


def _write_out(node: fx.Node) -> None:
    """`div.out(x, y, out=buffer)` as a value, which is then copied to where it was to be written."""
    kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
    wanted = [argument.name for argument in node.target._schema.arguments if argument.name != "out"]  # type: ignore[union-attr]
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    overloads = [getattr(packet, name) for name in packet.overloads()]
    value = emit(node, next(each for each in overloads if [a.name for a in each._schema.arguments] == wanted),
                 *node.args, **kwargs)
    node.replace_all_uses_with(emit(node, aten.copy_.default, node.kwargs["out"], value))
    node.graph.erase_node(node)


def _detached_from(node: fx.Node) -> fx.Node:
    """What `node` shares its memory with through `detach`."""
    while node.target is aten.detach.default and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _check_written(node: fx.Node, root: fx.Node, program: Program, kept: set[fx.Node]) -> None:
    """Raises CaptureError where a write to `root` is one that can't be a new value."""
    source = program.sources[root.name] if root.op == "placeholder" else None
    if source is not None and source.kind == "parameter":
        raise CaptureError(f"{node.meta.get('path') or 'the forward'} writes to parameter {source.name} in place "
                           f"({node.target}), which can't be traced; do so outside of the forward, after the "
                           "optimizer's step")
    if root in kept:
        name = program.sources[root.name].name
        raise CaptureError(f"{node.meta.get('path') or 'the forward'} writes to a part of {name} in place, which "
                           "can't be traced as a norm writes to it too; assign all of it")


def _check_apart(node: fx.Node, root: fx.Node) -> None:
    """Raises CaptureError where a write through `root`, which is detached, would be seen by who reads later what it is
    detached from."""
    if root.target is not aten.detach.default:
        return
    base = root
    while base.op == "call_function" and base.target in _VIEWS:
        base = base.args[0]  # type: ignore[assignment]
    same, readers = [base], set[fx.Node]()
    for each in same:
        others = [user for user in each.users if user is not root]
        same += [user for user in others if user.target in _VIEWS]
        readers.update(others)
    after = node.next
    while after.op != "root":
        if after in readers and after.target not in _VIEWS:
            raise CaptureError(f"{node.meta.get('path') or 'the forward'} writes in place ({node.target}) to "
                               f"what is detached from {base.name}, which {after.name} reads later: detached tensors "
                               "are copies here; clone it before, and use the clone from there on")
        after = after.next


def _as_value(node: fx.Node, written: fx.Node) -> fx.Node:
    """`node` as a call that returns what it would have written."""
    dtype = written.meta["val"].dtype
    if node.target is aten.copy_.default:
        return _in_place_of(node, _copied(node, written.meta["val"]), dtype)
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    functional = getattr(getattr(aten, packet.rstrip("_"), None), overload, None)
    if functional is None:
        raise CaptureError(f"{node.meta.get('path') or 'the forward'} calls {node.target}, which has no form that "
                           "makes a new value; use an op that has one there")
    node.target = functional
    values = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    node.meta["val"] = functional(*values[0], **values[1])
    return node if node.meta["val"].dtype == dtype else _in_place_of(node, node, dtype)


def _copied(node: fx.Node, like: Tensor) -> fx.Node:
    """What a `copy_` to a tensor `like` this brings, as a value of its own."""
    source: Any = node.args[1]
    if value_of(source) is not None and source.meta["val"].shape == like.shape:
        return emit(node, aten.clone.default, source)
    return emit(node, aten.expand.default, source, list(like.shape))


def _in_place_of(node: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`value` in a dtype, which all read that read `node`."""
    users = list(node.users)
    cast = value if value.meta["val"].dtype == dtype else emit_after(value, aten.to.dtype, value, dtype)
    for user in users:
        user.replace_input_with(node, cast)
    if value is not node:
        node.graph.erase_node(node)
    return cast


def _refresh_views(stale: list[fx.Node], new: fx.Node, current: dict[fx.Node, fx.Node]) -> None:
    """Views made before the write to `stale` look at the new value from now on."""
    targets = _VIEWS if stale[0].op == "placeholder" else _LOOKS
    for node in list(new.graph.nodes):
        if node is new:
            return
        if node.op == "call_function" and node.target in targets and node.args[0] in stale:
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
