"""What a reshard does to this rank's tensor: one function a primitive of `core.reshard`.

Shapes: n is the size of the group; x has the value's refined dims (one a factor), so that the n parts of a dim are
contiguous in it. Any dtype that the backend carries, and booleans. Results are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autopar.codegen import private
from autopar.codegen.communicator import Group
from autopar.core.reshard import Primitive
from autopar.core.spec import State


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' `x`; of booleans, whether any is set."""
    return private.all_reduce(_countable(x), group.name).to(x.dtype) if group.size > 1 else x


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part on `dim` of the sum of all ranks' `x`."""
    if group.size == 1:
        return _alone(x)
    parts = _arranged(_split(_countable(x), group, dim), group.parts).contiguous()
    return private.reduce_scatter(parts, group.size, group.name).squeeze(0).to(x.dtype)


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' parts joined on `dim`."""
    if group.size == 1:
        return _alone(x)
    parts = private.all_gather(x.contiguous().unsqueeze(0), group.size, group.name)
    return _joined(_arranged(parts, group.order), dim)


def all_to_all(x: Tensor, group: Group, source: int, target: int) -> Tensor:
    """From the part on `source` of the whole to the part on `target`."""
    if group.size == 1:
        return _alone(x)
    parts = _arranged(_split(x, group, target), group.parts).contiguous()
    return _joined(_arranged(private.all_to_all(parts, group.size, group.name), group.order), source)


def slice_(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part on `dim` of the whole `x`."""
    part = x.shape[dim] // group.size
    return x.narrow(dim, group.index * part, part).contiguous()


def mask(x: Tensor, group: Group) -> Tensor:
    """`x` on index 0 and zeros elsewhere, which sum to `x`."""
    return private.only_if(group.index == 0, x)


def pad(x: Tensor, group: Group, dim: int) -> Tensor:
    """Zeros of the whole's shape with `x` as this rank's part on `dim`; all ranks' sum to the whole."""
    part, after = x.shape[dim], group.size - 1 - group.index
    return torch.constant_pad_nd(x, [0, 0] * (x.ndim - 1 - dim) + [group.index * part, after * part]).contiguous()


def identity(x: Tensor, group: Group) -> Tensor:
    """`x` itself."""
    return x


LOCAL: dict[Primitive, Callable[..., Tensor]] = {
    "identity": identity,
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "all_gather": all_gather,
    "all_to_all": all_to_all,
    "slice": slice_,
    "mask": mask,
    "pad": pad,
}
"""(local tensor, group, the dims sharded before and after) -> local tensor."""


def _alone(x: Tensor) -> Tensor:
    """What a group of one rank, which torch has no name for, makes of `x`."""
    return private.unaliased(x.contiguous())


def _countable(x: Tensor) -> Tensor:
    """gloo sums booleans byte by byte and leaves bytes that are neither 0 nor 1."""
    return x.to(torch.int32) if x.dtype == torch.bool else x


def _split(x: Tensor, group: Group, dim: int) -> Tensor:
    """(n, …): the parts of `x` on `dim`."""
    parts: Tensor = x.unflatten(dim, (group.size, x.shape[dim] // group.size))
    return parts.movedim(dim, 0)


def _joined(parts: Tensor, dim: int) -> Tensor:
    """The inverse of `_split`, contiguous."""
    return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _arranged(parts: Tensor, order: tuple[int, ...]) -> Tensor:
    """Row i is `parts[order[i]]`; nothing is copied when that is row i already."""
    return parts if order == tuple(range(len(order))) else torch.stack([parts[i] for i in order])


def run(primitive: Primitive, x: Tensor, group: Group, before: State, after: State) -> Tensor:
    """`x`, on whose whole the group's axes are in state `before`, brought to state `after` by `primitive`."""
    return LOCAL[primitive](x, group, *(state for state in (before, after) if isinstance(state, int)))
