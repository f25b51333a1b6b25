"""Gradients of gradients are refused: what ranks exchange in a backward is not part of autograd's graph."""

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
