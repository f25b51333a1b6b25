"""Layouts written by hand, as lists of ranks: those of each pipeline, and those that hold the same stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.errors import AutoparError

Lists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class HandLayout:
    """`columns` are the ranks of each pipeline, stage by stage (`ppranks`); `groups` those that hold the same stage
    (`dpranks`), none where the columns tell alone."""

    columns: Lists
    groups: Lists = ()

    @property
    def stages(self) -> int:
        """How many ranks a pipeline has, of the first one."""
        return len(self.columns[0]) if self.columns else 0

    def devices(self, size: int) -> tuple[int, ...]:
        """All of `size` devices, place by place. Raises AutoparError unless every rank is in one of each list, and no
        two share both."""
        for name, lists in (("ppranks", self.columns), *((("dpranks", self.groups),) if self.groups else ())):
            _check_lists(name, lists, size)
        by_place = [frozenset(column[j] for column in self.columns) for j in range(self.stages)]
        wrong = [list(group) for group in self.groups if frozenset(group) not in by_place]
        if wrong:
            raise AutoparError(f"dpranks {wrong[0]} are no ranks of one stage of ppranks, whose stages have "
                               f"{', '.join(str(sorted(place)) for place in by_place)}; groups of the two must be "
                               "orthogonal: rank i of every pipeline together")
        return tuple(column[j] for j in range(self.stages) for column in self.columns)


def _check_lists(name: str, lists: Sequence[Sequence[int]], size: int) -> None:
    """Raises AutoparError unless the lists are equally long and have each of `size` ranks once."""
    often = Counter(rank for each in lists for rank in each)
    lacking, twice = sorted(set(range(size)) - set(often)), sorted(rank for rank, n in often.items() if n > 1)
    strange = sorted(set(often) - set(range(size)))
    if lacking or twice or strange:
        beyond = f" and name {strange}" if strange else ""
        raise AutoparError(f"{name} miss ranks {lacking or 'none'} and repeat {twice or 'none'}{beyond}, of 0 to "
                           f"{size - 1}; name each once")
    if len({len(each) for each in lists}) != 1:
        raise AutoparError(f"{name} have lists of {sorted({len(each) for each in lists})} ranks; make them equally "
                           "long")
