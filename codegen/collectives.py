"""Reshards and gradient sums as differentiable modules."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from autopar.codegen import private
from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.primitives import all_reduce, run
from autopar.core.reshard import Step

Shape = tuple[int, ...]


class _Convert(torch.autograd.Function):
    """One step; the gradient takes the dual primitive between the same dims, the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Step, group: Group) -> Tensor:
        ctx.step, ctx.group = step, group
        return private.unaliased(run(step.forward, x, group, step.source, step.target))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return run(ctx.step.backward, grad, ctx.group, ctx.step.target, ctx.step.source), None, None


def convert(x: Tensor, step: Step, group: Group) -> Tensor:
    """`x` after `step`; differentiable when it needs to be."""
    if torch.is_grad_enabled() and x.requires_grad:
        converted: Tensor = _Convert.apply(x, step, group)  # type: ignore[no-untyped-call]
        return converted
    return run(step.forward, x, group, step.source, step.target)


def shape_after(step: Step, shape: Shape, n: int) -> Shape:
    """The refined local shape that `step` over n ranks leaves of `shape`."""
    grown = [size * n if dim == step.source else size for dim, size in enumerate(shape)]
    assert not isinstance(step.target, int) or grown[step.target] % n == 0, f"{step}: {shape} does not divide by {n}"
    return tuple(size // n if dim == step.target else size for dim, size in enumerate(grown))


class Reshard(nn.Module):
    """A change of spec: `steps` one after another, on a tensor seen in its refined dims.

    `shapes` are the refined local shapes before each step and after the last, `nbytes` the bytes of the larger of
    each step's two tensors, as in `core.reshard.Price`.
    """

    def __init__(self, steps: tuple[Step, ...], shape: Shape, final_shape: Shape, dtype: torch.dtype,
                 communicator: Communicator) -> None:
        super().__init__()
        self.steps, self.final_shape, self.dtype = steps, final_shape, dtype
        self.groups = tuple(communicator.group(step.axes) for step in steps)
        self.shapes: tuple[Shape, ...] = (shape,)
        for step, group in zip(steps, self.groups, strict=True):
            self.shapes += (shape_after(step, self.shapes[-1], group.size),)
        assert math.prod(self.shapes[-1]) == math.prod(final_shape), f"{self.shapes[-1]} is no {final_shape}"
        sizes = [math.prod(local) * dtype.itemsize for local in self.shapes]
        self.nbytes = tuple(map(max, itertools.pairwise(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        """`x` of as many elements as `shapes[0]`; the result has `final_shape`."""
        assert x.dtype == self.dtype, f"{self} got {x.dtype}"
        x = x if x.shape == self.shapes[0] else x.reshape(self.shapes[0])
        for step, group in zip(self.steps, self.groups, strict=True):
            x = convert(x, step, group) if group.size > 1 else x
        return x if x.shape == self.final_shape else x.reshape(self.final_shape)

    def extra_repr(self) -> str:
        steps = [f"{step.source}->{step.target} over {step.axes} by {step.forward}, {step.backward}"
                 for step in self.steps]
        return "; ".join([f"{self.dtype} {self.shapes[0]} -> {self.final_shape}", *steps])


class _ReduceGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(map(private.unaliased, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_summed(grads, ctx.group)


def _summed(tensors: tuple[Tensor, ...], group: Group) -> tuple[Tensor, ...]:
    """The sums of `tensors` over the ranks, by one all-reduce a dtype."""
    sums = list(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        bucket = all_reduce(torch.cat([tensors[i].reshape(-1) for i in places]), group)
        for i, part in zip(places, bucket.split([tensors[i].numel() for i in places]), strict=True):
            sums[i] = part.view(tensors[i].shape)
    return tuple(sums)


class ReduceGradients(nn.Module):
    """Tensors as they are, whose gradients are summed over `axes` together once the last has come.

    One collective a dtype; a tensor that got no gradient counts as zeros, so that ranks never wait for each other.
    """

    def __init__(self, axes: tuple[int, ...], communicator: Communicator) -> None:
        super().__init__()
        self.axes, self.group = axes, communicator.group(axes)

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`tensors` unchanged; those that need no gradient take no part in the sum."""
        live = [x for x in tensors if x.requires_grad]
        if self.group.size == 1 or not live or not torch.is_grad_enabled():
            return tensors
        passed = iter(_ReduceGradients.apply(self.group, *live))  # type: ignore[no-untyped-call]
        return tuple(next(passed) if x.requires_grad else x for x in tensors)

    def extra_repr(self) -> str:
        return f"over axes {self.axes}"
