"""How calls of a lowered graph are written: aten ops as operators and methods where these are the same, and modules as
calls of `Rank`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar.codegen.collectives import ReduceGradients
from autopar.codegen.draws import GlobalIndex
from autopar.codegen.heads import LinearCrossEntropy
from autopar.codegen.substitute import Attention, BatchNorm, Dropout, Uniform
from autopar.codegen.vocabulary import PLAIN, CrossEntropy, Embedding, Places

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Text:
    """An expression. `args` are the arguments of the call that it ends with, between `text` and a parenthesis; None
    where it is no call. Operators that bind more loosely than a call are in parentheses when they are operands."""

    text: str
    args: tuple[str, ...] | None = None
    loose: bool = False

    def __str__(self) -> str:
        return self.text if self.args is None else f"{self.text}({', '.join(self.args)})"

    @property
    def tight(self) -> str:
        """As an operand."""
        return f"({self})" if self.loose else str(self)


def literal(value: Any) -> Text:
    """A constant; texts stand as they are."""
    if isinstance(value, Text):
        return value
    if isinstance(value, list):
        return Text(f"[{', '.join(str(literal(v)) for v in value)}]")
    if isinstance(value, tuple):
        return Text(f"({', '.join(str(literal(v)) for v in value)}{',' if len(value) == 1 else ''})")
    if isinstance(value, float) and not math.isfinite(value):
        return Text(f'float("{value}")')
    if isinstance(value, torch.device):
        return Text("rank.device")
    if isinstance(value, str):
        return Text('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
    assert value is None or isinstance(value, bool | int | float | torch.dtype | torch.layout | torch.memory_format), (
        f"{value!r} can't be written")
    return Text(repr(value), loose=isinstance(value, int | float) and value < 0)


def call(head: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    """A call of `head`."""
    named = (f"{name}={literal(value)}" for name, value in kwargs.items())
    return Text(head, (*(str(literal(a)) for a in args), *named))


def _infix(sign: str) -> Callable[..., Text]:
    return lambda x, y: Text(f"{literal(x).tight} {sign} {literal(y).tight}", loose=True)


def _method(name: str) -> Callable[..., Text]:
    def written(x: Any, *args: Any) -> Text:
        flat = args[0] if args and isinstance(args[0], list | tuple) else args
        return call(f"{literal(x).tight}.{name}", tuple(flat) if flat or not args else ((),), {})
    return written


def _slice(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Text:
    first, last = "" if not start else str(start), "" if end is None or end >= 2**63 - 1 else str(end)
    part = f"{first}:{last}" + (f":{step}" if step != 1 else "")
    places = [*[":"] * dim, part] if dim >= 0 else ["...", part, *[":"] * (-1 - dim)]
    return Text(f"{literal(x).tight}[{', '.join(places)}]")


def _item(x: Any, place: int) -> Text:
    return Text(f"{literal(x).tight}[{place}]")


WRITTEN: dict[Any, Callable[..., Text]] = {
    operator.getitem: _item,
    aten.add.Tensor: _infix("+"),
    aten.sub.Tensor: _infix("-"),
    aten.mul.Tensor: _infix("*"),
    aten.div.Tensor: _infix("/"),
    aten.pow.Tensor_Scalar: _infix("**"),
    aten.eq.Scalar: _infix("=="),
    aten.ne.Scalar: _infix("!="),
    aten.neg.default: lambda x: Text(f"-{literal(x).tight}", loose=True),
    aten.reshape.default: _method("reshape"),
    aten.transpose.int: _method("transpose"),
    aten.permute.default: _method("permute"),
    aten.expand.default: _method("expand"),
    aten.contiguous.default: _method("contiguous"),
    aten.detach.default: _method("detach"),
    aten.t.default: _method("t"),
    aten.to.dtype: _method("to"),
    aten.split.Tensor: lambda x, size, dim=0: call(f"{literal(x).tight}.split", (size, dim), {}),
    aten.slice.Tensor: _slice,
}
"""Ops that have a form of their own, where they have no keyword arguments."""
VIEWS = {aten.reshape.default, aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.t.default,
         aten.detach.default, aten.to.dtype}
"""Ops that are written into the call that takes their result, where one does."""


def op_text(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    """A call of an op."""
    if target in WRITTEN and not kwargs:
        return WRITTEN[target](*args)
    assert isinstance(target, torch._ops.OpOverload), f"{target} can't be written"
    space = "aten" if target.namespace == "aten" else f"torch.ops.{target.namespace}"
    return call(f"{space}.{target.__name__.removesuffix('.default')}", args, kwargs)


def _cut(of: GlobalIndex | Places) -> dict[str, Any]:
    whole = of.whole if isinstance(of, GlobalIndex) else of.sizes
    return {"whole": whole, "cut": tuple(group.axes for group in of.groups)}


def _sum_gradients(module: ReduceGradients, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    return call("rank.sum_gradients", args[0], {**kwargs, "over": module.axes})


def _batch_norm(module: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    return call("rank.batch_norm", args, {**kwargs, "samples": module.samples, "channels": module.channels})


def _dropout(module: Dropout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    return call("rank.dropout", args, {**kwargs, "salt": module.salt, **_cut(module.index)})


def _uniform(module: Uniform, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    return call("rank.uniform", (module.shape, module.dtype),
                {"seed": kwargs["seed"], "salt": module.salt, **_cut(module.index)})


def _attention(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    return call("rank.attention", args, {**kwargs, "salt": module.salt, **_cut(module.index)})


def _embedding(module: Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    return call("rank.embedding", args, {**kwargs, **_cut(module.places)})


def _cross_entropy(module: CrossEntropy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    name = next(name for name, plain in PLAIN.items() if plain is module.plain)
    return call(f"rank.{name}", args, {**kwargs, "rows": module.rows, "classes": module.classes, **_cut(module.places)})


def _linear_cross_entropy(module: LinearCrossEntropy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Text:
    return call("rank.linear_cross_entropy", args,
                {**kwargs, "rows": module.rows, "classes": module.classes, **_cut(module.places)})


MODULES: dict[type[nn.Module], Callable[..., Text]] = {
    ReduceGradients: _sum_gradients,
    BatchNorm: _batch_norm,
    Dropout: _dropout,
    Uniform: _uniform,
    Attention: _attention,
    Embedding: _embedding,
    CrossEntropy: _cross_entropy,
    LinearCrossEntropy: _linear_cross_entropy,
}
"""What runs in place of ops, reshards aside, as calls of `Rank`: (module, its arguments) -> text."""
