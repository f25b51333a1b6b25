"""Parameters that are gathered for use: together, in one collective, and again in the backward where they are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopar.codegen.communicator import Group
from autopar.codegen.primitives import all_gather, reduce_scatter

Shape = tuple[int, ...]


def part(full: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of `full` on `dim`, which need not divide: each rank has as many rows, the last ones fewer."""
    size = -(-full.shape[dim] // group.size)
    start = min(group.index * size, full.shape[dim])
    return full.narrow(dim, start, min(size, full.shape[dim] - start))


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of a bucket: the shape it is gathered to, and the dim that its parts are joined on."""

    whole: Shape
    dim: int

    def rows(self, ranks: int) -> int:
        """The rows of one part on `dim`, filled up."""
        return -(-self.whole[self.dim] // ranks)

    def numel(self, ranks: int) -> int:
        """The elements of one part, filled up."""
        return self.rows(ranks) * (math.prod(self.whole) // self.whole[self.dim])

    def packed(self, rows: Tensor, count: int) -> Tensor:
        """`count` rows on `dim`, filled up with zeros, as one flat tensor."""
        first = rows.movedim(self.dim, 0)
        return torch.cat([first, first.new_zeros(count - first.shape[0], *first.shape[1:])]).reshape(-1)

    def unpacked(self, flat: Tensor, count: int) -> Tensor:
        """The inverse: the first `count` rows of a flat tensor, on `dim`."""
        rest = [size for i, size in enumerate(self.whole) if i != self.dim]
        return flat.reshape(-1, *rest)[:count].movedim(0, self.dim).contiguous()


@dataclass(eq=False)
class Bucket:
    """Parameters that are gathered over `group` together, in `dtype` where one is given; gradients are then summed in
    fp32."""

    members: tuple[Member, ...]
    shards: tuple[Tensor, ...]
    group: Group
    dtype: torch.dtype | None
    _again: list[Tensor] = field(default_factory=list)

    def whole(self) -> list[Tensor]:
        """All parameters gathered."""
        n, dtype = self.group.size, self.dtype or self.shards[0].dtype
        flat = torch.cat([m.packed(s.detach().to(dtype), m.rows(n))
                          for m, s in zip(self.members, self.shards, strict=True)])
        joined = all_gather(flat, self.group, 0).reshape(n, -1)
        parts = joined.split([m.numel(n) for m in self.members], 1)
        return [m.unpacked(p, m.whole[m.dim]) for m, p in zip(self.members, parts, strict=True)]

    def again(self) -> list[Tensor]:
        """All parameters gathered for the backward, until gradients are there."""
        self._again = self._again or self.whole()
        return self._again

    def scattered(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        """This rank's parts of the sums of all ranks' gradients."""
        n, dtype = self.group.size, torch.float32 if self.dtype else self.shards[0].dtype
        self._again = []
        full = torch.cat([m.packed(g.to(dtype), n * m.rows(n)).reshape(n, -1)
                          for m, g in zip(self.members, grads, strict=True)], 1)
        parts = reduce_scatter(full.reshape(-1), self.group, 0).split([m.numel(n) for m in self.members])
        return [m.unpacked(p, s.shape[m.dim]).to(s.dtype)
                for m, p, s in zip(self.members, parts, self.shards, strict=True)]


class Gather(torch.autograd.Function):
    """The shards of a bucket gathered; their gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, bucket: Bucket, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.bucket = bucket
        return tuple(bucket.whole())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.bucket.scattered(grads)


@dataclass(frozen=True, slots=True)
class Place:
    """A view of a gathered parameter, to be found again once it is gathered again."""

    bucket: Bucket
    index: int
    size: Shape
    stride: Shape
    offset: int

    def found(self) -> Tensor:
        """The view."""
        return self.bucket.again()[self.index].as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class Released:
    """What autograd keeps for the backward instead of gathered parameters: where to find them again."""

    places: dict[int, tuple[Bucket, int]] = field(default_factory=dict)

    def add(self, bucket: Bucket, tensors: tuple[Tensor, ...]) -> None:
        """From here on `tensors`, gathered of `bucket`, are not kept."""
        self.places.update((_storage(x), (bucket, i)) for i, x in enumerate(tensors) if x.numel())

    def drop(self, tensors: tuple[Tensor, ...]) -> None:
        """Nothing that autograd keeps later can be one of `tensors`."""
        for x in tensors:
            self.places.pop(_storage(x), None)

    @property
    def hooks(self) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """What autograd calls with a tensor to keep, and with what it has kept."""
        return self._kept, lambda kept: kept.found() if isinstance(kept, Place) else kept

    def _kept(self, x: Tensor) -> Any:
        found = self.places.get(_storage(x))
        if found is None or x.dtype != (found[0].dtype or found[0].shards[0].dtype):
            return x
        return Place(*found, tuple(x.shape), x.stride(), int(x.storage_offset()))


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
