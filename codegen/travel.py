"""Parameters on their way: gathered just ahead of the segments that use them, their gradients summed on the way back.

All parameters of a unit go in one collective, in the dtype that the segments compute in; gradients are summed in fp32.
Collectives are begun, and waited for where what they bring is needed: between the two the device computes.

A gathered parameter is one tensor for good, whose memory is given back while it is away, so that what autograd kept of
it is there again once it has been gathered again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.codegen import private
from autopar.codegen.communicator import Group
from autopar.codegen.groups import ParameterGroup

Shape = tuple[int, ...]
ALIGNED = 16
"""The elements that places in a buffer are a multiple of: kernels copy 16 bytes at once."""


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of a unit: the shape it is gathered to, the dim that its parts are joined on, in how many parts."""

    name: str
    whole: Shape
    dim: int
    parts: int

    @property
    def part(self) -> Shape:
        """The shape of a part; where the dim does not divide the last ones hold less, and are sent filled up."""
        rows = -(-self.whole[self.dim] // self.parts)
        return (*self.whole[:self.dim], rows, *self.whole[self.dim + 1:])

    @property
    def divides(self) -> bool:
        """Whether all parts hold as much."""
        return self.whole[self.dim] % self.parts == 0

    @property
    def length(self) -> int:
        """The elements of its place in a buffer of one part."""
        return -(-math.prod(self.part) // ALIGNED) * ALIGNED

    def stacked(self, whole: Tensor) -> Tensor:
        """(parts, …): a whole one that divides, seen by its parts."""
        apart: Tensor = whole.unflatten(self.dim, (self.parts, self.part[self.dim]))
        return apart.movedim(self.dim, 0)

    def joined(self, parts: Tensor) -> Tensor:
        """The inverse, without what was filled up."""
        return parts.movedim(0, self.dim).flatten(self.dim, self.dim + 1).narrow(self.dim, 0, self.whole[self.dim])

    def filled(self, whole: Tensor) -> Tensor:
        """A whole one with zeros up to where it divides."""
        shape = list(self.whole)
        shape[self.dim] = self.part[self.dim] * self.parts - self.whole[self.dim]
        return torch.cat([whole, whole.new_zeros(shape)], self.dim)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where members lie, one after the other, in a buffer (parts, length) or in one part of it."""

    members: tuple[Member, ...]

    @property
    def length(self) -> int:
        """Elements of a part."""
        return sum(member.length for member in self.members)

    def places(self, buffer: Tensor) -> Iterator[tuple[Member, Tensor]]:
        """Each member with its place in (length) or (parts, length), in the shape of a part behind the leading dims."""
        start = 0
        for member in self.members:
            place = buffer.narrow(-1, start, math.prod(member.part))
            yield member, place.unflatten(-1, member.part) if member.part else place.squeeze(-1)
            start += member.length


def local_of(parameter: Tensor) -> Tensor:
    """This rank's part, in the memory of the parameter."""
    return private.local_of(parameter).detach() if isinstance(parameter, DTensor) else parameter.detach()


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered over `group` together, in `dtype`; `kept` ones stay between forward and backward.

    `sums` are in `sum_dtype`.
    """

    holder: ParameterGroup
    members: tuple[Member, ...]
    group: Group
    dtype: torch.dtype
    sum_dtype: torch.dtype
    kept: bool
    wholes: dict[str, Tensor] = field(default_factory=dict)
    here: bool = False
    _coming: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        """Send for the parameters, unless they are here or on their way."""
        if self.here or self._coming:
            return
        packing = Packing(self.members)
        own = [local_of(self.holder.parameter(member.name)) for member in self.members]
        buffer = torch.empty(packing.length, dtype=self.dtype, device=own[0].device)
        places = [place.narrow(m.dim, 0, x.shape[m.dim]) for (m, place), x in zip(packing.places(buffer), own,
                                                                                  strict=True)]
        private.copy_all(places, own)
        self._coming.append(private.start_all_gather(buffer, self.group.size, self.group.name))

    def arrive(self) -> Mapping[str, Tensor]:
        """The whole parameters by name, leaves of autograd's graph."""
        if not self.here:
            self.begin()
            full = private.finish(self._coming.pop()).view(self.group.size, -1)
            if self.group.order != tuple(range(self.group.size)):
                full = full[list(self.group.order)]
            self._unpack(full)
            self.here = True
        for member in self.members:
            self.wholes[member.name].requires_grad_(self.holder.parameter(member.name).requires_grad)
        return self.wholes

    def _unpack(self, full: Tensor) -> None:
        targets, sources = [], []
        for member, place in Packing(self.members).places(full):
            if member.name not in self.wholes:
                self.wholes[member.name] = torch.empty(member.whole, dtype=self.dtype, device=full.device)
            whole = self.wholes[member.name]
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
            value = whole.data  # whose version is its own: what was kept of `whole` is still what it was
            targets.append(member.stacked(value) if member.divides else value)
            sources.append(place if member.divides else member.joined(place))
        private.copy_all(targets, sources)

    def leave(self) -> None:
        """Give the memory of whole parameters back."""
        self._coming.clear()
        self.here = False
        for whole in self.wholes.values():
            whole.untyped_storage().resize_(0)

    def send(self, grads: Mapping[str, Tensor], over: Group, into: dict[str, list[Tensor]]) -> Iterator[None]:
        """Sum gradients over the group and `over`, and add this rank's parts to `into`, by name.

        Each step but the first waits for what the one before has begun.
        """
        packing = Packing(tuple(member for member in self.members if member.name in grads))
        buffer = self._packed(packing, grads)
        del grads  # the caller has let go of them, and so they are freed while their sums are under way
        started = private.start_reduce_scatter(buffer, self.group.size, self.group.name)
        del buffer
        yield
        part = private.finish(started).view(-1)
        del started
        if over.size > 1:
            started = private.start_all_reduce(part, over.name)
            yield
            part = private.finish(started)
        for member, place in packing.places(part):
            own = local_of(self.holder.parameter(member.name))
            into.setdefault(member.name, []).append(place.narrow(member.dim, 0, own.shape[member.dim]).to(own.dtype))

    def _packed(self, packing: Packing, grads: Mapping[str, Tensor]) -> Tensor:
        """(parts, length) in the order of the group's ranks."""
        some = next(iter(grads.values()))
        buffer = torch.empty(self.group.size, packing.length, dtype=self.sum_dtype, device=some.device)
        targets, sources = [], []
        for member, place in packing.places(buffer):
            grad = grads[member.name]
            targets.append(place)
            sources.append(member.stacked(grad if member.divides else member.filled(grad)))
        private.copy_all(targets, sources)
        if self.group.parts != tuple(range(self.group.size)):
            buffer = buffer[list(self.group.parts)]
        return buffer


def send_whole(grads: Mapping[str, Tensor], over: Group, into: dict[str, list[Tensor]]) -> Iterator[None]:
    """Sum gradients of parameters that rest as they are used over `over`, as `Unit.send` does; one collective a dtype.
    """
    if over.size == 1:
        for name, grad in grads.items():
            into.setdefault(name, []).append(grad)
        return
    by_dtype: dict[torch.dtype, dict[str, torch.Size]] = {}
    for name, grad in grads.items():
        by_dtype.setdefault(grad.dtype, {})[name] = grad.shape
    started = [private.start_all_reduce(torch.cat([grads[name].reshape(-1) for name in shapes]), over.name)
               for shapes in by_dtype.values()]
    del grads
    if not started:
        return
    yield
    for shapes, bucket in zip(by_dtype.values(), started, strict=True):
        parts = private.finish(bucket).split([shape.numel() for shape in shapes.values()])
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            into.setdefault(name, []).append(part.view(shape))
