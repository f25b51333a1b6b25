"""Parameters at rest: DTensors in the shape that is stored, and their way to and from plain names and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from autopar.codegen import private
from autopar.codegen.kept import once
from autopar.core.mesh import Mesh
from autopar.passes.strategies import Storage, gather_dim

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """How one parameter rests: plain `shape`, stored as `dims` (positions of flat factors of `sizes`)."""

    name: str
    shape: Shape
    dims: tuple[tuple[int, ...], ...]
    sizes: Shape
    storage: Storage

    @property
    def stored_shape(self) -> Shape:
        """The shape it is stored in, which depends on the model alone."""
        return tuple(math.prod(self.sizes[i] for i in dim) for dim in self.dims)

    def placement(self, axis: int) -> Placement:
        """What `axis` does to it at rest, gathering aside."""
        state = self.storage.states[axis]
        if not isinstance(state, int):
            return Replicate()
        return Shard(next(d for d, dim in enumerate(self.dims) if state in dim))

    def used_shape(self, mesh: Mesh) -> Shape:
        """The local shape it is used in, gathered where it is."""
        cut = [axis for axis in mesh.axes if isinstance(self.storage.states[axis], int)]
        return tuple(size // mesh.extent(tuple(a for a in cut if self.placement(a) == Shard(dim)))
                     for dim, size in enumerate(self.stored_shape))

    def gather_dim(self, mesh: Mesh) -> int:
        """The stored dim that is sharded over the gathered axes."""
        found = gather_dim(self.dims, self.sizes, self.storage, mesh)
        assert found is not None, f"{self.name} has no dim to gather {self.storage} over {mesh}"
        return found


def device_mesh(mesh: Mesh, kind: str) -> DeviceMesh:
    """The torch mesh of `mesh`, its axes named a0, a1, …; collective."""
    names = tuple(f"a{axis}" for axis in mesh.axes)
    return once(("mesh", kind, mesh), lambda: DeviceMesh(kind, torch.tensor(mesh.devices).reshape(mesh.shape),
                                                         mesh_dim_names=names))


def submesh(mesh: DeviceMesh, axes: tuple[int, ...]) -> DeviceMesh:
    """The part of `mesh` along `axes`."""
    return mesh if len(axes) == mesh.ndim else mesh[tuple(f"a{axis}" for axis in axes)]


def at_rest(full: Tensor, stored: Stored, mesh: DeviceMesh, requires_grad: bool) -> nn.Parameter:
    """The parameter sharded on all but its gathered axes, which FSDP2 takes care of."""
    axes = tuple(a for a in range(mesh.ndim) if a not in stored.storage.gathered)
    value = full.detach().reshape(stored.stored_shape)
    if axes:
        value = distribute_tensor(value, submesh(mesh, axes), [stored.placement(a) for a in axes], src_data_rank=None)
    return nn.Parameter(value, requires_grad=requires_grad)


def whole_everywhere(parameter: nn.Parameter, kind: str) -> nn.Parameter:
    """The parameter as a DTensor of the same storage, replicated over all ranks, which run on devices of `kind`."""
    world = once(("world", kind), lambda: DeviceMesh(kind, list(range(dist.get_world_size()))))
    whole = DTensor.from_local(parameter.detach(), world, [Replicate()], run_check=False)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


class _Locals(torch.autograd.Function):
    """The local tensors of DTensors, together: one node of autograd's graph where `to_local` makes one for each."""

    @staticmethod
    def forward(ctx: Any, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.specs = tuple(map(private.spec_of, parameters))
        return tuple(parameter.to_local().detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[DTensor | None, ...]:
        return tuple(None if grad is None else private.distributed(grad.contiguous(), spec)
                     for grad, spec in zip(grads, ctx.specs, strict=True))


def locals_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each, differentiable."""
    live = torch.is_grad_enabled()
    trained = [p for p in parameters if live and isinstance(p, DTensor) and p.requires_grad]
    parts = iter(_Locals.apply(*trained) if trained else ())  # type: ignore[no-untyped-call]
    return [p if not isinstance(p, DTensor) else next(parts) if live and p.requires_grad else p.to_local()
            for p in parameters]


def to_plain(parameter: Tensor, stored: Stored) -> Tensor:
    """The parameter in its plain shape: a DTensor where it was one, whole on axes that shard inside a merged dim."""
    if stored.stored_shape == stored.shape or not isinstance(parameter, DTensor):
        return parameter.detach().reshape(stored.shape) if not isinstance(parameter, DTensor) else parameter.detach()
    keep = {d: _plain_dim(d, stored) for d in range(len(stored.dims))}
    placements = [Shard(keep[p.dim]) if isinstance(p, Shard) and keep[p.dim] is not None else Replicate()  # type: ignore[arg-type]
                  for p in parameter.placements]
    before = [p if isinstance(q, Shard) else Replicate() for p, q in zip(parameter.placements, placements, strict=True)]
    whole = parameter.redistribute(placements=before).to_local().detach()
    shape = list(stored.shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            shape[placement.dim] = -1
            assert axis < parameter.device_mesh.ndim
    return DTensor.from_local(whole.reshape(shape), parameter.device_mesh, placements, run_check=False,
                              shape=torch.Size(stored.shape), stride=_contiguous(stored.shape))


def _plain_dim(dim: int, stored: Stored) -> int | None:
    """The plain dim that stored dim `dim` is by itself, None where several make one."""
    before, place = math.prod(stored.stored_shape[:dim]), 1
    for i, size in enumerate(stored.shape):
        if place == before and size == stored.stored_shape[dim]:
            return i
        place *= size
    return None


def _contiguous(shape: Shape) -> Shape:
    return tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))


def load_plain(parameter: Tensor, stored: Stored, value: Tensor) -> None:
    """Copy `value`, whole or a DTensor in the plain shape, into the parameter; only this rank's part is moved and cast.
    """
    full = value.full_tensor() if isinstance(value, DTensor) else value
    full = full.detach().reshape(stored.stored_shape)
    part, place = own_part(full, parameter), locals_of([parameter.detach()])[0]
    assert part.shape == place.shape, f"{stored.name}: the part is {part.shape}, its place {place.shape}"
    place.copy_(part)


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full` that this rank holds of a tensor which is laid out as `like` is; a view."""
    if not isinstance(like, DTensor):
        return full
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = full.chunk(like.device_mesh.size(axis), placement.dim)
            mine = like.device_mesh.get_local_rank(axis)
            full = parts[mine] if mine < len(parts) else full.narrow(placement.dim, 0, 0)
    return full
