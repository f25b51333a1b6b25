"""Collectives as they were measured: by primitive and by how the ranks were parted into groups."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autopar.core.curves import Curve, curve_from_json
from autopar.core.errors import AutoparError, UnknownName
from autopar.core.files import entries, entry, typed
from autopar.core.reshard import MOVES_DATA, Primitive

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of `primitive` when every one of `groups`, of equal size and `parted`, runs it at once."""

    primitive: Primitive
    groups: Groups
    curve: Curve

    def __post_init__(self) -> None:
        if self.primitive not in MOVES_DATA:
            raise UnknownName("collective", self.primitive, sorted(MOVES_DATA))
        members = Counter(itertools.chain.from_iterable(self.groups))
        if len({len(group) for group in self.groups}) != 1 or len(self.groups[0]) < 2 or max(members.values()) > 1:
            raise AutoparError(f"groups of a measured {self.primitive} are {[list(group) for group in self.groups]}, "
                               "needed are groups of one size, at least 2, that name each device once")
        object.__setattr__(self, "groups", parted(self.groups))

    def to_json(self) -> dict[str, Any]:
        """The fields and those of the curve."""
        return {"primitive": self.primitive, "groups": self.groups, **self.curve.to_json()}


def parted(groups: Iterable[tuple[int, ...]]) -> Groups:
    """The same groups in ascending order: torch numbers the ranks of a group so, whatever the mesh."""
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def measured_from_json(data: dict[str, Any]) -> Measured:
    """The inverse of `Measured.to_json`. Raises AutoparError naming what is missing or wrong."""
    primitive: Any = entry(data, "primitive", str)
    groups = tuple(tuple(typed(f"groups[{i}][{j}]", device, int) for j, device in enumerate(group))
                   for i, group in enumerate(entries(data, "groups", list)))
    return Measured(primitive, groups, curve_from_json(data))


def check_measured(collectives: tuple[Measured, ...], devices: int) -> None:
    """Raises AutoparError for a device that is not in the cluster, and for what was measured twice."""
    for found in collectives:
        numbers = list(itertools.chain.from_iterable(found.groups))
        if min(numbers) < 0 or max(numbers) >= devices:
            raise AutoparError(f"groups of a measured {found.primitive} name devices {min(numbers)} to {max(numbers)}, "
                               f"the cluster has 0 to {devices - 1}")
    often = Counter((found.primitive, found.groups) for found in collectives).most_common(1)
    if often and often[0][1] > 1:
        primitive, groups = often[0][0]
        raise AutoparError(f"{primitive} over groups {[list(group) for group in groups]} is there {often[0][1]} times, "
                           "needed is once")
