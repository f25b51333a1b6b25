"""The logical grid of devices."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from autopar.core.errors import AutoparError


@dataclass(frozen=True, slots=True)
class Mesh:
    """A grid of `shape`; cell i in row-major order is device `devices[i]` (0, 1, 2, … when omitted)."""

    shape: tuple[int, ...]
    devices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape or any(size < 1 for size in self.shape):
            raise AutoparError(f"mesh {self.shape}: every axis needs at least one device")
        if not self.devices:
            object.__setattr__(self, "devices", tuple(range(math.prod(self.shape))))
        if sorted(set(self.devices)) != sorted(self.devices) or len(self.devices) != self.size:
            raise AutoparError(f"mesh {self} holds {self.size} devices, got {self.devices}: name each device once")

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def axes(self) -> range:
        """The axes, numbered from 0."""
        return range(len(self.shape))

    def extent(self, axes: tuple[int, ...]) -> int:
        """The number of parts that sharding over `axes` makes."""
        return math.prod(self.shape[axis] for axis in axes)

    def coordinate(self, device: int) -> tuple[int, ...]:
        """Where `device` stands on the grid."""
        index, found = self.devices.index(device), []
        for size in reversed(self.shape):
            index, place = divmod(index, size)
            found.append(place)
        return tuple(reversed(found))

    def groups(self, axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The sets of devices that differ only along `axes`, each in row-major order over `axes` ascending."""
        grouped: dict[tuple[int, ...], list[int]] = {}
        for cell, device in zip(itertools.product(*map(range, self.shape)), self.devices, strict=True):
            rest = tuple(c for axis, c in enumerate(cell) if axis not in axes)
            grouped.setdefault(rest, []).append(device)
        return tuple(tuple(group) for group in grouped.values())


def parse_mesh(text: str) -> Mesh:
    """Read `4x2`. Raises AutoparError for anything else."""
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.strip().isdecimal() for part in parts):
        raise AutoparError(f"mesh {text!r} is not of the form 4x2: positive sizes joined by x")
    return Mesh(tuple(int(part) for part in parts))


def mesh_shapes(devices: int, most_axes: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write `devices` as an ordered product of 1 to `most_axes` factors above 1."""
    found: list[tuple[int, ...]] = [(devices,)]
    for first in range(2, devices // 2 + 1):
        if devices % first == 0 and most_axes > 1:
            found += [(first, *rest) for rest in mesh_shapes(devices // first, most_axes - 1)]
    return tuple(found)
