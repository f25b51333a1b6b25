"""Rows of logits, turned in place into the gradients of their cross entropy.

    logits (T, W), whose first C columns are classes and whose others are padding; rows contiguous, any stride
    place  (T) int64: each row's class, ELSEWHERE where it is none of these, IGNORED where the row does not count
    total, found (T), fp32 at least: the logarithm of the sum of exponentials, and the logit at `place`
    scale (), as wide as those: what gradients are multiplied by

A row's loss is total - found, its gradient exp(logits - total), less 1 at its class, times the scale; zero in the
padding and where the row does not count. The arithmetic is fp32 at least; bytes are those of one pass that reads logits
and, for gradients, of one that writes them: the second reading of a row finds it in the cache. On GPUs a class that
the vocabulary does not have makes its row's loss NaN, elsewhere it is refused by RuntimeError.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ELSEWHERE, IGNORED = -1, -2
"""What a row has for a class that other ranks have, and where it does not count."""


@dataclass(frozen=True, slots=True)
class Rows:
    """`sums(logits, place, classes)` gives total and found, `slopes(logits, place, total, scale, classes)` writes the
    gradients over the logits, and `both(logits, place, scale, classes)` does one after the other."""

    sums: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    slopes: Callable[[Tensor, Tensor, Tensor, Tensor, int], None]
    both: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype` are taken in."""
    return dtype if dtype.itemsize > 4 else torch.float32


def reference_sums(logits: Tensor, place: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Total and found of every row; found is of no use where `place` is no class."""
    x = logits[:, :classes].to(wide(logits.dtype))
    return torch.logsumexp(x, 1), x.gather(1, place.clamp(min=0).unsqueeze(1)).squeeze(1)


def reference_slopes(logits: Tensor, place: Tensor, total: Tensor, scale: Tensor, classes: int) -> None:
    """Write the gradients over the logits."""
    slope = (logits[:, :classes].to(wide(logits.dtype)) - total.unsqueeze(1)).exp_()
    slope.scatter_add_(1, place.clamp(min=0).unsqueeze(1), -(place >= 0).to(slope.dtype).unsqueeze(1))
    logits[:, :classes] = slope.mul_(scale).masked_fill_((place == IGNORED).unsqueeze(1), 0.0)
    logits[:, classes:] = 0.0


def reference_both(logits: Tensor, place: Tensor, scale: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Total and found; gradients are written over the logits."""
    total, found = reference_sums(logits, place, classes)
    reference_slopes(logits, place, total, scale, classes)
    return total, found


REFERENCE = Rows(reference_sums, reference_slopes, reference_both)


@functools.cache
def triton_rows() -> Rows | None:
    """The kernels, where there is Triton. It is loaded here: planning does without."""
    if importlib.util.find_spec("triton") is None:
        return None
    from autopar.kernels import triton_rows

    return triton_rows.ROWS


def rows_of(logits: Tensor) -> Rows:
    """What works on `logits`: kernels on GPUs where there is Triton, but for fp64, the reference elsewhere."""
    kernels = triton_rows() if logits.is_cuda and logits.dtype.itemsize <= 4 else None
    return REFERENCE if kernels is None else kernels
