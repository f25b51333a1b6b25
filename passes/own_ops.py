"""Ops of the project's own that stand in programs. What they do as they are is their plain form, on whole tensors; what
runs in a plan is put in their place when it is lowered.

    linear_cross_entropy(hidden (T, D), target (T), weight (C, D), reduction, ignore_index, bias (C) or none, dtype)

is the cross entropy of hidden @ weight.T + bias, in `dtype` or that of hidden; a loss's `reduction` makes it a sum or a
mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_REDUCTIONS = ("none", "mean", "sum")


def _linear_cross_entropy(hidden: Tensor, target: Tensor, weight: Tensor, reduction: int = 1, ignore_index: int = -100,
                          bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(dtype or hidden.dtype), target, ignore_index=ignore_index,
                           reduction=_REDUCTIONS[reduction])


_LIBRARY.define("linear_cross_entropy(Tensor hidden, Tensor target, Tensor weight, int reduction=1, "
                "int ignore_index=-100, Tensor? bias=None, ScalarType? dtype=None) -> Tensor")
_LIBRARY.impl("linear_cross_entropy", _linear_cross_entropy, "CompositeImplicitAutograd")
LINEAR_CROSS_ENTROPY = torch.ops.autopar.linear_cross_entropy.default
