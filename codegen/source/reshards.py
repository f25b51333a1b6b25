"""Reshards as calls of collectives on the dims of the tensor as it is, where its refined dims need not be seen."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from autopar.codegen.collectives import Reshard
from autopar.codegen.source.ops import Text, call, op_text
from autopar.core.reshard import Primitive, Step

aten = torch.ops.aten
Shape = tuple[int, ...]
DIMS: dict[Primitive, tuple[str, ...]] = {
    "all_gather": ("dim",), "reduce_scatter": ("dim",), "slice": ("dim",), "pad": ("dim",),
    "all_to_all": ("source", "target"), "all_reduce": (), "mask": (), "identity": (),
}
"""The dims that a primitive is told."""


def reshard_text(module: Reshard, x: Text, shape: Shape, counts: tuple[int, ...], differentiable: bool) -> Text:
    """The steps on `x` of local `shape`, whose dims are of `counts` refined dims each, and what reshapes they need."""
    steps = [(s, g.size, before) for s, g, before in zip(module.steps, module.groups, module.shapes, strict=False)]
    moving = [(step, before) for step, size, before in steps if size > 1]
    plain = shape == _joined(module.shapes[0], counts) and all(_outermost(*each, counts) for each in moving)
    text = x if plain or shape == module.shapes[0] else _reshaped(x, module.shapes[0])
    for step, _ in moving:
        dims = [state for state in (step.source, step.target) if isinstance(state, int)]
        dims = [_dim(d, counts) for d in dims] if plain else dims
        told: dict[str, Any] = {"over": step.axes, **dict(zip(DIMS[step.forward], dims, strict=False))}
        told |= {"backward": step.backward} if differentiable else {}
        text = call(f"rank.{step.forward}", (text,), told)
    last = _joined(module.shapes[-1], counts) if plain else module.shapes[-1]
    return text if last == module.final_shape else _reshaped(text, module.final_shape)


def _reshaped(x: Text, shape: Shape) -> Text:
    return op_text(aten.reshape.default, (x, list(shape)), {})


def _joined(refined: Shape, counts: tuple[int, ...]) -> Shape:
    sizes = iter(refined)
    return tuple(math.prod(next(sizes) for _ in range(count)) for count in counts)


def _dim(refined: int, counts: tuple[int, ...]) -> int:
    """The dim that a refined dim is in."""
    return next(d for d, end in enumerate(itertools.accumulate(counts)) if refined < end)


def _outermost(step: Step, before: Shape, counts: tuple[int, ...]) -> bool:
    """Whether a step on refined dims is one on the dims they are in: nothing lies further out in these, so that parts
    are contiguous."""
    starts = [0, *itertools.accumulate(counts)]
    dims = [state for state in (step.source, step.target) if isinstance(state, int)]
    own = [_dim(d, counts) for d in dims]
    outside = (math.prod(before[starts[place]:d]) for place, d in zip(own, dims, strict=True))
    return len(set(own)) == len(own) and all(size == 1 for size in outside)
