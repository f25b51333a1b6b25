"""Backwards that are refused: of gradients, as what ranks exchange is not in autograd's graph, and in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.core.errors import AutoparError


class _FirstOrder(torch.autograd.Function):
    """A tensor as it is; its backward must not be recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise AutoparError("a backward with create_graph=True is asked for, which would leave out what other ranks "
                               "bring to gradients of gradients; compute such terms with the plain model")
        return gradient


def first_order(x: Tensor) -> Tensor:
    """`x`, whose gradients can be taken once. Raises AutoparError in a backward with create_graph=True."""
    if not x.requires_grad:
        return x
    once: Tensor = _FirstOrder.apply(x)  # type: ignore[no-untyped-call]
    return once


class _NoBackward(torch.autograd.Function):
    """A tensor as it is; it has no backward, and `anchor` makes that be told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        raise AutoparError("a backward is asked for of what the model returned in eval mode, whose program has none; "
                           "call model.train() first, on a model whose dropout rates are 0 if it is to have none")


def no_backward(x: Tensor) -> Tensor:
    """`x`, which needs a gradient as the plain model's would; a backward raises AutoparError."""
    if not x.is_floating_point():
        return x
    refused: Tensor = _NoBackward.apply(x, torch.empty((), requires_grad=True))  # type: ignore[no-untyped-call]
    return refused
