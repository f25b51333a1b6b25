"""Batch norm over a batch that is sharded, with the statistics of the whole.

Sums are taken in fp64, so that the whole's statistics don't depend on how it was cut. One all-reduce forward, one
backward. Source of the backward: Ioffe and Szegedy, "Batch Normalization" (2015), section 3, its sums over all
ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.codegen.communicator import Group
from autopar.codegen.primitives import all_reduce


def _dims(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """(C) as (1, C, 1, …) in the dtype of x."""
    return channels.to(x.dtype).view([1, -1] + [1] * (x.ndim - 2))


def statistics(x: Tensor, group: Group) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance (C) in fp64 over the batch of all ranks, and its number of elements a channel."""
    dims, here = _dims(x), x.numel() // x.shape[1]
    mean = x.sum(dims, dtype=torch.float64) / here
    spread = (x - _wide(mean, x)).square().sum(dims, dtype=torch.float64)
    sums = all_reduce(torch.stack([mean * here, spread + here * mean.square()]), group)
    count = here * group.size
    whole_mean, square = sums[0] / count, sums[1] / count
    return whole_mean, (square - whole_mean.square()).clamp_(min=0.0), count


class Normalize(torch.autograd.Function):
    """(x - mean) / √(variance + eps) · weight + bias, given statistics of x over `count` elements of all ranks.

    x (N/n, C, …) local; weight and bias (C), whose gradients are this rank's partial sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, found: tuple[Tensor, Tensor, int],
                eps: float, group: Group) -> Tensor:
        mean, variance, count = found
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count, ctx.group, ctx.has_bias = count, group, bias is not None
        normal = (x - _wide(mean, x)) * _wide(scale, x)
        if weight is not None:
            normal = normal * _wide(weight, x)
        return normal if bias is None else normal + _wide(bias, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dims = _dims(x)
        normal = (x - _wide(mean, x)) * _wide(scale, x)
        sums = torch.stack([grad.sum(dims, dtype=torch.float64), (grad * normal).sum(dims, dtype=torch.float64)])
        whole = all_reduce(sums, ctx.group) / ctx.count
        centered = grad - _wide(whole[0], x) - normal * _wide(whole[1], x)
        factor = scale if weight is None else scale * weight
        grad_weight = None if weight is None else sums[1].to(weight.dtype)
        grad_bias = sums[0].to(grad.dtype if weight is None else weight.dtype) if ctx.has_bias else None
        return centered * _wide(factor, x), grad_weight, grad_bias, None, None, None
