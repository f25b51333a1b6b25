"""Parameters and buffers of a written program: as they rest between steps, and gathered while they are used."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from autopar.codegen.communicator import Axes
from autopar.codegen.primitives import slice_
from autopar.codegen.source.gather import Bucket, Gather, Member, Released, part
from autopar.codegen.source.names import word
from autopar.codegen.source.rank import Rank
from autopar.core.spec import parse

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Resting:
    """How a parameter of the plain model's `shape` rests: in the shape `stored` if that is another, cut as `spec`.

    Over the axes `gathered` it is cut on `dim` besides, and gathered for use: `kept` until the backward, or else again
    for it. Only `trained` ones get gradients.
    """

    shape: Shape
    spec: str
    stored: Shape = ()
    gathered: Axes = ()
    dim: int = 0
    kept: bool = False
    trained: bool = True

    @property
    def cut(self) -> tuple[Axes, ...]:
        """The axes over each stored dim, gathered ones aside."""
        return parse(self.spec).dims

    def split(self, full: Tensor, rank: Rank) -> Tensor:
        """This rank's part of the whole tensor."""
        group = rank.communicator.group
        for dim, axes in enumerate(self.cut):
            full = slice_(full, group(axes), dim) if axes else full
        return part(full, self.dim, group(self.gathered)) if self.gathered else full

    def member(self, rank: Rank) -> Member:
        """What it is among those that are gathered with it."""
        extents = [rank.communicator.mesh.extent(axes) for axes in self.cut]
        return Member(tuple(n // parts for n, parts in zip(self.stored or self.shape, extents, strict=True)), self.dim)

    def share(self, rank: Rank) -> float:
        """The inverse of how many ranks hold each element."""
        mesh = rank.communicator.mesh
        return mesh.extent(self.gathered) * math.prod(map(mesh.extent, self.cut)) / mesh.size


@dataclass(eq=False)
class State:
    """This rank's part of every parameter, and every buffer, by the plain model's names.

    Parameters are gathered in `dtype`, where there is one.
    """

    rank: Rank
    parameters: Mapping[str, Resting]
    tensors: dict[str, Tensor]
    dtype: torch.dtype | None = None
    _released: Released = field(default_factory=Released)

    @classmethod
    def of(cls, rank: Rank, parameters: Mapping[str, Resting], buffers: Iterable[str],
           values: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> State:
        """The state with `values`, whole tensors by name."""
        tensors = {name: values(name).to(rank.device, copy=True) for name in buffers}
        for name, resting in parameters.items():
            mine = resting.split(values(name).reshape(resting.stored or resting.shape), rank)
            tensors[name] = mine.to(rank.device, copy=True).contiguous().requires_grad_(resting.trained)
        return cls(rank, parameters, tensors, dtype)

    def block(self, path: str) -> dict[str, str]:
        """The names of all tensors of the module at `path`, by what they are called inside of it."""
        inside = (name.removeprefix(f"{path}.") for name in self.tensors if name.startswith(f"{path}."))
        return {word(inner): f"{path}.{inner}" for inner in inside}

    @contextlib.contextmanager
    def use(self, **names: str) -> Iterator[dict[str, Tensor]]:
        """The tensors called `names`, by keyword, those that rest gathered over axes whole; inside, what autograd keeps
        of these is only where to gather them again, unless they are kept."""
        found = {inner: self.tensors[name] for inner, name in names.items()}
        ways: dict[tuple[Axes, bool, torch.dtype], list[str]] = {}
        for inner, name in names.items():
            resting = self.parameters.get(name)
            if resting is not None and resting.gathered:
                ways.setdefault((resting.gathered, resting.kept, found[inner].dtype), []).append(inner)
        released: list[Tensor] = []
        for (axes, kept, _), words in ways.items():
            bucket = self._bucket(axes, [names[inner] for inner in words])
            whole: tuple[Tensor, ...] = Gather.apply(bucket, *bucket.shards)  # type: ignore[no-untyped-call]
            found.update(zip(words, whole, strict=True))
            if not kept:
                self._released.add(bucket, whole)
                released += whole
        with saved_tensors_hooks(*self._released.hooks):
            yield found
        self._released.drop(tuple(released))

    def _bucket(self, axes: Axes, names: list[str]) -> Bucket:
        members = tuple(self.parameters[name].member(self.rank) for name in names)
        shards = tuple(self.tensors[name] for name in names)
        return Bucket(members, shards, self.rank.communicator.group(axes), self.dtype)

    def gradient_norm(self) -> float:
        """The norm of all gradients together, that of the whole model's; collective."""
        total = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        for name, resting in self.parameters.items():
            grad = self.tensors[name].grad
            if grad is not None:
                total += grad.double().square().sum() * resting.share(self.rank)
        dist.all_reduce(total)
        return math.sqrt(float(total))
