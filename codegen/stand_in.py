"""What stands for a collective where a program runs on one rank without the others: it sends nothing.

The result has the right shape, its contents mean nothing; to compilers the op is opaque as a collective is, so that
what is sent is still made and what is received is still read. Programs lowered for `executable.offline` come here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("autopar::stand_in", mutates_args=())
def _stand_in(x: Tensor, shape: Sequence[int]) -> Tensor:
    # on CPUs what memory happens to hold may be denormal numbers, which are slow to compute with
    return x.new_empty(shape) if x.is_cuda else x.new_zeros(shape)


@_stand_in.register_fake
def _(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


def received(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of `shape` in place of what a collective makes of `x`."""
    found: Tensor = _stand_in(x, list(shape))
    return found
