"""Heads in chunks: a linear layer whose logits nothing but a cross entropy reads becomes one op with it.

What may lie between them are renamings that leave the classes last, and a cast. Whether it is worth it the cost layer
says: logits that go through memory once less, against the weight's gradient that goes through it once a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.core.device import Device
from autopar.passes.capture import Program
from autopar.passes.costs import Work, in_chunks
from autopar.passes.factors import IN_ORDER
from autopar.passes.functional import emit, value_of
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.rules.losses import MEAN, NONE
from autopar.passes.rules.nodes import argument, shape

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A head: its `linear` layer, `between` it and its `loss` what the logits go through."""

    linear: fx.Node
    between: tuple[fx.Node, ...]
    loss: fx.Node


def heads_of(program: Program) -> list[Found]:
    """The heads that can go in chunks."""
    losses = (node for node in program.graph.nodes if node.target is aten.cross_entropy_loss.default)
    return [found for found in map(_head, losses) if found is not None]


def _head(loss: fx.Node) -> Found | None:
    between: list[fx.Node] = []
    node: Any = loss.args[0]
    while _passes_on(node):
        between.insert(0, node)
        node = node.args[0]
    linear = isinstance(node, fx.Node) and node.target is aten.linear.default and len(node.users) == 1
    return Found(node, tuple(between), loss) if linear and len(shape(node)) > 1 and _fits(loss) else None


def _passes_on(node: Any) -> bool:
    """Whether `node` is a cast of logits, or renames them with their classes last, for one reader alone."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.users) != 1:
        return False
    cast = node.target is aten.to.dtype
    return cast or (node.target in IN_ORDER and shape(node)[-1:] == shape(node.args[0])[-1:])


def _fits(loss: fx.Node) -> bool:
    """Whether a loss is of numbers of classes that weigh the same, over rows, one number, and not smoothed."""
    target = value_of(loss.args[1])
    return (len(shape(loss.args[0])) == 2 and target is not None and not target.is_floating_point()
            and argument(loss, 2, "weight", None) is None and argument(loss, 3, "reduction", MEAN) != NONE
            and argument(loss, 5, "label_smoothing", 0.0) == 0.0)


@dataclass(frozen=True, slots=True)
class ChunkHeads:
    """Program -> Program with every head that can go so in chunks."""

    def __call__(self, program: Program) -> Program:
        for found in heads_of(program):
            _replace(found)
        return program


def _replace(found: Found) -> None:
    loss, linear = found.loss, found.linear
    hidden: Any = linear.args[0]
    if len(shape(hidden)) > 2:
        hidden = emit(loss, aten.reshape.default, hidden, [shape(loss.args[0])[0], shape(hidden)[-1]])
    value, logits = value_of(loss), value_of(linear)
    assert value is not None and logits is not None
    made = emit(loss, LINEAR_CROSS_ENTROPY, hidden, loss.args[1], linear.args[1], argument(loss, 3, "reduction", MEAN),
                argument(loss, 4, "ignore_index", -100), argument(linear, 2, "bias", None),
                None if value.dtype == logits.dtype else value.dtype)
    loss.replace_all_uses_with(made)
    for node in (loss, *reversed(found.between), linear):
        node.graph.erase_node(node)


def pays(program: Program, device: Device, parts: int) -> bool:
    """Whether the heads of a program take less time in chunks, their rows cut over so many devices."""
    works = [(_plain(head, parts), _chunked(head, parts)) for head in heads_of(program)]
    plain, chunked = (sum(_seconds(work, device, program.training) for each in works for work in each[way])
                      for way in (0, 1))
    return chunked < plain


def _seconds(work: Work, device: Device, training: bool) -> float:
    return work.forward_seconds(device) + (work.backward_seconds(device) if training else 0.0)


def _sizes(head: Found, parts: int) -> tuple[int, int, int]:
    """(rows, width, classes) of a head on one device."""
    classes, width = shape(head.linear.args[1])
    return -(-shape(head.loss.args[0])[0] // parts), width, classes


def _plain(head: Found, parts: int) -> list[Work]:
    rows, width, classes = _sizes(head, parts)
    flop, dtype = 2.0 * rows * width * classes, _dtype(head.linear)
    logits = {node: float(rows * classes * _dtype(node).itemsize) for node in (head.linear, *head.between)}
    read = float((rows + classes) * width * dtype.itemsize)
    casts = [node for node in head.between if node.target is aten.to.dtype]
    return [Work(flop, read + logits[head.linear], dtype, 2 * flop),
            *(Work(0.0, logits[node] + logits[node.args[0]], dtype, 0.0) for node in casts),  # type: ignore[index]
            Work(0.0, logits[(head.linear, *head.between)[-1]], dtype, 0.0)]


def _chunked(head: Found, parts: int) -> list[Work]:
    rows, width, classes = _sizes(head, parts)
    flop, dtype = 2.0 * rows * width * classes, _dtype(head.linear)
    beside = in_chunks(rows, width, classes, dtype.itemsize)
    return [Work(flop, float((rows + classes) * width * dtype.itemsize), dtype, 2 * flop, beside)]


def _dtype(node: fx.Node) -> torch.dtype:
    value = value_of(node)
    assert value is not None
    return value.dtype


def worth(program: Program, device: Device, parts: int) -> bool:
    """Whether the heads of a program are to go in chunks on so many devices."""
    return program.head == "chunked" or (program.head == "auto" and pays(program, device, parts))
