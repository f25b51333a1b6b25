"""The one module that touches torch's private parts; each use says why, and how torch 2.11 and 2.13 differ.

Collectives are the ops of `_c10d_functional`: unlike `torch.distributed.all_reduce` and its kin they return a new
tensor, so `torch.compile` can trace, reorder and plan memory around them.

- The ops are called rather than the wrappers in `_functional_collectives`: the wrappers return a lazily waiting
  tensor subclass in eager mode, and 2.13 renames them (`all_gather_tensor` to `all_gather_single`, the old name warns).
- A group goes in by name: 2.11 declares the argument `str`, 2.13 takes a name or a ProcessGroup.
- The ops bring gradient formulas of their own in both versions. They know nothing of partial gradients, so callers
  wrap every use in an autograd function.
- `_are_we_tracing` is the one test that sees Dynamo, export and a bare AOTAutograd alike; the same in both versions.
- Importing `_functional_collectives` registers the ops' fake kernels; neither version does so with
  `torch.distributed`, and tracing without them fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives

_OPS = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of `x` over the ranks of `group`, in the shape of `x`."""
    return _wait(_OPS.all_reduce(x, "sum", group))


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """The contiguous `x` of every rank, concatenated on dim 0 in rank order: (n, …) to (ranks * n, …)."""
    return _wait(_OPS.all_gather_into_tensor(x, ranks, group))


def reduce_scatter(x: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's part on dim 0 of the sum of the contiguous `x`: (ranks * n, …) to (n, …)."""
    return _wait(_OPS.reduce_scatter_tensor(x, "sum", ranks, group))


def all_to_all(x: Tensor, ranks: int, group: str) -> Tensor:
    """Row r of the contiguous `x` (ranks, …) goes to rank r; row r of the result came from rank r."""
    return _wait(_OPS.all_to_all_single(x, [1] * ranks, [1] * ranks, group))


def unaliased(x: Tensor) -> Tensor:
    """`x`, while tracing a copy.

    What an autograd function returns must not share its input's memory in a traced program: AOTAutograd rebuilds
    outputs that alias inputs as views, and Dynamo on 2.11 does so with narrowed ones, both without the function's
    backward and without a word. Inductor drops the copies that turn out to be no output.
    """
    return x.clone() if _functional_collectives._are_we_tracing() else x


def _wait(x: Any) -> Tensor:
    finished: Tensor = _OPS.wait_tensor(x)
    return finished
